# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Our readers keep the contract, and it finds those that do not."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_fusion import (
    Posterior,
    PosteriorGuide,
    from_draws,
    from_guide,
    from_module,
    from_numpyro,
    from_sklearn,
    read,
    register_reader,
    to_numpyro,
)
from pyro_fusion.readers import registry
from pyro_fusion.testing.reader import check_reader

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
AXES = {"loc": ("component", None), "scale": ("component",)}


def known(dtype: torch.dtype) -> dict[str, Distribution]:
    one = torch.ones((), dtype=dtype)
    loc = torch.tensor([[-5.0, 1.0], [0.0, 2.0], [5.0, 3.0]], dtype=dtype)
    return {
        "loc": dist.Normal(loc, 0.1 * loc.abs() + one).to_event(1),
        "scale": dist.LogNormal(0.1 * loc[:, 0], one / 2),
    }


# float32 has seven digits.
NATS = {torch.float32: 1e-9, torch.float64: 1e-15}


@DTYPES
def test_guides(dtype: torch.dtype) -> None:
    p = Posterior(known(dtype), AXES)
    check_reader(from_guide, PosteriorGuide(p), known(dtype), AXES, nats=NATS[dtype])

    def model() -> None:
        with pyro.plate("component", 3):
            pyro.sample("loc", dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1))
            pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=dtype), 1.0))

    for kind in (AutoNormal, AutoMultivariateNormal):
        guide = kind(model, init_loc_fn=pyro.infer.autoguide.init_to_median, init_scale=0.2)
        guide()
        expected: dict[str, Distribution] = {
            "loc": dist.Normal(torch.zeros(3, 2, dtype=dtype), 0.2).to_event(1),
            "scale": dist.LogNormal(torch.zeros(3, dtype=dtype), 0.2),
        }
        if kind is AutoMultivariateNormal:
            eye = 0.2 * torch.eye(2, dtype=dtype)
            zeros = torch.zeros(3, 2, dtype=dtype)
            expected["loc"] = dist.MultivariateNormal(zeros, scale_tril=eye.expand(3, 2, 2))
        with torch.no_grad():
            for loc in guide.locs.parameters() if kind is AutoNormal else [guide.loc]:
                loc.zero_()
        check_reader(from_guide, guide, expected, AXES, nats=NATS[torch.float32])


def test_programs() -> None:
    """A guide that has to be run, and one that is projected from runs with a seed."""

    def guide() -> None:
        with pyro.plate("component", 3):
            pyro.sample("loc", known(torch.float32)["loc"])
            pyro.sample("scale", known(torch.float32)["scale"])

    check_reader(from_guide, guide, known(torch.float32), AXES)

    zero, one = torch.zeros(()), torch.ones(())

    def dependent() -> None:
        z = pyro.sample("z", dist.Normal(zero, one))
        pyro.sample("x", dist.Normal(z, 1.0))

    reader = functools.partial(from_guide, num_samples=1000, seed=3)
    # The mean and the log-variance of x are of 1000 draws: to 4 and 5 standard errors.
    expected = {"z": dist.Normal(0.0, 1.0), "x": dist.Normal(0.0, 2.0**0.5)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this guide is no product")
        check_reader(reader, dependent, expected, nats=0.02)


def test_guides_of_numpyro() -> None:
    dtype = torch.float32  # float64 is a setting of JAX
    pytest.importorskip("numpyro")
    guide = to_numpyro(Posterior(known(dtype), AXES))
    check_reader(read, guide, known(dtype), AXES)
    check_reader(lambda g: from_numpyro(g, guide.params), guide, known(dtype), AXES)


@DTYPES
def test_draws(dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = {k: d.sample(torch.Size([10_000])) for k, d in known(dtype).items()}
    positive = torch.distributions.constraints.positive
    reader = functools.partial(from_draws, axes=AXES, supports={"scale": positive}, seed=1)
    # 18 numbers, each with KL of about 1 / 10,000.
    check_reader(reader, draws, known(dtype), AXES, nats=1e-3)
    arrays = {k: x.numpy() for k, x in draws.items()}
    check_reader(reader, arrays, known(dtype), AXES, nats=1e-3)


def test_mcmc() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=500, warmup_steps=100, disable_progbar=True)
    mcmc.run(torch.tensor(1.0))
    # An effective 150 draws at least: KL of 4 standard errors of the mean.
    check_reader(read, mcmc, {"z": dist.Normal(0.5, 0.5**0.5)}, nats=16 / (2 * 150))


def test_fits_of_sklearn() -> None:
    mixture = pytest.importorskip("sklearn.mixture")
    x = np.random.default_rng(0).normal([[-9.0], [9.0]] * 50)
    fit = mixture.BayesianGaussianMixture(
        n_components=2,
        tol=0.1,
        random_state=0,
        covariance_type="spherical",
        weight_concentration_prior_type="dirichlet_distribution",
    ).fit(x)
    loc, kappa, df, cov, weight = (
        torch.tensor(getattr(fit, name))
        for name in (
            "means_",
            "mean_precision_",
            "degrees_of_freedom_",
            "covariances_",
            "weight_concentration_",
        )
    )
    expected = {
        "weights": dist.Dirichlet(weight),
        "loc": dist.Normal(loc, (cov / kappa).sqrt().unsqueeze(-1)).to_event(1),
        "precision": dist.Gamma(df / 2, df * cov / 2),
    }
    axes = {"weights": ("component",), "loc": ("component",), "precision": ("component",)}
    check_reader(from_sklearn, fit, expected, axes, nats=1e-12)


@DTYPES
def test_networks(dtype: torch.dtype) -> None:
    """Linear regression with two inputs that are orthogonal: the posterior is a product."""
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], dtype=dtype)
    y = x @ torch.tensor([[1.0], [2.0]], dtype=dtype)
    module = nn.Linear(2, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0]]))
    precision = x.square().sum(0, keepdim=True) + 1
    expected = {"weight": dist.Normal(module.weight.detach(), precision.rsqrt()).to_event(2)}

    def reader(network: Any) -> Posterior:
        return from_module(network, (x, y), "squared_error", prior_precision=1.0)

    check_reader(reader, module, expected, nats=NATS[dtype])


@DTYPES
def test_files(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Posterior(known(dtype), AXES).save(path)
    other = tmp_path / "b.safetensors"
    other.write_bytes(b"nonsense")
    check_reader(Posterior.load, path, known(dtype), AXES, nonsense=[other, tmp_path])
    check_reader(read, str(path), known(dtype), AXES, nonsense=[other, None, 3, object()])


# -- a reader as a user would write it, and what is wrong with others ------------------------------


class Table:
    """Estimates with their standard errors."""

    def __init__(self, rows: list[tuple[float, float]]) -> None:
        self.estimate, self.error = torch.tensor(rows).unbind(1)


TABLE = Table([(0.1, 0.2), (2.0, 0.3)])
EFFECT = {"effect": dist.Normal(torch.tensor([0.1, 2.0]), torch.tensor([0.2, 0.3]))}
SUBGROUP = {"effect": ("subgroup",)}


def from_table(table: Any) -> Posterior:
    return Posterior({"effect": dist.Normal(table.estimate, table.error)}, SUBGROUP)


def test_a_reader_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", list(registry._ENTRIES))
    register_reader(Table)(from_table)
    check_reader(read, TABLE, EFFECT, SUBGROUP)
    with pytest.raises(AssertionError, match="expected a FusionError for None, got AttributeError"):
        check_reader(from_table, TABLE, EFFECT, SUBGROUP)


def _store(table: Any) -> Posterior:
    pyro.clear_param_store()
    return from_table(table)


def _random(table: Any) -> Posterior:
    torch.rand(1)
    return from_table(table)


def _draws(table: Any) -> Posterior:
    with torch.random.fork_rng():
        error = 1e-7 * torch.rand(2)
    return Posterior({"effect": dist.Normal(table.estimate + error, table.error)}, SUBGROUP)


def _default(table: Any) -> Posterior:
    loc = torch.tensor(table.estimate.tolist())
    return Posterior({"effect": dist.Normal(loc, table.error.to(loc))}, SUBGROUP)


def _sets_default(table: Any) -> Posterior:
    torch.set_default_dtype(torch.float64)
    return from_table(table)


def _source(table: Any) -> Posterior:
    result = from_table(table)
    table.estimate.zero_()
    return result


def _shared(table: Any) -> Posterior:
    result = from_table(table)
    result.decomposed["effect"].params["loc"] = table.estimate  # type: ignore[index]
    return result


def _seen(table: Any) -> Posterior:
    pyro.sample("effect", EFFECT["effect"])
    return from_table(table)


def _doubles(table: Any) -> Posterior:
    return from_table(table).to(dtype=torch.float64)


def _unlabelled(table: Any) -> Posterior:
    return Posterior(from_table(table).factors)


def _renamed(table: Any) -> Posterior:
    return Posterior({"x": from_table(table).factors["effect"]})


def _narrow(table: Any) -> Posterior:
    return Posterior({"effect": dist.Normal(table.estimate, 0.9 * table.error)}, SUBGROUP)


def _family(table: Any) -> Posterior:
    return Posterior({"effect": dist.Gamma(table.estimate, table.error)}, SUBGROUP)


def _mapping(table: Any) -> Any:
    return EFFECT


@pytest.mark.parametrize(
    ("reader", "said"),
    [
        (_store, "Pyro's parameter store unchanged"),
        (_random, "the random states unchanged"),
        (_draws, "the same bits from the same source"),
        (_default, "the same bits .* default dtype"),
        (_sets_default, "torch's default dtype unchanged"),
        (_source, "expected the source unchanged"),
        (_shared, "shares memory with the source"),
        (_seen, r"handlers outside to see nothing, but they saw \['effect'\]"),
        (_doubles, "the dtype torch.float32, got torch.float64"),
        (_unlabelled, r"the labels \('subgroup',\), got \(None,\)"),
        (_renamed, r"the sites \['effect'\], got \['x'\]"),
        (_narrow, "at most 1e-09 nats .* got 0.01"),
        (_family, "a distribution of its family"),
        (_mapping, "expected a Posterior, got dict"),
    ],
)
def test_what_it_finds(reader: Callable[[Any], Posterior], said: str) -> None:
    default = torch.get_default_dtype()
    state = pyro.util.get_rng_state()
    try:
        with pytest.raises(AssertionError, match=said):
            check_reader(reader, Table([(0.1, 0.2), (2.0, 0.3)]), EFFECT, SUBGROUP, nonsense=[])
    finally:
        torch.set_default_dtype(default)
        pyro.util.set_rng_state(state)
