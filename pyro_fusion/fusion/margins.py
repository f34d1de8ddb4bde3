# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Which components are doubtful: by how much F would rise if one of them went to its next best
place."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.pooling.collapsed import Sums, group_costs
from pyro_fusion.pooling.components import Components, compact

__all__ = ["margins"]

# Atoms that are looked at, besides a component's own and a new one: the cheapest to it.
_NEAREST = 8


def margins(problem: Components, assignment_prior: AssignmentPrior, groups: Tensor) -> Tensor:
    """By how much F rises, at least, if a component leaves its atom: float64 ``[N]`` on the CPU.

    Its next best place is a new atom, another atom that its party does not have, or that of another
    component of its party, which takes its own in exchange. In an additive pooling the atoms are
    the best ones before and after, so that the margin of a component that is where F is lowest is
    not negative; in others atoms stay where they are. The eight cheapest other atoms are looked at;
    infinite where there is no other place among them.
    Weights of atoms by their rank are left out.

    :param problem: the components as they are scored.
    :param groups: the atom of each component, LongTensor ``[N]``, any integers.
    """
    groups, num_atoms = compact(groups.cpu())
    atoms = problem.m_step(groups, num_atoms)
    prior = assignment_prior.update(num_atoms, problem.num_parties)
    penalty = prior.penalty(problem.num_parties)
    cost = problem.e_step(atoms, prior).cost
    popularity = torch.bincount(groups, minlength=num_atoms)
    near = cost.topk(min(_NEAREST + 1, num_atoms), dim=0, largest=False).indices.cpu()
    count = len(groups)
    n = torch.arange(count).expand_as(near).flatten()
    k = near.flatten()
    n, k = n[k != groups[n]], k[k != groups[n]]
    # The component of the same party that has the atom, if there is one.
    holder = torch.full((problem.num_parties, num_atoms), -1)
    holder[problem.party, groups] = torch.arange(count)
    rival = holder[problem.party[n], k]
    # Two that are alone in their atoms have nothing to exchange.
    different = (rival < 0) | (popularity[groups[n]] > 1) | (popularity[k] > 1)
    n, k, rival = n[different], k[different], rival[different]
    own, others = groups[n], popularity[k]
    prices = _Prices(problem, groups, num_atoms, cost.cpu())
    rise = prices.exchanged(own, n, rival) + prices.exchanged(k, rival, n)
    moved = penalty[popularity[own] - 1] - penalty[popularity[own]]
    moved = moved + penalty[(others + 1).clamp(max=len(penalty) - 1)] - penalty[others]
    rise = rise + torch.where(rival < 0, moved, 0.0)
    result = torch.full((count,), torch.inf, dtype=torch.float64)
    result = result.scatter_reduce(0, n, rise, "amin")
    member = (popularity[groups] > 1).nonzero().squeeze(-1)
    if len(member) and (prior.num_atoms is None or num_atoms < prior.num_atoms):
        k = groups[member]
        alone = penalty[1] + penalty[popularity[k] - 1] - penalty[popularity[k]]
        rise = prices.exchanged(k, member, torch.full_like(member, -1)) + alone
        rise = rise + prices.alone(member)
        result = result.scatter_reduce(0, member, rise, "amin")
    return result


class _Prices:
    """The costs of groups when components come and go."""

    def __init__(self, problem: Components, groups: Tensor, num_atoms: int, cost: Tensor) -> None:
        self.problem, self.cost = problem, cost
        sums = group_costs(problem, groups, num_atoms)
        self.sums = sums if isinstance(sums, Sums) else None
        if self.sums is not None:
            self.before = self.sums.values(torch.arange(num_atoms))

    def exchanged(self, groups: Tensor, without: Tensor, with_: Tensor) -> Tensor:
        """The growth of groups ``[M]`` without some components and with others; -1 stands for
        none, and a group that is left empty costs nothing."""
        if self.sums is not None:
            return self.sums.exchanged(groups, without, with_) - self.before[groups]
        left = torch.where(without < 0, 0.0, self.cost[groups, without])
        return torch.where(with_ < 0, 0.0, self.cost[groups, with_]) - left

    def alone(self, members: Tensor) -> Tensor:
        """The costs of components in atoms of their own."""
        return self.problem.take(members).values(torch.arange(len(members)), len(members)).cpu()
