# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""``fuse()``: local posteriors in, one posterior out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_fusion.annealing import annealed
from pyro_fusion.assignment import Assignment, coordinate, relaxed, sinkhorn
from pyro_fusion.barycenter import Pooling, pooling_named
from pyro_fusion.base import Base, atom_base, base_fill, located, resolve_base
from pyro_fusion.dispersion import estimate_dispersion, pairwise_spread, temper
from pyro_fusion.em import EMResult, expectation_maximization
from pyro_fusion.errors import FusionError, ParameterError, StructureError
from pyro_fusion.families import Factor
from pyro_fusion.posterior import Axes, Posterior
from pyro_fusion.priors import AssignmentPrior, GroupNorm, IndianBuffet, Parametric
from pyro_fusion.problem import MatchingProblem, by_popularity, canonical_order
from pyro_fusion.result import Fusion, Matching
from pyro_fusion.seeding import starts
from pyro_fusion.structure import (
    Roles,
    check_parties,
    check_weights,
    site_roles,
    warn_identical,
    warn_unlabelled_simplex,
)

__all__ = ["fuse"]


def fuse(
    posteriors: Sequence[Posterior | Callable[..., Any]],
    pooling: str | Pooling = "exclusive",
    prior: AssignmentPrior | None = None,
    *,
    weights: Sequence[float] | Tensor | None = None,
    base: Base | None = None,
    axes: Axes | None = None,
    dispersion: float | None = None,
    seed: int = 0,
    restarts: int = 9,
    max_iterations: int = 100,
    solver: Literal["coordinate", "relaxed", "sinkhorn"] = "coordinate",
    progress: bool = False,
) -> Fusion:
    r"""Fuse local posteriors into one, without the data.

    Components along each label are assigned to atoms of a global model, and each atom is the
    barycentre of its components, so that

    .. math:: F = \sum_s \sum_l w_s D(k_{sl}; s, l) / T + \sum_k \varphi(m_k)

    is as small as coordinate ascent from several starts can make it. Sites without a label are
    pooled directly; mixture weights and transition matrices follow the assignment.

    :param posteriors: one per party: a :class:`~pyro_fusion.Posterior`, or a Pyro guide that needs
        no arguments (else ``Posterior.from_guide(guide, *args)``).
    :param pooling: ``"exclusive"`` (D = KL(atom ‖ local), the log-linear pool: the paper's
        barycentre), ``"inclusive"`` (D = KL(local ‖ atom), moment matching: keeps all the spread)
        or ``"product"`` (Bayes' rule for independent data; needs the prior).
    :param prior: of the assignment: :class:`~pyro_fusion.IndianBuffet` (default for ``product``,
        whose evidence it belongs to), :class:`~pyro_fusion.GroupNorm` (default for the others) or
        :class:`~pyro_fusion.Parametric`.
    :param weights: one non-negative weight per party, used relative to their mean.
    :param base: the prior of the local models, for ``product``: a mapping of sites to
        distributions (of one component, or with the labelled axis), a posterior, or a Pyro model
        that needs no arguments. By default that of the first guide's own model.
    :param axes: labels for guides, in place of those of their plates, as in
        ``Posterior.from_guide``; posteriors have their own.
    :param dispersion: T, positive; by default estimated from the posteriors. ``product`` finds
        the assignment with messages tempered by 1/T and then pools the messages as they are.
    :param seed: of the random starts; the same seed gives the same result.
    :param restarts: starts beyond the first, at most. When three have come to one end, and none to
        a better, there are no more. The best three ends are refined, and the best of them kept.
    :param max_iterations: of coordinate ascent, per start.
    :param solver: of the E-steps. ``"coordinate"``: one party at a time, exactly. ``"relaxed"``:
        the paper's convex programme, rounded; ``fusion.only_matching().gap`` then says within how
        much of optimal the assignment to these atoms is (``GroupNorm`` or ``Parametric``, not
        ``product``). ``"sinkhorn"``: starts from soft E- and M-steps at falling temperatures.
    :param progress: show a progress bar over the starts.
    :raises StructureError: if parties do not fit together; names both, the site and what differs.
    :raises ParameterError: for weights, base or other arguments out of range, and where ``product``
        is improper.

    Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), alg. 1,
    with one direction of the divergence in both steps.
    """
    how = pooling_named(pooling)
    if prior is None:
        prior = IndianBuffet() if how.needs_base else GroupNorm()
    if not isinstance(prior, AssignmentPrior):
        raise ParameterError(
            f"prior must be IndianBuffet(), GroupNorm() or Parametric(K), got {prior!r}"
        )
    if dispersion is not None and not 0 < dispersion < float("inf"):
        raise ParameterError(f"dispersion must be positive and finite, got {dispersion}")
    if restarts < 0 or max_iterations < 1:
        raise ParameterError(
            f"expected restarts >= 0 and max_iterations >= 1, got {restarts} and {max_iterations}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ParameterError(f"seed must be an integer, got {seed!r}")
    if solver not in _SOLVERS:
        raise ParameterError(f"solver must be one of {sorted(_SOLVERS)}, got {solver!r}")
    if solver == "relaxed" and (how.needs_base or not isinstance(prior, (GroupNorm, Parametric))):
        raise ParameterError(
            "solver 'relaxed' needs prior GroupNorm or Parametric and pooling 'inclusive' or "
            f"'exclusive', got {prior!r} and {how.name!r}"
        )
    parties, guides = _read(posteriors, axes)
    w = check_weights(weights, len(parties))
    check_parties(parties)
    roles = site_roles(parties[0])
    warn_unlabelled_simplex(parties[0], roles)
    _check_num_atoms(parties, roles, prior)
    given: dict[str, Factor] = {}
    if how.needs_base and len(parties) > 1:
        given = resolve_base(base, guides, sorted(parties[0].axes))
    task = _Task(
        parties, w, how, prior, given, roles, dispersion, seed, restarts, max_iterations, solver
    )
    names = tuple(str(s) for s in range(len(parties)))
    warn_identical(parties)
    return task.run(names, progress)


def _read(inputs: Sequence[Any], axes: Axes | None) -> tuple[list[Posterior], list[Any]]:
    if isinstance(inputs, Posterior) or callable(inputs):
        raise StructureError("expected a list of posteriors or guides, got a single one")
    inputs = list(inputs)
    if not inputs:
        raise StructureError("expected at least one posterior or guide, got an empty list")
    guides = [g for g in inputs if not isinstance(g, Posterior)]
    for s, g in enumerate(inputs):
        if not isinstance(g, Posterior) and not callable(g):
            raise StructureError(
                f"party {s}: expected a Posterior or a Pyro guide, got {type(g).__name__}"
            )
    if guides:
        from pyro_fusion.readers.pyro import check_not_shared

        check_not_shared(inputs)
    parties = []
    for s, g in enumerate(inputs):
        try:
            parties.append(g if isinstance(g, Posterior) else Posterior.from_guide(g, axes=axes))
        except FusionError as e:
            raise type(e)(f"party {s}: {e}") from e
    return parties, guides


def _check_num_atoms(parties: list[Posterior], roles: Roles, prior: AssignmentPrior) -> None:
    if prior.num_atoms is None:
        return
    for label in roles.matched:
        for s, p in enumerate(parties):
            if p.components(label) > prior.num_atoms:
                raise StructureError(
                    f"party {s} has {p.components(label)} components along '{label}', but the "
                    f"prior allows only {prior.num_atoms} atoms"
                )


_SOLVERS: dict[str, Callable[..., Assignment]] = {
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


@dataclass(frozen=True)
class _Task:
    parties: list[Posterior]
    weights: Tensor
    pooling: Pooling
    prior: AssignmentPrior
    base: dict[str, Factor]
    roles: Roles
    dispersion: float | None
    seed: int
    restarts: int
    max_iterations: int
    solver: str

    def run(self, names: tuple[str, ...], progress: bool) -> Fusion:
        first = self.parties[0]
        if len(self.parties) == 1:
            alone = {k: _alone(k, first.components(k), self.prior) for k in self.roles.matched}
            return Fusion(first, self.pooling.name, alone, 0.0, names)
        matchings: dict[str, Matching] = {}
        factors: dict[str, Factor] = {}
        shared = 0.0
        for label in self.roles.matched:
            matchings[label], atoms = self.match(label, progress)
            factors.update(atoms)
        for site, label in self.roles.carried.items():
            factors[site] = self.carry(site, matchings[label])
        for site in self.roles.shared:
            factors[site], divergence = self.share(site)
            shared += divergence
        ordered = {k: factors[k].to(dtype=f.dtype) for k, f in first.decomposed.items()}
        posterior = Posterior(ordered, first.axes, plates=first.plates)
        return Fusion(posterior, self.pooling.name, matchings, shared, names)

    # -- sites with a label ------------------------------------------------------------------------

    def match(self, label: str, progress: bool) -> tuple[Matching, dict[str, Factor]]:
        sites = self.roles.matched[label]
        sizes = tuple(p.components(label) for p in self.parties)
        local = {
            site: Factor.cat([p.decomposed[site].with_batch(axis) for p in self.parties]).to(
                dtype=torch.float64
            )
            for site, axis in sites.items()
        }
        device = next(iter(local.values())).device
        weights = self.weights.repeat_interleave(torch.tensor(sizes)).to(device)
        base = {
            site: atom_base(site, self.base, local[site], axis).to(dtype=torch.float64)
            for site, axis in sites.items()
            if self.pooling.needs_base
        }
        order, ordered_sizes = canonical_order(local, sizes, self.weights)
        ordered = {site: f.index_select(0, order) for site, f in local.items()}
        voting = _voting(ordered, ordered_sizes, weights[order])
        scale = self.dispersion or estimate_dispersion(*voting, self.pooling, base)
        problem = MatchingProblem(ordered, ordered_sizes, weights[order], self.pooling, base, scale)
        prior = self.prior.calibrated(lambda: pairwise_spread(*voting) / scale)
        if self.pooling.needs_base:
            problem = _tempered(problem)
        try:
            best, ends = self.search(problem, prior, progress)
            groups = torch.empty_like(best.groups)
            groups[order] = best.groups.to(groups.device)
            groups, popularity = by_popularity(groups, best.num_atoms)
            atoms = {
                site: self.pooling.barycenter(
                    f, groups.to(device), best.num_atoms, weights, base.get(site)
                ).like(self.parties[0].decomposed[site].batch_dim, (sites[site],))
                for site, f in local.items()
            }
        except ParameterError as e:
            raise located(e, local, base, sizes) from e
        matching = Matching(
            label,
            list(groups.split(sizes)),
            best.num_atoms,
            popularity,
            best.objective,
            scale,
            best.prior,
            best.converged,
            ends,
            best.bound,
        )
        return matching, atoms

    def search(
        self, problem: MatchingProblem, prior: AssignmentPrior, progress: bool
    ) -> tuple[EMResult, list[float]]:
        """Coordinate ascent from every start, the best few then on the collapsed objective, which
        takes longer; the best result and where each start ended."""
        from tqdm import tqdm

        begin = starts(problem, prior, self.restarts, self.seed)
        bar = tqdm(begin, total=self.restarts + 1, desc="fusing", disable=not progress)
        results: list[EMResult] = []
        ends: list[float] = []
        solver = _SOLVERS[self.solver]
        for start in bar:
            if solver is sinkhorn:
                start = annealed(problem, prior, start)
            results.append(
                expectation_maximization(
                    problem, prior, start, self.max_iterations, collapsed=False
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
                problem, prior, results[i].groups, self.max_iterations, solver=solver
            )
            ends[i] = result.objective[-1]
            if best is None or result.objective[-1] < best.objective[-1]:
                trace = results[i].objective + result.objective[1:]
                best = replace(result, objective=trace)
        assert best is not None
        return best, ends

    def carry(self, site: str, matching: Matching) -> Factor:
        """Pool a site that follows the assignment of its label."""
        axes, first = self.parties[0].axes[site], self.parties[0].decomposed[site]
        places = [i for i, a in enumerate(axes) if a == matching.label]
        rows = [i for i in places if i < first.separable_axes]
        if len(rows) > 1:
            raise StructureError(
                f"site '{site}': label '{matching.label}' on {len(rows)} batch axes is not "
                "supported; one of them must be the event axis of a Dirichlet"
            )
        fill = base_fill(site, self.base, first)
        local = []
        for p, a in zip(self.parties, matching.assignment, strict=True):
            f = p.decomposed[site].to(dtype=torch.float64)
            for i in places:
                if i not in rows:
                    f = f.pad(i, a, matching.num_atoms, fill)
            f = f.with_batch(*rows)
            local.append(f if rows else _unsqueeze(f))
        stacked = Factor.cat(local)
        base = None
        if self.pooling.needs_base:
            if fill is None:
                raise StructureError(f"pooling 'product' needs the prior of site '{site}'")
            one = stacked.index_select(0, torch.zeros(1, dtype=torch.long, device=stacked.device))
            base = one.map(lambda v: torch.full_like(v, float(fill)))
        if not rows:
            return self._pool_all(site, stacked, base).like(first.batch_dim, ())
        pooled = self._pool(site, stacked, matching.assignment, matching.num_atoms, base)
        return pooled.like(first.batch_dim, rows)

    # -- sites without a label ---------------------------------------------------------------------

    def share(self, site: str) -> tuple[Factor, float]:
        """Pool a shared site; also its divergence."""
        local = Factor.cat(
            [_unsqueeze(p.decomposed[site].to(dtype=torch.float64)) for p in self.parties]
        )
        base = None
        if self.pooling.needs_base:
            base = atom_base(site, self.base, local, None).to(dtype=torch.float64)
        pooled = self._pool_all(site, local, base)
        atom = _unsqueeze(pooled)
        weights = self.weights.to(local.device)
        cost = (self.pooling.cost(atom, local, base).squeeze(0) * weights).sum()
        divergence = float(cost + self.pooling.opening(atom, base).sum())
        return pooled.like(self.parties[0].decomposed[site].batch_dim, ()), divergence

    def _pool(
        self, site: str, local: Factor, groups: list[Tensor], num_atoms: int, base: Factor | None
    ) -> Factor:
        """The barycentres of one site, ``groups`` per party; errors name the site."""
        sizes = [len(a) for a in groups]
        weights = self.weights.repeat_interleave(torch.tensor(sizes)).to(local.device)
        every = torch.cat(groups).to(local.device)
        try:
            return self.pooling.barycenter(local, every, num_atoms, weights, base)
        except ParameterError as e:
            raise located(e, {site: local}, {site: base}, tuple(sizes)) from e

    def _pool_all(self, site: str, local: Factor, base: Factor | None) -> Factor:
        pooled = self._pool(site, local, [torch.tensor([0])] * len(self.parties), 1, base)
        return replace(pooled.map(lambda v: v.squeeze(0)), batch_dim=0)


def _unsqueeze(f: Factor) -> Factor:
    """All batch axes into the event, and one batch axis of size one before it."""
    return replace(f.with_batch().map(lambda v: v.unsqueeze(0)), batch_dim=1)


def _alone(label: str, size: int, prior: AssignmentPrior) -> Matching:
    """One party: every component is an atom."""
    every = torch.arange(size)
    prior = prior.update(size, 1)
    objective = prior.constant(1) + size * float(prior.penalty(1)[1])
    return Matching(
        label, [every], size, torch.ones_like(every), [objective], 1.0, prior, True, [objective]
    )


def _voting(
    local: dict[str, Factor], sizes: tuple[int, ...], weights: Tensor
) -> tuple[dict[str, Factor], tuple[int, ...]]:
    """Components and sizes of the parties whose weight is not zero, if these are two at least."""
    party = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    counts = torch.bincount(party[(weights > 0).cpu()], minlength=len(sizes))
    kept = tuple(int(n) for n in counts if n)
    if len(kept) in (1, len(sizes)):
        return local, sizes
    index = (weights > 0).nonzero().squeeze(-1)
    return {site: f.index_select(0, index) for site, f in local.items()}, kept


def _tempered(problem: MatchingProblem) -> MatchingProblem:
    """Weights and dispersion moved into the messages, where the evidence is exact."""
    local = {
        site: temper(f, problem.base[site], problem.weights, problem.dispersion)
        for site, f in problem.local.items()
    }
    return replace(problem, local=local, weights=torch.ones_like(problem.weights), dispersion=1.0)
