# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Pairs of components and what it costs to merge them: what a pooling reads the dispersion off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_fusion.families import Factor

__all__ = ["WRONG", "Merges"]

# The quantile of merges within a party that counts.
WRONG = 0.75

# `GroupNormPrior` asks one T of two lone components that share an atom, and up to 1.7 of one that
# joins a popular atom. Prices in other units are translated at the middle of that.
_MIDDLE = (2 - 2**0.5) ** -0.5


@dataclass(frozen=True)
class Merges:
    """Pairs of components that are near, of one party or of two, and the price of their merges.

    :ivar local, prior: the components ``[N]`` and the prior of one atom by site.
    :ivar first, second: the pairs, LongTensors ``[M]``.
    :ivar price: ``min_q KL(q ‖ first) + KL(q ‖ second)`` over all sites, in nats: ``[M]``.
    :ivar limit: the price up to which two components may be the same.
    :ivar wrong: which pairs are of one party, so known to be different: LongTensor.
    :ivar num_parties: S.
    """

    local: Mapping[str, Any]
    prior: Mapping[str, Factor]
    first: Tensor
    second: Tensor
    price: Tensor
    limit: float
    wrong: Tensor
    num_parties: int

    def translated(self, other: Tensor) -> float:
        """The limit in units of other prices ``[M]`` of the same merges: as many are below it."""
        limit = _MIDDLE * self.limit
        floor = 1e-12 * limit
        x, y = (torch.sort(v.clamp(min=floor)).values.log().numpy() for v in (self.price, other))
        level = math.log(limit)
        if level > x[-1]:  # beyond all that was seen, as far as the last is below
            return limit * math.exp(y[-1] - x[-1]) / _MIDDLE
        return math.exp(np.interp(level, x, y)) / _MIDDLE
