# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Matching and RelaxedMatching against enumeration, scipy, finite differences and Pyro's own
assignments. Monte Carlo tolerances are 5 standard errors (``SIGMAS``), seeds are fixed."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.tracking.assignment import MarginalAssignmentPersistent
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import one_hot, pad

from pyro_fusion.assignment import Matching, RelaxedMatching
from pyro_fusion.assignment import matching as module
from pyro_fusion.errors import ParameterError, StructureError

SIGMAS = 5
INF = math.inf
SHAPES = [(0, 2), (1, 1), (1, 4), (2, 2), (3, 3), (3, 5), (4, 4), (4, 5)]
DTYPES = [torch.float32, torch.float64]
shapes = pytest.mark.parametrize("shape", SHAPES)


def logits_of(*shape, scale=1.5, forbid=0.0, seed=0, dtype=torch.float64):
    """Random logits; of the pairs off the main diagonal a share `forbid` is forbidden."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    off = torch.rand(*shape, generator=generator) < forbid
    off &= ~torch.eye(*shape[-2:], dtype=torch.bool)
    return logits.masked_fill(off, -INF).to(dtype)


def enumerated(logits):
    """All matchings ``[N, L]`` and their unnormalised probabilities ``[N, *batch]``."""
    num_components, num_atoms = logits.shape[-2:]
    every = list(itertools.permutations(range(num_atoms), num_components))
    every = torch.tensor(every, dtype=torch.long)
    rows = torch.arange(num_components)
    return every, torch.stack([logits[..., rows, atoms].sum(-1).exp() for atoms in every])


def enumerated_marginals(logits):
    every, weights = enumerated(logits)
    hits = one_hot(every, logits.shape[-1]).to(logits.dtype)
    return torch.einsum("n...,nlk->...lk", weights / weights.sum(0), hits)


def gumbel(seed, shape, like):
    torch.manual_seed(seed)
    return module._gumbel(torch.Size(shape), like)


class TestExact:
    @shapes
    @pytest.mark.parametrize("forbid", [0.0, 0.4])
    @pytest.mark.parametrize("batch", [(), (2, 3)])
    def test_against_enumeration(self, shape, forbid, batch):
        logits = logits_of(*batch, *shape, forbid=forbid)
        d = Matching(logits)
        every, weights = enumerated(logits)
        assert d.is_exact and d.batch_shape == batch and d.event_shape == shape[:1]
        torch.testing.assert_close(d.log_normalizer, weights.sum(0).log())
        value = every.reshape(len(every), *[1] * len(batch), shape[0])
        assert torch.equal(d.enumerate_support(expand=False), value)
        assert torch.equal(d.enumerate_support(), value.expand(-1, *batch, shape[0]))
        torch.testing.assert_close(d.log_prob(value).exp(), weights / weights.sum(0))
        torch.testing.assert_close(d.log_prob(value).exp().sum(0), torch.ones(batch).double())
        torch.testing.assert_close(d.log_prob(d.mode), d.log_prob(value).amax(0))
        torch.testing.assert_close(d.marginals(), enumerated_marginals(logits))

    @shapes
    def test_gradients(self, shape):
        logits = logits_of(2, *shape, forbid=0.3).requires_grad_()
        d = Matching(logits)
        (gradient,) = torch.autograd.grad(d.log_normalizer.sum(), logits)
        expected = enumerated_marginals(logits.detach())
        torch.testing.assert_close(gradient, expected)
        with torch.no_grad():
            marginals = Matching(logits).marginals()
        assert not marginals.requires_grad
        torch.testing.assert_close(marginals, expected)
        (curvature,) = torch.autograd.grad(d.marginals().square().sum(), logits)
        assert curvature.isfinite().all()

    def test_second_derivatives(self):
        logits = logits_of(3, 4).requires_grad_()
        assert torch.autograd.gradgradcheck(lambda x: Matching(x).log_normalizer, logits)
        assert torch.autograd.gradcheck(lambda x: Matching(x).marginals(), logits)

    @pytest.mark.parametrize("shape", [(10, 12), (14, 14)])
    def test_larger(self, shape):
        # With logits of rank one every matching weighs the same but for its unused atoms.
        rows = torch.randn(shape[0], 1, dtype=torch.float64)
        d = Matching(rows.expand(shape))
        expected = rows.sum() + math.log(math.perm(shape[1], shape[0]))
        torch.testing.assert_close(d.log_normalizer, expected)
        value = d.sample((5,))
        torch.testing.assert_close(d.log_prob(value), (rows.sum() - expected).expand(5))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_extreme_logits(self, dtype):
        logits = torch.tensor([[1e4, 0.0, -1e4], [1e4, -1e4, 0.0]], dtype=dtype)
        d = Matching(logits)
        torch.testing.assert_close(d.log_normalizer, torch.tensor(1e4 + math.log(2), dtype=dtype))
        expected = torch.tensor([[0.5, 0.5, 0], [0.5, 0, 0.5]], dtype=dtype)
        torch.testing.assert_close(d.marginals(), expected, atol=1e-3, rtol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtype(self, dtype):
        d = Matching(logits_of(2, 3, 4, forbid=0.3, dtype=dtype))
        expected = Matching(logits_of(2, 3, 4, forbid=0.3))
        assert d.sample().dtype == d.mode.dtype == d.enumerate_support().dtype == torch.long
        results = [d.log_normalizer, d.log_prob(d.mode), d.marginals(), d.marginals("bp")]
        assert all(result.dtype == dtype for result in results)
        other = expected.log_prob(expected.mode)
        torch.testing.assert_close(results[1].double(), other, atol=1e-5, rtol=1e-5)


def assert_frequencies(value, logits):
    """Each matching is drawn as often as its probability says, in `value` ``[N, L]``."""
    every, weights = enumerated(logits)
    probs = weights / weights.sum()
    found = (value.unsqueeze(1) == every).all(-1).double()
    assert found.sum(-1).eq(1).all()  # each draw is a matching
    # One draw more in the variance, for matchings that are expected less than once.
    error = ((probs * (1 - probs) + 1 / len(value)) / len(value)).sqrt()
    error = error.masked_fill(probs == 0, 0)
    assert ((found.mean(0) - probs).abs() <= SIGMAS * error).all()


class TestSample:
    @pytest.mark.parametrize("shape", [(1, 3), (3, 3), (3, 5)])
    @pytest.mark.parametrize("forbid", [0.0, 0.4])
    def test_exact_frequencies(self, shape, forbid):
        logits = logits_of(2, *shape, forbid=forbid)
        value = Matching(logits).sample((4000,))
        assert value.shape == (4000, 2, shape[0])
        for i in range(2):
            assert_frequencies(value[:, i], logits[i])

    @pytest.mark.parametrize("shape", [(1, 1), (2, 4), (3, 3), (3, 4)])
    def test_chain_frequencies(self, shape):
        logits = logits_of(2, *shape)
        value = module._swap_chain(logits, torch.Size((4000, 2)))
        for i in range(2):
            assert_frequencies(value[:, i], logits[i])

    def test_large(self):
        logits = logits_of(2, 17, 20, forbid=0.3)
        d = Matching(logits).expand((3, 2))
        value = d.sample((4,))
        assert not d.is_exact and value.shape == (4, 3, 2, 17)
        assert d.support.check(value).all()
        assert d.log_prob(value).isfinite().all()
        torch.manual_seed(3)
        first = d.sample()
        torch.manual_seed(3)
        assert torch.equal(first, d.sample())

    def test_large_chain_has_the_marginals_of_belief_propagation(self):
        d = Matching(logits_of(15, 30))
        value = one_hot(d.sample((1000,)), 30).double()
        error = (value.mean(0) - d.marginals()).abs()
        assert error.max() < 0.03 + SIGMAS / 2 / 1000**0.5
        assert error.mean() < 0.01


class TestBeliefs:
    def test_exact_on_trees(self):
        # Components 0 and 1 share atom 1, components 1 and 2 share atom 2: no cycle.
        allowed = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()
        logits = logits_of(5, 3, 4).masked_fill(~allowed, -INF)
        d = Matching(logits)
        torch.testing.assert_close(d.marginals("bp"), d.marginals())
        torch.testing.assert_close(module._bethe(logits), d.log_normalizer)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_forced_pairs(self, dtype):
        logits = torch.tensor([[0.0, -INF, -INF], [1.0, 2.0, -INF], [0.0, 0.0, 5.0]], dtype=dtype)
        for d in (Matching(logits), Matching(pad(logits, (0, 1), value=-INF))):
            expected = torch.eye(3, d.logits.shape[-1], dtype=dtype)
            torch.testing.assert_close(d.marginals("bp"), expected)
            torch.testing.assert_close(d.log_normalizer, torch.tensor(7.0, dtype=dtype))

    @shapes
    def test_rows_columns_and_the_bethe_bound(self, shape):
        logits = logits_of(20, *shape, forbid=0.2, scale=2.0)
        d = Matching(logits)
        beliefs = d.marginals("bp")
        torch.testing.assert_close(beliefs.sum(-1), torch.ones(20, shape[0]).double())
        assert (beliefs.sum(-2) <= 1 + 1e-8).all()
        gap = d.log_normalizer - module._bethe(logits)
        assert (gap >= -1e-8).all()
        assert (gap <= shape[0] / 2 * math.log(2) + 1e-8).all()

    def test_near_where_atoms_are_many(self):
        d = Matching(logits_of(10, 5, 20, scale=1.0))
        torch.testing.assert_close(d.marginals("bp"), d.marginals(), atol=0.01, rtol=0)

    def test_beyond_the_limit(self):
        logits = logits_of(2, 16, 20, forbid=0.3).requires_grad_()
        d = Matching(logits)
        assert torch.equal(d.marginals(), d.marginals("bp"))
        (gradient,) = torch.autograd.grad(d.log_normalizer.sum(), logits)
        torch.testing.assert_close(gradient, d.marginals())
        # The gradient is that of the approximation, found afresh at other logits.
        step = 1e-5 * torch.randn_like(logits)
        with torch.no_grad():
            up, down = (Matching(logits + s).log_normalizer.sum() for s in (step, -step))
        expected = (gradient * step).sum()
        torch.testing.assert_close((up - down) / 2, expected, rtol=1e-4, atol=1e-9)

    @pytest.mark.parametrize("iterations", [None, 200])
    def test_agrees_with_pyro(self, iterations):
        # Pyro's detection may be spurious, at logit 0: here, a dummy atom of its own for each row.
        logits = logits_of(4, 3)
        dummies = torch.zeros(4, 4).double().masked_fill(~torch.eye(4).bool(), -INF)
        exists = torch.full((3,), 40.0, dtype=torch.float64)
        theirs = MarginalAssignmentPersistent(exists, logits[None], iterations)
        ours = Matching(torch.cat([logits, dummies], -1))
        ours = ours.marginals("exact" if iterations is None else "bp")
        torch.testing.assert_close(ours[:, :3], theirs.assign_dist.probs[0, :, :3])
        torch.testing.assert_close(ours[:, 3:].sum(-1), theirs.assign_dist.probs[0, :, 3])


class TestDistribution:
    def test_expand(self):
        logits = logits_of(2, 1, 3, 4).requires_grad_()
        d = Matching(logits)
        wide = d.expand((5, 2, 3))
        assert type(wide) is Matching and wide.batch_shape == (5, 2, 3)
        assert wide.logits.stride(0) == 0
        assert wide._tables[0].shape[:-1] == (1, 2, 1)  # no work is done twice
        value = wide.sample((7,))
        assert value.shape == (7, 5, 2, 3, 3)
        torch.testing.assert_close(wide.log_prob(value), d.log_prob(value))
        for a, b in [(wide.mode, d.mode), (wide.marginals(), d.marginals())]:
            torch.testing.assert_close(a, b.expand(a.shape))
        wide.log_prob(value).sum().backward()
        assert logits.grad.isfinite().all()
        assert wide.enumerate_support(expand=False).shape == (24, 1, 1, 1, 3)
        assert wide.enumerate_support().shape == (24, 5, 2, 3, 3)
        # An expansion draws afresh for each entry, and leaves validation as it was.
        assert len(value[:, :, 0, 0].flatten(0, 1).unique(dim=0)) > 3
        assert Matching(logits, validate_args=False).expand((2, 3))._validate_args is False

    def test_validation(self):
        logits = logits_of(2, 3)
        for value in ([0, 0], [0, 3], [-1, 0]):
            with pytest.raises(ValueError, match="support"):
                Matching(logits).log_prob(torch.tensor(value))
            loose = Matching(logits, validate_args=False)
            assert loose.log_prob(torch.tensor(value)) == -INF
        with pytest.raises(ValueError, match="logits"):
            Matching(torch.tensor([[0.0, math.nan]]))
        with pytest.raises(ValueError, match="logits"):
            Matching(torch.tensor([[0.0, INF]]))
        with pytest.raises(NotImplementedError):
            _ = Matching(logits).mean
        with pytest.raises(NotImplementedError):
            _ = Matching(logits).variance

    def test_a_forbidden_pair_has_probability_zero(self):
        d = Matching(torch.tensor([[0.0, -INF], [0.0, 0.0]]))
        assert d.log_prob(torch.tensor([1, 0])) == -INF
        assert d.log_prob(torch.tensor([0, 1])) == 0

    @pytest.mark.parametrize("shape", [(3, 2), (4,), (0, 0)])
    def test_shape_errors(self, shape):
        for make in (Matching, lambda logits: RelaxedMatching(logits, 1.0)):
            with pytest.raises(StructureError, match=rf"L <= K, got \[{shape[0]}"):
                make(torch.zeros(shape))

    @pytest.mark.parametrize("size", [3, 16])
    def test_everything_forbidden(self, size):
        logits = torch.zeros(2, size, size)
        logits[1, :2, 1:] = -INF  # both may have atom 0 only
        d = Matching(logits)
        for act in (
            lambda: d.log_normalizer,
            lambda: d.mode,
            lambda: d.marginals(),
            lambda: d.marginals("bp"),
            lambda: d.sample(),
            lambda: d.log_prob(torch.arange(size)),
            lambda: RelaxedMatching(logits, 1.0).rsample(),
        ):
            with pytest.raises(ParameterError, match="forbid them all"):
                act()

    def test_limits(self):
        d = Matching(torch.zeros(16, 16))
        with pytest.raises(ParameterError, match="at most 40320 matchings, got 20922789888000"):
            d.enumerate_support()
        with pytest.raises(ParameterError, match=r"L <= 14.* got 'exact' and L = 16"):
            d.marginals("exact")
        with pytest.raises(ParameterError, match="got 'best'"):
            Matching(torch.zeros(2, 2)).marginals("best")
        assert Matching(torch.zeros(8, 8)).enumerate_support().shape == (40320, 8)


class TestPyro:
    def test_in_plates(self):
        logits = logits_of(3, 2, 4)

        def model():
            with pyro.plate("outer", 5, dim=-2), pyro.plate("inner", 3, dim=-1):
                return pyro.sample("a", Matching(logits))

        with pyro.validation_enabled(True):
            trace = poutine.trace(model).get_trace()
            trace.compute_log_prob()
        site = trace.nodes["a"]
        assert site["value"].shape == (5, 3, 2)
        assert site["log_prob"].shape == (5, 3)
        torch.testing.assert_close(site["log_prob"], Matching(logits).log_prob(site["value"]))

    @pytest.mark.parametrize("forbid", [False, True])
    def test_parallel_enumeration(self, forbid):
        logits = logits_of(2, 3)
        if forbid:
            logits[0, 1] = -INF
        data = torch.tensor([[0.3, 1.8], [-0.9, 2.2], [4.1, 0.1]], dtype=torch.float64)
        locs = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True)

        @config_enumerate
        def model():
            with pyro.plate("party", 3):
                a = pyro.sample("a", Matching(logits))
                pyro.sample("x", dist.Normal(locs[a], 1.0).to_event(1), obs=data)

        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        with pyro.validation_enabled(True):
            loss = elbo.differentiable_loss(model, lambda: None)
        every, weights = enumerated(logits)
        likelihood = dist.Normal(locs[every], 1.0).log_prob(data[:, None]).sum(-1)
        expected = -(likelihood + (weights / weights.sum()).log()).logsumexp(-1).sum()
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, locs)
        (expected_gradient,) = torch.autograd.grad(expected, locs)
        torch.testing.assert_close(gradient, expected_gradient)

    def test_relaxed_in_a_guide(self):
        logits = torch.zeros(2, 3, requires_grad=True)

        def program():
            with pyro.plate("party", 4):
                return pyro.sample("p", RelaxedMatching(logits, 0.5).mask(False))

        with pyro.validation_enabled(True):
            trace = poutine.trace(program).get_trace()
            assert trace.log_prob_sum() == 0
        value = trace.nodes["p"]["value"]
        assert value.shape == (4, 2, 3) and value.requires_grad


class TestRelaxed:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [*SHAPES[1:], (40, 60), (30, 30)])
    @pytest.mark.parametrize("temperature", [10.0, 1.0, 0.1, 1e-3])
    def test_rows_and_columns(self, shape, temperature, dtype):
        logits = logits_of(2, *shape, forbid=0.3, dtype=dtype)
        d = RelaxedMatching(logits, temperature)
        value = d.rsample((3,))
        assert value.dtype == dtype and value.shape == (3, 2, *shape) == d.shape((3,))
        assert d.support.check(value).all()
        assert (value.sum(-1) - 1).abs().max() < 1e-6
        assert value.sum(-2).max() <= 1 + 1e-6
        if shape[0] == shape[1]:
            assert value.sum(-2).min() >= 1 - 1e-6
        assert (value[:, logits.isneginf()] == 0).all()

    def test_is_the_optimum(self):
        # Of Σ P scores + H(P) + H(1 - column sums) with the slack split evenly among K - L rows:
        # all multipliers are differences that must not depend on the row.
        torch.manual_seed(1)
        value = RelaxedMatching(logits_of(3, 5), 0.7).rsample()
        noise = gumbel(1, (3, 5), value)
        slack = (1 - value.sum(0)).log()
        reduced = value.log() - (logits_of(3, 5) + noise) / 0.7 - slack
        torch.testing.assert_close(reduced, reduced[:, :1].expand(3, 5), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("shape", [(3, 3), (4, 6), (20, 25)])
    def test_cold_limit(self, shape):
        logits = logits_of(5, *shape, forbid=0.2)
        torch.manual_seed(2)
        value = RelaxedMatching(logits, 1e-6).sample()
        perturbed = logits + gumbel(2, logits.shape, logits)
        for p, matrix in zip(value, perturbed, strict=True):
            best = torch.from_numpy(linear_sum_assignment(matrix.numpy(), maximize=True)[1])
            torch.testing.assert_close(p, one_hot(best, shape[1]).double(), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("shape", [(1, 3), (3, 3), (3, 5)])
    @pytest.mark.parametrize("temperature", [2.0, 0.2])
    def test_gradients_by_finite_differences(self, shape, temperature):
        weights = logits_of(2, *shape, seed=9)
        forbidden = logits_of(2, *shape, forbid=0.3).isneginf()

        def loss(logits, temperature):
            torch.manual_seed(4)
            logits = logits.masked_fill(forbidden, -INF)
            return (weights * RelaxedMatching(logits, temperature).rsample()).sum()

        logits = logits_of(2, *shape).requires_grad_()
        temperature = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
        slopes = torch.autograd.grad(loss(logits, temperature), (logits, temperature))
        assert all(slope.isfinite().all() for slope in slopes)
        for _ in range(3):
            toward = torch.randn(2, *shape, dtype=torch.float64), torch.randn(()).double()
            with torch.no_grad():
                up = loss(logits + 1e-4 * toward[0], temperature + 1e-4 * toward[1])
                down = loss(logits - 1e-4 * toward[0], temperature - 1e-4 * toward[1])
            expected = sum((s * t).sum() for s, t in zip(slopes, toward, strict=True))
            torch.testing.assert_close((up - down) / 2e-4, expected, rtol=1e-3, atol=3e-3)

    def test_batches_and_expand(self):
        temperature = torch.tensor([0.5, 1.0, 2.0])
        d = RelaxedMatching(torch.zeros(4, 1, 2, 3), temperature)
        assert d.batch_shape == (4, 3) and d.event_shape == (2, 3) and d.has_rsample
        wide = d.expand((5, 4, 3))
        assert type(wide) is RelaxedMatching and wide.rsample((2,)).shape == (2, 5, 4, 3, 2, 3)
        assert torch.equal(wide.temperature[0, 0], temperature)
        assert isinstance(d.matching, Matching) and d.matching.batch_shape == (4, 3)
        assert torch.equal(wide.matching.logits, wide.logits)
        assert d.expand((0, 4, 3)).rsample().shape == (0, 4, 3, 2, 3)
        # Colder is nearer to 0/1.
        peaks = d.sample((200,)).amax(-1).mean((0, 1, -1))
        assert peaks[0] > peaks[1] > peaks[2]

    def test_errors(self):
        with pytest.raises(ValueError, match="temperature"):
            RelaxedMatching(torch.zeros(2, 3), 0.0)
        with pytest.raises(ValueError, match=r"logits \(4,\), temperature \(3,\)"):
            RelaxedMatching(torch.zeros(4, 2, 3), torch.ones(3))
        d = RelaxedMatching(torch.zeros(2, 3), 1.0)
        with pytest.raises(NotImplementedError, match="no tractable density"):
            d.log_prob(d.sample())

    def test_says_when_it_did_not_converge(self, monkeypatch):
        monkeypatch.setattr(module, "_MAX_STEPS", 0)
        with pytest.warns(UserWarning, match="did not converge"):
            RelaxedMatching(logits_of(6, 6), 1.0).rsample()


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(3, 4), (16, 20)])
def test_cuda_gives_the_same_result(shape):
    logits = logits_of(2, *shape, forbid=0.3)
    here, there = Matching(logits), Matching(logits.cuda())
    value = there.sample((10,))
    assert value.device.type == "cuda" and there.support.check(value).all()
    assert torch.equal(there.mode.cpu(), here.mode)
    for a, b in [
        (here.log_normalizer, there.log_normalizer),
        (here.log_prob(value.cpu()), there.log_prob(value)),
        (here.marginals(), there.marginals()),
        (here.marginals("bp"), there.marginals("bp")),
    ]:
        assert b.device.type == "cuda"
        torch.testing.assert_close(a, b.cpu(), atol=1e-8, rtol=1e-8)
    relaxed = RelaxedMatching(logits.cuda(), 0.1)
    assert relaxed.support.check(relaxed.rsample((3,))).all()
