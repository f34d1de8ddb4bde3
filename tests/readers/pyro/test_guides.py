# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Reading Pyro's guides: each class against an independent truth (median, quantiles, get_posterior,
closed forms, or draws with a tolerance in standard errors), and every fact of DESIGN section 4."""

import copy
import functools
import io
import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions import constraints
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO, TraceEnum_ELBO, autoguide
from pyro.infer.autoguide import AutoNormal
from pyro.infer.autoguide.effect import (
    AutoHierarchicalNormalMessenger,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
)
from pyro.infer.autoguide.gaussian import AutoGaussian
from pyro.nn.module import PyroModule, PyroParam
from pyro.optim import Adam
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_fusion import PosteriorGuide
from pyro_fusion.errors import (
    FusionError,
    GuideError,
    ParameterError,
    StructureError,
    UnsupportedFamilyError,
)
from pyro_fusion.posterior.posterior import Posterior
from pyro_fusion.readers.pyro import check_not_shared, from_guide

DATA = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5], [1.5, 2.5], [2.5, 0.0]])


def model(data: Tensor = DATA) -> None:
    """A vector per component, a positive scale, a simplex over components, a scalar, a matrix."""
    with pyro.plate("component", 3):
        loc = pyro.sample("loc", dist.Normal(0, 2).expand([2]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0, 1))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    shift = pyro.sample("shift", dist.Normal(0, 1))
    matrix = pyro.sample("matrix", dist.Normal(0, 1).expand([2, 2]).to_event(2))
    mean = (weights.unsqueeze(-1) * loc).sum(-2) + shift + matrix.sum(-1)
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Normal(mean, scale.mean()).to_event(1), obs=data)


def fit(m: Any, guide: Any, *args: Any, steps: int = 30, elbo: Any = None) -> Any:
    svi = SVI(m, guide, Adam({"lr": 0.05}), elbo or Trace_ELBO())
    for _ in range(steps):
        svi.step(*args)
    return guide


def base_of(d: Any) -> Any:
    """Normal or MultivariateNormal in unconstrained space."""
    while hasattr(d, "base_dist") and type(d).__name__ != "MultivariateNormal":
        d = d.base_dist
    return d


def central(posterior: Posterior) -> dict[str, Tensor]:
    return PosteriorGuide(posterior).median()


# -- AutoNormal ------------------------------------------------------------------------------------


def test_auto_normal_is_read_exactly() -> None:
    guide = fit(model, autoguide.AutoNormal(model))
    posterior = from_guide(guide)
    assert posterior.axes["loc"] == ("component", None)
    assert posterior.axes["scale"] == ("component",)
    assert posterior.plates["loc"] == ("component",)
    assert posterior.axes["weights"] == (None,)
    assert set(posterior.factors) == {"loc", "scale", "weights", "shift", "matrix"}
    for name, median in guide.median().items():
        assert torch.allclose(central(posterior)[name], median)
    draws = posterior.factors["scale"].icdf(torch.tensor(0.9))
    assert torch.allclose(draws, guide.quantiles([0.9])["scale"][0])


def test_density_is_that_of_the_guide() -> None:
    guide = fit(model, autoguide.AutoNormal(model))
    posterior = from_guide(guide)
    trace = poutine.trace(guide).get_trace()
    values = {k: trace.nodes[k]["value"] for k in posterior.factors}
    # The guide's density: its auxiliary Normals and the Deltas' log-determinants.
    assert torch.allclose(posterior.log_prob(values), trace.log_prob_sum(), rtol=1e-4)


def test_constrained_sites_keep_their_transform() -> None:
    posterior = from_guide(fit(model, autoguide.AutoNormal(model)))
    f = posterior.decomposed["scale"]
    assert [type(t).__name__ for t in f.transforms] == ["ExpTransform"]
    # A common bijection leaves the KL divergence as it is.
    q = posterior.factors["scale"]
    other = dist.LogNormal(torch.zeros(3), torch.ones(3))
    base = base_of(q)
    expected = kl_divergence(base, dist.Normal(torch.zeros(3), torch.ones(3)))
    assert torch.allclose(kl_divergence(q, other), expected)


def test_a_factor_behind_exp_comes_back_as_lognormal_with_a_mean() -> None:
    guide = fit(model, autoguide.AutoNormal(model))
    seen = poutine.trace(guide).get_trace().nodes["scale"]["fn"]
    assert isinstance(seen, dist.Delta)  # what a trace of AutoNormal shows
    factor = from_guide(guide).factors["scale"]
    assert isinstance(factor, dist.LogNormal)
    assert factor.mean.shape == (3,)


def test_values_are_copied() -> None:
    guide = fit(model, autoguide.AutoNormal(model))
    posterior = from_guide(guide)
    before = central(posterior)
    fit(model, guide)
    assert not torch.allclose(guide.median()["loc"], before["loc"])
    for name, value in central(posterior).items():
        assert torch.equal(value, before[name])


def test_axes_override_and_event_labels() -> None:
    guide = fit(model, autoguide.AutoNormal(model))
    posterior = from_guide(guide, axes={"matrix": ("row", "column"), "loc": (None, "feature")})
    assert posterior.axes["matrix"] == ("row", "column")
    assert posterior.axes["loc"] == (None, "feature")
    assert posterior.axes["scale"] == ("component",)
    assert posterior.plates["loc"] == ("component",)
    with pytest.raises(StructureError, match="nowhere"):
        from_guide(guide, axes={"nowhere": ("component",)})


def test_labelled_simplex_becomes_a_dirichlet() -> None:
    guide = fit(model, autoguide.AutoNormal(model))
    posterior = from_guide(guide, axes={"weights": ("component",)})
    d = posterior.factors["weights"]
    assert isinstance(d, dist.Dirichlet)
    n = 40_000
    t = torch.distributions.biject_to(constraints.simplex)
    loc, scale = guide._get_loc_and_scale("weights")
    log_x = t(loc + scale * torch.randn(n, 2)).log().detach()
    standard_error = log_x.std(0) / math.sqrt(n)
    total = d.concentration.sum()
    expected = torch.digamma(d.concentration) - torch.digamma(total)
    assert ((log_x.mean(0) - expected).abs() < 4 * standard_error).all()


def test_subsampled_plate_is_read_at_full_size() -> None:
    def m(data: Tensor) -> None:
        with pyro.plate("data", len(data), subsample_size=2) as i:
            z = pyro.sample("z", dist.Normal(0, 1))
            pyro.sample("obs", dist.Normal(z, 1), obs=data[i])

    guide = fit(m, autoguide.AutoNormal(m), torch.randn(6))
    with pytest.warns(UserWarning, match="in the plate 'data' of the data 'obs'"):
        posterior = from_guide(guide)
    assert posterior.factors["z"].batch_shape == (6,)
    assert posterior.axes["z"] == ("data",)
    assert torch.equal(posterior.factors["z"].loc, guide.locs.z)
    # What needs to be run shows two of six.
    with pytest.raises(GuideError, match=r"site 'z': plate 'data' is subsampled \(2 of 6\)"):
        from_guide(lambda: guide(torch.randn(6)))


def test_nested_plates_and_supports() -> None:
    def m() -> None:
        with pyro.plate("a", 2, dim=-2), pyro.plate("b", 3, dim=-1):
            pyro.sample("u", dist.Uniform(-1.0, 3.0))
            pyro.sample("chol", dist.LKJCholesky(3, 1.0))
            pyro.sample("beta", dist.Beta(1.0, 1.0).expand([4]).to_event(1))

    guide = autoguide.AutoNormal(m)
    guide()
    posterior = from_guide(guide)
    assert posterior.axes["u"] == ("a", "b")
    assert posterior.axes["chol"] == ("a", "b", None, None)
    assert posterior.factors["chol"].event_shape == (3, 3)
    trace = poutine.trace(guide).get_trace()
    values = {k: trace.nodes[k]["value"] for k in posterior.factors}
    assert torch.allclose(posterior.log_prob(values), trace.log_prob_sum(), rtol=1e-4)


def test_supports_without_one_bijection_are_named() -> None:
    def m() -> None:
        pyro.sample("u", dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1))

    guide = autoguide.AutoNormal(m)
    guide()
    with pytest.raises(UnsupportedFamilyError, match=r"site 'u'.*differ along an axis"):
        from_guide(guide)

    def by_hand() -> None:
        base = dist.Normal(torch.zeros(2, 2), 1.0).to_event(2)
        t = torch.distributions.LowerCholeskyTransform()
        pyro.sample("tril", dist.TransformedDistribution(base, [t]))

    with pytest.raises(GuideError, match=r"site 'tril'.*LowerCholesky.*no bijection"):
        from_guide(by_hand)


def test_double_precision_stays() -> None:
    def m() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))

    for kind in (autoguide.AutoNormal, autoguide.AutoMultivariateNormal):
        pyro.clear_param_store()
        guide = kind(m)
        guide()
        assert from_guide(guide).dtype == torch.float64


# -- joint Gaussians -------------------------------------------------------------------------------


def randomise(guide: Any, seed: int = 1) -> Any:
    """Random parameters, of a size as after training."""
    guide()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.5 * torch.randn(p.shape))
    return guide


def joint_covariance(guide: Any) -> Tensor:
    posterior = guide.get_posterior()
    if isinstance(posterior, torch.distributions.Independent):
        return torch.diag(posterior.variance).detach()
    return posterior.covariance_matrix.detach()


JOINT = [
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
]


def covariance_at(posterior: Posterior, site: str) -> Tensor:
    base = base_of(posterior.factors[site])
    if isinstance(base, torch.distributions.Normal):
        return torch.diag_embed(base.variance)
    return base.covariance_matrix


@pytest.mark.filterwarnings("ignore:Auto.*correlated:UserWarning")
@pytest.mark.parametrize("kind", JOINT)
def test_joint_gaussians_are_read_as_their_exact_block_marginals(kind: Any) -> None:
    guide = randomise(kind(model))
    posterior = from_guide(guide)
    full = joint_covariance(guide)
    for name, value in guide.median().items():
        assert torch.allclose(central(posterior)[name], value, rtol=1e-4)
    # loc is [3, 2] at the start of the vector: three blocks of two.
    assert posterior.factors["loc"].batch_shape == (3,)
    assert posterior.factors["loc"].event_shape == (2,)
    for l in range(3):
        block = full[2 * l : 2 * l + 2, 2 * l : 2 * l + 2]
        assert torch.allclose(covariance_at(posterior, "loc")[l], block, rtol=1e-4, atol=1e-6)
    # then scale [3], weights [2], shift [], matrix [2, 2].
    scales = base_of(posterior.factors["scale"]).scale
    assert torch.allclose(scales, full.diagonal()[6:9].sqrt(), rtol=1e-4)
    weights = covariance_at(posterior, "weights")
    shift = base_of(posterior.factors["shift"]).scale
    assert torch.allclose(shift, full[11, 11].sqrt(), rtol=1e-4)
    matrix = covariance_at(posterior, "matrix")
    if kind is autoguide.AutoDiagonalNormal:
        assert matrix.shape == (2, 2, 2)
    else:
        assert torch.allclose(weights, full[9:11, 9:11], rtol=1e-4, atol=1e-6)
        assert torch.allclose(matrix, full[12:, 12:], rtol=1e-4, atol=1e-6)
    for name, q in guide.quantiles([0.25]).items():
        if name in ("scale", "shift"):
            assert torch.allclose(posterior.factors[name].icdf(torch.tensor(0.25)), q[0], rtol=1e-4)


def test_diagonal_normal_has_event_shape_and_reads_like_auto_normal() -> None:
    guide = randomise(autoguide.AutoDiagonalNormal(model))
    assert guide.get_posterior().event_shape == (16,)
    posterior = from_guide(guide)
    structures = {k: f.structure() for k, f in posterior.decomposed.items()}
    pyro.clear_param_store()
    normal = autoguide.AutoNormal(model)
    normal()
    other = from_guide(normal)
    assert structures == {k: f.structure() for k, f in other.decomposed.items()}
    assert {k: d.shape() for k, d in posterior.factors.items()} == {
        k: d.shape() for k, d in other.factors.items()
    }


@pytest.mark.filterwarnings("ignore:Auto.*correlated:UserWarning")
def test_labelled_event_axes_are_split() -> None:
    def m() -> None:
        pyro.sample("w", dist.LogNormal(0, 1).expand([4, 3]).to_event(2))

    guide = randomise(autoguide.AutoMultivariateNormal(m))
    full = joint_covariance(guide)

    rows = from_guide(guide, axes={"w": ("hidden", None)})
    d = rows.factors["w"]
    assert (d.batch_shape, d.event_shape) == ((), (4, 3))  # as the model has it
    assert rows.decomposed["w"].base_shape == (4,)
    blocks = full.reshape(4, 3, 4, 3)
    for l in range(4):
        assert torch.allclose(covariance_at(rows, "w")[l], blocks[l, :, l], rtol=1e-4)
    assert torch.allclose(central(rows)["w"], guide.median()["w"], rtol=1e-4)
    assert rows.select("hidden", [2]).factors["w"].event_shape == (1, 3)

    # A labelled axis to the right of an unlabelled one: diagonal.
    columns = from_guide(guide, axes={"w": (None, "hidden")})
    scale = base_of(columns.factors["w"]).scale
    assert torch.allclose(scale, full.diagonal().sqrt().reshape(4, 3), rtol=1e-4)
    both = from_guide(guide, axes={"w": ("a", "b")})
    assert torch.allclose(base_of(both.factors["w"]).scale, scale)

    # No label: one block over all twelve numbers.
    whole = from_guide(guide)
    assert torch.allclose(covariance_at(whole, "w"), full, rtol=1e-4, atol=1e-6)
    assert whole.factors["w"].event_shape == (4, 3)
    value = whole.sample()
    latent = value["w"].log().reshape(-1)
    expected = guide.get_posterior().log_prob(latent) - latent.sum()
    assert torch.allclose(whole.log_prob(value), expected, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Auto.*correlated:UserWarning")
def test_joint_with_a_labelled_simplex_and_a_correlation_matrix() -> None:
    def m() -> None:
        with pyro.plate("topic", 2):
            pyro.sample("words", dist.Dirichlet(torch.ones(4)))
            pyro.sample("chol", dist.LKJCholesky(3, 1.0))
        pyro.sample("weights", dist.Dirichlet(torch.ones(2)))

    guide = randomise(autoguide.AutoMultivariateNormal(m))
    posterior = from_guide(guide, axes={"weights": ("topic",)})
    assert isinstance(posterior.factors["weights"], dist.Dirichlet)
    assert posterior.decomposed["words"].structure()[0] == "MultivariateNormal"
    assert posterior.factors["words"].batch_shape == (2,)
    full = joint_covariance(guide)
    assert torch.allclose(covariance_at(posterior, "words")[1], full[3:6, 3:6], rtol=1e-4)
    assert posterior.factors["chol"].event_shape == (3, 3)
    assert torch.allclose(covariance_at(posterior, "chol")[0], full[6:9, 6:9], rtol=1e-4, atol=1e-6)


def test_correlation_is_reported_in_nats_only_where_it_is_large() -> None:
    def m() -> None:
        pyro.sample("a", dist.Normal(0, 1))
        pyro.sample("b", dist.Normal(0, 1))

    guide = autoguide.AutoMultivariateNormal(m)
    guide()
    from_guide(guide)  # no warning at independence

    def correlate(rho: float) -> float:
        with torch.no_grad():
            slope = rho / math.sqrt(1 - rho**2)
            guide.scale_tril = torch.tensor([[1.0, 0.0], [slope, 1.0]])
        return -0.5 * math.log(1 - rho**2)

    assert correlate(0.5) < 0.2
    from_guide(guide)
    lost = correlate(0.95)
    with pytest.warns(UserWarning, match=rf"loses {lost:.1f} nats of correlation over 2 dim"):
        posterior = from_guide(guide)
    cov = joint_covariance(guide)
    product = dist.MultivariateNormal(torch.zeros(2), torch.diag(cov.diagonal()))
    joint = dist.MultivariateNormal(torch.zeros(2), cov)
    assert kl_divergence(joint, product).item() == pytest.approx(lost, rel=1e-4)
    assert torch.allclose(posterior.factors["b"].scale, cov[1, 1].sqrt())


def test_auto_gaussian_is_read_exactly() -> None:
    def m() -> None:
        a = pyro.sample("a", dist.Normal(0, 1))
        with pyro.plate("component", 3):
            b = pyro.sample("b", dist.LogNormal(a, 1))
            c = pyro.sample("c", dist.Normal(b, 1).expand([3]))
        pyro.sample("obs", dist.Normal(c.sum(), 1), obs=torch.tensor(1.0))

    guide = AutoGaussian(m)
    randomise(guide)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = from_guide(guide)
    assert posterior.axes["b"] == ("component",)
    for name, value in guide.median().items():
        assert torch.allclose(central(posterior)[name], value, rtol=1e-3, atol=1e-5)
    n = 4000
    with torch.no_grad(), pyro.plate("particles", n, dim=-2):
        draws = guide()["b"].log()
    base = base_of(posterior.factors["b"])
    assert ((draws.mean(0) - base.loc).abs() < 4.5 * base.scale / math.sqrt(n)).all()
    assert ((draws.std(0) / base.scale - 1).abs() < 4.5 / math.sqrt(2 * n)).all()


def test_auto_structured_is_read_as_marginals_with_a_warning() -> None:
    def m() -> None:
        a = pyro.sample("a", dist.Normal(0, 1))
        with pyro.plate("component", 3):
            b = pyro.sample("b", dist.LogNormal(a, 1))
        pyro.sample("obs", dist.Normal(b.sum(), 1), obs=torch.tensor(1.0))

    guide = randomise(autoguide.AutoStructured(m))
    with pytest.warns(UserWarning, match="AutoStructured is structured.*nats"):
        posterior = from_guide(guide)
    n = 4000
    with torch.no_grad(), pyro.plate("particles", n, dim=-2):
        run = guide()
    for name in ("a", "b"):
        draws = run[name].reshape(n, -1)
        base = base_of(posterior.factors[name])
        draws = draws.log() if name == "b" else draws
        assert ((draws.mean(0) - base.loc).abs() < 4.5 * base.scale / math.sqrt(n)).all()
        assert ((draws.std(0) / base.scale - 1).abs() < 4.5 / math.sqrt(2 * n)).all()


def test_auto_structured_with_other_conditionals_is_projected_from_draws() -> None:
    def m() -> None:
        a = pyro.sample("a", dist.Normal(0, 1))
        b = pyro.sample("b", dist.LogNormal(a, 1))
        pyro.sample("obs", dist.Normal(b, 1), obs=torch.tensor(1.0))

    guide = autoguide.AutoStructured(
        m, conditionals={"a": "normal", "b": "delta"}, dependencies={"b": {"a": "linear"}}
    )
    guide()
    with torch.no_grad():
        guide.deps.b.a.weight.fill_(2.0)
    with pytest.warns(UserWarning, match=r"over 500 draws.*\['a', 'b'\] onto a Normal"):
        posterior = from_guide(guide, num_samples=500)
    a, b = (base_of(posterior.factors[k]) for k in "ab")
    assert b.scale.item() == pytest.approx(2 * a.scale.item(), rel=1e-3)
    assert b.scale.item() == pytest.approx(0.2, rel=4 / math.sqrt(1000))


def test_normalizing_flow_is_projected_from_draws() -> None:
    torch.manual_seed(0)
    guide = autoguide.AutoIAFNormal(model, hidden_dim=[20])
    guide()
    with pytest.warns(UserWarning, match=r"Projected by moment matching over 800 draws"):
        posterior = from_guide(guide, num_samples=800, seed=3)
    n = 20_000
    with torch.no_grad():
        draws = guide.get_posterior().sample((n,))
    base = base_of(posterior.factors["loc"])
    expected = draws[:, :6].mean(0).reshape(3, 2)
    error = base.scale * math.sqrt(1 / 800 + 1 / n)
    assert ((base.loc - expected).abs() < 4.5 * error).all()
    with pytest.warns(UserWarning, match="draws"):
        again = from_guide(guide, num_samples=800, seed=3)
    assert torch.equal(base.loc, base_of(again.factors["loc"]).loc)


# -- point masses ----------------------------------------------------------------------------------


def test_auto_delta_needs_a_spread() -> None:
    guide = fit(model, autoguide.AutoDelta(model))
    with pytest.raises(GuideError, match=r"site 'loc' is a point mass.*spread=0\.1"):
        from_guide(guide)
    posterior = from_guide(guide, spread=0.2)
    for name, value in guide.median().items():
        assert torch.allclose(central(posterior)[name], value, rtol=1e-4)
    assert torch.equal(base_of(posterior.factors["scale"]).scale, torch.full((3,), 0.2))
    spread = {k: 0.1 for k in posterior.factors} | {"loc": torch.tensor([[0.1, 0.2]])}
    posterior = from_guide(guide, spread=spread)
    expected = torch.tensor([[0.1, 0.2]]).expand(3, 2)
    assert torch.equal(base_of(posterior.factors["loc"]).scale, expected)


def test_spread_is_checked() -> None:
    guide = fit(model, autoguide.AutoDelta(model), steps=1)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ParameterError, match="spread must be positive and finite"):
            from_guide(guide, spread=bad)
    with pytest.raises(ParameterError, match=r"does not broadcast to the unconstrained shape"):
        from_guide(guide, spread=torch.ones(7))
    with pytest.raises(GuideError, match="site 'scale' is a point mass"):
        from_guide(guide, spread={"loc": 0.1})
    spread = dict.fromkeys(guide.median(), 0.1)
    with pytest.raises(GuideError, match=r"spread names \['nowhere'\]"):
        from_guide(guide, spread=spread | {"nowhere": 0.1})


def test_laplace_approximation() -> None:
    def m() -> None:
        x = pyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))
        pyro.sample("obs", dist.Normal(x.sum(), 0.5), obs=torch.tensor(1.0))

    guide = fit(m, autoguide.AutoLaplaceApproximation(m), steps=300)
    with pytest.raises(GuideError, match=r"laplace_approximation\(\*args\)"):
        from_guide(guide)
    posterior = from_guide(guide, spread=0.3)
    assert torch.equal(base_of(posterior.factors["x"]).scale, torch.full((2,), 0.3))

    posterior = from_guide(guide.laplace_approximation())
    # Conjugate: precision I + 4 11ᵀ.
    expected = torch.linalg.inv(torch.eye(2) + 4 * torch.ones(2, 2))
    assert torch.allclose(covariance_at(posterior, "x"), expected, atol=1e-4)


def mixture(data: Tensor) -> None:
    with pyro.plate("component", 2):
        loc = pyro.sample("loc", dist.Normal(0, 5))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
        pyro.sample("obs", dist.Normal(loc[z], 1), obs=data)


def test_laplace_with_a_hidden_enumerated_site_is_reported() -> None:
    data = torch.tensor([-5.0, -5.2, 5.0, 5.3])
    guide = autoguide.AutoLaplaceApproximation(poutine.block(mixture, hide=["z"]))
    fit(mixture, guide, data, elbo=TraceEnum_ELBO(max_plate_nesting=1), steps=20)
    laplace = guide.laplace_approximation(data)
    with pytest.warns(UserWarning, match=r"discrete sites \['z'\].*curvature"):
        from_guide(laplace, data)
    with warnings.catch_warnings():  # without arguments the model cannot be looked at
        warnings.simplefilter("error")
        from_guide(laplace)
    # The fact itself: two calls sample z anew, and disagree.
    scales = {round(float(guide.laplace_approximation(data).scale[0]), 4) for _ in range(12)}
    assert len(scales) > 1


# -- enumeration, lists, blocks --------------------------------------------------------------------


def test_enumerated_sites_are_left_out() -> None:
    data = torch.randn(5)
    blocked = poutine.block(mixture, hide=["z"])
    guide = autoguide.AutoGuideList(mixture)
    guide.append(autoguide.AutoNormal(blocked))
    guide.append(autoguide.AutoDiscreteParallel(poutine.block(mixture, expose=["z"])))
    guide(data)
    posterior = from_guide(guide, data)
    assert set(posterior.factors) == {"loc"}
    assert posterior.axes["loc"] == ("component",)

    @pyro.infer.config_enumerate
    def by_hand() -> None:
        pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Categorical(torch.ones(3)))

    assert set(from_guide(by_hand).factors) == {"loc"}
    with pytest.raises(GuideError, match="no site to read"):
        from_guide(poutine.block(by_hand, hide=["loc"]))


def test_guide_list_of_all_kinds_and_nested() -> None:
    def extra() -> None:
        loc = pyro.param("extra_loc", torch.tensor(0.3))
        pyro.sample("shift", dist.Normal(loc, 0.7))

    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoMultivariateNormal(poutine.block(model, expose=["loc"])))
    guide.append(extra)
    inner = autoguide.AutoGuideList(poutine.block(model, expose=["scale", "weights", "matrix"]))
    inner.append(autoguide.AutoNormal(poutine.block(model, expose=["scale"])))
    inner.append(autoguide.AutoDelta(poutine.block(model, expose=["weights"])))
    inner.append(poutine.block(autoguide.AutoNormal(model), expose=["matrix"]))
    guide.append(inner)
    fit(model, guide, steps=10)
    posterior = from_guide(guide, spread=0.1)
    assert set(posterior.factors) == {"loc", "scale", "weights", "shift", "matrix"}
    assert posterior.axes["loc"] == ("component", None)
    extra_loc = pyro.param("extra_loc").detach()
    assert torch.equal(posterior.factors["shift"].loc, extra_loc)
    assert torch.equal(base_of(posterior.factors["scale"]).loc, inner[0].locs.scale)
    block = guide[0].get_posterior().covariance_matrix[2:4, 2:4]
    assert torch.allclose(covariance_at(posterior, "loc")[1], block, atol=1e-6)
    with pytest.raises(GuideError, match="site 'weights' is a point mass"):
        from_guide(guide)


def test_one_site_in_two_parts_is_refused() -> None:
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(model))
    guide.append(autoguide.AutoDiagonalNormal(poutine.block(model, expose=["loc"])))
    guide.prototype_trace = poutine.trace(poutine.block(model, hide=["obs"])).get_trace()
    for part in guide:
        part._setup_prototype()
    with pytest.raises(GuideError, match="site 'loc' is in part 1"):
        from_guide(guide)


def test_blocked_guides() -> None:
    guide = fit(model, autoguide.AutoNormal(model), steps=5)
    whole = from_guide(guide)
    part = from_guide(poutine.block(guide, hide=["loc"]))
    assert set(part.factors) == set(whole.factors) - {"loc"}
    assert part.decomposed["weights"].structure() == whole.decomposed["weights"].structure()
    assert torch.equal(base_of(part.factors["matrix"]).loc, guide.locs.matrix)
    only = from_guide(poutine.block(poutine.scale(guide, scale=2.0), expose=["scale"]))
    assert set(only.factors) == {"scale"}
    assert isinstance(only.factors["scale"], dist.LogNormal)


def test_an_auto_normal_inside_a_function_is_recognised() -> None:
    auto = fit(model, autoguide.AutoNormal(model), steps=5)

    def guide() -> None:
        auto()
        pyro.sample("extra", dist.Gamma(2.0, 3.0))

    posterior = from_guide(guide)
    assert posterior.axes["loc"] == ("component", None)
    for name in ("loc", "scale", "weights"):
        assert torch.allclose(base_of(posterior.factors[name]).loc, getattr(auto.locs, name))
        assert torch.allclose(base_of(posterior.factors[name]).scale, getattr(auto.scales, name))
    assert isinstance(posterior.factors["extra"], dist.Gamma)


def interval_model() -> None:
    with pyro.plate("component", 2):
        pyro.sample("u", dist.Uniform(2.0, 7.0))
    pyro.sample("s", dist.LogNormal(0.0, 1.0))


class Outer(PyroModule):
    """A hand-written guide with an autoguide inside."""

    def __init__(self) -> None:
        super().__init__()
        self.auto = autoguide.AutoNormal(interval_model)
        self.loc = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self) -> None:
        self.auto()
        pyro.sample("own", dist.Normal(self.loc, 1.0))


def test_autoguides_inside_other_guides() -> None:
    outer = Outer()
    with pytest.raises(GuideError, match="AutoNormal was never called"):
        from_guide(outer)
    assert outer.auto.prototype_trace is None
    outer()
    for guide in (outer, functools.partial(outer), poutine.block(outer, hide=["s"])):
        posterior = from_guide(guide)
        base = base_of(posterior.factors["u"])
        assert torch.allclose(base.loc, outer.auto.locs.u)
        assert torch.allclose(base.scale, outer.auto.scales.u)
        assert posterior.axes["u"] == ("component",)
        assert torch.allclose(central(posterior)["u"], outer.auto.median()["u"])
        assert posterior.factors["own"].loc.item() == 0.5

    pyro.clear_param_store()
    joint = autoguide.AutoMultivariateNormal(interval_model)
    joint()
    with pytest.warns(UserWarning, match=r"\['s', 'u'\] onto a Normal"):
        posterior = from_guide(lambda: joint(), num_samples=500)
    value = posterior.sample((100,))["u"]
    assert ((value > 2) & (value < 7)).all()  # the support is the model's


def test_partial_binds_arguments() -> None:
    def guide(data: Tensor, shift: float) -> None:
        pyro.sample("x", dist.Normal(data.mean() + shift, 1.0))

    bound = functools.partial(guide, torch.ones(2))
    assert from_guide(bound, shift=2.0).factors["x"].loc.item() == 3.0


def test_guide_list_with_a_structured_part_survives_saving() -> None:
    part = poutine.block(model, expose=["loc", "scale"])
    guide = autoguide.AutoGuideList(model)
    guide.append(
        autoguide.AutoStructured(
            part,
            conditionals={"loc": "normal", "scale": "delta"},
            dependencies={"scale": {"loc": "linear"}},
        )
    )
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["shift"])))
    guide()
    with torch.no_grad():
        guide[0].deps.scale.loc.weight.normal_()
    with pytest.warns(UserWarning, match="Projected"):
        before = from_guide(guide, num_samples=50)
    loaded = saved(guide)
    pyro.clear_param_store()
    with pytest.warns(UserWarning, match="Projected"):
        after = from_guide(loaded, num_samples=50)
    for name in ("loc", "scale", "shift"):
        assert torch.allclose(central(after)[name], central(before)[name])


# -- effect-based guides and EasyGuide -------------------------------------------------------------


def test_auto_normal_messenger() -> None:
    guide = AutoNormalMessenger(model)
    with pytest.raises(GuideError, match="AutoNormalMessenger was never called"):
        from_guide(guide)
    fit(model, guide)
    posterior = from_guide(guide)
    assert posterior.axes["loc"] == ("component", None)
    assert set(posterior.factors) == {"loc", "scale", "weights", "shift", "matrix"}
    for name in posterior.factors:
        assert torch.equal(base_of(posterior.factors[name]).loc, getattr(guide.locs, name))
    before = guide.get_traces()[1].nodes["loc"]["value"]
    from_guide(guide)
    assert guide.get_traces()[1].nodes["loc"]["value"] is before

    taking = AutoNormalMessenger(mixture_free)
    taking(DATA)
    with pytest.raises(GuideError, match=r"failed when it was run.*TypeError.*passed on"):
        from_guide(taking)
    assert set(from_guide(taking, DATA).factors) == {"mu"}


def mixture_free(data: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0, 1))
    with pyro.plate("data", len(data)):
        pyro.sample("obs", dist.Normal(mu, 1).expand([2]).to_event(1), obs=data)


def test_hierarchical_messenger_is_projected() -> None:
    def m() -> None:
        a = pyro.sample("a", dist.Normal(0, 1))
        b = pyro.sample("b", dist.Normal(a, 1))
        pyro.sample("obs", dist.Normal(b, 1), obs=torch.tensor(1.0))

    guide = AutoHierarchicalNormalMessenger(m, init_weight=2.0, init_scale=0.5)
    guide()
    with pytest.warns(UserWarning, match=r"\['b'\], which depend on other sites"):
        posterior = from_guide(guide, num_samples=1000)
    a, b = posterior.factors["a"], posterior.factors["b"]
    expected = math.sqrt(0.25 + 4 * 0.25)
    assert a.scale.item() == pytest.approx(0.5)
    assert b.scale.item() == pytest.approx(expected, rel=4 / math.sqrt(2 * 1000))


class Easy(EasyGuide):
    def guide(self) -> None:
        group = self.group("a|b")
        size = group.event_shape[0]
        loc = pyro.param("easy_loc", torch.arange(size) * 0.1)
        tril = pyro.param(
            "easy_tril",
            torch.tril(torch.full((size, size), 0.1)) + torch.eye(size),
            constraint=constraints.lower_cholesky,
        )
        group.sample("joint", dist.MultivariateNormal(loc, scale_tril=tril))
        self.map_estimate("c")
        pyro.sample("d", dist.Normal(0.5, 1.5))


def easy_model() -> None:
    pyro.sample("a", dist.LogNormal(0, 1).expand([2]).to_event(1))
    with pyro.plate("component", 3):
        pyro.sample("b", dist.Normal(0, 1))
    pyro.sample("c", dist.LogNormal(0, 1))
    pyro.sample("d", dist.Normal(0, 1))


def test_easy_guide() -> None:
    guide = Easy(easy_model)
    with pytest.raises(GuideError, match="Easy was never called"):
        from_guide(guide, spread=0.1)
    guide()
    with pytest.raises(GuideError, match="site 'c' is a point mass"):
        from_guide(guide)
    posterior = from_guide(guide, spread=0.1)
    assert posterior.axes["b"] == ("component",)
    full = pyro.param("easy_tril").detach() @ pyro.param("easy_tril").detach().T
    assert torch.allclose(covariance_at(posterior, "a"), full[:2, :2])
    assert torch.allclose(base_of(posterior.factors["b"]).scale, full.diagonal()[2:].sqrt())
    assert torch.allclose(base_of(posterior.factors["b"]).loc, torch.tensor([0.2, 0.3, 0.4]))
    assert base_of(posterior.factors["c"]).scale.item() == pytest.approx(0.1)
    assert torch.allclose(central(posterior)["c"], guide.c.detach())
    assert posterior.factors["d"].scale.item() == 1.5


def test_easy_guide_with_a_group_in_a_plate() -> None:
    def m() -> None:
        with pyro.plate("component", 3):
            pyro.sample("a", dist.LogNormal(0, 1))
            pyro.sample("b", dist.Normal(0, 1).expand([2]).to_event(1))

    class Local(EasyGuide):
        def guide(self) -> None:
            with self.plate("component", 3):
                group = self.group(".*")
                loc = pyro.param("local_loc", torch.arange(9.0).reshape(3, 3))
                group.sample("joint", dist.Normal(loc, 0.5).to_event(1))

    guide = Local(m)
    guide()
    posterior = from_guide(guide)
    loc = pyro.param("local_loc").detach()
    assert torch.equal(base_of(posterior.factors["a"]).loc, loc[:, 0])
    assert torch.equal(base_of(posterior.factors["b"]).loc, loc[:, 1:])
    assert posterior.axes["b"] == ("component", None)


# -- guides by hand --------------------------------------------------------------------------------


def by_hand() -> None:
    alpha = pyro.param("alpha", torch.tensor([1.0, 2.0, 3.0]), constraint=constraints.positive)
    loc = pyro.param("loc_q", torch.zeros(3, 2))
    pyro.sample("weights", dist.Dirichlet(alpha))
    with pyro.plate("component", 3):
        pyro.sample("loc", dist.Normal(loc, 1.0).to_event(1))
        pyro.sample("rate", dist.Gamma(2.0, 1.0))  # narrower than its plate
        pyro.sample("kind", dist.Categorical(torch.tensor([0.2, 0.8])))
        pyro.sample("free", dist.Normal(0, 1).expand([3]).mask(True))


def test_functions_are_read_from_a_trace() -> None:
    by_hand()
    with torch.no_grad():
        pyro.param("alpha").unconstrained().add_(1.0)
    posterior = from_guide(by_hand, axes={"weights": ("component",)})
    assert torch.equal(posterior.factors["weights"].concentration, pyro.param("alpha").detach())
    assert posterior.axes["loc"] == ("component", None)
    assert posterior.factors["rate"].batch_shape == (3,)  # comes expanded
    assert posterior.decomposed["rate"].params["rate"].shape == (3,)
    assert isinstance(posterior.factors["kind"], dist.Categorical)
    assert posterior.axes["kind"] == ("component",)


def test_a_function_whose_parameters_are_gone_is_refused() -> None:
    with pytest.raises(GuideError, match=r"\['alpha', 'loc_q'\] not in the parameter store"):
        from_guide(by_hand)
    assert len(pyro.get_param_store()) == 0
    by_hand()
    from_guide(by_hand)
    pyro.clear_param_store()
    with pytest.raises(GuideError, match="never called or the store was cleared"):
        from_guide(by_hand)


def test_modules_are_read_from_a_trace() -> None:
    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
            self.scale = PyroParam(torch.tensor([0.5, 0.6]), constraints.positive)

        def forward(self) -> None:
            with pyro.plate("component", 2):
                pyro.sample("x", dist.LogNormal(self.loc, self.scale))

    guide = Guide()
    posterior = from_guide(guide)
    assert torch.allclose(posterior.factors["x"].scale, torch.tensor([0.5, 0.6]))
    assert not guide._pyro_context.used
    again = from_guide(PosteriorGuide(posterior))
    assert again.axes == posterior.axes
    assert torch.allclose(again.factors["x"].scale, posterior.factors["x"].scale)


def test_auxiliary_observed_and_subsampling_sites_are_left_out() -> None:
    def guide() -> None:
        pyro.sample("aux", dist.Normal(0, 1), infer={"is_auxiliary": True})
        pyro.sample("seen", dist.Normal(0, 1), obs=torch.tensor(0.0))
        pyro.deterministic("known", torch.tensor(1.0))
        pyro.factor("factor", torch.tensor(0.0), has_rsample=True)
        with pyro.plate("component", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    trace = poutine.trace(guide).get_trace()
    assert type(trace.nodes["component"]["fn"]).__name__ == "_Subsample"
    assert set(from_guide(guide).factors) == {"x"}


def test_dependent_sites_are_averaged_in_their_own_family() -> None:
    def guide() -> None:
        a = pyro.sample("a", dist.Normal(50.0, 2.0))
        with pyro.plate("component", 2):
            pyro.sample("b", dist.LogNormal(a, torch.tensor([1.0, 0.5])))
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("k", dist.Categorical(torch.stack([0.1 + 0.8 * z, 0.9 - 0.8 * z])))

    n = 1000
    with pytest.warns(UserWarning, match=r"\['b', 'k'\], which depend on other sites"):
        posterior = from_guide(guide, num_samples=n)
    b = posterior.factors["b"]
    assert isinstance(b, dist.LogNormal)
    expected = (4 + torch.tensor([1.0, 0.25])).sqrt()
    assert ((b.loc - 50).abs() < 4 * 2.0 / math.sqrt(n)).all()
    assert ((b.scale / expected - 1).abs() < 4 / math.sqrt(2 * n)).all()
    probs = posterior.factors["k"].probs
    error = 0.8 * math.sqrt(0.3 * 0.7 / n)
    assert abs(float(probs[0]) - (0.1 + 0.8 * 0.3)) < 4 * error
    assert posterior.factors["a"].loc.item() == 50.0


def test_dependence_is_found_where_runs_look_alike() -> None:
    def guide() -> None:
        rare = pyro.sample("rare", dist.Bernoulli(0.001))
        pyro.sample("x", dist.Normal(1000 * rare, 1.0))

    with pytest.warns(UserWarning, match=r"\['x'\], which depend"):
        from_guide(guide, num_samples=10)


def test_other_families_are_projected_onto_normals() -> None:
    def guide() -> None:
        pyro.sample("t", dist.StudentT(10.0, 1.0, 2.0))
        with pyro.plate("component", 2):
            pyro.sample("h", dist.HalfNormal(torch.tensor([1.0, 5.0])))

    n = 1000
    with pytest.warns(UserWarning, match=r"over 1000 draws.*\['h', 't'\] onto a Normal"):
        posterior = from_guide(guide, num_samples=n)
    t = posterior.factors["t"]
    expected = 2 * math.sqrt(10 / 8)
    assert abs(t.loc.item() - 1) < 4 * expected / math.sqrt(n)
    assert t.scale.item() == pytest.approx(expected, rel=0.1)  # kurtosis 4: 4 s.e. of the scale
    h = posterior.factors["h"]
    # E log |x| = (digamma(1/2) + log 2) / 2 for a standard Normal, variance trigamma(1/2)/4.
    mean = (torch.digamma(torch.tensor(0.5)) + math.log(2)) / 2 + torch.tensor([1.0, 5.0]).log()
    sd = (torch.polygamma(1, torch.tensor(0.5)) / 4).sqrt()
    assert ((h.loc - mean).abs() < 4 * sd / math.sqrt(n)).all()
    assert posterior.axes["h"] == ("component",)


def test_multiples_of_a_gamma_are_gammas() -> None:
    scales = torch.tensor([1.0, 2.0, 4.0])

    def guide(scale: Any) -> None:
        with pyro.plate("component", 3):
            affine = dist.transforms.AffineTransform(0.0, scale)
            pyro.sample("g", dist.TransformedDistribution(dist.Gamma(2.0, 3.0), [affine]))

    for scale in (scales, torch.tensor(2.0, requires_grad=True), 2):
        factor = from_guide(guide, scale).factors["g"]
        assert isinstance(factor, dist.Gamma)
        assert torch.allclose(factor.mean, (2 / 3 * torch.as_tensor(scale)).expand(3))
        x = torch.tensor([0.5, 1.0, 3.0])
        affine = dist.transforms.AffineTransform(0.0, scale)
        truth = dist.TransformedDistribution(dist.Gamma(2.0, torch.full((3,), 3.0)), [affine])
        assert torch.allclose(factor.log_prob(x), truth.log_prob(x))


@pytest.mark.parametrize(
    ("base", "loc", "scale", "low", "high"),
    [
        (dist.HalfNormal(torch.ones(3)), 0.0, torch.tensor([1.0, 2.0, 3.0]), 0.0, math.inf),
        (dist.HalfNormal(torch.ones(3)), 1.0, -2.0, -math.inf, 1.0),
        (dist.Uniform(torch.zeros(3), 1.0), 2.0, -3.0, -1.0, 2.0),
        (dist.HalfNormal(torch.ones(3)).to_event(1), 0.0, torch.tensor([1.0, 2.0, 3.0]), 0.0, None),
        (dist.StudentT(torch.full((3,), 9.0)), 0.0, 2.0, -math.inf, math.inf),
    ],
)
@pytest.mark.filterwarnings("ignore:this guide is no product:UserWarning")
def test_the_support_behind_an_affine_map(
    base: Any, loc: float, scale: Any, low: float, high: float | None
) -> None:
    def guide() -> None:
        t = dist.transforms.AffineTransform(loc, scale, event_dim=base.event_dim)
        pyro.sample("x", dist.TransformedDistribution(base, [t]))

    x = from_guide(guide).factors["x"].sample(torch.Size([1000]))
    high = math.inf if high is None else high
    assert x.shape[-1] == 3
    assert ((x >= low) & (x <= high)).all()
    if low == 0.0:
        median = 0.6745 * torch.as_tensor(scale)
        assert torch.allclose(x.median(0).values, median, rtol=0.3)


@pytest.mark.filterwarnings("ignore:this guide is no product:UserWarning")
def test_auto_regressive_messenger_knows_the_supports() -> None:
    def m() -> None:
        with pyro.plate("component", 3):
            pyro.sample("g", dist.Gamma(2.0, 1.0))
        pyro.sample("h", dist.Gamma(2.0, 1.0))
        pyro.sample("u", dist.Uniform(2.0, 5.0))

    guide = AutoRegressiveMessenger(m, init_scale=0.5)
    guide()
    posterior = from_guide(guide)
    for site in ("g", "h"):
        f = posterior.decomposed[site]
        assert [type(t).__name__ for t in f.transforms] == ["ExpTransform"]
        # log x = loc + scale * log(Gamma), with no learned number left in the transforms
        draws = torch.stack([guide()[site].log() for _ in range(500)])
        assert torch.allclose(f.params["loc"], draws.mean(0), atol=0.15)
        assert torch.allclose(f.params["scale"], draws.std(0), rtol=0.25)
    u = posterior.factors["u"].sample(torch.Size([100]))
    assert ((u >= 2) & (u <= 5)).all()


def test_bounds_of_a_prior_in_a_plate_are_no_learned_map() -> None:
    def m() -> None:
        with pyro.plate("component", 3):
            pyro.sample("u", dist.Uniform(2.0, torch.full((3,), 5.0)))

    guide = AutoNormalMessenger(m)
    guide()
    u = from_guide(guide).decomposed["u"]  # exact: no warning
    assert torch.equal(u.params["loc"], guide.locs.u)


def test_private_attributes_of_pyro() -> None:
    """What the comment at the head of readers/pyro/autoguides.py lists."""

    def m() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0))

    normal, diagonal = autoguide.AutoNormal(m), autoguide.AutoDiagonalNormal(m)
    gaussian, structured = AutoGaussian(m), autoguide.AutoStructured(m)
    laplace, easy = autoguide.AutoLaplaceApproximation(m), Easy(easy_model)
    for guide in (normal, diagonal, gaussian, structured, laplace, easy):
        guide()
    group = easy.group("a|b")
    calls = autoguide.AutoGuideList(m)
    calls.append(lambda: None)
    needed: dict[Any, tuple[str, ...]] = {
        normal: ("_model", "prototype_trace", "_event_dims", "_get_loc_and_scale"),
        diagonal: ("_unconstrained_shapes", "_unpack_latent"),
        gaussian: ("_factors", "_unconstrained_event_shapes", "_dense_get_mvn", "_dense_shapes"),
        structured: ("_sorted_sites", "_batch_shapes", "_unconstrained_event_shapes"),
        calls[0]: ("_guide",),
        group: ("_site_sizes",),
        normal._pyro_context: ("used",),
    }
    for thing, names in needed.items():
        missing = [name for name in names if not hasattr(thing, name)]
        assert not missing, f"{type(thing).__name__} of Pyro {pyro.__version__} lacks {missing}"
    assert hasattr(normal, "_pyro_name")
    assert "loc" in laplace.laplace_approximation()._buffers


def test_a_flow_by_hand_is_projected() -> None:
    def guide() -> None:
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        flow = dist.transforms.Planar(2)
        with torch.no_grad():
            for p, v in zip(flow.parameters(), ([0.0], [0.1, 0.2], [0.3, 0.4]), strict=False):
                p.copy_(torch.tensor(v).expand(p.shape))
        pyro.sample("x", dist.TransformedDistribution(base, [flow]))

    with pytest.warns(UserWarning, match=r"\['x'\]"):
        posterior = from_guide(guide, num_samples=200)
    assert posterior.factors["x"].event_shape == (2,)


def test_random_point_masses_are_projected() -> None:
    def guide() -> None:
        u = pyro.sample("u", dist.Normal(1.0, 2.0), infer={"is_auxiliary": True})
        pyro.sample("x", dist.Delta(3 * u))

    with pytest.warns(UserWarning, match=r"\['x'\] onto a Normal"):
        posterior = from_guide(guide, num_samples=1000)
    assert posterior.factors["x"].scale.item() == pytest.approx(6.0, rel=4 / math.sqrt(2000))


def test_constant_point_masses_need_a_spread() -> None:
    def guide() -> None:
        pyro.sample("x", dist.Delta(torch.tensor([1.0, 2.0])).to_event(1))

    with pytest.raises(GuideError, match="site 'x' is a point mass"):
        from_guide(guide)
    posterior = from_guide(guide, spread=0.5)
    assert torch.equal(base_of(posterior.factors["x"]).loc, torch.tensor([1.0, 2.0]))


def test_discrete_families_without_registration_are_refused() -> None:
    def guide() -> None:
        pyro.sample("n", dist.Geometric(torch.tensor(0.3)))

    with pytest.raises(GuideError, match=r"site 'n'.*Enumerate"):
        from_guide(guide)


def test_hand_written_subsampling_is_refused() -> None:
    def guide() -> None:
        with pyro.plate("data", 6, subsample_size=2) as i:
            pyro.sample("x", dist.Normal(torch.arange(6.0)[i], 1.0))

    with pytest.raises(GuideError, match=r"site 'x': plate 'data' is subsampled.*full data"):
        from_guide(guide)


def test_partly_masked_sites_and_changing_sites_are_refused() -> None:
    def masked() -> None:
        with pyro.plate("component", 2), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(GuideError, match="site 'x' is partly masked"):
        from_guide(masked)

    def changing() -> None:
        changing.calls = getattr(changing, "calls", 0) + 1  # type: ignore[attr-defined]
        pyro.sample(f"x{min(changing.calls, 2)}", dist.Normal(0.0, 1.0))  # type: ignore[attr-defined]

    with pytest.raises(GuideError, match="site 'x1' is not there in every run"):
        from_guide(changing)


def test_sequential_plates_have_no_axis() -> None:
    def guide() -> None:
        for i in pyro.plate("component", 2):
            pyro.sample(f"x{i}", dist.Normal(0.0, 1.0))

    posterior = from_guide(guide)
    assert posterior.axes == {"x0": (), "x1": ()}


def test_guides_that_fail_say_how_to_pass_arguments() -> None:
    def guide(data: Tensor) -> None:
        pyro.sample("x", dist.Normal(data.mean(), 1.0))

    with pytest.raises(GuideError, match=r"TypeError.*give those that it was fitted with"):
        from_guide(guide)
    assert from_guide(guide, torch.ones(3)).factors["x"].loc.item() == 1.0
    assert from_guide(guide, data=torch.ones(3)).factors["x"].loc.item() == 1.0
    with pytest.raises(ParameterError, match="num_samples"):
        from_guide(guide, torch.ones(3), num_samples=1)


def test_amortised_guides_of_a_plain_module() -> None:
    class VAE(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))

        def guide(self, data: Tensor) -> None:
            pyro.module("vae", self)
            with pyro.plate("data", len(data)):
                pyro.sample("z", dist.Normal(self.net(data), 1.0).to_event(1))

    vae = VAE()
    before = copy.deepcopy(vae.state_dict())
    posterior = from_guide(vae.guide, DATA)
    assert posterior.axes["z"] == ("data", None)
    assert len(pyro.get_param_store()) == 0
    for k, v in vae.state_dict().items():
        assert torch.equal(v, before[k]), k


# -- what was never called, and what was saved -----------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        autoguide.AutoNormal,
        autoguide.AutoDelta,
        autoguide.AutoDiagonalNormal,
        autoguide.AutoMultivariateNormal,
        autoguide.AutoLowRankMultivariateNormal,
        autoguide.AutoLaplaceApproximation,
        autoguide.AutoGuideList,
        autoguide.AutoStructured,
        AutoGaussian,
    ],
)
def test_a_guide_that_was_never_called(kind: Any) -> None:
    guide = kind(model)
    with pytest.raises(GuideError, match=r"was never called.*call guide\(\*args\) once"):
        from_guide(guide)
    with pytest.raises(GuideError, match="never called"):
        from_guide(poutine.block(guide, hide=["loc"]))
    assert len(pyro.get_param_store()) == 0


def saved(guide: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.filterwarnings("ignore:Auto.*correlated:UserWarning")
@pytest.mark.parametrize(
    "kind",
    [
        autoguide.AutoNormal,
        autoguide.AutoDiagonalNormal,
        autoguide.AutoMultivariateNormal,
        autoguide.AutoLowRankMultivariateNormal,
        autoguide.AutoStructured,
    ],
)
@pytest.mark.filterwarnings("ignore:Auto.*structured:UserWarning")
def test_saved_guides_lose_their_model_but_are_read(kind: Any) -> None:
    guide = randomise(kind(model))
    before = from_guide(guide)
    loaded = saved(guide)
    assert loaded._model is None
    assert guide._model is None  # saving took it from the original, too
    pyro.clear_param_store()
    for g in (loaded, guide):
        after = from_guide(g)
        assert after.axes == before.axes
        for name in before.factors:
            assert torch.equal(central(after)[name], central(before)[name])


def test_a_guide_saved_before_it_was_called() -> None:
    guide = saved(autoguide.AutoNormal(model))
    with pytest.raises(GuideError, match=r"saved before it was ever called.*AutoNormal\(model\)"):
        from_guide(guide)


def test_a_saved_laplace_guide_says_what_is_lost() -> None:
    guide = autoguide.AutoLaplaceApproximation(model)
    guide()
    loaded = saved(guide)
    with pytest.raises(GuideError, match="still has its model"):
        from_guide(loaded)
    from_guide(loaded, spread=0.1)


def test_a_guide_restored_from_the_store() -> None:
    guide = fit(model, autoguide.AutoNormal(model), steps=5)
    expected = guide.median()
    state = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    again = autoguide.AutoNormal(model)
    with pytest.raises(GuideError, match="never called"):
        from_guide(again)
    again()
    assert torch.equal(central(from_guide(again))["loc"], expected["loc"])


# -- the parameter store ---------------------------------------------------------------------------


def m_one() -> None:
    pyro.sample("x", dist.Normal(0, 1))
    pyro.sample("obs", dist.Normal(1.0, 1.0), obs=torch.tensor(0.0))


def shifted(by: float) -> Any:
    def m() -> None:
        x = pyro.sample("x", dist.Normal(by, 1))
        pyro.sample("obs", dist.Normal(x, 1.0), obs=torch.tensor(by))

    return m


def test_two_auto_normals_share_the_store_and_are_refused() -> None:
    a = fit(shifted(5.0), autoguide.AutoNormal(shifted(5.0)))
    before = a.median()["x"]
    b = fit(shifted(-5.0), autoguide.AutoNormal(shifted(-5.0)))
    assert not torch.equal(a.median()["x"], before)  # the fact: fitting the second moved the first
    with pytest.raises(
        GuideError,
        match=r"party 0 and party 1 share the parameter 'AutoNormal\.locs\.x'.*scope\(\)",
    ):
        check_not_shared([a, b])
    with pytest.raises(GuideError, match="party 0 and party 2 share"):
        check_not_shared([a, from_guide(a), poutine.block(b, hide=["y"])])
    with pytest.raises(GuideError, match="party 0 and party 1 are the same guide"):
        check_not_shared([a, a])


def test_remedies_against_sharing() -> None:
    a = fit(shifted(5.0), autoguide.AutoNormal(shifted(5.0)))
    first = from_guide(a)
    pyro.clear_param_store()
    b = fit(shifted(-5.0), autoguide.AutoNormal(shifted(-5.0)))
    check_not_shared([a, b])
    check_not_shared([first, b])
    guides = []
    for by in (5.0, -5.0):
        with pyro.get_param_store().scope():
            guides.append(fit(shifted(by), autoguide.AutoNormal(shifted(by))))
    check_not_shared(guides)
    assert from_guide(guides[0]).factors["x"].loc > 0 > from_guide(guides[1]).factors["x"].loc
    with pyro.settings.context(module_local_params=True):
        guides = [fit(shifted(by), autoguide.AutoNormal(shifted(by))) for by in (5.0, -5.0)]
        check_not_shared(guides)
        assert from_guide(guides[0]).factors["x"].loc > 0 > from_guide(guides[1]).factors["x"].loc


def test_functions_that_share_a_parameter_are_refused() -> None:
    def one() -> None:
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0))

    def two() -> None:
        pyro.sample("x", dist.Normal(pyro.param("mu", torch.tensor(1.0)), 1.0))

    def three() -> None:
        pyro.sample("x", dist.Normal(pyro.param("nu", torch.tensor(1.0)), 1.0))

    for g in (one, two, three):
        g()
    check_not_shared([one, three])
    with pytest.raises(GuideError, match="party 0 and party 2 share the parameter 'mu'"):
        check_not_shared([one, three, two])


def test_a_frozen_network_may_be_shared() -> None:
    network = torch.nn.Linear(2, 2).requires_grad_(False)

    class Amortised(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.loc = torch.nn.Parameter(torch.zeros(2))

        def forward(self) -> None:
            pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1))

    check_not_shared([Amortised(), Amortised()])
    network.requires_grad_(True)
    with pytest.raises(GuideError, match=r"party 0 and party 1 share .*network\.weight"):
        check_not_shared([Amortised(), Amortised()])


def test_guides_that_need_arguments_are_checked_with_them() -> None:
    def make(name: str) -> Any:
        def guide(data: Tensor) -> None:
            pyro.sample("x", dist.Normal(pyro.param(name, data.mean()), 1.0))

        guide(DATA)
        return guide

    check_not_shared([make("a"), make("b")], DATA)
    check_not_shared([make("a"), make("a")])  # cannot be run, so cannot be told
    with pytest.raises(GuideError, match="share the parameter 'a'"):
        check_not_shared([make("a"), make("a")], DATA)


@pytest.mark.parametrize("wrap", ["bare", "blocked", "listed", "called by a function"])
def test_reading_after_the_store_was_cleared_and_refilled(wrap: str) -> None:
    def make(by: float) -> tuple[Any, Any]:
        m = shifted(by)
        auto = autoguide.AutoNormal(m)
        if wrap == "listed":
            guide = autoguide.AutoGuideList(m)
            guide.append(PlainGuide(by))
            return fit(m, guide), guide
        fit(m, auto)
        if wrap == "blocked":
            return poutine.block(auto, hide=["y"]), auto
        return ((lambda: auto()) if wrap == "called by a function" else auto), auto

    a, module_a = make(5.0)
    expected = from_guide(a)
    pyro.clear_param_store()
    b, _ = make(-5.0)
    tensors = [id(p) for p in module_a.parameters()]
    again = from_guide(a)
    assert torch.equal(again.factors["x"].loc, expected.factors["x"].loc)
    assert from_guide(b).factors["x"].loc < 0 < again.factors["x"].loc
    assert [id(p) for p in module_a.parameters()] == tensors
    check_not_shared([a, b])


class PlainGuide(PyroModule):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor(by))

    def forward(self) -> None:
        pyro.sample("x", dist.Normal(self.loc, 1.0))


class Recorder(poutine.messenger.Messenger):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def _process_message(self, msg: Any) -> None:
        self.seen.append(msg["name"])


def test_nothing_is_disturbed() -> None:
    def structured() -> None:
        a = pyro.sample("a", dist.Normal(pyro.param("mu", torch.tensor(0.0)), 1.0))
        pyro.sample("b", dist.Normal(a, pyro.param("sd", torch.tensor(1.0))))

    guides = [
        fit(model, autoguide.AutoNormal(model), steps=2),
        fit(model, autoguide.AutoMultivariateNormal(model), steps=2),
        fit(model, AutoNormalMessenger(model), steps=2),
        structured,
    ]
    structured()
    store = pyro.get_param_store()
    tensors = {k: (v, v.clone()) for k, v in store.named_parameters()}
    state = torch.get_rng_state()
    recorder = Recorder()
    with recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for g in guides:
            from_guide(g, num_samples=5)
    assert recorder.seen == []
    assert torch.equal(torch.get_rng_state(), state)
    after = dict(store.named_parameters())
    assert after.keys() == tensors.keys()
    for k, (tensor, value) in tensors.items():
        assert after[k] is tensor
        assert torch.equal(tensor, value)
    # Training goes on as if nothing had been.
    fit(model, guides[0], steps=2)


def test_seed_decides_the_draws() -> None:
    def guide() -> None:
        pyro.sample("x", dist.StudentT(5.0))

    def read(seed: int) -> Tensor:
        with pytest.warns(UserWarning, match="draws"):
            return from_guide(guide, num_samples=20, seed=seed).factors["x"].loc

    assert torch.equal(read(1), read(1))
    assert not torch.equal(read(1), read(2))


def test_a_jitted_fit_reads_the_same() -> None:
    guide = autoguide.AutoNormal(m_one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(m_one, guide, elbo=JitTrace_ELBO(), steps=5)
    assert torch.equal(from_guide(guide).factors["x"].loc, guide.locs.x)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal])
def test_posteriors_stay_on_the_device(kind: Any) -> None:
    def m() -> None:
        zero = torch.zeros(2, device="cuda")
        with pyro.plate("component", 3):
            pyro.sample("x", dist.Normal(zero, 1.0).to_event(1))
        pyro.sample("y", dist.StudentT(5.0, zero, 1.0).to_event(1))

    guide = kind(m)
    guide()
    assert from_guide(guide).device.type == "cuda"
    state = torch.cuda.get_rng_state()
    with pytest.warns(UserWarning, match="Projected"):
        assert from_guide(m, num_samples=10).device.type == "cuda"
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_all_errors_are_fusion_errors() -> None:
    assert issubclass(GuideError, FusionError)


def test_sites_in_plates_of_data_are_no_components() -> None:
    def local(x: Tensor) -> None:
        with pyro.plate("component", 2):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            pyro.factor("prefers", -loc.square())
        with pyro.plate("patient", len(x)):
            own = pyro.sample("own", dist.Normal(loc.sum(), 1.0))
            pyro.sample("x", dist.Normal(own, 1.0), obs=x)

    guide = AutoNormal(local)
    guide(DATA[:, 0])
    said = (
        "site 'own' is in the plate 'patient' of the data 'x'.*hide.*axes={'own': \\('patient',\\)}"
    )
    with pytest.warns(UserWarning, match=said):
        assert from_guide(guide).axes["own"] == ("patient",)
    # Without a warning, which would be an error here.
    assert from_guide(guide, axes={"own": (None,)}).labels == ("component",)
    assert "patient" in from_guide(guide, axes={"own": ("patient",)}).labels
    assert set(from_guide(poutine.block(guide, hide=["own"])).axes) == {"loc"}
