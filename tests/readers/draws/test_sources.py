# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of Pyro's MCMC, and of what looks like ArviZ's; their models, chains and divergences."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS
from pyro.infer.mcmc.api import StreamingMCMC
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_fusion import DrawsError, from_draws
from pyro_fusion.readers.draws import DrawsReading, read_draws


def conjugate(counts: Tensor | None = None) -> None:
    with pyro.plate("component", 2):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Poisson(rate), obs=counts)


COUNTS = torch.tensor([[3.0, 7.0], [5.0, 9.0], [4.0, 12.0], [2.0, 8.0]])
# Gamma(2 + Σx, 1 + 4)
SHAPE, RATE = 2 + COUNTS.sum(0), 5.0
AXES = {"rate": ("component",)}


@pytest.fixture(scope="module")
def nuts() -> Iterator[MCMC]:
    pyro.set_rng_seed(1)
    mcmc = MCMC(NUTS(conjugate, jit_compile=False), 300, 100, disable_progbar=True)
    mcmc.run(COUNTS)
    yield mcmc


class TestPyro:
    def test_recovers_the_posterior(self, nuts):
        # Each rate has observations of its own, as a party's own latents would.
        with pytest.warns(UserWarning, match="'rate' is in the plate 'component' of the data 'x'"):
            reading = read_draws(nuts)
        assert (reading.num_chains, reading.num_draws) == (1, 300)
        assert reading.divergences == 0
        (site,) = reading.posterior.factors
        assert site == "rate"
        assert reading.posterior.axes["rate"] == ("component",)  # by the model's plate
        f = reading.posterior.decomposed["rate"]
        # E[log rate], four standard errors at the effective sample size.
        mean, variance = torch.digamma(SHAPE) - np.log(RATE), torch.polygamma(1, SHAPE)
        error = (variance / reading.ess["rate"]).sqrt()
        assert ((f.params["loc"] - mean).abs() < 4 * error).all()
        relative = f.params["scale"] / variance.sqrt() - 1
        assert relative.abs().max() < 4 / np.sqrt(2 * reading.ess["rate"])
        gamma = read_draws(nuts, families=dist.Gamma, axes=AXES).posterior.factors["rate"]
        # Correlated draws: their effective number in place of their number.
        kl = torch.distributions.kl_divergence(gamma, dist.Gamma(SHAPE, RATE))
        assert kl.max() < 18 / (2 * reading.ess["rate"])

    def test_as_the_samples_with_the_model(self, nuts):
        by_hand = from_draws(nuts.get_samples(), conjugate, COUNTS, axes=AXES)
        for name, value in from_draws(nuts, axes=AXES).decomposed["rate"].params.items():
            assert torch.equal(value, by_hand.decomposed["rate"].params[name])

    def test_several_chains_and_divergences(self, monkeypatch):
        monkeypatch.setattr(pyro.infer.mcmc.api.mp, "cpu_count", lambda: 1)
        with pytest.warns(UserWarning, match="drawn sequentially"):
            mcmc = MCMC(
                HMC(conjugate, step_size=0.5, adapt_step_size=False, num_steps=2),
                60,
                5,
                num_chains=2,
                disable_progbar=True,
            )
        mcmc.run(COUNTS)
        for found, wanted in zip(mcmc._diagnostics, (["divergences"], []), strict=True):
            found["divergences"] = [3, 5] if wanted else []
        with pytest.warns(UserWarning, match="2 transitions diverged"):
            reading = read_draws(mcmc, axes=AXES, max_rhat=None, min_ess=None)
        assert (reading.num_chains, reading.num_draws, reading.divergences) == (2, 60, 2)
        assert repr(reading) == "DrawsReading(2 × 60 draws, 2 divergent)"

    def test_potential_function(self):
        """No model, but transforms."""

        def potential(z: dict[str, Tensor]) -> Tensor:
            return (z["s"] ** 2).sum() / 2

        kernel = HMC(potential_fn=potential, step_size=1.0, num_steps=2, adapt_step_size=False)
        mcmc = MCMC(
            kernel,
            200,
            10,
            initial_params={"s": torch.zeros(2)},
            transforms={"s": biject_to(constraints.positive).inv},
            disable_progbar=True,
        )
        mcmc.run()
        factor = from_draws(mcmc, max_rhat=1.2).factors["s"]
        assert isinstance(factor.base_dist, dist.LogNormal)
        assert factor.batch_shape == ()

    def test_not_run(self):
        mcmc = MCMC(NUTS(conjugate), 10, disable_progbar=True)
        with pytest.raises(DrawsError, match=r"the MCMC has no draws: call mcmc.run"):
            from_draws(mcmc)

    def test_streaming(self):
        mcmc = StreamingMCMC(NUTS(conjugate), 10, disable_progbar=True)
        with pytest.raises(DrawsError, match="a StreamingMCMC keeps no draws"):
            from_draws(mcmc)


class Variable:
    """As a DataArray."""

    def __init__(self, dims: tuple[str, ...], values: Any) -> None:
        self.dims, self.values = dims, values

    def transpose(self, *dims: Any) -> "Variable":
        order = [*dims[:2], *(d for d in self.dims if d not in dims)]
        return Variable(tuple(order), self.values.transpose([self.dims.index(d) for d in order]))


class Dataset(dict):  # type: ignore[type-arg]
    """As a Dataset, which is a mapping too."""

    @property
    def data_vars(self) -> Any:
        return self


Dataset.__module__ = "xarray.core.dataset"


class TestInferenceData:
    """Nothing of ArviZ but names of attributes is relied on."""

    @staticmethod
    def dataset() -> Dataset:
        x, y = np.random.default_rng(0).normal(size=(2, 2, 300, 3)).astype("float32")
        return Dataset(
            loc=Variable(("chain", "draw", "loc_dim_0"), x),
            other=Variable(("other_dim_0", "draw", "chain"), y.transpose(2, 1, 0)),
        )

    @pytest.mark.parametrize("alone", [True, False])
    def test_is_read(self, alone):
        dataset = self.dataset()
        stats = Dataset(diverging=Variable(("chain", "draw"), np.zeros((2, 300), dtype=bool)))
        data = dataset if alone else SimpleNamespace(posterior=dataset, sample_stats=stats)
        reading = read_draws(data, axes={"loc": "c"})
        assert (reading.num_chains, reading.num_draws) == (2, 300)
        assert reading.divergences == (None if alone else 0)
        assert reading.posterior.dtype == torch.float32
        x = dataset["loc"].values
        by_hand = {"loc": x, "other": dataset["other"].values.transpose(2, 1, 0)}
        for site, f in from_draws(by_hand, group_by_chain=True).decomposed.items():
            for name, value in f.params.items():
                assert torch.equal(value, reading.posterior.decomposed[site].params[name])

    def test_without_chains(self):
        data = Dataset(x=Variable(("sample",), np.zeros(100)))
        with pytest.raises(DrawsError, match=r"'x': expected the dimensions 'chain' and 'draw'"):
            from_draws(data)

    def test_without_a_posterior(self):
        """An InferenceData is a mapping, too, of its groups."""

        class InferenceData(dict):  # type: ignore[type-arg]
            def groups(self):
                return list(self)

        InferenceData.__module__ = "arviz.data.inference_data"
        with pytest.raises(DrawsError, match=r"group 'posterior'; got InferenceData .*\['prior'\]"):
            from_draws(InferenceData(prior=self.dataset()))

    def test_of_arviz_itself(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            az = pytest.importorskip("arviz")
            x = np.random.default_rng(0).normal(size=(2, 300, 3))
            diverging = np.zeros((2, 300), dtype=bool)
            diverging[1, 7] = True
            data = az.from_dict(posterior={"x": x}, sample_stats={"diverging": diverging})
        with pytest.warns(UserWarning, match="1 transitions diverged"):
            reading = read_draws(data)
        by_hand = read_draws({"x": x}, group_by_chain=True)
        for name, value in by_hand.posterior.decomposed["x"].params.items():
            assert torch.equal(value, reading.posterior.decomposed["x"].params[name])
        assert read_draws(data.posterior).divergences is None


class TestArrays:
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_numpy(self, dtype):
        x = np.random.default_rng(0).normal(size=(300, 2)).astype(dtype)
        x.setflags(write=False)
        posterior = from_draws({"x": x})
        assert str(posterior.dtype) == f"torch.{dtype}"
        assert np.allclose(posterior.factors["x"].mean.numpy(), x.mean(0), atol=1e-6)

    @pytest.mark.parametrize(("dtype", "read"), [(">f4", "float32"), (np.longdouble, "float64")])
    def test_as_files_have_them(self, dtype, read):
        x = np.random.default_rng(0).normal(size=(300, 2)).astype(dtype)
        posterior = from_draws({"x": x})
        assert str(posterior.dtype) == f"torch.{read}"
        assert np.allclose(posterior.factors["x"].mean.numpy(), x.mean(0).astype(float), atol=1e-6)

    def test_masked(self):
        x = np.ma.masked_array(np.random.default_rng(0).normal(size=300), np.arange(300) < 5)
        with pytest.raises(DrawsError, match="got 5 draws of 300 with NaN"):
            from_draws({"x": x})

    def test_chains_by_hand(self):
        x = torch.randn(4, 100, 2)
        a = read_draws({"x": x}, group_by_chain=True)
        b = read_draws({"x": x.flatten(0, 1)})
        assert (a.num_chains, a.num_draws) == (4, 100)
        assert (b.num_chains, b.num_draws) == (1, 400)
        for name, value in a.posterior.decomposed["x"].params.items():
            assert torch.equal(value, b.posterior.decomposed["x"].params[name])


def test_nothing_is_imported_that_the_draws_are_not_of() -> None:
    program = (
        "import sys, torch; from pyro_fusion import from_draws; "
        "from_draws({'x': torch.randn(100)}, min_ess=0); "
        "print(*(x for x in ('jax', 'numpyro', 'arviz', 'xarray') if x in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_what_is_printed() -> None:
    x = {"x": torch.randn(1000, 2), "long_name": torch.randn(1000) + 5}
    reading = read_draws(x, axes={"x": "c"})
    assert isinstance(reading, DrawsReading)
    first, head, *rows, last = str(reading).splitlines()
    assert first == repr(reading) == "DrawsReading(1 × 1000 draws)"
    assert head.split() == ["site", "ESS", "R-hat", "lost", "(nats)"]
    assert [row.split()[0] for row in rows] == ["x", "long_name"]
    assert last == "  relabelled along 'c': 0% of the draws"
