# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The dispersion ``T``: how many nats apart two local posteriors may be and still mean the same.

Local posteriors are overconfident (mean field, real differences between parties), so divergences
at face value would split every component. The scale is read off the posteriors themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_fusion.barycenter import Pooling
from pyro_fusion.families import Factor, pairwise_kl

__all__ = ["estimate_dispersion", "temper"]

# The median needs no more parties than this; pairs of all would be quadratic in their number.
_MAX_PARTIES = 64


def estimate_dispersion(
    local: Mapping[str, Factor], sizes: tuple[int, ...], pooling: Pooling
) -> float:
    """An estimate of T from the components of all parties.

    For the KL poolings: what it costs to merge a component with the nearest other component of
    its own party, ``min_q D(q; i) + D(q; j)``, the median over components. Components of one
    party are known to be different atoms, so this is the price of a wrong merge, in the units of
    the objective. It is 1 if no party has two components.

    For ``product``: how much farther apart the same component of two parties is than their
    posteriors claim, the median divergence to the nearest component of another party over the
    number of its dimensions (two independent estimates of one truth are one nat apart in each),
    at least 1: the overdispersion of generalised linear models.

    :param local: site -> factor of batch shape ``[N]``, the components of the parties in turn.
    :param sizes: ``L_s`` of each party.
    """
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    step = -(-len(sizes) // _MAX_PARTIES)
    chosen = range(0, len(sizes), step)
    index = torch.cat([torch.arange(ends[s], ends[s + 1]) for s in chosen])
    party = torch.cat([torch.full((sizes[s],), s) for s in chosen])
    part = {site: f.index_select(0, index) for site, f in local.items()}
    divergence = torch.stack([pairwise_kl(f, f) for f in part.values()]).sum(0).cpu()
    same_party = party.unsqueeze(0) == party.unsqueeze(1)
    if pooling.needs_base:
        if bool(same_party.all()):
            return 1.0
        nearest = divergence.masked_fill(same_party, torch.inf).amin(1)
        dimensions = sum(f.shape[1:].numel() for f in part.values())
        return max(1.0, float(nearest.median()) / dimensions)
    divergence = divergence + divergence.mT
    divergence[~same_party] = torch.inf
    distance, nearest = divergence.fill_diagonal_(torch.inf).min(1)
    has_other = torch.isfinite(distance).nonzero().squeeze(-1)
    if len(has_other) == 0:
        return 1.0
    cost = _merge_cost(part, has_other, nearest[has_other], pooling)
    return float(cost.median()) if float(cost.median()) > 0 else 1.0


def _merge_cost(
    local: Mapping[str, Factor], first: Tensor, second: Tensor, pooling: Pooling
) -> Tensor:
    """``min_q D(q; i) + D(q; j)`` for each pair, summed over sites: ``[M]``."""
    groups = torch.arange(len(first)).repeat(2)
    total = torch.zeros(len(first), dtype=torch.float64)
    for f in local.values():
        pairs = f.index_select(0, torch.cat([first, second]))
        on_device = groups.to(pairs.device)
        atoms = pooling.barycenter(pairs, on_device, len(first)).index_select(0, on_device)
        total += pooling.divergence(atoms, pairs).double().cpu().reshape(2, -1).sum(0)
    return total


def temper(local: Factor, base: Factor, weights: Tensor, dispersion: float) -> Factor:
    """The messages ``q_n / p0`` raised to ``w_n / T``: ``η_0 + (η_n - η_0) w_n / T``.

    :param local: batch shape ``[N]``; ``base``: ``[1]``; ``weights``: ``[N]``.
    """
    origin = local.location()
    shifted_base = base.expand((len(weights), *base.base_shape[1:])).shift(origin)
    shifted = local.shift(origin)
    message = (shifted.natural - shifted_base.natural) * (weights / dispersion).unsqueeze(1)
    return local.from_natural(shifted_base.natural + message).shift(origin, sign=1.0)
