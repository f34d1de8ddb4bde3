# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The families Normal and MultivariateNormal (through transforms LogNormal, and every factor of
an autoguide)."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_fusion.families.family import Family, Params, register_family
from pyro_fusion.families.special import excess, inverse_tril, pack_symmetric, unpack_symmetric

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@register_family(torch.distributions.Normal)
class NormalFamily(Family):
    """Normal: ``T(x) = (x, x²)``, ``η = (loc/scale², -1/(2 scale²))``."""

    distribution = dist.Normal
    event_dim = 0
    parameters = {"loc": 0, "scale": 0}
    location = "loc"
    scale = "scale"

    def event_shape(self, params: Params) -> torch.Size:
        return torch.Size()

    def statistics(self, value: Tensor) -> Tensor:
        return torch.stack([value, value**2], -1)

    def natural(self, params: Params) -> Tensor:
        precision = params["scale"] ** -2
        return torch.stack([params["loc"] * precision, -precision / 2], -1)

    def mean(self, params: Params) -> Tensor:
        return torch.stack([params["loc"], params["loc"] ** 2 + params["scale"] ** 2], -1)

    def log_normalizer(self, params: Params) -> Tensor:
        z = params["loc"] / params["scale"]
        return z**2 / 2 + params["scale"].log() + _HALF_LOG_2PI

    def from_natural(self, eta: Tensor, event_shape: torch.Size) -> Params:
        variance = -0.5 / eta[..., 1]
        return {"loc": eta[..., 0] * variance, "scale": variance.sqrt()}

    def from_mean(self, mu: Tensor, event_shape: torch.Size) -> Params:
        return {"loc": mu[..., 0], "scale": (mu[..., 1] - mu[..., 0] ** 2).sqrt()}

    def kl(self, p: Params, q: Params) -> Tensor:
        z = (p["loc"] - q["loc"]) / q["scale"]
        return (excess(p["scale"] ** 2, q["scale"] ** 2) + z**2) / 2


@register_family(
    torch.distributions.MultivariateNormal, torch.distributions.LowRankMultivariateNormal
)
class MultivariateNormalFamily(Family):
    """MultivariateNormal: ``T(x) = (x, xxᵀ)``, ``η = (Λ loc, -Λ/2)``, symmetric matrices packed."""

    distribution = dist.MultivariateNormal
    event_dim = 1
    parameters = {"loc": 1, "scale_tril": 2}
    location = "loc"
    scale = "scale_tril"

    def event_shape(self, params: Params) -> torch.Size:
        return params["loc"].shape[-1:]

    def statistics(self, value: Tensor) -> Tensor:
        outer = value.unsqueeze(-1) * value.unsqueeze(-2)
        return torch.cat([value, pack_symmetric(outer)], -1)

    def natural(self, params: Params) -> Tensor:
        precision = torch.cholesky_inverse(params["scale_tril"])
        shift = (precision @ params["loc"].unsqueeze(-1)).squeeze(-1)
        return torch.cat([shift, pack_symmetric(precision) / -2], -1)

    def mean(self, params: Params) -> Tensor:
        loc, tril = params["loc"], params["scale_tril"]
        second = torch.addcmul(tril @ tril.mT, loc.unsqueeze(-1), loc.unsqueeze(-2))
        return torch.cat([loc, pack_symmetric(second)], -1)

    def log_normalizer(self, params: Params) -> Tensor:
        loc, tril = params["loc"], params["scale_tril"]
        z = torch.linalg.solve_triangular(tril, loc.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (z**2).sum(-1) / 2 + log_det + loc.shape[-1] * _HALF_LOG_2PI

    def from_natural(self, eta: Tensor, event_shape: torch.Size) -> Params:
        dim = event_shape[-1]
        tril = inverse_tril(unpack_symmetric(-2 * eta[..., dim:], dim))
        loc = (tril @ (tril.mT @ eta[..., :dim].unsqueeze(-1))).squeeze(-1)
        return {"loc": loc, "scale_tril": tril}

    def from_mean(self, mu: Tensor, event_shape: torch.Size) -> Params:
        dim = event_shape[-1]
        loc = mu[..., :dim]
        second = unpack_symmetric(mu[..., dim:], dim)
        covariance = torch.addcmul(second, loc.unsqueeze(-1), loc.unsqueeze(-2), value=-1)
        return {"loc": loc, "scale_tril": torch.linalg.cholesky(covariance)}

    def kl(self, p: Params, q: Params) -> Tensor:
        tril_p, tril_q = p["scale_tril"], q["scale_tril"]
        ratio = torch.linalg.solve_triangular(tril_q, tril_p, upper=False)
        shift = (p["loc"] - q["loc"]).unsqueeze(-1)
        z = torch.linalg.solve_triangular(tril_q, shift, upper=False).squeeze(-1)
        diagonal = excess(
            tril_p.diagonal(dim1=-2, dim2=-1) ** 2, tril_q.diagonal(dim1=-2, dim2=-1) ** 2
        )
        return (diagonal.sum(-1) + ratio.tril(-1).square().sum((-2, -1)) + (z**2).sum(-1)) / 2

    def index_event(self, params: Params, axis: int, index: Tensor) -> Params:
        tril = params["scale_tril"]
        covariance = (tril @ tril.mT).index_select(-1, index).index_select(-2, index)
        return {
            "loc": params["loc"].index_select(-1, index),
            "scale_tril": torch.linalg.cholesky(covariance),
        }
