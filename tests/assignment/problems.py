# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Small assignment problems, and their optima by enumeration."""

import itertools

import torch
from torch import Tensor

from pyro_fusion import FixedAtoms, GroupNormPrior, IndianBuffetPrior
from pyro_fusion.assignment import NEW
from pyro_fusion.assignment.priors import AssignmentPrior

PRIORS = [
    IndianBuffetPrior(1.0),
    IndianBuffetPrior(0.1),
    GroupNormPrior(),
    GroupNormPrior(0.3),
    FixedAtoms(3),
]
RANKED = GroupNormPrior(0.5, ranked=True)


def random_costs(seed: int, num_atoms: int, sizes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.rand(num_atoms, n, generator=generator, dtype=torch.float64) for n in sizes]


def one_party(num_atoms: int, size: int, new_atoms: bool) -> list[list[int]]:
    """All ways to give ``size`` components different atoms, or new ones."""
    choices = range(NEW if new_atoms else 0, num_atoms)
    result = []
    for a in itertools.product(choices, repeat=size):
        standing = [k for k in a if k != NEW]
        if len(set(standing)) == len(standing):
            result.append(list(a))
    return result


def brute_force(cost: list[Tensor], prior: AssignmentPrior, opening: Tensor | None = None) -> float:
    """The lowest F over all assignments of all parties, by enumeration."""
    num_atoms, count = len(cost[0]), sum(c.shape[1] for c in cost)
    value, used = torch.zeros(1).double(), torch.zeros(1, num_atoms + 1, dtype=torch.long)
    for c in cost:
        c = c.double()
        options = torch.tensor(one_party(num_atoms, c.shape[1], prior.num_atoms is None))
        index = options.clamp(min=0)
        own = c[index, torch.arange(c.shape[1])] if num_atoms else torch.zeros(options.shape)
        own = torch.where(options == NEW, 0.0, own).sum(1)
        has = torch.zeros(len(options), num_atoms + 1, dtype=torch.long)
        has.scatter_add_(1, options % (num_atoms + 1), torch.ones_like(options))
        value = (value[:, None] + own).flatten()
        used = (used[:, None] + has).flatten(0, 1)
    m, new = used[:, :-1], used[:, -1:]
    if opening is not None:
        value = value + (opening * (m > 0)).sum(1)
    lone = (torch.arange(count) < new).long()
    penalty = prior.penalty(len(cost))[torch.cat([m, lone], 1).sort(descending=True).values]
    weights = prior.rank_weights(num_atoms + count, max(c.shape[1] for c in cost))
    return float((value + penalty @ weights).min())
