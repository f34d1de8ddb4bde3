# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Components of which some entries are missing: of the weights between two layers, say, those to
units that a party does not have. What is missing adds nothing to a divergence or a barycentre."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_fusion.families.factor import Factor, Side
from pyro_fusion.families.family import Family, Params

__all__ = ["NOTHING", "Masked", "entries_of"]

# Of sums of weights from which others were taken off again, what is left of nothing.
NOTHING = 1e-9


def entries_of(factor: Factor, count: int) -> Factor:
    """The entries of ``count`` components, or of one repeated, as factors of one batch axis: those
    of the first, of the second, ..., ``[count * J]``."""
    return factor.expand_batch((count,)).map(lambda v: v.flatten(0, 1))


@dataclass(frozen=True, eq=False)
class Masked:
    """Components ``[N]`` of ``J`` independent entries each, not all of which are there.

    :ivar factor: batch shape ``[N]``, with the entries on its first event axis.
    :ivar mass: ``[N, J]``, float64: the weight of what each entry was pooled from, one for an entry
        as it was handed over; zero where it is missing, and whose parameters, although of the
        family, then mean nothing.
    """

    factor: Factor
    mass: Tensor
    _before: tuple[Tensor, Masked] | None = field(default=None, init=False, repr=False)

    @classmethod
    def of_entries(cls, entries: Factor, mass: Tensor) -> Masked:
        """Components made of entries ``[N * J]``, with all that is cached there."""
        size = mass.shape[-1]
        result = cls(entries.map(lambda v: v.unflatten(0, (-1, size))), mass)
        result.__dict__["entries"] = entries
        return result

    @functools.cached_property
    def entries(self) -> Factor:
        """All entries as factors by themselves, ``[N * J]``."""
        return self.factor.map(lambda v: v.flatten(0, 1))

    @functools.cached_property
    def head(self) -> Factor:
        """The entries of the first component, ``[J]``."""
        return self.factor.map(lambda v: v[0])

    @functools.cached_property
    def present(self) -> Tensor:
        """A mask of the entries that are there: ones and zeros ``[N, J]``."""
        return (self.mass > NOTHING).double()

    def summed(self, x: Tensor) -> Tensor:
        """Numbers of all entries ``[N * J]`` summed over those that are there: ``[N]``."""
        return (self.present * x.reshape(self.mass.shape)).sum(-1)

    def rows(self, x: Tensor) -> Tensor:
        """Vectors of all entries ``[N * J, P]``, end to end: ``[N, J * P]``."""
        return x.reshape(-1, self.mass.shape[-1] * x.shape[-1])

    def spread(self, entries: Tensor, like: Tensor) -> Tensor:
        """``[..., J]`` repeated for each of the coordinates of an entry: ``[..., J * P]``."""
        return entries.repeat_interleave(like.shape[-1] // entries.shape[-1], -1)

    # -- what it is ------------------------------------------------------------------------------

    @property
    def family(self) -> Family:
        """The family of the entries."""
        return self.factor.family

    @property
    def params(self) -> Params:
        """The parameters of :attr:`factor`."""
        return self.factor.params

    @property
    def batch_shape(self) -> torch.Size:
        """``[N]``."""
        return self.factor.batch_shape

    @property
    def shape(self) -> torch.Size:
        """Batch and event shape of :attr:`factor`."""
        return self.factor.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.factor.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.factor.device

    @property
    def features(self) -> Tensor:
        """Numbers that tell components apart, the same in any order of the entries: ``[N, C]``."""
        natural = self.rows(self.entries.natural)
        there = natural * self.spread(self.present, natural)
        return there.unflatten(-1, (self.mass.shape[-1], -1)).sum(-2)

    @property
    def dimensions(self) -> float:
        """The mean count of numbers in a component."""
        return self.factor.event_shape.numel() * float(self.present.mean())

    # -- divergences: over the entries that both have ----------------------------------------------

    @functools.cached_property
    def first(self) -> Side:
        """The components as the first argument of KL divergences."""
        there, e = self.present, self.entries
        natural, mean = self.rows(e.natural), self.rows(e.mean)
        normalizers = e.log_normalizer.reshape(there.shape)
        products = natural * mean
        duals = products.unflatten(-1, (there.shape[-1], -1)).sum(-1) - normalizers
        values = torch.cat([-duals * there, -there, mean * self.spread(there, mean)], -1)
        size = (products.abs() * self.spread(there, mean)).sum(-1)
        size = size + (normalizers.abs() * there).sum(-1)
        return Side(values, torch.zeros_like(size), size)

    @functools.cached_property
    def second(self) -> Side:
        """The components as the second argument of KL divergences."""
        there, natural = self.present, self.rows(self.entries.natural)
        own = self.entries.log_normalizer.reshape(there.shape) * there
        values = torch.cat([there, own, natural * self.spread(there, natural)], -1)
        size = own.abs().sum(-1)
        return Side(values, torch.zeros_like(size), size)

    def divergence(self, other: Masked) -> Tensor:
        """``KL(self ‖ other)``, ``[N]``, float64."""
        return self.within(other).summed(self.entries.divergence(other.entries))

    def within(self, other: Masked) -> Masked:
        """The components with the entries alone that the other's have too."""
        return Masked(self.factor, self.mass * other.present)

    def apart(self, other: Masked) -> Tensor:
        """A mask of the pairs of components that have no entry in common, ``[K, N]``."""
        return self.present @ other.present.mT == 0

    # -- location, as of a Factor ------------------------------------------------------------------

    def location(self) -> Tensor | None:
        """The location parameter, ``[N, J, ...]``, or None if the family has none."""
        return self.factor.location()

    @property
    def origin(self) -> Tensor | None:
        """The median location of each entry, about which :attr:`centred` is."""
        return self.factor.origin

    @functools.cached_property
    def centred(self) -> Masked:
        """The components shifted by their own :attr:`origin`, with all that is cached there."""
        return self if self.origin is None else self.shift(self.origin)

    def shift(self, origin: Tensor | None, sign: float = -1.0) -> Masked:
        """The components of ``x - origin`` (``x + origin`` for ``sign=1``), in float64; the way
        back is free, as with :meth:`Factor.shift`."""
        if origin is None or self.family.location is None:
            return self
        if sign < 0 and self._before is not None and self._before[0] is origin:
            return self._before[1]
        result = Masked(self.factor.shift(origin, sign), self.mass)
        if sign > 0:
            object.__setattr__(result, "_before", (origin, self))
        return result

    # -- axes --------------------------------------------------------------------------------------

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Masked:
        """Move and cast the parameters; what is already there stays itself, cache and all."""
        factor = self.factor.to(device, dtype)
        return self if factor is self.factor else Masked(factor, self.mass.to(device=device))

    def index_select(self, axis: int, index: Tensor) -> Masked:
        """Keep the components ``index``; ``axis`` is 0."""
        assert axis == 0
        mass = self.mass.index_select(0, index.to(self.device))
        return Masked(self.factor.index_select(0, index), mass)

    def index_copy(self, index: Tensor, other: Masked) -> Masked:
        """The components, those at ``index`` replaced by those of ``other``."""
        mass = self.mass.index_copy(0, index, other.mass)
        return Masked(self.factor.index_copy(index, other.factor), mass)
