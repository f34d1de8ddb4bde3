# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The dispersion ``T``: how many nats apart two local posteriors may be and still mean the same.

Local posteriors are overconfident (mean field, real differences between parties), so divergences
at face value would split every component. The scale is read off the posteriors themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pyro_fusion.assignment.problem import party_of
from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor, pairwise_kl
from pyro_fusion.pooling.base import FAR, Pooling
from pyro_fusion.pooling.kl import Exclusive
from pyro_fusion.pooling.product import Product, temper

__all__ = ["estimate_dispersion", "pairwise_spread"]

# Quantiles need no more than this; all pairs would be quadratic in the number of parties. Of large
# components (topics of many words) there are fewer: so many numbers in the atoms of all pairs.
_MAX_PARTIES = 64
_MAX_PAIRS = 6000
_MAX_NUMBERS = 1 << 24

# The quantile of merges within a party that counts. Pairs, of the cheapest and of one party, that
# tell what evidence there is for a merge.
_WRONG = 0.75
_MAX_EVIDENCE = 200
_BISECTIONS = 12

_BULK, _TAIL = 1.36, 5.5
# `GroupNormPrior` asks one T of two lone components that share an atom, and up to 1.7 of one that
# joins a popular atom. Prices in other units are translated at the middle of that.
_MIDDLE = (2 - 2**0.5) ** -0.5


def estimate_dispersion(
    local: Mapping[str, Factor],
    sizes: tuple[int, ...],
    pooling: Pooling,
    prior: Mapping[str, Factor] | None = None,
) -> float:
    """An estimate of T from the components of all parties.

    It weighs two prices of a merge, ``min_q KL(q ‖ i) + KL(q ‖ j)``, against each other. That of a
    wrong one: with the nearest other component of the same party, which is known to be a different
    atom; the upper quartile over components, since a fit that gave one atom two components has a
    low price there. And that of a right one: with the nearest component of any other party; the
    median, since some components have no counterpart. The limit is ``1.36 + 5.5 √(2 / D)`` times
    their geometric mean: prices are sums over ``D`` dimensions, and the fewer these are, the longer
    the tail of what is still the same.

    - ``exclusive``: T is the limit.
    - ``inclusive``: what a merge at the limit costs there, ``min_q KL(i ‖ q) + KL(j ‖ q)``, which
      grows with the logarithm of the distance only. Any other pooling likewise.
    - ``product``: T is such that a merge at the limit breaks even, what it costs over T against the
      evidence for the simpler model; at least 1. It is no larger than where a wrong merge, at the
      upper quartile, breaks even by its own evidence, which limits T where parties have little in
      common: a right merge costs hardly less there than a wrong one.

    Where no party has two components, so that nothing is known to be different, the limit is two
    nats per dimension.

    The factors and the quantiles were chosen on the mixtures of ``benchmarks/simulation.py``, with
    other seeds, and where there are many dimensions on one seed of ``benchmarks/networks.py``. They
    are the same for all separations, sizes and poolings.

    :param local: site -> factor of batch shape ``[N]``, the components of the parties in turn.
    :param sizes: ``L_s`` of each party; at least two parties.
    :param prior: site -> the prior of one atom, batch shape ``[1]``, for ``product``.
    """
    part, counts, divergence = _pairwise(local, sizes)
    own = party_of(counts)
    is_own = own.unsqueeze(1) == torch.arange(len(counts))
    dimensions = sum(f.dimensions for f in part.values())
    # The nearest component in each party, [N, S]; in one's own, of the others.
    symmetric = (divergence + divergence.mT).fill_diagonal_(torch.inf)
    blocks = [block.min(1) for block in symmetric.split(counts, 1)]
    offsets = torch.tensor([0, *counts[:-1]]).cumsum(0)
    first, party = _selection(torch.stack([b.values for b in blocks], 1).isfinite(), dimensions)
    second = (torch.stack([b.indices for b in blocks], 1) + offsets)[first, party]
    price = _merge_costs(part, first, second, Exclusive())
    different = price[is_own[first, party]]
    if len(different) == 0:
        limit = 2.0 * dimensions
    else:
        other = ~is_own[first, party]
        nearest = torch.full((len(own),), torch.inf, dtype=torch.float64)
        nearest = nearest.scatter_reduce(0, first[other], price[other], "amin")
        right = float(nearest[nearest.isfinite()].median())
        wrong = float(different.quantile(_WRONG))
        tail = _BULK + _TAIL * (2 / dimensions) ** 0.5
        limit = tail * (max(right, 1e-6 * wrong) * wrong) ** 0.5
    if not math.isfinite(limit):
        raise ParameterError(
            f"the dispersion cannot be estimated: merges cost {limit} nats. Some posterior is "
            "numerically degenerate; mend it, or give `dispersion`"
        )
    if not limit > 0:
        limit = 1.0
    if pooling.needs_prior:
        wrong_pairs = is_own[first, party].nonzero().squeeze(-1)
        return _break_even(limit, part, prior or {}, first, second, price, wrong_pairs, len(sizes))
    if isinstance(pooling, Exclusive):
        return limit
    return _translated(_MIDDLE * limit, price, _merge_costs(part, first, second, pooling)) / _MIDDLE


def _translated(limit: float, price: Tensor, other: Tensor) -> float:
    """The price in other units that as many pairs are below as are below ``limit``."""
    floor = 1e-12 * limit
    x, y = (torch.sort(v.clamp(min=floor)).values.log().numpy() for v in (price, other))
    level = math.log(limit)
    if level > x[-1]:  # beyond all that was seen, as far as the last is below
        return limit * math.exp(y[-1] - x[-1])
    return math.exp(np.interp(level, x, y))


def _break_even(
    limit: float,
    local: Mapping[str, Factor],
    prior: Mapping[str, Factor],
    first: Tensor,
    second: Tensor,
    price: Tensor,
    wrong: Tensor,
    num_parties: int,
) -> float:
    """The T at which tempered messages at the limit are as well merged as not, or, if it is less,
    that at which those of the pairs ``wrong`` are, of one party, by bisection."""
    product = Product()
    cheapest = price.argsort(stable=True)[:_MAX_EVIDENCE]
    wrong = wrong[:: math.ceil(len(wrong) / _MAX_EVIDENCE) or 1]
    pairs = torch.cat([cheapest, wrong])
    both = torch.cat([first[pairs], second[pairs]])
    groups = torch.arange(len(pairs)).repeat(2)
    # Halfway between two lone components (nothing) and one that joins half of all parties.
    new_atom = math.log(num_parties) / 2

    def excess(dispersion: float) -> float:
        cost = torch.zeros(len(pairs), dtype=torch.float64)  # minus the log evidence of each merge
        for site, f in local.items():
            part = f.index_select(0, both)
            index, one = groups.to(part.device), prior[site]
            weights = torch.ones(len(both), dtype=torch.float64, device=part.device)
            part = temper(part, one, weights, dispersion)
            atoms = product.barycenter(part, index, len(pairs), weights, one)
            value = product.pair_cost(atoms.index_select(0, index), part, one)
            cost += (value.reshape(2, -1).sum(0) + product.opening(atoms, one)).double().cpu()
        beyond, own = cost.split([len(cheapest), len(wrong)])
        # For what the merge costs beyond its price, the sign is that of the evidence for it.
        result = limit / dispersion + float((beyond - price[cheapest] / dispersion).median())
        if len(wrong):
            result = min(result, float(own.quantile(_WRONG)))
        return result - new_atom

    low, high = 1.0, max(limit, 1.0)
    try:
        if excess(low) <= 0:
            return low
        for _ in range(_BISECTIONS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    except ParameterError:  # improper: fusion itself will say which and why
        return 1.0
    return low


def pairwise_spread(local: Mapping[str, Factor], sizes: tuple[int, ...]) -> float:
    """The standard deviation of the divergences between all pairs of different components."""
    _, _, divergence = _pairwise(local, sizes)
    different = ~torch.eye(len(divergence), dtype=torch.bool)
    return float(divergence[different].std()) if len(divergence) > 1 else 0.0


def _pairwise(
    local: Mapping[str, Factor], sizes: tuple[int, ...]
) -> tuple[dict[str, Factor], list[int], Tensor]:
    """Components of all parties, or of a random selection if there are many, their numbers, and
    all pairwise divergences. The selection depends on the order of the parties."""
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(sizes), generator=generator)[:_MAX_PARTIES].sort().values.tolist()
    index = torch.cat([torch.arange(ends[s], ends[s + 1]) for s in chosen])
    part = {site: f.index_select(0, index) for site, f in local.items()}
    divergence = torch.stack([pairwise_kl(f, f) for f in part.values()]).sum(0).cpu()
    return part, [sizes[s] for s in chosen], divergence


def _selection(mask: Tensor, dimensions: float) -> tuple[Tensor, Tensor]:
    """The places that are set, of a random selection of rows if there are many."""
    count, num_columns = mask.shape
    keep = max(1, min(_MAX_PAIRS, int(_MAX_NUMBERS / dimensions)) // num_columns)
    if count > keep:
        generator = torch.Generator().manual_seed(0)
        selected = torch.zeros(count, dtype=torch.bool)
        selected[torch.randperm(count, generator=generator)[:keep]] = True
        mask = mask & selected.unsqueeze(1)
    first, second = mask.nonzero().unbind(1)
    return first, second


def _merge_costs(
    local: Mapping[str, Factor], first: Tensor, second: Tensor, pooling: Pooling
) -> Tensor:
    """``min_q D(q; first) + D(q; second)`` for each pair, summed over sites."""
    total = torch.zeros(len(first), dtype=torch.float64)
    for f in local.values():
        price = _about_origin(f, first, second, pooling)
        # NaN, or far from the origin in units of the atom's width: too few digits.
        if bool((lost := price.isnan()).any()):
            price[lost] = _one_by_one(f, first[lost], second[lost], pooling)
        total += price.clamp(min=0)
    # What is too far apart to tell how far costs as much as the dearest of the others.
    known = total.isfinite()
    return torch.where(known, total, total[known].max()) if bool(known.any()) else total


def _about_origin(f: Factor, first: Tensor, second: Tensor, pooling: Pooling) -> Tensor:
    """The costs of merges by sums about the origin of all, where the statistics stay in the cache:
    no component is taken apart again for each pair that it is in. NaN where digits were lost."""
    origin, f = f.origin, f.centred
    try:
        statistics, potential = pooling.statistics(f), pooling.potential(f)
        weight = torch.full((len(first),), 2.0, dtype=torch.float64, device=f.device)
        atoms = pooling.from_statistics(f, statistics[first] + statistics[second], weight)
        price = potential[first] + potential[second] - pooling.group_potential(atoms, weight)
        if origin is not None:
            # What they merge into is no farther, in units of its own width.
            size = torch.maximum(f.first.size[first], f.first.size[second])
            price = torch.where(size > FAR * origin.numel(), torch.nan, price)
    except (torch.linalg.LinAlgError, ValueError):
        return torch.full((len(first),), torch.nan, dtype=torch.float64)
    return price.cpu()


def _one_by_one(f: Factor, first: Tensor, second: Tensor, pooling: Pooling) -> Tensor:
    """The same, each about the mean of its pair; NaN where even that is singular."""
    pair = f.index_select(0, torch.cat([first, second]))
    groups = torch.arange(len(first), device=f.device).repeat(2)
    try:
        atoms = pooling.barycenter(pair, groups, len(first)).index_select(0, groups)
        return pooling.divergence(atoms, pair).double().reshape(2, -1).sum(0).cpu()
    except (ParameterError, torch.linalg.LinAlgError):
        if len(first) == 1:
            return torch.full((1,), torch.nan, dtype=torch.float64)
        half = len(first) // 2
        sides = (slice(half), slice(half, None))
        return torch.cat([_one_by_one(f, first[i], second[i], pooling) for i in sides])
