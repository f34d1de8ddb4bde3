# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Moment matching onto a family: from draws, and from factors whose axes cannot be labelled."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Transform
from torch.distributions import transforms as tt

from pyro_fusion.errors import ParameterError
from pyro_fusion.families.base import family_named
from pyro_fusion.families.factor import Factor

__all__ = ["dirichlet_from_stick_breaking", "normal_from_draws", "project_draws", "to_marginals"]


def project_draws(like: Factor, draws: Tensor) -> Factor:
    """The member of ``like``'s family (behind its transforms) with the mean sufficient statistics
    of ``draws``, which is the maximum likelihood fit: ``[n, *shape] -> `` a factor.

    :raises ParameterError: if the draws are too few or do not vary, so that no member fits.
    """
    value = draws.double()
    for t in reversed(like.transforms):
        value = t.inv(value)
    statistics = like.family.statistics(value).mean(0)
    params = like.family.from_mean(statistics, like.family.event_shape(like.params))
    factor = replace(like, params={k: v.to(draws.dtype) for k, v in params.items()})
    factor.check()
    return factor


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
    return Factor.of(replace(
        Factor(family_named("Normal"), params, tuple(transforms), batch_dim)
    ).distribution(validate_args=False))


def to_marginals(factor: Factor) -> tuple[Factor, float]:
    """A MultivariateNormal factor as a product of its scalar marginals, and what that loses:
    ``KL(joint ‖ product of marginals)`` in nats, the largest over the batch."""
    tril = factor.params["scale_tril"]
    scale = tril.square().sum(-1).sqrt()
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    lost = float((scale.log().sum(-1) - log_det).max())
    params = {"loc": factor.params["loc"], "scale": scale}
    return replace(factor, family=family_named("Normal"), params=params), lost


def dirichlet_from_stick_breaking(factor: Factor) -> Factor:
    """The Dirichlet with the same ``E[log x]`` as a Normal behind a stick-breaking transform.

    Stick breaking treats the first component unlike the last, so it cannot be permuted; the
    Dirichlet can. With ``x_k = σ(u_k) Π_{j<k} σ(-u_j)``, ``u_j = y_j - log(K - j)``, the moments
    are sums of one-dimensional Gaussian integrals (Gauss-Hermite, exact to about 1e-10).
    """
    if factor.family.distribution is dist.MultivariateNormal:
        factor, _ = to_marginals(factor)
    loc, scale = factor.params["loc"].double(), factor.params["scale"].double()
    size = loc.shape[-1]
    offset = torch.arange(size, 0, -1, dtype=loc.dtype, device=loc.device).log()
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    x = torch.as_tensor(nodes, device=loc.device)
    w = torch.as_tensor(weights / math.sqrt(2 * math.pi), device=loc.device)
    u = (loc - offset).unsqueeze(-1) + scale.unsqueeze(-1) * x
    log_take, log_leave = (F.logsigmoid(u) @ w), (F.logsigmoid(-u) @ w)
    left = F.pad(log_leave.cumsum(-1), (1, 0))
    expected_log = F.pad(log_take, (0, 1)) + left
    family = family_named("Dirichlet")
    params = family.from_mean(expected_log, torch.Size([size + 1]))
    params = {k: v.to(factor.dtype) for k, v in params.items()}
    return Factor(family, params, (), factor.batch_dim)


def is_stick_breaking(factor: Factor) -> bool:
    """Whether ``factor`` is a Normal (of any covariance) behind one stick-breaking transform."""
    return (
        len(factor.transforms) == 1
        and isinstance(factor.transforms[0], tt.StickBreakingTransform)
        and factor.family.name in ("Normal", "MultivariateNormal")
    )
