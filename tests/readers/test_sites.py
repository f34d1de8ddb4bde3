# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What one reader checks, all check: the same program, fitted by each tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_fusion import Posterior, StructureError, from_draws, from_guide, from_numpyro

DATA = torch.linspace(-1.0, 1.0, 16)
DRAWS = {
    "loc": torch.randn(400, 2, generator=torch.Generator().manual_seed(0)),
    "own": torch.randn(400, 16, generator=torch.Generator().manual_seed(1)),
}


def model(x: Tensor) -> None:
    with pyro.plate("component", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("prefers", -loc.square())
    with pyro.plate("patient", len(x)):
        own = pyro.sample("own", dist.Normal(loc.sum(), 1.0))
        pyro.sample("x", dist.Normal(own, 1.0), obs=x)


def numpyro_model() -> Callable[[Any], None]:
    numpyro = pytest.importorskip("numpyro")
    normal = numpyro.distributions.Normal

    def model(x: Any) -> None:
        with numpyro.plate("component", 2):
            loc = numpyro.sample("loc", normal(0.0, 1.0))
            numpyro.factor("prefers", -(loc**2))
        with numpyro.plate("patient", len(x)):
            own = numpyro.sample("own", normal(loc.sum(), 1.0))
            numpyro.sample("x", normal(own, 1.0), obs=x)

    return model


def by_pyro_guide(axes: Any, without: str | None) -> Posterior:
    guide = AutoNormal(model)
    guide(DATA)
    return from_guide(guide if without is None else poutine.block(guide, hide=[without]), axes=axes)


def numpyro_guide(kind: str) -> Callable[[Any, str | None], Posterior]:
    def read(axes: Any, without: str | None) -> Posterior:
        model, x = numpyro_model(), DATA.numpy()
        import jax
        from numpyro import handlers, optim
        from numpyro.infer import SVI, Trace_ELBO, autoguide

        guide = getattr(autoguide, kind)(model)
        svi = SVI(model, guide, optim.Adam(0.1), Trace_ELBO())
        params = svi.get_params(svi.init(jax.random.key(0), x))
        hidden = guide if without is None else handlers.block(guide, hide=[without])
        return from_numpyro(hidden, params, x, axes=axes)

    return read


def by_numpyro_guide_that_is_new(axes: Any, _: str | None) -> Posterior:
    model, x = numpyro_model(), DATA.numpy()
    from numpyro.infer import autoguide

    sizes = {"loc": 2, "own": 16}
    params = {f"{k}_auto_loc": np.zeros(n, "float32") for k, n in sizes.items()}
    params |= {f"{k}_auto_scale": np.ones(n, "float32") for k, n in sizes.items()}
    return from_numpyro(autoguide.AutoNormal(model), params, x, axes=axes)


def by_draws(axes: Any, without: str | None) -> Posterior:
    return from_draws(DRAWS, model, DATA, axes=axes, sites=[k for k in DRAWS if k != without])


def by_draws_of_numpyro(axes: Any, without: str | None) -> Posterior:
    x = DATA.numpy()
    kept = [k for k in DRAWS if k != without]
    return from_draws(DRAWS, numpyro_model(), x, axes=axes, sites=kept)


BLOCK = r"hide the site, handlers\.block\(guide, hide=\['own'\]\)"
SITES = r"leave the site out, naming the others in sites=\[\.\.\.\]"
READERS: Mapping[str, tuple[Callable[[Any, str | None], Posterior], str]] = {
    "pyro": (by_pyro_guide, r"hide the site, poutine\.block\(guide, hide=\['own'\]\)"),
    "numpyro": (numpyro_guide("AutoNormal"), BLOCK),
    "numpyro joint": (numpyro_guide("AutoMultivariateNormal"), BLOCK),
    "numpyro, new": (by_numpyro_guide_that_is_new, BLOCK),
    "draws": (by_draws, SITES),
    "draws of numpyro": (by_draws_of_numpyro, SITES),
}


@pytest.mark.parametrize("reader", READERS)
class TestEveryReader:
    def test_own_latents_of_a_party_are_no_components(self, reader: str) -> None:
        read, remedy = READERS[reader]
        said = f"site 'own' is in the plate 'patient' of the data 'x'.*{remedy}; .*\\('patient',\\)"
        with pytest.warns(UserWarning, match=said) as warned:
            posterior = read(None, None)
        assert len(warned) == 1  # neither of loc, nor of the factor in its plate
        assert posterior.axes == {"loc": ("component",), "own": ("patient",)}

    def test_no_warning_where_it_was_said(self, reader: str) -> None:
        read, _ = READERS[reader]
        # A warning would be an error here.
        assert read({"own": (None,)}, None).labels == ("component",)
        assert set(read({"own": ("patient",)}, None).labels) == {"component", "patient"}

    def test_a_label_has_one_size(self, reader: str) -> None:
        said = r"label 'component' has size 16 at site 'own' .* size 2 at site 'loc'"
        with pytest.raises(StructureError, match=said):
            READERS[reader][0]({"own": ("component",)}, None)

    def test_sites_that_are_not_there(self, reader: str) -> None:
        with pytest.raises(Exception, match=r"axes names .*\['nothing'\]"):
            READERS[reader][0]({"own": (None,), "nothing": ("component",)}, None)


@pytest.mark.parametrize("reader", ["pyro", "numpyro", "draws", "draws of numpyro"])
def test_no_warning_of_what_is_left_out(reader: str) -> None:
    assert set(READERS[reader][0](None, "own").axes) == {"loc"}


# -- plates whose entries have an order ------------------------------------------------------------

X = torch.randn(30, 3, generator=torch.Generator().manual_seed(2))
Y = X @ torch.tensor([1.0, -2.0, 0.5])
GROUP = torch.arange(30) % 3


def regression(x: Tensor, y: Tensor, kind: str) -> None:
    """Coefficients, effects of groups, or the means of a mixture, each in a plate of three."""
    with pyro.plate("three", 3):
        b = pyro.sample("b", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 1.0))
    with pyro.plate("data", len(x)):
        if kind == "mixture":
            parts = dist.Categorical(torch.ones(3)), dist.Normal(b, 1.0)
            pyro.sample("y", dist.MixtureSameFamily(*parts), obs=y)
        else:
            mean = x @ b if kind == "coefficients" else b[GROUP]
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def numpyro_regression() -> Callable[[Any, Any, str], None]:
    numpyro = pytest.importorskip("numpyro")
    d = numpyro.distributions

    def regression(x: Any, y: Any, kind: str) -> None:
        with numpyro.plate("three", 3):
            b = numpyro.sample("b", d.Normal(np.array([-1.0, 0.0, 1.0], "float32"), 1.0))
        with numpyro.plate("data", len(x)):
            if kind == "mixture":
                parts = d.Categorical(np.full(3, 1 / 3, "float32")), d.Normal(b, 1.0)
                numpyro.sample("y", d.MixtureSameFamily(*parts), obs=y)
            else:
                mean = x @ b if kind == "coefficients" else b[GROUP.numpy()]
                numpyro.sample("y", d.Normal(mean, 1.0), obs=y)

    return regression


def read_regression(tool: str, kind: str, axes: Any = None) -> Posterior:
    draws = {"b": torch.randn(400, 3, generator=torch.Generator().manual_seed(3))}
    if tool == "pyro":
        guide = AutoNormal(regression)
        guide(X, Y, kind)
        return from_guide(guide, axes=axes)
    if tool == "draws":
        return from_draws(draws, regression, X, Y, kind, axes=axes)
    theirs, x, y = numpyro_regression(), X.numpy(), Y.numpy()
    if tool == "draws of numpyro":
        return from_draws(draws, theirs, x, y, kind, axes=axes)
    from numpyro.infer import autoguide

    params = {"b_auto_loc": np.zeros(3, "float32"), "b_auto_scale": np.ones(3, "float32")}
    return from_numpyro(autoguide.AutoNormal(theirs), params, x, y, kind, axes=axes)


@pytest.mark.parametrize("tool", ["pyro", "numpyro", "draws", "draws of numpyro"])
class TestPlatesInOrder:
    @pytest.mark.parametrize("kind", ["coefficients", "groups"])
    def test_are_warned_of(self, tool: str, kind: str) -> None:
        said = "plate 'three' labels 'b', but its entries are no comp.*axes={'b': \\(None,\\)}"
        with pytest.warns(UserWarning, match=said) as warned:
            assert read_regression(tool, kind).labels == ("three",)
        assert len(warned) == 1
        for labels in ((None,), ("three",)):  # was said, so no warning, which would be an error
            assert read_regression(tool, kind, {"b": labels}).axes["b"] == labels

    def test_components_are_not(self, tool: str) -> None:
        """The prior may tell them apart: that is no order of the data."""
        assert read_regression(tool, "mixture").labels == ("three",)


def test_no_order_is_seen_where_the_model_has_other_sites() -> None:
    """Weights that were not labelled, and local variables that the posterior is not about."""

    def mixture(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("component", 3):
            loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    for hide in (["z"], ["z", "weights"]):
        guide = AutoNormal(poutine.block(mixture, hide=hide))
        guide(DATA)
        assert from_guide(guide).labels == ("component",)
