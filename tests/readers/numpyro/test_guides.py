# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""NumPyro's guides against its own draws, against Pyro's, and back again."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal as PyroAutoNormal
from torch import Tensor
from torch.distributions import transforms as tt

import pyro_fusion
from pyro_fusion import (
    Posterior,
    PosteriorGuide,
    from_guide,
    from_numpyro,
    fuse,
    to_numpyro,
)
from pyro_fusion.errors import GuideError, ParameterError, StructureError, UnsupportedFamilyError
from pyro_fusion.families import Factor
from pyro_fusion.readers.pyro import prior_from_model

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import numpyro.distributions as ndist  # noqa: E402
from numpyro import handlers  # noqa: E402
from numpyro.distributions import transforms as nt  # noqa: E402
from numpyro.infer import SVI, Predictive, Trace_ELBO, autoguide  # noqa: E402

from pyro_fusion.readers.numpyro import prior_from_numpyro  # noqa: E402
from pyro_fusion.readers.numpyro.convert import (  # noqa: E402
    constraint_of,
    to_array,
    to_numpyro_distribution,
    to_numpyro_transform,
    to_pyro_distribution,
    to_pyro_transform,
    to_tensor,
)

K = 3
DRAWS = 20_000


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def x64(request: pytest.FixtureRequest) -> Iterator[bool]:
    with jax.enable_x64(request.param):
        yield request.param


def model(x: Any = None) -> None:
    weights = numpyro.sample("weights", ndist.Dirichlet(jnp.ones(K)))
    with numpyro.plate("component", K):
        loc = numpyro.sample("loc", ndist.Normal(0.0, 1.0).expand([2]).to_event(1))
        scale = numpyro.sample("scale", ndist.Gamma(2.0, 2.0))
    mean = weights @ loc
    numpyro.sample("x", ndist.Normal(mean, scale.mean()).to_event(1), obs=x)


def pyro_model(x: Tensor | None = None) -> None:
    dist = pyro.distributions
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(K)))
    with pyro.plate("component", K):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    pyro.sample("x", dist.Normal(weights @ loc, scale.mean()).to_event(1), obs=x)


X = [0.5, -1.0]


@functools.cache
def _fitted(kind: Any, x64: bool) -> tuple[Any, Any]:
    guide = kind(model)
    svi = SVI(model, guide, numpyro.optim.Adam(0.02), Trace_ELBO())
    # They are as good as fitted at parameters of any kind, which need not be compiled.
    params = svi.get_params(svi.init(jax.random.key(0), jnp.array(X)))
    if kind in (autoguide.AutoDelta, autoguide.AutoIAFNormal):
        return guide, params
    rng = np.random.default_rng(0)
    moved = {}
    for name, value in params.items():
        noise = jnp.asarray(0.3 * rng.standard_normal(value.shape), value.dtype)
        if name.endswith("scale_tril"):
            moved[name] = value + 0.1 * jnp.tril(noise, -1)
        else:
            moved[name] = value * jnp.exp(noise) if name.endswith("scale") else value + noise
    return guide, moved


def fitted(kind: Any) -> tuple[Any, Any]:
    """A guide and its parameters; leave both as they are."""
    guide, params = _fitted(kind, jax.config.jax_enable_x64)
    return guide, dict(params)


def unconstrained(posterior: Posterior, draws: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Moments in unconstrained space, where they are Normal: site, mean, standard deviation."""
    for site in posterior.factors:
        value = to_tensor(draws[site]).double()
        t = {"weights": tt.StickBreakingTransform(), "scale": tt.ExpTransform()}.get(site)
        value = value if t is None else t.inv(value)
        yield site, value.mean(0), value.std(0)


EXACT = [
    autoguide.AutoNormal,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
]


class TestAutoguides:
    @pytest.mark.parametrize("kind", EXACT, ids=lambda k: k.__name__)
    @pytest.mark.filterwarnings("ignore:.*strongly correlated:UserWarning")
    def test_are_read_exactly(self, kind: Any) -> None:
        guide, params = fitted(kind)
        posterior = from_numpyro(guide, params, jnp.array(X))
        assert posterior.axes == {
            "loc": ("component", None),
            "scale": ("component",),
            "weights": (None,),
        }
        draws = guide.sample_posterior(jax.random.key(1), params, sample_shape=(DRAWS,))
        for site, mean, deviation in unconstrained(posterior, draws):
            f = posterior.decomposed[site]
            loc = f.params["loc"].double()
            scale = f.params.get("scale")
            if scale is None:
                scale = f.params["scale_tril"].double().square().sum(-1).sqrt()
            scale = scale.double()
            assert bool(((mean - loc).abs() < 5 * scale / DRAWS**0.5).all()), site
            assert bool(((deviation / scale - 1).abs() < 5 / (2 * DRAWS) ** 0.5).all()), site

    def test_laplace_approximation(self) -> None:
        """Of a conjugate model it is the posterior."""
        x = jnp.array([1.0, 2.0])

        def conjugate() -> None:
            with numpyro.plate("component", 2):
                z = numpyro.sample("z", ndist.Normal(0.0, 2.0))
                numpyro.sample("x", ndist.Normal(z, 0.5), obs=x)

        precision = 1 / 2.0**2 + 1 / 0.5**2
        mode = x / 0.5**2 / precision
        guide = autoguide.AutoLaplaceApproximation(conjugate)
        axes = {"z": ("component",)}
        f = from_numpyro(guide, {"auto_loc": mode}, axes=axes).decomposed["z"]
        torch.testing.assert_close(f.params["loc"], to_tensor(mode))
        torch.testing.assert_close(f.params["scale"], torch.full((2,), precision**-0.5))

    @pytest.mark.parametrize(
        "kind",
        [autoguide.AutoBatchedMultivariateNormal, autoguide.AutoBatchedLowRankMultivariateNormal],
    )
    def test_batched_blocks(self, kind: Any) -> None:
        def batched() -> None:
            with numpyro.plate("component", 4):
                z = numpyro.sample("z", ndist.Normal(jnp.zeros(2), 1.0).to_event(1))
                numpyro.sample("x", ndist.Normal(z.sum(-1), 0.5), obs=jnp.arange(4.0))

        guide = kind(batched, batch_ndim=1)
        svi = SVI(batched, guide, numpyro.optim.Adam(0.05), Trace_ELBO())
        params = svi.get_params(svi.init(jax.random.key(0)))
        f = from_numpyro(guide, params, axes={"z": ("component",)}).decomposed["z"]
        with handlers.block():
            d = handlers.substitute(guide._get_batched_posterior, data=params)()
        covariance = f.params["scale_tril"] @ f.params["scale_tril"].mT
        torch.testing.assert_close(covariance, to_tensor(d.covariance_matrix))
        torch.testing.assert_close(f.params["loc"], to_tensor(d.loc))

    def test_flows_are_projected(self) -> None:
        guide, params = fitted(autoguide.AutoIAFNormal)
        with pytest.warns(UserWarning, match="no product of exponential families"):
            posterior = from_numpyro(guide, params, jnp.array(X), num_samples=4000)
        draws = guide.sample_posterior(jax.random.key(1), params, sample_shape=(4000,))
        for site, mean, deviation in unconstrained(posterior, draws):
            params_here = posterior.decomposed[site].params
            error = 6 * deviation * (2 / 4000) ** 0.5
            assert bool(((mean - params_here["loc"]).abs() < error).all()), site
            assert bool(((deviation - params_here["scale"]).abs() < error).all()), site

    def test_point_masses_need_a_spread(self) -> None:
        guide, params = fitted(autoguide.AutoDelta)
        with pytest.raises(GuideError, match=r"spread=0\.1"):
            from_numpyro(guide, params, jnp.array(X))
        p = from_numpyro(guide, params, jnp.array(X), spread=0.2)
        scale = p.decomposed["scale"].params
        torch.testing.assert_close(scale["loc"], to_tensor(params["scale_auto_loc"]).log())
        assert torch.equal(scale["scale"], torch.full((K,), 0.2))
        with pytest.raises(GuideError, match="no point masses"):
            spread = {"loc": 1.0, "scale": 1.0, "other": 1.0, "weights": 1.0}
            from_numpyro(guide, params, spread=spread)

    def test_lists(self) -> None:
        guide = autoguide.AutoGuideList(model)
        guide.append(autoguide.AutoNormal(handlers.block(model, hide=["loc"])))
        loc = handlers.block(model, expose=["loc", "component"])
        guide.append(autoguide.AutoMultivariateNormal(loc, prefix="joint"))
        svi = SVI(model, guide, numpyro.optim.Adam(0.02), Trace_ELBO())
        params = svi.get_params(svi.init(jax.random.key(0), jnp.array(X)))
        p = from_numpyro(guide, params, jnp.array(X))
        assert p.decomposed["loc"].family.name == "MultivariateNormal"
        expected = to_tensor(params["scale_auto_loc"])
        assert torch.equal(p.decomposed["scale"].params["loc"], expected)

    def test_subsampled_plates_are_read_at_full_size(self) -> None:
        def local(n: int = 6) -> None:
            with numpyro.plate("rows", n, subsample_size=2):
                numpyro.sample("z", ndist.Normal(0.0, 1.0))

        guide = autoguide.AutoNormal(local)
        svi = SVI(local, guide, numpyro.optim.Adam(0.05), Trace_ELBO())
        params = svi.get_params(svi.init(jax.random.key(0)))
        p = from_numpyro(guide, params)
        assert p.axes["z"] == ("rows",)
        assert torch.equal(p.decomposed["z"].params["loc"], to_tensor(params["z_auto_loc"]))

    def test_that_were_never_called_are_set_up_with_the_arguments(self) -> None:
        _, params = fitted(autoguide.AutoNormal)
        fresh = autoguide.AutoNormal(model)
        p = from_numpyro(fresh, params, jnp.array(X))
        assert torch.equal(p.decomposed["loc"].params["loc"], to_tensor(params["loc_auto_loc"]))
        assert fresh.prototype_trace is None  # nothing of the caller's is changed

    def test_whose_first_call_is_compiled(self) -> None:
        """Their latent vector is in another order than that of a guide called outside."""

        def two(scale: Any) -> None:
            numpyro.sample("z", ndist.Normal(0.0, 1.0))
            numpyro.sample("a", ndist.Uniform(0.0, scale))

        joint = autoguide.AutoDiagonalNormal(functools.partial(two, 1.0))
        normal = autoguide.AutoNormal(two)

        @jax.jit
        def first_calls(scale: Any) -> None:
            handlers.seed(joint, 0)()
            handlers.seed(normal, 0)(scale)

        first_calls(2.0)
        params = {"auto_loc": jnp.array([1.0, 2.0]), "auto_scale": jnp.array([0.1, 0.2])}
        p = from_numpyro(joint, params)
        expected = joint._unpack_latent(params["auto_loc"])
        for site, f in p.decomposed.items():
            assert float(f.params["loc"]) == float(expected[site]), site
        one = {f"{site}_auto_{x}": jnp.array(1.0) for site in "az" for x in ("loc", "scale")}
        with pytest.raises(GuideError, match=r"called inside of jax\.jit"):
            from_numpyro(normal, one)

    def test_handlers_outside_neither_change_nor_see_anything(self) -> None:
        def one() -> None:
            with numpyro.plate("component", 2):
                numpyro.sample("z", ndist.Normal(jnp.zeros(2), 2.0))

        guide = autoguide.AutoLaplaceApproximation(one)
        with handlers.trace() as seen, handlers.scope(prefix="outer"), handlers.mask(mask=False):
            p = from_numpyro(guide, {"auto_loc": jnp.ones(2)})
        assert not seen
        assert p.decomposed["z"].params["scale"].tolist() == pytest.approx([2.0, 2.0])

    def test_values_are_copied_and_labels_replaced(self) -> None:
        guide, params = fitted(autoguide.AutoNormal)
        p = from_numpyro(guide, params, axes={"weights": "component", "loc": ("component", None)})
        assert p.axes["weights"] == ("component",)
        assert p.decomposed["weights"].family.name == "Dirichlet"
        before = params["loc_auto_loc"].copy()
        p.decomposed["loc"].params["loc"].zero_()
        assert bool(jnp.array_equal(params["loc_auto_loc"], before))


class TestPrograms:
    def test_are_read_from_a_trace(self) -> None:
        def guide() -> None:
            with numpyro.plate("component", K):
                a = numpyro.param(
                    "a", jnp.arange(1.0, K + 1), constraint=ndist.constraints.positive
                )
                numpyro.sample("rate", ndist.Gamma(a, 2.0))
                numpyro.sample("loc", ndist.Normal(jnp.zeros(2), 1.0).to_event(1))
                numpyro.sample("noise", ndist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

        p = from_numpyro(guide, {"a": jnp.array([5.0, 6.0, 7.0])})
        assert set(p.factors) == {"rate", "loc"}
        assert p.decomposed["rate"].family.name == "Gamma"
        assert p.decomposed["rate"].params["concentration"].tolist() == [5.0, 6.0, 7.0]
        assert p.axes == {"rate": ("component",), "loc": ("component", None)}

    def test_dependent_sites_are_averaged_in_their_own_family(self) -> None:
        def guide() -> None:
            m = numpyro.sample("m", ndist.Normal(1.0, 2.0))
            numpyro.sample("z", ndist.Normal(m, 1.0))

        with pytest.warns(UserWarning, match=r"\['z'\], which depend on other sites"):
            p = from_numpyro(guide, {}, num_samples=4000)
        z = p.decomposed["z"].params
        assert float(z["loc"]) == pytest.approx(1.0, abs=5 * 2 / 4000**0.5)
        assert float(z["scale"]) == pytest.approx(5**0.5, rel=5 / 4000**0.5)

    def test_that_do_not_compile_are_run_as_they_are(self) -> None:
        def guide() -> None:
            m = numpyro.sample("m", ndist.Normal(0.0, 1.0))
            numpyro.sample("z", ndist.Normal(1.0 if float(m) > 0 else -1.0, 1.0))

        with pytest.warns(UserWarning, match="no product"):
            p = from_numpyro(guide, {}, num_samples=200)
        assert float(p.decomposed["z"].params["scale"]) == pytest.approx(2**0.5, rel=0.1)

    def test_point_masses_that_move_are_projected(self) -> None:
        def guide() -> None:
            m = numpyro.sample("m", ndist.Gamma(3.0, 1.0))
            numpyro.sample("z", ndist.Delta(2 * m))

        with pytest.warns(UserWarning, match="onto a Normal"):
            p = from_numpyro(guide, {}, num_samples=4000)
        deviation = float(p.decomposed["z"].params["scale"])
        assert deviation == pytest.approx(2 * 3**0.5, rel=0.1)

    def test_seed_decides_the_draws(self) -> None:
        def guide() -> None:
            m = numpyro.sample("m", ndist.Normal(0.0, 1.0))
            numpyro.sample("z", ndist.Normal(m, 1.0))

        with pytest.warns(UserWarning, match="no product"):
            one, two, three = (
                from_numpyro(guide, {}, num_samples=50, seed=s).decomposed["z"].params
                for s in (0, 0, 1)
            )
        assert torch.equal(one["loc"], two["loc"]) and not torch.equal(one["loc"], three["loc"])

    def test_vectors_whose_location_is_one_number(self) -> None:
        for loc, shape in ((3.0, ()), (jnp.full((4, 1), 3.0), (4,))):
            ours = to_pyro_distribution(ndist.MultivariateNormal(loc, scale_tril=jnp.eye(2)))
            assert ours.event_shape == (2,) and ours.batch_shape == shape
            assert bool((ours.mean == 3.0).all())

    def test_a_beta_by_another_name(self) -> None:
        f = Factor.of(to_pyro_distribution(ndist.BetaProportion(0.25, 8.0)))
        assert f.family.name == "Beta"
        assert {k: float(v) for k, v in f.params.items()} == {
            "concentration1": 2.0,
            "concentration0": 6.0,
        }


class TestPriors:
    def test_are_those_of_the_same_model_in_pyro(self) -> None:
        ours = prior_from_numpyro(model, jnp.array(X))
        theirs = prior_from_model(pyro_model, torch.tensor(X))
        assert ours.axes == theirs.axes
        for site, f in theirs.decomposed.items():
            assert ours.decomposed[site].structure() == f.structure()
            for name, value in f.params.items():
                torch.testing.assert_close(ours.decomposed[site].params[name], value)

    def test_components_with_one_prior_keep_one(self) -> None:
        def skewed() -> None:
            with numpyro.plate("component", K):
                numpyro.sample("s", ndist.HalfCauchy(1.0))

        with pytest.warns(UserWarning, match="no product"):
            f = prior_from_numpyro(skewed).decomposed["s"]
        assert bool((f.params["loc"] == f.params["loc"][0]).all())
        assert float(f.params["loc"][0]) == pytest.approx(0.0, abs=0.2)  # log of HalfCauchy(1)

    def test_of_some_sites(self) -> None:
        assert set(prior_from_numpyro(model, jnp.array(X), sites=["loc"]).factors) == {"loc"}
        with pytest.raises(GuideError, match=r"no latent sites \['nope'\]"):
            prior_from_numpyro(model, jnp.array(X), sites=["nope"])


def twins(seed: int) -> tuple[Posterior, Posterior]:
    """One posterior as a Pyro guide and as a NumPyro guide of the same model have it."""
    g = torch.Generator().manual_seed(seed)
    guide = PyroAutoNormal(pyro_model)
    guide(torch.tensor(X))
    params = {}
    order = torch.randperm(K, generator=g)
    for site, (loc, scale) in {
        name: guide._get_loc_and_scale(name) for name in ("weights", "loc", "scale")
    }.items():
        shape = loc.shape
        centers = 5.0 * torch.arange(K)[order] if site == "loc" else torch.zeros(shape[0])
        new = centers.reshape(-1, *[1] * (loc.dim() - 1)) + torch.randn(shape, generator=g)
        width = 0.1 + torch.rand(shape, generator=g)
        loc.data.copy_(new)
        scale.data.copy_(width)
        params[f"{site}_auto_loc"], params[f"{site}_auto_scale"] = to_array(new), to_array(width)
        getattr(guide.scales, site)  # the constrained value is what was set
        setattr(guide.scales, site, width)
    axes = {"weights": ("component",)}
    other = autoguide.AutoNormal(model)
    return (
        from_guide(guide, torch.tensor(X), axes=axes),
        from_numpyro(other, params, jnp.array(X), axes=axes),
    )


@pytest.mark.parametrize("pooling", ["exclusive", "inclusive", "product"])
@pytest.mark.filterwarnings("ignore:a prior of family Gamma is projected:UserWarning")
def test_fused_like_pyro_and_with_pyro(pooling: str) -> None:
    """F is the same to 1e-5 for parties of either library, or of both."""
    pairs = []
    for seed in range(4):
        with pyro.get_param_store().scope():
            pairs.append(twins(seed))
    ours, theirs = zip(*pairs, strict=True)
    base: dict[str, Any] = {}
    other: dict[str, Any] = {}
    if pooling == "product":
        axes = {"weights": ("component",)}
        base = {"prior": prior_from_model(pyro_model, torch.tensor(X), axes=axes)}
        other = {"prior": prior_from_numpyro(model, jnp.array(X), axes=axes)}
    expected = fuse(ours, pooling, **base)
    for parties in (theirs, [*ours[:2], *theirs[2:]]):
        fusion = fuse(parties, pooling, **other)
        assert fusion.objective[-1] == pytest.approx(expected.objective[-1], rel=1e-5)
        for a, b in zip(fusion.assignment, expected.assignment, strict=True):
            assert torch.equal(a, b)


class TestWayBack:
    def test_draws_are_the_same(self) -> None:
        guide, params = fitted(autoguide.AutoNormal)
        p = from_numpyro(guide, params)
        back = to_numpyro(p)
        draws = Predictive(back, params={}, num_samples=DRAWS)(jax.random.key(0))
        again = p.sample((DRAWS,))
        for site, value in again.items():
            other = to_tensor(draws[site])
            error = 6 * value.std(0) * (2 / DRAWS) ** 0.5
            assert bool(((value.mean(0) - other.mean(0)).abs() < error).all()), site

    def test_densities_are_the_same(self, x64: bool) -> None:
        def guide() -> None:
            numpyro.sample("weights", ndist.Dirichlet(jnp.arange(1.0, 4.0)))
            with numpyro.plate("component", K):
                tril = jnp.array([[1.0, 0.0], [0.5, 0.25]])
                numpyro.sample("loc", ndist.MultivariateNormal(jnp.ones((K, 2)), scale_tril=tril))
                numpyro.sample("scale", ndist.LogNormal(jnp.zeros(K), 0.3))

        p = from_numpyro(guide, {})
        assert p.dtype == (torch.float64 if x64 else torch.float32)
        back = to_numpyro(p)
        trace = handlers.trace(handlers.seed(back, 0)).get_trace()
        density = sum(float(trace[s]["fn"].log_prob(trace[s]["value"]).sum()) for s in p.factors)
        values = {s: to_tensor(trace[s]["value"]) for s in p.factors}
        assert density == pytest.approx(float(p.log_prob(values)), rel=1e-9 if x64 else 1e-4)

    def test_read_again_nothing_has_changed(self) -> None:
        guide, params = fitted(autoguide.AutoNormal)
        p = from_numpyro(guide, params)
        back = to_numpyro(p)
        again = from_numpyro(back, back.params)
        assert again.axes == p.axes
        for site, f in p.decomposed.items():
            assert again.decomposed[site].structure() == f.structure()
            for name, value in f.params.items():
                assert torch.equal(again.decomposed[site].params[name], value)

    def test_axes_without_a_label_have_none_again(self) -> None:
        z = pyro.distributions.Normal(torch.zeros(4, 3), 1.0)
        p = Posterior({"z": z}, {"z": (None, "component")})
        back = to_numpyro(p)
        for again in (
            from_numpyro(back, back.params),
            from_guide(PosteriorGuide(p)),
        ):
            assert again.axes == p.axes and again.plates == p.plates

    def test_names_that_begin_alike(self) -> None:
        """Neither parameters nor plates get in the way of sites, or of the model's parameters."""
        dist = pyro.distributions
        scale = dist.Gamma(torch.full((2,), 2.0), 2.0)
        p = Posterior(
            {"x": dist.Normal(torch.zeros(2), 1.0), "x_scale": scale}, {"x": "x", "x_scale": "x"}
        )
        back = to_numpyro(p)

        def other() -> None:
            numpyro.param("x_loc", 7.0)
            with numpyro.plate("x_1", 2):
                numpyro.sample("x", ndist.Normal(numpyro.sample("x_scale", ndist.Gamma(2.0)), 1.0))

        svi = SVI(other, back, numpyro.optim.Adam(1e-3), Trace_ELBO())
        params = svi.get_params(svi.init(jax.random.key(0)))
        assert set(params) == {*back.params, "x_loc"} and float(params["x_loc"]) == 7.0

    def test_degrees_of_freedom_stay_in_range(self) -> None:
        d = torch.distributions.Wishart(torch.tensor(5.0), covariance_matrix=torch.eye(3))
        assert constraint_of(Factor.of(d), "df").lower_bound == 2.0

    def test_svi_goes_on_from_there(self) -> None:
        guide, params = fitted(autoguide.AutoNormal)
        fusion = fuse([from_numpyro(guide, params, axes={"weights": "component"})])
        back = to_numpyro(fusion.posterior)
        svi = SVI(model, back, numpyro.optim.Adam(1e-3), Trace_ELBO())
        start = svi.get_params(svi.init(jax.random.key(0), jnp.array(X)))
        assert set(start) == set(back.params)
        for name, value in back.params.items():
            assert bool(jnp.allclose(start[name], value, rtol=1e-5))

        @jax.jit
        def losses() -> tuple[Any, Any]:
            elbo, key = Trace_ELBO(num_particles=2000), jax.random.key(1)
            args = key, start, model, back, jnp.array(X)
            return elbo.loss(*args), elbo.loss(key, params, model, guide, jnp.array(X))

        # A Dirichlet in place of the Normal behind stick-breaking makes a little difference.
        ours, theirs = losses()
        assert float(ours) == pytest.approx(float(theirs), rel=0.05)

    def test_in_the_predictive_of_a_model(self) -> None:
        guide, params = fitted(autoguide.AutoNormal)
        back = to_numpyro(from_numpyro(guide, params))
        draws = Predictive(model, guide=back, params={}, num_samples=7)(jax.random.key(0))
        assert draws["x"].shape == (7, 2)

    def test_float64_is_not_lost_in_silence(self) -> None:
        dist = pyro.distributions
        p = Posterior({"z": dist.Normal(torch.tensor(1 / 3, dtype=torch.float64), 1.0)})
        with pytest.warns(UserWarning, match="jax_enable_x64"):
            assert to_numpyro(p).params["z$loc"].dtype == jnp.float32
        with jax.enable_x64(True):
            assert float(to_numpyro(p).params["z$loc"]) == 1 / 3

    def test_of_any_site_and_of_parameters(self) -> None:
        dist = pyro.distributions
        wide = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)
        p = Posterior({"a": dist.Normal(torch.tensor(0.0), 1.0), "z": wide})
        with pytest.warns(UserWarning, match=r"sites \['z'\] are float64"):
            to_numpyro(p)

        def guide() -> None:
            numpyro.sample("z", ndist.Normal(numpyro.param("m", 0.0), 1.0))

        for value in (np.zeros(()), torch.zeros((), dtype=torch.float64)):
            with pytest.warns(UserWarning, match=r"params \['m'\] are float64"):
                from_numpyro(guide, {"m": value})
        with jax.enable_x64(True):
            assert from_numpyro(guide, {"m": np.zeros(())}).dtype == torch.float64

    def test_what_numpyro_has_not(self) -> None:
        d = pyro_fusion.families.NormalGamma(0.0, 1.0, 2.0, 2.0)
        with pytest.raises(UnsupportedFamilyError, match="site 'z': NumPyro has no NormalGamma"):
            to_numpyro(Posterior({"z": d}))


# -- the two libraries side by side ----------------------------------------------------------------

POSITIVE = jnp.array([0.5, 1.5])
DISTRIBUTIONS = {
    "Normal": lambda: ndist.Normal(jnp.array([0.0, 1.0]), POSITIVE),
    "LogNormal": lambda: ndist.LogNormal(0.5, POSITIVE),
    "MultivariateNormal": lambda: ndist.MultivariateNormal(
        jnp.zeros(2), scale_tril=jnp.array([[1.0, 0.0], [0.5, 2.0]])
    ),
    "LowRankMultivariateNormal": lambda: ndist.LowRankMultivariateNormal(
        jnp.zeros(2), jnp.array([[1.0], [0.5]]), POSITIVE
    ),
    "Gamma": lambda: ndist.Gamma(POSITIVE, 2.0),
    "Chi2": lambda: ndist.Chi2(POSITIVE),
    "InverseGamma": lambda: ndist.InverseGamma(POSITIVE, 2.0),
    "Exponential": lambda: ndist.Exponential(POSITIVE),
    "Poisson": lambda: ndist.Poisson(POSITIVE),
    "Beta": lambda: ndist.Beta(POSITIVE, 2.0),
    "Dirichlet": lambda: ndist.Dirichlet(jnp.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])),
    "BernoulliProbs": lambda: ndist.BernoulliProbs(jnp.array([0.2, 0.6])),
    "BernoulliLogits": lambda: ndist.BernoulliLogits(jnp.array([0.2, 0.6])),
    "CategoricalProbs": lambda: ndist.CategoricalProbs(jnp.array([0.2, 0.8])),
    "CategoricalLogits": lambda: ndist.CategoricalLogits(jnp.array([0.2, 0.8])),
    "Wishart": lambda: ndist.Wishart(4.0, scale_tril=jnp.array([[1.0, 0.0], [0.5, 2.0]])),
    "Independent": lambda: ndist.Gamma(POSITIVE, 2.0).to_event(1),
    "expanded": lambda: ndist.Normal(0.0, POSITIVE).expand([3, 2]).to_event(1),
    "masked": lambda: ndist.Normal(0.0, POSITIVE).mask(True),
    "transformed": lambda: ndist.TransformedDistribution(
        ndist.Normal(jnp.zeros(2), 1.0).to_event(1), nt.StickBreakingTransform()
    ),
    "affine": lambda: ndist.TransformedDistribution(
        ndist.Gamma(POSITIVE, 2.0), nt.AffineTransform(1.0, 3.0, domain=ndist.constraints.positive)
    ),
    "integers": lambda: ndist.Normal(0, 1),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_have_the_same_density(name: str) -> None:
    d = DISTRIBUTIONS[name]()
    ours = to_pyro_distribution(d)
    assert ours.batch_shape == d.batch_shape and ours.event_shape == d.event_shape
    x = ours.sample((4,))
    value = to_array(x.int() if d.is_discrete else x)
    expected = to_tensor(d.log_prob(value))
    torch.testing.assert_close(ours.log_prob(x), expected, rtol=2e-5, atol=2e-5)
    if "LowRank" in name:  # the reader takes it for a MultivariateNormal only in autoguides
        return
    f = Factor.of(ours)
    params = {k: to_array(v) for k, v in f.params.items()}
    back = to_numpyro_distribution(f, params)
    assert back.batch_shape == d.batch_shape and back.event_shape == d.event_shape
    again = to_tensor(back.log_prob(value))
    torch.testing.assert_close(again, expected, rtol=2e-5, atol=2e-5)


TRANSFORMS = {
    "exp": nt.ExpTransform(),
    "sigmoid": nt.SigmoidTransform(),
    "softplus": nt.SoftplusTransform(),
    "stick-breaking": nt.StickBreakingTransform(),
    "ordered": nt.OrderedTransform(),
    "correlation": nt.CorrCholeskyTransform(),
    "affine": nt.AffineTransform(1.0, -2.0),
    "composed": nt.ComposeTransform([nt.ExpTransform(), nt.PowerTransform(-1.0)]),
    "independent": nt.IndependentTransform(nt.ExpTransform(), 1),
    "inverse": nt.ExpTransform().inv,
    "reshape": nt.ReshapeTransform((3, 2), (6,)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_the_same_maps(name: str) -> None:
    t = TRANSFORMS[name]
    ours = to_pyro_transform(t)
    x = jax.random.normal(jax.random.key(0), (4, 6))
    x = jnp.exp(x) if name == "inverse" else x
    expected = to_tensor(t(x))
    torch.testing.assert_close(ours(to_tensor(x)), expected, rtol=2e-5, atol=2e-5)
    plain = Factor.of(
        torch.distributions.TransformedDistribution(
            torch.distributions.Independent(
                torch.distributions.LogNormal(torch.zeros(6), 1.0)
                if name == "inverse"
                else torch.distributions.Normal(torch.zeros(6), 1.0),
                1,
            ),
            [ours],
        )
    ).transforms
    y = jnp.log(x) if name == "inverse" else x
    for part in plain:
        y = to_numpyro_transform(part)(y)
    if name != "affine":  # of a Normal a Normal, absorbed
        torch.testing.assert_close(to_tensor(y), expected, rtol=2e-5, atol=2e-5)


def test_arrays_share_memory() -> None:
    x = jnp.arange(4.0)
    assert to_tensor(x).data_ptr() == x.unsafe_buffer_pointer()
    t = torch.arange(4.0)
    assert to_array(t).unsafe_buffer_pointer() == t.data_ptr()


def test_arrays_on_several_devices() -> None:
    """Which have to be asked for before JAX is used."""
    code = """if True:
        import jax, jax.numpy as jnp, torch
        jax.config.update("jax_num_cpu_devices", 2)
        mesh = jax.make_mesh((2,), ("i",))
        from pyro_fusion.readers.numpyro.convert import to_tensor
        for spec in ("i", None):
            where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(spec))
            x = jax.device_put(jnp.arange(4.0), where)
            assert torch.equal(to_tensor(x), torch.arange(4.0))
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class TestErrors:
    def test_parameters(self) -> None:
        guide, params = fitted(autoguide.AutoNormal)
        with pytest.raises(ParameterError, match=r"svi.run\(...\).params, got tuple"):
            from_numpyro(guide, ())
        short = {k: v for k, v in params.items() if k != "loc_auto_scale"}
        with pytest.raises(GuideError, match=r"params lack \['loc_auto_scale'\]"):
            from_numpyro(guide, short)
        bad = {**params, "loc_auto_loc": params["loc_auto_loc"] * jnp.nan}
        with pytest.raises(ParameterError, match="site 'loc'"):
            from_numpyro(guide, bad)
        joint, params = fitted(autoguide.AutoMultivariateNormal)
        with pytest.raises(GuideError, match=r"params lack \['auto_scale_tril'\]"):
            from_numpyro(joint, {"auto_loc": params["auto_loc"]})

        def by_hand() -> None:
            numpyro.sample("z", ndist.Normal(numpyro.param("m", 0.0), 1.0))

        with pytest.raises(GuideError, match=r"params lack \['m'\]"):
            from_numpyro(by_hand, {})

    def test_shapes_of_parameters(self) -> None:
        guide, params = fitted(autoguide.AutoNormal)
        one = {**params, "scale_auto_scale": jnp.array(0.5)}
        p = from_numpyro(guide, one)
        assert p.decomposed["scale"].params["scale"].tolist() == [0.5] * K
        message = r"params\['scale_auto_loc'\] has shape \(2,\), .* guide has \(3,\)"
        with pytest.raises(GuideError, match=message):
            from_numpyro(guide, {**params, "scale_auto_loc": jnp.zeros(2)})
        with pytest.raises(GuideError, match=r"\['scale_auto_loc'\] is no array, but NoneType"):
            from_numpyro(guide, {**params, "scale_auto_loc": None})
        joint, params = fitted(autoguide.AutoDiagonalNormal)
        lists = {k: v.tolist() for k, v in params.items()}  # as from a JSON file
        loc = from_numpyro(joint, lists).decomposed["loc"].params["loc"]
        expected = from_numpyro(joint, params).decomposed["loc"].params["loc"]
        assert torch.equal(loc, expected)
        longer = {k: jnp.ones(len(v) + 1) for k, v in params.items()}
        with pytest.raises(GuideError, match=r"params\['auto_loc'\] has shape"):
            from_numpyro(joint, longer)
        with pytest.raises(ParameterError, match=r"params\['auto_loc'\] must be finite"):
            from_numpyro(joint, {**params, "auto_loc": params["auto_loc"] * jnp.nan})

    def test_programs_that_cannot_be_read(self) -> None:
        def needs(x: Any) -> None:
            numpyro.sample("z", ndist.Normal(x, 1.0))

        with pytest.raises(GuideError, match="fails with these arguments: TypeError"):
            from_numpyro(needs, {})
        with pytest.raises(GuideError, match="to be set up fails"):
            from_numpyro(autoguide.AutoNormal(needs), {})

        def nothing() -> None:
            numpyro.sample("x", ndist.Normal(0.0, 1.0), obs=jnp.zeros(()))

        with pytest.raises(GuideError, match="no site to read"):
            from_numpyro(nothing, {})

        def subsampled() -> None:
            with numpyro.plate("rows", 6, subsample_size=2):
                numpyro.sample("z", ndist.Normal(0.0, 1.0))

        with pytest.raises(GuideError, match=r"'rows' is subsampled \(2 of 6\)"):
            from_numpyro(subsampled, {})

        def masked() -> None:
            with handlers.mask(mask=jnp.array([True, False])):
                numpyro.sample("z", ndist.Normal(jnp.zeros(2), 1.0))

        with pytest.raises(GuideError, match="partly masked"):
            from_numpyro(masked, {})

        def sphere() -> None:
            numpyro.sample("z", ndist.ProjectedNormal(jnp.ones(3)))

        with pytest.raises(GuideError, match="site 'z': support"):
            from_numpyro(sphere, {})

    def test_singular_laplace(self) -> None:
        def flat() -> None:
            numpyro.sample("z", ndist.ImproperUniform(ndist.constraints.real, (), ()))

        guide = autoguide.AutoLaplaceApproximation(flat, init_loc_fn=numpyro.infer.init_to_value(
            values={"z": 0.0}))  # fmt: skip
        svi = SVI(flat, guide, numpyro.optim.Adam(0.1), Trace_ELBO())
        params = svi.get_params(svi.init(jax.random.key(0)))
        with pytest.raises(GuideError, match="singular"):
            from_numpyro(guide, params)

    def test_few_samples_and_axes(self) -> None:
        guide, params = fitted(autoguide.AutoNormal)
        with pytest.raises(ParameterError, match="num_samples"):
            from_numpyro(guide, params, num_samples=1)
        with pytest.raises(StructureError, match="nope"):
            from_numpyro(guide, params, axes={"nope": ("component",)})
        with pytest.raises(ParameterError, match="give a mapping"):
            from_numpyro(guide, params, axes="auto")  # type: ignore[arg-type]

    def test_guides_of_the_other_library(self) -> None:
        with pytest.raises(GuideError, match=r"AutoNormal is a guide of Pyro: .*from_guide"):
            from_numpyro(PyroAutoNormal(pyro_model), {})
        with pytest.raises(GuideError, match="got int"):
            from_numpyro(3, {})  # type: ignore[arg-type]
        back = to_numpyro(Posterior({"z": pyro.distributions.Normal(torch.tensor(0.0), 1.0)}))
        with pytest.raises(GuideError, match=r"is a NumPyro guide: .*from_numpyro"):
            from_guide(back)

    def test_a_guide_in_place_of_a_posterior(self) -> None:
        guide, _ = fitted(autoguide.AutoNormal)
        with pytest.raises(GuideError, match=r"party 0: .*from_numpyro"):
            fuse([guide, guide])
