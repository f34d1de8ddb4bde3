# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The search for the best assignment of a problem: coordinate ascent from several starts, the best
few refined, and labels that share sites in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from typing import Literal

import torch
from torch import Tensor

from pyro_fusion.assignment import sinkhorn
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.errors import ParameterError, naming
from pyro_fusion.fusion.annealing import annealed
from pyro_fusion.fusion.ascent import EMResult, expectation_maximization
from pyro_fusion.fusion.chain import check_has_posterior, with_draws
from pyro_fusion.fusion.draws import AssignmentDraws
from pyro_fusion.fusion.parties import LabelProblem, searching
from pyro_fusion.fusion.problem import FusionProblem
from pyro_fusion.fusion.result import FusedLabel, Fusion, StopReason
from pyro_fusion.fusion.roles import turns
from pyro_fusion.fusion.seeding import starts
from pyro_fusion.fusion.solvers import Solver, solver_for
from pyro_fusion.pooling.components import Components, by_popularity

__all__ = ["check_run", "search"]


# So many of the starts' results are refined on the collapsed objective.
_REFINED = 3

# When so many starts have come to one end, and none to a better, there are no more.
_AGREEING = 3


@dataclass(frozen=True)
class _Found:
    """The end of the search along one label.

    :ivar groups: the atom of each component, LongTensor ``[N]``, in the order of the parties.
    :ivar best: the best result.
    :ivar ends: F at the end of each start.
    :ivar stopped: why there were no more starts.
    """

    groups: Tensor
    best: EMResult
    ends: list[float]
    stopped: StopReason


def search(
    problem: FusionProblem,
    *,
    restarts: int = 9,
    max_iterations: int = 100,
    seed: int = 0,
    solver: Literal["coordinate", "relaxed", "sinkhorn"] | Solver = "coordinate",
    start: Mapping[str, Tensor] | None = None,
    num_draws: int = 0,
    progress: bool = False,
) -> Fusion:
    """Fuse a problem: the assignment with the lowest F that coordinate ascent finds, and the atoms
    that are best for it.

    An interrupt (Ctrl-C) ends the search where it is, once a start has come to its end: the result
    is the best so far, labels that were not reached are where they began, and it says so.

    :param start: label -> the atom of each component, LongTensor ``[N]``, for the first start; by
        default that of :meth:`~pyro_fusion.FusionProblem.start`.
    :param restarts, max_iterations, seed, solver, num_draws, progress: as for
        :func:`~pyro_fusion.fuse`.
    :raises ParameterError: for arguments out of range, a solver that is unknown or not for its
        assignment prior or pooling, draws where there is no posterior of the assignment, and where
        ``product`` is improper.

    Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), alg. 1,
    with one direction of the divergence in both steps.
    """
    check_run(restarts, max_iterations, seed, num_draws)
    if num_draws:
        check_has_posterior(problem)
    chosen = solver_for(problem, solver)
    with naming(problem.parties.names):
        if len(problem.parties.posteriors) == 1:
            return _alone(problem, index(num_draws))
        first = problem.start() if start is None else {k: a.cpu() for k, a in start.items()}
        limits = {"restarts": index(restarts), "max_iterations": index(max_iterations)}
        settings = _Search(
            problem=problem, seed=index(seed), solver=chosen, progress=progress, **limits
        )
        fusion = settings.run(first)
    if num_draws == 0:
        return fusion
    return with_draws(problem, fusion, index(num_draws), index(seed), progress)


def check_run(restarts: int, max_iterations: int, seed: int, num_draws: int = 0) -> None:
    """:raises ParameterError: for arguments of :func:`search` out of range."""
    given = {"restarts": restarts, "max_iterations": max_iterations, "seed": seed}
    for name, value in (given | {"num_draws": num_draws}).items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ParameterError(f"{name} must be an integer, got {value!r}")
    if restarts < 0 or max_iterations < 1:
        raise ParameterError(
            f"expected restarts >= 0 and max_iterations >= 1, got {restarts} and {max_iterations}"
        )
    if num_draws < 0:
        raise ParameterError(f"expected num_draws >= 0, got {num_draws}")
    if not -(2**63) <= int(seed) < 2**64:
        raise ParameterError(f"seed must fit 64 bits, got {seed}")


def _same(a: float, b: float) -> bool:
    """True if two objectives are those of one assignment, up to rounding."""
    return abs(a - b) <= 1e-9 * max(abs(a), abs(b))


def _count(groups: Tensor) -> int:
    """The number of atoms of an assignment."""
    return len(groups.unique())


def _go_on(found: _Found) -> _Found:
    """Pass on the end of a search, or the interrupt that ended it."""
    if found.stopped is StopReason.INTERRUPTED:
        raise KeyboardInterrupt
    return found


@dataclass(frozen=True)
class _Search:
    """The settings of one search; see :func:`search`."""

    problem: FusionProblem
    restarts: int
    max_iterations: int
    seed: int
    solver: Solver
    progress: bool

    def run(self, start: dict[str, Tensor]) -> Fusion:
        traces: list[list[float]] = []
        found: dict[str, _Found] = {}
        stopped = False
        for group in self.problem.groups:
            try:
                own, trace = self._begun(group, start) if stopped else self._over(group, start)
            except KeyboardInterrupt:
                if not found:
                    raise
                own, trace = self._begun(group, start)
            found.update(own)
            traces.append(trace)
            stopped = any(f.stopped is StopReason.INTERRUPTED for f in own.values())
        return self.result(found, traces)

    def _over(
        self, group: tuple[str, ...], start: Mapping[str, Tensor]
    ) -> tuple[dict[str, _Found], list[float]]:
        """The search along labels that are linked, or along one that is not, and its trace."""
        if len(group) > 1:
            return self.in_turn(group, start)
        (label,) = group
        part = self.problem.parts[label]
        found = self.along(part, start[label][part.order], _count(start[label]))
        return {label: found}, found.best.objective

    def _begun(
        self, group: tuple[str, ...], groups: Mapping[str, Tensor]
    ) -> tuple[dict[str, _Found], list[float]]:
        """Labels where they stand when an interrupt comes, and their objective."""
        found = {}
        for label in group:
            part = self.problem.given(label, groups)
            with searching(part):
                best = expectation_maximization(
                    part.ordered, part.assignment_prior, groups[label][part.order], 0
                )
            found[label] = _Found(
                groups=part.as_given(best.groups),
                best=best,
                ends=list(best.objective),
                stopped=StopReason.INTERRUPTED,
            )
        if len(group) == 1:
            return found, found[group[0]].best.objective
        return found, [self.problem.linked_objective(group, groups)]

    def along(self, part: LabelProblem, first: Tensor | None, num_atoms: int) -> _Found:
        """Coordinate ascent along one label from every start, the best few then on the collapsed
        objective, which takes longer.

        :param first: the first start, ``[N]`` in the order of ``part.ordered``; None to make one.
        :param num_atoms: K of the search's own start, for a solver that reads the prior before the
            first M-step.
        """
        from tqdm import tqdm

        problem = part.ordered
        belief = part.assignment_prior.update(num_atoms, problem.num_parties)
        begin = starts(problem, belief, self.restarts, self.seed, first)
        bar = tqdm(begin, total=self.restarts + 1, desc="fusing", disable=not self.progress)
        results: list[EMResult] = []
        ends: list[float] = []
        stopped = StopReason.EXHAUSTED
        with searching(part):
            try:
                for x in bar:
                    if self.solver is sinkhorn:
                        x = annealed(problem, belief, x)
                    results.append(
                        expectation_maximization(
                            problem, belief, x, self.max_iterations, collapsed=False
                        )
                    )
                    ends.append(results[-1].objective[-1])
                    if sum(_same(f, min(ends)) for f in ends) == _AGREEING:
                        stopped = StopReason.AGREED
                        break
                best = self._refined(problem, belief, results, ends)
            except KeyboardInterrupt:
                if not ends:
                    raise
                stopped = StopReason.INTERRUPTED
                best = min(results, key=lambda result: result.objective[-1])
        if stopped is not StopReason.INTERRUPTED and not best.converged:
            stopped = StopReason.ITERATION_LIMIT
        return _Found(groups=part.as_given(best.groups), best=best, ends=ends, stopped=stopped)

    def _refined(
        self,
        problem: Components,
        belief: AssignmentPrior,
        results: list[EMResult],
        ends: list[float],
    ) -> EMResult:
        """The best of the best few results, gone on from on the collapsed objective; writes what
        they come to, and where they end, to ``results`` and ``ends``."""
        order: list[int] = []
        for i in sorted(range(len(ends)), key=ends.__getitem__):
            if not any(_same(ends[i], ends[k]) for k in order):
                order.append(i)
        best: EMResult | None = None
        for i in order[:_REFINED]:
            result = expectation_maximization(
                problem, belief, results[i].groups, self.max_iterations, solver=self.solver
            )
            ends[i] = result.objective[-1]
            results[i] = replace(result, objective=results[i].objective + result.objective[1:])
            if best is None or ends[i] < best.objective[-1]:
                best = results[i]
        assert best is not None
        return best

    def in_turn(
        self, group: tuple[str, ...], start: Mapping[str, Tensor]
    ) -> tuple[dict[str, _Found], list[float]]:
        """Labels that share sites: each is assigned in turn, given the others, until none changes.
        Also the objective after each round, which never rises."""
        problem, parties = self.problem, self.problem.parties
        objective = partial(problem.linked_objective, group)
        begin = [{x: start[x] for x in group}]
        groups: dict[str, Tensor] | None = None
        trace: list[float] = []
        found: dict[str, _Found] = {}
        try:
            # Or from nothing, each given those before it. What is wrong at first misleads the
            # others, which then leave it wrong: any may be the first.
            for first in group:
                if parties.roles.matched[first]:
                    fresh: dict[str, Tensor] = {}
                    for label in turns(parties.posteriors[0], parties.roles, first):
                        part = problem.given(label, fresh)
                        one = self.along(part, None, _count(start[label]))
                        fresh[label] = _go_on(one).groups
                    begin.append(fresh)
            groups = min(begin, key=objective)
            trace = [objective(groups)]
            while len(trace) <= self.max_iterations:
                for label in group:
                    part = problem.given(label, groups)
                    found[label] = self._again(
                        part, groups[label][part.order], _count(start[label]), found.get(label)
                    )
                    groups[label] = found[label].groups
                    _go_on(found[label])
                trace.append(objective(groups))
                if _same(trace[-1], trace[-2]):
                    return found, trace
        except KeyboardInterrupt:
            if groups is None and len(begin) == 1:
                raise
            own, last = self._begun(group, groups or min(begin, key=objective))
            own.update({x: replace(f, stopped=StopReason.INTERRUPTED) for x, f in found.items()})
            return own, trace + last
        limit = StopReason.ITERATION_LIMIT
        return {x: replace(f, stopped=limit) for x, f in found.items()}, trace

    def _again(
        self, part: LabelProblem, start: Tensor, num_atoms: int, before: _Found | None
    ) -> _Found:
        """A label once more, from where it is; in the light of all others for the first time, from
        other starts too."""
        with searching(part):
            best = expectation_maximization(
                part.ordered,
                part.assignment_prior,
                start,
                self.max_iterations,
                solver=self.solver,
            )
        if before is None:
            other = self.along(part, start, num_atoms)
            if not best.objective[-1] <= other.best.objective[-1]:
                return other
            before = other
        stopped = before.stopped
        if stopped is not StopReason.INTERRUPTED and not best.converged:
            stopped = StopReason.ITERATION_LIMIT
        return replace(before, groups=part.as_given(best.groups), best=best, stopped=stopped)

    def result(self, found: Mapping[str, _Found], traces: list[list[float]]) -> Fusion:
        problem = self.problem
        labels, groups = {}, {}
        ends = {label: f.groups for label, f in found.items()}
        for label, f in found.items():
            part = problem.parts[label]
            groups[label], popularity = by_popularity(f.groups, f.best.num_atoms)
            labels[label] = FusedLabel(
                label=label,
                assignment=list(groups[label].split(part.problem.sizes)),
                num_atoms=f.best.num_atoms,
                popularity=popularity,
                objective=f.best.objective,
                dispersion=part.dispersion,
                assignment_prior=f.best.assignment_prior,
                stopped=f.stopped,
                restarts=f.ends,
                bound=f.best.bound,
                dispersion_path=part.path,
                problem=problem.given(label, ends).with_path_of(part),
            )
        trace = [problem.shared_objective]
        for own in traces:
            trace = [f + own[0] for f in trace] + [trace[-1] + f for f in own[1:]]
        return Fusion(
            posterior=problem.fused(groups, {x: m.num_atoms for x, m in labels.items()}),
            pooling=problem.pooling.name,
            labels=labels,
            objective=trace,
            shared_objective=problem.shared_objective,
            parties=dict(zip(problem.parties.names, problem.parties.posteriors, strict=True)),
        )


def _alone(problem: FusionProblem, num_draws: int) -> Fusion:
    """One party: every component is an atom, and its posterior is the fused one."""
    labels = {}
    for label, part in problem.parts.items():
        size = part.problem.sizes[0]
        every = torch.arange(size)
        belief = part.assignment_prior.update(size, 1)
        objective = belief.constant(1) + size * float(belief.penalty(1)[1])
        labels[label] = FusedLabel(
            label=label,
            assignment=[every],
            num_atoms=size,
            popularity=torch.ones_like(every),
            objective=[objective],
            dispersion=part.dispersion,
            assignment_prior=belief,
            stopped=StopReason.AGREED,
            restarts=[objective],
            draws=AssignmentDraws.of_one_party(label, size, num_draws) if num_draws else None,
        )
    return Fusion(
        posterior=problem.parties.posteriors[0],
        pooling=problem.pooling.name,
        labels=labels,
        objective=[sum(m.objective[0] for m in labels.values())],
        shared_objective=0.0,
        parties=dict(zip(problem.parties.names, problem.parties.posteriors, strict=True)),
    )
