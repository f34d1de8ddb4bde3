# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The coordinate step on the collapsed objective: one party is matched again with the atoms
re-optimised for every possible pair, where an E-step holds them still.

It leaves optima in which E- and M-steps are stuck, because an atom that already contains a
component is biased towards keeping it. It costs a barycentre per pair of an atom and a component,
so it runs after coordinate ascent has converged, one party after the other, in time linear in
their number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_fusion.assignment import NEW, match
from pyro_fusion.barycenter import Pooling, group_mean
from pyro_fusion.families import Factor
from pyro_fusion.priors import AssignmentPrior
from pyro_fusion.problem import MatchingProblem

__all__ = ["rematch"]


# Numbers in the statistics of all candidate groups of one party: beyond this it is too slow.
_MAX_NUMBERS = 1 << 24


def rematch(
    problem: MatchingProblem, prior: AssignmentPrior, groups: Tensor, num_atoms: int
) -> Tensor:
    """Match every party once, in turn, given the groups that the others make: LongTensor ``[N]``.

    Returned groups are numbered with gaps. Problems with too many candidates come back as they
    are.
    """
    size = max(problem.sizes)
    per_pair = sum(f.natural.shape[1] for f in problem.local.values())
    if (num_atoms + size) * size * per_pair > _MAX_NUMBERS:
        return groups
    groups = groups.clone()
    sums = [
        _Sums.of(problem.pooling, f, problem.base.get(site), groups, num_atoms, problem.weights)
        for site, f in problem.local.items()
    ]
    popularity = torch.bincount(groups, minlength=num_atoms)
    penalty = prior.penalty(problem.num_parties)
    end = 0
    for party_size in problem.sizes:
        members = torch.arange(end, end + party_size)
        end += party_size
        old = groups[members]
        for s in sums:
            s.add(members, old, -1.0)
        popularity[old] -= 1
        new = old
        try:
            value = torch.stack([s.increments(members, popularity) for s in sums]).sum(0)
        except torch.linalg.LinAlgError:
            pass  # some candidate group is improper: this party stays as it is
        else:
            new = _match(value / problem.dispersion, popularity, penalty, prior.num_atoms)
        fresh = new == NEW
        count = len(popularity)
        new = torch.where(fresh, count + fresh.cumsum(0) - 1, new)
        added = int(fresh.sum())
        if added:
            popularity = torch.cat([popularity, popularity.new_zeros(added)])
            for s in sums:
                s.grow(members[fresh])
        for s in sums:
            s.add(members, new, 1.0)
        popularity[new] += 1
        groups[members] = new
    return groups


def _match(value: Tensor, popularity: Tensor, penalty: Tensor, max_atoms: int | None) -> Tensor:
    """An exact linear assignment with increments ``value`` (``[K, L]``) of standing atoms."""
    standing = (popularity > 0).nonzero().squeeze(-1)
    join = penalty[popularity[standing] + 1] - penalty[popularity[standing]]
    cost = value.cpu()[standing] + join.unsqueeze(1)
    cost = cost.nan_to_num(nan=torch.inf, posinf=torch.inf)
    room = None if max_atoms is None else max_atoms - len(standing)
    result = match(cost, float(penalty[1]), room)
    return torch.cat([standing, torch.tensor([NEW])])[result]  # NEW, -1, is also the last place


@dataclass
class _Sums:
    """Sums of one site's statistics over each group, about an origin per group that stays."""

    pooling: Pooling
    local: Factor
    base: Factor | None
    weights: Tensor
    origin: Tensor | None
    total: Tensor
    potential: Tensor
    weight: Tensor

    @classmethod
    def of(
        cls,
        pooling: Pooling,
        local: Factor,
        base: Factor | None,
        groups: Tensor,
        num_atoms: int,
        weights: Tensor,
    ) -> _Sums:
        groups = groups.to(weights.device)
        weight = weights.new_zeros(num_atoms).index_add(0, groups, weights)
        origin = group_mean(local.location(), groups, weights, weight)
        total = weights.new_zeros(num_atoms, local.natural.shape[1])
        zero = weights.new_zeros(num_atoms)
        sums = cls(pooling, local, base, weights, origin, total, zero, zero.clone())
        sums.add(torch.arange(len(groups)), groups, 1.0)
        return sums

    def _about(self, members: Tensor, groups: Tensor) -> tuple[Factor, Factor | None]:
        """Components and prior in the coordinates of these groups."""
        part = self.local.index_select(0, members)
        base = self.base
        if base is not None:
            base = base.expand_batch((len(groups),))
        if self.origin is None:
            return part, base
        origin = self.origin[groups]
        return part.shift(origin), None if base is None else base.shift(origin)

    def add(self, members: Tensor, groups: Tensor, sign: float) -> None:
        part, base = self._about(members, groups)
        w = sign * self.weights[members]
        groups = groups.to(w.device)
        statistics = self.pooling.statistics(part, base)
        self.total.index_add_(0, groups, statistics * w.unsqueeze(1))
        self.potential.index_add_(0, groups, self.pooling.potential(part, base) * w)
        self.weight.index_add_(0, groups, w)

    def grow(self, members: Tensor) -> None:
        """Make room for groups that these components open."""
        n = len(members)
        if self.origin is not None:
            location = self.local.index_select(0, members).location()
            assert location is not None
            self.origin = torch.cat([self.origin, location])
        self.total = torch.cat([self.total, self.total.new_zeros(n, self.total.shape[1])])
        self.potential = torch.cat([self.potential, self.potential.new_zeros(n)])
        self.weight = torch.cat([self.weight, self.weight.new_zeros(n)])

    def increments(self, members: Tensor, popularity: Tensor) -> Tensor:
        """How much each component would add to each group's objective: ``[K, L]``; NaN for
        groups without members."""
        size, num_groups = len(members), len(popularity)
        standing = (popularity > 0).nonzero().squeeze(-1)
        index = standing.repeat_interleave(size)
        part, base = self._about(members.repeat(len(standing)), index)
        w = self.weights[members].repeat(len(standing))
        joined = self._value(
            self.total[index] + self.pooling.statistics(part, base) * w.unsqueeze(1),
            self.potential[index] + self.pooling.potential(part, base) * w,
            self.weight[index] + w,
            base,
        )
        _, base = self._about(members[:1].expand(len(standing)), standing)
        alone = self._value(
            self.total[standing], self.potential[standing], self.weight[standing], base
        )
        result = self.total.new_full((num_groups, size), torch.nan)
        result[standing] = joined.reshape(len(standing), size) - alone.unsqueeze(1)
        return result

    def _value(
        self, total: Tensor, potential: Tensor, weight: Tensor, base: Factor | None
    ) -> Tensor:
        atoms = self.pooling.from_statistics(self.local, total, weight, base)
        return potential - self.pooling.group_potential(atoms, weight, base)
