# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0
"""The Indian buffet against enumeration, its limit, quadrature and Monte Carlo.

Monte Carlo tolerances are 4 standard errors (``SIGMAS``), seeds are fixed.
"""

import itertools
import math
from collections import Counter

import mpmath
import pyro
import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import constraints

from pyro_fusion import IndianBuffetPrior, ParameterError
from pyro_fusion.assignment import FiniteIndianBuffet, IndianBuffetProcess
from pyro_fusion.assignment.indian_buffet import harmonic_number, popularity_log_weights

SIGMAS = 4
DRAWS = 40_000  # for frequencies
BOTH = pytest.mark.parametrize("cls", [IndianBuffetProcess, FiniteIndianBuffet])
SCORES = pytest.mark.parametrize(
    ("cls", "score"),
    [
        (IndianBuffetProcess, "log_prob"),
        (FiniteIndianBuffet, "log_prob"),
        (FiniteIndianBuffet, "class_log_prob"),
    ],
)


def tensor(*args, dtype=torch.float64, **kwargs):
    return torch.tensor(*args, dtype=dtype, **kwargs)


def histories(num_parties):
    """All columns, the one of zeros first: ``[S, 2^S]``."""
    return tensor(list(itertools.product([0, 1], repeat=num_parties))).mT


def all_classes(num_parties, num_atoms):
    """One matrix of each class, ``[N, S, K]``: a multiset of K columns, with zeros as room."""
    multisets = itertools.combinations_with_replacement(range(2**num_parties), num_atoms)
    return histories(num_parties)[:, torch.tensor(list(multisets))].movedim(0, 1)


def class_of(matrix):
    """The columns in order, without those of zeros."""
    return tuple(sorted(tuple(map(int, c)) for c in matrix.mT.tolist() if any(c)))


def assert_within(draws, truth):
    """The mean of draws along axis 0 lies within SIGMAS standard errors of truth."""
    error = (draws.mean(0) - truth).abs()
    assert (error <= SIGMAS * draws.std(0) / len(draws) ** 0.5).all()


def assert_frequencies(observed, probability):
    """Pearson's statistic, of cells with an expected count of 5 or more and all else as one."""
    expected = {cell: DRAWS * p for cell, p in probability.items() if DRAWS * p >= 5}
    cells = [(observed[cell], e) for cell, e in expected.items()]
    seen, meant = (sum(column) for column in zip(*cells, strict=True))
    cells.append((DRAWS - seen, DRAWS - meant))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    freedom = len(cells) - 1
    assert freedom > 5
    assert abs(statistic - freedom) <= SIGMAS * math.sqrt(2 * freedom)


class TestContract:
    @BOTH
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
    def test_shapes_and_dtype(self, cls, batch, dtype):
        d = cls(torch.rand(batch, dtype=dtype) + 0.5, 5, 30)
        value = d.sample((4, 1))
        assert d.batch_shape == batch and d.event_shape == (5, 30)
        assert (d.num_parties, d.num_atoms) == d.event_shape
        assert value.shape == d.shape((4, 1)) and d.sample((0,)).shape == (0, *d.shape())
        assert d.log_prob(value).shape == (4, 1, *batch)
        assert d.mean_num_atoms.shape == batch
        assert {t.dtype for t in (value, d.log_prob(value), d.mean_num_atoms)} == {dtype}
        assert d.support.check(value).all() and d.support.is_discrete and d.support.event_dim == 2
        assert not d.has_rsample and not d.has_enumerate_support

    @BOTH
    def test_batch_is_one_at_a_time(self, cls):
        alpha = tensor([[0.3], [2.0]])
        value = FiniteIndianBuffet(tensor(1.5), 4, 6).sample((3,))
        expected = [[cls(a, 4, 6).log_prob(v) for v in value] for a in alpha[:, 0]]
        torch.testing.assert_close(cls(alpha, 4, 6).log_prob(value), tensor(expected))

    @BOTH
    def test_expand(self, cls):
        d = cls(tensor([0.5, 1.0, 2.0]), 3, 20, validate_args=True)
        wide = d.expand((4, 3))
        assert type(wide) is cls and wide.event_shape == d.event_shape and wide._validate_args
        value = wide.sample()
        assert value.shape == (4, 3, 3, 20)
        torch.testing.assert_close(wide.log_prob(value), d.log_prob(value))
        torch.testing.assert_close(wide.mean_num_atoms, d.mean_num_atoms.expand(4, 3))
        assert wide.expand((2, 4, 3)).sample().shape == (2, 4, 3, 3, 20)
        torch.testing.assert_close(d.to_event(1).log_prob(value), d.log_prob(value).sum(-1))

    @BOTH
    def test_numbers_are_tensors_of_the_default_dtype(self, cls):
        for alpha in (2, 2.0, torch.tensor(2)):
            assert cls(alpha, 3, 4).alpha.dtype == torch.get_default_dtype()

    @BOTH
    def test_same_seed_same_bits(self, cls):
        d = cls(tensor([0.5, 3.0]), 6, 40)
        draws = []
        for _ in range(2):
            torch.manual_seed(3)
            draws.append(d.sample((5,)))
        assert torch.equal(*draws)

    @BOTH
    def test_sample_in_a_plate(self, cls):
        alpha = torch.tensor([0.5, 1.0, 2.0])

        def model():
            with pyro.plate("study", 3):
                return pyro.sample("has", cls(alpha, 4, 25))

        trace = pyro.poutine.trace(model).get_trace()
        trace.compute_log_prob()
        assert "has dist 3 | 4 25" in trace.format_shapes()
        site = trace.nodes["has"]
        assert site["value"].shape == (3, 4, 25) and site["log_prob"].shape == (3,)
        torch.testing.assert_close(site["log_prob"], cls(alpha, 4, 25).log_prob(site["value"]))

    @SCORES
    def test_gradient_in_alpha_is_that_of_finite_differences(self, cls, score):
        value = cls(tensor(2.0), 4, 12).sample((3, 1))
        alpha = tensor([0.2, 1.0, 7.0], requires_grad=True)
        assert torch.autograd.gradcheck(lambda a: getattr(cls(a, 4, 12), score)(value), alpha)

    @SCORES
    def test_exchangeable(self, cls, score):
        log_prob = getattr(cls(tensor([0.7, 4.0]), 5, 30), score)
        value = IndianBuffetProcess(tensor(3.0), 5, 30).sample((20, 1))
        moved = value[..., torch.randperm(5), :][..., torch.randperm(30)]
        torch.testing.assert_close(log_prob(moved), log_prob(value))

    @SCORES
    def test_float32_agrees_with_float64(self, cls, score):
        value = IndianBuffetProcess(tensor(3.0), 200, 1000).sample((5,))
        single = getattr(cls(tensor(3.0, dtype=torch.float32), 200, 1000), score)
        double = getattr(cls(tensor(3.0), 200, 1000), score)
        torch.testing.assert_close(single(value.float()).double(), double(value), rtol=1e-5, atol=0)
        assert torch.equal(double(value.bool()), double(value))

    @BOTH
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"alpha": -1.0}, "alpha"),
            ({"alpha": torch.tensor([1.0, 0.0])}, "alpha"),
            ({"alpha": math.nan}, "alpha"),
            ({"num_parties": 0}, "num_parties must be a positive integer, got 0"),
            ({"num_parties": 2.0}, r"num_parties must be a positive integer, got 2\.0"),
            ({"num_atoms": -3}, "num_atoms must be a positive integer, got -3"),
            ({"num_atoms": True}, "num_atoms must be a positive integer, got True"),
        ],
    )
    def test_bad_arguments(self, cls, change, message):
        with pytest.raises(ValueError, match=message):
            cls(**{"alpha": 1.0, "num_parties": 3, "num_atoms": 4} | change)

    @BOTH
    def test_bad_values(self, cls):
        d = cls(tensor(1.0), 2, 3)
        for value in (torch.full((2, 3), 0.5), torch.full((2, 3), 2.0), torch.zeros(3, 3)):
            with pytest.raises(ValueError, match="value"):
                d.log_prob(value)
        assert d.arg_constraints == {"alpha": constraints.positive}

    @pytest.mark.cuda
    @BOTH
    def test_cuda_gives_the_same_result(self, cls):
        d = cls(tensor([0.5, 2.0]).cuda(), 5, 40)
        value = d.sample((100,))
        assert value.device.type == d.log_prob(value).device.type == "cuda"
        here = cls(d.alpha.cpu(), 5, 40)
        torch.testing.assert_close(d.log_prob(value).cpu(), here.log_prob(value.cpu()))
        torch.testing.assert_close(d.mean_num_atoms.cpu(), here.mean_num_atoms)


class TestIndianBuffetProcess:
    @pytest.mark.parametrize(
        ("num_parties", "alpha", "num_atoms"),
        [(1, 2.0, 20), (2, 1.0, 14), (3, 0.5, 11), (4, 0.05, 5)],
    )
    def test_classes_add_up_to_the_poisson_of_their_atoms(self, num_parties, alpha, num_atoms):
        """All classes with n atoms together have the probability of n under Poisson(α H_S)."""
        value = all_classes(num_parties, num_atoms)
        d = IndianBuffetProcess(tensor(alpha), num_parties, num_atoms)
        probability = d.log_prob(value).exp()
        atoms = value.any(-2).sum(-1)
        by_atoms = torch.zeros(num_atoms + 1, dtype=torch.float64).index_add(0, atoms, probability)
        poisson = scipy.stats.poisson(alpha * harmonic_number(num_parties))
        torch.testing.assert_close(by_atoms, tensor(poisson.pmf(range(num_atoms + 1))))
        assert poisson.sf(num_atoms) < 1e-8
        assert probability.sum().item() == pytest.approx(1, abs=1e-8)

    def test_the_formula_at_many_parties(self):
        """Factorials of exact integers, and histories that are counted one by one."""
        value = IndianBuffetProcess(tensor(2.0), 300, 60).sample()
        value = torch.cat([value, value[:, :30], value[:, :10]], dim=-1)
        columns, f = class_of(value), math.factorial
        repeats = Counter(columns).values()
        with mpmath.workdps(50):
            weights = [mpmath.mpf(f(sum(c) - 1) * f(300 - sum(c))) / f(300) for c in columns]
            log_prob = len(columns) * mpmath.log(2) - 2 * mpmath.harmonic(300)
            log_prob += sum(map(mpmath.log, weights)) - sum(mpmath.log(f(n)) for n in repeats)
        d = IndianBuffetProcess(tensor(2.0), 300, 100)
        assert max(repeats) >= 3
        assert d.log_prob(value).item() == pytest.approx(float(log_prob), rel=1e-12)

    @pytest.mark.parametrize("sizes", [(1,), (3, 2), (3, 3), (2, 1, 2), (3, 2, 2)])
    def test_the_prior_of_fuse_is_that_of_labelled_components(self, sizes):
        """Partitions of labelled components, all with their probability, by the class of matrix."""

        def partitions(s, atoms):  # atoms: for each, the parties that have it
            if s == len(sizes):
                yield atoms
                return
            # Each component of s takes another atom, of which those beyond are new and alike.
            for choice in itertools.product([*range(len(atoms)), None], repeat=sizes[s]):
                taken = [k for k in choice if k is not None]
                if len(set(taken)) == len(taken):
                    joined = [a + (s,) if k in taken else a for k, a in enumerate(atoms)]
                    yield from partitions(s + 1, joined + [(s,)] * (sizes[s] - len(taken)))

        alpha, num_parties = 0.8, len(sizes)
        prior = IndianBuffetPrior(alpha)
        phi, constant = prior.penalty(num_parties), prior.constant(num_parties)
        labels = math.prod(math.factorial(size) for size in sizes)
        total = Counter()
        for atoms in partitions(0, []):
            penalty = sum(float(phi[len(a)]) for a in atoms)
            columns = tuple(sorted(tuple(int(s in a) for s in range(num_parties)) for a in atoms))
            total[columns] += math.exp(-penalty - constant) / labels
        for columns, probability in total.items():
            d = IndianBuffetProcess(tensor(alpha), num_parties, len(columns))
            log_prob = d.log_prob(tensor(columns).mT).item()
            assert probability == pytest.approx(math.exp(log_prob), rel=1e-12)
        classes = all_classes(num_parties, sum(sizes))
        of_these_sizes = (classes.sum(-1) == tensor(sizes)).all(-1)
        assert set(total) == set(map(class_of, classes[of_these_sizes]))

    @pytest.mark.parametrize(("num_parties", "alpha"), [(2, 1.0), (3, 0.7)])
    def test_frequencies_of_the_classes(self, num_parties, alpha):
        d = IndianBuffetProcess(tensor(alpha), num_parties)
        observed = Counter(class_of(m) for m in d.sample((DRAWS,)))
        few, classes = (
            IndianBuffetProcess(tensor(alpha), num_parties, 6),
            all_classes(num_parties, 6),
        )
        probability = {class_of(m): few.log_prob(m).exp().item() for m in classes}
        assert_frequencies(observed, probability)

    def test_moments(self):
        """Atoms of each party, of all, and those that two parties share: all Poisson."""
        alpha = tensor([0.5, 3.0])
        d = IndianBuffetProcess(alpha, 6)
        value = d.sample((20_000,))
        shared = (value[..., 1, :] * value[..., 4, :]).sum(-1)
        torch.testing.assert_close(d.mean_num_atoms, alpha * 2.45)
        for count, mean in [
            (value.sum(-1), alpha.unsqueeze(-1).expand(2, 6)),
            (value.any(-2).sum(-1).double(), d.mean_num_atoms),
            (shared, alpha / 2),
        ]:
            assert_within(count, mean)
            assert_within((count - mean).square(), mean)

    def test_columns_are_in_order_of_appearance(self):
        value = IndianBuffetProcess(tensor(2.0), 5).sample((50,))
        first = torch.where(value.any(-2), value.argmax(-2), 5)
        assert (first.diff() >= 0).all()

    def test_room(self):
        for alpha, num_parties in [(1e-13, 1), (1e-3, 2), (1, 1), (2, 7), (300, 40), (1e6, 3)]:
            d = IndianBuffetProcess(tensor([alpha / 2, alpha]), num_parties)
            poisson = scipy.stats.poisson(alpha * harmonic_number(num_parties))
            assert poisson.sf(d.num_atoms) < 1e-12
            assert d.num_atoms == 1 or poisson.sf(d.num_atoms - 1) >= 1e-12

    @pytest.mark.parametrize("alpha", [math.inf, math.nan, 0.0, [1.0, -1.0]])
    def test_no_room_for_a_bad_alpha(self, alpha):
        with pytest.raises(ParameterError, match="alpha must be positive and finite"):
            IndianBuffetProcess(torch.tensor(alpha), 3, validate_args=False)
        with pytest.raises(ParameterError, match="num_parties must be a positive integer"):
            IndianBuffetProcess(torch.tensor(alpha), 0)

    def test_too_little_room(self):
        d, wide = (IndianBuffetProcess(tensor(5.0), 4, room) for room in (3, 60))
        torch.manual_seed(0)
        atoms = int(wide.sample((10,)).any(-2).sum(-1).max())
        torch.manual_seed(0)
        with pytest.raises(ParameterError, match=f"num_atoms = 3 .* {atoms} atoms .* larger"):
            d.sample((10,))

    def test_alpha_is_learned(self):
        """SVI from a matrix at hand: the optimum is the number of atoms over H_S."""
        value = torch.tensor([[1.0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]])

        def model():
            alpha = pyro.param("alpha", torch.tensor(1.0), constraint=constraints.positive)
            pyro.sample("has", IndianBuffetProcess(alpha, 3, 4), obs=value)

        svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(200):
            svi.step()
        assert pyro.param("alpha").item() == pytest.approx(4 / (1 + 1 / 2 + 1 / 3), rel=1e-3)


class TestFiniteIndianBuffet:
    @pytest.mark.parametrize(("num_parties", "num_atoms"), [(1, 6), (2, 4), (3, 3), (4, 2)])
    def test_adds_up_to_one(self, num_parties, num_atoms):
        d = FiniteIndianBuffet(tensor([0.3, 2.5]), num_parties, num_atoms)
        entries = torch.tensor(list(itertools.product([0.0, 1.0], repeat=num_parties * num_atoms)))
        matrices = entries.unflatten(-1, d.event_shape).double().unsqueeze(1)
        torch.testing.assert_close(d.log_prob(matrices).exp().sum(0), tensor([1.0, 1.0]))
        classes = all_classes(num_parties, num_atoms).unsqueeze(1)
        torch.testing.assert_close(d.class_log_prob(classes).exp().sum(0), tensor([1.0, 1.0]))
        atoms = (d.log_prob(matrices).exp() * matrices.any(-2).sum(-1)).sum(0)
        torch.testing.assert_close(d.mean_num_atoms, atoms)

    @pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
    def test_log_prob_is_the_integral_over_the_shares(self, alpha):
        """Quadrature over the quantile u of π = u^(K/α), column by column."""
        num_parties, num_atoms = 5, 4
        d = FiniteIndianBuffet(tensor(alpha), num_parties, num_atoms)

        def likelihood(u, m):
            share = u ** (num_atoms / alpha)
            return share**m * (1 - share) ** (num_parties - m)

        integrals = [
            scipy.integrate.quad(likelihood, 0, 1, args=(m,), epsabs=1e-13, limit=200)[0]
            for m in range(num_parties + 1)
        ]
        for popularities in itertools.combinations_with_replacement(range(num_parties + 1), 4):
            value = (torch.arange(num_parties).unsqueeze(-1) < torch.tensor(popularities)).double()
            expected = math.log(math.prod(integrals[m] for m in popularities))
            assert d.log_prob(value).item() == pytest.approx(expected, rel=1e-6)

    @pytest.mark.parametrize("num_atoms", [1, 10, 10**4, 10**7])
    def test_nothing_cancels_at_many_atoms(self, num_atoms):
        num_parties, alpha = 40, 3.0
        d = FiniteIndianBuffet(tensor(alpha), num_parties, num_atoms)
        log_prob = d._column_log_prob()
        with mpmath.workdps(50):
            a = mpmath.mpf(alpha) / num_atoms
            for m in range(num_parties + 1):
                exact = mpmath.log(a * mpmath.beta(m + a, num_parties - m + 1))
                assert float(log_prob[m]) == pytest.approx(float(exact), rel=1e-12)

    @pytest.mark.parametrize("columns", [[], [1], [3, 3], [1, 2, 4], [63, 63, 63, 5, 5, 9, 21]])
    @pytest.mark.parametrize("alpha", [0.5, 3.0])
    def test_goes_to_the_indian_buffet_as_one_over_k(self, columns, alpha):
        limit = IndianBuffetProcess(tensor(alpha), 6, max(1, len(columns)))
        some = F.pad(histories(6)[:, columns], (0, limit.num_atoms - len(columns)))
        gaps = []
        for num_atoms in (1_000, 2_000, 4_000, 8_000):
            d = FiniteIndianBuffet(tensor(alpha), 6, num_atoms)
            value = F.pad(some, (0, num_atoms - limit.num_atoms))
            gaps.append((d.class_log_prob(value) - limit.log_prob(some)).item())
        ratios = [wide / narrow for narrow, wide in itertools.pairwise(gaps)]
        assert abs(gaps[-1]) < 0.02
        assert ratios == pytest.approx([0.5] * 3, rel=0.05)

    def test_frequencies_of_the_matrices(self):
        d = FiniteIndianBuffet(tensor(1.5), 2, 3)
        matrices = itertools.product([0, 1], repeat=6)
        probability = {m: d.log_prob(tensor(m).view(2, 3)).exp().item() for m in matrices}
        observed = Counter(tuple(m.flatten().tolist()) for m in d.sample((DRAWS,)))
        assert_frequencies(observed, probability)


class TestSharedMathematics:
    def test_against_exact_integers(self):
        f = math.factorial
        for n in (1, 2, 7, 30):
            exact = [math.log(f(m - 1) * f(n - m) / f(n)) for m in range(1, n + 1)]
            assert popularity_log_weights(n).tolist() == pytest.approx(exact, rel=1e-13)
            assert harmonic_number(n) == pytest.approx(float(mpmath.harmonic(n)), rel=1e-14)
