# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Moment matching onto a family: from draws, and from factors whose axes cannot be labelled."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.distributions import transforms as tt

from pyro_fusion.errors import ParameterError, StructureError, UnsupportedFamilyError, warn_user
from pyro_fusion.families.factor import Factor
from pyro_fusion.families.family import Family, family_named

__all__ = [
    "dirichlet_from_stick_breaking",
    "fit",
    "moves_with_location",
    "normal_from_draws",
    "project_draws",
    "project_onto",
    "to_marginals",
]


def project_draws(like: Factor, draws: Tensor) -> Factor:
    """The maximum likelihood fit to ``draws``, ``[n, *shape]``, in the family of ``like`` behind
    its transforms: the member with the mean sufficient statistics of the draws.

    :raises ParameterError: if the draws are too few or do not vary, so that no member fits.
    """
    value = draws.double()
    for t in reversed(like.transforms):
        value = t.inv(value)
    factor = fit(like.family, value, like.transforms, like.batch_dim).to(dtype=draws.dtype)
    factor.check()
    return factor


def moves_with_location(family: Family) -> bool:
    """True if values move as the location does, so that statistics can be taken about any point."""
    name = family.location
    return name is not None and family.parameters[name] == family.event_dim


def fit(family: Family, value: Tensor, transforms: Sequence[Transform], batch_dim: int) -> Factor:
    """The maximum likelihood member of a family, behind ``transforms``, for ``value``,
    ``[n, *base_shape, *event_shape]``, given in the coordinates before the transforms. In float64,
    and not checked."""
    event_shape = value.shape[value.dim() - family.event_dim :]
    origin = None
    if moves_with_location(family):
        # Statistics far from the origin would lose the spread.
        origin = value.mean(0)
        value = value - origin
    params = family.from_mean(family.statistics(value).mean(0), event_shape)
    return Factor(family, params, tuple(transforms), batch_dim).shift(origin, 1.0)


def normal_from_draws(draws: Tensor, transforms: Sequence[Transform], batch_dim: int) -> Factor:
    """A diagonal Normal behind ``transforms`` with the mean and variance of unconstrained
    ``draws``, ``[n, *unconstrained_shape]``.

    :raises ParameterError: if a coordinate does not vary over the draws.
    """
    value = draws.double()
    scale = value.std(0, correction=0)
    if not bool((scale > 0).all()):
        raise ParameterError("the draws do not vary, so they have no spread to match")
    loc = value.mean(0)
    params = {"loc": loc.to(draws.dtype), "scale": scale.to(draws.dtype)}
    return Factor.of(
        replace(Factor(family_named("Normal"), params, tuple(transforms), batch_dim)).distribution(
            validate_args=False
        )
    )


def project_onto(
    prior: Distribution | Factor, like: Factor, num_samples: int = 10_000, seed: int = 0
) -> Factor:
    """``prior`` in the family and coordinates of ``like``: unchanged if it is of that structure
    already, exact from a Normal to a MultivariateNormal, otherwise the member of that family
    with the mean sufficient statistics of ``num_samples`` draws, with a warning.

    :param prior: of the same shape as ``like``.
    :param like: the family and coordinates; its parameters do not matter.
    :param seed: of the draws; the global random state is left as it was.
    :raises StructureError: if the shapes differ.
    :raises ParameterError: if draws lie outside the support of ``like``, or match no member.
    """
    factor: Factor | None
    try:
        factor = prior if isinstance(prior, Factor) else Factor.of(prior)
        shape = factor.shape
    except UnsupportedFamilyError:
        factor, d = None, cast(Distribution, prior)
        shape = d.batch_shape + d.event_shape
    if shape != like.shape:
        raise StructureError(
            f"the prior has shape {tuple(shape)}, the posterior {tuple(like.shape)}"
        )
    if factor is not None:
        exact = _as_joint(factor, like)
        if exact.structure() == like.structure() and exact.base_shape == like.base_shape:
            return replace(exact, batch_dim=like.batch_dim)
        d = factor.distribution()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        draws = d.sample(torch.Size([num_samples])).to(like.device, like.dtype)
    result = project_draws(like, draws)
    name = type(d).__name__ if factor is None else factor.family.name
    target = " → ".join(
        [like.family.name, *(type(t).__name__.removesuffix("Transform") for t in like.transforms)]
    )
    warn_user(
        f"a prior of family {name} is projected onto the posterior's, {target}, by moment matching "
        f"over {num_samples} draws",
    )
    return result


def _as_joint(factor: Factor, like: Factor) -> Factor:
    """``factor`` as a MultivariateNormal in the form of ``like``, if it is a Normal for which that
    is possible; else unchanged."""
    if factor.family.name != "Normal" or like.family.name != "MultivariateNormal":
        return factor
    reshaped = bool(like.transforms) and isinstance(like.transforms[0], tt.ReshapeTransform)
    transforms = (*like.transforms[:1], *factor.transforms) if reshaped else factor.transforms
    size = like.family.event_shape(like.params)
    if factor.base_shape[: len(like.base_shape)] != like.base_shape:
        return factor
    flat = factor.map(lambda v: v.reshape(like.base_shape + size))
    params = {"loc": flat.params["loc"], "scale_tril": torch.diag_embed(flat.params["scale"])}
    return replace(factor, family=like.family, params=params, transforms=transforms)


def to_marginals(factor: Factor) -> tuple[Factor, float]:
    """A MultivariateNormal factor as a product of its scalar marginals, and the loss
    ``KL(joint ‖ product of marginals)`` in nats, the largest over the batch."""
    tril = factor.params["scale_tril"]
    scale = tril.square().sum(-1).sqrt()
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    lost = float((scale.log().sum(-1) - log_det).max())
    params = {"loc": factor.params["loc"], "scale": scale}
    return replace(factor, family=family_named("Normal"), params=params), lost


def _expected_log_sigmoid(loc: Tensor, scale: Tensor) -> Tensor:
    """``E[log σ(u)]``, ``u ~ N(loc, scale²)``, to about 1e-12, whatever the scale.

    Narrow Normals are integrated by Gauss-Hermite quadrature. On the scale of a wide one log σ has
    a kink at the origin: its part ``E[min(u, 0)]`` is taken in closed form, and the rest, that of
    ``log(1 + exp(-|u|))``, by Gauss-Legendre quadrature on either side.
    """

    def rule(nodes_and_weights: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        nodes, weights = nodes_and_weights
        return torch.as_tensor(nodes).to(loc), torch.as_tensor(weights).to(loc)

    x, w = rule(np.polynomial.hermite_e.hermegauss(100))
    narrow = scale.clamp(max=2)
    u = loc.unsqueeze(-1) + narrow.unsqueeze(-1) * x
    by_hermite = F.logsigmoid(u) @ w / math.sqrt(2 * math.pi)
    x, w = rule(np.polynomial.legendre.leggauss(100))
    u, wide = 20 * (x + 1), scale.clamp(min=2)
    z = torch.stack([u, -u]) - loc[..., None, None]
    density = torch.exp(-((z / wide[..., None, None]) ** 2) / 2).sum(-2)
    rest = density @ (20 * w * torch.log1p(torch.exp(-u))) / (wide * math.sqrt(2 * math.pi))
    z = loc / wide
    tail = torch.special.ndtr(-z) * loc
    kink = tail - wide * torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return torch.where(scale <= 2, by_hermite, kink - rest)


def dirichlet_from_stick_breaking(factor: Factor) -> Factor:
    """The Dirichlet with the same ``E[log x]`` as a Normal behind a stick-breaking transform.

    Stick breaking treats the first component unlike the last, so it cannot be permuted; the
    Dirichlet can. With ``x_k = σ(u_k) Π_{j<k} σ(-u_j)``, ``u_j = y_j - log(K - j)``, the moments
    are sums of one-dimensional Gaussian integrals.
    """
    if factor.family.distribution is dist.MultivariateNormal:
        factor, _ = to_marginals(factor)
    loc, scale = factor.params["loc"].double(), factor.params["scale"].double()
    size = loc.shape[-1]
    offset = torch.arange(size, 0, -1, dtype=loc.dtype, device=loc.device).log()
    log_take = _expected_log_sigmoid(loc - offset, scale)
    log_leave = _expected_log_sigmoid(offset - loc, scale)
    left = F.pad(log_leave.cumsum(-1), (1, 0))
    expected_log = F.pad(log_take, (0, 1)) + left
    family = family_named("Dirichlet")
    params = family.from_mean(expected_log, torch.Size([size + 1]))
    params = {k: v.to(factor.dtype) for k, v in params.items()}
    return Factor(family, params, (), factor.batch_dim)


def is_stick_breaking(factor: Factor) -> bool:
    """True if ``factor`` is a Normal (of any covariance) behind one stick-breaking transform."""
    return (
        len(factor.transforms) == 1
        and isinstance(factor.transforms[0], tt.StickBreakingTransform)
        and factor.family.name in ("Normal", "MultivariateNormal")
    )
