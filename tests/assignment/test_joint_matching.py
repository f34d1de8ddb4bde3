# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The prior of an assignment as a distribution, against enumeration of all partitions."""

import itertools
import math
from collections import Counter

import pyro
import pytest
import torch
from pyro import poutine
from scipy.stats import chi2, poisson

from pyro_fusion import FixedAtoms, GroupNormPrior, IndianBuffetPrior
from pyro_fusion.assignment import AssignmentProblem, IndianBuffetProcess
from pyro_fusion.assignment.joint_matching import JointMatching

SIZES = [(1, 1), (2, 1), (2, 2), (3, 2), (1, 1, 1), (2, 1, 2), (3, 1, 1), (2, 2, 2)]
PRIORS = [
    IndianBuffetPrior(0.5),
    IndianBuffetPrior(3.0),
    IndianBuffetPrior(),
    GroupNormPrior(),
    GroupNormPrior(2.0),
    FixedAtoms(3),
    FixedAtoms(4),
]


def partitions(sizes, num_atoms=None):
    """All groupings ``[N]``, atoms numbered by first appearance, no two of a party in one."""
    result = [((), 0)]
    for size in sizes:
        longer = []
        for groups, count in result:
            for own in itertools.product(range(count + size), repeat=size):
                fresh = [k for k in own if k >= count]
                used = count + len(fresh)
                if len(set(own)) == size and fresh == list(range(count, used)):
                    longer.append((groups + own, used))
        result = longer
    return [groups for groups, count in result if num_atoms is None or count <= num_atoms]


def canonical(assignment):
    """The same grouping with atoms numbered by first appearance."""
    number: dict[int, int] = {}
    return tuple(number.setdefault(k, len(number)) for k in assignment)


def penalty(groups, prior, sizes):
    """``Σ_k φ(m_k)`` by a loop."""
    phi = prior.penalty(len(sizes)).tolist()
    return sum(phi[m] for m in Counter(groups).values())


def row_sums_probability(alpha, sizes):
    """P(party s has L_s atoms) in the buffet, in which the number of atoms that just a set of ``m``
    parties has is Poisson(α (m-1)! (S-m)! / S!), of each set by itself."""
    count = len(sizes)
    sets = [s for n in range(1, count + 1) for s in itertools.combinations(range(count), n)]
    total = 0.0
    for numbers in itertools.product(range(max(sizes) + 1), repeat=len(sets)):
        rows = [sum(n for n, s in zip(numbers, sets, strict=True) if i in s) for i in range(count)]
        if rows == list(sizes):
            rate = [
                alpha
                * math.factorial(len(s) - 1)
                * math.factorial(count - len(s))
                / math.factorial(count)
                for s in sets
            ]
            total += math.prod(poisson.pmf(numbers, rate))
    return total


def draw(prior, sizes, room=None):
    return JointMatching(prior, sizes, sum(sizes) if room is None else room)


def test_partitions():
    assert len(partitions((2, 2))) == 1 + 4 + 2  # Σ_k C(2,k)² k!
    assert len(partitions((1, 1, 1, 1))) == 15  # Bell number of 4


class TestDensity:
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    @pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
    def test_of_the_buffet_is_normalised(self, sizes, alpha):
        d = draw(IndianBuffetPrior(alpha), sizes)
        total = sum(math.exp(float(d.log_prob(torch.tensor(a)))) for a in partitions(sizes))
        total /= math.prod(math.factorial(n) for n in sizes)
        assert total == pytest.approx(row_sums_probability(alpha, sizes), rel=1e-9)

    @pytest.mark.parametrize("sizes", [(2, 1), (2, 2), (2, 1, 2)], ids=str)
    def test_is_that_of_the_buffet_process(self, sizes):
        # A class of matrices is as many partitions as there are ways to name the components of
        # its columns, but for columns that are the same.
        d, process = draw(IndianBuffetPrior(0.7), sizes), IndianBuffetProcess(0.7, len(sizes))
        party = [s for s, n in enumerate(sizes) for _ in range(n)]
        classes: dict[tuple, float] = Counter()
        for a in partitions(sizes):
            columns = [tuple(sorted(party[n] for n, k in enumerate(a) if k == i)) for i in set(a)]
            classes[tuple(sorted(columns))] += math.exp(float(d.log_prob(torch.tensor(a))))
        for columns, total in classes.items():
            matrix = torch.zeros(len(sizes), process.num_atoms)
            for k, members in enumerate(columns):
                matrix[list(members), k] = 1
            truth = float(process.log_prob(matrix))
            ways = math.prod(math.factorial(n) for n in sizes)
            assert math.log(total / ways) == pytest.approx(truth, rel=1e-5)

    @pytest.mark.parametrize("prior", PRIORS, ids=str)
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_is_minus_the_penalty(self, prior, sizes):
        d = draw(prior, sizes)
        for a in partitions(sizes):
            truth = -penalty(a, prior, sizes) - prior.constant(len(sizes))
            assert float(d.log_prob(torch.tensor(a))) == pytest.approx(truth, rel=1e-12, abs=1e-12)

    @pytest.mark.parametrize("prior", [*PRIORS, GroupNormPrior(1.0, ranked=True)], ids=str)
    def test_depends_on_the_partition_alone(self, prior):
        sizes, value = (3, 2, 2), torch.tensor([0, 1, 2, 2, 0, 3, 2])
        d = draw(prior, sizes, 6)
        assert d.log_prob(value).shape == ()
        for _ in range(5):
            moved = torch.randperm(6)[value]
            torch.testing.assert_close(d.log_prob(moved), d.log_prob(value))
        wider = draw(prior, sizes, 9)  # atoms that nobody has cost nothing
        torch.testing.assert_close(wider.log_prob(value), d.log_prob(value))

    def test_with_rank_weights(self):
        sizes, value = (3, 2, 2), torch.tensor([0, 1, 2, 1, 3, 1, 4])
        # Popularities 3, 1, 1, 1, 1: the first three are free, the others 1 and √2 times √1.
        d = draw(GroupNormPrior(0.7, ranked=True), sizes, 6)
        assert float(d.log_prob(value)) == pytest.approx(-0.7 * (1 + math.sqrt(2)))

    @pytest.mark.parametrize(
        "prior",
        [IndianBuffetPrior(0.7), GroupNormPrior(), GroupNormPrior(1.0, ranked=True)],
        ids=str,
    )
    def test_is_the_objective_of_the_solvers(self, prior):
        sizes, value = (3, 2, 2), torch.tensor([0, 1, 2, 1, 3, 1, 4])
        problem = AssignmentProblem.of([torch.zeros(5, n).double() for n in sizes], prior)
        truth = -problem.objective(value) - prior.constant(3)
        assert float(draw(prior, sizes, 5).log_prob(value)) == pytest.approx(truth)

    @pytest.mark.parametrize("relaxed", [False, True])
    def test_of_many_values(self, relaxed):
        d = JointMatching(GroupNormPrior(1.0, ranked=True), (2, 1, 2), 4, relaxed)
        values = d.sample((3, 2))
        assert values.shape == (3, 2) + d.event_shape
        one_by_one = [[d.log_prob(v) for v in row] for row in values]
        truth = torch.stack([torch.stack(row) for row in one_by_one])
        torch.testing.assert_close(d.log_prob(values), truth)


class TestRelaxed:
    @pytest.mark.parametrize("prior", [*PRIORS, GroupNormPrior(1.0, ranked=True)], ids=str)
    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_at_integers_is_the_same(self, prior, sizes):
        room = sum(sizes)
        hard, soft = draw(prior, sizes, room), JointMatching(prior, sizes, room, relaxed=True)
        for a in map(torch.tensor, partitions(sizes)):
            p = torch.nn.functional.one_hot(a, room).mT.double()
            torch.testing.assert_close(soft.log_prob(p), hard.log_prob(a))

    def test_between_integers_is_linear(self):
        prior, sizes = GroupNormPrior(1.5), (1, 1, 1)
        soft = JointMatching(prior, sizes, 2, relaxed=True)
        p = torch.tensor([[1.0, 0.6, 0.9], [0.0, 0.4, 0.1]]).double()
        phi = [1.5 * math.sqrt(m) for m in range(4)]
        truth = 0.5 * phi[2] + 0.5 * phi[3] + 0.5 * phi[0] + 0.5 * phi[1]
        assert float(soft.log_prob(p)) == pytest.approx(-truth)

    def test_gradients(self):
        prior, sizes = IndianBuffetPrior(0.5), (2, 2, 1)
        soft = JointMatching(prior, sizes, 3, relaxed=True)
        p = torch.rand(3, 5).double().requires_grad_()
        assert torch.autograd.gradcheck(soft.log_prob, p)
        slope = torch.autograd.grad(soft.log_prob(p), p)[0]
        # One more party costs φ(m+1) - φ(m), whoever it is.
        steps = prior.penalty(3).diff()[p.detach().sum(1).floor().clamp(max=2).long()]
        torch.testing.assert_close(slope, -steps.unsqueeze(1).expand(3, 5))

    def test_draws_are_matchings(self):
        soft = JointMatching(GroupNormPrior(), (2, 2), 3, relaxed=True)
        p = soft.sample()
        assert p.shape == soft.event_shape == (3, 4)
        assert bool(soft.support.check(p)) and torch.equal(p.sum(0), torch.ones(4).double())


class TestDraws:
    @pytest.mark.parametrize(
        "prior, sizes, room",
        [
            (IndianBuffetPrior(0.5), (2, 2), 4),
            (IndianBuffetPrior(2.0), (2, 1, 2), 3),
            (IndianBuffetPrior(2.0), (1, 1, 1), 3),
            (GroupNormPrior(1.0), (3, 2), 5),
            (GroupNormPrior(1.0), (2, 1, 1), 3),
            (FixedAtoms(3), (2, 1, 2), 3),
        ],
        ids=str,
    )
    def test_frequencies(self, monkeypatch, prior, sizes, room):
        monkeypatch.setattr("pyro_fusion.assignment.joint_matching._SWEEPS", 4)  # enough for these
        d = draw(prior, sizes, room)
        number = 150
        values = d.sample((number,))
        assert values.shape == (number, sum(sizes)) and bool(d.support.check(values).all())
        counts = Counter(map(canonical, values.tolist()))
        weights = {a: math.exp(-penalty(a, prior, sizes)) for a in partitions(sizes, room)}
        assert set(counts) <= set(weights)
        total = sum(weights.values())
        # Cells of an expected count below five are one.
        statistic, rest, cells = 0.0, [0.0, 0.0], 0
        for a, w in weights.items():
            expected = number * w / total
            if expected < 5:
                rest = [rest[0] + counts[a], rest[1] + expected]
            else:
                statistic += (counts[a] - expected) ** 2 / expected
                cells += 1
        if rest[1]:
            statistic += (rest[0] - rest[1]) ** 2 / rest[1]
            cells += 1
        assert statistic < chi2.ppf(0.9999, max(cells - 1, 1))

    def test_depend_on_the_seed_alone(self):
        d = draw(GroupNormPrior(), (3, 2, 3), 5)
        pyro.set_rng_seed(3)
        first = d.sample((2,))
        pyro.set_rng_seed(3)
        assert torch.equal(d.sample((2,)), first)
        assert d.sample().shape == (8,)

    def test_of_a_party_with_as_many_components_as_there_is_room(self):
        d = draw(GroupNormPrior(), (3, 3), 3)
        for a in d.sample((10,)):
            assert sorted(a[:3].tolist()) == sorted(a[3:].tolist()) == [0, 1, 2]


class TestIsADistribution:
    def test_in_a_program(self):
        d = draw(GroupNormPrior(), (2, 3), 4)
        trace = poutine.trace(lambda: pyro.sample("a", d)).get_trace()
        trace.compute_log_prob()
        site = trace.nodes["a"]
        torch.testing.assert_close(site["log_prob"], d.log_prob(site["value"]))

    @pytest.mark.parametrize("relaxed", [False, True])
    def test_batches(self, relaxed):
        one = JointMatching(GroupNormPrior(), (2, 3), 4, relaxed)
        d = one.expand((6, 1))
        value = d.sample((2,))
        assert d.batch_shape == (6, 1) and d.event_shape == ((4, 5) if relaxed else (5,))
        assert value.shape == (2, 6, 1) + d.event_shape
        assert len({tuple(v.flatten().tolist()) for v in value.flatten(0, 2)}) > 1  # independent
        torch.testing.assert_close(d.log_prob(value), one.log_prob(value))
        assert d.log_prob(value[0, 0, 0]).shape == (6, 1)
        assert d.expand((4, 6, 1)).batch_shape == (4, 6, 1)

    def test_support(self):
        support = draw(GroupNormPrior(), (2, 1), 3).support
        assert support.is_discrete and support.event_dim == 1
        assert bool(support.check(torch.tensor([0, 2, 1])))
        assert not bool(support.check(torch.tensor([0, 3, 1])))


def test_two_components_of_a_party_in_one_atom_have_no_probability():
    joint = JointMatching(GroupNormPrior(), (2, 2, 1), 4)
    values = torch.tensor([[0, 0, 1, 2, 3], [0, 1, 1, 0, 0], [0, 1, 2, 2, 3]])
    assert joint.log_prob(values).isneginf().tolist() == [True, False, True]


def test_atoms_that_there_are_not_have_no_probability():
    joint = JointMatching(GroupNormPrior(), (2, 1), 3)
    values = torch.tensor([[0, 1, 2], [0, 3, 2], [0, 1, -1]])
    assert joint.log_prob(values).isneginf().tolist() == [False, True, True]
