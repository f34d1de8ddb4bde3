# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A factor as a Pyro distribution with KL divergences of its own."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import register_kl

from pyro_fusion.families.factor import Factor
from pyro_fusion.families.pairwise import kl

__all__ = ["FactorDistribution"]


class FactorDistribution(dist.Independent):
    """``factor.distribution()``, whose ``kl_divergence`` is that of this package.

    So it is known behind every bijection, and right where torch's is not: the KL divergence of
    batches of Wisharts, and of any two that are close and far from the origin (torch 2.13).
    """

    def __init__(self, factor: Factor, validate_args: bool | None = None) -> None:
        self.factor = factor
        # Of no axis more than it has: a wrapper, which Pyro prints by what it wraps.
        super().__init__(factor.distribution(validate_args), 0, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FactorDistribution:
        return FactorDistribution(self.factor.expand_batch(batch_shape), self._validate_args)


@register_kl(FactorDistribution, FactorDistribution)
def _kl(p: FactorDistribution, q: FactorDistribution) -> Tensor:
    return kl(p.factor, q.factor)
