# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The components of all parties along one label, as one problem: what E-steps, M-steps, seeding
and re-matching all work on."""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_fusion.assignment import NEW, AssignmentProblem
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.assignment.problem import party_of
from pyro_fusion.families import Factor
from pyro_fusion.families.masked import Masked
from pyro_fusion.pooling.pooling import Pooling

__all__ = [
    "Atoms",
    "Components",
    "Factors",
    "by_appearance",
    "by_popularity",
    "canonical_order",
    "compact",
]

Factors = Mapping[str, Factor]

# Site -> Factor, or Masked where entries may be missing.
Atoms = Mapping[str, Any]


@dataclass(frozen=True)
class Components:
    """The components of all parties along one label, and how they are scored and pooled.

    :ivar local: site -> factor of batch shape ``[N]``, the components of party 0, of party 1, ...
    :ivar sizes: ``L_s`` of each party; they add up to ``N``.
    :ivar weights: ``[N]``, the weight of each component's party.
    :ivar pooling: the divergence and its barycentre.
    :ivar prior: site -> the prior of one atom, batch shape ``[1]``; empty unless the pooling needs
        it.
    :ivar dispersion: T.
    :ivar masked: site -> components ``[N]`` of which some entries are missing.
    """

    local: Factors
    sizes: tuple[int, ...]
    weights: Tensor
    pooling: Pooling
    prior: Factors
    dispersion: float = 1.0
    masked: Mapping[str, Masked] = field(default_factory=dict)

    @functools.cached_property
    def sites(self) -> Atoms:
        """The components of every site: those of :attr:`local`, then those of :attr:`masked`."""
        return {**self.local, **self.masked}

    @property
    def num_parties(self) -> int:
        """S."""
        return len(self.sizes)

    @property
    def party(self) -> Tensor:
        """The party of each component, LongTensor ``[N]`` on the CPU."""
        return party_of(self.sizes)

    @functools.cached_property
    def codes(self) -> Tensor:
        """A random integer for each component, ``[N]`` on the CPU: sets of components are told
        apart by the sums of theirs."""
        limit, generator = 1 << 62, torch.Generator().manual_seed(0)
        return torch.randint(-limit, limit, (sum(self.sizes),), generator=generator)

    @functools.cached_property
    def known(self) -> dict[int, float]:
        """The costs of groups, times T, by the sum of their codes: filled by ``collapsed.Sums``."""
        return {}

    def split(self, x: Tensor) -> list[Tensor]:
        """``[..., N]`` -> one ``[..., L_s]`` per party."""
        return list(x.split(self.sizes, dim=-1))

    def take(self, index: Tensor) -> Components:
        """The components ``index``, as if of one party."""
        return replace(
            self,
            local={site: f.index_select(0, index) for site, f in self.local.items()},
            masked={site: f.index_select(0, index) for site, f in self.masked.items()},
            sizes=(len(index),),
            weights=self.weights[index],
        )

    def restricted(self, sites: Container[str]) -> Components:
        """These sites alone."""
        local = {k: f for k, f in self.local.items() if k in sites}
        masked = {k: f for k, f in self.masked.items() if k in sites}
        prior = {k: f for k, f in self.prior.items() if k in sites}
        return replace(self, local=local, masked=masked, prior=prior)

    def in_order(self, order: Tensor, sizes: tuple[int, ...]) -> Components:
        """Components and parties in another order."""
        return replace(self.take(order), sizes=sizes)

    def scored(self) -> Components:
        """The components as their assignment is scored: where the pooling tempers, with weights and
        dispersion moved into them; else as they are."""
        if not (self.pooling.tempers and self.prior):  # a lone party may come without
            return self

        def temper(site: str, f: Any) -> Any:
            how = self.pooling.suited(f)
            return how.temper(f, self.prior[site], self.weights, self.dispersion)

        local = {site: temper(site, f) for site, f in self.local.items()}
        masked = {site: temper(site, f) for site, f in self.masked.items()}
        ones = torch.ones_like(self.weights)
        return replace(self, local=local, masked=masked, weights=ones, dispersion=1.0)

    def cost(self, atoms: Atoms) -> Tensor:
        """``w D / T`` summed over sites: ``[K, N]``."""
        total: Tensor | None = None
        for site, f in self.sites.items():
            term = self.pooling.suited(f).cost(atoms[site], f, self.prior.get(site))
            total = term if total is None else total.add_(term)
        assert total is not None
        return total.mul_(self.weights / self.dispersion)

    def opening(self, atoms: Atoms) -> Tensor:
        """The cost of an atom by itself over T, summed over sites: ``[K]``."""
        terms = [
            self.pooling.suited(f).opening(atoms[x], self.prior.get(x))
            for x, f in self.sites.items()
        ]
        return torch.stack(terms).sum(0) / self.dispersion

    def e_step(self, atoms: Atoms, assignment_prior: AssignmentPrior) -> AssignmentProblem:
        """The assignment problem that the solver of an E-step is given."""
        return AssignmentProblem.of(
            self.split(self.cost(atoms)), assignment_prior, self.opening(atoms)
        )

    def barycenter(
        self, groups: Tensor, num_atoms: int, weights: Tensor | None = None
    ) -> dict[str, Factor]:
        """The atoms of the groups ``[N]`` at the sites of :attr:`local`, with other weights if they
        are given."""
        if self.masked:
            return replace(self, masked={}).barycenter(groups, num_atoms, weights)
        return dict(self.m_step(groups, num_atoms, weights))

    def m_step(self, groups: Tensor, num_atoms: int, weights: Tensor | None = None) -> Atoms:
        """The atoms of the groups ``[N]`` at every site."""
        groups = groups.to(self.weights.device, non_blocking=True)
        w = self.weights if weights is None else weights
        return {
            site: self.pooling.suited(f).barycenter(f, groups, num_atoms, w, self.prior.get(site))
            for site, f in self.sites.items()
        }

    def values(self, groups: Tensor, num_atoms: int) -> Tensor:
        """The part of the objective that each group adds at its best atom: ``[K]``."""
        groups = groups.to(self.weights.device, non_blocking=True)
        total = torch.zeros(num_atoms, dtype=torch.float64, device=self.weights.device)
        for site, atoms in self.m_step(groups, num_atoms).items():
            local, prior = self.sites[site], self.prior.get(site)
            how = self.pooling.suited(local)
            pairs = how.pair_cost(atoms.index_select(0, groups), local, prior)
            total += how.opening(atoms, prior)
            total.index_add_(0, groups, self.weights * pairs.double())
        return total / self.dispersion

    def divergence(self, groups: Tensor, num_atoms: int, atoms: Atoms | None = None) -> float:
        """The part of the objective that the groups ``[N]`` add at their best atoms, pair by pair.

        :param atoms: the best atoms, where they are known.
        """
        groups = groups.to(self.weights.device, non_blocking=True)
        total = torch.zeros((), dtype=torch.float64, device=self.weights.device)
        best = self.m_step(groups, num_atoms) if atoms is None else atoms
        for site, one in best.items():
            local, prior = self.sites[site], self.prior.get(site)
            how = self.pooling.suited(local)
            pairs = how.pair_cost(one.index_select(0, groups), local, prior)
            total += how.opening(one, prior).sum() + self.weights @ pairs.double()
        return float(total) / self.dispersion


def compact(groups: Tensor) -> tuple[Tensor, int]:
    """Number the groups in use ``0, ..., K-1``; each :data:`~.assignment.NEW` is one of its own."""
    new = groups == NEW
    fresh = groups.max().clamp(min=0) + 1 + torch.arange(len(groups), device=groups.device)
    _, result = torch.where(new, fresh, groups).unique(return_inverse=True)
    return result, int(result.max()) + 1


def by_appearance(groups: Tensor) -> Tensor:
    """Number the groups ``0, 1, ...`` as they first appear: LongTensor ``[N]``."""
    groups, num_atoms = compact(groups)
    first = torch.full((num_atoms,), len(groups))
    first = first.scatter_reduce(0, groups, torch.arange(len(groups)), "amin")
    return first.argsort().argsort()[groups]


def canonical_order(
    local: Atoms, sizes: tuple[int, ...], weights: Tensor
) -> tuple[Tensor, tuple[int, ...]]:
    """An order of parties and components that depends only on their contents, so that permuting
    the input changes nothing but labels."""
    features = torch.cat([_features(f) for f in local.values()], 1)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(features.shape[1], dtype=torch.float64, generator=generator)
    key = (features * direction.to(features.device)).sum(1).cpu()
    ends = torch.tensor(sizes).cumsum(0).tolist()
    parties = []
    for size, end, weight in zip(sizes, ends, weights.tolist(), strict=True):
        value, index = key[end - size : end].sort(stable=True)
        parties.append((size, weight, value.tolist(), index + end - size))
    parties.sort(key=lambda p: p[:3])
    return torch.cat([p[3] for p in parties]), tuple(p[0] for p in parties)


def _features(f: Factor | Masked) -> Tensor:
    """Numbers that tell components apart, ``[N, C]``."""
    if isinstance(f, Masked):
        return f.features
    return torch.cat([v.double().reshape(len(v), -1) for v in f.params.values()], 1)


def by_popularity(groups: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """Number atoms by falling popularity, ties by first appearance."""
    popularity = torch.bincount(groups, minlength=num_atoms)
    first = torch.full((num_atoms,), len(groups)).scatter_reduce(
        0, groups, torch.arange(len(groups)), "amin"
    )
    order = sorted(range(num_atoms), key=lambda k: (-int(popularity[k]), int(first[k])))
    rank = torch.empty(num_atoms, dtype=torch.long)
    rank[torch.tensor(order)] = torch.arange(num_atoms)
    return rank[groups], popularity[torch.tensor(order)]
