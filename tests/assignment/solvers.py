# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Our solvers, each run with a check of what holds of any result."""

from collections.abc import Callable

import pytest

from pyro_fusion import FixedAtoms
from pyro_fusion.assignment import (
    Assignment,
    coordinate,
    relaxed,
    sinkhorn,
)
from pyro_fusion.testing.solver import check_assignment

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
    check_assignment(cost, prior, result)
    return result
