# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Split-merge moves by themselves, against the enumeration of all partitions: costs are looked up
in a table of all sets of components."""

from dataclasses import dataclass

import pytest
import torch

from pyro_fusion import FixedAtoms, GroupNormPrior, IndianBuffetPrior
from pyro_fusion.assignment.problem import party_of
from pyro_fusion.assignment.split_merge import split_merge
from tests.assignment.partitions import check, log_weights, partitions


@dataclass
class Table:
    """Costs of all sets of components, ``[2^(N+1)]``; a group is the sum of ``2^n`` over its
    members."""

    cost: torch.Tensor
    code: torch.Tensor

    def empty(self, count):
        return Table(self.cost, torch.zeros(count, dtype=torch.long))

    def add(self, members, groups, sign):
        self.code.index_add_(0, groups, int(sign) * 2**members)

    def values(self, groups, other=None):
        code = self.code[groups] + (0 if other is None else self.code[other])
        return self.cost[code]

    def increments(self, members, groups):
        code = self.code[groups]
        return self.cost[code + 2**members] - self.cost[code]


def table(sizes, seed):
    """Costs at random, of sets that may not be groups too, about those of points on a line."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    x = 1.5 * torch.randn(count, generator=generator).double()
    sets = torch.arange(2 ** (count + 1))
    member = (sets.unsqueeze(1) >> torch.arange(count) & 1).double()
    size = member.sum(1).clamp(min=1)
    mean = member @ x / size
    cost = 0.5 * (member @ x**2 - size * mean**2) - 0.8 * (size - 1)
    return cost + torch.randn(len(cost), generator=generator).double()


def draws(cost, sizes, penalty, limit, start, count, seed=0):
    singles = Table(cost, 2 ** torch.arange(sum(sizes)))
    party = party_of(sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        groups, found = start, []
        for _ in range(count):
            groups = split_merge(singles, groups, party, penalty, limit)
            found.append(groups)
    return torch.stack(found)


def by_appearance(a):
    numbers = {}
    return tuple(numbers.setdefault(k, len(numbers)) for k in a)


@pytest.mark.parametrize(
    ("sizes", "prior", "seed"),
    [
        ((1, 1, 1, 1, 1), IndianBuffetPrior(1.0), 1),
        ((1, 2, 1, 1), GroupNormPrior(0.5), 6),
        ((2, 2, 1), FixedAtoms(3), 3),
    ],
    ids=str,
)
def test_every_partition(sizes, prior, seed):
    cost, penalty = table(sizes, seed), prior.penalty(len(sizes))
    every = partitions(sizes)

    def log_evidence(group):
        return -float(cost[sum(2**n for n in group)])

    weights = log_weights(sizes, log_evidence, penalty)
    if prior.num_atoms is not None:
        weights[every.amax(1) >= prior.num_atoms] = -torch.inf
    start = every[weights.argmin() if prior.num_atoms is None else weights.argmax()]
    found = draws(cost, sizes, penalty, prior.num_atoms, start, 1200)
    place = {tuple(a): i for i, a in enumerate(every.tolist())}
    drawn = torch.tensor([place[by_appearance(a)] for a in found.tolist()])
    p = weights.softmax(0)
    check(torch.nn.functional.one_hot(drawn, len(every)), p, "partitions")
    numbers = torch.nn.functional.one_hot(every.amax(1)).double()
    check(numbers[drawn], p @ numbers, "number of groups")
    same = (every.unsqueeze(2) == every.unsqueeze(1)).double().flatten(1)
    check(same[drawn], p @ same, "same")


def test_numbers_of_groups_have_no_gap():
    sizes, penalty = (3, 3, 3), IndianBuffetPrior(1.0).penalty(3)
    found = draws(table(sizes, 5), sizes, penalty, None, torch.arange(9), 100)
    counts = found.amax(1) + 1
    assert all(len(a.unique()) == k for a, k in zip(found, counts, strict=True))
    assert int(counts.min()) < int(counts.max())
    for own in found.split(sizes, dim=1):
        assert all(len(a.unique()) == 3 for a in own)


def test_a_cost_that_is_nan():
    cost = table((1, 1), 0)
    cost[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        draws(cost, (1, 1), IndianBuffetPrior(1.0).penalty(2), None, torch.tensor([0, 1]), 20)
