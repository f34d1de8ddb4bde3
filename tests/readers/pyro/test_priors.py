# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Priors of Pyro models, and their projection onto the family of a posterior."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import autoguide
from pyro.infer.autoguide.effect import AutoNormalMessenger
from pyro.infer.autoguide.gaussian import AutoGaussian
from torch import Tensor

from pyro_fusion.errors import GuideError, ParameterError, StructureError
from pyro_fusion.families import Factor
from pyro_fusion.families.projection import project_onto
from pyro_fusion.fusion.fuse import fuse
from pyro_fusion.readers.pyro import from_guide, prior_from_guide, prior_from_model

DATA = torch.tensor([1.0, 2.0, -1.0])


def model(data: Tensor = DATA) -> None:
    with pyro.plate("component", 2):
        loc = pyro.sample("loc", dist.Normal(1.0, 3.0))
        pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        pyro.sample("obs", dist.Normal(loc[z], 1.0), obs=data)


def hierarchical(data: Tensor = DATA) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("component", 2):
        loc = pyro.sample("loc", dist.Normal(mu, 2.0))
    pyro.sample("obs", dist.Normal(loc.sum(), 1.0).expand([3]).to_event(1), obs=data)


def test_prior_from_model() -> None:
    prior = prior_from_model(model)
    assert set(prior.factors) == {"loc", "rate"}  # neither observed nor enumerated
    assert prior.axes["loc"] == ("component",)
    assert torch.equal(prior.factors["loc"].loc, torch.ones(2))
    assert isinstance(prior.factors["rate"], dist.Gamma)
    assert set(prior_from_model(model, sites=["loc"]).factors) == {"loc"}
    with pytest.raises(GuideError, match=r"no latent sites \['nowhere'\].*\['loc', 'rate'\]"):
        prior_from_model(model, sites=["nowhere"])
    with pytest.raises(GuideError, match="the model failed when it was run"):
        prior_from_model(lambda data: None)
    with pytest.raises(GuideError, match="no latent site to read"):
        prior_from_model(lambda: None)


def test_structured_prior_is_projected() -> None:
    n = 1000
    with pytest.warns(UserWarning, match=r"this model .*\['loc'\], which depend on other sites"):
        prior = prior_from_model(hierarchical, num_samples=n)
    loc = prior.factors["loc"]
    assert torch.allclose(loc.scale, torch.tensor(5.0).sqrt(), rtol=4 / math.sqrt(2 * n))
    assert (loc.loc.abs() < 4 / math.sqrt(n)).all()
    assert prior.factors["mu"].scale.item() == 1.0


@pytest.mark.parametrize(
    "kind",
    [
        autoguide.AutoNormal,
        autoguide.AutoDelta,
        autoguide.AutoMultivariateNormal,
        AutoGaussian,
        autoguide.AutoStructured,
        AutoNormalMessenger,
    ],
)
def test_prior_from_guide(kind: Any) -> None:
    guide = kind(poutine.block(model, hide=["z"]))
    guide(DATA)
    prior = prior_from_guide(guide, DATA)
    assert set(prior.factors) == {"loc", "rate"}
    assert torch.equal(prior.factors["loc"].loc, torch.ones(2))
    assert prior.factors["loc"].scale[0].item() == 3.0
    assert prior.axes == {"loc": ("component",), "rate": ("component",)}
    assert set(prior_from_guide(poutine.block(guide, hide=["loc"]), DATA).factors) == {"rate"}


def test_prior_from_guide_list_leaves_out_enumerated_sites() -> None:
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(poutine.block(model, hide=["z"])))
    guide.append(autoguide.AutoDiscreteParallel(poutine.block(model, expose=["z"])))
    guide(DATA)
    assert set(prior_from_guide(guide, DATA).factors) == {"loc", "rate"}


def test_prior_from_guide_draws_from_the_prior_not_from_initial_values() -> None:
    guide = autoguide.AutoNormal(hierarchical, init_loc_fn=autoguide.init_to_median)
    guide()
    with pytest.warns(UserWarning, match="depend on other sites"):
        prior = prior_from_guide(guide, num_samples=500)
    assert torch.allclose(prior.factors["loc"].scale, torch.tensor(5.0).sqrt(), rtol=0.13)


def test_prior_from_a_guide_that_lost_its_model() -> None:
    guide = autoguide.AutoNormal(poutine.block(model, hide=["z"]))
    guide(DATA)
    guide.__getstate__()
    assert guide._model is None
    with pytest.warns(UserWarning, match=r"lost its model.*as the guide recorded it"):
        prior = prior_from_guide(guide)
    assert torch.equal(prior.factors["loc"].loc, torch.ones(2))
    assert prior.axes["loc"] == ("component",)

    gaussian = AutoGaussian(poutine.block(model, hide=["z"]))
    gaussian(DATA)
    gaussian._model = None
    with pytest.raises(GuideError, match=r"prior_from_model\(model, \*args\)"):
        prior_from_guide(gaussian)


def test_prior_from_guide_without_the_arguments_of_the_model() -> None:
    def m(data: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(1.0, 2.0))
        pyro.sample("obs", dist.Normal(x, 1.0).expand([3]).to_event(1), obs=data)

    guide = autoguide.AutoNormal(m)
    guide(DATA)
    with pytest.warns(UserWarning, match="its model failed.*missing 1 required"):
        prior = prior_from_guide(guide)
    assert prior.factors["x"].scale.item() == 2.0


def test_prior_errors() -> None:
    with pytest.raises(GuideError, match="a function does not know its model"):
        prior_from_guide(lambda: None)
    with pytest.raises(GuideError, match="never called"):
        prior_from_guide(autoguide.AutoNormal(model))


def test_prior_along_a_subsampled_plate_is_expanded() -> None:
    def m(vary: bool) -> None:
        with pyro.plate("data", 6, subsample_size=2) as i:
            pyro.sample("x", dist.Normal(i.float() if vary else 0.0, 2.0))

    prior = prior_from_model(m, False)
    assert prior.factors["x"].batch_shape == (6,)
    assert prior.axes["x"] == ("data",)
    with pytest.raises(GuideError, match="plate 'data' is subsampled"):
        prior_from_model(m, True)


def test_prior_of_another_family_is_projected() -> None:
    def m() -> None:
        pyro.sample("u", dist.Uniform(2.0, 4.0))

    n = 1000
    with pytest.warns(UserWarning, match=r"\['u'\] onto a Normal"):
        prior = prior_from_model(m, num_samples=n)
    base = prior.factors["u"].base_dist
    # The logit of a uniform is standard logistic: mean 0, variance pi^2 / 3.
    sd = math.pi / math.sqrt(3)
    assert abs(base.loc.item()) < 4 * sd / math.sqrt(n)
    assert base.scale.item() == pytest.approx(sd, rel=4 * math.sqrt(3.2 / (4 * n)))


def test_hidden_global_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    prior_from_model(model)
    assert torch.equal(state, torch.get_rng_state())
    assert len(pyro.get_param_store()) == 0


# -- project_onto ----------------------------------------------------------------------------------


def test_project_onto_the_same_structure_changes_nothing() -> None:
    like = Factor.of(dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    result = project_onto(dist.LogNormal(torch.tensor([1.0, 2.0]), 3.0).to_event(1), like)
    assert torch.equal(result.params["loc"], torch.tensor([1.0, 2.0]))
    assert torch.equal(result.params["scale"], torch.tensor([3.0, 3.0]))
    # The batch axes are those of the posterior.
    assert project_onto(dist.LogNormal(torch.zeros(2), 3.0), like).batch_dim == 0


@pytest.mark.filterwarnings("ignore:Auto.*correlated:UserWarning")
def test_a_normal_prior_is_exact_for_a_multivariate_posterior() -> None:
    def m() -> None:
        with pyro.plate("component", 2):
            pyro.sample("v", dist.LogNormal(0.5, 2.0).expand([3]).to_event(1))
            pyro.sample("m", dist.LogNormal(0.5, 2.0).expand([3, 2]).to_event(2))

    guide = autoguide.AutoMultivariateNormal(m)
    guide()
    posterior, prior = from_guide(guide), prior_from_guide(guide)
    for site in ("v", "m"):
        like = posterior.decomposed[site]
        assert like.family.name == "MultivariateNormal"
        result = project_onto(prior.factors[site], like)
        assert result.structure() == like.structure()
        value = prior.factors[site].sample()
        expected = prior.factors[site].log_prob(value)
        assert torch.allclose(result.distribution().log_prob(value), expected, rtol=1e-4)


def test_project_onto_another_family_matches_moments() -> None:
    like = Factor.of(dist.LogNormal(torch.zeros(2), 1.0))
    n = 10_000
    with pytest.warns(UserWarning, match=r"family Gamma.*Normal → Exp.*10000 draws"):
        result = project_onto(dist.Gamma(torch.tensor([2.0, 5.0]), 3.0), like)
    a = torch.tensor([2.0, 5.0])
    mean, sd = torch.digamma(a) - math.log(3), torch.polygamma(1, a).sqrt()
    assert ((result.params["loc"] - mean).abs() < 4 * sd / math.sqrt(n)).all()
    assert ((result.params["scale"] / sd - 1).abs() < 6 / math.sqrt(2 * n)).all()
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="HalfCauchy"):
        project_onto(dist.HalfCauchy(torch.ones(2)), like)
    assert torch.equal(state, torch.get_rng_state())


def test_project_onto_errors() -> None:
    like = Factor.of(dist.LogNormal(torch.zeros(2), 1.0))
    with pytest.raises(StructureError, match=r"shape \(3,\), the posterior \(2,\)"):
        project_onto(dist.Gamma(torch.ones(3), 3.0), like)
    with pytest.raises(ParameterError):
        project_onto(dist.Normal(torch.zeros(2), 1.0), like)


# -- equal priors of equal components --------------------------------------------------------------

OTHER_FAMILIES = [dist.HalfNormal(1.5), dist.HalfCauchy(2.0), dist.Uniform(1.0, 4.0)]


@pytest.mark.filterwarnings("ignore:this model is no product:UserWarning")
@pytest.mark.parametrize("source", ["guide", "model", "recorded"])
@pytest.mark.parametrize("prior", OTHER_FAMILIES, ids=lambda d: type(d).__name__)
def test_product_with_a_prior_of_another_family_in_a_labelled_plate(
    prior: Any, source: str
) -> None:
    def m() -> None:
        with pyro.plate("component", 5):
            pyro.sample("l", dist.Normal(0.0, 5.0))
            pyro.sample("s", prior)

    guides: list[Any] = []
    for party in range(2):
        with pyro.get_param_store().scope():
            guide = autoguide.AutoNormal(m, init_loc_fn=autoguide.init_to_sample)
            pyro.set_rng_seed(party)
            guide()
            guides.append(from_guide(guide) if source == "model" else guide)
            if source == "recorded":
                guide.__getstate__()
    if source == "recorded":
        with pytest.warns(UserWarning, match="as the guide recorded it"):
            result = fuse(guides, "product")
    else:
        result = fuse(guides, "product", prior=m if source == "model" else None)
    assert result.posterior.factors["s"].batch_shape[0] >= 5


@pytest.mark.filterwarnings("ignore:this model is no product:UserWarning")
def test_draws_are_pooled_only_along_axes_where_the_prior_is_constant() -> None:
    def m() -> None:
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1):
            pyro.sample("h", dist.HalfNormal(torch.tensor([1.0, 5.0, 9.0]).unsqueeze(-1)))
            pyro.sample("u", dist.Uniform(0.0, torch.tensor(2.0)))
        pyro.sample("e", dist.HalfCauchy(torch.ones(3)).to_event(1))

    n = 1000
    prior = prior_from_model(m, num_samples=n)
    h = prior.factors["h"]
    assert torch.equal(h.loc, h.loc[:, :1].expand(3, 4))
    mean = (torch.digamma(torch.tensor(0.5)) + math.log(2)) / 2
    sd = (torch.polygamma(1, torch.tensor(0.5)) / 4).sqrt()
    error = 4 * sd / math.sqrt(4 * n)  # four columns are pooled
    assert ((h.loc[:, 0] - torch.tensor([1.0, 5.0, 9.0]).log() - mean).abs() < error).all()
    base = prior.decomposed["u"].params["loc"]
    assert base.shape == (3, 4)
    assert base.unique().numel() == 1
    assert prior.decomposed["e"].params["scale"].unique().numel() == 1
    assert prior.axes["h"] == ("rows", "columns")


@pytest.mark.filterwarnings("ignore:this model is no product:UserWarning")
@pytest.mark.parametrize("size", [3, 5, 17])
def test_dependent_priors_of_equal_components_are_equal(size: int) -> None:
    def m() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("component", size):
            pyro.sample("x", dist.Normal(scale, scale))
            pyro.sample("h", dist.HalfNormal(scale))

    prior = prior_from_model(m, sites=["x", "h"])
    for f in prior.decomposed.values():
        assert all(v.unique().numel() == 1 for v in f.params.values())


@pytest.mark.filterwarnings("ignore:this model is no product:UserWarning")
def test_projected_prior_along_a_subsampled_plate_is_expanded() -> None:
    def m(vary: bool) -> None:
        with pyro.plate("data", 6, subsample_size=2) as i:
            pyro.sample("x", dist.HalfCauchy(1.0 + i.float() if vary else torch.ones(2)))

    assert prior_from_model(m, False).factors["x"].batch_shape == (6,)
    with pytest.raises(GuideError, match="plate 'data' is subsampled"):
        prior_from_model(m, True)
