# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Factors of which some entries are missing: of the weights between two layers, say, those to units
that a party does not have. What is missing adds nothing to a divergence or a barycentre."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_fusion.families.factor import Factor, Side

__all__ = ["PartialFactor"]

# Of sums of weights from which others were taken off again, what is left of nothing.
_NOTHING = 1e-9


@dataclass(frozen=True, eq=False)
class PartialFactor(Factor):
    """A factor of batch shape ``[N]`` whose first event axis, of independent parts, has ``J``
    entries, not all of which are there.

    :ivar mass: ``[N, J]``, float64: the weight of what each entry was pooled from, one for an entry
        as it was handed over; zero where it is missing, and whose parameters, although of the
        family, then mean nothing.
    """

    mass: Tensor = field(kw_only=True)

    @functools.cached_property
    def present(self) -> Tensor:
        """Which entries are there: ones and zeros ``[N, J]``."""
        return (self.mass > _NOTHING).double()

    def _entries(self, x: Tensor) -> Tensor:
        """``[N, J, ...]`` summed over all but the entries: ``[N, J]``."""
        return x.flatten(2).sum(-1) if x.dim() > 2 else x

    def _spread(self, entries: Tensor, like: Tensor) -> Tensor:
        """``[..., J]`` repeated for each of the coordinates of an entry: ``[..., P]``."""
        return entries.repeat_interleave(like.shape[-1] // entries.shape[-1], -1)

    # -- sums: the weight of each entry goes along with its coordinates --------------------------

    def summands(self, x: Tensor) -> Tensor:
        return torch.cat([x * self._spread(self.present, x), self.present], -1)

    def sums(self, total: Tensor, weight: Tensor, default: Tensor) -> tuple[Tensor, Tensor, Factor]:
        size = self.mass.shape[-1]
        total, mass = total[..., :-size], total[..., -size:]
        result = replace(self, mass=mass)
        missing = 1 - result.present
        total = torch.where(self._spread(missing, total) > 0, default[:1], total)
        return total, self._spread(torch.where(missing > 0, 1.0, mass), total), result

    # -- what is summed over entries --------------------------------------------------------------

    @functools.cached_property
    def _normalizers(self) -> Tensor:
        """The log-normaliser of each entry, ``[N, J]``."""
        return self._entries(self.family.log_normalizer(self._double()))

    @functools.cached_property
    def _duals(self) -> Tensor:
        """The negative entropy of each entry but for the carrier measure, ``[N, J]``."""
        products = (self.natural * self.mean).unflatten(-1, (self.mass.shape[-1], -1))
        return products.sum(-1) - self._normalizers

    @functools.cached_property
    def log_normalizer(self) -> Tensor:
        return (self.present * self._normalizers).sum(-1)

    @functools.cached_property
    def dual(self) -> Tensor:
        return (self.present * self._duals).sum(-1)

    def log_normalizer_over(self, base: Factor) -> Tensor:
        own = self._entries(base.family.log_normalizer(base._double()))
        return (self.present * (self._normalizers - own)).sum(-1)

    def weighted_log_normalizer(self, weight: Tensor) -> Tensor:
        return (self.mass * self._normalizers).sum(-1)

    def weighted_dual(self, weight: Tensor) -> Tensor:
        return (self.mass * self._duals).sum(-1)

    # -- divergences: over the entries that both have ----------------------------------------------

    @functools.cached_property
    def first(self) -> Side:
        there, mean = self.present, self.mean
        values = torch.cat([-self._duals * there, -there, mean * self._spread(there, mean)], -1)
        products = (self.natural * mean).abs() * self._spread(there, mean)
        size = products.sum(-1) + (self._normalizers.abs() * there).sum(-1)
        return Side(values, torch.zeros_like(size), size)

    @functools.cached_property
    def second(self) -> Side:
        there, natural = self.present, self.natural
        own = self._normalizers * there
        values = torch.cat([there, own, natural * self._spread(there, natural)], -1)
        size = own.abs().sum(-1)
        return Side(values, torch.zeros_like(size), size)

    def divergences(self, other: Factor) -> Tensor:
        there = self.present
        if isinstance(other, PartialFactor):
            there = there * other.present
        return there * self._entries(self.family.kl(self._double(), other._double()))

    def divergence(self, other: Factor) -> Tensor:
        return self.divergences(other).sum(-1)

    def within(self, other: Factor) -> "PartialFactor":
        assert isinstance(other, PartialFactor)
        return replace(self, mass=self.mass * other.present)

    def apart(self, other: Factor) -> Tensor | None:
        if not isinstance(other, PartialFactor):
            return None
        return self.present @ other.present.mT == 0

    def over_entries(self, divergence: Tensor) -> Tensor:
        return divergence @ self.present.mT

    @property
    def features(self) -> Tensor:
        # The same in any order of the entries.
        there = self.natural * self._spread(self.present, self.natural)
        return there.unflatten(-1, (self.mass.shape[-1], -1)).sum(-2)

    @property
    def dimensions(self) -> float:
        return super().dimensions * float(self.present.mean())

    # -- axes --------------------------------------------------------------------------------------

    def index_select(self, axis: int, index: Tensor) -> "PartialFactor":
        mass = self.mass.index_select(axis, index.to(self.device))
        return replace(self, params=super().index_select(axis, index).params, mass=mass)

    def index_copy(self, index: Tensor, other: Factor) -> "PartialFactor":
        assert isinstance(other, PartialFactor)
        mass = self.mass.index_copy(0, index, other.mass)
        return replace(self, params=super().index_copy(index, other).params, mass=mass)

    def expand_batch(self, batch_shape: Sequence[int]) -> "PartialFactor":
        mass = self.mass.expand(*batch_shape, -1)
        return replace(self, params=super().expand_batch(batch_shape).params, mass=mass)
