# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Closed-form inference of the program, in place of SVI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from pyro_fusion.errors import naming
from pyro_fusion.families import Factor
from pyro_fusion.fusion.ascent import Ascent, State
from pyro_fusion.fusion.parties import LabelProblem, searching
from pyro_fusion.fusion.result import Fusion
from pyro_fusion.fusion.search import search
from pyro_fusion.fusion.solvers import Solver, solver_for
from pyro_fusion.pooling.components import Components
from pyro_fusion.program.guide import FusionGuide, check_own
from pyro_fusion.program.model import FusionModel

__all__ = ["FusionEM"]


class FusionEM:
    """Coordinate ascent for a model and its guide, in place of ``SVI``: each :meth:`step` is an
    exact E-step and an exact M-step, and never raises the loss.

    :param model: whose ``assignment_prior``, ``local`` and ``scale`` are its own: there are no
        closed forms for others.
    :param guide: its guide; begins where that is.
    :param solver: of the E-steps, as for :func:`~pyro_fusion.fuse`.
    :raises ParameterError: for a model that overrides these methods, a guide that is relaxed or of
        another model, or a solver that is unknown or not for its assignment prior
        or pooling.

    Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), alg. 1,
    with one direction of the divergence in both steps.
    """

    def __init__(
        self,
        model: FusionModel,
        guide: FusionGuide,
        *,
        solver: Literal["coordinate", "relaxed", "sinkhorn"] | Solver = "coordinate",
    ) -> None:
        check_own(model, guide)
        self.model, self.guide = model, guide
        self.solver = solver
        self._solver = solver_for(model.problem, solver)
        self._states: dict[str, tuple[Components, State]] = {}

    def step(self) -> float:
        """One E- and M-step for each label; a move out of a local optimum where that changes
        nothing. Returns the loss, ``F``: minus the ELBO."""
        problem, guide = self.model.problem, self.guide
        loss = problem.shared_objective
        for group in problem.groups:
            for label in group:
                part = problem.given(label, guide.assignment)
                with naming(problem.parties.names), searching(part):
                    x = self._step(part)
                own = {site: f for site, f in x.atoms.items() if site not in problem.links}
                self._move({label: part.as_given(x.groups)}, own)
            if len(group) > 1:
                loss += problem.linked_objective(group, guide.assignment)
            else:
                loss += x.objective
        linked = problem.linked_atoms(guide.assignment, guide.num_atoms)
        self._move({}, linked | problem.shared_atoms)
        return loss

    def _step(self, part: LabelProblem) -> State:
        """The state after a step along a label, from that of the last one unless the guide has been
        moved since."""
        start = self.guide.assignment[part.label][part.order]
        ascent = Ascent(part.ordered, solver=self._solver)
        problem, state = self._states.get(part.label, (None, None))
        if state is None or problem is not part.ordered or not torch.equal(state.groups, start):
            state = ascent.init(part.assignment_prior, start)
        state, _ = ascent.step(state)
        self._states[part.label] = part.ordered, state
        return state

    def _move(self, assignment: Mapping[str, Tensor], atoms: Mapping[str, Factor]) -> None:
        for program in (self.model, self.guide):
            program.move(assignment, atoms)

    def run(
        self, restarts: int = 9, max_iterations: int = 100, *, seed: int = 0, progress: bool = False
    ) -> Fusion:
        """Steps to convergence from where the guide is and from other starts; the guide ends at the
        best. Arguments as for :func:`~pyro_fusion.fuse`, which finds the same from the guide's
        default.

        :raises ParameterError: for arguments out of range, and where ``product`` is improper.
        """
        problem = self.model.problem
        result = search(
            problem,
            restarts=restarts,
            max_iterations=max_iterations,
            seed=seed,
            solver=self.solver,
            start=self.guide.assignment,
            progress=progress,
        )
        found = {label: torch.cat(m.assignment) for label, m in result.labels.items()}
        self._move(found, problem.atoms(found)[0])
        return result
