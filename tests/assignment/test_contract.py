# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What every solver satisfies, and the solvers against each other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_fusion import (
    FixedAtoms,
    GroupNormPrior,
    IndianBuffetPrior,
    ParameterError,
    StructureError,
)
from pyro_fusion.assignment import (
    NEW,
    assignment_objective,
    coordinate,
)
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.testing import check_solver
from pyro_fusion.testing.solver import lowest_objective
from tests.assignment.problems import random_costs
from tests.assignment.solvers import SOLVERS, every_solver, solve

GROUP_NORMS = [GroupNormPrior(), GroupNormPrior(0.3), GroupNormPrior(0.5, ranked=True)]
# With a fixed number of atoms it is that of the problem: None stands for it.
FOR_SOLVER: dict[str, list[AssignmentPrior | None]] = {
    "coordinate": [*GROUP_NORMS, IndianBuffetPrior(1.0), IndianBuffetPrior(0.1), None],
    "relaxed": [*GROUP_NORMS, None],
    "sinkhorn": [*GROUP_NORMS, IndianBuffetPrior(1.0), IndianBuffetPrior(0.1), None],
}
CASES = [(name, prior) for name in SOLVERS for prior in FOR_SOLVER[name]]
every_case = pytest.mark.parametrize(
    ("name", "prior"), CASES, ids=[f"{n}-{p or 'FixedAtoms'}" for n, p in CASES]
)

sizes_of = st.lists(st.integers(1, 4), min_size=1, max_size=5)
seeds = st.integers(0, 10_000)


def random_start(seed, num_atoms, sizes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(num_atoms, generator=generator)[:n] for n in sizes]


@every_case
class TestContract:
    def test_it_holds(self, name, prior):
        check_solver(SOLVERS[name], [prior or FixedAtoms(1)], opening=name != "relaxed")

    @pytest.mark.parametrize("seed", range(3))
    def test_without_a_start_it_is_between_bound_and_best(self, name, prior, seed):
        cost = random_costs(seed, 3, [3, 1, 2, 3])
        best = lowest_objective(cost, prior or FixedAtoms(3))
        result = solve(name, cost, prior)
        assert result.bound <= best + 1e-9
        assert best <= result.objective + 1e-9

    def test_same_input_same_bits(self, name, prior):
        cost = random_costs(0, 6, [4, 2, 6, 5])
        first, second = (solve(name, cost, prior) for _ in "ab")
        assert first.objective == second.objective
        for a, b in zip(first.atoms, second.atoms, strict=True):
            assert torch.equal(a, b)
        for p, q in zip(first.soft or [], second.soft or [], strict=True):
            assert torch.equal(p, q)

    @pytest.mark.parametrize("seed", range(3))
    def test_order_does_not_matter(self, name, prior, seed):
        sizes = [4, 2, 6, 1, 5]
        cost = random_costs(seed, 6, sizes)
        generator = torch.Generator().manual_seed(seed)
        parties = torch.randperm(5, generator=generator).tolist()
        atoms = torch.randperm(6, generator=generator)
        components = [torch.randperm(sizes[s], generator=generator) for s in parties]
        permuted = [cost[s][atoms][:, i] for s, i in zip(parties, components, strict=True)]
        here, there = solve(name, cost, prior), solve(name, permuted, prior)
        assert there.objective == pytest.approx(here.objective, rel=1e-9)
        for s, i, a in zip(parties, components, there.atoms, strict=True):
            assert torch.equal(torch.where(a == NEW, NEW, atoms[a]), here.atoms[s][i])

    def test_float32(self, name, prior):
        cost = random_costs(1, 6, [4, 2, 6, 5])
        single = solve(name, [c.float() for c in cost], prior)
        double = solve(name, [c.float().double() for c in cost], prior)
        assert single.objective == pytest.approx(double.objective, rel=1e-5)

    @pytest.mark.parametrize("far", [1e12, torch.inf])
    def test_a_party_with_nothing_in_common(self, name, prior, far):
        cost = random_costs(4, 4, [3, 3, 3])
        if prior is None and far == torch.inf:
            with pytest.raises(ParameterError, match="party 3: every assignment"):
                solve(name, [*cost, torch.full((4, 2), far)], prior)
            return
        result = solve(name, [*cost, torch.full((4, 2), far).double()], prior)
        if prior is not None:
            assert (result.atoms[3] == NEW).all()

    def test_one_component_each(self, name, prior):
        cost = random_costs(5, 3, [1] * 5)
        best = lowest_objective(cost, prior or FixedAtoms(3))
        assert best - 1e-9 <= solve(name, cost, prior).objective <= 1.2 * best

    def test_one_atom(self, name, prior):
        cost = [c[:1] for c in random_costs(6, 3, [1, 1, 1] if prior is None else [1, 3, 2])]
        best = lowest_objective(cost, prior or FixedAtoms(1))
        assert solve(name, cost, prior).objective == pytest.approx(best)

    def test_no_standing_atom(self, name, prior):
        cost = [torch.zeros(0, 2), torch.zeros(0, 3)]
        if prior is None:
            with pytest.raises(StructureError, match="party 0 has 2 components, but there are"):
                SOLVERS[name](cost, FixedAtoms(2))
            return
        result = SOLVERS[name](cost, prior)
        assert [a.tolist() for a in result.atoms] == [[NEW] * 2, [NEW] * 3]
        new = [torch.full((n,), NEW) for n in (2, 3)]
        assert result.objective == pytest.approx(assignment_objective(cost, prior, new))

    def test_a_party_without_components(self, name, prior):
        cost = random_costs(7, 4, [2, 0, 3])
        assert len(solve(name, cost, prior).atoms[1]) == 0

    @settings(max_examples=20)
    @given(seed=seeds, sizes=sizes_of, extra=st.integers(0, 2), forbidden=st.floats(0, 0.6))
    def test_any_problem(self, name, prior, seed, sizes, extra, forbidden):
        num_atoms = max(sizes) + extra
        cost = random_costs(seed, num_atoms, sizes)
        generator = torch.Generator().manual_seed(seed)
        start = random_start(seed, num_atoms, sizes)
        for c, a in zip(cost, start, strict=True):
            gone = torch.rand(c.shape, generator=generator) < forbidden
            gone[a, torch.arange(len(a))] = False  # the start is allowed
            c[gone] = torch.inf
        result = solve(name, cost, prior, start=start)
        prior = prior or FixedAtoms(num_atoms)
        assert result.objective <= assignment_objective(cost, prior, start) + 1e-9
        assert math.isfinite(solve(name, cost, prior).objective)


@pytest.mark.parametrize(("num_atoms", "sizes"), [(500, [100] * 20), (250, [2] * 2000)])
@pytest.mark.parametrize("prior", [GroupNormPrior(), None], ids=str)
@every_solver
def test_a_million_entries_of_any_size(name, prior, num_atoms, sizes):
    # Of twenty orders of magnitude, half of them forbidden.
    generator = torch.Generator().manual_seed(0)
    cost = []
    for n in sizes:
        c = 10 ** (20 * torch.rand(num_atoms, n, generator=generator, dtype=torch.float64) - 8)
        c[torch.rand(c.shape, generator=generator) < 0.5] = torch.inf
        c[torch.arange(n), torch.arange(n)] = 1e12
        cost.append(c)
    limit: dict[str, dict[str, float]] = {
        "relaxed": {"tolerance": 1e-3},
        "sinkhorn": {"temperature": 1.0, "max_iterations": 10},
    }
    result = solve(name, cost, prior, **limit.get(name, {}))
    assert math.isfinite(result.objective)
    assert result.converged or name != "relaxed"


@given(
    seed=seeds,
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    prior=st.sampled_from([*GROUP_NORMS, None]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_solvers_agree(seed, sizes, prior, scale):
    cost = [scale * c for c in random_costs(seed, 3, sizes)]
    results = [solve(name, cost, prior) for name in SOLVERS]
    many = coordinate(cost, prior or FixedAtoms(3), restarts=40)
    lowest = min(r.objective for r in results)
    assert all(r.bound <= lowest + 1e-9 for r in results)
    if prior is not GROUP_NORMS[2]:  # with ranks, restarts do not find all
        assert many.objective <= lowest + 1e-9
    else:
        assert many.objective <= 1.1 * lowest + 1e-9


@given(seed=seeds, sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3))
@pytest.mark.parametrize("name", ["coordinate", "sinkhorn"])
def test_opening_costs(name, seed, sizes):
    cost = random_costs(seed, 3, sizes)
    opening = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    result = SOLVERS[name](cost, GroupNormPrior(), opening=opening)
    assert result.objective >= lowest_objective(cost, GroupNormPrior(), opening) - 1e-9
    value = assignment_objective(cost, GroupNormPrior(), result.atoms, opening)
    assert result.objective == pytest.approx(value)
