# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The two sides of a KL divergence, in coordinates where all pairs are one matrix product."""

import functools
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Side"]


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
