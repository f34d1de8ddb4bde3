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
    """``factor.distribution()`` with the ``kl_divergence`` of this package.

    It is defined behind every bijection, and correct where torch 2.13's is not: for batches of
    Wisharts, and for distributions that are close to each other and far from the origin.
    """

    def __init__(self, factor: Factor, validate_args: bool | None = None) -> None:
        self.factor = factor
        # With no axis reinterpreted this is only a wrapper, which Pyro prints as its base.
        super().__init__(factor.distribution(validate_args), 0, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FactorDistribution:
        return FactorDistribution(self.factor.expand_batch(batch_shape), self._validate_args)


@register_kl(FactorDistribution, FactorDistribution)
def _kl(p: FactorDistribution, q: FactorDistribution) -> Tensor:
    return kl(p.factor, q.factor)
