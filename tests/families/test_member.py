# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What a member of a family refuses, what it shares with its distribution, and its centre."""

import copy

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch.distributions import biject_to
from torch.distributions import transforms as tt

from pyro_fusion import PosteriorGuide
from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor, NormalGamma, NormalWishart, family_named
from pyro_fusion.families.transforms import describe, rebuild, with_cache
from pyro_fusion.posterior.posterior import Posterior
from tests.families.members import MEMBERS

SEEDS = torch.arange(3)


def behind(base, *transforms):
    return dist.TransformedDistribution(base, list(transforms))


class TestCaches:
    @pytest.mark.parametrize("inverse", [False, True])
    def test_are_not_shared(self, inverse):
        t = tt.ExpTransform(cache_size=1)
        base = dist.Gamma(2.0, 1.0) if inverse else dist.MultivariateNormal(
            torch.zeros(2), torch.eye(2)
        )  # fmt: skip
        d = behind(base, t.inv if inverse else t)
        p = Posterior({"x": d})
        inside = p.decomposed["x"].transforms[0]
        assert inside is not d.transforms[0] and inside._cache_size == 0
        one, two = (p.decomposed["x"].distribution() for _ in range(2))
        assert len({id(x.transforms[0]) for x in (one, two, d)}) == 3
        guide = PosteriorGuide(p)
        guide()
        copy.deepcopy(guide)

    def test_of_transforms_given_to_the_constructor(self):
        t = tt.ExpTransform(cache_size=1)
        params = {"loc": torch.zeros(2), "scale": torch.ones(2)}
        f = Factor(family_named("Normal"), params, (t, tt.TanhTransform()), 1)
        assert all(part._cache_size == 0 for part in f.transforms)
        parts = f.distribution().transforms
        assert parts[0] is not t and not {*map(id, parts)} & {*map(id, f.transforms)}

    def test_of_transforms_without_with_cache(self):
        class Own(tt.ExpTransform):
            def __init__(self, cache_size=0):
                super().__init__(cache_size=cache_size)

        t = Own(1)
        x = torch.ones(2)
        t(x)
        plain = with_cache(t, 0)
        assert plain is not t and plain._cache_size == 0 and t._cache_size == 1
        assert plain._cached_x_y == (None, None)
        assert with_cache(plain, 0) is plain and with_cache(t, 1) is not t
        assert torch.equal(with_cache(plain, 1)(x), t(x))


class TestCheck:
    @pytest.mark.parametrize(
        "make",
        [
            lambda: dist.Normal(torch.zeros(0), torch.ones(0)),
            lambda: dist.Normal(torch.zeros(3, 0), torch.ones(3, 0)).to_event(1),
            lambda: dist.Gamma(torch.ones(0, 3), 1.0),
        ],
    )
    def test_nothing(self, make):
        with pytest.raises(ParameterError, match="no elements"):
            Posterior({"x": make()})

    @pytest.mark.parametrize(
        "d, what",
        [
            (dist.Poisson(torch.tensor([1.0, 0.0])), "natural"),
            (dist.Normal(0.0, torch.tensor(1e-200, dtype=torch.float64)), "natural"),
        ],
        ids=str,
    )
    def test_at_the_boundary(self, d, what):
        with pytest.raises(ParameterError, match=what):
            Factor.of(d).check()

    def test_a_category_of_probability_zero_is_legal(self):
        Factor.of(dist.Categorical(torch.tensor([0.5, 0.5, 0.0]))).check()

    @pytest.mark.parametrize(
        "d",
        [
            behind(dist.Normal(1.0, 1.0), tt.PowerTransform(torch.tensor(0.5))),
            behind(dist.Normal(1.0, 1.0), tt.ExpTransform().inv),
            behind(dist.Normal(0.5, 0.1), tt.SigmoidTransform().inv),
            behind(dist.Gamma(2.0, 9.0), tt.SigmoidTransform().inv),
            behind(dist.Gamma(2.0, 9.0), tt.AffineTransform(1.0, -0.1), tt.ExpTransform().inv),
            behind(dist.Gamma(2.0, 9.0), tt.ExpTransform().inv, tt.ExpTransform().inv),
            behind(dist.Poisson(5.0), tt.ExpTransform().inv),
            behind(dist.Gamma(2.0, 1.0), tt.AffineTransform(1.0, 1e308)),
            behind(dist.Exponential(1.0), tt.PowerTransform(torch.tensor(1e30))),
            behind(dist.Normal(torch.ones(3), 1.0).to_event(1), tt.StickBreakingTransform().inv),
        ],
        ids=lambda d: f"{type(d.base_dist).__name__}-{[type(t).__name__ for t in d.transforms]}",
    )  # fmt: skip
    def test_transforms_that_do_not_fit(self, d):
        with pytest.raises(ParameterError):
            Posterior({"x": d})

    @pytest.mark.parametrize(
        "d",
        [
            behind(dist.Beta(2.0, 1.0), tt.ExpTransform().inv),
            behind(dist.Beta(2.0, 1.0), tt.SigmoidTransform().inv),
            behind(dist.Beta(2.0, 1.0), tt.AffineTransform(-1.0, 2.0), tt.TanhTransform().inv),
            behind(dist.Gamma(2.0, 1.0), tt.AffineTransform(1.0, 1.0),
                   *[tt.ExpTransform().inv] * 2),
            behind(dist.Normal(0.0, 1.0), biject_to(constraints.interval(0.0, 2.0)),
                   tt.ExpTransform().inv),
            behind(dist.Dirichlet(torch.ones(3)), tt.StickBreakingTransform().inv),
            behind(dist.LogNormal(torch.zeros(4), 9.0).to_event(1),
                   tt.ReshapeTransform((4,), (2, 2)),
                   tt.PowerTransform(torch.tensor(-2.0))),
        ],
        ids=lambda d: f"{type(d.base_dist).__name__}-{[type(t).__name__ for t in d.transforms]}",
    )  # fmt: skip
    def test_transforms_that_fit(self, d):
        Factor.of(d).check()


class TestExponents:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_are_exact(self, dtype):
        third = tt.PowerTransform(torch.tensor(1 / 3, dtype=torch.float64))
        d = behind(
            dist.Gamma(torch.tensor(2.0, dtype=dtype), torch.tensor(1.0, dtype=dtype)), third
        )
        f = Factor.of(d)
        (t,) = f.transforms
        again = rebuild(describe(t))
        for power in (t, again):
            assert power.exponent.dtype == torch.float64 and float(power.exponent) == 1 / 3
        # A scalar's dtype is its parameters' all the same.
        assert f.distribution().sample().dtype == dtype and f.center().dtype == dtype
        (inverse,) = Factor.of(
            behind(d.base_dist, tt.PowerTransform(torch.tensor(3.0)).inv)
        ).transforms
        assert float(inverse.exponent) == 1 / 3


class TestCenter:
    @pytest.mark.parametrize("member", MEMBERS, ids=str)
    def test_is_a_value(self, member):
        f = Factor.of(member.make(SEEDS))
        center = f.center()
        assert center.shape == f.shape
        assert bool(torch.isfinite(f.distribution().log_prob(center)).all())
        assert f.family.center(f.params).shape == f.base_shape + f.family.event_shape(f.params)

    def test_where_there_is_no_mean(self):
        d = NormalGamma(torch.tensor(1.0), 1.0, 0.25, 2.0)
        torch.testing.assert_close(Factor.of(d).center(), torch.tensor([1.0, 0.125]))
        tril = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        d = NormalWishart(torch.tensor([3.0, 4.0]), 1.0, 1.5, scale_tril=tril)
        expected = torch.tensor([[3.0, 1.5, 1.5], [4.0, 1.5, 7.5]])
        torch.testing.assert_close(Factor.of(d).center(), expected)
        assert bool(torch.isfinite(Factor.of(dist.Bernoulli(torch.tensor(0.5))).center()))
