# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The families Wishart and NormalWishart."""

import math
import warnings
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyro_fusion.families.family import Family, Params, register_family
from pyro_fusion.families.normal_wishart import NormalWishart
from pyro_fusion.families.special import (
    inverse_tril,
    mvdigamma,
    pack_symmetric,
    unpack_symmetric,
    wishart_df,
)


def _log_det(tril: Tensor) -> Tensor:
    return 2 * tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _expected_log_det(df: Tensor, tril: Tensor) -> Tensor:
    dim = tril.shape[-1]
    return mvdigamma(df / 2, dim) + dim * math.log(2) + _log_det(tril)


def _log_normalizer(df: Tensor, tril: Tensor) -> Tensor:
    dim = tril.shape[-1]
    return df / 2 * (dim * math.log(2) + _log_det(tril)) + torch.mvlgamma(df / 2, dim)


def _from_mean(half_negative: Tensor, half_log_det: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters from means, ``(-E[Λ]/2, E[log|Λ|]/2) -> (df, scale_tril)``."""
    tril = torch.linalg.cholesky(-2 * half_negative)
    df = wishart_df(_log_det(tril) - 2 * half_log_det, tril.shape[-1])
    return df, tril / df[..., None, None].sqrt()


class Wishart(dist.Wishart):
    """Pyro's Wishart with another sampler: torch's takes regular draws for singular ones, warns of
    each and draws it again."""

    def rsample(
        self, sample_shape: Sequence[int] = (), max_try_correction: int | None = None
    ) -> Tensor:
        """Draw ``sample_shape + batch_shape + (D, D)``, with gradients."""
        # The precision matrix of a NormalWishart is Wishart.
        joint = _as_normal_wishart({"df": self.df, "scale_tril": self.scale_tril})
        return joint.rsample(torch.Size(sample_shape))[..., 1:]


def _as_normal_wishart(params: Params) -> NormalWishart:
    df, tril = params["df"], params["scale_tril"]
    return NormalWishart(
        tril.new_zeros(tril.shape[:-1]), torch.ones_like(df), df, scale_tril=tril,
        validate_args=False,
    )  # fmt: skip


@register_family(torch.distributions.Wishart)
class WishartFamily(Family):
    """Wishart: ``T(Λ) = (-Λ/2, log|Λ|/2)``, ``η = (V⁻¹, df - D - 1)``."""

    distribution = Wishart
    event_dim = 2
    parameters = {"df": 0, "scale_tril": 2}

    def build(self, params: Params, validate_args: bool | None = None) -> Distribution:
        with warnings.catch_warnings():
            # df < D gives a Wishart like any other.
            warnings.filterwarnings("ignore", message="Low df values")
            return Wishart(**params, validate_args=validate_args)

    def event_shape(self, params: Params) -> torch.Size:
        return params["scale_tril"].shape[-2:]

    def statistics(self, value: Tensor) -> Tensor:
        half_log_det = torch.linalg.slogdet(value).logabsdet / 2
        return torch.cat([pack_symmetric(-value / 2), half_log_det.unsqueeze(-1)], -1)

    def natural(self, params: Params) -> Tensor:
        df, tril = params["df"], params["scale_tril"]
        degrees = df - tril.shape[-1] - 1
        return torch.cat([pack_symmetric(torch.cholesky_inverse(tril)), degrees[..., None]], -1)

    def mean(self, params: Params) -> Tensor:
        df, tril = params["df"], params["scale_tril"]
        half_negative = pack_symmetric(tril @ tril.mT) * (-df / 2).unsqueeze(-1)
        half_log_det = _expected_log_det(df, tril) / 2
        return torch.cat([half_negative, half_log_det.unsqueeze(-1)], -1)

    def log_normalizer(self, params: Params) -> Tensor:
        return _log_normalizer(params["df"], params["scale_tril"])

    def from_natural(self, eta: Tensor, event_shape: torch.Size) -> Params:
        dim = event_shape[-1]
        tril = inverse_tril(unpack_symmetric(eta[..., :-1], dim))
        return {"df": eta[..., -1] + dim + 1, "scale_tril": tril}

    def from_mean(self, mu: Tensor, event_shape: torch.Size) -> Params:
        df, tril = _from_mean(unpack_symmetric(mu[..., :-1], event_shape[-1]), mu[..., -1])
        return {"df": df, "scale_tril": tril}

    def kl(self, p: Params, q: Params) -> Tensor:
        # Both get the same Normal part, whose divergence is zero.
        return kl_divergence(_as_normal_wishart(p), _as_normal_wishart(q))


@register_family()
class NormalWishartFamily(Family):
    """NormalWishart: ``T(m, Λ) = (Λm, -mᵀΛm/2, -Λ/2, log|Λ|/2)``,
    ``η = (κ loc, κ, V⁻¹ + κ loc locᵀ, df - D)`` with ``κ = concentration``."""

    distribution = NormalWishart
    event_dim = 2
    parameters = {"loc": 1, "concentration": 0, "df": 0, "scale_tril": 2}
    location = "loc"

    def event_shape(self, params: Params) -> torch.Size:
        dim = params["loc"].shape[-1]
        return torch.Size([dim, dim + 1])

    @staticmethod
    def _join(first: Tensor, second: Tensor, packed: Tensor, last: Tensor) -> Tensor:
        return torch.cat([first, second.unsqueeze(-1), packed, last.unsqueeze(-1)], -1)

    @staticmethod
    def _split(flat: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        matrix = unpack_symmetric(flat[..., dim + 1 : -1], dim)
        return flat[..., :dim], flat[..., dim], matrix, flat[..., -1]

    def statistics(self, value: Tensor) -> Tensor:
        m, precision = value[..., 0], value[..., 1:]
        pm = (precision @ m.unsqueeze(-1)).squeeze(-1)
        half_log_det = torch.linalg.slogdet(precision).logabsdet / 2
        packed = pack_symmetric(-precision / 2)
        return self._join(pm, -(m * pm).sum(-1) / 2, packed, half_log_det)

    def natural(self, params: Params) -> Tensor:
        m, k, df, tril = (params[n] for n in self.parameters)
        km = k.unsqueeze(-1) * m
        precision = torch.cholesky_inverse(tril)
        matrix = torch.addcmul(precision, km.unsqueeze(-1), m.unsqueeze(-2))
        return self._join(km, k, pack_symmetric(matrix), df - m.shape[-1])

    def mean(self, params: Params) -> Tensor:
        m, k, df, tril = (params[n] for n in self.parameters)
        pm = df.unsqueeze(-1) * (tril @ (tril.mT @ m.unsqueeze(-1))).squeeze(-1)
        quadratic = m.shape[-1] / k + (m * pm).sum(-1)
        half_negative = pack_symmetric(tril @ tril.mT) * (-df / 2).unsqueeze(-1)
        return self._join(pm, -quadratic / 2, half_negative, _expected_log_det(df, tril) / 2)

    def log_normalizer(self, params: Params) -> Tensor:
        dim = params["loc"].shape[-1]
        normal = dim / 2 * (math.log(2 * math.pi) - params["concentration"].log())
        return normal + _log_normalizer(params["df"], params["scale_tril"])

    def from_natural(self, eta: Tensor, event_shape: torch.Size) -> Params:
        dim = event_shape[0]
        km, k, matrix, degrees = self._split(eta, dim)
        m = km / k.unsqueeze(-1)
        outer = torch.addcmul(matrix, km.unsqueeze(-1), m.unsqueeze(-2), value=-1)
        return {
            "loc": m,
            "concentration": k,
            "df": degrees + dim,
            "scale_tril": inverse_tril(outer),
        }

    def from_mean(self, mu: Tensor, event_shape: torch.Size) -> Params:
        dim = event_shape[0]
        pm, quadratic, half_negative, half_log_det = self._split(mu, dim)
        df, tril = _from_mean(half_negative, half_log_det)
        root = tril * df[..., None, None].sqrt()
        m = torch.cholesky_solve(pm.unsqueeze(-1), root).squeeze(-1)
        k = dim / (-2 * quadratic - (m * pm).sum(-1))
        return {"loc": m, "concentration": k, "df": df, "scale_tril": tril}

    def center(self, params: Params) -> Tensor:
        # From the centres of the marginals: the mean does not exist for every df.
        tril = params["scale_tril"]
        precision = params["df"][..., None, None] * (tril @ tril.mT)
        return torch.cat([params["loc"].unsqueeze(-1), precision], -1)

    def kl(self, p: Params, q: Params) -> Tensor:
        return kl_divergence(self.build(p, False), self.build(q, False))
