# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The margin of a component: against every place that it could go to, by F itself."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_fusion import FixedAtoms, FusionProblem, Posterior, fuse
from pyro_fusion.fusion.margins import margins
from tests.pooling.own import BuresWasserstein


def normals(seed=0, scale=0.5):
    g = torch.Generator().manual_seed(seed)
    centres = torch.tensor([-3.0, 0.0, 2.0, 3.0], dtype=torch.float64)
    result = []
    for holds in ([0, 1, 2], [3, 1], [2, 0, 3], [1, 3]):
        loc = centres[holds] + scale * torch.randn(len(holds), generator=g, dtype=torch.float64)
        result.append(Posterior({"x": dist.Normal(loc, scale)}, {"x": "component"}))
    return result


def objective(part, belief, groups):
    _, groups = groups.unique(return_inverse=True)
    count = int(groups.max()) + 1
    own = belief.update(count, part.problem.num_parties)
    penalty = own.penalty(part.problem.num_parties)[torch.bincount(groups)].sum()
    return float(part.problem.values(groups, count).sum() + penalty)


def by_hand(part, belief, groups, limit):
    """The least rise of F over all places, an assignment at a time."""
    party = part.problem.party
    now, count = objective(part, belief, groups), int(groups.max()) + 1
    result = []
    for n in range(len(groups)):
        best = math.inf
        for k in range(count + 1):
            if k == groups[n] or (
                k == count and (limit == count or (groups == groups[n]).sum() == 1)
            ):
                continue
            other = groups.clone()
            rival = ((party == party[n]) & (groups == k)).nonzero()
            if len(rival):
                other[rival[0, 0]] = groups[n]
            other[n] = k
            same = groups[:, None] == groups
            if not torch.equal(other[:, None] == other, same):
                best = min(best, objective(part, belief, other) - now)
        result.append(best)
    return result


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("pooling", ["exclusive", "inclusive", "product"])
def test_against_every_other_place(pooling, fixed):
    prior = {"x": dist.Normal(torch.zeros((), dtype=torch.float64), 4.0)}
    given = {"prior": prior} if pooling == "product" else {}
    posteriors = normals()
    belief = FixedAtoms(4) if fixed else None
    problem = FusionProblem.of(posteriors, pooling, belief, dispersion=1.5, **given)
    part = problem.parts["component"]
    # The number of atoms that alpha is estimated from stays that of the assignment.
    fusion = fuse(posteriors, pooling, belief, dispersion=1.5, **given)
    belief = fusion.only_label().assignment_prior
    if not fixed and pooling == "product":
        belief = type(belief)(alpha=belief.mass)
    groups = torch.cat(fusion.assignment)
    expected = by_hand(part, belief, groups, belief.num_atoms)
    found = margins(part.problem, belief, groups)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert bool((found >= 0).all())
    if pooling != "product" or fixed:
        torch.testing.assert_close(torch.cat(fusion.margins), found)


def test_a_doubtful_component_has_the_least_margin_and_is_named():
    # The second of the last party lies halfway between two atoms.
    locs = ([0.0, 4.0], [0.02, 4.03], [4.1, 0.1], [0.05, 1.95])
    posteriors = {
        name: Posterior(
            {"x": dist.Normal(torch.tensor(m, dtype=torch.float64), 0.5)}, {"x": "component"}
        )
        for name, m in zip("abcd", locs, strict=True)
    }
    fusion = fuse(posteriors, dispersion=6.0)
    least = min((float(x), s, i) for s, own in enumerate(fusion.margins) for i, x in enumerate(own))
    assert least[1:] == (3, 1)
    assert fuse(list(posteriors.values())[:1]).margins[0].isinf().all()


def test_a_pooling_that_is_not_additive_has_margins_with_its_atoms_held_still():
    generator = torch.Generator().manual_seed(0)
    posteriors = []
    for _ in range(3):
        loc = torch.tensor([[0.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
        loc = loc + 0.2 * torch.randn(2, 2, generator=generator, dtype=torch.float64)
        local = dist.MultivariateNormal(loc, 0.1 * torch.eye(2, dtype=torch.float64))
        posteriors.append(Posterior({"x": local}, {"x": "component"}))
    fusion = fuse(posteriors, BuresWasserstein(), dispersion=1.0)
    assert fusion.num_atoms == 2
    part = fusion.only_label().problem.problem
    groups = torch.cat(fusion.assignment)
    penalty = fusion.only_label().assignment_prior.penalty(3)
    # The only other places are a new atom and an exchange, which costs both distances.
    cost = part.cost(part.m_step(groups, 2))
    for n in range(6):
        own, rival = int(groups[n]), n + 1 - 2 * (n % 2)
        swap = cost[1 - own, n] + cost[own, rival] - cost[own, n] - cost[1 - own, rival]
        new = penalty[1] + penalty[2] - penalty[3] - cost[own, n]
        torch.testing.assert_close(torch.cat(fusion.margins)[n], torch.minimum(swap, new))
