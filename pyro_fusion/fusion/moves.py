# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Moves on the collapsed objective: the atoms are re-optimised for every candidate, where an E-step
holds them still. They leave optima in which E- and M-steps are stuck, because an atom that already
contains a component is biased towards keeping it.

- :func:`regroup` merges two atoms, or splits one, in any pooling.
- :func:`rematch` matches one party again, exactly, where the pooling is additive. It costs a
  barycentre per pair of an atom and a component: only pairs of near ones are looked at, and only
  the parties visited that could gain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_fusion.assignment import NEW, match
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.pooling.collapsed import GroupCosts, Sums, group_costs
from pyro_fusion.pooling.components import Components

__all__ = ["regroup", "rematch"]


# Atoms that a component may go to, besides its own and new ones: the cheapest in the last E-step.
_NEAREST = 8


def regroup(
    problem: Components,
    assignment_prior: AssignmentPrior,
    groups: Tensor,
    num_atoms: int,
    cost: Tensor,
) -> Tensor:
    """Merge pairs of near atoms that no party has both of, and split atoms in two, where that
    lowers F: LongTensor ``[N]``, numbered with gaps. Arguments as for :func:`rematch`."""
    groups = groups.clone()
    costs = group_costs(problem, groups, num_atoms)
    popularity = torch.bincount(groups, minlength=num_atoms)
    penalty = assignment_prior.penalty(problem.num_parties)
    every = torch.arange(num_atoms)
    alone = _values(costs, every) + penalty[popularity]
    # What is merged is not also split.
    taken = torch.zeros(num_atoms, dtype=torch.bool)
    first, second = _near_pairs(problem, groups, num_atoms, cost)
    if len(first):
        both = _values(costs, first, second) + penalty[popularity[first] + popularity[second]]
        gain = (alone[first] + alone[second] - both).nan_to_num(nan=-torch.inf)
        order = gain.argsort(descending=True, stable=True)
        for i in order[gain[order] > 0].tolist():
            a, b = int(first[i]), int(second[i])
            if not (taken[a] or taken[b]):
                groups[groups == b] = a
                taken[a] = taken[b] = True
    room = (
        num_atoms
        if assignment_prior.num_atoms is None
        else assignment_prior.num_atoms - len(groups.unique())
    )
    if room <= 0:
        return groups
    part = _far_parts(problem, groups, num_atoms, cost)
    away = part.nonzero().squeeze(-1)
    leaving = torch.bincount(groups[away], minlength=num_atoms)
    splits = ((leaving > 0) & (leaving < popularity) & ~taken).nonzero().squeeze(-1)
    if len(splits) == 0:
        return groups
    here, there = costs.parted(groups, part)
    parts = _values(here, splits) + _values(there, splits)
    parts += penalty[leaving[splits]] + penalty[popularity[splits] - leaving[splits]]
    gain = (alone[splits] - parts).nan_to_num(nan=-torch.inf)
    splits = splits[gain.argsort(descending=True, stable=True)[: min(room, int((gain > 0).sum()))]]
    chosen = torch.zeros(num_atoms, dtype=torch.bool)
    chosen[splits] = True
    return torch.where(part & chosen[groups], num_atoms + groups, groups)


def _values(costs: GroupCosts, first: Tensor, second: Tensor | None = None) -> Tensor:
    """The objective of groups, or of unions of two; NaN where one is improper."""
    try:
        return costs.values(first, second)
    except (torch.linalg.LinAlgError, ValueError):
        if len(first) == 1:
            return torch.full((1,), torch.nan, dtype=torch.float64)
    half = len(first) // 2
    sides = (slice(half), slice(half, None))
    parts = [(first[i], None if second is None else second[i]) for i in sides]
    return torch.cat([_values(costs, *part) for part in parts])


def _near_pairs(
    problem: Components, groups: Tensor, num_atoms: int, cost: Tensor
) -> tuple[Tensor, Tensor]:
    """Pairs of atoms that no party has both of, each with the few whose members it would cost
    least to take over."""
    device = cost.device
    has = torch.zeros(num_atoms, problem.num_parties)
    has[groups, problem.party] = 1.0
    total = cost.new_zeros(num_atoms, num_atoms).index_add_(1, groups.to(device), cost)
    mean = total.cpu() / has.sum(1)
    mean[has @ has.mT > 0] = torch.inf
    value, index = mean.topk(min(_NEAREST, num_atoms), dim=0, largest=False)
    pair = torch.stack([index, torch.arange(num_atoms).expand_as(index)])[:, value.isfinite()]
    first, second = pair.sort(0).values.unique(dim=1).unbind(0)
    return first, second


def _far_parts(problem: Components, groups: Tensor, num_atoms: int, cost: Tensor) -> Tensor:
    """A mask of the members that are nearer to their group's farthest one than to its atom:
    ``[N]``."""
    index = groups.to(cost.device)
    own = cost.gather(0, index.unsqueeze(0)).squeeze(0)
    worst = own.new_full((num_atoms,), -torch.inf).scatter_reduce(0, index, own, "amax")
    count = len(groups)
    places = torch.where(own == worst[index], torch.arange(count, device=own.device), count)
    seed = places.new_full((num_atoms,), count).scatter_reduce(0, index, places, "amin")
    used = seed < count
    seeds = {
        site: f.index_select(0, seed.clamp(max=count - 1)) for site, f in problem.sites.items()
    }
    distance = problem.cost(seeds).gather(0, index.unsqueeze(0)).squeeze(0)
    distance = torch.where(used[index], distance, torch.inf)
    return (distance < own).cpu()


def rematch(
    problem: Components,
    assignment_prior: AssignmentPrior,
    groups: Tensor,
    num_atoms: int,
    cost: Tensor,
) -> Tensor:
    """Match the parties that could gain, one after the other, given the groups that the others
    make: LongTensor ``[N]``, numbered with gaps; as they are where the pooling is not additive.

    :param groups: LongTensor ``[N]``, in ``0, ..., K-1``.
    :param cost: of the last E-step, ``[K, N]``: tells which atoms are near.
    """
    sums = group_costs(problem, groups, num_atoms)
    if not isinstance(sums, Sums):
        return groups
    groups = groups.clone()
    near = cost.topk(min(_NEAREST, num_atoms), dim=0, largest=False).indices.cpu()
    popularity = torch.bincount(groups, minlength=num_atoms)
    step = assignment_prior.penalty(problem.num_parties).diff()
    new = float(step[0])
    ends = torch.tensor([0, *problem.sizes]).cumsum(0).tolist()
    for s in _promising(problem, sums, groups, near, popularity, step, assignment_prior):
        members = torch.arange(ends[s], ends[s + 1])
        old = groups[members]
        sums.add(members, old, -1.0)
        popularity[old] -= 1
        # The candidates of each component: near ones, and where it was.
        candidates = torch.cat([near[:, members], old.unsqueeze(0)])
        standing, place = candidates.unique(return_inverse=True)
        is_near = torch.zeros(len(standing), len(members), dtype=torch.bool)
        is_near[place, torch.arange(len(members)).expand_as(place)] = True
        kept = popularity[standing] > 0
        standing, is_near = standing[kept], is_near[kept]
        weights = assignment_prior.rank_weights(len(popularity) + len(members), max(problem.sizes))
        rank = torch.empty_like(popularity)
        rank[popularity.argsort(descending=True, stable=True)] = torch.arange(len(popularity))
        used = int((popularity > 0).sum())
        room = None if assignment_prior.num_atoms is None else assignment_prior.num_atoms - used
        try:
            k, n = is_near.nonzero().unbind(1)
            value = torch.full(is_near.shape, torch.inf, dtype=torch.float64)
            value[k, n] = sums.increments(members[n], standing[k])
            join = (step[popularity[standing]] * weights[rank[standing]]).unsqueeze(1)
            value = (value + join).nan_to_num(nan=torch.inf, posinf=torch.inf)
            a = match(value, new * float(weights[used]), room)
            choice = torch.cat([standing, torch.tensor([NEW])])[a]  # NEW, -1, is the last place
        except (torch.linalg.LinAlgError, ValueError):
            choice = old  # some candidate group is improper, or lost its digits
        # One that was alone and is so again keeps its number, which others have as near.
        choice = torch.where((choice == NEW) & (popularity[old] == 0), old, choice)
        fresh = choice == NEW
        choice = torch.where(fresh, len(popularity) + fresh.cumsum(0) - 1, choice)
        added = int(fresh.sum())
        popularity = torch.cat([popularity, popularity.new_zeros(added)])
        sums.grow(added)
        sums.add(members, choice, 1.0)
        popularity[choice] += 1
        groups[members] = choice
    return groups


def _promising(
    problem: Components,
    sums: Sums,
    groups: Tensor,
    near: Tensor,
    popularity: Tensor,
    step: Tensor,
    assignment_prior: AssignmentPrior,
) -> list[int]:
    """The parties some component of which would gain by itself in another group, if that had no
    component of its party; with all for whom that cannot be told."""
    every = torch.arange(len(groups))
    try:
        here = -sums.increments(every, groups, -1.0)
        there = torch.stack([sums.increments(every, k) for k in near])
    except (torch.linalg.LinAlgError, ValueError):
        return list(range(problem.num_parties))
    here = here + step[popularity[groups] - 1]
    join = step[popularity[near].clamp(max=len(step) - 1)]
    there = torch.where(near == groups, torch.inf, there + join)
    best = there.amin(0)
    if (
        assignment_prior.num_atoms is None
        or int((popularity > 0).sum()) < assignment_prior.num_atoms
    ):
        best = best.clamp(max=float(step[0]))
    gains = ~(best >= here - 1e-12 * here.abs())
    return problem.party[gains].unique().tolist()
