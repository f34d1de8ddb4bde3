# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The collapsed objective: that of groups of components with the best atom for each, and, where
the pooling is additive, what a component more or less in a group would change. For ``product`` it
is minus the log evidence that the components of a group share one atom, against that each has one
of its own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_fusion.families import Factor
from pyro_fusion.pooling.additive import AdditivePooling
from pyro_fusion.pooling.components import Components

__all__ = [
    "GroupCosts",
    "SiteSums",
    "Sums",
    "group_costs",
    "log_evidence",
    "log_evidence_of_joining",
]

# Numbers in the statistics of the candidate groups at a time: what stays in the processor's cache,
# or on a GPU what bounds the memory.
_NUMBERS = 1 << 17
_NUMBERS_GPU = 1 << 24

# Numbers in the components of candidate groups at a time, where each has a barycentre of its own.
_NUMBERS_EXPLICIT = 1 << 20

# Groups of components with so many numbers are remembered, so many at most: with fewer it would
# take longer to look them up.
_LARGE = 200
_MAX_REMEMBERED = 1 << 18


@dataclass
class SiteSums:
    """Sums of one site's statistics over each group, about the origin of all.

    :ivar local, prior: in coordinates about that origin.
    :ivar statistics, potential: of each component, ``[N, P]`` and ``[N]``.
    :ivar total, potentials: their weighted sums over each group, ``[K, P]`` and ``[K]``.
    """

    pooling: AdditivePooling
    local: Any
    prior: Factor | None
    statistics: Tensor
    potential: Tensor
    total: Tensor
    potentials: Tensor

    def value(self, total: Tensor, potential: Tensor, weight: Tensor) -> Tensor:
        """The objective of groups with these sums: ``[K, P]``, ``[K]``, ``[K]`` -> ``[K]``."""
        atoms = self.pooling.from_statistics(self.local, total, weight, self.prior)
        return potential - self.pooling.group_potential(atoms, weight, self.prior)


class GroupCosts(ABC):
    """The objective of groups with the best atom for each."""

    @abstractmethod
    def values(self, groups: Tensor, other: Tensor | None = None) -> Tensor:
        """The objective over T of groups, or of their unions with others: on the CPU."""

    @abstractmethod
    def parted(self, groups: Tensor, part: Tensor) -> tuple[GroupCosts, GroupCosts]:
        """The groups, which components ``[N]`` are in, without those of the mask ``part``, and with
        these alone."""


def group_costs(problem: Components, groups: Tensor, num_atoms: int) -> GroupCosts:
    """The groups ``[N]``, in ``0, ..., K-1``: by :class:`Sums` where the pooling is additive, else
    with a barycentre for each that is asked for."""
    if isinstance(problem.pooling, AdditivePooling):
        return Sums.of(problem, groups, num_atoms)
    return _Explicit(problem, groups, torch.ones_like(groups, dtype=torch.bool))


@dataclass
class _Explicit(GroupCosts):
    """Groups of any pooling.

    :ivar kept: which components are in their groups: a mask ``[N]``.
    """

    problem: Components
    groups: Tensor
    kept: Tensor

    def values(self, groups: Tensor, other: Tensor | None = None) -> Tensor:
        sets = groups.unsqueeze(1) if other is None else torch.stack([groups, other], 1)
        members = self.kept.nonzero().squeeze(-1)
        members = members[self.groups[members].argsort(stable=True)]
        length = int(max(self.groups.max(), sets.max())) + 1
        count = torch.bincount(self.groups[members], minlength=length)
        first = count.cumsum(0) - count
        size = sum(f.shape[1:].numel() for f in self.problem.sites.values())
        rows = max(1, _NUMBERS_EXPLICIT // max(1, size))
        # So many candidates at a time that their members fill about one block.
        place = count[sets].sum(1).cumsum(0) // rows
        parts = []
        for block in sets.split(torch.bincount(place)[place.unique()].tolist()):
            own = block.flatten()
            sizes = count[own]
            offset = first[own] - (sizes.cumsum(0) - sizes)
            index = torch.arange(int(sizes.sum())) + offset.repeat_interleave(sizes)
            candidate = torch.arange(len(block)).repeat_interleave(block.shape[1])
            part = self.problem.take(members[index])
            parts.append(part.values(candidate.repeat_interleave(sizes), len(block)).cpu())
        return torch.cat(parts)

    def parted(self, groups: Tensor, part: Tensor) -> tuple[GroupCosts, GroupCosts]:
        return replace(self, kept=self.kept & ~part), replace(self, kept=self.kept & part)


@dataclass
class Sums(GroupCosts):
    """The objective of each group, and what a component more or less would change.

    :ivar weights: of the components, ``[N]``; ``weight``: of the groups, ``[K]``.
    :ivar dispersion: T.
    :ivar codes: a random integer for each component, ``[N]``; ``code``: of each group the sum of
        its members', by which the group is known, ``[K]``.
    :ivar known: what groups cost, by code; None where it is not worth remembering.
    """

    sites: list[SiteSums]
    weights: Tensor
    weight: Tensor
    dispersion: float
    codes: Tensor
    code: Tensor
    known: dict[int, float] | None

    @classmethod
    def of(cls, problem: Components, groups: Tensor, num_atoms: int) -> Sums:
        """The sums over the groups ``[N]``, in ``0, ..., K-1``; the pooling is additive."""
        assert isinstance(problem.pooling, AdditivePooling)
        w, sites = problem.weights, []
        for site, f in problem.sites.items():
            pooling = problem.pooling.suited(f)
            prior = problem.prior.get(site)
            prior = None if prior is None else prior.shift(f.origin)
            statistics = pooling.statistics(f.centred)
            potential = pooling.potential(f.centred, prior)
            zero = w.new_zeros(num_atoms)
            total = w.new_zeros(num_atoms, statistics.shape[1])
            sites.append(SiteSums(pooling, f.centred, prior, statistics, potential, total, zero))
        known = problem.known if sum(s.total.shape[1] for s in sites) >= _LARGE else None
        code = torch.zeros(num_atoms, dtype=torch.long)
        weight = w.new_zeros(num_atoms)
        sums = cls(sites, w, weight, problem.dispersion, problem.codes, code, known)
        sums.add(torch.arange(len(groups)), groups, 1.0)
        return sums

    def minus(self, other: Sums) -> Sums:
        """The groups without their parts in ``other``, which may have more of them."""
        count = len(self.weight)
        sites = [
            replace(
                s, total=s.total - o.total[:count], potentials=s.potentials - o.potentials[:count]
            )
            for s, o in zip(self.sites, other.sites, strict=True)
        ]
        weight, code = self.weight - other.weight[:count], self.code - other.code[:count]
        return replace(self, sites=sites, weight=weight, code=code)

    def empty(self, count: int) -> Sums:
        """So many groups without a component."""
        sites = [
            replace(
                s,
                total=s.total.new_zeros(count, s.total.shape[1]),
                potentials=s.potentials.new_zeros(count),
            )
            for s in self.sites
        ]
        weight, code = self.weight.new_zeros(count), self.code.new_zeros(count)
        return replace(self, sites=sites, weight=weight, code=code)

    def parted(self, groups: Tensor, part: Tensor) -> tuple[Sums, Sums]:
        there = self.empty(len(self.weight))
        members = part.nonzero().squeeze(-1)
        there.add(members, groups[members], 1.0)
        return self.minus(there), there

    def values(self, groups: Tensor, other: Tensor | None = None) -> Tensor:
        code = self.code[groups] if other is None else self.code[groups] + self.code[other]

        def of(index: Tensor) -> Tensor:
            k = groups[index].to(self.weight.device, non_blocking=True)
            j = None if other is None else other[index].to(k.device, non_blocking=True)

            def both(x: Tensor) -> Tensor:
                return x[k] if j is None else x[k] + x[j]

            terms = [
                s.value(both(s.total), both(s.potentials), both(self.weight)) for s in self.sites
            ]
            return torch.stack(terms).sum(0)

        return self._known_or(code, of) / self.dispersion

    def _known_or(self, code: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        """The objective of each group, remembered by its code, or else ``of`` its place: on the
        CPU, ``[M]``."""
        device = self.weights.device
        limit = _NUMBERS if device.type == "cpu" else _NUMBERS_GPU
        part = max(1, limit // max(s.total.shape[1] for s in self.sites))
        every = torch.arange(len(code))
        if self.known is None:
            return torch.cat([of(index) for index in every.split(part)]).cpu()
        if len(self.known) > _MAX_REMEMBERED:
            self.known.clear()
        codes = code.tolist()
        first = {c: i for i, c in enumerate(codes) if c not in self.known}
        for index in torch.tensor(list(first.values()), dtype=torch.long).split(part):
            if len(index):
                values = of(index).tolist()
                self.known.update(zip((codes[i] for i in index.tolist()), values, strict=True))
        return torch.tensor([self.known[c] for c in codes], dtype=torch.float64)

    def add(self, members: Tensor, groups: Tensor, sign: float) -> None:
        """Put components into groups; with ``sign=-1.0`` take them out."""
        self.code.index_add_(0, groups, int(sign) * self.codes[members])
        members = members.to(self.weights.device, non_blocking=True)
        w = sign * self.weights[members]
        groups = groups.to(w.device, non_blocking=True)
        self.weight.index_add_(0, groups, w)
        for s in self.sites:
            s.total.index_add_(0, groups, s.statistics[members] * w.unsqueeze(1))
            s.potentials.index_add_(0, groups, s.potential[members] * w)

    def grow(self, count: int) -> None:
        """Room for so many groups more."""
        if count == 0:
            return
        self.code = torch.cat([self.code, self.code.new_zeros(count)])
        self.weight = torch.cat([self.weight, self.weight.new_zeros(count)])
        for s in self.sites:
            s.total = torch.cat([s.total, s.total.new_zeros(count, s.total.shape[1])])
            s.potentials = torch.cat([s.potentials, s.potentials.new_zeros(count)])

    def exchanged(self, groups: Tensor, without: Tensor, with_: Tensor) -> Tensor:
        """The objective over T of groups ``[M]`` without one component each and with another, -1
        for none; zero where nothing is left: on the CPU."""
        device = self.weights.device
        k = groups.to(device)
        pairs = [(x.to(device), sign) for x, sign in ((without, -1.0), (with_, 1.0))]
        weight = self.weight[k]
        changes = []
        for n, sign in pairs:
            w = torch.where(n < 0, 0.0, sign * self.weights[n])
            changes.append((n, w))
            weight = weight + w
        keep = (weight > 1e-9 * self.weight[k]).nonzero().squeeze(-1)
        result = torch.zeros_like(weight)
        part = max(1, _NUMBERS // max(s.total.shape[1] for s in self.sites))
        for rows in keep.split(part):
            for s in self.sites:
                total, potential = s.total[k[rows]], s.potentials[k[rows]]
                for n, w in changes:
                    total = total + s.statistics[n[rows]] * w[rows].unsqueeze(1)
                    potential = potential + s.potential[n[rows]] * w[rows]
                result[rows] += s.value(total, potential, weight[rows])
        return (result / self.dispersion).cpu()

    def increments(self, members: Tensor, groups: Tensor, sign: float = 1.0) -> Tensor:
        """The growth of the objective of each group, over T, with the component (or without it): on
        the CPU, for each pair; NaN where a group would be left empty."""
        used, place = groups.unique(return_inverse=True)
        alone = self.values(used)[place]

        def of(index: Tensor) -> Tensor:
            n = members[index].to(self.weights.device, non_blocking=True)
            k = groups[index].to(n.device, non_blocking=True)
            w = sign * self.weights[n]
            result, weight = torch.zeros_like(w), self.weight[k] + w
            # A group that the component leaves empty costs nothing any more.
            keep = (weight > 1e-9 * self.weight[k]).nonzero().squeeze(-1)
            n, k, w, weight = n[keep], k[keep], w[keep], weight[keep]
            for s in self.sites:
                result[keep] += s.value(
                    s.total[k] + s.statistics[n] * w.unsqueeze(1),
                    s.potentials[k] + s.potential[n] * w,
                    weight,
                )
            return result

        code = self.code[groups] + int(sign) * self.codes[members]
        return self._known_or(code, of) / self.dispersion - alone


def log_evidence(problem: Components, groups: Tensor) -> float:
    """The log evidence (``product``) that the components of each group share an atom, against that
    each has one of its own.

    :param groups: LongTensor ``[N]``, in ``0, ..., K-1``, none empty.
    :raises ParameterError: if a group is improper.
    """
    num_atoms = int(groups.max()) + 1
    problem.barycenter(groups, num_atoms)  # checks what sums do not
    with problem.pooling.telling():
        return -float(Sums.of(problem, groups, num_atoms).values(torch.arange(num_atoms)).sum())


def log_evidence_of_joining(
    problem: Components, sums: Sums, members: Tensor, groups: Tensor
) -> Tensor:
    """The log evidence (``product``) that a component shares the atom of a group, against that it
    does not, for each with each: ``[len(members), len(groups)]``, on the CPU.

    :raises ParameterError: if it is not a number, as that of an improper group.
    """
    pairs = torch.cartesian_prod(members, groups)
    with problem.pooling.telling():
        value = -sums.increments(pairs[:, 0], pairs[:, 1])
        if not bool((value < math.inf).all()):
            raise ValueError("NaN or infinite")
    return value.reshape(len(members), len(groups))
