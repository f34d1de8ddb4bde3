# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Markov kernels: steps that leave a distribution invariant."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_fusion.assignment.matching import Matching

__all__ = ["match_anew", "slice_sample"]

# The most steps by which a slice may grow.
_GROWTH = 20


def match_anew(logits: Tensor, new: float, present: Tensor, room: int, block: int) -> Tensor:
    """A step from ``present`` that leaves ``p(a) ∝ exp Σ_l logits[l, a_l]`` invariant, where no two
    components share an atom; ``K`` stands for a new atom of one's own, which at most ``room`` have.

    The step is an exact draw from ``p`` if there are at most ``block`` components, and a draw that
    ignores the room happens to be within it. Otherwise, starting from ``present``, components swap
    atoms, take unused ones, and change to new ones and back.

    :param logits: ``[L, K]``.
    :param new: the logit of a new atom.
    :param present: LongTensor ``[L]``, in ``0, ..., K``.
    :param block: the largest L that is drawn as a block.
    :return: LongTensor ``[L]``, in ``0, ..., K``.
    """
    size, num_atoms = logits.shape
    if size <= block:
        own = torch.full((size, size), -math.inf, dtype=logits.dtype).fill_diagonal_(new)
        columns = torch.cat([logits, own], 1) if room else logits
        choice = Matching(columns).sample().clamp(max=num_atoms)
        if int((choice == num_atoms).sum()) <= room:
            return choice
    # The last column is a new atom; the last row stands for nobody, and holds unused atoms.
    scores = torch.cat([logits, logits.new_full((size, 1), new)], 1)
    scores = torch.cat([scores, scores.new_zeros(1, num_atoms + 1)])
    scores[-1, -1] = -math.inf
    rounds = max(size, num_atoms)
    partners = torch.randperm(rounds)
    choice = present
    for i in range(rounds):
        choice = _swap(scores, choice)
        choice = _leave_or_return(scores, choice, partners.roll(i)[:size], room)
    return choice


def _swap(scores: Tensor, choice: Tensor) -> Tensor:
    """Pair components and unused atoms at random: two components may swap their atoms, and a
    component may take the unused atom. Pairs are disjoint, so each is a Metropolis step."""
    size, num_atoms = len(choice), scores.shape[1] - 1
    unused = torch.ones(num_atoms + 1, dtype=torch.bool)
    unused[choice] = unused[-1] = False
    held = torch.cat([choice, unused.nonzero().squeeze(-1)])
    half = len(held) // 2
    a, b = torch.randperm(len(held))[: 2 * half].reshape(2, half)
    i, j = a.clamp(max=size), b.clamp(max=size)
    gain = scores[i, held[b]] + scores[j, held[a]] - scores[i, held[a]] - scores[j, held[b]]
    accept = -torch.empty_like(gain).exponential_() < gain
    swapped = held.clone()
    swapped[a] = torch.where(accept, held[b], held[a])
    swapped[b] = torch.where(accept, held[a], held[b])
    return swapped[:size]


def _leave_or_return(scores: Tensor, choice: Tensor, partner: Tensor, room: int) -> Tensor:
    """Let each component draw between its partner, an atom, and a new atom, if it has one of them
    and the partner is not another's. Partners are different, so the draws are independent but for
    the room: if they need more, all components keep what they have."""
    size, num_atoms = len(choice), scores.shape[1] - 1
    held = torch.zeros(num_atoms + 1, dtype=torch.bool)
    held[choice] = True
    own = partner.clamp(max=num_atoms)
    may = (choice == own) | ((choice == num_atoms) & ~held[own])
    may &= partner < num_atoms
    odds = scores[torch.arange(size), own] - scores[:size, -1]
    drawn = torch.where(torch.rand_like(odds) < odds.sigmoid(), own, num_atoms)
    proposal = torch.where(may, drawn, choice)
    return proposal if int((proposal == num_atoms).sum()) <= room else choice


def slice_sample(log_density: Callable[[float], float], x: float) -> float:
    """A step from ``x`` that leaves the distribution with this density invariant: an interval of
    length one about ``x`` steps out while its ends are in the slice, then shrinks towards ``x``.

    Source: Neal, *Slice sampling* (Annals of Statistics 2003), figures 3 and 5.
    """
    level = log_density(x) - float(torch.empty((), dtype=torch.float64).exponential_())
    low = x - float(torch.rand(()))
    high = low + 1
    left = int(torch.randint(_GROWTH, ()))
    for _ in range(left):
        if log_density(low) <= level:
            break
        low -= 1
    for _ in range(_GROWTH - 1 - left):
        if log_density(high) <= level:
            break
        high += 1
    while True:
        y = low + (high - low) * float(torch.rand((), dtype=torch.float64))
        if log_density(y) > level:
            return y
        low, high = (y, high) if y < x else (low, y)
