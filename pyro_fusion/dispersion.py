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

# Quantiles need no more than this; all pairs would be quadratic in the number of parties.
_MAX_PARTIES = 64
_MAX_PAIRS = 2000


def estimate_dispersion(
    local: Mapping[str, Factor], sizes: tuple[int, ...], pooling: Pooling
) -> float:
    """An estimate of T from the components of all parties.

    For the KL poolings T lies between two prices of a merge, ``min_q D(q; i) + D(q; j)``, in the
    units of the objective: that of a wrong one, the median over components of merging with the
    nearest other component of the same party, which is known to be a different atom; and that of
    a right one, the lower quartile, over components and other parties, of merging with the nearest
    component there. T is their geometric mean. Where no party has two components, so that nothing
    is known to be different, it is two nats per dimension.

    For ``product``: how much farther apart the same component of two parties is than their
    posteriors claim, the median divergence to the nearest component of another party over the
    number of its dimensions (two independent estimates of one truth are one nat apart in each),
    at least 1: the overdispersion of generalised linear models.

    :param local: site -> factor of batch shape ``[N]``, the components of the parties in turn.
    :param sizes: ``L_s`` of each party; at least two parties.
    """
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    chosen = range(0, len(sizes), -(-len(sizes) // _MAX_PARTIES))
    index = torch.cat([torch.arange(ends[s], ends[s + 1]) for s in chosen])
    counts = [sizes[s] for s in chosen]
    part = {site: f.index_select(0, index) for site, f in local.items()}
    divergence = torch.stack([pairwise_kl(f, f) for f in part.values()]).sum(0).cpu()
    own = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    is_own = own.unsqueeze(1) == torch.arange(len(counts))
    dimensions = sum(f.shape[1:].numel() for f in part.values())
    if pooling.needs_base:
        nearest = divergence.masked_fill(is_own[:, own], torch.inf).amin(1)
        return max(1.0, float(nearest.median()) / dimensions)
    # The nearest component in each party, [N, S]; in one's own, of the others.
    symmetric = (divergence + divergence.mT).fill_diagonal_(torch.inf)
    blocks = [block.min(1) for block in symmetric.split(counts, 1)]
    offsets = torch.tensor([0, *counts[:-1]]).cumsum(0)
    nearest = torch.stack([b.indices for b in blocks], 1) + offsets
    exists = torch.stack([b.values for b in blocks], 1).isfinite()
    wrong = _merge_costs(part, nearest, is_own & exists, pooling)
    right = _merge_costs(part, nearest, ~is_own & exists, pooling)
    if len(wrong) == 0:
        return 2.0 * dimensions
    same = float(right.quantile(0.25))
    different = float(wrong.median())
    scale = (max(same, 1e-6 * different) * different) ** 0.5
    return scale if scale > 0 else 1.0


def _merge_costs(
    local: Mapping[str, Factor], nearest: Tensor, mask: Tensor, pooling: Pooling
) -> Tensor:
    """``min_q D(q; i) + D(q; nearest[i, p])`` where ``mask[i, p]``, summed over sites; a random
    selection if there are many."""
    first, party = mask.nonzero().unbind(1)
    if len(first) > _MAX_PAIRS:
        generator = torch.Generator().manual_seed(0)
        selection = torch.randperm(len(first), generator=generator)[:_MAX_PAIRS]
        first, party = first[selection], party[selection]
    total = torch.zeros(len(first), dtype=torch.float64)
    if len(first) == 0:
        return total
    both = torch.cat([first, nearest[first, party]])
    for f in local.values():
        pairs = f.index_select(0, both)
        groups = torch.arange(len(first), device=pairs.device).repeat(2)
        atoms = pooling.barycenter(pairs, groups, len(first)).index_select(0, groups)
        total += pooling.divergence(atoms, pairs).double().cpu().reshape(2, -1).sum(0)
    return total


def temper(local: Factor, base: Factor, weights: Tensor, dispersion: float) -> Factor:
    """The messages ``q_n / p0`` raised to ``w_n / T``: ``η_0 + (η_n - η_0) w_n / T``.

    :param local: batch shape ``[N]``; ``base``: ``[1]``; ``weights``: ``[N]``.
    """
    origin = local.location()
    shifted_base = base.expand_batch((len(weights),)).shift(origin)
    shifted = local.shift(origin)
    message = (shifted.natural - shifted_base.natural) * (weights / dispersion).unsqueeze(1)
    return local.from_natural(shifted_base.natural + message).shift(origin, sign=1.0)
