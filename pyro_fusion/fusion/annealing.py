# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Soft E- and M-steps at falling temperatures: where fusion with ``solver="sinkhorn"`` starts."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_fusion.assignment import sinkhorn, soft_assignment
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.pooling.components import Atoms, Components, compact

__all__ = ["annealed", "soft_barycenter"]

# Temperatures, in units of the dispersion, and E- and M-steps at each.
_HOTTEST, _COLDEST, _FACTOR, _STEPS = 1.0, 0.02, 0.5, 3
# Pairs of less probability do not enter a barycentre; atoms of less popularity are dropped.
_NEGLIGIBLE = 1e-3
_EMPTY = 0.05


def soft_barycenter(problem: Components, soft: Tensor) -> Atoms:
    """Soft M-step: the atoms of a soft assignment ``[K, N]``, in which each component counts by its
    probability."""
    groups, members = (soft > _NEGLIGIBLE).nonzero().unbind(1)
    part = problem.take(members)
    return part.m_step(groups, len(soft), part.weights * soft[groups, members])


def annealed(problem: Components, assignment_prior: AssignmentPrior, start: Tensor) -> Tensor:
    """Soft EM from an assignment ``[N]``, rounded: LongTensor ``[N]``.

    ``start`` may have more atoms than are expected: they merge while it is hot.

    Source: Rose, *Deterministic Annealing for Clustering, Compression, Classification, Regression,
    and Related Optimization Problems* (Proc. IEEE 1998).
    """
    atoms = problem.m_step(*compact(start))
    temperature = _HOTTEST
    while temperature >= _COLDEST:
        for _ in range(_STEPS):
            e_step = problem.e_step(atoms, assignment_prior)
            soft = soft_assignment(e_step, temperature, tolerance=0.1, max_iterations=50).soft
            popularity = soft.sum(1)
            kept = popularity > min(_EMPTY, float(popularity.max()) / 2)
            if bool((soft[kept] > _NEGLIGIBLE).any()):  # else all would be alone
                atoms = soft_barycenter(problem, soft[kept & (soft > _NEGLIGIBLE).any(1)])
        temperature *= _FACTOR
    result = sinkhorn(
        problem.e_step(atoms, assignment_prior), assignment_prior, temperature=_COLDEST
    )
    return torch.cat(result.atoms)
