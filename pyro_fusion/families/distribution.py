# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A factor as a Pyro distribution with KL divergences of its own."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import register_kl

from pyro_fusion.families.factor import Factor
from pyro_fusion.families.pairwise import kl

__all__ = ["FactorDistribution"]


class FactorDistribution(dist.TorchDistribution):
    """``factor.distribution()``, whose ``kl_divergence`` is that of this package.

    So it is known behind every bijection, and right where torch's is not: the KL divergence of
    batches of Wisharts, and of any two that are close and far from the origin (torch 2.13).
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, factor: Factor, validate_args: bool | None = None) -> None:
        self.factor = factor
        # Named as wrappers name what they wrap: Pyro prints a model with the latter.
        self.base_dist = factor.distribution(validate_args=validate_args)
        super().__init__(factor.batch_shape, factor.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FactorDistribution:
        return FactorDistribution(self.factor.expand_batch(batch_shape), self._validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return bool(self.base_dist.has_rsample)

    @property
    def support(self) -> Any:
        return self.base_dist.support

    @property
    def mean(self) -> Tensor:
        return self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        return self.base_dist.variance

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.base_dist.sample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return self.base_dist.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base_dist.log_prob(value)


@register_kl(FactorDistribution, FactorDistribution)
def _kl(p: FactorDistribution, q: FactorDistribution) -> Tensor:
    return kl(p.factor, q.factor)
