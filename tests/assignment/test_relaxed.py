# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The relaxed solver, against cvxpy and against enumeration."""

import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_fusion import FixedAtoms, GroupNormPrior, IndianBuffetPrior, ParameterError
from pyro_fusion.assignment import (
    NEW,
    AssignmentProblem,
    assignment_objective,
    coordinate,
    match,
    relaxed,
)
from pyro_fusion.assignment.interior import Point, Programme
from pyro_fusion.testing.solver import lowest_objective
from tests.assignment.problems import random_costs

interior = importlib.import_module("pyro_fusion.assignment.interior")
module = importlib.import_module("pyro_fusion.assignment.relaxed")


def reference(cost, norm, alone):
    """The optimum, from an interior-point solver for cones; without new atoms if alone is inf."""
    import cvxpy as cp  # takes a while: only where it is needed

    joint = torch.cat(cost, 1).double()
    allowed = joint.isfinite()
    # What costs a hundred new atoms is as good as forbidden; the reference fails on huge ranges.
    c = torch.where(allowed, joint, 0.0).clamp(max=100 * alone)
    p = cp.Variable(tuple(c.shape), nonneg=True)
    lone = 1 - cp.sum(p, axis=0)
    constraints = [lone == 0] if alone == math.inf else [lone >= 0]
    constraints.append(cp.multiply(p, (~allowed).double().numpy()) == 0)
    first = 0
    for part in cost:
        constraints.append(cp.sum(p[:, first : first + part.shape[1]], axis=1) <= 1)
        first += part.shape[1]
    objective = cp.sum(cp.multiply(c.numpy(), p)) + norm.numpy() @ cp.norm(p, 2, axis=1)
    if alone < math.inf:
        objective = objective + alone * cp.sum(lone)
    problem = cp.Problem(cp.Minimize(objective), constraints)
    return problem.solve(solver=cp.CLARABEL, tol_gap_rel=1e-8, tol_feas=1e-8)


def check_soft(cost, result, norm, alone):
    """``soft`` is feasible, and ``relaxation`` is its objective."""
    joint, soft = torch.cat(cost, 1).double(), torch.cat(result.soft, 1).double()
    eps = 10 * torch.finfo(cost[0].dtype).eps
    assert float(soft.min()) >= 0
    assert float(soft.sum(0).max()) <= 1 + eps
    assert all(float(p.sum(1).max()) <= 1 + eps for p in result.soft)
    lone = 1 - soft.sum(0)
    value = torch.where(soft > 0, joint * soft, 0.0).sum() + norm @ soft.norm(dim=1)
    value = value + (alone * lone.sum() if alone < math.inf else 0.0)
    assert result.relaxation == pytest.approx(float(value), rel=max(1e-9, eps))


def identical(cost):
    return [c[:, :1].expand(c.shape) for c in cost]


def nothing_in_common(cost):
    return [cost[0] + 100, *cost[1:]]


def forbidding(cost):
    generator = torch.Generator().manual_seed(1)
    return [torch.where(torch.rand(c.shape, generator=generator) < 0.4, torch.inf, c) for c in cost]


def huge_range(cost):
    return [10 ** (20 * (c / 3) - 8) for c in cost]


CASES = {
    "ragged": random_costs(0, 6, [4, 1, 6, 3]),
    "single components": random_costs(1, 5, [1] * 7),
    "one party": random_costs(2, 6, [5]),
    "one atom": random_costs(3, 1, [1, 3, 2]),
    "more components than atoms": random_costs(4, 3, [6, 5]),
    "identical": identical(random_costs(5, 5, [3, 4, 2])),
    "nothing in common": nothing_in_common(random_costs(6, 5, [3, 4, 2])),
    "infinite": forbidding(random_costs(7, 8, [5, 4, 6])),
    "negative": [c - 2 for c in random_costs(8, 6, [4, 5, 5])],
    "huge range": huge_range(random_costs(9, 6, [4, 5, 5])),
    "larger": random_costs(10, 20, [10] * 8),
}


class TestAgreesWithCvxpy:
    @pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
    @pytest.mark.parametrize("name", CASES)
    def test_group_norm(self, name, scale):
        cost = CASES[name]
        result = relaxed(cost, GroupNormPrior(scale))
        norm = torch.full((len(cost[0]),), scale, dtype=torch.float64)
        optimum = reference(cost, norm, scale)
        assert result.converged and result.duality_gap <= 1e-6
        assert result.relaxation == pytest.approx(optimum, rel=1e-5)
        assert result.dual == pytest.approx(optimum, rel=1e-5)
        check_soft(cost, result, norm, scale)

    @pytest.mark.parametrize("name", ["ragged", "larger", "infinite", "nothing in common"])
    @pytest.mark.parametrize("given_start", [True, False])
    def test_ranked(self, name, given_start):
        cost, scale = CASES[name], 0.5
        num_atoms, free = len(cost[0]), max(c.shape[1] for c in cost)
        first = [match(c, 10.0 if given_start else scale) for c in cost]
        result = relaxed(
            cost, GroupNormPrior(scale, ranked=True), start=first if given_start else None
        )
        every = torch.cat(first)
        m = torch.bincount(every[every != NEW], minlength=num_atoms)
        weights = (torch.arange(num_atoms + 1) + 1.0 - free).clamp(min=0).double().sqrt()
        norm = torch.empty(num_atoms, dtype=torch.float64)
        norm[m.argsort(descending=True, stable=True)] = scale * weights[:-1]
        alone = scale * float(weights[-1])
        assert result.relaxation == pytest.approx(reference(cost, norm, alone), rel=1e-5)
        assert result.dual <= result.relaxation
        assert result.duality_gap < 1e-5
        assert result.bound == -math.inf
        check_soft(cost, result, norm, alone)

    @pytest.mark.parametrize("name", ["ragged", "single components", "identical", "larger"])
    def test_parametric(self, name):
        cost = CASES[name]
        num_atoms = len(cost[0])
        result = relaxed(cost, FixedAtoms(num_atoms))
        norm = torch.zeros(num_atoms, dtype=torch.float64)
        optimum = reference(cost, norm, math.inf)
        assert result.objective == result.bound == result.relaxation
        assert result.objective == pytest.approx(optimum, rel=1e-6)
        check_soft(cost, result, norm, math.inf)


@pytest.mark.parametrize(
    "prior", [GroupNormPrior(), GroupNormPrior(0.3), GroupNormPrior(0.0), FixedAtoms(3)]
)
@pytest.mark.parametrize("seed", range(4))
def test_bound_is_below_every_assignment(prior, seed):
    cost = random_costs(seed, 3, [3, 2, 3])
    lowest = lowest_objective(cost, prior, torch.zeros(3, dtype=torch.float64))
    result = relaxed(cost, prior)
    assert result.bound <= lowest + 1e-9
    assert lowest <= result.objective + 1e-9
    assert result.objective <= lowest * 1.05


@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    num_atoms=st.integers(1, 7),
    scale=st.sampled_from([1e-3, 0.1, 0.7, 3.0, 100.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_closes_the_gap_and_is_no_worse_than_coordinate(seed, sizes, num_atoms, scale, dtype):
    cost = [c.to(dtype) for c in random_costs(seed, num_atoms, sizes)]
    prior = GroupNormPrior(scale)
    result = relaxed(cost, prior)
    assert result.converged and result.duality_gap <= 1e-6
    assert result.bound <= result.relaxation
    assert result.objective <= coordinate(cost, prior).objective + 1e-9
    assert result.objective == pytest.approx(assignment_objective(cost, prior, result.atoms))
    norm = torch.full((num_atoms,), scale, dtype=torch.float64)
    check_soft(cost, result, norm, scale)
    assert all(p.dtype == dtype for p in result.soft)
    for a in result.atoms:
        standing = a[a != NEW]
        assert len(standing.unique()) == len(standing)


@given(seed=st.integers(0, 10_000), size=st.floats(0, 3), scale=st.sampled_from([0.3, 1.0, 4.0]))
def test_any_multipliers_give_a_bound(seed, size, scale):
    cost = CASES["ragged"]
    problem = AssignmentProblem.of(cost, GroupNormPrior(scale))
    programme = module._Relaxation.of(problem, torch.zeros(6, dtype=torch.long))
    generator = torch.Generator().manual_seed(seed)
    y = size * torch.randn(24, generator=generator, dtype=torch.float64)
    z = size * torch.rand(24, generator=generator, dtype=torch.float64)
    point = Point(p=y, y=y, z=z, primal=0.0, dual=0.0)
    bound, _ = programme._certify(point, 1.0)
    assert bound <= relaxed(cost, GroupNormPrior(scale)).relaxation


@pytest.mark.parametrize("scale", [0.5, 2.0, 20.0])
def test_entries_left_out_are_brought_back(monkeypatch, scale):
    cost = [c**2 for c in random_costs(0, 30, [10, 7, 12, 10])]
    whole = relaxed(cost, GroupNormPrior(scale))
    monkeypatch.setattr(module, "_MAX_ENTRIES", 60)
    monkeypatch.setattr(module, "_MAX_PART", 0.0)
    monkeypatch.setattr(module, "_MAX_NUMBERS", 100)
    parts = relaxed(cost, GroupNormPrior(scale))
    assert parts.converged
    assert parts.iterations > whole.iterations
    assert parts.relaxation == pytest.approx(whole.relaxation, rel=2e-6)
    assert parts.dual == pytest.approx(whole.dual, rel=2e-6)


@pytest.mark.parametrize("parties_at_once", [1, 2, 5])
def test_parties_spread_out_a_few_at_a_time(monkeypatch, parties_at_once):
    num_atoms, sizes = 12, [5, 3, 7, 4, 6]
    cost = random_costs(0, num_atoms, sizes)
    whole = relaxed(cost, GroupNormPrior())
    monkeypatch.setattr(interior, "_MAX_NUMBERS", parties_at_once * num_atoms * max(sizes))
    parts = relaxed(cost, GroupNormPrior())
    assert parts.iterations == whole.iterations
    assert parts.relaxation == pytest.approx(whole.relaxation, rel=1e-9)
    assert parts.dual == pytest.approx(whole.dual, rel=1e-9)


def test_spread_puts_each_entry_into_its_place(monkeypatch):
    num_atoms, parties, width = 4, 5, 3
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(num_atoms, parties, width, generator=generator) < 0.4
    atom, party, place = present.nonzero(as_tuple=True)
    x = torch.rand(len(atom), generator=generator, dtype=torch.float64)
    programme = Programme(
        x,
        atom * parties + party,
        party * width + place,
        torch.ones(num_atoms),
        torch.ones(parties * width),
        parties,
    )
    monkeypatch.setattr(interior, "_MAX_NUMBERS", 2 * num_atoms * width)
    for values in (x, -x):
        blocks = [block.clone() for block in programme.spread(values)]
        assert [len(block) for block in blocks] == [2, 2, 1]
        expected = torch.zeros(num_atoms, parties, width, dtype=torch.float64)
        expected[present] = values
        assert torch.equal(torch.cat(blocks), expected.transpose(0, 1))


def test_rounding_finds_what_coordinate_alone_does_not():
    generator = torch.Generator().manual_seed(0)
    truth = 5 * torch.randn(8, 2, generator=generator, dtype=torch.float64)
    cost = []
    for _ in range(5):
        own = truth[torch.randperm(8, generator=generator)[:5]]
        noise = 0.1 * torch.randn(own.shape, generator=generator, dtype=torch.float64)
        cost.append(torch.cdist(truth, own + noise) ** 2)
    # From new atoms only, no party alone gains by moving to an atom that nobody has.
    start = [torch.full((5,), NEW) for _ in cost]
    result = relaxed(cost, GroupNormPrior(), start=start)
    assert result.gap < 0.01
    assert result.objective < 0.7 * coordinate(cost, GroupNormPrior(), start=start).objective


@pytest.mark.parametrize("seed", [1, 2])
def test_converges_where_the_objective_is_about_zero(seed):
    cost = random_costs(seed, 8, [5, 4, 6])
    low, high = -3.0, 3.0
    for _ in range(60):  # the shift at which the optimum is zero
        shift = (low + high) / 2
        result = relaxed([c + shift for c in cost], GroupNormPrior(0.3))
        assert result.converged
        assert result.relaxation - result.dual <= 1e-6 * max(0.3, abs(result.relaxation))
        low, high = (shift, high) if result.relaxation < 0 else (low, shift)
    assert abs(result.relaxation) < 1e-5


def test_nothing_worth_sharing_needs_no_iteration():
    cost = [10 + c for c in random_costs(0, 4, [3, 2])]
    result = relaxed(cost, GroupNormPrior(1.0))
    assert result.iterations == 0 and result.converged
    assert result.objective == result.relaxation == result.bound == 5.0


def test_stopped_early_it_says_so_and_the_bound_holds():
    cost = CASES["larger"]
    result = relaxed(cost, GroupNormPrior(), max_iterations=2)
    assert result.iterations == 2
    assert not result.converged
    assert result.bound <= relaxed(cost, GroupNormPrior()).relaxation <= result.relaxation


def test_same_problem_same_bits():
    first, second = (relaxed(CASES["larger"], GroupNormPrior()) for _ in "ab")
    assert first.relaxation == second.relaxation
    assert all(torch.equal(a, b) for a, b in zip(first.soft, second.soft, strict=True))


class TestBadInput:
    def test_prior(self):
        with pytest.raises(ParameterError, match="needs a GroupNormPrior or FixedAtoms, got"):
            relaxed(CASES["ragged"], IndianBuffetPrior())

    def test_opening(self):
        cost = CASES["ragged"]
        with pytest.raises(ParameterError, match="takes no opening costs"):
            relaxed(cost, GroupNormPrior(), opening=torch.ones(6))
        assert relaxed(cost, GroupNormPrior(), opening=torch.zeros(6)).converged

    def test_two_components_with_one_atom(self):
        cost = [torch.tensor([[0.0, 0.0], [torch.inf, torch.inf], [torch.inf, torch.inf]])]
        with pytest.raises(ParameterError, match="every assignment has infinite cost"):
            relaxed(cost, FixedAtoms(3))
        assert relaxed(cost, GroupNormPrior()).atoms[0].tolist() == [NEW, NEW]


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_cuda_gives_the_same_result(name):
    here = relaxed(CASES[name], GroupNormPrior(1.0))
    there = relaxed([c.cuda() for c in CASES[name]], GroupNormPrior(1.0))
    assert there.relaxation == pytest.approx(here.relaxation, rel=2e-6)
    assert there.dual == pytest.approx(here.dual, rel=2e-6)
    assert there.soft[0].device.type == "cuda"
