# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The dispersion ``T``: how many nats apart two local posteriors may be and still mean the same.

Local posteriors are overconfident (mean field, real differences between parties), so divergences
at face value would split every component. The scale is read off the posteriors themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_fusion.assignment.problem import party_of
from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor, pairwise_kl
from pyro_fusion.families.masked import Masked
from pyro_fusion.pooling.components import Atoms
from pyro_fusion.pooling.kl import Exclusive
from pyro_fusion.pooling.merges import WRONG, Merges
from pyro_fusion.pooling.pooling import Pooling

__all__ = ["estimate_dispersion", "pairwise_spread"]

# Quantiles need no more than this; all pairs would be quadratic in the number of parties. Of large
# components (topics of many words) there are fewer: so many numbers in the atoms of all pairs.
_MAX_PARTIES = 64
_MAX_PAIRS = 6000
_MAX_NUMBERS = 1 << 24

_BULK, _TAIL = 1.36, 5.5


def estimate_dispersion(
    local: Atoms,
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
    dimensions = sum(_dimensions(f) for f in part.values())
    # The nearest component in each party, [N, S]; in one's own, of the others.
    symmetric = (divergence + divergence.mT).fill_diagonal_(torch.inf)
    blocks = [block.min(1) for block in symmetric.split(counts, 1)]
    offsets = torch.tensor([0, *counts[:-1]]).cumsum(0)
    first, party = _selection(torch.stack([b.values for b in blocks], 1).isfinite(), dimensions)
    second = (torch.stack([b.indices for b in blocks], 1) + offsets)[first, party]
    price = Exclusive().merge_costs(part, first, second, {})
    different = price[is_own[first, party]]
    if len(different) == 0:
        limit = 2.0 * dimensions
    else:
        other = ~is_own[first, party]
        nearest = torch.full((len(own),), torch.inf, dtype=torch.float64)
        nearest = nearest.scatter_reduce(0, first[other], price[other], "amin")
        right = float(nearest[nearest.isfinite()].median())
        wrong = float(different.quantile(WRONG))
        tail = _BULK + _TAIL * (2 / dimensions) ** 0.5
        limit = tail * (max(right, 1e-6 * wrong) * wrong) ** 0.5
    if not math.isfinite(limit):
        raise ParameterError(
            f"the dispersion cannot be estimated: merges cost {limit} nats. Some posterior is "
            "numerically degenerate; mend it, or give `dispersion`"
        )
    if not limit > 0:
        limit = 1.0
    wrong_pairs = is_own[first, party].nonzero().squeeze(-1)
    merges = Merges(part, prior or {}, first, second, price, limit, wrong_pairs, len(sizes))
    return pooling.dispersion(merges)


def pairwise_spread(local: Atoms, sizes: tuple[int, ...]) -> float:
    """The standard deviation of the divergences between all pairs of different components."""
    _, _, divergence = _pairwise(local, sizes)
    different = ~torch.eye(len(divergence), dtype=torch.bool)
    return float(divergence[different].std()) if len(divergence) > 1 else 0.0


def _pairwise(local: Atoms, sizes: tuple[int, ...]) -> tuple[dict[str, Any], list[int], Tensor]:
    """Components of all parties, or of a random selection if there are many, their numbers, and
    all pairwise divergences. The selection depends on the order of the parties."""
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(sizes), generator=generator)[:_MAX_PARTIES].sort().values.tolist()
    index = torch.cat([torch.arange(ends[s], ends[s + 1]) for s in chosen])
    part = {site: f.index_select(0, index) for site, f in local.items()}
    divergence = torch.stack([pairwise_kl(f, f) for f in part.values()]).sum(0).cpu()
    return part, [sizes[s] for s in chosen], divergence


def _dimensions(f: Factor | Masked) -> float:
    """The mean count of numbers in a component."""
    return f.dimensions if isinstance(f, Masked) else float(f.event_shape.numel())


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
