# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The local posteriors of all parties, read and checked: a problem for each label, and closed forms
for the sites that need no assignment of their own."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pyro_fusion.assignment.priors import AssignmentPrior, assignment_priors, check_penalty
from pyro_fusion.errors import FusionError, ParameterError, Party, Site, StructureError, naming
from pyro_fusion.families import Factor
from pyro_fusion.families.masked import Masked
from pyro_fusion.fusion.arguments import (
    Inputs,
    Prior,
    by_name,
    check_prior,
    read_parties,
    resolve_prior,
)
from pyro_fusion.fusion.atom_prior import atom_prior, located, prior_fill
from pyro_fusion.fusion.checks import Weights, check_parties, check_weights, warn_unlabelled_simplex
from pyro_fusion.fusion.links import LinkedSite, averaged, entries
from pyro_fusion.fusion.persistence import STEP, DispersionPath, follow, told_apart
from pyro_fusion.fusion.roles import Roles, site_roles
from pyro_fusion.pooling.components import Components, canonical_order, compact
from pyro_fusion.pooling.merges import Merges, pairwise_spread
from pyro_fusion.pooling.pooling import Pooling
from pyro_fusion.posterior import Axes, Posterior

__all__ = ["LabelProblem", "Parties", "locating", "searching"]

# T is estimated from so many parties at most, of so many components, unless that is too few
# parties: it does not depend on how many there are.
_MAX_PARTIES, _MAX_COMPONENTS, _MIN_PARTIES = 64, 320, 6


@dataclass(frozen=True)
class LabelProblem:
    """The components along one label.

    :ivar label: the label.
    :ivar problem: the components as their assignment is scored: for ``product`` messages tempered
        by weight and dispersion, else as they are.
    :ivar messages: the components as they were handed over.
    :ivar assignment_prior: of the assignment, with what it takes from the posteriors.
    :ivar dispersion: T.
    :ivar price: by what the prior is multiplied in the objective: T over that of its group of
        labels, one if it is linked to no other.
    :ivar path, found_merges: what T was estimated from; None if it was given.
    :ivar ordered: the problem in an order that depends on the contents of the parties only, so that
        what is found there is the same for any order of the parties.
    :ivar order: which component each of ``ordered`` is, LongTensor ``[N]``.
    """

    label: str
    problem: Components
    messages: Components
    assignment_prior: AssignmentPrior
    dispersion: float
    ordered: Components
    order: Tensor
    price: float = 1.0
    path: DispersionPath | None = None
    found_merges: Merges | None = None

    @property
    def merges(self) -> Merges:
        """The prices of the cheapest merges of the components, or of those of a random selection of
        many parties."""
        if self.found_merges is not None:
            return self.found_merges
        messages = replace(self.messages, dispersion=1.0)
        some, _ = _some_parties(messages.in_order(self.order, self.ordered.sizes))
        return told_apart(some)[1]

    @property
    def doubt(self) -> str:
        """A sentence that says that the posteriors do not tell T; empty where they do, where T was
        given, and where the assignment does not depend on it."""
        problem = self.problem
        penalty = self.assignment_prior.penalty(problem.num_parties)
        if self.path is None or not (problem.pooling.tempers or bool((penalty != 0).any())):
            return ""
        return self.path.doubt()

    def with_path_of(self, other: LabelProblem) -> LabelProblem:
        """The problem with what the dispersion of another was estimated from."""
        return replace(self, path=other.path, found_merges=other.found_merges)

    @property
    def guess(self) -> Tensor | None:
        """An assignment ``[N]`` of ``ordered``: that of the path, if it was followed on all
        components."""
        if self.path is None or len(self.path.components) < len(self.order):
            return None
        return self.path.at_estimate[self.order.cpu()]

    def as_given(self, groups: Tensor) -> Tensor:
        """An assignment ``[N]`` of ``ordered``, in the order of the parties."""
        return torch.empty_like(groups).index_copy_(0, self.order.to(groups.device), groups)


@dataclass(frozen=True)
class Parties:
    """Local posteriors that fit together, and how they are to be pooled.

    :ivar posteriors: one per party.
    :ivar weights: of the parties, with mean 1: float64 ``[S]``.
    :ivar pooling: the divergence and its barycentre.
    :ivar prior: site -> the prior of the local models, where the pooling needs it; empty where a
        lone party came without, and there is nothing to pool.
    :ivar roles: what happens to each site.
    :ivar names: of the parties.
    """

    posteriors: list[Posterior]
    weights: Tensor
    pooling: Pooling
    prior: dict[str, Factor]
    roles: Roles
    names: tuple[str, ...]

    @classmethod
    def of(
        cls,
        inputs: Inputs,
        pooling: Pooling,
        weights: Weights,
        prior: Prior | None,
        axes: Axes | Literal["auto"] | None,
    ) -> Parties:
        """Read and check what was given; arguments as for :func:`~pyro_fusion.fuse`."""
        check_prior(prior)
        named = by_name(inputs)
        with naming(names := tuple(named)):
            posteriors, guides = read_parties(list(named.values()), axes)
            w = check_weights(weights, names)
            check_parties(posteriors)
            roles = site_roles(posteriors[0])
            warn_unlabelled_simplex(posteriors, roles)
            given: dict[str, Factor] = {}
            if pooling.needs_prior and (prior is not None or len(posteriors) > 1):
                sites = sorted(posteriors[0].axes)
                given = resolve_prior(prior, guides, sites, pooling.name)
        return cls(posteriors, w, pooling, given, roles, names)

    def priors(
        self, assignment_prior: AssignmentPrior | Mapping[str, AssignmentPrior] | None
    ) -> dict[str, AssignmentPrior]:
        """The prior of each label.

        :raises StructureError: if a party has more components than there may be atoms.
        """
        result = assignment_priors(
            assignment_prior,
            list(self.roles.matched),
            self.pooling.default_assignment_prior(),
        )
        for label, one in result.items():
            for s, p in enumerate(self.posteriors):
                if one.num_atoms is not None and p.components(label) > one.num_atoms:
                    raise StructureError(
                        [
                            Party(s),
                            f" has {p.components(label)} components along '{label}', but the "
                            f"assignment prior allows only {one.num_atoms} atoms",
                        ]
                    )
        return result

    # -- sites with a label ------------------------------------------------------------------------

    def components(self, label: str) -> tuple[dict[str, Factor], tuple[int, ...]]:
        """The components along ``label``, in the order of the parties, and how many each has."""
        local = {
            site: Factor.cat([p.decomposed[site].with_batch(axis) for p in self.posteriors]).to(
                dtype=torch.float64
            )
            for site, axis in self.roles.matched[label].items()
        }
        return local, tuple(p.components(label) for p in self.posteriors)

    def labelled(
        self,
        label: str,
        assignment_prior: AssignmentPrior,
        dispersion: float | None,
        given: Mapping[str, Tensor] | None = None,
        step: float = STEP,
    ) -> LabelProblem:
        """The components along ``label``, in the order of the parties.

        :param dispersion: T, or None to estimate it.
        :param given: assignments ``[N]`` along other labels, in whose light they are seen: sites
            with several labels take part if those of all others are given.
        :param step: by how much prices grow from one T to the next on the path of the estimate.
        """
        sites = self.roles.matched[label]
        local, sizes = self.components(label)
        prior = {
            site: atom_prior(site, self.prior, local[site], (axis,)).to(dtype=torch.float64)
            for site, axis in sites.items()
            if self.prior
        }
        masked: dict[str, Masked] = {}
        known = {x: compact(groups) for x, groups in (given or {}).items()}
        for link in self.links:
            if {label} <= set(link.labels) <= {label, *known}:
                groups = {x: known[x][0] for x in link.labels if x != label}
                counts = {x: known[x][1] for x in groups}
                masked[link.site], one = link.columns(label, sum(sizes), groups, counts)
                if one is not None:
                    prior[link.site] = one
        messages = replace(self._problem(local, sizes, prior), masked=masked)
        order, ordered_sizes = canonical_order(messages.sites, sizes, self.weights)
        scale, path, merges = dispersion or 1.0, None, None
        with locating(messages):
            if dispersion is None and len(sizes) > 1:
                some, rows = _some_parties(messages.in_order(order, ordered_sizes))
                some, merges, told = told_apart(some)
                rows = order[rows[told]]
                path = follow(label, some, merges, rows, messages.party[rows], step)
                scale = path.estimate
            messages = replace(messages, dispersion=scale)
            problem = messages.scored()

        def spread() -> float:
            if merges is not None:
                return pairwise_spread(merges.local) / scale
            some, _ = _some_parties(messages.in_order(order, ordered_sizes))
            return pairwise_spread(some.sites) / scale

        calibrated = assignment_prior.calibrated(spread)
        check_penalty(calibrated, len(sizes))
        ordered = problem.in_order(order, ordered_sizes)
        return LabelProblem(
            label=label,
            problem=problem,
            messages=messages,
            assignment_prior=calibrated,
            dispersion=scale,
            ordered=ordered,
            order=order,
            path=path,
            found_merges=merges,
        )

    def in_one_unit(
        self, parts: Mapping[str, LabelProblem]
    ) -> tuple[dict[str, LabelProblem], dict[str, LinkedSite]]:
        """Labels that are linked, each given the others, and the sites that link them, apart from
        each other, and in units of one dispersion: the geometric mean of theirs."""
        scale = statistics.geometric_mean(part.dispersion for part in parts.values())
        labelled = {}
        for label, part in parts.items():
            messages = part.messages.restricted(self.roles.matched[label])
            messages = replace(messages, dispersion=scale)
            labelled[label] = replace(
                part, messages=messages, problem=messages.scored(), price=part.dispersion / scale
            )
        links = {
            x.site: replace(x, problem=replace(x.messages, dispersion=scale).scored())
            for x in self.links
            if set(x.labels) <= set(parts)
        }
        return labelled, links

    @cached_property
    def links(self) -> list[LinkedSite]:
        """The sites with several labels."""
        result = []
        for site, labels in self.roles.linked.items():
            local, sizes, index, axes = entries(self.posteriors, site)
            prior = {}
            if self.prior:
                prior[site] = atom_prior(site, self.prior, local, axes).to(dtype=torch.float64)
            messages = self._problem({site: local}, sizes, prior)
            result.append(LinkedSite(site, labels, axes, index, messages, messages))
        return result

    def pool(self, part: LabelProblem, groups: Tensor, num_atoms: int) -> dict[str, Factor]:
        """The atoms of an assignment ``[N]``, from the messages as they were handed over: site ->
        factor with the axes of the site."""
        sites, first = self.roles.matched[part.label], self.posteriors[0]
        with locating(part.messages):
            atoms = part.messages.barycenter(groups, num_atoms)
        for site in sites:
            if self.pooling.averages_outgoing and first.outgoing.get(site) == part.label:
                k = groups.to(atoms[site].device)
                same = torch.zeros_like(k)
                atoms[site] = averaged(part.messages, site, atoms[site], k, same)
        return {
            site: f.like(first.decomposed[site].batch_dim, (sites[site],))
            for site, f in atoms.items()
        }

    def carry(self, site: str, assignment: Sequence[Tensor], num_atoms: int) -> Factor:
        """Pool a site that follows the assignment of its label."""
        label = self.roles.carried[site]
        axes, first = self.posteriors[0].axes[site], self.posteriors[0].decomposed[site]
        places = [i for i, a in enumerate(axes) if a == label]
        rows = [i for i in places if i < first.separable_axes]
        if len(rows) > 1:
            raise StructureError(
                f"label '{label}' on {len(rows)} batch axes is not "
                "supported; one of them must be the event axis of a Dirichlet",
                site=site,
            )
        filled = prior_fill(site, self.prior, first, places)
        fill = None if filled is None else torch.tensor(filled[0], dtype=torch.float64)
        local = []
        for p, a in zip(self.posteriors, assignment, strict=True):
            f = p.decomposed[site].to(dtype=torch.float64)
            for i in places:
                if i not in rows:
                    f = f.pad(i, a, num_atoms, fill)
            f = f.with_batch(*rows)
            if len(places) == 2:
                f = _rolled(f, a)  # its own place first: the prior of all rows is the same then
            local.append(f if rows else _unsqueeze(f))
        stacked = Factor.cat(local)
        prior = None
        if self.pooling.needs_prior:
            if filled is None:
                raise StructureError(
                    [f"pooling '{self.pooling.name}' needs the prior of ", Site(site)]
                )
            first_place = torch.zeros(1, dtype=torch.long, device=stacked.device)
            one = stacked.index_select(0, first_place).map(lambda v: torch.full_like(v, filled[0]))
            prior = one.map(lambda v: v.index_fill(-1, first_place, filled[1]))
        if not rows:
            every = [torch.tensor([0])] * len(self.posteriors)
            return _squeeze(self._pool(site, stacked, every, 1, prior)).like(first.batch_dim, ())
        pooled = self._pool(site, stacked, assignment, num_atoms, prior)
        if len(places) == 2:
            pooled = _rolled(pooled, -torch.arange(num_atoms))
        return pooled.like(first.batch_dim, rows)

    # -- sites without a label ---------------------------------------------------------------------

    def shared(self, site: str) -> Components:
        """A site without a label as a problem of one atom, of which each party has a component."""
        local = Factor.cat(
            [_unsqueeze(p.decomposed[site].to(dtype=torch.float64)) for p in self.posteriors]
        )
        prior = {}
        if self.prior:
            prior[site] = atom_prior(site, self.prior, local).to(dtype=torch.float64)
        return self._problem({site: local}, (1,) * len(self.posteriors), prior)

    def unbatched(self, site: str, atom: Factor) -> Factor:
        """The one atom of a shared site, batch shape ``[1]``, with the axes of the site."""
        return _squeeze(atom).like(self.posteriors[0].decomposed[site].batch_dim, ())

    def _pool(
        self,
        site: str,
        local: Factor,
        groups: Sequence[Tensor],
        num_atoms: int,
        prior: Factor | None,
    ) -> Factor:
        """The barycentres of one site, ``groups`` per party; errors name the site."""
        sizes = tuple(len(a) for a in groups)
        problem = self._problem({site: local}, sizes, {} if prior is None else {site: prior})
        with locating(problem):
            return problem.barycenter(torch.cat(list(groups)), num_atoms)[site]

    def _problem(
        self, local: dict[str, Factor], sizes: tuple[int, ...], prior: dict[str, Factor]
    ) -> Components:
        """Components, in the order of the parties, each with the weight of its party."""
        weights = self.weights.repeat_interleave(torch.tensor(sizes))
        return Components(local, sizes, weights.to(self.posteriors[0].device), self.pooling, prior)


@contextmanager
def locating(problem: Components) -> Iterator[None]:
    """A context in which a barycentre may be improper: the error names the site, and the parties
    where it can."""
    try:
        yield
    except ParameterError as e:
        local = {**problem.local, **{k: m.factor for k, m in problem.masked.items()}}
        error = located(e, local, problem.prior, problem.sizes)
        if error is e:
            raise
        raise error from e


@contextmanager
def searching(part: LabelProblem) -> Iterator[None]:
    """A context of work on the components in :attr:`LabelProblem.ordered`: an error from there
    numbers the parties in the order in which they were given, and is located."""
    with locating(part.messages):
        try:
            yield
        except FusionError as e:
            sizes = torch.tensor(part.ordered.sizes)
            first = part.order.cpu()[sizes.cumsum(0) - sizes]
            e.renumber(part.messages.party[first].tolist())
            raise


def _unsqueeze(f: Factor) -> Factor:
    """All batch axes into the event, and one batch axis of size one before it."""
    return replace(f.with_batch().map(lambda v: v.unsqueeze(0)), batch_dim=1)


def _squeeze(f: Factor) -> Factor:
    """The factor without its only batch axis, of size one."""
    return replace(f.map(lambda v: v.squeeze(0)), batch_dim=0)


def _rolled(f: Factor, places: Tensor) -> Factor:
    """The last axis of each component turned, so that entry ``places[n]`` is first."""

    def turn(v: Tensor) -> Tensor:
        index = (torch.arange(v.shape[-1]) + places.cpu().unsqueeze(1)) % v.shape[-1]
        shape = (len(v), *[1] * (v.dim() - 2), v.shape[-1])
        return v.gather(-1, index.view(shape).expand_as(v).to(v.device))

    return f.map(turn)


def _some_parties(problem: Components) -> tuple[Components, Tensor]:
    """The parties whose weight is not zero, if these are two at least, and of many a random
    selection, with weights relative to theirs; and which components these are, LongTensor
    ``[n]``."""
    sizes = torch.tensor(problem.sizes)
    weights = problem.weights.cpu()[sizes.cumsum(0) - sizes]  # of the parties
    voting = (weights > 0).nonzero().squeeze(-1)
    if len(voting) < 2:
        voting = torch.arange(problem.num_parties)
    generator = torch.Generator().manual_seed(0)
    drawn = voting[torch.randperm(len(voting), generator=generator)[:_MAX_PARTIES]]
    enough = sizes[drawn].cumsum(0) <= _MAX_COMPONENTS
    kept = drawn[: max(_MIN_PARTIES, int(enough.sum()))].sort().values
    rows = torch.isin(problem.party, kept).nonzero().squeeze(-1)
    some = problem.in_order(rows, tuple(sizes[kept].tolist()))
    mean = float(weights[kept].mean())
    relative = some.weights / mean if mean > 0 else torch.ones_like(some.weights)
    return replace(some, weights=relative), rows
