# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Starts of coordinate ascent: feasible, different, and not quadratic in the number of parties."""

import importlib

import pyro.distributions as dist
import pytest
import torch

from pyro_fusion import FixedAtoms, FusionProblem, GroupNormPrior, Posterior, fuse
from pyro_fusion.assignment import match
from pyro_fusion.families import Factor
from pyro_fusion.fusion import seeding
from pyro_fusion.fusion.seeding import _MAX_ATOMS_PER_COMPONENT, starts
from pyro_fusion.pooling import pooling_named
from pyro_fusion.pooling.components import Components


def problem_of(sizes, spread=1.0, dispersion=1.0):
    count = sum(sizes)
    loc = spread * torch.randn(count, 2, dtype=torch.float64)
    local = Factor.of(dist.Normal(loc, torch.ones(count, 2).double()).to_event(1))
    weights = torch.ones(count).double()
    return Components(
        {"x": local}, tuple(sizes), weights, pooling_named("exclusive"), {}, dispersion
    )


@pytest.mark.parametrize("prior", [GroupNormPrior(), FixedAtoms(5)], ids=str)
def test_starts_are_feasible_and_reproducible(prior):
    problem = problem_of([3, 1, 5, 2], spread=3.0)
    first, second = (list(starts(problem, prior, 9, seed=4)) for _ in "ab")
    assert len(first) == 10
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for groups in first:
        for part in groups.split(problem.sizes):
            assert len(part.unique()) == len(part)
        if prior.num_atoms is not None:
            assert int(groups.max()) < prior.num_atoms
    assert len({tuple(g.tolist()) for g in first}) > 1


def test_many_parties_with_nothing_in_common_do_not_blow_up():
    # Far apart at a tiny dispersion, every component would be an atom: 600 of them.
    problem = problem_of([2] * 300, spread=1e3, dispersion=1e-3)
    limit = _MAX_ATOMS_PER_COMPONENT * 2
    for groups in starts(problem, GroupNormPrior(), 4, seed=0):
        # Once over the limit the threshold doubles with every party, so it is soon reached.
        assert len(groups.unique()) < 4 * limit


@pytest.mark.parametrize("pooling", ["inclusive", "exclusive"])
def test_given_the_number_of_many_atoms_each_is_found(pooling):
    # k-means++ by itself gives some of 50 atoms two seeds and others none.
    generator = torch.Generator().manual_seed(0)
    centres = 7 * torch.randn(50, 50, generator=generator, dtype=torch.float64)
    probability = torch.rand(50, generator=generator)
    members, parties = [], []
    for _ in range(10):
        own = (torch.rand(50, generator=generator) < probability).nonzero().squeeze(1)
        loc = centres[own] + torch.randn(len(own), 50, generator=generator, dtype=torch.float64)
        local = dist.Normal(loc, torch.full_like(loc, 0.1)).to_event(1)
        parties.append(Posterior({"x": local}, {"x": "component"}))
        members.append(own)
    true = torch.cat(members)
    fusion = fuse(parties, pooling, FixedAtoms(len(true.unique())))
    atom = torch.cat(fusion.assignment)
    assert bool(((atom == atom.unsqueeze(1)) == (true == true.unsqueeze(1))).all())


def far_from_obvious(seed):
    """Ten parties that each have three to eight of twelve atoms, which lie close together: the
    locations of the components, of sd 1/2 each, in the plane."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(12, 2, generator=generator, dtype=torch.float64)
    parties = []
    for _ in range(10):
        size = int(torch.randint(3, 9, (1,), generator=generator))
        own = torch.randperm(12, generator=generator)[:size]
        noise = 0.5 * torch.randn(size, 2, generator=generator, dtype=torch.float64)
        parties.append(centres[own] + noise)
    return parties


def objective(parties, fusion):
    """F of what was found, by hand: where all components are Normals of sd 1/2, atoms are means and
    divergences are squared distances over 2 (1/2)^2."""
    loc, atom = torch.cat(parties), torch.cat(fusion.assignment)
    prior, temperature = fusion.only_label().assignment_prior, fusion.only_label().dispersion
    total = 0.0
    for k in atom.unique():
        own = loc[atom == k]
        total += float((own - own.mean(0)).square().sum()) / (2 * 0.5**2 * temperature)
        total += prior.scale * len(own) ** 0.5
    return total


def close_posteriors(seed):
    """Normals of sd 1/2 at these locations."""
    return [
        Posterior(
            {"x": dist.Normal(loc, torch.full_like(loc, 0.5)).to_event(1)}, {"x": "component"}
        )
        for loc in far_from_obvious(seed)
    ]


@pytest.mark.parametrize("seed", [3, 9, 11])
def test_other_starts_end_lower_than_the_first(seed):
    parties = far_from_obvious(seed)
    posteriors = close_posteriors(seed)
    t = {3: 3.8, 9: 5.1, 11: 6.3}[seed]  # where there are many local optima
    one, many = (fuse(posteriors, "exclusive", restarts=n, dispersion=t) for n in (0, 9))
    assert many.only_label().dispersion == one.only_label().dispersion
    for fusion in (one, many):
        assert objective(parties, fusion) == pytest.approx(fusion.objective[-1], rel=1e-9)
    assert objective(parties, many) < 0.99 * objective(parties, one)
    # The first start ends alike in both; starts at other thresholds end elsewhere.
    ends = {round(end, 6) for end in many.only_label().restarts}
    assert len(one.only_label().restarts) == 1
    assert len(ends) >= 5


def test_not_the_best_end_alone_is_refined(monkeypatch):
    """What ended second best may end lowest on the collapsed objective."""
    posteriors = close_posteriors(8)
    t = 5.16  # where there are many local optima
    few = fuse(posteriors, "exclusive", dispersion=t).objective[-1]
    module = importlib.import_module("pyro_fusion.fusion.search")  # its function has the name too
    monkeypatch.setattr(module, "_REFINED", 1)
    assert few < 0.998 * fuse(posteriors, "exclusive", dispersion=t).objective[-1]


def test_when_thresholds_are_used_up_parties_join_in_random_orders():
    part = FusionProblem.of(close_posteriors(8), dispersion=10.0).parts["component"]

    def found(seed):
        return list(starts(part.ordered, part.assignment_prior, 9, seed))

    first, other = found(0), found(1)
    same = [torch.equal(a, b) for a, b in zip(first, other, strict=True)]
    assert all(same[:5]) and not any(same[5:])
    assert not any(torch.equal(a, b) for a, b in zip(first[:5], first[5:], strict=True))


@pytest.mark.parametrize("num_atoms", [1, 2, 6, 40])
def test_matchings_without_rivals_are_those_of_the_linear_assignment(num_atoms):
    generator = torch.Generator().manual_seed(num_atoms)
    sizes = [1, 3, 5, 2] * 25
    cost = torch.rand(num_atoms, sum(sizes), generator=generator, dtype=torch.float64)
    cost[:, ::7] += 1.0  # new atoms for these
    found = seeding._undisputed(cost, sizes, 0.6)
    known = 0
    for own, a in zip(cost.split(sizes, 1), found, strict=True):
        if a is not None:
            known += 1
            assert torch.equal(a, match(own, 0.6))
    # Each party of one has no rival; with many atoms hardly any has.
    assert known >= 25 and (num_atoms < 40 or known > 60)
    same = torch.zeros(3, 2, dtype=torch.float64)
    assert seeding._undisputed(same, [1, 1], 1.0) == [None, None]  # three atoms cost the same
