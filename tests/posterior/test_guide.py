# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior as a Pyro guide: in ``Predictive``, and as the start of an ``SVI``."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import biject_to, constraints

from pyro_fusion import PosteriorGuide, from_guide
from pyro_fusion.posterior.posterior import Posterior
from tests.families.members import MEMBERS

SIGMAS = 5
DATA = torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0], [8.0, 7.0]])


def model(data=None):
    with pyro.plate("component", 3):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    center = weights @ loc
    with pyro.plate("data", 4):
        pyro.sample("obs", dist.Normal(center, scale.mean()).to_event(1), obs=data)


def posterior(shift=0.0):
    torch.manual_seed(3)
    return Posterior(
        {
            "loc": dist.Normal(shift + torch.randn(3, 2), 0.5).to_event(1),
            "scale": dist.LogNormal(torch.zeros(3), torch.full((3,), 0.3)),
            "weights": dist.Dirichlet(torch.tensor([3.0, 2.0, 1.0])),
        },
        {"loc": "component", "scale": "component", "weights": "component"},
    )


class TestSampling:
    def test_returns_every_site(self):
        guide = PosteriorGuide(posterior())
        values = guide(DATA, anything=1)
        assert {k: tuple(v.shape) for k, v in values.items()} == {
            "loc": (3, 2),
            "scale": (3,),
            "weights": (3,),
        }

    def test_log_density_is_that_of_the_posterior(self):
        p = posterior()
        trace = poutine.trace(PosteriorGuide(p)).get_trace()
        values = {site: trace.nodes[site]["value"] for site in p.factors}
        torch.testing.assert_close(trace.log_prob_sum(), p.log_prob(values))

    def test_plates_are_named(self):
        trace = poutine.trace(PosteriorGuide(posterior())).get_trace()
        for site in ("loc", "scale"):
            (frame,) = trace.nodes[site]["cond_indep_stack"]
            assert (frame.name, frame.dim, frame.size) == ("component", -1, 3)
        assert trace.nodes["weights"]["cond_indep_stack"] == ()

    def test_a_label_may_be_called_as_a_site_is(self):
        d = dist.Dirichlet(torch.ones(3, 4))
        guide = PosteriorGuide(Posterior({"topic": d}, {"topic": ("topic",)}))
        assert guide()["topic"].shape == (3, 4)

    def test_plates_without_a_name_and_at_two_depths(self):
        p = Posterior(
            {
                "x": dist.Normal(torch.zeros(3), 1.0),
                "y": dist.Normal(torch.zeros(3, 2), 1.0),
                "z": dist.Normal(torch.zeros(3, 3), 1.0),
            },
            {"x": "component", "y": "component", "z": ("component", "component")},
        )
        trace = poutine.trace(PosteriorGuide(p)).get_trace()
        stacks = {
            site: {f.name: f.dim for f in trace.nodes[site]["cond_indep_stack"]} for site in "xyz"
        }
        assert stacks["x"] == {"component": -1}
        assert sorted(stacks["y"].values()) == [-2, -1] and "_y_axis1" in stacks["y"]
        assert sorted(stacks["z"].values()) == [-2, -1]
        assert len(stacks["z"]) == 2

    def test_predictive(self):
        guide = PosteriorGuide(posterior())
        result = Predictive(model, guide=guide, num_samples=200)()
        assert result["obs"].shape == (200, 4, 2)
        result = Predictive(model, guide=guide, num_samples=4000, parallel=True)()
        loc = result["loc"].reshape(4000, 3, 2)
        error = (loc.mean(0) - posterior().factors["loc"].mean).abs() / (0.5 / 4000**0.5)
        assert float(error.max()) < SIGMAS

    @pytest.mark.parametrize("member", MEMBERS, ids=str)
    def test_every_member(self, member):
        d = member.make(torch.arange(3), torch.float32)
        p = Posterior({"x": d}, plates={"x": ("p",)})
        guide = PosteriorGuide(p)
        trace = poutine.trace(guide).get_trace()
        site = trace.nodes["x"]
        assert site["value"].shape == d.batch_shape + d.event_shape
        assert all(torch.isfinite(q).all() for q in guide.parameters())
        again = guide.distribution("x")
        assert (again.batch_shape, again.event_shape) == (d.batch_shape, d.event_shape)
        # To the constraint and back costs some digits of float32.
        expected = p.factors["x"].log_prob(site["value"])
        torch.testing.assert_close(again.log_prob(site["value"]), expected, rtol=1e-3, atol=1e-3)
        median = guide.median()["x"]
        assert median.shape == site["value"].shape
        assert bool(torch.isfinite(median).all()) and not median.requires_grad
        assert torch.isfinite(p.log_prob({"x": median}))


class TestMedian:
    def test_images_of_locations(self):
        loc = torch.tensor([0.0, 1.0, -2.0])
        interval = biject_to(constraints.interval(0.0, 4.0))
        p = Posterior(
            {
                "normal": dist.Normal(loc, 2.0),
                "log_normal": dist.LogNormal(loc, 2.0),
                "interval": dist.TransformedDistribution(dist.Normal(loc, 2.0), interval),
                "joint": dist.MultivariateNormal(loc, torch.eye(3)),
                "dirichlet": dist.Dirichlet(torch.tensor([1.0, 3.0])),
                "inverse": dist.InverseGamma(torch.tensor(0.5), torch.tensor(2.0)),
                "count": dist.Poisson(torch.tensor(3.4)),
                "kind": dist.Categorical(logits=loc),
            }
        )
        m = PosteriorGuide(p).median()
        torch.testing.assert_close(m["normal"], loc)
        torch.testing.assert_close(m["log_normal"], loc.exp())
        torch.testing.assert_close(m["interval"], 4 * loc.sigmoid())
        torch.testing.assert_close(m["joint"], loc)
        torch.testing.assert_close(m["dirichlet"], torch.tensor([0.25, 0.75]))
        torch.testing.assert_close(m["inverse"], torch.tensor(4.0))
        assert float(m["count"]) == 3.0 and int(m["kind"]) == 1

    def test_agrees_with_autonormal(self):
        guide = AutoNormal(model)
        guide(DATA)
        median = guide.median()
        raw = {}
        for name, site in guide.prototype_trace.iter_stochastic_nodes():
            loc, scale = guide._get_loc_and_scale(name)
            n = len(site["fn"].event_shape)
            base = dist.Normal(loc, scale).to_event(max(n, 0))
            raw[name] = dist.TransformedDistribution(base, biject_to(site["fn"].support))
        mine = PosteriorGuide(Posterior({k: v for k, v in raw.items() if k != "obs"})).median()
        for name in mine:
            torch.testing.assert_close(mine[name], median[name])


class TestTraining:
    @pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
    def test_warm_start(self, elbo):
        """Under validation, without a warning, and the bound rises from where it was."""
        guide = PosteriorGuide(posterior(2.0))
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo(num_particles=5))
        before = sum(svi.evaluate_loss(DATA) for _ in range(10)) / 10
        for _ in range(40):
            svi.step(DATA)
        assert sum(svi.evaluate_loss(DATA) for _ in range(10)) / 10 < before - 3

    def test_vectorized_particles(self):
        guide = PosteriorGuide(posterior())
        elbo = Trace_ELBO(num_particles=10, vectorize_particles=True)

        def batched(data):
            with pyro.plate("component", 3, dim=-1):
                pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
                pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            pyro.sample("weights", dist.Dirichlet(torch.ones(3)))

        SVI(batched, guide, pyro.optim.Adam({"lr": 0.03}), elbo).step(DATA)

    def test_training_leaves_the_posterior_alone(self):
        p = posterior()
        before = p.factors["loc"].base_dist.loc.clone()
        SVI(model, PosteriorGuide(p), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(DATA)
        assert torch.equal(p.factors["loc"].base_dist.loc, before)

    def test_trained_it_is_a_posterior_again(self):
        guide = PosteriorGuide(posterior())
        SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(DATA)
        again = Posterior({site: guide.distribution(site) for site in ("loc", "scale", "weights")})
        assert not torch.equal(again.factors["loc"].mean, posterior().factors["loc"].mean)
        assert type(again.factors["scale"]) is dist.LogNormal

    def test_two_guides_share_nothing(self):
        first, second = PosteriorGuide(posterior()), PosteriorGuide(posterior(5.0))
        first(), second()
        names = list(pyro.get_param_store())
        assert len(names) == len(set(names)) == 2 * len(list(first.parameters()))
        before = second.median()
        svi = SVI(model, first, pyro.optim.Adam({"lr": 0.5}), Trace_ELBO())
        for _ in range(3):
            svi.step(DATA)
        for site, value in second.median().items():
            assert torch.equal(value, before[site])
        assert not torch.equal(first.median()["loc"], PosteriorGuide(posterior()).median()["loc"])

    def test_a_cleared_store_does_not_lose_the_start(self):
        guide = PosteriorGuide(posterior())
        before = guide.median()["loc"]
        pyro.clear_param_store()
        torch.testing.assert_close(guide.median()["loc"], before)

    def test_local_parameters_and_copies(self):
        with pyro.settings.context(module_local_params=True):
            guide = PosteriorGuide(posterior())
            twin = copy.deepcopy(guide)
            with torch.no_grad():
                for value in twin.parameters():
                    value.add_(1)
            assert not torch.equal(guide.median()["loc"], twin.median()["loc"])

    @pytest.mark.parametrize(
        "d, name",
        [
            (dist.Wishart(torch.tensor(2.5), torch.eye(2)), "df"),
            (dist.Gamma(torch.tensor(0.1), torch.tensor(0.1)), "rate"),
        ],
        ids=["Wishart", "Gamma"],
    )
    def test_parameters_stay_where_they_belong(self, d, name):
        guide = PosteriorGuide(Posterior({"x": d}))
        with torch.no_grad():
            for value in guide.parameters():
                value.sub_(5)
        Posterior({"x": guide.distribution("x")})


@pytest.mark.parametrize(
    "site", ["linear.weight", "training", "distribution", "parameters", "_factors", "x y"]
)
def test_names_that_collide_with_attributes(site):
    p = Posterior(
        {
            site: dist.Normal(torch.zeros(2), 1.0),
            "linear": dist.Normal(1.0, 1.0),
            "linear_weight": dist.Normal(2.0, 1.0),
        }
    )
    guide = PosteriorGuide(p)
    median = guide.median()
    assert median[site].tolist() == [0.0, 0.0]
    assert float(median["linear"]) == 1.0 and float(median["linear_weight"]) == 2.0
    assert set(guide()) == {site, "linear", "linear_weight"}
    assert len(list(guide.parameters())) == 6


@pytest.mark.cuda
def test_on_cuda():
    guide = PosteriorGuide(posterior().to("cuda"))
    assert {v.device.type for v in guide().values()} == {"cuda"}


class TestReadAgain:
    def test_labels_are_those_of_the_posterior(self):
        p = Posterior(
            {
                "w": dist.Dirichlet(torch.ones(3)),
                "W": dist.Normal(torch.zeros(3, 2), 1.0).to_event(1),
                "out": dist.Normal(torch.zeros(4, 3), 1.0).to_event(2),
            },
            {"w": ("unit",), "W": ("unit", None), "out": (None, "unit")},
            outgoing={"out": "unit"},
        )
        again = from_guide(PosteriorGuide(p))
        assert again.axes == p.axes
        assert again.outgoing == p.outgoing
        assert again.plates == p.plates
        blocked = from_guide(poutine.block(PosteriorGuide(p), hide=["out"]))
        assert blocked.axes == {k: v for k, v in p.axes.items() if k != "out"}
        assert blocked.outgoing == {}
        given = from_guide(PosteriorGuide(p), axes={"w": (None,)})
        assert given.axes == {**p.axes, "w": (None,)}

    def test_after_training(self):
        p = posterior()
        guide = PosteriorGuide(p)
        SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(DATA)
        again = from_guide(guide)
        assert again.axes == p.axes
        assert not torch.equal(again.factors["loc"].mean, p.factors["loc"].mean)
