# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The families Gamma (through a power transform InverseGamma), Exponential, Poisson and
NormalGamma."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyro_fusion.families.family import Family, Params, register_family
from pyro_fusion.families.normal_gamma import NormalGamma
from pyro_fusion.families.special import excess, gamma_concentration, log_minus_digamma, stirling_kl


def _expected_log(concentration: Tensor, rate: Tensor) -> Tensor:
    """``E[log x]`` of a Gamma; the difference from ``log E[x]`` keeps its digits."""
    return (concentration / rate).log() - log_minus_digamma(concentration)


class _Scalar(Family):
    event_dim = 0

    def event_shape(self, params: Params) -> torch.Size:
        return torch.Size()


@register_family(torch.distributions.Gamma)
class GammaFamily(_Scalar):
    """Gamma: ``T(x) = (log x, x)``, ``η = (concentration - 1, -rate)``."""

    distribution = dist.Gamma
    parameters = {"concentration": 0, "rate": 0}

    def statistics(self, value: Tensor) -> Tensor:
        return torch.stack([value.log(), value], -1)

    def natural(self, params: Params) -> Tensor:
        return torch.stack([params["concentration"] - 1, -params["rate"]], -1)

    def mean(self, params: Params) -> Tensor:
        c, r = params["concentration"], params["rate"]
        return torch.stack([_expected_log(c, r), c / r], -1)

    def log_normalizer(self, params: Params) -> Tensor:
        c, r = params["concentration"], params["rate"]
        return torch.lgamma(c) - c * r.log()

    def from_natural(self, eta: Tensor, event_shape: torch.Size) -> Params:
        return {"concentration": eta[..., 0] + 1, "rate": -eta[..., 1]}

    def from_mean(self, mu: Tensor, event_shape: torch.Size) -> Params:
        c = gamma_concentration(mu[..., 1].log() - mu[..., 0])
        return {"concentration": c, "rate": c / mu[..., 1]}

    def kl(self, p: Params, q: Params) -> Tensor:
        # Split at the Gamma with the mean of p and the concentration of q.
        c, r = q["concentration"], q["rate"]
        different_mean = c * excess(p["concentration"] * r, c * p["rate"])
        return different_mean + stirling_kl(p["concentration"], c)


@register_family(torch.distributions.Exponential)
class ExponentialFamily(_Scalar):
    """Exponential: ``T(x) = x``, ``η = -rate``."""

    distribution = dist.Exponential
    parameters = {"rate": 0}

    def statistics(self, value: Tensor) -> Tensor:
        return value.unsqueeze(-1)

    def natural(self, params: Params) -> Tensor:
        return -params["rate"].unsqueeze(-1)

    def mean(self, params: Params) -> Tensor:
        return 1 / params["rate"].unsqueeze(-1)

    def log_normalizer(self, params: Params) -> Tensor:
        return -params["rate"].log()

    def from_natural(self, eta: Tensor, event_shape: torch.Size) -> Params:
        return {"rate": -eta[..., 0]}

    def from_mean(self, mu: Tensor, event_shape: torch.Size) -> Params:
        return {"rate": 1 / mu[..., 0]}

    def kl(self, p: Params, q: Params) -> Tensor:
        return excess(q["rate"], p["rate"])


@register_family(torch.distributions.Poisson)
class PoissonFamily(_Scalar):
    """Poisson: ``T(x) = x``, ``η = log rate``, ``h(x) = 1/x!``."""

    distribution = dist.Poisson
    parameters = {"rate": 0}

    def statistics(self, value: Tensor) -> Tensor:
        return value.unsqueeze(-1)

    def natural(self, params: Params) -> Tensor:
        return params["rate"].log().unsqueeze(-1)

    def mean(self, params: Params) -> Tensor:
        return params["rate"].unsqueeze(-1)

    def log_normalizer(self, params: Params) -> Tensor:
        return params["rate"]

    def from_natural(self, eta: Tensor, event_shape: torch.Size) -> Params:
        return {"rate": eta[..., 0].exp()}

    def from_mean(self, mu: Tensor, event_shape: torch.Size) -> Params:
        return {"rate": mu[..., 0]}

    def kl(self, p: Params, q: Params) -> Tensor:
        return p["rate"] * excess(q["rate"], p["rate"])


@register_family()
class NormalGammaFamily(Family):
    """NormalGamma: ``T(m, τ) = (τm, -τm²/2, -τ, log τ)``,
    ``η = (κ loc, κ, rate + κ loc²/2, gamma_shape - 1/2)`` with ``κ = concentration``."""

    distribution = NormalGamma
    event_dim = 1
    parameters = {"loc": 0, "concentration": 0, "gamma_shape": 0, "rate": 0}
    location = "loc"

    def build(self, params: Params, validate_args: bool | None = None) -> Distribution:
        m, k, a, b = (params[n] for n in self.parameters)
        return NormalGamma(m, k, a, b, validate_args=validate_args)

    def event_shape(self, params: Params) -> torch.Size:
        return torch.Size([2])

    def statistics(self, value: Tensor) -> Tensor:
        m, t = value.unbind(-1)
        return torch.stack([t * m, -t * m**2 / 2, -t, t.log()], -1)

    def natural(self, params: Params) -> Tensor:
        m, k = params["loc"], params["concentration"]
        return torch.stack(
            [k * m, k, params["rate"] + k * m**2 / 2, params["gamma_shape"] - 0.5], -1
        )

    def mean(self, params: Params) -> Tensor:
        m, k, a, b = (params[n] for n in ("loc", "concentration", "gamma_shape", "rate"))
        precision = a / b
        return torch.stack(
            [precision * m, -(1 / k + precision * m**2) / 2, -precision, _expected_log(a, b)], -1
        )

    def log_normalizer(self, params: Params) -> Tensor:
        k, a, b = (params[n] for n in ("concentration", "gamma_shape", "rate"))
        return -k.log() / 2 + 0.5 * math.log(2 * math.pi) + torch.lgamma(a) - a * b.log()

    def from_natural(self, eta: Tensor, event_shape: torch.Size) -> Params:
        km, k, b, a = eta.unbind(-1)
        m = km / k
        return {"loc": m, "concentration": k, "gamma_shape": a + 0.5, "rate": b - k * m**2 / 2}

    def from_mean(self, mu: Tensor, event_shape: torch.Size) -> Params:
        tm, tmm, t, log_t = mu.unbind(-1)
        m = -tm / t
        a = gamma_concentration((-t).log() - log_t)
        return {
            "loc": m,
            "concentration": 1 / (-2 * tmm + t * m**2),
            "gamma_shape": a,
            "rate": -a / t,
        }

    def center(self, params: Params) -> Tensor:
        # From the centres of the marginals: the mean does not exist for every gamma_shape.
        return torch.stack([params["loc"], params["gamma_shape"] / params["rate"]], -1)

    def kl(self, p: Params, q: Params) -> Tensor:
        return kl_divergence(self.build(p, False), self.build(q, False))
