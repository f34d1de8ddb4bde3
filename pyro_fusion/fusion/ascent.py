# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""Closed-form coordinate ascent: E-steps from ``assignment/`` and M-steps from
``pooling/`` in turn, on the one objective

.. math:: F = \sum_s \sum_l w_s D(k_{sl}; s, l) / T + \sum_k \varphi(m_k) + \text{const}
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_fusion.assignment import Assignment, AssignmentProblem, coordinate
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.families import Factor
from pyro_fusion.fusion.moves import regroup, rematch
from pyro_fusion.pooling.components import Components, compact

__all__ = ["Ascent", "EMResult", "State", "expectation_maximization"]


@dataclass(frozen=True)
class EMResult:
    """The result of :func:`expectation_maximization`.

    :ivar groups: the atom of each component, LongTensor ``[N]``.
    :ivar num_atoms: K; each atom has at least one component.
    :ivar atoms: site -> factor of batch shape ``[K]``, but for sites of which entries are missing.
    :ivar assignment_prior: the prior, its own parameters at their estimates.
    :ivar objective: F after the start and after each iteration; never rises.
    :ivar converged: whether it stopped because nothing changed any more.
    :ivar bound: no assignment to these atoms has a lower F; ``-inf`` where the solver knows none.
    """

    groups: Tensor
    num_atoms: int
    atoms: dict[str, Factor]
    assignment_prior: AssignmentPrior
    objective: list[float]
    converged: bool
    bound: float


@dataclass(frozen=True)
class State:
    """An assignment, the atoms that are best for it, and the next E-step.

    :ivar groups, num_atoms, atoms, assignment_prior, bound: as of :class:`EMResult`.
    :ivar e_step: the problem that a solver is given.
    :ivar objective: F.
    """

    groups: Tensor
    num_atoms: int
    atoms: dict[str, Factor]
    e_step: AssignmentProblem
    assignment_prior: AssignmentPrior
    objective: float
    bound: float = -math.inf


@dataclass(frozen=True)
class Ascent:
    """Coordinate ascent, one iteration at a time: a state is a value, and :meth:`step` returns the
    next. F never rises.

    :ivar problem: the components.
    :ivar collapsed: where E- and M-steps have come to an end, and merges and splits of atoms too,
        let several parties move at once, then match each once more on the collapsed objective
        (``moves.py``), and go on from there if that helped.
    :ivar solver: of the E-steps.
    """

    problem: Components
    collapsed: bool = True
    solver: Callable[..., Assignment] = coordinate

    def init(self, assignment_prior: AssignmentPrior, start: Tensor) -> State:
        """The state at an assignment.

        :param start: the group of each component, LongTensor ``[N]``, any integers; no two
            components of a party share one.
        """
        return _maximise(self.problem, assignment_prior, start)

    def step(self, state: State) -> tuple[State, bool]:
        """One E-step, or a move where it does not help, and the M-step after it: the next state,
        and True if F fell. Where nothing helps, the state has the bound of the E-step."""
        # From the cheapest to the dearest: each is taken only where those before do not help.
        moves = (self._regroup, self._move, self._rematch) if self.collapsed else (self._regroup,)
        proposal, bound = self._e_step(state)
        now = state.objective
        for move in (None, *moves):
            groups, _ = compact(proposal if move is None else move(state))
            if torch.equal(groups, state.groups):
                continue
            after = _maximise(self.problem, state.assignment_prior, groups)
            # Equality up to rounding is convergence; what stands is kept: F never rises.
            if after.objective < now - 1e-12 * abs(now):
                return after, True
        return replace(state, bound=bound), False

    def _e_step(self, x: State) -> tuple[Tensor, float]:
        settings = {"moves": False} if self.solver is coordinate else {}
        result = self._solve(x, self.solver, **settings)
        bound = result.bound + x.assignment_prior.constant(self.problem.num_parties)
        return torch.cat(result.atoms), bound

    def _solve(self, x: State, solver: Callable[..., Assignment], **settings: Any) -> Assignment:
        start = self.problem.split(x.groups)
        return solver(x.e_step, x.assignment_prior, start=start, **settings)

    def _move(self, x: State) -> Tensor:
        return torch.cat(self._solve(x, coordinate).atoms)

    def _regroup(self, x: State) -> Tensor:
        try:
            return regroup(self.problem, x.assignment_prior, x.groups, x.num_atoms, x.e_step.cost)
        except (torch.linalg.LinAlgError, ValueError):
            return x.groups  # some candidate group is improper

    def _rematch(self, x: State) -> Tensor:
        return rematch(self.problem, x.assignment_prior, x.groups, x.num_atoms, x.e_step.cost)


def expectation_maximization(
    problem: Components,
    assignment_prior: AssignmentPrior,
    start: Tensor,
    max_iterations: int = 100,
    collapsed: bool = True,
    solver: Callable[..., Assignment] = coordinate,
) -> EMResult:
    """Alternate E- and M-steps from an assignment until F no longer falls; arguments as for
    :class:`Ascent` and its ``init``."""
    ascent = Ascent(problem, collapsed, solver)
    x = ascent.init(assignment_prior, start)
    trace = [x.objective]
    fell = True
    while fell and len(trace) <= max_iterations:
        x, fell = ascent.step(x)
        if fell:
            trace.append(x.objective)
    return EMResult(
        groups=x.groups,
        num_atoms=x.num_atoms,
        atoms=x.atoms,
        assignment_prior=x.assignment_prior,
        objective=trace,
        converged=not fell,
        bound=x.bound,
    )


def _maximise(problem: Components, assignment_prior: AssignmentPrior, groups: Tensor) -> State:
    """M-step: atoms and the prior's own parameters given the assignment, and F there."""
    groups, num_atoms = compact(groups)
    atoms = problem.m_step(groups, num_atoms)
    prior = assignment_prior.update(num_atoms, problem.num_parties)
    e_step = problem.e_step(atoms, prior)
    return State(
        groups=groups,
        num_atoms=num_atoms,
        atoms={site: atoms[site] for site in problem.local},
        e_step=e_step,
        assignment_prior=prior,
        objective=prior.constant(problem.num_parties) + e_step.objective(groups),
    )
