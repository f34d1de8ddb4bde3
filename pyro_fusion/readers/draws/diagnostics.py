# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Convergence of chains, and the number of independent draws that they are worth.

Source: Vehtari, Gelman, Simpson, Carpenter, Bürkner, *Rank-normalization, folding, and
localization: An improved R-hat for assessing convergence of MCMC* (Bayesian Analysis 2021),
sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pyro.ops.stats import autocovariance, gelman_rubin
from torch import Tensor

__all__ = ["effective_sample_size", "normal_scores", "split_r_hat"]

# Numbers that are looked at together: bounds the memory.
_BLOCK = 1 << 22


def split_r_hat(draws: Tensor) -> Tensor:
    """Split R-hat of rank-normalised draws and of how far they are from their median, the larger of
    the two: ``[chain, draw, D] -> [D]``, at least four draws in a chain. 1 says that the halves of
    all chains look alike; it is infinite or NaN where a half does not vary."""
    return _by_block(draws, _r_hat)


def effective_sample_size(draws: Tensor) -> Tensor:
    """The number of independent draws that would tell as much of the mean of the
    rank-normalised draws ("bulk ESS"), from halves of all chains: ``[chain, draw, D] -> [D]``."""
    return _by_block(draws, _ess)


def _by_block(draws: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    chains, n, _ = draws.shape
    return torch.cat([fn(_halves(x)) for x in draws.split(max(1, _BLOCK // (chains * n)), -1)])


def _halves(x: Tensor) -> Tensor:
    """Each chain as two, without the middle draw of an odd number:
    ``[C, N, D] -> [2C, N/2, D]``."""
    half = x.shape[1] // 2
    return torch.cat([x[:, :half], x[:, -half:]]).double()


def _r_hat(x: Tensor) -> Tensor:
    far = (x - x.flatten(0, 1).quantile(0.5, 0)).abs()
    bulk, tail = (gelman_rubin(_scores(y)) for y in (x, far))
    return torch.maximum(bulk, tail)


def _ess(x: Tensor) -> Tensor:
    """Effective sample size by Geyer's initial monotone sequence.

    ``pyro.ops.stats.effective_sample_size`` takes memory that grows with the square of the number
    of draws, and autocovariances that are noisy at long lags; here they are those of the paper,
    sums over ``n``."""
    z = _scores(x)
    chains, n, _ = z.shape
    within = z.var(1).mean(0)
    total = (n - 1) / n * within + z.mean(1).var(0)
    lags = torch.arange(n, dtype=z.dtype, device=z.device).unsqueeze(1)
    covariance = autocovariance(z, 1).mean(0) * (1 - lags / n)
    rho = 1 - (within - covariance) / total
    rho[0] = 1
    pairs = rho[: n - n % 2].unflatten(0, (-1, 2)).sum(1)
    over = pairs <= 0
    over[0] = False
    # Of antithetic chains the even lag at which the sequence ends is not noise (as in Stan).
    end = over.double().argmax(0, keepdim=True)
    last = torch.where(over.any(0), rho.gather(0, 2 * end).squeeze(0).clamp(min=0), 0.0)
    pairs[1:] = pairs[1:].clamp(min=0).cummin(0).values
    tau: Tensor = -1 + 2 * pairs.sum(0) + last
    total_draws = chains * n
    return total_draws / tau.clamp(min=1 / math.log10(total_draws))


def _scores(x: Tensor) -> Tensor:
    return normal_scores(x.flatten(0, 1)).reshape(x.shape)


def normal_scores(x: Tensor) -> Tensor:
    """Normal quantiles of the ranks along the first axis, ties at their mean rank (eq. 14):
    ``[n, D] -> [n, D]``, float64."""
    flat = x.T.contiguous()
    ordered = flat.sort(-1).values
    below = torch.searchsorted(ordered, flat)
    upto = torch.searchsorted(ordered, flat, right=True)
    rank = (below + upto + 1).double() / 2
    return torch.special.ndtri((rank - 0.375) / (len(x) + 0.25)).T
