# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Members of exponential families in other coordinates, and what is computed there: divergences,
sums, shifts. All that fusion does to a distribution is done on a :class:`Factor`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_fusion.families.family import Params
from pyro_fusion.families.member import Member

__all__ = ["Factor", "Side"]


@dataclass(frozen=True, eq=False)
class Side:
    """``KL(a ‖ b) = a.offset + b.offset - <a.values, b.values>``, where of ``a`` they are ``A*(μ)``
    and ``μ``, of ``b`` ``A(η)`` and ``η``.

    :ivar values: ``[*batch, P]``.
    :ivar offset: ``[*batch]``.
    :ivar size: ``[*batch]``, the sum of the absolute terms of the offset: they are what is rounded.
    """

    values: Tensor
    offset: Tensor
    size: Tensor

    @functools.cached_property
    def bound(self) -> tuple[Tensor, Tensor]:
        """``r`` and ``c``, ``[N]`` and ``[P]``, with ``|values| <= r cᵀ``: a product of vectors, so
        that ``<|a|, |b|> <= r_a (|b| c_a)`` for all pairs needs no second matrix product."""
        values = self.values.abs()
        # The typical size, not the largest: an outlier should spoil its own row alone.
        c = values.mean(0) + 1e-300
        return values.div_(c).amax(-1), c


@dataclass(frozen=True, eq=False)
class Factor(Member):
    """A distribution as family + parameters + transforms, that can be pooled."""

    _before: "tuple[Tensor, Factor] | None" = field(default=None, init=False, repr=False)

    # -- the same distribution in other coordinates --------------------------------------------

    def _sum(self, x: Tensor) -> Tensor:
        n = len(self.base_shape) - self.batch_dim
        return x.flatten(self.batch_dim).sum(-1) if n else x

    def _flat(self, x: Tensor) -> Tensor:
        return x.flatten(self.batch_dim)

    @functools.cached_property
    def natural(self) -> Tensor:
        """Natural parameters, ``[*batch_shape, P]``, float64."""
        return self._flat(self.family.natural(self._double()))

    @functools.cached_property
    def mean(self) -> Tensor:
        """Mean parameters, ``[*batch_shape, P]``, float64."""
        return self._flat(self.family.mean(self._double()))

    @functools.cached_property
    def log_normalizer(self) -> Tensor:
        """Log-normaliser, ``[*batch_shape]``, float64."""
        return self._sum(self.family.log_normalizer(self._double()))

    @functools.cached_property
    def first(self) -> Side:
        """The factor as the first argument of KL divergences."""
        products = self.natural * self.mean
        offset = products.sum(-1) - self.log_normalizer
        return Side(self.mean, offset, products.abs_().sum(-1) + self.log_normalizer.abs())

    @property
    def dual(self) -> Tensor:
        """``<η, μ> - A(η)``, the conjugate of the log-normaliser: ``[*batch_shape]``, float64."""
        return self.first.offset

    @functools.cached_property
    def second(self) -> Side:
        """The factor as the second argument of KL divergences."""
        return Side(self.natural, self.log_normalizer, self.log_normalizer.abs())

    def divergence(self, other: "Factor") -> Tensor:
        """``KL(self ‖ other)`` by the family's formula, ``[*batch_shape]``, float64. Both have one
        structure and one ``base_shape``."""
        return self._sum(self.family.kl(self._double(), other._double()))

    def from_natural(self, eta: Tensor) -> "Factor":
        """A factor of this structure with natural parameters ``eta``: ``[*batch, P]``."""
        return self._from(eta, self.family.from_natural)

    def from_mean(self, mu: Tensor) -> "Factor":
        """A factor of this structure with mean parameters ``mu``: ``[*batch, P]``."""
        return self._from(mu, self.family.from_mean)

    def _from(self, flat: Tensor, convert: Callable[[Tensor, torch.Size], Params]) -> "Factor":
        rest = self.base_shape[self.batch_dim :]
        size = flat.shape[-1] // math.prod(rest)
        shaped = flat.double().reshape(flat.shape[:-1] + rest + (size,))
        params = convert(shaped, self.family.event_shape(self.params))
        params = {k: v.to(self.dtype) for k, v in params.items()}
        return replace(self, params=params, batch_dim=flat.dim() - 1)

    # -- location: KL and barycentres do not change under a common shift ------------------------

    def location(self) -> Tensor | None:
        """The location parameter in float64, or None if the family has none."""
        name = self.family.location
        return None if name is None else self.params[name].double()

    @functools.cached_property
    def origin(self) -> Tensor | None:
        """The median location, about which :attr:`centred` is: nothing is far from it because of
        one that is."""
        location = self.location()
        if location is None:
            return None
        return location.flatten(0, self.batch_dim - 1).median(0).values

    @property
    def centred(self) -> "Factor":
        """This factor shifted by its own :attr:`origin`, with all that is cached there."""
        return self if self.origin is None else self._centred

    @functools.cached_property
    def _centred(self) -> "Factor":
        return self.shift(self.origin)

    def shift(self, origin: Tensor | None, sign: float = -1.0) -> "Factor":
        """The factor of ``x - origin`` (``x + origin`` for ``sign=1``), in float64.

        Moved there with ``sign=1``, the way back is free and keeps what was cached."""
        name = self.family.location
        if origin is None or name is None:
            return self
        if sign < 0 and self._before is not None and self._before[0] is origin:
            return self._before[1]
        params = self._double()
        params[name] = params[name] + sign * origin
        result = replace(self, params=params)
        if sign > 0:  # not both ways: they would keep each other alive
            object.__setattr__(result, "_before", (origin, self))
        return result

    @property
    def scales(self) -> bool:
        """True if multiples of members are members."""
        return self.family.scale is not None and not self.transforms

    @property
    def precision(self) -> Tensor:
        """One over the variance given the rest of the event, of each number: that of location."""
        name = self.family.scale
        assert name is not None
        scale = self.params[name].double()
        if self.family.parameters[name] < 2:
            return scale**-2
        return torch.cholesky_inverse(scale).diagonal(dim1=-2, dim2=-1)

    def times(self, location: Tensor, scale: Tensor) -> "Factor":
        """The factor with each number of the location, and its width, multiplied; widths by
        positive numbers."""
        params, (loc, width) = dict(self.params), (self.family.location, self.family.scale)
        assert loc is not None and width is not None
        params[loc] = params[loc] * location.to(params[loc])
        if self.family.parameters[width] > 1:
            scale = scale.unsqueeze(-1)
        params[width] = params[width] * scale.to(params[width])
        return replace(self, params=params)
