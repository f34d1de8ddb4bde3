# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of NumPyro's MCMC, and of JAX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributions import constraints

from pyro_fusion import (
    DrawsError,
    from_draws,
    from_numpyro,
)
from pyro_fusion.readers.draws import read_draws

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import numpyro.distributions as ndist  # noqa: E402
from numpyro.infer import MCMC, NUTS, autoguide  # noqa: E402

X = jnp.array([[1.0, 5.0], [2.0, 4.0], [1.5, 6.0]])


def model(x: Any = None) -> None:
    weights = numpyro.sample("weights", ndist.Dirichlet(jnp.array([30.0, 20.0])))
    with numpyro.plate("component", 2):
        loc = numpyro.sample("loc", ndist.Normal(0.0, 2.0))
        numpyro.sample("scale", ndist.Gamma(9.0, 9.0))
    numpyro.deterministic("mean", weights @ loc)
    with numpyro.plate("data", 3, dim=-2), numpyro.plate("each", 2, dim=-1):
        numpyro.sample("x", ndist.Normal(loc, 1.0), obs=x)


@pytest.fixture(scope="module")
def mcmc() -> Any:
    result = MCMC(
        NUTS(model, target_accept_prob=0.95),
        num_warmup=200,
        num_samples=400,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    result.run(jax.random.key(0), X)
    return result


def test_recovers_the_posterior(mcmc):
    # Each component has a column of the data of its own.
    with pytest.warns(UserWarning, match="plate 'component' labels .* when they change places"):
        reading = read_draws(mcmc, axes={"weights": "component"})
    assert (reading.num_chains, reading.num_draws, reading.divergences) == (2, 400, 0)
    posterior = reading.posterior
    assert list(posterior.factors) == ["weights", "loc", "scale"]
    assert posterior.axes["loc"] == ("component",)
    # Prior N(0, 2²), three data of variance 1.
    sd = (0.25 + 3) ** -0.5
    mean = torch.tensor([4.5, 15.0]) * sd**2
    found = posterior.factors["loc"]
    assert (found.mean - mean).abs().max() < 4 * sd / reading.ess["loc"] ** 0.5
    assert (found.stddev / sd - 1).abs().max() < 4 / (2 * reading.ess["loc"]) ** 0.5
    # Its prior is the posterior of the weights: 2 N KL is a chi-square of two parameters.
    truth = torch.distributions.Dirichlet(torch.tensor([30.0, 20.0]))
    kl = torch.distributions.kl_divergence(posterior.factors["weights"], truth)
    assert kl < 18 / (2 * reading.ess["weights"])


def test_structure_as_of_a_guide(mcmc):
    sizes = {"weights": 1, "loc": 2, "scale": 2}
    params = {f"{k}_auto_{x}": jnp.ones(n) for k, n in sizes.items() for x in ("loc", "scale")}
    theirs = from_numpyro(autoguide.AutoNormal(model), params, X)
    mine = from_draws(mcmc)
    assert mine.axes == theirs.axes
    for site, f in theirs.decomposed.items():
        g = mine.decomposed[site]
        assert (g.structure(), g.batch_dim, g.shape) == (f.structure(), f.batch_dim, f.shape)


def test_arrays_with_the_model(mcmc):
    ours = from_draws(mcmc)
    for convert in (jnp.asarray, np.asarray):
        samples = {k: convert(v) for k, v in mcmc.get_samples(group_by_chain=True).items()}
        other = from_draws(samples, model, X, group_by_chain=True)
        for site, f in ours.decomposed.items():
            for name, value in f.params.items():
                assert torch.equal(value, other.decomposed[site].params[name])


def test_supports_of_numpyro():
    x = jnp.exp(jax.random.normal(jax.random.key(0), (500,)))
    theirs = from_draws({"x": x}, supports={"x": ndist.constraints.positive})
    mine = from_draws({"x": x}, supports={"x": constraints.positive})
    assert theirs.decomposed["x"].structure() == mine.decomposed["x"].structure()


def test_support_that_pyro_has_not():
    x = np.eye(2) * np.random.default_rng(0).gamma(9.0, size=(100, 1, 1))
    positive = {"x": ndist.constraints.positive_definite}
    with pytest.raises(DrawsError, match=r"'x': no bijection onto .*families=\{'x': ...\}"):
        from_draws({"x": x}, supports=positive)


def test_deterministic_sites_by_name(mcmc):
    assert list(from_draws(mcmc, sites=["mean"]).factors) == ["mean"]


@pytest.mark.parametrize("x", [jnp.arange(100), jnp.arange(100) > 50], ids=["int", "bool"])
def test_integers(x):
    with pytest.raises(DrawsError, match=r"'x': expected floating-point draws, got (int32|bool)"):
        from_draws({"x": x})


def test_diverging(mcmc, monkeypatch):
    diverging = np.zeros(800, dtype=bool)
    diverging[:5] = True
    monkeypatch.setattr(mcmc, "get_extra_fields", lambda: {"diverging": diverging})
    with pytest.warns(UserWarning, match="5 transitions diverged"):
        assert read_draws(mcmc).divergences == 5


def test_not_run():
    unused = MCMC(NUTS(model), num_warmup=1, num_samples=1, progress_bar=False)
    with pytest.raises(DrawsError, match=r"the MCMC has no draws: call mcmc.run\(rng_key"):
        from_draws(unused)


def test_something_else_of_numpyro():
    with pytest.raises(DrawsError, match="got NUTS of NumPyro"):
        from_draws(NUTS(model))
