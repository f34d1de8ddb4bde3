# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A factor as a distribution: KL divergences against independent ones, all else delegated."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import biject_to, constraints, kl_divergence

from pyro_fusion.errors import StructureError
from pyro_fusion.families import Factor
from pyro_fusion.families.distribution import FactorDistribution
from tests.families.members import BARE, MEMBERS, normal_wishart, wishart, wishart_kl

SEEDS = torch.arange(3)
DISCRETE = ("Categorical", "Bernoulli", "Poisson")


def wrapped(d, **settings):
    return FactorDistribution(Factor.of(d), **settings)


@pytest.fixture(params=MEMBERS, ids=str)
def member(request):
    return request.param


class TestKl:
    def test_is_the_independent_one(self, member):
        other = SEEDS + 7
        value = kl_divergence(wrapped(member.make(SEEDS)), wrapped(member.make(other)))
        torch.testing.assert_close(value, member.kl(SEEDS, other), rtol=1e-9, atol=1e-9)

    def test_of_equals_is_zero(self, member):
        value = kl_divergence(*(wrapped(member.make(SEEDS)) for _ in range(2)))
        torch.testing.assert_close(value, torch.zeros(3).double(), rtol=0, atol=1e-9)

    def test_broadcasts(self):
        a, b = torch.arange(2).unsqueeze(1), SEEDS + 7
        value = kl_divergence(wrapped(wishart(a)), wrapped(wishart(b)))
        truth = wishart_kl(wishart(a.expand(2, 3)), wishart(b.expand(2, 3)))
        torch.testing.assert_close(value, truth)

    def test_keeps_the_dtype(self):
        a, b = (wrapped(BARE["Gamma"][0](s, torch.float32)) for s in (SEEDS, SEEDS + 7))
        assert kl_divergence(a, b).dtype == torch.float32

    def test_far_from_the_origin(self):
        def at(loc):
            loc = torch.tensor([loc], dtype=torch.float64)
            return wrapped(dist.MultivariateNormal(loc, torch.eye(1).double()))

        value = kl_divergence(at(1e8), at(1e8 + 2.0**-6))
        assert float(value) == pytest.approx(2.0**-13, rel=1e-9)

    @pytest.mark.parametrize("of_first", [False, True])
    def test_gradients(self, of_first):
        loc = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
        scale = torch.tensor([1.1, 0.9], dtype=torch.float64, requires_grad=True)
        fixed = {"loc": torch.zeros(2).double(), "scale": torch.ones(2).double()}
        both = [{"loc": loc, "scale": scale}, fixed][:: 1 if of_first else -1]
        like = Factor.of(dist.LogNormal(**fixed))
        ours = [FactorDistribution(replace(like, params=params)) for params in both]
        slopes = [
            torch.autograd.grad(kl_divergence(*pair).sum(), (loc, scale))
            for pair in (ours, [dist.Normal(**params) for params in both])
        ]
        torch.testing.assert_close(*slopes)

    def test_of_different_families_is_refused(self):
        a, b = wrapped(BARE["Normal"][0](SEEDS)), wrapped(BARE["Gamma"][0](SEEDS))
        with pytest.raises(StructureError, match="no common exponential family: Normal"):
            kl_divergence(a, b)

    def test_with_plain_distributions_is_not_registered(self):
        a = BARE["Normal"][0](SEEDS)
        with pytest.raises(NotImplementedError):
            kl_divergence(wrapped(a), a)

    def test_through_independent_and_pyro(self):
        # As in a plate with a subset of its dimensions made events.
        d, e = (wrapped(normal_wishart(s)) for s in (SEEDS, SEEDS + 7))
        value = kl_divergence(d.to_event(1), e.to_event(1))
        torch.testing.assert_close(value, kl_divergence(d, e).sum())


class TestDelegates:
    def test_shapes_and_support(self, member):
        d = member.make(SEEDS)
        ours = wrapped(d)
        assert (ours.batch_shape, ours.event_shape) == (d.batch_shape, d.event_shape)
        plain = ours.factor.distribution()
        assert ours.support.event_dim == plain.support.event_dim
        assert ours.support.is_discrete == plain.support.is_discrete
        assert ours.has_rsample == plain.has_rsample

    def test_draws_and_densities(self, member):
        ours = wrapped(member.make(SEEDS), validate_args=False)
        plain = ours.factor.distribution(validate_args=False)
        torch.manual_seed(1)
        value = ours.sample((4,))
        torch.manual_seed(1)
        torch.testing.assert_close(value, plain.sample((4,)), rtol=0, atol=0)
        assert value.shape == (4, 3) + ours.event_shape
        assert ours.log_prob(value).shape == (4, 3)
        torch.testing.assert_close(ours.log_prob(value), plain.log_prob(value), equal_nan=True)

    def test_density_is_that_of_what_was_taken_apart(self, member):
        d = member.make(SEEDS)
        ours = wrapped(d)
        value = ours.sample()
        truth = d.log_prob(value)
        torch.testing.assert_close(ours.log_prob(value), truth, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("name", sorted(BARE))
    def test_expand(self, name):
        d = wrapped(BARE[name][0](torch.arange(1)))
        wide = d.expand((2, 3))
        assert isinstance(wide, FactorDistribution)
        assert wide.batch_shape == (2, 3) and wide.event_shape == d.event_shape
        value = d.sample()
        torch.testing.assert_close(
            wide.log_prob(value), d.log_prob(value).expand(2, 3), rtol=1e-12, atol=1e-12
        )
        other = wrapped(BARE[name][0](torch.arange(1) + 7))
        truth = kl_divergence(d, other).expand(2, 3)
        torch.testing.assert_close(kl_divergence(wide, other.expand((2, 3))), truth)

    @pytest.mark.parametrize("name", sorted(BARE))
    def test_rsample(self, name):
        make = BARE[name][0]
        like = Factor.of(make(SEEDS))
        params = {k: v.clone().requires_grad_() for k, v in like.params.items()}
        d = FactorDistribution(replace(like, params=params))
        assert d.has_rsample == (name not in DISCRETE)
        if not d.has_rsample:
            with pytest.raises(NotImplementedError):
                d.rsample()
            return
        slopes = torch.autograd.grad(d.rsample().sum(), list(params.values()), allow_unused=True)
        assert all(s is None or s.isfinite().all() for s in slopes)
        assert any(s is not None and bool((s != 0).any()) for s in slopes)
        assert not d.sample().requires_grad

    @pytest.mark.parametrize("name", ["Normal", "Gamma", "Dirichlet", "LogNormal"])
    def test_moments(self, name):
        d = BARE[name][0](SEEDS)
        torch.testing.assert_close(wrapped(d).mean, d.mean)
        torch.testing.assert_close(wrapped(d).variance, d.variance)

    def test_validates_its_value(self):
        d = wrapped(BARE["Dirichlet"][0](SEEDS), validate_args=True)
        with pytest.raises(ValueError, match="within the support"):
            d.log_prob(torch.ones(3, 4).double())


def test_is_a_site_of_a_program():
    simplex = dist.TransformedDistribution(
        dist.Normal(torch.zeros(3, 2), 1.0).to_event(1), biject_to(constraints.simplex)
    )

    def program():
        with pyro.plate("n", 3):
            return pyro.sample("x", wrapped(simplex))

    trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x"]
    assert site["value"].shape == (3, 3) and site["log_prob"].shape == (3,)
    torch.testing.assert_close(site["log_prob"], simplex.log_prob(site["value"]))
