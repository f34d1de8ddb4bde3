# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Moves on the collapsed objective, against that objective computed from scratch."""

import itertools

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_fusion import FixedAtoms, GroupNormPrior, IndianBuffetPrior
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.families import Factor
from pyro_fusion.fusion.ascent import expectation_maximization
from pyro_fusion.fusion.moves import regroup, rematch
from pyro_fusion.pooling import pooling_named
from pyro_fusion.pooling.collapsed import Sums
from pyro_fusion.pooling.components import Components, compact
from tests.families.members import BARE
from tests.pooling.priors import prior_of

POOLINGS = ["inclusive", "exclusive", "product"]
PRIORS = [
    IndianBuffetPrior(1.0),
    IndianBuffetPrior(0.1),
    GroupNormPrior(),
    GroupNormPrior(5.0),
    FixedAtoms(7),
]


def collapsed(problem: Components, prior: AssignmentPrior, groups: torch.Tensor) -> float:
    """F of these groups with their best atoms."""
    groups, num_atoms = compact(groups)
    atoms = problem.barycenter(groups, num_atoms)
    total = problem.opening(atoms).sum() + problem.cost(atoms)[groups, range(len(groups))].sum()
    popularity = torch.bincount(groups)
    return float(total + prior.penalty(problem.num_parties)[popularity].sum())


def moved(how, problem, prior, groups):
    """The groups after ``regroup`` or ``rematch``, from compact ones."""
    groups, num_atoms = compact(groups)
    cost = problem.cost(problem.barycenter(groups, num_atoms))
    return how(problem, prior, groups, num_atoms, cost)


def check_feasible(problem, prior, groups) -> None:
    for part in groups.split(problem.sizes):
        assert len(part.unique()) == len(part)
    if prior.num_atoms is not None:
        assert len(groups.unique()) <= prior.num_atoms


def normals(loc, sizes, pooling="exclusive", scale=1.0, weights=None, dispersion=1.0):
    loc = torch.as_tensor(loc, dtype=torch.float64)
    loc = loc.reshape(len(loc), -1)
    scale = torch.as_tensor(scale, dtype=torch.float64)
    how = pooling_named(pooling)
    local = Factor.of(dist.Normal(loc, scale.expand(loc.shape)).to_event(1))
    base = Factor.of(dist.Normal(loc.mean(0, keepdim=True), 1e3 * scale.max()).to_event(1))
    return Components(
        {"x": local},
        tuple(sizes),
        torch.ones(len(loc)).double() if weights is None else weights,
        how,
        {"x": base} if how.needs_prior else {},
        dispersion,
    )


def any_problem(name, pooling, sizes, dispersion, seed):
    count = sum(sizes)
    local = Factor.of(BARE[name][0](torch.arange(100 * seed, 100 * seed + count)))
    how = pooling_named(pooling)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(sizes), generator=generator, dtype=torch.float64) + 0.1
    if how.needs_prior:
        weights.fill_(1.0)  # they are in the messages
    return Components(
        {"x": local},
        tuple(sizes),
        weights.repeat_interleave(torch.tensor(sizes)),
        how,
        {"x": prior_of(name, local)} if how.needs_prior else {},
        1.0 if how.needs_prior else dispersion,
    )


def random_groups(sizes, num_atoms, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(num_atoms, generator=generator)[:n] for n in sizes])


any_case = given(
    name=st.sampled_from(sorted(BARE)),
    pooling=st.sampled_from(POOLINGS),
    prior=st.sampled_from(PRIORS),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    dispersion=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)


class TestAnyProblem:
    @any_case
    def test_regroup_never_raises_f(self, name, pooling, prior, sizes, dispersion, seed):
        problem = any_problem(name, pooling, sizes, dispersion, seed)
        groups, num_atoms = compact(random_groups(sizes, 7, seed))
        after = moved(regroup, problem, prior, groups)
        check_feasible(problem, prior, after)
        before = collapsed(problem, prior, groups)
        assert collapsed(problem, prior, after) <= before + 1e-9 * (1 + abs(before))
        # Every merge and every split alone lowers F: they do not meet.
        for k in after.unique():
            parents = groups[after == k].unique()
            alone = groups.clone()
            if len(parents) == 2:
                alone[groups == parents[1]] = parents[0]
            elif int(k) >= num_atoms:
                alone[after == k] = num_atoms
            else:
                continue
            assert collapsed(problem, prior, alone) < before + 1e-9 * (1 + abs(before))

    @any_case
    def test_rematch_never_raises_f(self, name, pooling, prior, sizes, dispersion, seed):
        problem = any_problem(name, pooling, sizes, dispersion, seed)
        groups = random_groups(sizes, 7, seed)
        after = moved(rematch, problem, prior, groups)
        check_feasible(problem, prior, after)
        before = collapsed(problem, prior, groups)
        assert collapsed(problem, prior, after) <= before + 1e-9 * (1 + abs(before))

    @any_case
    def test_the_best_merge_is_found(self, name, pooling, prior, sizes, dispersion, seed):
        # Of at most five groups, each is near to each.
        problem = any_problem(name, pooling, [min(n, 3) for n in sizes], dispersion, seed)
        groups, num_atoms = compact(random_groups(problem.sizes, 5, seed))
        best = before = collapsed(problem, prior, groups)
        for a, b in itertools.combinations(range(num_atoms), 2):
            merged = torch.where(groups == b, a, groups)
            if all(len(g.unique()) == len(g) for g in merged.split(problem.sizes)):
                best = min(best, collapsed(problem, prior, merged))
        after = collapsed(problem, prior, moved(regroup, problem, prior, groups))
        assert after <= best + 1e-9 * (1 + abs(before))


@pytest.mark.parametrize("pooling", POOLINGS)
class TestTheOnlyImprovement:
    """Constructed so that one move helps, and is found."""

    prior = GroupNormPrior(1.0)

    def check(self, how, problem, groups, expected):
        groups, expected = torch.tensor(groups), torch.tensor(expected)
        after = moved(how, problem, self.prior, groups)
        assert torch.equal(after == after[:, None], expected == expected[:, None])
        assert collapsed(problem, self.prior, after) < collapsed(problem, self.prior, groups)

    def test_merge(self, pooling):
        # Parties 0 and 1 have one atom, 2 and 3 a near one; the other two are far from all.
        problem = normals([0, 50, 0, 90, 0.3, 50, 0.3, 90], [2] * 4, pooling)
        self.check(regroup, problem, [0, 1, 0, 2, 3, 1, 3, 2], [0, 1, 0, 2, 0, 1, 0, 2])

    def test_split(self, pooling):
        problem = normals([0, 50, 0, 90, 9, 50, 9, 90], [2] * 4, pooling)
        self.check(regroup, problem, [0, 1, 0, 2, 0, 1, 0, 2], [0, 1, 0, 2, 3, 1, 3, 2])

    def test_rematch(self, pooling):
        # The last party has its components the wrong way round.
        problem = normals([0, 5] * 6, [2] * 6, pooling)
        self.check(rematch, problem, [0, 1] * 5 + [1, 0], [0, 1] * 6)

    def test_an_atom_of_another_party_alone(self, pooling):
        # It is still there once its party has been visited.
        problem = normals([0, 5, 9, 0, 5, 0, 9.2], [3, 2, 2], pooling)
        self.check(rematch, problem, [0, 1, 2, 0, 1, 0, 3], [0, 1, 2, 0, 1, 0, 2])

    def test_new_atom(self, pooling):
        problem = normals([0, 5] * 11 + [0, 12], [2] * 12, pooling)
        self.check(rematch, problem, [0, 1] * 12, [0, 1] * 11 + [0, 2])

    def test_nothing_to_do(self, pooling):
        problem = normals([0, 5, 0, 5, 0, 5], [2] * 3, pooling)
        groups = torch.tensor([0, 1, 0, 1, 0, 1])
        for how in (regroup, rematch):
            assert torch.equal(moved(how, problem, self.prior, groups), groups)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_groups_that_are_remembered_cost_what_they_did(pooling, monkeypatch):
    how = pooling_named(pooling)
    generator = torch.Generator().manual_seed(0)
    alpha = 0.1 + 9 * torch.rand(9, 250, generator=generator, dtype=torch.float64)
    base = {"x": Factor.of(dist.Dirichlet(torch.full((1, 250), 0.1, dtype=torch.float64)))}
    local = {"x": Factor.of(dist.Dirichlet(alpha))}
    weights = torch.ones(9, dtype=torch.float64)
    problem = Components(local, (3, 3, 3), weights, how, base if how.needs_prior else {}, 5.0)

    def prices():
        """In groups that others had the numbers of before."""
        sums = Sums.of(problem, torch.arange(3).repeat(3), 3)
        every, ones = torch.arange(9), torch.ones(9, dtype=torch.long)
        found = [sums.values(torch.arange(3)), sums.values(torch.tensor([0]), torch.tensor([2]))]
        found += [sums.increments(every, ones), sums.increments(torch.tensor([4]), ones[:1], -1.0)]
        sums.add(torch.tensor([4]), torch.tensor([1]), -1.0)
        sums.grow(1)
        sums.add(torch.tensor([4]), torch.tensor([3]), 1.0)
        found += [sums.values(torch.arange(4)), sums.increments(every, ones)]
        part = Sums.of(problem, torch.tensor([0, 5, 5, 5, 3, 5, 5, 5, 5]), 6)
        return torch.cat([*found, sums.minus(part).values(torch.tensor([0, 1]))])

    first, again = prices(), prices()
    assert problem.known
    monkeypatch.setattr("pyro_fusion.pooling.collapsed._LARGE", 1000)
    torch.testing.assert_close(first, prices(), rtol=1e-9, atol=1e-9)
    assert torch.equal(again, first)


@pytest.mark.parametrize("weightless", [False, True])
@pytest.mark.parametrize(
    ("origin", "unit"), [(1e8, 1.0), (1e8, 1e-6), (1e12, 1.0), (0.0, 1e-8), (None, 1e-3)], ids=str
)
@pytest.mark.parametrize(
    "prior", [GroupNormPrior(), IndianBuffetPrior(0.1), FixedAtoms(7)], ids=str
)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_without_digits_f_still_falls(pooling, prior, origin, unit, weightless):
    generator = torch.Generator().manual_seed(0)
    truth = 5 * torch.randn(4, 2, generator=generator, dtype=torch.float64)
    loc = unit * (truth + 0.3 * torch.randn(5, 4, 2, generator=generator, dtype=torch.float64))
    if origin is None:
        loc[:, 0] += 1e8  # of every party one component is far from the others
    else:
        loc += origin
    weights = torch.ones(20).double()
    if weightless:
        weights[:4] = 0.0
    problem = normals(loc.reshape(20, 2), [4] * 5, pooling, unit, weights)
    result = expectation_maximization(problem, prior, random_groups(problem.sizes, 7, 1))
    trace = torch.tensor(result.objective, dtype=torch.float64)
    assert trace.isfinite().all()
    assert (trace.diff() <= 0).all()
    check_feasible(problem, prior, result.groups)
