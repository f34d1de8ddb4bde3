# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""Closed-form coordinate ascent: E-steps from ``assignment/`` and M-steps from
``barycenter.py`` in turn, on the one objective

.. math:: F = \sum_s \sum_l w_s D(k_{sl}; s, l) / T + \sum_k \varphi(m_k) + \text{const}
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_fusion.assignment import Assignment, AssignmentProblem, coordinate
from pyro_fusion.families import Factor
from pyro_fusion.moves import regroup, rematch
from pyro_fusion.priors import AssignmentPrior
from pyro_fusion.problem import MatchingProblem, compact

__all__ = ["EMResult", "expectation_maximization"]


@dataclass(frozen=True)
class EMResult:
    """The result of :func:`expectation_maximization`.

    :ivar groups: the atom of each component, LongTensor ``[N]``.
    :ivar num_atoms: K; each atom has at least one component.
    :ivar atoms: site -> factor of batch shape ``[K]``.
    :ivar prior: the prior, its own parameters at their estimates.
    :ivar objective: F after the start and after each iteration; never rises.
    :ivar converged: whether it stopped because nothing changed any more.
    :ivar bound: no assignment to these atoms has a lower F; ``-inf`` where the solver knows none.
    """

    groups: Tensor
    num_atoms: int
    atoms: dict[str, Factor]
    prior: AssignmentPrior
    objective: list[float]
    converged: bool
    bound: float


@dataclass(frozen=True)
class _State:
    groups: Tensor
    num_atoms: int
    atoms: dict[str, Factor]
    e_step: AssignmentProblem
    prior: AssignmentPrior
    objective: float


def expectation_maximization(
    problem: MatchingProblem,
    prior: AssignmentPrior,
    start: Tensor,
    max_iterations: int = 100,
    collapsed: bool = True,
    solver: Callable[..., Assignment] = coordinate,
) -> EMResult:
    """Alternate E- and M-steps from an assignment until F no longer falls.

    :param start: the group of each component, LongTensor ``[N]``, any integers; no two components
        of a party share one.
    :param collapsed: where that has come to an end, and merges and splits of atoms too, let several
        parties move at once, then match each once more on the collapsed objective (``moves.py``),
        and go on from there if that helped.
    :param solver: of the E-steps.
    """
    state = _maximise(problem, prior, start)
    trace = [state.objective]
    bound = -math.inf

    def e_step(problem: MatchingProblem, state: _State) -> Tensor:
        nonlocal bound
        settings = {"moves": False} if solver is coordinate else {}
        result = _solve(problem, state, solver, **settings)
        bound = result.bound + state.prior.constant(problem.num_parties)
        return torch.cat(result.atoms)

    # From the cheapest to the dearest: each is taken only where those before do not help.
    steps = (e_step, _regroup, _move, _rematch) if collapsed else (e_step, _regroup)
    converged = False
    while not converged and len(trace) <= max_iterations:
        for step in steps:
            proposal = _maximise(problem, state.prior, step(problem, state))
            # Equality up to rounding is convergence; what stands is kept: the trace never rises.
            converged = not proposal.objective < state.objective - 1e-12 * abs(state.objective)
            if not converged:
                state, bound = proposal, -math.inf
                trace.append(state.objective)
                break
    return EMResult(
        state.groups, state.num_atoms, state.atoms, state.prior, trace, converged, bound
    )


def _solve(
    problem: MatchingProblem, state: _State, solver: Callable[..., Assignment], **settings: Any
) -> Assignment:
    return solver(state.e_step, state.prior, start=problem.split(state.groups), **settings)


def _move(problem: MatchingProblem, state: _State) -> Tensor:
    return torch.cat(_solve(problem, state, coordinate).atoms)


def _regroup(problem: MatchingProblem, state: _State) -> Tensor:
    try:
        return regroup(problem, state.prior, state.groups, state.num_atoms, state.e_step.cost)
    except (torch.linalg.LinAlgError, ValueError):
        return state.groups  # some candidate group is improper


def _rematch(problem: MatchingProblem, state: _State) -> Tensor:
    return rematch(problem, state.prior, state.groups, state.num_atoms, state.e_step.cost)


def _maximise(problem: MatchingProblem, prior: AssignmentPrior, groups: Tensor) -> _State:
    """M-step: atoms and the prior's own parameters given the assignment, and F there."""
    groups, num_atoms = compact(groups)
    atoms = problem.barycenter(groups, num_atoms)
    prior = prior.update(num_atoms, problem.num_parties)
    e_step = problem.e_step(atoms, prior)
    objective = prior.constant(problem.num_parties) + e_step.objective(groups)
    return _State(groups, num_atoms, atoms, e_step, prior, objective)
