# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Poolings in which the best atom of a group is a function of sums over it, so that costs and moves
need no sum over pairs, and groups can be added up party by party."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor
from pyro_fusion.families.masked import NOTHING, Masked
from pyro_fusion.pooling.groups import group_mean, group_sum
from pyro_fusion.pooling.pooling import Entrywise, Pooling

__all__ = ["FAR", "AdditiveEntrywise", "AdditivePooling"]

# An atom that lies less than the root of this from the origin, in units of its width, has ten
# digits or so after sums about that origin; others are summed about their own.
FAR = 1e6


class AdditivePooling(Pooling):
    """A pooling whose atoms are functions of the weighted sums of coordinates, and whose objective
    of a group is ``Σ_n w_n potential_n - group_potential``. Both are the same in coordinates about
    any origin."""

    @abstractmethod
    def coordinates(self, local: Factor) -> Tensor:
        """The coordinates in which this pooling adds up a group: ``[N, P]``."""

    @abstractmethod
    def from_coordinates(
        self, like: Factor, total: Tensor, weight: Tensor, prior: Factor | None = None
    ) -> Factor:
        """Atoms from the weighted sums of coordinates and of weights, ``[K, P]`` and ``[K, 1]``."""

    @abstractmethod
    def potential(self, local: Factor, prior: Factor | None = None) -> Tensor:
        """The part of its group's objective that a component adds in any group: ``[N]``."""

    @abstractmethod
    def group_potential(self, atoms: Factor, weight: Tensor, prior: Factor | None = None) -> Tensor:
        """The part of a group's objective that its best atom takes off: ``[K]``. The objective is
        ``Σ_n w_n potential_n - group_potential``, with no sum over pairs."""

    def statistics(self, local: Factor) -> Tensor:
        """The numbers of each component that are added up over a group: ``[N, Q]``."""
        return self.coordinates(local)

    def from_statistics(
        self, like: Factor, total: Tensor, weight: Tensor, prior: Factor | None = None
    ) -> Factor:
        """Atoms from the weighted sums of statistics, ``[K, Q]`` and ``[K]``."""
        return self.from_coordinates(
            like.to(dtype=torch.float64), total, weight.unsqueeze(1), prior
        )

    def suited(self, local: Factor | Masked) -> AdditivePooling:
        return AdditiveEntrywise(self) if isinstance(local, Masked) else self

    def barycenter(
        self,
        local: Factor,
        groups: Tensor,
        num_atoms: int,
        weights: Tensor | None = None,
        prior: Factor | None = None,
    ) -> Factor:
        if self.needs_prior:
            self.given(prior)
        w, weight = self.group_weights(groups, num_atoms, weights)
        # About one origin for all, where the statistics of `local` stay in its cache.
        origin = local.origin
        limit = torch.inf if origin is None else FAR * origin.numel()
        try:
            own = None if prior is None else prior.shift(origin)
            atoms = self._sum(local.centred, groups, w, weight, own)
            far = atoms.first.size > limit
        except (torch.linalg.LinAlgError, ValueError):  # perhaps for want of digits
            far = torch.ones_like(weight, dtype=torch.bool)
        if not bool(far.any()):
            return atoms.shift(origin, sign=1.0).to(dtype=local.dtype)
        members = far[groups].nonzero().squeeze(-1)
        index = (far.cumsum(0) - 1)[groups[members]]
        part = local.index_select(0, members)
        with self.telling():
            exact = self._sum_about_means(part, index, w[members], weight[far], prior)
        if not bool(far.all()):
            exact = atoms.shift(origin, sign=1.0).index_copy(far.nonzero().squeeze(-1), exact)
        return exact.to(dtype=local.dtype)

    def _sum(
        self, local: Factor, groups: Tensor, w: Tensor, weight: Tensor, prior: Factor | None
    ) -> Factor:
        """The atoms, in the coordinates that ``local`` and ``prior`` are in; a LinAlgError or a
        ValueError if one is no member of the family."""
        total = group_sum(self.statistics(local), groups, w, len(weight))
        atoms = self.from_statistics(local, total, weight, prior)
        if not self.normalised:  # means of members are members, but these are no means
            atoms.family.build(atoms.params, validate_args=True)
        if not bool(atoms.first.size.isfinite().all()):
            raise ParameterError("natural or mean parameters are not finite")
        return atoms

    def _sum_about_means(
        self, local: Factor, groups: Tensor, w: Tensor, weight: Tensor, prior: Factor | None
    ) -> Factor:
        """The atoms, each summed about the mean location of its group: nothing cancels there."""
        origin = group_mean(local.location(), groups, w, weight)
        shifted = local if origin is None else local.shift(origin[groups])
        if prior is not None:
            prior = prior.expand_batch((len(weight),)).shift(origin)
        return self._sum(shifted, groups, w, weight, prior).shift(origin, sign=1.0)

    def pair_objective(
        self, local: Factor, first: Tensor, second: Tensor, prior: Factor | None = None
    ) -> Tensor:
        price = self._about_origin(local, first, second, prior)
        # NaN, or far from the origin in units of the atom's width: too few digits.
        if bool((lost := price.isnan()).any()):
            price[lost] = super().pair_objective(local, first[lost], second[lost], prior)
        return price

    def _about_origin(
        self, f: Factor, first: Tensor, second: Tensor, prior: Factor | None
    ) -> Tensor:
        """Objectives of pairs by sums about the origin of all, where the statistics stay in the
        cache: no component is taken apart again for each pair that it is in. NaN where digits were
        lost."""
        origin, f = f.origin, f.centred
        try:
            prior = None if prior is None else prior.shift(origin)
            statistics, potential = self.statistics(f), self.potential(f, prior)
            weight = torch.full((len(first),), 2.0, dtype=torch.float64, device=f.device)
            atoms = self.from_statistics(f, statistics[first] + statistics[second], weight, prior)
            price = potential[first] + potential[second]
            price = price - self.group_potential(atoms, weight, prior)
            if origin is not None:
                # What they merge into is no farther, in units of its own width.
                size = torch.maximum(f.first.size[first], f.first.size[second])
                price = torch.where(size > FAR * origin.numel(), torch.nan, price)
        except (torch.linalg.LinAlgError, ValueError):
            return torch.full((len(first),), torch.nan, dtype=torch.float64)
        return price.cpu()


class AdditiveEntrywise(AdditivePooling, Entrywise):
    """The additive pooling of components of which entries are missing, from that of one entry: the
    weight of each entry is summed along with its coordinates."""

    pooling: AdditivePooling

    def __init__(self, pooling: AdditivePooling) -> None:
        super().__init__(pooling)

    def coordinates(self, local: Any) -> Tensor:
        rows: Tensor = local.rows(self.pooling.coordinates(local.entries))
        return rows

    def statistics(self, local: Any) -> Tensor:
        x, there = self.coordinates(local), local.present
        return torch.cat([x * local.spread(there, x), there], -1)

    def from_statistics(
        self, like: Any, total: Tensor, weight: Tensor, prior: Factor | None = None
    ) -> Any:
        size = like.mass.shape[-1]
        total, mass = total[..., :-size], total[..., -size:]
        missing = mass <= NOTHING
        # Where nothing was added up it is as in the first component: of the family.
        default = self.pooling.coordinates(like.head).reshape(1, -1)
        total = torch.where(like.spread(missing, total), default, total)
        atoms = self.from_coordinates(like, total, torch.where(missing, 1.0, mass), prior)
        return Masked.of_entries(atoms, mass)

    def from_coordinates(
        self, like: Any, total: Tensor, weight: Tensor, prior: Factor | None = None
    ) -> Any:
        """The entries ``[K * J]``, from sums ``[K, J * P]`` and weights ``[K, J]``."""
        entries = total.unflatten(-1, (weight.shape[-1], -1)).flatten(0, 1)
        one = self.priors(prior, len(weight))
        return self.pooling.from_coordinates(
            like.entries.to(dtype=torch.float64), entries, weight.reshape(-1, 1), one
        )

    def potential(self, local: Any, prior: Factor | None = None) -> Tensor:
        one = self.priors(prior, len(local.mass))
        summed: Tensor = local.summed(self.pooling.potential(local.entries, one))
        return summed

    def group_potential(self, atoms: Any, weight: Tensor, prior: Factor | None = None) -> Tensor:
        one = self.priors(prior, len(atoms.mass))
        potential = self.pooling.group_potential(atoms.entries, atoms.mass.flatten(), one)
        summed: Tensor = atoms.summed(potential)
        return summed
