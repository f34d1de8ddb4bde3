# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The NormalWishart distribution, its support and its KL divergence."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Gamma, biject_to, constraints, register_kl, transform_to
from torch.distributions.transforms import Transform
from torch.distributions.utils import lazy_property

from pyro_fusion.errors import broadcast_shapes
from pyro_fusion.families.special import excess, log_near_one, stirling_kl

__all__ = ["NormalWishart"]

_LOG_PI = math.log(math.pi)
_LOG_2PI = math.log(2 * math.pi)


class _MeanAndPrecisionMatrix(constraints.Constraint):
    """Constraint: ``[..., D, D + 1]``, a finite mean, then a symmetric positive definite matrix."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        mean, precision = value[..., 0], value[..., 1:]
        # Relative to the diagonal, so that the units of the data do not matter.
        root = precision.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        allowed = 1e3 * torch.finfo(value.dtype).eps * root.unsqueeze(-1) * root.unsqueeze(-2)
        symmetric = ((precision - precision.mT).abs() <= allowed).flatten(-2).all(-1)
        finite = mean.isfinite().all(-1) & precision.isfinite().flatten(-2).all(-1)
        return finite & symmetric & (torch.linalg.cholesky_ex(precision).info == 0)


class _ToMeanAndPrecisionMatrix(Transform):
    """Transform of ``D + D(D+1)/2`` reals (mean, log diagonal of C, rest of C by rows) to a mean
    and ``Λ = C Cᵀ``."""

    domain = constraints.real_vector
    codomain = _MeanAndPrecisionMatrix()
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ToMeanAndPrecisionMatrix)

    def _call(self, x: Tensor) -> Tensor:
        dim = self.forward_shape(x.shape)[-2]
        mean, log_diagonal, lower = x.split([dim, dim, x.shape[-1] - 2 * dim], dim=-1)
        chol = log_diagonal.exp().diag_embed()
        i, j = torch.tril_indices(dim, dim, offset=-1, device=x.device)
        chol[..., i, j] = lower
        return _join(mean, chol @ chol.mT)

    def _inverse(self, y: Tensor) -> Tensor:
        chol = torch.linalg.cholesky(y[..., 1:])
        i, j = torch.tril_indices(y.shape[-2], y.shape[-2], offset=-1, device=y.device)
        log_diagonal = chol.diagonal(dim1=-2, dim2=-1).log()
        return torch.cat([y[..., 0], log_diagonal, chol[..., i, j]], dim=-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        dim = y.shape[-2]
        weights = torch.arange(dim + 1, 1, -1, dtype=x.dtype, device=x.device)
        return dim * math.log(2) + (weights * x[..., dim : 2 * dim]).sum(-1)

    def forward_shape(self, shape: Size) -> Size:
        dim = (math.isqrt(9 + 8 * shape[-1]) - 3) // 2
        if dim < 1 or dim * (dim + 3) // 2 != shape[-1]:
            raise ValueError(f"x: expected D(D+3)/2 entries for an integer D, got {shape[-1]}")
        return Size((*shape[:-1], dim, dim + 1))

    def inverse_shape(self, shape: Size) -> Size:
        return Size((*shape[:-2], shape[-2] * (shape[-2] + 3) // 2))


@biject_to.register(_MeanAndPrecisionMatrix)
@transform_to.register(_MeanAndPrecisionMatrix)
def _(constraint: _MeanAndPrecisionMatrix) -> Transform:
    return _ToMeanAndPrecisionMatrix()


class NormalWishart(TorchDistribution):
    r"""``Λ ~ Wishart(df, V)``, ``μ | Λ ~ N(loc, (concentration · Λ)⁻¹)``; the value is ``[μ, Λ]``.

    Value: event shape ``(D, D + 1)``; column 0 is the mean μ, columns ``1:`` the precision
    matrix Λ. The density is with respect to Lebesgue measure on μ and on the lower triangle
    of Λ, as in :class:`torch.distributions.Wishart`. Marginally μ is Student t with
    ``df - D + 1`` degrees of freedom, so for small ``df`` its mean is NaN or its variance
    infinite, as in :class:`torch.distributions.StudentT`.

    Batch shapes of the parameters broadcast. Exactly one of the last three matrices is given.

    :param loc: mean of μ, shape ``(..., D)``.
    :param concentration: pseudo-count of the mean, positive, shape ``(...)``.
    :param df: degrees of freedom, above ``D - 1``, shape ``(...)``.
    :param covariance_matrix: ``V``, shape ``(..., D, D)``; ``E[Λ] = df · V``.
    :param precision_matrix: ``V⁻¹``.
    :param scale_tril: lower Cholesky factor of ``V``.
    :raises ValueError: not exactly one matrix, shapes that do not fit or, under validation,
        values outside ``arg_constraints``.

    Source: Murphy, *Conjugate Bayesian analysis of the Gaussian distribution* (2007), sec. 8.
    """

    support = _MeanAndPrecisionMatrix()
    has_rsample = True

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        return {
            "loc": constraints.real_vector,
            "concentration": constraints.positive,
            "df": constraints.greater_than(self.event_shape[-2] - 1),
            "covariance_matrix": constraints.positive_definite,
            "precision_matrix": constraints.positive_definite,
            "scale_tril": constraints.lower_cholesky,
        }

    def __init__(
        self,
        loc: Tensor,
        concentration: Tensor | float,
        df: Tensor | float,
        covariance_matrix: Tensor | None = None,
        precision_matrix: Tensor | None = None,
        scale_tril: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        matrices = {
            "covariance_matrix": covariance_matrix,
            "precision_matrix": precision_matrix,
            "scale_tril": scale_tril,
        }
        given = {name: matrix for name, matrix in matrices.items() if matrix is not None}
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {list(matrices)}, got {list(given) or None}")
        ((name, matrix),) = given.items()
        if loc.dim() < 1:
            raise ValueError("loc: expected shape (..., D), got a scalar")
        event_shape = Size((loc.shape[-1], loc.shape[-1] + 1))
        if matrix.dim() < 2 or matrix.shape[-2:] != (loc.shape[-1], loc.shape[-1]):
            raise ValueError(
                f"{name}: expected shape (..., D, D) with D = {loc.shape[-1]} as in loc, "
                f"got {tuple(matrix.shape)}"
            )
        concentration = torch.as_tensor(concentration, dtype=loc.dtype, device=loc.device)
        df = torch.as_tensor(df, dtype=loc.dtype, device=loc.device)
        batch_shape = broadcast_shapes(
            {"loc": loc.shape[:-1], "concentration": concentration.shape}
            | {"df": df.shape, name: matrix.shape[:-2]}
        )
        self.loc = loc.expand(batch_shape + event_shape[:1])
        self.concentration = concentration.expand(batch_shape)
        self.df = df.expand(batch_shape)
        setattr(self, name, matrix.expand(*batch_shape, -1, -1))
        super().__init__(batch_shape, event_shape, validate_args=validate_args)
        self._tril = _scale_tril(name, matrix).expand(*batch_shape, -1, -1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalWishart:
        """Expand the batch shape, as :meth:`torch.distributions.Distribution.expand` does."""
        new = self._get_checked_instance(NormalWishart, _instance)
        batch_shape = Size(batch_shape)
        new.loc = self.loc.expand(*batch_shape, -1)
        new.concentration = self.concentration.expand(batch_shape)
        new.df = self.df.expand(batch_shape)
        for name in ("_tril", "covariance_matrix", "precision_matrix", "scale_tril"):
            if name in self.__dict__:
                setattr(new, name, self.__dict__[name].expand(*batch_shape, -1, -1))
        super(NormalWishart, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @lazy_property
    def scale_tril(self) -> Tensor:
        """Lower Cholesky factor of V, shape ``(..., D, D)``."""
        return self._tril

    @lazy_property
    def covariance_matrix(self) -> Tensor:
        """The scale matrix ``V = E[Λ] / df``, shape ``(..., D, D)``."""
        return self._tril @ self._tril.mT

    @lazy_property
    def precision_matrix(self) -> Tensor:
        """The inverse ``V⁻¹`` of the scale matrix, shape ``(..., D, D)``."""
        eye = torch.eye(self.loc.shape[-1], dtype=self._tril.dtype, device=self._tril.device)
        return torch.cholesky_solve(eye, self._tril)

    @property
    def mean(self) -> Tensor:
        """The mean ``[loc, df · V]``; NaN in column 0 where ``df <= D``."""
        loc = self.loc.masked_fill((self.df <= self.loc.shape[-1]).unsqueeze(-1), math.nan)
        return _join(loc, self.df[..., None, None] * self.covariance_matrix)

    @property
    def variance(self) -> Tensor:
        """Entrywise variances. Column 0 is infinite where ``D < df <= D + 1``, NaN below."""
        excess = (self.df - self.loc.shape[-1] - 1).unsqueeze(-1)
        diagonal = self.precision_matrix.diagonal(dim1=-2, dim2=-1)
        of_mean = diagonal / (self.concentration.unsqueeze(-1) * excess.clamp(min=0))
        of_mean = of_mean.masked_fill(excess <= -1, math.nan)
        diagonal = self.covariance_matrix.diagonal(dim1=-2, dim2=-1)
        squares = self.covariance_matrix.square() + diagonal.unsqueeze(-1) * diagonal.unsqueeze(-2)
        return _join(of_mean, self.df[..., None, None] * squares)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw ``[μ, Λ]``, shape ``sample_shape + batch_shape + (D, D + 1)``, with gradients."""
        shape = Size(sample_shape) + self.batch_shape
        chol = _bartlett(self.df, self._tril, shape)
        noise = torch.randn(shape + self.loc.shape[-1:], dtype=chol.dtype, device=chol.device)
        # Cov[Λ^(-1/2) noise] = Λ⁻¹ for Λ = C Cᵀ and Λ^(-1/2) = C⁻ᵀ.
        offset = torch.linalg.solve_triangular(chol.mT, noise.unsqueeze(-1), upper=True)
        mean = self.loc + offset.squeeze(-1) * self.concentration.rsqrt().unsqueeze(-1)
        return _join(mean, chol @ chol.mT)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of ``[μ, Λ]``, shape ``(...)`` for value ``(..., D, D + 1)``."""
        if self._validate_args:
            self._validate_sample(value)
        dim = self.loc.shape[-1]
        offset, precision = value[..., 0] - self.loc, value[..., 1:]
        distance = (precision * offset.unsqueeze(-1) * offset.unsqueeze(-2)).sum((-2, -1))
        trace = torch.cholesky_solve(precision, self._tril).diagonal(dim1=-2, dim2=-1).sum(-1)
        log_det = torch.linalg.slogdet(precision).logabsdet
        normal = dim / 2 * (self.concentration.log() - _LOG_2PI) + log_det / 2
        wishart = (self.df - dim - 1) / 2 * log_det - trace / 2 - self._log_normalizer_of_wishart()
        return normal - self.concentration * distance / 2 + wishart

    def entropy(self) -> Tensor:
        """Differential entropy ``E[-log p(μ, Λ)]``, shape ``(...)``."""
        dim = self.loc.shape[-1]
        log_det = _half_df(self.df, dim).digamma().sum(-1) + dim * math.log(2) + self._log_det()
        normal = dim / 2 * (1 + _LOG_2PI - self.concentration.log()) - log_det / 2
        wishart = self.df * dim / 2 - (self.df - dim - 1) / 2 * log_det
        return normal + wishart + self._log_normalizer_of_wishart()

    def _log_det(self) -> Tensor:
        return 2 * self._tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _log_normalizer_of_wishart(self) -> Tensor:
        dim = self.loc.shape[-1]
        log_gamma = _half_df(self.df, dim).lgamma().sum(-1) + dim * (dim - 1) / 4 * _LOG_PI
        return self.df / 2 * (dim * math.log(2) + self._log_det()) + log_gamma


@register_kl(NormalWishart, NormalWishart)
def _kl_normal_wishart(p: NormalWishart, q: NormalWishart) -> Tensor:
    """KL divergence ``E_p[KL(N ‖ N) | Λ] + KL(Wishart ‖ Wishart)``, broadcast over batch shapes."""
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"q: expected event shape {tuple(p.event_shape)} as p, got {tuple(q.event_shape)}"
        )
    offset = (p._tril.mT @ (p.loc - q.loc).unsqueeze(-1)).squeeze(-1)
    distance = q.concentration * p.df * offset.square().sum(-1)
    spread = p.loc.shape[-1] * excess(q.concentration, p.concentration)
    return (spread + distance) / 2 + _kl_wishart(p.df, p._tril, q.df, q._tril)


def _kl_wishart(p_df: Tensor, p_tril: Tensor, q_df: Tensor, q_tril: Tensor) -> Tensor:
    r"""KL divergence of Wisharts, split at the Wishart with the mean of p and the df of q.

    ``df_q/2 (tr R - D - log|R|) + KL(same mean)``, ``R = (df_q V_q)⁻¹ (df_p V_p)``. Each part
    is small where p and q are near, whereas the textbook's terms grow with df and cancel.
    """
    ratio = torch.linalg.solve_triangular(q_tril, p_tril, upper=False)
    below = ratio.tril(-1).square().sum((-2, -1)) * p_df / q_df
    p_var = p_tril.diagonal(dim1=-2, dim2=-1).square() * p_df.unsqueeze(-1)
    q_var = q_tril.diagonal(dim1=-2, dim2=-1).square() * q_df.unsqueeze(-1)
    different_mean = q_df / 2 * (below + excess(p_var, q_var).sum(-1))
    # Rounding alone can make it negative, where the two are almost the same.
    return (different_mean + _kl_same_mean(p_df, q_df, p_tril.shape[-1])).clamp(min=0)


def _kl_same_mean(p_df: Tensor, q_df: Tensor, dim: int) -> Tensor:
    """KL divergence of Wisharts of equal mean; with ``dim = 1``, Gammas of shapes ``df / 2``.

    With Stirling's ``log Γ(x) = (x - 1/2) log x - x + log(2π)/2 + r(x)`` the leading terms
    cancel analytically, so that large df costs no digits.
    """
    p_df, q_df = torch.broadcast_tensors(p_df, q_df)
    half = torch.arange(dim, dtype=p_df.dtype, device=p_df.device) / 2
    a, b, gap = _half_df(p_df, dim), _half_df(q_df, dim), ((q_df - p_df) / 2).unsqueeze(-1)
    terms = stirling_kl(a, b)
    # b_i log(b_i/a_i) - b_0 log(b_0/a_0), rearranged into terms of order i, not of order df.
    p_half, q_half = p_df.unsqueeze(-1) / 2, q_df.unsqueeze(-1) / 2
    terms = terms + b * log_near_one(b * p_half / (a * q_half), half * gap / (a * q_half))
    return (terms - half * log_near_one(q_half / p_half, gap / p_half)).sum(-1)


def _half_df(df: Tensor, dim: int) -> Tensor:
    """Shapes of the Gammas in a Wishart, ``(df - i) / 2`` for i < dim, shape ``(..., D)``."""
    return (df.unsqueeze(-1) - torch.arange(dim, dtype=df.dtype, device=df.device)) / 2


def _bartlett(df: Tensor, scale_tril: Tensor, shape: Size) -> Tensor:
    """Cholesky factor of a Wishart draw, ``shape + (D, D)``, never numerically singular.

    Bartlett: ``L A`` with ``A_ii² ~ Chi2(df - i)`` and standard normals below. (torch's
    ``Wishart.rsample`` takes regular draws for singular ones, warns and draws them again.)
    """
    dim = scale_tril.shape[-1]
    chi2 = Gamma(_half_df(df, dim).expand(*shape, dim), df.new_tensor(0.5), validate_args=False)
    noise = torch.randn(*shape, dim, dim, dtype=scale_tril.dtype, device=scale_tril.device)
    chol = scale_tril @ (noise.tril(-1) + chi2.rsample().sqrt().diag_embed())
    # For df near D - 1 a diagonal entry may vanish beside its row: Λ would not have full rank
    # in this dtype. Such entries are lifted to the least share of their row that has.
    diagonal, info = chol.diagonal(dim1=-2, dim2=-1), torch.finfo(chol.dtype)
    row = torch.linalg.vector_norm(chol.detach(), dim=-1)
    share = torch.full(shape, 8 * dim * info.eps, dtype=chol.dtype, device=chol.device)
    for _ in range(14):  # the last share is above 1, which has full rank
        floor = (share.sqrt().unsqueeze(-1) * row).clamp(min=info.tiny**0.5)
        lifted = chol + (floor - diagonal).clamp(min=0).diag_embed()
        singular = torch.linalg.cholesky_ex((lifted @ lifted.mT).detach()).info != 0
        if not singular.any():
            break
        share = torch.where(singular, 16 * share, share)
    return lifted


def _scale_tril(name: str, matrix: Tensor) -> Tensor:
    """Cholesky factor of V, from the argument ``name``: V, its inverse, or the factor itself."""
    if name == "scale_tril":
        return matrix
    if name == "covariance_matrix":
        return torch.linalg.cholesky(matrix)
    # From J V⁻¹ J = C Cᵀ, J reversing the order, V = (J C⁻ᵀ J)(J C⁻ᵀ J)ᵀ, lower triangular.
    reverse = torch.linalg.cholesky(matrix.flip(-2, -1)).flip(-2, -1).mT
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(reverse, eye, upper=False)


def _join(mean: Tensor, precision: Tensor) -> Tensor:
    """``[μ, Λ]`` as one tensor, shape ``(..., D, D + 1)``."""
    return torch.cat([mean.unsqueeze(-1), precision], dim=-1)
