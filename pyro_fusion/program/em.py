# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Inference of a fusion in closed form: coordinate ascent on its ELBO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pyro.nn.module import PyroModule
from torch import Tensor

from pyro_fusion.assignment import Assignment, AssignmentProblem, coordinate, relaxed, sinkhorn
from pyro_fusion.assignment.priors import AssignmentPrior, FixedAtoms, GroupNormPrior
from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor
from pyro_fusion.fusion.annealing import annealed
from pyro_fusion.fusion.ascent import Ascent, EMResult, expectation_maximization
from pyro_fusion.fusion.parties import LabelProblem, locating
from pyro_fusion.fusion.result import FusedLabel, Fusion
from pyro_fusion.fusion.roles import turns
from pyro_fusion.fusion.seeding import starts
from pyro_fusion.pooling.components import by_popularity
from pyro_fusion.posterior import Posterior
from pyro_fusion.program.guide import FusionGuide
from pyro_fusion.program.model import FusionModel

__all__ = ["FusionEM", "check_own", "check_run"]

# A search for an assignment, from one that there is or from nothing: its result, and where each
# start ended; and the same with the assignment in the order of the parties.
_Search = Callable[[LabelProblem, Tensor | None], tuple[EMResult, list[float]]]
_Found = tuple[Tensor, EMResult, list[float]]

_Solver = Callable[..., Assignment]
_SOLVERS: dict[str, _Solver] = {
    "coordinate": coordinate,
    "relaxed": relaxed,
    "sinkhorn": sinkhorn,
}

# So many of the starts' results are refined on the collapsed objective.
_REFINED = 3

# When so many starts have come to one end, and none to a better, there are no more.
_AGREEING = 3


def _same(a: float, b: float) -> bool:
    """Whether two objectives are those of one assignment, up to rounding."""
    return abs(a - b) <= 1e-9 * max(abs(a), abs(b))


def _checked(solver: _Solver) -> _Solver:
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


def _solver_named(solver: str | _Solver) -> _Solver:
    if callable(solver):
        return solver if solver in _SOLVERS.values() else _checked(solver)
    if not isinstance(solver, str) or solver not in _SOLVERS:
        raise ParameterError(
            f"solver must be one of {sorted(_SOLVERS)} or a function, got {solver!r}"
        )
    return _SOLVERS[solver]


def check_run(restarts: int, max_iterations: int, seed: int) -> None:
    """:raises ParameterError: for arguments of :meth:`FusionEM.run` out of range."""
    if restarts < 0 or max_iterations < 1:
        raise ParameterError(
            f"expected restarts >= 0 and max_iterations >= 1, got {restarts} and {max_iterations}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ParameterError(f"seed must be an integer, got {seed!r}")


def check_own(model: FusionModel, guide: FusionGuide | None = None) -> None:
    """:raises ParameterError: if a method is overridden that has a closed form, or if the guide is
    that of another model, or relaxed."""
    methods: list[tuple[PyroModule, type[PyroModule], str]] = [
        (model, FusionModel, name) for name in ("assignment_prior", "local", "scale")
    ]
    if guide is not None:
        methods.append((guide, FusionGuide, "scale"))
    for owner, prior, name in methods:
        if getattr(getattr(owner, name), "__func__", None) is not getattr(prior, name):
            raise ParameterError(
                f"{type(owner).__name__} overrides {name}(): there are closed forms for "
                f"{prior.__name__}'s own alone; use SVI"
            )
    if guide is not None and guide.model is not model:
        raise ParameterError("the guide is that of another model")
    if guide is not None and guide.relaxed:
        raise ParameterError("the guide is relaxed: harden() it first")


class FusionEM:
    """Coordinate ascent for a model and its guide, in place of ``SVI``: each :meth:`step` is an
    exact E-step and an exact M-step, and never raises the loss.

    :param model: whose ``assignment_prior``, ``local`` and ``scale`` are its own: there are no
        closed forms for others.
    :param guide: its guide; begins where that is.
    :param solver: of the E-steps, as for :func:`~pyro_fusion.fuse`.
    :raises ParameterError: for a model that overrides these methods, a guide that is relaxed or of
        another model, or a solver that is unknown or not for its prior or pooling.

    Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), alg. 1,
    with one direction of the divergence in both steps.
    """

    def __init__(
        self,
        model: FusionModel,
        guide: FusionGuide,
        *,
        solver: Literal["coordinate", "relaxed", "sinkhorn"] | _Solver = "coordinate",
    ) -> None:
        check_own(model, guide)
        chosen = _solver_named(solver)
        for part in model.parts.values():
            convex = isinstance(part.assignment_prior, (GroupNormPrior, FixedAtoms))
            if chosen is relaxed and not (model.pooling.convex and convex):
                raise ParameterError(
                    "solver 'relaxed' needs GroupNormPrior or FixedAtoms and pooling 'inclusive' "
                    f"or 'exclusive', got {part.assignment_prior!r} and {model.pooling.name!r}"
                )
        self.model, self.guide, self.solver = model, guide, chosen
        self._ascents: dict[str, Ascent] = {}
        self._shared = {site: model.parties.share(site) for site in model.shared}

    @property
    def _shared_objective(self) -> float:
        return sum(divergence for _, divergence in self._shared.values())

    def step(self) -> float:
        """One E- and M-step for each label; a move out of a local optimum where that changes
        nothing. Returns the loss, ``F``: minus the ELBO."""
        loss = self._shared_objective
        for group in self.model.parties.roles.groups:
            for label in group:
                part = self.model.given(label, self.guide.assignment)
                with locating(part.messages):
                    ascent = self._ascent(part)
                    ascent.step()
                x = ascent.state
                self.guide.set_atoms(label, part.as_given(x.groups), x.atoms)
            if len(group) > 1:
                loss += self.model.linked_objective(group, self.guide.assignment)
            else:
                loss += x.objective
        self.guide.set_shared()
        return loss

    def _ascent(self, part: LabelProblem) -> Ascent:
        """Where the last step ended, unless the guide has been moved since."""
        start = self._start(part)
        ascent = self._ascents.get(part.label)
        if (
            ascent is None
            or ascent.problem is not part.ordered
            or not torch.equal(ascent.state.groups, start)
        ):
            ascent = Ascent(part.ordered, part.assignment_prior, start, solver=self.solver)
            self._ascents[part.label] = ascent
        return ascent

    def _start(self, part: LabelProblem) -> Tensor:
        return self.guide.assignment[part.label].cpu()[part.order]

    # -- the whole way ----------------------------------------------------------------------------

    def run(
        self, restarts: int = 9, max_iterations: int = 100, *, seed: int = 0, progress: bool = False
    ) -> Fusion:
        """Steps to convergence from where the guide is and from other starts; the guide ends at the
        best. Arguments as for :func:`~pyro_fusion.fuse`, which this is.

        :raises ParameterError: for arguments out of range, and where ``product`` is improper.
        """
        check_run(restarts, max_iterations, seed)

        def search(part: LabelProblem, first: Tensor | None) -> tuple[EMResult, list[float]]:
            with locating(part.messages):
                return self._search(part, first, restarts, max_iterations, seed, progress)

        traces: list[list[float]] = []
        matchings: dict[str, FusedLabel] = {}
        for group in self.model.parties.roles.groups:
            if len(group) == 1:
                part = self.model.parts[group[0]]
                best, ends = search(part, self._start(part))
                traces.append(best.objective)
                found = {part.label: (part.as_given(best.groups), best, ends)}
            else:
                found, trace = self._in_turn(group, search, max_iterations)
                traces.append(trace)
            matchings.update({label: self._matching(label, *x) for label, x in found.items()})
        self.guide.set_shared()
        return self._fusion(matchings, traces)

    def _in_turn(
        self, group: tuple[str, ...], search: _Search, max_iterations: int
    ) -> tuple[dict[str, _Found], list[float]]:
        """Labels that share sites: each is assigned in turn, given the others, until none changes;
        also the objective after each round, which never rises."""
        model, solver = self.model, self.solver
        objective = partial(model.linked_objective, group)
        parties = model.parties
        begin = [{x: self.guide.assignment[x].cpu() for x in group}]
        # Or from nothing, each given those before it. What is wrong at first misleads the others,
        # which then leave it wrong: any may be the first.
        for first in group:
            if parties.roles.matched[first]:
                fresh: dict[str, Tensor] = {}
                for label in turns(parties.posteriors[0], parties.roles, first):
                    part = model.given(label, fresh)
                    fresh[label] = part.as_given(search(part, None)[0].groups)
                begin.append(fresh)
        groups = min(begin, key=objective)
        trace = [objective(groups)]
        found: dict[str, _Found] = {}
        while len(trace) <= max_iterations:
            for label in group:
                part = model.given(label, groups)
                start = groups[label][part.order]
                with locating(part.messages):
                    best = expectation_maximization(
                        part.ordered, part.assignment_prior, start, max_iterations, solver=solver
                    )
                ends = found[label][2] if label in found else []
                if not ends:  # in the light of all others for the first time
                    other, ends = search(part, start)
                    best = min(best, other, key=lambda x: x.objective[-1])
                groups[label] = part.as_given(best.groups)
                found[label] = groups[label], best, ends
            trace.append(objective(groups))
            if _same(trace[-1], trace[-2]):
                return found, trace
        unsettled = {
            x: (k, replace(best, converged=False), ends) for x, (k, best, ends) in found.items()
        }
        return unsettled, trace

    def _matching(
        self, label: str, groups: Tensor, best: EMResult, ends: list[float]
    ) -> FusedLabel:
        part = self.model.parts[label]
        groups, popularity = by_popularity(groups, best.num_atoms)
        with locating(part.messages):
            atoms = part.problem.barycenter(groups, best.num_atoms)
        self.guide.set_atoms(label, groups, atoms)
        return FusedLabel(
            label,
            list(groups.split(part.problem.sizes)),
            best.num_atoms,
            popularity,
            best.objective,
            part.dispersion,
            best.assignment_prior,
            best.converged,
            ends,
            best.bound,
        )

    def _search(
        self,
        part: LabelProblem,
        first: Tensor | None,
        restarts: int,
        max_iterations: int,
        seed: int,
        progress: bool,
    ) -> tuple[EMResult, list[float]]:
        """Coordinate ascent from every start, the best few then on the collapsed objective, which
        takes longer; the best result and where each start ended."""
        from tqdm import tqdm

        problem, assignment_prior, solver = part.ordered, part.assignment_prior, self.solver
        begin = starts(problem, assignment_prior, restarts, seed, first)
        bar = tqdm(begin, total=restarts + 1, desc="fusing", disable=not progress)
        results: list[EMResult] = []
        ends: list[float] = []
        for start in bar:
            if solver is sinkhorn:
                start = annealed(problem, assignment_prior, start)
            results.append(
                expectation_maximization(
                    problem, assignment_prior, start, max_iterations, collapsed=False
                )
            )
            ends.append(results[-1].objective[-1])
            if sum(_same(f, min(ends)) for f in ends) == _AGREEING:
                break
        order: list[int] = []
        for i in sorted(range(len(ends)), key=ends.__getitem__):
            if not any(_same(ends[i], ends[k]) for k in order):
                order.append(i)
        best: EMResult | None = None
        for i in order[:_REFINED]:
            result = expectation_maximization(
                problem, assignment_prior, results[i].groups, max_iterations, solver=solver
            )
            ends[i] = result.objective[-1]
            if best is None or result.objective[-1] < best.objective[-1]:
                trace = results[i].objective + result.objective[1:]
                best = replace(result, objective=trace)
        assert best is not None
        return best, ends

    def _fusion(self, matchings: dict[str, FusedLabel], traces: list[list[float]]) -> Fusion:
        parties, first = self.model.parties, self.model.parties.posteriors[0]
        factors: dict[str, Factor] = {site: atom for site, (atom, _) in self._shared.items()}
        groups = {label: torch.cat(m.assignment) for label, m in matchings.items()}
        counts = {label: m.num_atoms for label, m in matchings.items()}
        for label, part in self.model.parts.items():
            factors.update(parties.pool(part, groups[label], counts[label]))
        for site, link in self.model.links.items():
            with locating(link.messages):
                factors[site] = link.pooled(first, groups, counts)
        for site, label in parties.roles.carried.items():
            factors[site] = parties.carry(site, matchings[label].assignment, counts[label])
        ordered = {k: factors[k].to(dtype=f.dtype) for k, f in first.decomposed.items()}
        posterior = Posterior(ordered, first.axes, plates=first.plates, outgoing=first.outgoing)
        shared = self._shared_objective
        trace = [shared]
        for own in traces:
            trace = [f + own[0] for f in trace] + [trace[-1] + f for f in own[1:]]
        return Fusion(posterior, self.model.pooling.name, matchings, trace, shared, parties.names)
