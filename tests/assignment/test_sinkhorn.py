# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The entropic solver: against a convex solver at a temperature, against linear assignment and
enumeration when annealed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from pyro_fusion import FixedAtoms, GroupNormPrior, IndianBuffetPrior, ParameterError
from pyro_fusion.assignment import NEW, assignment_objective, coordinate
from pyro_fusion.assignment.problem import AssignmentProblem
from pyro_fusion.assignment.sinkhorn import SoftAssignment, sinkhorn, soft_assignment
from pyro_fusion.testing.solver import lowest_objective
from tests.assignment.problems import PRIORS, RANKED, random_costs


def solve(cost, prior, temperature=0.3, opening=None, start=None) -> SoftAssignment:
    problem = AssignmentProblem.of(cost, prior, opening)
    result = soft_assignment(problem, temperature, start, tolerance=1e-9, max_iterations=20_000)
    assert result.converged
    return result


def convex(cost, temperature, new=None):
    """The entropic programme of one party, by an interior-point solver; costs have the prices."""
    import cvxpy as cp  # takes a while: only where it is needed

    cost = cost.clamp(max=100)  # an infinity by far
    p = cp.Variable(cost.shape, nonneg=True)
    u = cp.Variable(cost.shape[1], nonneg=True)
    value = cp.sum(cp.multiply(cost.numpy(), p)) - temperature * cp.sum(cp.entr(p))
    rules = [cp.sum(p, 0) + u == 1, cp.sum(p, 1) <= 1]
    if new is None:
        rules.append(u == 0)
    else:
        value = value + new * cp.sum(u) - temperature * cp.sum(cp.entr(u))
    cp.Problem(cp.Minimize(value), rules).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10
    )
    return torch.as_tensor(p.value)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_equals_convex_solver(seed, temperature):
    cost = random_costs(seed, 4, [4, 2, 1])
    cost[0][0, 1] = cost[1][2, 0] = torch.inf
    result = solve(cost, FixedAtoms(4), temperature)
    for c, p in zip(cost, result.soft.split([4, 2, 1], 1), strict=True):
        torch.testing.assert_close(p, convex(c, temperature), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prior", [IndianBuffetPrior(1.0), GroupNormPrior(0.7)], ids=str)
def test_is_its_own_mean_field(prior):
    sizes, temperature = [3, 1, 2], 0.3
    opening = torch.tensor([0.4, 0.0, 0.2, 0.1], dtype=torch.float64)
    cost = random_costs(1, 4, sizes)
    soft = solve(cost, prior, temperature, opening).soft.split(sizes, 1)
    phi = prior.penalty(3)
    for s, c in enumerate(cost):
        price = torch.empty(4, 1, dtype=torch.float64)
        for k in range(4):
            m = sum(float(p[k].sum()) for t, p in enumerate(soft) if t != s)
            i = int(m)
            steps = [float(phi[j + 1] - phi[j]) if j < 3 else 0.0 for j in (i, i + 1)]
            price[k] = steps[0] + (m - i) * (steps[1] - steps[0]) + opening[k] * max(0.0, 1 - m)
        expected = convex(c + price, temperature, float(phi[1]))
        torch.testing.assert_close(soft[s], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_cold_equals_linear_assignment(seed, size):
    (cost,) = random_costs(seed, 6, [size])
    result = sinkhorn([cost], FixedAtoms(6))
    row, column = linear_sum_assignment(cost)
    assert result.objective == pytest.approx(float(cost[row, column].sum()), abs=1e-9)
    assert result.soft is not None
    # Soft already, before any rounding.
    assert float((cost * result.soft[0]).sum()) == pytest.approx(result.objective, abs=0.02)


def test_mostly_equals_enumeration():
    equal = []
    for prior in PRIORS:
        for seed in range(10):
            cost = random_costs(seed, 3, [3, 3, 3] if seed % 2 else [1, 3, 2])
            opening = torch.tensor([0.5, 0.0, 1.0], dtype=torch.float64) * (seed % 3)
            best = lowest_objective(cost, prior, opening)
            result = sinkhorn(cost, prior, opening=opening)
            assert result.objective >= best - 1e-9
            equal.append(result.objective <= best + 1e-9)
    assert sum(equal) >= 0.8 * len(equal)


@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any),
    num_atoms=st.integers(4, 6),
    prior=st.sampled_from(
        [
            IndianBuffetPrior(1.0),
            GroupNormPrior(0.7),
            GroupNormPrior(0.7, ranked=True),
            FixedAtoms(6),
        ]
    ),
    temperature=st.sampled_from([None, 1e-6, 0.3, 1e6]),
    scale=st.sampled_from([1e-8, 1.0, 1e12]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_result_is_feasible_and_no_worse_than_its_start(
    seed, sizes, num_atoms, prior, temperature, scale, dtype
):
    cost = [(scale * c).to(dtype) for c in random_costs(seed, num_atoms, sizes)]
    for c in cost:
        c[:, :1][-1] = torch.inf
    start = [torch.randperm(num_atoms - 1)[:n] for n in sizes]
    if any(n == num_atoms for n in sizes):
        start = [torch.arange(n).flip(0).roll(1) for n in sizes]
        start = None if prior.num_atoms is not None else [torch.full((n,), NEW) for n in sizes]
    result = sinkhorn(cost, prior, start=start, temperature=temperature)
    assert result.objective == pytest.approx(assignment_objective(cost, prior, result.atoms))
    if start is not None:
        assert result.objective <= assignment_objective(cost, prior, start) + 1e-9 * scale
    assert result.soft is not None
    for a, p, c in zip(result.atoms, result.soft, cost, strict=True):
        standing = a[a != NEW]
        assert len(a) == c.shape[1]
        assert len(standing.unique()) == len(standing)
        assert p.shape == c.shape
        assert p.dtype == dtype
        assert bool((p >= 0).all())
        assert bool((p[c.isinf()] == 0).all())
        total = p.sum(0)
        assert bool((total <= 1 + 1e-5).all())
        if prior.num_atoms is not None:
            assert bool((a != NEW).all())
            assert bool((total >= 1 - 1e-5).all())
        assert bool((p.sum(1) <= 1 + 1.1e-3).all())


@pytest.mark.parametrize("prior", [*PRIORS, RANKED], ids=str)
def test_order_does_not_matter(prior):
    sizes, parties = [3, 1, 2], [2, 0, 1]
    cost = random_costs(4, 3, sizes)
    atoms, components = torch.tensor([1, 2, 0]), [torch.randperm(n) for n in sizes]
    there = solve([cost[s][atoms][:, components[s]] for s in parties], prior)
    soft = solve(cost, prior).soft.split(sizes, 1)
    expected = [soft[s][atoms][:, components[s]] for s in parties]
    torch.testing.assert_close(there.soft, torch.cat(expected, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("prior", [*PRIORS, RANKED], ids=str)
def test_a_warm_start_stands_still(prior):
    cost = random_costs(2, 3, [2, 3, 2])
    first = solve(cost, prior)
    again = solve(cost, prior, start=first)
    assert again.iterations == 1
    torch.testing.assert_close(again.soft, first.soft, atol=1e-8, rtol=0)


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_identical_components_are_treated_alike(prior):
    cost = [c[:, :1].repeat(1, 3) for c in random_costs(0, 3, [1, 1])]
    soft = solve(cost, prior).soft
    torch.testing.assert_close(soft[:, 1], soft[:, 0])
    atoms = sinkhorn(cost, prior).atoms
    assert all(len(a[a != NEW].unique()) == len(a[a != NEW]) for a in atoms)


def test_a_party_with_nothing_in_common():
    cost = [0.1 + 10 * (1 - torch.eye(3)), 0.1 + 10 * (1 - torch.eye(3)), torch.full((3, 2), 1e6)]
    result = sinkhorn(cost, GroupNormPrior())
    assert [a.tolist() for a in result.atoms] == [[0, 1, 2], [0, 1, 2], [NEW, NEW]]
    assert result.converged


@pytest.mark.parametrize(
    "prior", [IndianBuffetPrior(1.0), GroupNormPrior(), FixedAtoms(20)], ids=str
)
@pytest.mark.parametrize("temperature", [None, 1e-5, 1e-2, 1.0])
def test_rows_hold(prior, temperature):
    sizes = [20, 3, 16, 8, 20, 11, 1, 14, 6, 18]
    for seed in range(2):
        result = sinkhorn(random_costs(seed, 20, sizes), prior, temperature=temperature)
        for p in result.soft:
            assert float(p.sum(1).max()) <= 1 + 1.1e-3


@pytest.mark.parametrize("prior", [GroupNormPrior(), FixedAtoms(20)], ids=str)
def test_converges(prior):
    for seed in range(6):
        cost = random_costs(seed, 20, [20, 3, 16, 8, 20, 11, 1, 14, 6, 18])
        assert sinkhorn(cost, prior).converged


@pytest.mark.parametrize(
    "prior", [IndianBuffetPrior(1.0), GroupNormPrior(), FixedAtoms(6)], ids=str
)
@pytest.mark.parametrize("temperature", [1e-6, 0.1, 1.0])
@pytest.mark.parametrize("max_iterations", [1, 3, 300])
def test_rows_hold_where_all_costs_are_equal(prior, temperature, max_iterations):
    cost = [torch.ones(6, n, dtype=torch.float64) for n in (6, 2, 4, 6)]
    opening = torch.tensor([0.0, 1.0, 0.3, 2.0, 0.1, 0.7], dtype=torch.float64)
    problem = AssignmentProblem.of(cost, prior, opening)
    result = soft_assignment(problem, temperature, tolerance=0.1, max_iterations=max_iterations)
    assert result.converged or max_iterations < 300 or isinstance(prior, IndianBuffetPrior)
    for p in problem.split(result.soft):
        assert float(p.sum(1).max()) <= 1 + 1.1e-3
        if prior.num_atoms is not None:
            torch.testing.assert_close(p.sum(0), torch.ones(p.shape[1]).double())


def test_finds_what_coordinate_needs_restarts_for():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    atoms = 3 * randn(12, 2)
    seen = [torch.randperm(12, generator=generator)[:6] for _ in range(10)]
    cost = [(atoms.unsqueeze(1) - atoms[i] - randn(6, 2)).square().sum(-1) for i in seen]
    alone, many = coordinate(cost, GroupNormPrior()), coordinate(cost, GroupNormPrior(), restarts=9)
    result = sinkhorn(cost, GroupNormPrior())
    assert result.objective < alone.objective
    assert result.objective == pytest.approx(many.objective, rel=0.01)


class TestBadInput:
    @pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
    def test_temperature(self, bad):
        with pytest.raises(ParameterError, match="temperature must be positive"):
            sinkhorn([torch.ones(1, 1)], GroupNormPrior(), temperature=bad)

    @pytest.mark.parametrize("bad", [0.0, 1.0])
    def test_annealing(self, bad):
        with pytest.raises(ParameterError, match="annealing must be between 0 and 1"):
            sinkhorn([torch.ones(1, 1)], GroupNormPrior(), annealing=bad)

    def test_all_forbidden(self):
        # Both components of party 1 may only go to atom 0.
        cost = [torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [torch.inf, torch.inf]])]
        with pytest.raises(ParameterError, match="party 1: every assignment has infinite cost"):
            sinkhorn(cost, FixedAtoms(2))


@pytest.mark.cuda
@pytest.mark.parametrize("prior", [*PRIORS, RANKED], ids=str)
def test_cuda_gives_the_same_result(prior):
    cost = random_costs(3, 3, [3, 1, 2])
    here, there = sinkhorn(cost, prior), sinkhorn([c.cuda() for c in cost], prior)
    assert here.objective == pytest.approx(there.objective)
    assert here.soft is not None
    assert there.soft is not None
    for a, b in zip(here.soft, there.soft, strict=True):
        assert b.device.type == "cuda"
        torch.testing.assert_close(b.cpu(), a, atol=1e-6, rtol=0)
