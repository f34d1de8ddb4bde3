# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""Closed-form coordinate ascent: E-steps from ``assignment/`` and M-steps from
``pooling/`` in turn, on the one objective

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
    :ivar atoms: site -> factor of batch shape ``[K]``.
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


class Ascent:
    """Coordinate ascent from an assignment, one iteration at a time; F never rises.

    :param start: the group of each component, LongTensor ``[N]``, any integers; no two components
        of a party share one.
    :param collapsed: where E- and M-steps have come to an end, and merges and splits of atoms too,
        let several parties move at once, then match each once more on the collapsed objective
        (``moves.py``), and go on from there if that helped.
    :param solver: of the E-steps.
    :ivar state: where it is.
    :ivar bound: no assignment to these atoms has a lower F; ``-inf`` where the solver knows none.
    """

    def __init__(
        self,
        problem: Components,
        assignment_prior: AssignmentPrior,
        start: Tensor,
        collapsed: bool = True,
        solver: Callable[..., Assignment] = coordinate,
    ) -> None:
        self.problem, self.solver = problem, solver
        self.state = _maximise(problem, assignment_prior, start)
        self.bound = -math.inf
        # From the cheapest to the dearest: each is taken only where those before do not help.
        steps = (self._e_step, self._regroup, self._move, self._rematch)
        self._steps = steps if collapsed else steps[:2]

    def step(self) -> bool:
        """One E-step, or a move where it does not help, and the M-step after it; whether F fell."""
        for step in self._steps:
            groups, _ = compact(step())
            if torch.equal(groups, self.state.groups):
                continue
            proposal = _maximise(self.problem, self.state.assignment_prior, groups)
            # Equality up to rounding is convergence; what stands is kept: F never rises.
            now = self.state.objective
            if proposal.objective < now - 1e-12 * abs(now):
                self.state, self.bound = proposal, -math.inf
                return True
        return False

    def _e_step(self) -> Tensor:
        settings = {"moves": False} if self.solver is coordinate else {}
        result = self._solve(self.solver, **settings)
        self.bound = result.bound + self.state.assignment_prior.constant(self.problem.num_parties)
        return torch.cat(result.atoms)

    def _move(self) -> Tensor:
        return torch.cat(self._solve(coordinate).atoms)

    def _solve(self, solver: Callable[..., Assignment], **settings: Any) -> Assignment:
        start = self.problem.split(self.state.groups)
        return solver(self.state.e_step, self.state.assignment_prior, start=start, **settings)

    def _regroup(self) -> Tensor:
        x = self.state
        try:
            return regroup(self.problem, x.assignment_prior, x.groups, x.num_atoms, x.e_step.cost)
        except (torch.linalg.LinAlgError, ValueError):
            return x.groups  # some candidate group is improper

    def _rematch(self) -> Tensor:
        x = self.state
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
    :class:`Ascent`."""
    ascent = Ascent(problem, assignment_prior, start, collapsed, solver)
    trace = [ascent.state.objective]
    converged = False
    while not converged and len(trace) <= max_iterations:
        converged = not ascent.step()
        if not converged:
            trace.append(ascent.state.objective)
    x = ascent.state
    return EMResult(
        x.groups, x.num_atoms, x.atoms, x.assignment_prior, trace, converged, ascent.bound
    )


@dataclass(frozen=True)
class State:
    """An assignment, the atoms that are best for it, and the next E-step.

    :ivar groups, num_atoms, atoms, assignment_prior: as of :class:`EMResult`.
    :ivar e_step: what a solver is given.
    :ivar objective: F.
    """

    groups: Tensor
    num_atoms: int
    atoms: dict[str, Factor]
    e_step: AssignmentProblem
    assignment_prior: AssignmentPrior
    objective: float


def _maximise(problem: Components, assignment_prior: AssignmentPrior, groups: Tensor) -> State:
    """M-step: atoms and the prior's own parameters given the assignment, and F there."""
    groups, num_atoms = compact(groups)
    atoms = problem.barycenter(groups, num_atoms)
    assignment_prior = assignment_prior.update(num_atoms, problem.num_parties)
    e_step = problem.e_step(atoms, assignment_prior)
    objective = assignment_prior.constant(problem.num_parties) + e_step.objective(groups)
    return State(groups, num_atoms, atoms, e_step, assignment_prior, objective)
