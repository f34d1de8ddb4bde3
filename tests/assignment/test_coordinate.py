# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The coordinate solver, against enumeration of all assignments."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_fusion import GroupNorm, IndianBuffet, ParameterError, Parametric, StructureError
from pyro_fusion.assignment import NEW, assignment_objective, coordinate, match

PRIORS = [IndianBuffet(), IndianBuffet(0.1), GroupNorm(), GroupNorm(0.3), Parametric(3)]


def one_party(num_atoms: int, size: int, new_atoms: bool) -> list[list[int]]:
    """All ways to give ``size`` components different atoms, or new ones."""
    choices = range(NEW if new_atoms else 0, num_atoms)
    result = []
    for a in itertools.product(choices, repeat=size):
        standing = [k for k in a if k != NEW]
        if len(set(standing)) == len(standing):
            result.append(list(a))
    return result


def brute_force(cost, prior, opening) -> float:
    """The lowest F over all assignments of all parties, by enumeration."""
    num_atoms = cost[0].shape[0]
    penalty, new_atoms = prior.penalty(len(cost)), prior.num_atoms is None
    options = []
    for c in cost:
        rows = []
        for a in one_party(num_atoms, c.shape[1], new_atoms):
            used = torch.zeros(num_atoms)
            value = 0.0
            for component, k in enumerate(a):
                if k == NEW:
                    value += float(penalty[1])
                else:
                    used[k] += 1
                    value += float(c[k, component])
            rows.append((value, used))
        values = torch.tensor([r[0] for r in rows], dtype=torch.float64)
        options.append((values, torch.stack([r[1] for r in rows])))
    value, used = options[0]
    for v, u in options[1:]:
        value = (value[:, None] + v).flatten()
        used = (used[:, None] + u).flatten(0, 1)
    m = used.long()
    total = value + penalty[m].sum(1) + (opening * (m > 0)).sum(1)
    return float(total.min())


def random_costs(seed: int, num_atoms: int, sizes: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.rand(num_atoms, n, generator=generator, dtype=torch.float64) for n in sizes]


@pytest.mark.parametrize("prior", PRIORS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_equals_enumeration(prior, seed):
    cost = random_costs(seed, 3, [3, 3, 3])
    opening = torch.zeros(3, dtype=torch.float64)
    result = coordinate(cost, prior, restarts=40)
    assert result.objective == pytest.approx(brute_force(cost, prior, opening), abs=1e-9)
    assert result.converged


@pytest.mark.parametrize("seed", range(3))
def test_equals_enumeration_with_opening_costs_and_ragged_parties(seed):
    cost = random_costs(seed, 4, [1, 3, 2])
    opening = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    result = coordinate(cost, IndianBuffet(), opening=opening, restarts=40)
    expected = brute_force(cost, IndianBuffet(), opening)
    assert result.objective == pytest.approx(expected, abs=1e-9)


@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    num_atoms=st.integers(4, 6),
    prior=st.sampled_from([IndianBuffet(), GroupNorm(0.7), Parametric(6)]),
)
def test_result_is_feasible_and_no_worse_than_its_start(seed, sizes, num_atoms, prior):
    cost = random_costs(seed, num_atoms, sizes)
    start = [torch.randperm(num_atoms)[:n] for n in sizes]
    before = assignment_objective(cost, prior, start)
    result = coordinate(cost, prior, start=start)
    assert result.objective <= before + 1e-9
    assert result.objective == pytest.approx(assignment_objective(cost, prior, result.atoms))
    for a, n in zip(result.atoms, sizes, strict=True):
        standing = a[a != NEW]
        assert len(a) == n
        assert len(standing.unique()) == len(standing)
        assert prior.num_atoms is None or bool((a != NEW).all())


def test_same_seed_same_bits():
    cost = random_costs(0, 5, [4, 4, 4, 4])
    first, second = (coordinate(cost, GroupNorm(), restarts=5, seed=3) for _ in "ab")
    assert first.objective == second.objective
    assert all(torch.equal(a, b) for a, b in zip(first.atoms, second.atoms, strict=True))


def test_infinite_cost_forbids():
    cost = [torch.tensor([[0.0, 0.0], [torch.inf, 1.0]], dtype=torch.float64)]
    result = coordinate(cost, Parametric(2))
    assert result.atoms[0].tolist() == [0, 1]


def test_match_with_limited_room():
    cost = torch.tensor([[1.0, 5.0, 9.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
    assert match(cost, 2.0).tolist() == [0, NEW, NEW]
    assert match(cost, 2.0, room=1).tolist().count(NEW) == 1
    assert match(cost, 2.0, room=1)[0] == 0


class TestBadInput:
    def test_no_party(self):
        with pytest.raises(StructureError, match="at least one party"):
            coordinate([], GroupNorm())

    def test_ragged_atoms(self):
        with pytest.raises(StructureError, match=r"party 1: expected costs of shape \[2, L\]"):
            coordinate([torch.zeros(2, 1), torch.zeros(3, 1)], GroupNorm())

    def test_too_few_atoms(self):
        with pytest.raises(StructureError, match="party 0 has 3 components, but there are only 2"):
            coordinate([torch.zeros(2, 3)], Parametric(2))

    @pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
    def test_nan(self, bad):
        with pytest.raises(ParameterError, match="party 0: costs must not be NaN"):
            coordinate([torch.full((1, 1), bad)], GroupNorm())

    def test_all_forbidden(self):
        cost = [torch.full((2, 1), torch.inf)]
        with pytest.raises(ParameterError, match="party 0: every assignment"):
            coordinate(cost, Parametric(2), start=[torch.tensor([0])])
