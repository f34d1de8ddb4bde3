# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""The loss of a projection: an estimate of ``KL(draws ‖ factor)``.

Draws are mapped to what would be independent standard Normals under the factor (Rosenblatt's
transform), :math:`z`. KL does not change under a bijection, so

.. math:: KL(p \| q) = \sum_i KL(p_{z_i} \| N(0, 1)) + KL(p_z \| \prod_i p_{z_i}).

The first terms are estimated from m-spacings, ``m = √n``: without bias where the factor is right,
and low elsewhere, as the density is averaged over m draws: a little for most shapes, and much for
tails heavier than the factor's, which are in the outermost m. The last is that of the
Gaussian copula, :math:`-\frac{1}{2} \log \det R` with ``R`` the correlations of the normal scores,
less what it is on average for independent draws: a lower bound, exact for Gaussian dependence.

Source: Rosenblatt, *Remarks on a Multivariate Transformation* (1952); Vasicek, *A Test for
Normality Based on Sample Entropy* (JRSS B 1976), with the exact mean of the logarithm of uniform
spacings; Bartlett's decomposition for the mean of ``log det R``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_fusion.families import Factor
from pyro_fusion.families.family import Params
from pyro_fusion.posterior import Posterior
from pyro_fusion.readers.draws.diagnostics import normal_scores
from pyro_fusion.readers.draws.site_draws import SiteDraws

__all__ = ["dependence", "losses", "marginal_losses", "standard_normals"]

# So many draws for each number are needed to look for correlations.
_DRAWS_PER_NUMBER = 4
# Fewer effective draws tell nothing of a density.
_FEWEST = 20
# Standard deviations: beyond, the probability is no number.
_FARTHEST = 37.5


# -- draws that would be standard Normals ----------------------------------------------------------


def standard_normals(factor: Factor, draws: Tensor) -> Tensor | None:
    """The draws, mapped to independent standard Normals if they are of the factor: ``[n, *shape] ->
    [n, *batch_shape, P]``, float64. None for a family whose map is not known here."""
    if factor.family.name not in _ROSENBLATT:
        return None
    value = draws.double()
    for t in reversed(factor.transforms):
        value = t.inv(value)
    params = {k: v.double() for k, v in factor.params.items()}
    z = _ROSENBLATT[factor.family.name](value, params)
    return z.flatten(1 + factor.batch_dim) if z.dim() > 1 + factor.batch_dim else z.unsqueeze(-1)


def _normal(value: Tensor, params: Params) -> Tensor:
    return (value - params["loc"]) / params["scale"]


def _multivariate_normal(value: Tensor, params: Params) -> Tensor:
    centred = (value - params["loc"]).unsqueeze(-1)
    return torch.linalg.solve_triangular(params["scale_tril"], centred, upper=False).squeeze(-1)


def _gamma(value: Tensor, params: Params) -> Tensor:
    import scipy.special as sp  # slow to import: only when needed

    c = params["concentration"] if "concentration" in params else torch.ones(())
    return _from_tails(value * params["rate"], sp.gammainc, sp.gammaincc, c)


def _beta(value: Tensor, params: Params) -> Tensor:
    return _from_beta(value, 1 - value, params["concentration1"], params["concentration0"])


def _from_beta(value: Tensor, rest: Tensor, a: Tensor, b: Tensor) -> Tensor:
    import scipy.special as sp

    # P(X > x) is P(1 - X < 1 - x), and so keeps its digits.
    return _from_tails(
        torch.stack([value, rest], -1),
        lambda a, b, x: sp.betainc(a, b, x[..., 0]),
        lambda a, b, x: sp.betainc(b, a, x[..., 1]),
        a,
        b,
    )


def _dirichlet(value: Tensor, params: Params) -> Tensor:
    # The shares of what is left, each a Beta; the last takes all.
    alpha = params["concentration"]
    left, more = (x.flip(-1).cumsum(-1).flip(-1)[..., 1:] for x in (value, alpha))
    total = value[..., :-1] + left
    return _from_beta(value[..., :-1] / total, left / total, alpha[..., :-1], more)


def _from_tails(
    value: Tensor, lower: Callable[..., Any], upper: Callable[..., Any], *params: Tensor
) -> Tensor:
    """The Normal quantiles of two tail probabilities, of which the smaller has digits."""
    import scipy.special as sp

    arrays = [p.cpu().numpy() for p in params]
    below, above = (sp.ndtri(tail(*arrays, value.cpu().numpy())) for tail in (lower, upper))
    z = torch.as_tensor(below)
    return torch.where(z < 0, z, -torch.as_tensor(above)).to(value.device)


_ROSENBLATT: dict[str, Callable[[Tensor, Params], Tensor]] = {
    "Normal": _normal,
    "MultivariateNormal": _multivariate_normal,
    "Gamma": _gamma,
    "Exponential": _gamma,
    "Beta": _beta,
    "Dirichlet": _dirichlet,
}


# -- how far they are from that --------------------------------------------------------------------


def marginal_losses(z: Tensor) -> Tensor:
    """``KL(p_{z_i} ‖ N(0, 1))`` of each number, in nats: ``[n, D] -> [D]``. May be slightly
    negative: it errs to either side."""
    n = len(z)
    m = max(1, round(math.sqrt(n)))
    end = z.new_full((1, z.shape[1]), math.inf)
    ordered = z.clamp(-_FARTHEST, _FARTHEST).sort(0).values
    tied = (ordered[1:] == ordered[:-1]).any(0)
    for i in tied.nonzero().flatten().tolist():
        ordered[:, i] = _untied(ordered[:, i])
    ordered = torch.cat([-end, ordered, end])
    a, b = ordered[:-m], ordered[m:]
    # The probability of the gap under N(0, 1), by the tail in which it has digits.
    ndtr = torch.special.ndtr
    gap = torch.where(a + b > 0, ndtr(-a) - ndtr(-b), ndtr(b) - ndtr(a))
    gap = gap.clamp(min=torch.finfo(gap.dtype).tiny)
    expected = torch.digamma(gap.new_tensor(float(m))) - torch.digamma(gap.new_tensor(n + 1.0))
    return expected - gap.log().mean(0)


def _untied(ordered: Tensor) -> Tensor:
    """Sorted numbers, with equal ones spread out between their neighbours: they come from rounding
    or from proposals that a sampler refused, and are no sign of an unbounded density."""
    distinct, counts = ordered.unique_consecutive(return_counts=True)
    if len(distinct) == 1:
        return ordered
    rank = torch.arange(len(ordered), dtype=ordered.dtype, device=ordered.device)
    mean_rank = counts.cumsum(0) - (counts + 1) / 2
    right = torch.searchsorted(mean_rank.to(rank), rank).clamp(1, len(distinct) - 1)
    left = right - 1
    share = (rank - mean_rank[left]) / (mean_rank[right] - mean_rank[left])
    return torch.lerp(distinct[left], distinct[right], share.to(ordered))


def dependence(z: Tensor) -> Tensor:
    """``KL(p_z ‖ Π_i p_{z_i})`` of a Gaussian copula, in nats, over the last axis: ``[n, *batch, D]
    -> [*batch]``; zero where there are fewer than four draws for each of the ``D`` numbers, too few
    to say. May be slightly negative."""
    n, size = len(z), z.shape[-1]
    zero = z.new_zeros(z.shape[1:-1])
    if size == 1 or n < _DRAWS_PER_NUMBER * size:
        return zero
    scores = normal_scores(z.reshape(n, -1)).reshape(z.shape).movedim(0, -2)
    # Numbers that thinning left constant depend on nothing.
    length = scores.square().sum(-2, keepdim=True).sqrt().clamp(min=torch.finfo(z.dtype).tiny)
    correlation = (scores / length).mT @ (scores / length)
    correlation.diagonal(dim1=-2, dim2=-1).fill_(1)
    log_det = torch.linalg.slogdet(correlation).logabsdet
    i = torch.arange(2, size + 1, dtype=z.dtype, device=z.device)
    expected = (torch.digamma((n - i) / 2) - torch.digamma((z.new_tensor(n) - 1) / 2)).sum()
    return (expected - log_det) / 2


# -- of a posterior --------------------------------------------------------------------------------


def losses(
    posterior: Posterior, found: Mapping[str, SiteDraws], ess: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    """The loss of each site, and that between them, in nats. Draws are thinned to their effective
    number, ``ess``; NaN where that is less than 20."""
    lost: dict[str, float] = {}
    every: list[Tensor] = []
    within = 0.0
    least = min(ess.values())
    for name, s in found.items():
        z = standard_normals(posterior.decomposed[name], s.value)
        if z is None or ess[name] < _FEWEST:
            lost[name] = math.nan
            continue
        few = _thinned(z, s.chains, ess[name])
        flat = few.flatten(1)
        joint = (
            dependence(flat)
            if len(flat) >= _DRAWS_PER_NUMBER * flat.shape[1]
            else dependence(few).sum()
        )
        lost[name] = max(0.0, float(marginal_losses(flat).sum() + joint))
        if least >= _FEWEST:
            every.append(_thinned(z, s.chains, least).flatten(1))
            within += float(dependence(every[-1]))
    if least < _FEWEST:
        return lost, math.nan
    together = torch.cat(every, 1) if len(every) > 1 else None
    between = 0.0 if together is None else float(dependence(together)) - within
    return lost, max(0.0, between)


def _thinned(z: Tensor, chains: int, ess: float) -> Tensor:
    """Draws at even steps of each chain, about ``ess`` in all."""
    step = max(1, math.ceil(len(z) / max(ess, 1.0)))
    return z.unflatten(0, (chains, -1))[:, ::step].flatten(0, 1)
