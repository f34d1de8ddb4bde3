# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The coordinate solver, against enumeration of all assignments."""

import importlib
import math

import pytest
import torch

from pyro_fusion import FixedAtoms, GroupNormPrior, IndianBuffetPrior
from pyro_fusion.assignment import NEW, assignment_objective, coordinate, match
from pyro_fusion.testing.solver import lowest_objective
from tests.assignment.problems import PRIORS, RANKED, random_costs

# By name: the package has functions of these names too.
MODULES = [
    importlib.import_module(f"pyro_fusion.assignment.{name}") for name in ("descent", "transfers")
]


@pytest.mark.parametrize("prior", PRIORS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_equals_enumeration(prior, seed):
    cost = random_costs(seed, 3, [3, 3, 3])
    result = coordinate(cost, prior, restarts=40)
    assert result.objective == pytest.approx(lowest_objective(cost, prior), abs=1e-9)
    assert result.converged


def test_mostly_equals_enumeration_with_ranks():
    # A party is not given its best assignment, since the ranks that this would change are held.
    equal = []
    for seed in range(20):
        cost = random_costs(seed, 3, [3, 3, 3] if seed % 2 else [1, 3, 2])
        best = lowest_objective(cost, RANKED)
        result = coordinate(cost, RANKED, restarts=40)
        assert result.objective >= best - 1e-9
        equal.append(result.objective <= best + 1e-9)
    assert sum(equal) >= 0.8 * len(equal)


@pytest.mark.parametrize("prior", [*PRIORS, RANKED, GroupNormPrior(2.0, ranked=True)], ids=str)
@pytest.mark.parametrize("seed", range(10))
def test_never_rises(prior, seed):
    sizes = [3, 1, 2, 3]
    cost = [c.square() for c in random_costs(seed, 3, sizes)]
    start = [torch.randperm(3)[:n] for n in sizes]
    if prior.num_atoms is None:
        start[seed % 4][:] = NEW
    trace = [assignment_objective(cost, prior, start)]
    trace += [
        coordinate(cost, prior, start=start, moves=m, max_sweeps=n).objective
        for m in (False, True)
        for n in range(1, 6)
    ]
    assert (torch.tensor(trace, dtype=torch.float64).diff()[:5] <= 1e-9).all()
    assert (torch.tensor(trace, dtype=torch.float64)[[0, *range(6, 11)]].diff() <= 1e-9).all()


@pytest.mark.parametrize(
    "prior", [GroupNormPrior(), GroupNormPrior(5.0), IndianBuffetPrior(1.0)], ids=str
)
def test_default_start_opens_standing_atoms(prior):
    # From new atoms only, no party alone gains by opening one.
    generator = torch.Generator().manual_seed(0)
    truth = 5 * torch.randn(8, 2, generator=generator, dtype=torch.float64)
    seen = [torch.randperm(8, generator=generator)[:5] for _ in range(5)]
    cost = [0.1 + torch.cdist(truth, truth[i]) ** 2 for i in seen]
    new = [torch.full((5,), NEW) for _ in seen]
    stuck = coordinate(cost, prior, start=new)
    assert all(bool((a == NEW).all()) for a in stuck.atoms)
    found = coordinate(cost, prior)
    assert found.objective < 0.7 * stuck.objective


def test_default_start_is_no_worse_than_new_atoms():
    for seed in range(20):
        cost = [10 * c for c in random_costs(seed, 5, [2, 3])]
        assert coordinate(cost, GroupNormPrior(0.5), max_sweeps=1).objective <= 2.5 + 1e-9


def test_leaves_a_forbidden_start():
    cost = [torch.tensor([[torch.inf, 1.0], [2.0, torch.inf]], dtype=torch.float64)] * 2
    start = [torch.tensor([0, 1]), torch.tensor([1, 0])]
    for prior in (FixedAtoms(2), GroupNormPrior(), GroupNormPrior(ranked=True)):
        assert math.isfinite(coordinate(cost, prior, start=start).objective)


@pytest.mark.parametrize("chunk", [1, 50])
def test_parts_do_not_matter(monkeypatch, chunk):
    cost = random_costs(0, 8, [5, 1, 8, 6])
    whole = coordinate(cost, GroupNormPrior())
    for module in MODULES:
        monkeypatch.setattr(module, "MAX_NUMBERS", chunk)
    assert torch.equal(torch.cat(coordinate(cost, GroupNormPrior()).atoms), torch.cat(whole.atoms))


@pytest.mark.parametrize("prior", [GroupNormPrior(1.0), IndianBuffetPrior(0.1)], ids=str)
def test_a_merge_no_party_would_begin(prior):
    cost = [torch.tensor([[0.0], [0.1]], dtype=torch.float64)] * 3
    cost += [torch.tensor([[0.1], [0.0]], dtype=torch.float64)] * 3
    start = [torch.tensor([int(s >= 3)]) for s in range(6)]
    assert coordinate(cost, prior, start=start, moves=False).objective > 2.0 * 3**0.5 - 1e-9
    merged = torch.cat(coordinate(cost, prior, start=start).atoms)
    assert len(merged.unique()) == 1


@pytest.mark.parametrize("seed", range(3))
def test_equals_enumeration_with_opening_costs_and_ragged_parties(seed):
    cost = random_costs(seed, 4, [1, 3, 2])
    opening = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    result = coordinate(cost, IndianBuffetPrior(1.0), opening=opening, restarts=40)
    expected = lowest_objective(cost, IndianBuffetPrior(1.0), opening)
    assert result.objective == pytest.approx(expected, abs=1e-9)


def test_infinite_cost_forbids():
    cost = [torch.tensor([[0.0, 0.0], [torch.inf, 1.0]], dtype=torch.float64)]
    result = coordinate(cost, FixedAtoms(2))
    assert result.atoms[0].tolist() == [0, 1]


def test_match_with_limited_room():
    cost = torch.tensor([[1.0, 5.0, 9.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
    assert match(cost, 2.0).tolist() == [0, NEW, NEW]
    assert match(cost, 2.0, room=1).tolist().count(NEW) == 1
    assert match(cost, 2.0, room=1)[0] == 0
