# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Coordinate ascent: against enumeration of all partitions, and F never rises."""

import functools
import itertools

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_fusion import FixedAtoms, GroupNormPrior, IndianBuffetPrior
from pyro_fusion.families import Factor
from pyro_fusion.fusion.ascent import expectation_maximization
from pyro_fusion.fusion.moves import rematch
from pyro_fusion.fusion.seeding import starts
from pyro_fusion.pooling import pooling_named
from pyro_fusion.pooling.components import Components, compact
from tests.families.members import BARE
from tests.pooling.priors import prior_of

POOLINGS = ["inclusive", "exclusive", "product"]
SMALL_PRIORS = [
    IndianBuffetPrior(1.0),
    IndianBuffetPrior(0.3),
    GroupNormPrior(0.5),
    FixedAtoms(3),
    FixedAtoms(4),
]


@functools.cache
def partitions(num_parties: int, size: int) -> list[tuple[int, ...]]:
    """All groupings of the components in which no group has two components of a party."""
    result = [((), 0)]
    for _ in range(num_parties):
        longer = []
        for groups, count in result:
            for a in itertools.product(range(-1, count), repeat=size):
                standing = [k for k in a if k >= 0]
                if len(set(standing)) == len(standing):
                    fresh = itertools.count(count)
                    own = tuple(next(fresh) if k < 0 else k for k in a)
                    longer.append((groups + own, max(count, *(k + 1 for k in own))))
        result = longer
    return [groups for groups, _ in result]


def enumerated(problem: Components, prior) -> float:
    """The lowest F over all partitions; the value of each possible group is computed once."""
    all_groups = partitions(problem.num_parties, problem.sizes[0])
    members: dict[tuple[int, ...], int] = {}
    for groups in all_groups:
        for k in range(max(groups) + 1):
            members.setdefault(tuple(n for n, g in enumerate(groups) if g == k), len(members))
    index = torch.tensor([n for group in members for n in group])
    group = torch.tensor([k for m, k in members.items() for _ in m])
    copies = problem.take(index)
    atoms = copies.barycenter(group, len(members))
    value = copies.opening(atoms).index_add(
        0, group, copies.cost(atoms)[group, torch.arange(len(index))]
    )
    penalty = prior.penalty(problem.num_parties)
    value = value + penalty[torch.tensor([len(m) for m in members])]
    best = float("inf")
    for groups in all_groups:
        count = max(groups) + 1
        if prior.num_atoms is None or count <= prior.num_atoms:
            parts: list[list[int]] = [[] for _ in range(count)]
            for n, k in enumerate(groups):
                parts[k].append(n)
            best = min(best, sum(float(value[members[tuple(p)]]) for p in parts))
    return best + prior.constant(problem.num_parties)


def gaussian_problem(seed: int, pooling: str, spread: float) -> Components:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    loc = (3 * randn(3, 2)).repeat(3, 1) + spread * randn(9, 2)
    local = Factor.of(dist.Normal(loc, randn(9, 2).abs() + 0.5).to_event(1))
    base = Factor.of(dist.Normal(torch.zeros(1, 2).double(), 8.0).to_event(1))
    how = pooling_named(pooling)
    return Components(
        {"x": local},
        (3, 3, 3),
        torch.ones(9).double(),
        how,
        {"x": base} if how.needs_prior else {},
        1.0 if how.needs_prior else 4.0,
    )


def search(problem, prior, restarts=39):
    return min(
        (expectation_maximization(problem, prior, s) for s in starts(problem, prior, restarts, 0)),
        key=lambda r: r.objective[-1],
    )


def test_number_of_partitions():
    # Two parties of n components: sum over matchings, Σ_k C(n,k)² k!.
    assert len(partitions(2, 3)) == 1 + 9 + 18 + 6
    assert len(partitions(3, 1)) == 5  # Bell number of 3


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("prior", SMALL_PRIORS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_equals_enumeration(pooling, prior, seed):
    problem = gaussian_problem(seed, pooling, spread=(0.4, 1.5)[seed % 2])
    best = enumerated(problem, prior)
    assert search(problem, prior).objective[-1] == pytest.approx(best, rel=1e-8, abs=1e-8)


@given(
    name=st.sampled_from(sorted(BARE)),
    pooling=st.sampled_from(POOLINGS),
    prior=st.sampled_from(
        [
            IndianBuffetPrior(1.0),
            IndianBuffetPrior(None),
            GroupNormPrior(),
            GroupNormPrior(5.0),
            FixedAtoms(6),
        ]
    ),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    dispersion=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_objective_never_rises(name, pooling, prior, sizes, dispersion, seed):
    count = sum(sizes)
    local = Factor.of(BARE[name][0](torch.arange(100 * seed, 100 * seed + count)))
    how = pooling_named(pooling)
    base = {"x": prior_of(name, local)} if how.needs_prior else {}
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(sizes), generator=generator, dtype=torch.float64) + 0.1
    if how.needs_prior:
        weights = torch.ones(len(sizes), dtype=torch.float64)  # they are in the messages
    problem = Components(
        {"x": local},
        tuple(sizes),
        weights.repeat_interleave(torch.tensor(sizes)),
        how,
        base,
        1.0 if how.needs_prior else dispersion,
    )
    start = torch.cat([torch.randperm(6, generator=generator)[:n] for n in sizes])
    result = expectation_maximization(problem, prior, start)
    trace = torch.tensor(result.objective, dtype=torch.float64)
    assert torch.isfinite(trace).all()
    assert (trace.diff() <= 0).all()
    # An assignment is feasible, and F is that of the state that came back.
    for part in result.groups.split(sizes):
        assert len(part.unique()) == len(part)
    if prior.num_atoms is not None:
        assert result.num_atoms <= prior.num_atoms
    again = expectation_maximization(
        problem, result.assignment_prior, result.groups, collapsed=False
    )
    assert again.objective[0] == pytest.approx(result.objective[-1], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_rematching_leaves_a_poor_optimum(pooling):
    # Two parties see the same three atoms; everything starts in groups of its own.
    problem = gaussian_problem(0, pooling, spread=0.1)
    prior = GroupNormPrior()
    cost = problem.cost(problem.barycenter(torch.arange(9), 9))
    groups, count = compact(rematch(problem, prior, torch.arange(9), 9, cost))
    assert count == 3
    assert torch.equal(groups[:3], groups[3:6])
    assert torch.equal(groups[:3], groups[6:])


def test_rematching_in_parts_gives_the_same(monkeypatch):
    problem = gaussian_problem(0, "inclusive", spread=0.1)
    cost = problem.cost(problem.barycenter(torch.arange(9), 9))
    whole = rematch(problem, GroupNormPrior(), torch.arange(9), 9, cost)
    monkeypatch.setattr("pyro_fusion.pooling.collapsed._NUMBERS", 1)
    assert torch.equal(rematch(problem, GroupNormPrior(), torch.arange(9), 9, cost), whole)


@pytest.mark.cuda
@pytest.mark.parametrize("pooling", POOLINGS)
def test_cuda_gives_the_same_result(pooling):
    problem = gaussian_problem(1, pooling, spread=0.4)
    moved = Components(
        {"x": problem.local["x"].to("cuda")},
        problem.sizes,
        problem.weights.cuda(),
        problem.pooling,
        {k: f.to("cuda") for k, f in problem.prior.items()},
        problem.dispersion,
    )
    here, there = (search(p, GroupNormPrior(), 3) for p in (problem, moved))
    assert here.objective[-1] == pytest.approx(there.objective[-1], rel=1e-9)
    assert next(iter(there.atoms.values())).device.type == "cuda"
