# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The solvers of E-steps by name, and a user's own, whose assignments are checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyro_fusion.assignment import Assignment, AssignmentProblem, coordinate, relaxed, sinkhorn
from pyro_fusion.assignment.priors import AssignmentPrior, FixedAtoms, GroupNormPrior
from pyro_fusion.errors import ParameterError
from pyro_fusion.fusion.problem import FusionProblem

__all__ = ["Solver", "solver_for"]

Solver = Callable[..., Assignment]

_SOLVERS: dict[str, Solver] = {
    "coordinate": coordinate,
    "relaxed": relaxed,
    "sinkhorn": sinkhorn,
}


def solver_for(problem: FusionProblem, solver: str | Solver) -> Solver:
    """The solver of that name, or the user's own, whose assignments are checked.

    :raises ParameterError: for one that is unknown, or not for the problem's pooling or priors.
    """
    if callable(solver):
        chosen = solver if solver in _SOLVERS.values() else _checked(solver)
    elif not isinstance(solver, str) or solver not in _SOLVERS:
        raise ParameterError(
            f"solver must be one of {sorted(_SOLVERS)} or a function, got {solver!r}"
        )
    else:
        chosen = _SOLVERS[solver]
    for part in problem.parts.values():
        convex = isinstance(part.assignment_prior, (GroupNormPrior, FixedAtoms))
        if chosen is relaxed and not (problem.pooling.convex and convex):
            raise ParameterError(
                "solver 'relaxed' needs GroupNormPrior or FixedAtoms and pooling 'inclusive' "
                f"or 'exclusive', got {part.assignment_prior!r} and {problem.pooling.name!r}"
            )
    return chosen


def _checked(solver: Solver) -> Solver:
    """A solver of the user's own, whose assignments are checked."""

    def checked(
        problem: AssignmentProblem, assignment_prior: AssignmentPrior, **settings: Any
    ) -> Assignment:
        result = solver(problem, assignment_prior, **settings)
        if not isinstance(result, Assignment):
            raise ParameterError(
                f"expected an Assignment from the solver, got {type(result).__name__}"
            )
        return replace(result, atoms=problem.split(problem.join(result.atoms)))

    return checked
