# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The NormalGamma distribution and its KL divergence."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Gamma, constraints, register_kl
from torch.distributions.utils import broadcast_all

from pyro_fusion.errors import broadcast_shapes
from pyro_fusion.families.special import excess, stirling_kl

__all__ = ["NormalGamma"]

_LOG_2PI = math.log(2 * math.pi)


class NormalGamma(TorchDistribution):
    r"""``τ ~ Gamma(shape, rate)``, ``μ | τ ~ N(loc, 1 / (concentration · τ))``; value ``[μ, τ]``.

    Value: event shape ``(2,)``; entry 0 is the mean μ, entry 1 the precision τ. It is the
    :class:`NormalWishart` of ``D = 1`` with ``df = 2 · gamma_shape`` and ``V = 1 / (2 · rate)``.
    Marginally μ is Student t with ``2 · gamma_shape`` degrees of freedom, so for a small
    ``gamma_shape`` its mean is NaN or its variance infinite. Parameters are numbers or tensors
    that broadcast.

    :param loc: mean of μ.
    :param concentration: pseudo-count of the mean, positive.
    :param gamma_shape: shape of the Gamma, positive; not ``shape``, which is a method of every
        Pyro distribution.
    :param rate: rate of the Gamma, positive.
    :raises ValueError: shapes that do not broadcast or, under validation, values outside
        ``arg_constraints``.

    Source: Murphy, *Conjugate Bayesian analysis of the Gaussian distribution* (2007), sec. 3.
    """

    arg_constraints = {
        "loc": constraints.real,
        "concentration": constraints.positive,
        "gamma_shape": constraints.positive,
        "rate": constraints.positive,
    }
    support = constraints.independent(
        constraints.cat([constraints.real, constraints.positive], dim=-1), 1
    )
    has_rsample = True

    def __init__(
        self,
        loc: Tensor | float,
        concentration: Tensor | float,
        gamma_shape: Tensor | float,
        rate: Tensor | float,
        validate_args: bool | None = None,
    ) -> None:
        named = {
            "loc": loc,
            "concentration": concentration,
            "gamma_shape": gamma_shape,
            "rate": rate,
        }
        broadcast_shapes({n: v.shape for n, v in named.items() if isinstance(v, Tensor)})
        self.loc, self.concentration, self.gamma_shape, self.rate = broadcast_all(*named.values())
        super().__init__(self.loc.shape, Size((2,)), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalGamma:
        """Expand the batch shape, as :meth:`torch.distributions.Distribution.expand` does."""
        new = self._get_checked_instance(NormalGamma, _instance)
        batch_shape = Size(batch_shape)
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        super(NormalGamma, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The mean ``[loc, shape / rate]``; entry 0 is NaN where ``shape <= 1/2``."""
        loc = self.loc.masked_fill(self.gamma_shape <= 0.5, math.nan)
        return torch.stack([loc, self.gamma_shape / self.rate], dim=-1)

    @property
    def variance(self) -> Tensor:
        """Entrywise variances. Entry 0 is infinite where ``1/2 < shape <= 1``, NaN below."""
        of_mean = self.rate / (self.concentration * (self.gamma_shape - 1).clamp(min=0))
        of_mean = of_mean.masked_fill(self.gamma_shape <= 0.5, math.nan)
        return torch.stack([of_mean, self.gamma_shape / self.rate.square()], dim=-1)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw ``[μ, τ]``, shape ``sample_shape + batch_shape + (2,)``, with gradients."""
        precision = Gamma(self.gamma_shape, self.rate, validate_args=False).rsample(sample_shape)
        offset = torch.randn_like(precision) * (self.concentration * precision).rsqrt()
        return torch.stack([self.loc + offset, precision], dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of ``[μ, τ]``, shape ``(...)`` for value ``(..., 2)``."""
        if self._validate_args:
            self._validate_sample(value)
        mean, precision = value.unbind(-1)
        weight = self.concentration * precision
        normal = (weight.log() - _LOG_2PI - weight * (mean - self.loc).square()) / 2
        gamma = self.gamma_shape * self.rate.log() - self.gamma_shape.lgamma()
        return normal + gamma + (self.gamma_shape - 1) * precision.log() - self.rate * precision

    def entropy(self) -> Tensor:
        """Differential entropy ``E[-log p(μ, τ)]``, shape ``(...)``."""
        log_precision = self.gamma_shape.digamma() - self.rate.log()
        normal = (1 + _LOG_2PI - self.concentration.log() - log_precision) / 2
        gamma = self.gamma_shape - self.rate.log() + self.gamma_shape.lgamma()
        return normal + gamma + (1 - self.gamma_shape) * self.gamma_shape.digamma()


@register_kl(NormalGamma, NormalGamma)
def _kl_normal_gamma(p: NormalGamma, q: NormalGamma) -> Tensor:
    """KL divergence ``E_p[KL(N ‖ N) | τ] + KL(Gamma ‖ Gamma)``, broadcast over batch shapes."""
    distance = q.concentration * p.gamma_shape / p.rate * (p.loc - q.loc).square()
    spread = excess(q.concentration, p.concentration)
    gamma = q.gamma_shape * excess(p.gamma_shape * q.rate, q.gamma_shape * p.rate)
    return (spread + distance) / 2 + gamma + stirling_kl(p.gamma_shape, q.gamma_shape)
