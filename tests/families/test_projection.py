# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Moment matching against quadrature and Monte Carlo."""

import itertools
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from torch.distributions import biject_to, constraints

from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor
from pyro_fusion.families.projection import (
    _expected_log_sigmoid,
    dirichlet_from_stick_breaking,
    is_stick_breaking,
    project_draws,
    to_marginals,
)

SIGMAS = 5


def tensor(*args):
    return torch.tensor(*args, dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.01, 1.0, 1.9, 2.1, 10.0, 300.0])
@pytest.mark.parametrize("loc", [0.0, 3.0, -20.0, 25.0])
def test_expected_log_sigmoid_against_quadrature(loc, scale):
    def integrand(z):
        density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return -np.logaddexp(0, -(loc + scale * z)) * density

    bend = -loc / scale
    ends = sorted({-35.0, 35.0, 0.0, *(bend + w / scale for w in (-40, -10, 0, 10, 40))})
    ends = [x for x in ends if abs(x) <= 35]
    truth = sum(
        quad(integrand, a, b, limit=500, epsabs=1e-14, epsrel=1e-12)[0]
        for a, b in itertools.pairwise(ends)
    )
    result = float(_expected_log_sigmoid(tensor(loc), tensor(scale)))
    assert result == pytest.approx(truth, rel=1e-10, abs=1e-11)


def stick_breaking(loc, scale):
    base = dist.Normal(loc, scale).to_event(1)
    return dist.TransformedDistribution(base, biject_to(constraints.simplex))


@pytest.mark.parametrize("scale", [0.1, 1.0, 15.0])
def test_stick_breaking_keeps_the_expected_logarithm(scale):
    torch.manual_seed(0)
    d = stick_breaking(torch.randn(2, 4).double(), torch.full((2, 4), scale).double())
    f = Factor.of(d)
    assert is_stick_breaking(f)
    dirichlet = dirichlet_from_stick_breaking(f)
    assert dirichlet.distribution().event_shape == (5,) and dirichlet.batch_shape == (2,)
    # log x from the unconstrained draw: x itself underflows where the scale is large.
    y = f.params["loc"] + f.params["scale"] * torch.randn(20_000, 2, 4).double()
    u = y - torch.arange(4, 0, -1).log()
    left = torch.nn.functional.logsigmoid(-u).cumsum(-1)
    take = torch.nn.functional.logsigmoid(u)
    zero = torch.zeros_like(left[..., :1])
    logs = torch.cat([take, zero], -1) + torch.cat([zero, left], -1)
    if scale < 10:
        value = d.base_dist.sample((1,))
        u1 = value - torch.arange(4, 0, -1).log()
        first = torch.nn.functional.logsigmoid(u1)[..., 0]
        torch.testing.assert_close(d.transforms[0](value).log()[..., 0], first)
    standard_error = logs.std(0) / math.sqrt(len(logs))
    assert bool(((dirichlet.mean - logs.mean(0)).abs() < SIGMAS * standard_error).all())


def test_correlated_sticks_use_their_marginals():
    tril = tensor([[1.0, 0.0], [0.9, 0.3]])
    base = dist.MultivariateNormal(torch.zeros(2).double(), scale_tril=tril)
    joint = Factor.of(dist.TransformedDistribution(base, biject_to(constraints.simplex)))
    marginal = Factor.of(stick_breaking(torch.zeros(2).double(), (tril @ tril.T).diagonal().sqrt()))
    torch.testing.assert_close(
        dirichlet_from_stick_breaking(joint).params["concentration"],
        dirichlet_from_stick_breaking(marginal).params["concentration"],
    )


def test_marginals_and_what_they_lose():
    covariance = tensor([[4.0, 1.5], [1.5, 1.0]])
    d = dist.MultivariateNormal(tensor([1.0, 2.0]), covariance)
    marginal, lost = to_marginals(Factor.of(d))
    product = dist.MultivariateNormal(d.loc, covariance.diagonal().diag())
    assert lost == pytest.approx(float(torch.distributions.kl_divergence(d, product)))
    torch.testing.assert_close(marginal.params["scale"], covariance.diagonal().sqrt())
    assert marginal.shape == (2,) and marginal.batch_shape == ()


@pytest.mark.parametrize(
    "d",
    [
        dist.Normal(tensor([1.0, -3.0]), tensor([0.1, 2.0])),
        dist.LogNormal(tensor([1.0]), tensor([0.5])),
        dist.Gamma(tensor([0.5, 30.0]), tensor([2.0, 0.1])),
        dist.InverseGamma(tensor([3.0]), tensor([2.0])),
        dist.Dirichlet(tensor([[0.5, 2.0, 8.0]])),
        dist.MultivariateNormal(tensor([[1.0, 2.0]]), tensor([[[4.0, 1.5], [1.5, 1.0]]])),
    ],
    ids=lambda d: type(d).__name__,
)
def test_projected_draws_have_the_mean_statistics(d):
    """Which is the maximum of the likelihood: no small change of it does better."""
    torch.manual_seed(0)
    draws = d.sample((2000,))
    f = project_draws(Factor.of(d), draws)
    best = f.distribution().log_prob(draws).sum()
    for step in (1e-2, -1e-2):
        moved = f.from_natural(f.natural * (1 + step)).distribution()
        assert float(moved.log_prob(draws).sum()) < float(best)
    assert float(Factor.of(d).divergence(f).max()) < 0.01


def test_draws_that_do_not_vary():
    like = Factor.of(dist.Normal(torch.zeros(2), 1.0))
    with pytest.raises(ParameterError, match="scale"):
        project_draws(like, torch.ones(10, 2))
