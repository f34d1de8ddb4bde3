# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Our solvers, each run with a check of what holds of any result."""

from collections.abc import Callable

import pytest
import torch

from pyro_fusion import FixedAtoms
from pyro_fusion.assignment import (
    NEW,
    Assignment,
    assignment_objective,
    coordinate,
    relaxed,
    sinkhorn,
)

SOLVERS: dict[str, Callable[..., Assignment]] = {
    "coordinate": coordinate,
    "relaxed": relaxed,
    "sinkhorn": sinkhorn,
}


every_solver = pytest.mark.parametrize("name", SOLVERS)


def solve(name, cost, prior, **options) -> Assignment:
    """Solve, and check what holds of any result."""
    if prior is None:
        prior = FixedAtoms(len(cost[0]))
    result = SOLVERS[name](cost, prior, **options)
    check_feasible(cost, prior, result)
    value = assignment_objective(cost, prior, result.atoms)
    assert result.objective == pytest.approx(value, rel=1e-12)
    assert result.bound <= result.objective
    return result


def check_feasible(cost, prior, result) -> None:
    assert len(result.atoms) == len(cost)
    for s, (a, c) in enumerate(zip(result.atoms, cost, strict=True)):
        assert a.dtype == torch.long
        assert a.device.type == "cpu"
        assert a.shape == (c.shape[1],)
        standing = a[a != NEW]
        assert bool(((a >= NEW) & (a < len(c))).all())
        assert len(standing.unique()) == len(standing)
        assert prior.num_atoms is None or len(standing) == len(a)
        assert bool(c[standing, (a != NEW).nonzero().squeeze(-1)].isfinite().all())
        if result.soft is not None:
            p = result.soft[s]
            assert p.shape == c.shape
            assert p.dtype == c.dtype
            assert p.device == c.device
            check_soft(p, c, prior)


def check_soft(p, cost, prior) -> None:
    """Whether or not the solver converged."""
    eps = 20 * torch.finfo(p.dtype).eps
    assert bool((p >= 0).all())
    assert bool((p[cost.isinf()] == 0).all())
    total = p.double().sum(0)
    assert bool((total <= 1 + eps).all())
    assert prior.num_atoms is None or bool((total >= 1 - eps).all())
    assert bool((p.double().sum(1) <= 1 + 1e-3 + eps).all())
