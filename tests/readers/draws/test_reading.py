# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of posteriors that are known: what is read is the truth, to the error of Monte Carlo."""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.distributions import constraints
from torch.distributions import transforms as tt

from pyro_fusion import (
    DrawsError,
    Posterior,
    from_draws,
    from_guide,
    fuse,
)
from pyro_fusion.errors import GuideError, ParameterError, StructureError, UnsupportedFamilyError
from pyro_fusion.families import kl
from pyro_fusion.readers.draws import read_draws

N = 4000
DTYPES = [torch.float32, torch.float64]


def model(data: Tensor | None = None, num_components: int = 3) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(num_components)))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("component", num_components):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.deterministic("mean", weights @ loc)
    with pyro.plate("data", 5 if data is None else len(data)):
        mean = (weights @ loc).sum() + rate
        pyro.sample("x", dist.Normal(mean, scale.mean()), obs=data)


def model_draws(n: int = N, chains: tuple[int, ...] = ()) -> dict[str, Tensor]:
    shape = torch.Size((*chains, n))
    centres = torch.tensor([[-9.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
    return {
        "weights": dist.Dirichlet(torch.tensor([20.0, 30.0, 50.0])).sample(shape),
        "rate": dist.Gamma(30.0, 10.0).sample(shape),
        "loc": dist.Normal(centres, 0.5).sample(shape),
        "scale": dist.LogNormal(torch.zeros(3), 0.2).sample(shape),
    }


DATA = torch.zeros(5)


class TestKnownPosteriors:
    """Exact draws, so that standard errors are those of independent ones; four of them."""

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_normal_normal(self, dtype):
        # Prior N(0, 2²), five data of variance 1 and mean 1.5: precision 1/4 + 5.
        scale = (0.25 + 5) ** -0.5
        loc = 5 * 1.5 * scale**2
        draws = {"mu": loc + scale * torch.randn(N, dtype=dtype)}
        factor = from_draws(draws).factors["mu"]
        assert factor.loc.dtype == dtype
        assert abs(float(factor.loc) - loc) < 4 * scale / math.sqrt(N)
        assert abs(float(factor.scale) / scale - 1) < 4 / math.sqrt(2 * N)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gamma_poisson(self, dtype):
        # Prior Gamma(2, 1), five counts that add up to 12.
        truth = dist.Gamma(torch.tensor(14.0, dtype=dtype), 6.0)
        draws = {"rate": truth.sample([N])}
        posterior = from_draws(draws, families={"rate": dist.Gamma})
        assert posterior.dtype == dtype
        # Of two parameters at maximum likelihood 2 N KL is a chi-square: 99.99 % quantile 18.
        assert kl(posterior.factors["rate"], truth) < 18 / (2 * N)
        # Behind exp, as an AutoNormal has it: E[log x] and its standard deviation.
        factor = from_draws(draws, supports={"rate": constraints.positive})
        normal = factor.decomposed["rate"].params
        mean = torch.digamma(torch.tensor(14.0)) - math.log(6)
        sd = float(torch.polygamma(1, torch.tensor(14.0))) ** 0.5
        assert abs(float(normal["loc"] - mean)) < 4 * sd / math.sqrt(N)
        assert abs(float(normal["scale"]) / sd - 1) < 5 / math.sqrt(2 * N)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("labelled", [True, False])
    def test_dirichlet_categorical(self, dtype, labelled):
        truth = dist.Dirichlet(torch.tensor([3.0, 1.0, 6.0, 2.0], dtype=dtype))
        draws = {"w": truth.sample([N])}
        chosen: dict[str, Any] = {"families": {"w": dist.Dirichlet}}
        if labelled:  # then it is one unasked
            chosen = {"supports": {"w": constraints.simplex}, "axes": {"w": "component"}}
        posterior = from_draws(draws, **chosen)
        assert kl(posterior.factors["w"], truth) < 24 / (2 * N)  # four parameters
        assert posterior.labels == (("component",) if labelled else ())

    def test_beta_and_inverse_gamma(self):
        truth = {"p": dist.Beta(3.0, 7.0), "v": dist.InverseGamma(5.0, 2.0)}
        draws = {k: d.sample([N]) for k, d in truth.items()}
        families = {"p": "Beta", "v": dist.InverseGamma}
        posterior = from_draws(draws, families=families)
        assert isinstance(posterior.factors["v"], dist.InverseGamma)
        for site, d in truth.items():
            assert kl(posterior.factors[site], d) < 18 / (2 * N)

    def test_multivariate_normal(self):
        tril = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [-0.5, 0.3, 0.2]])
        truth = dist.MultivariateNormal(torch.tensor([1.0, -2.0, 50.0]), scale_tril=tril)
        draws = {"x": truth.sample([N])}
        posterior = from_draws(draws, families=dist.MultivariateNormal)
        assert kl(posterior.factors["x"], truth) < 30 / (2 * N)  # nine parameters
        # On the positive side it is the same, behind exp.
        positive = from_draws(
            {"x": draws["x"].double().exp()},
            families="MultivariateNormal",
            supports={"x": constraints.independent(constraints.positive, 1)},
        )
        (t,) = positive.decomposed["x"].transforms
        assert isinstance(t, tt.ExpTransform)
        torch.testing.assert_close(
            positive.decomposed["x"].params["scale_tril"].float(),
            posterior.decomposed["x"].params["scale_tril"],
            rtol=1e-4,
            atol=1e-4,
        )

    def test_far_from_the_origin(self):
        draws = {"x": 1e8 + torch.randn(N, dtype=torch.float64)}
        factor = from_draws(draws).factors["x"]
        assert abs(float(factor.scale) - 1) < 4 / math.sqrt(2 * N)


class TestStructure:
    """What is read of draws fuses with what is read of guides for the same model."""

    def guide(self, kind: type[Any]) -> Posterior:
        guide = kind(model)
        guide(DATA)
        return from_guide(guide, axes={"weights": "component"})

    @pytest.mark.parametrize(
        ("kind", "families"), [(AutoNormal, None), (AutoMultivariateNormal, "MultivariateNormal")]
    )
    def test_as_of_a_guide(self, kind, families):
        theirs = self.guide(kind)
        draws = model_draws()
        mine = from_draws(draws, model, DATA, families=families, axes={"weights": ("component",)})
        assert mine.axes == theirs.axes
        assert mine.plates == theirs.plates
        for site, f in theirs.decomposed.items():
            g = mine.decomposed[site]
            assert (g.structure(), g.batch_dim, g.shape) == (f.structure(), f.batch_dim, f.shape)
        assert list(mine.factors) == list(theirs.factors)  # the model's order
        assert fuse([mine, mine.permute("component", [2, 0, 1])], assignment_prior=None) is not None

    def test_fuses_with_a_guide(self):
        draws = model_draws()
        mine = from_draws(draws, model, DATA, axes={"weights": "component"})
        loc = mine.decomposed["loc"].params["loc"]
        guide = AutoNormal(
            model, init_loc_fn=pyro.infer.autoguide.init_to_value(values={"loc": loc.flip(0)})
        )
        guide(DATA)
        theirs = from_guide(guide, axes={"weights": "component"})
        fusion = fuse([mine, theirs])
        assert [a.tolist() for a in fusion.assignment] == [[0, 1, 2], [2, 1, 0]]

    def test_model_as_by_hand(self):
        """Without a model, supports and axes say the same."""
        draws = model_draws()
        with_model = from_draws(draws, model, DATA, axes={"weights": "component"})
        by_hand = from_draws(
            draws,
            axes={"weights": "component", "loc": ("component", None), "scale": "component"},
            supports={
                "weights": constraints.simplex,
                "rate": constraints.positive,
                "scale": constraints.positive,
            },
        )
        assert by_hand.axes == with_model.axes
        assert by_hand.plates == with_model.plates
        for site, f in with_model.decomposed.items():
            g = by_hand.decomposed[site]
            assert (g.structure(), g.batch_dim) == (f.structure(), f.batch_dim)
            for name, value in f.params.items():
                assert torch.equal(value, g.params[name])

    def test_observed_and_deterministic_sites_are_left_out(self):
        draws = {**model_draws(), "x": torch.randn(N, 5), "mean": torch.randn(N, 2)}
        posterior = from_draws(draws, model, DATA)
        assert set(posterior.factors) == {"weights", "rate", "loc", "scale"}
        named = from_draws(draws, model, DATA, sites=["mean", "loc"])
        assert list(named.factors) == ["mean", "loc"]
        assert named.factors["mean"].batch_shape == ()

    def test_an_entry_of_axes_replaces_the_plate(self):
        posterior = from_draws(model_draws(), model, DATA, axes={"loc": (None, None)})
        assert posterior.axes["loc"] == (None, None)
        assert posterior.plates["loc"] == ("component",)

    def test_outgoing(self):
        draws = {"w": torch.randn(N, 4, 2) + 5 * torch.arange(4).unsqueeze(1)}
        posterior = from_draws(draws, axes={"w": ("unit", None)}, outgoing={"w": "unit"})
        assert posterior.outgoing == {"w": "unit"}

    def test_transition_matrix(self):
        rows = torch.tensor([[50.0, 2.0, 3.0], [4.0, 40.0, 6.0], [9.0, 8.0, 70.0]])
        draws = {"t": dist.Dirichlet(rows).sample([N])}
        posterior = from_draws(
            draws, axes={"t": ("state", "state")}, supports={"t": constraints.simplex}
        )
        f = posterior.decomposed["t"]
        assert (f.family.name, f.batch_dim) == ("Dirichlet", 1)
        assert kl(f, dist.Dirichlet(rows)).max() < 24 / (2 * N)

    def test_cholesky_factor(self):
        draws = {"L": dist.LKJCholesky(3, 5.0).sample([N]).double()}
        reading = read_draws(draws, supports={"L": constraints.corr_cholesky})
        f = reading.posterior.decomposed["L"]
        assert [type(t) for t in f.transforms] == [tt.CorrCholeskyTransform]
        assert reading.ess["L"] > 0.8 * N  # what is constant by its support does not count


class TestSupports:
    def test_bounds_that_are_tensors(self):
        """Of one interval for all components, as a model with as many bounds has it."""

        def uniform() -> None:
            with pyro.plate("component", 3):
                pyro.sample("x", dist.Uniform(torch.zeros(3), 2 * torch.ones(3)))

        draws = {"x": 2 * torch.rand(1000, 3)}
        mine = from_draws(draws, uniform).decomposed["x"]
        guide = AutoNormal(uniform)
        guide()
        assert mine.structure() == from_guide(guide).decomposed["x"].structure()

    def test_a_family_knows_its_own(self):
        """Though nobody knows a bijection onto it, or it depends on other sites."""
        root = torch.randn(1000, 2, 9)
        posterior = from_draws(
            {"x": root @ root.mT}, families="Wishart", supports={"x": constraints.positive_definite}
        )
        assert posterior.decomposed["x"].family.name == "Wishart"

        def nested() -> None:
            a = pyro.sample("a", dist.Uniform(0.5, 1.0))
            pyro.sample("b", dist.Uniform(0.0, a))

        draws = {"b": (0.5 + 0.5 * torch.rand(1000)) * torch.rand(1000)}
        f = from_draws(draws, nested, families=dist.Beta).decomposed["b"]
        assert f.family.name == "Beta"


class TestLeavesAlone:
    def test_random_states_store_and_draws(self):
        pyro.param("a", torch.ones(2))
        draws = model_draws(500)
        before = {k: v.clone() for k, v in draws.items()}
        states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        from_draws(draws, model, DATA, axes={"weights": "component"})
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
        assert list(pyro.get_param_store()) == ["a"]
        assert all(torch.equal(draws[k], v) for k, v in before.items())

    def test_what_is_read_is_copied(self):
        draws = {"x": torch.randn(100)}
        posterior = from_draws(draws, min_ess=None)
        loc = posterior.factors["x"].loc
        draws["x"].zero_()
        assert posterior.factors["x"].loc == loc


@pytest.mark.cuda
def test_lands_where_the_draws_are() -> None:
    centres = 10 * torch.arange(3.0).unsqueeze(1)
    loc = centres + torch.randn(1000, 3, 2)
    weights = dist.Dirichlet(torch.tensor([5.0, 6.0, 7.0])).sample([1000])
    loc[:200], weights[:200] = loc[:200].roll(1, 1), weights[:200].roll(1, 1)
    draws = {"loc": loc, "rate": dist.Gamma(9.0, 3.0).sample([1000]), "weights": weights}
    options: dict[str, Any] = {
        "axes": {"loc": ("c", None), "weights": "c"},
        "families": {"rate": "Gamma", "weights": "Dirichlet", "loc": "MultivariateNormal"},
    }
    here = read_draws(draws, **options)
    there = read_draws({k: v.cuda() for k, v in draws.items()}, **options)
    assert there.relabelled == here.relabelled == {"c": 0.2}
    for site, f in here.posterior.decomposed.items():
        g = there.posterior.decomposed[site]
        assert g.device.type == "cuda"
        assert there.lost[site] == pytest.approx(here.lost[site], abs=1e-6)
        for name, value in f.params.items():
            torch.testing.assert_close(g.params[name].cpu(), value, rtol=1e-5, atol=1e-5)


def normal(n: int = 1000, *shape: int) -> Tensor:
    return torch.randn(n, *shape)


class TestBadDraws:
    @pytest.mark.parametrize(
        ("draws", "options", "message"),
        [
            ({}, {}, "no draws: the mapping is empty"),
            ({1: normal()}, {}, "expected names of sites, got 1"),
            (torch.randn(100), {}, "expected a mapping from site .* got Tensor"),
            ([normal()], {}, "got list"),
            ({"x": normal(10)}, {}, "at least 50 draws in each chain.*got 1 chains of 10"),
            ({"x": normal(3)}, {"min_ess": None}, "at least 4 draws in each chain; got 1 chains"),
            ({"x": normal(1000), "y": normal(999)}, {}, "'y' has 1 chains of 999 draws.* of 1000"),
            ({"x": torch.tensor(1.0)}, {}, r"expected draws of shape \[draw, \*shape\], got \(\)"),
            ({"x": normal()}, {"group_by_chain": True}, r"expected draws of shape \[chain"),
            ({"x": torch.zeros(100, 0)}, {}, r"got \(100, 0\)"),
            (
                {"x": torch.randint(5, (100,))},
                {},
                "'x': expected floating-point draws, got torch.i",
            ),
            ({"x": np.arange(100)}, {}, "expected floating-point draws, got int64. A discrete"),
            ({"x": torch.rand(100) > 0.5}, {}, "got torch.bool"),
            ({"x": ["a", "b"]}, {}, "'x': expected draws as an array of numbers, got list"),
            ({"x": torch.ones(100)}, {}, "'x': 1 of its 1 numbers are the same in all 100 draws"),
            ({"x": normal()}, {"sites": ["y"]}, r"sites names \['y'\], but there are draws of"),
            ({"x": normal()}, {"sites": "x"}, "sites must be a sequence of names"),
            ({"x": normal()}, {"families": {"y": "Normal"}}, r"families names \['y'\], but"),
            ({"x": normal()}, {"axes": {"y": "a"}}, r"axes names \['y'\], but"),
            ({"x": normal()}, {"supports": {"y": constraints.real}}, r"supports names \['y'\]"),
            ({"x": normal()}, {"families": {"x": 3}}, "'x': expected a family as the class"),
            ({"x": normal()}, {"families": dist.Gamma}, "inside the support of a Gamma; got -"),
            ({"x": 2 * torch.rand(1000) + 0.1}, {"families": "Beta"}, "inside the support of a Be"),
            (
                {"x": normal()},
                {"families": "Poisson"},
                "'x': .* fit no Poisson|support of a Poisson",
            ),
            ({"x": normal()}, {"families": "Dirichlet"}, "on the simplex|a Dirichlet has 1 event"),
            ({"x": normal()}, {"supports": {"x": constraints.positive}}, "between 0 and inf"),
            (
                {"x": torch.rand(1000) * 2},
                {"supports": {"x": constraints.interval(0, 1.5)}},
                "expected draws",
            ),
            ({"x": normal(1000, 3)}, {"supports": {"x": constraints.simplex}}, "on the simplex"),
            (
                {"x": torch.rand(1000, 3)},
                {"supports": {"x": dist.constraints.ordered_vector}},
                "expected draws",
            ),
            (
                {"x": dist.Dirichlet(torch.ones(3)).sample([1000])},
                {},
                r"all draws are on the simplex.*supports=\{'x': constraints.simplex\}",
            ),
            (
                {"x": torch.rand(1000)},
                {"supports": {"x": constraints.interval(0, 0.5)}},
                "between 0 and 1, and not at the ends",
            ),
            (
                {"x": torch.rand(1000, 3)},
                {"supports": {"x": constraints.interval(torch.zeros(3), torch.arange(1.0, 4.0))}},
                "'x': .* fit no Normal: AffineTransform with arguments that differ",
            ),
            (
                {"x": torch.eye(2).expand(1000, 2, 2) * torch.rand(1000, 1, 1)},
                {"supports": {"x": constraints.positive_definite}},
                r"'x': no bijection onto its support is known: .*families=\{'x': ...\}",
            ),
            ({"x": torch.eye(3).repeat(20, 1)}, {"families": "Dirichlet"}, "that of a Dirichlet"),
            ({"x": normal(1000, 2).cumsum(0)}, {}, "R-hat of site 'x' is .* and 1.1 is allowed"),
        ],
    )
    def test_is_refused(self, draws, options, message):
        with pytest.raises(DrawsError, match=message):
            from_draws(draws, **options)

    def test_nan(self):
        x = torch.randn(2, 100, 3)
        x[1, 40, 2], x[1, 50, 0] = math.nan, math.inf
        with pytest.raises(DrawsError, match=r"2 draws of 200 with NaN .* draw 40 of chain 1"):
            from_draws({"x": x}, group_by_chain=True)

    def test_place_of_a_value_outside_the_support(self):
        x = torch.rand(2, 100, 3)
        x[1, 7, 1] = -0.25
        positive = {"x": constraints.positive}
        with pytest.raises(DrawsError, match=r"got -0.25 in draw 7 of chain 1, one of 1 such"):
            from_draws({"x": x}, group_by_chain=True, supports=positive)
        x[1, 7, 1] = 0.0  # on the border, as by rounding
        with pytest.raises(DrawsError, match="got 0 in draw 7 of chain 1"):
            from_draws({"x": x}, group_by_chain=True, supports=positive)

    def test_a_component_on_the_border_of_the_simplex(self):
        x = dist.Dirichlet(torch.ones(3)).sample([100])
        x[5] = torch.tensor([0.5, 0.5, 0.0])
        for axes in (None, {"x": "component"}):
            with pytest.raises(DrawsError, match="draw 5 of chain 0"):
                from_draws({"x": x}, supports={"x": constraints.simplex}, axes=axes)

    def test_rounded_simplex(self):
        """float32 does not add up to one exactly."""
        x = dist.Dirichlet(torch.ones(300)).sample([1000]).clamp(min=1e-6)
        assert float((x.sum(-1) - 1).abs().max()) > 1e-6
        posterior = from_draws({"x": x}, families={"x": "Dirichlet"}, min_ess=None)
        assert posterior.factors["x"].concentration.mean() == pytest.approx(1, abs=0.05)

    def test_chains_that_do_not_agree(self):
        x = torch.randn(4, 500)
        x[2] += 3
        with pytest.raises(DrawsError, match=r"R-hat of site 'x' is 1.4\d?, .*max_rhat=None"):
            from_draws({"x": x, "y": torch.randn(4, 500)}, group_by_chain=True)
        allowed = read_draws({"x": x}, group_by_chain=True, max_rhat=None, min_ess=1)
        assert allowed.rhat["x"] > 1.4
        # Without their chains they look like one that mixes well enough, or not.
        shuffled = x.flatten()[torch.randperm(2000)]
        assert read_draws({"x": shuffled}).rhat["x"] < 1.01

    def test_a_chain_that_stands_still(self):
        x = torch.randn(2, 500)
        x[1] = 0.3
        with pytest.raises(DrawsError, match="R-hat of site 'x' is"):
            from_draws({"x": x}, group_by_chain=True)

    def test_too_correlated(self):
        x = torch.randn(2000)
        for i in range(1, 2000):
            x[i] = 0.95 * x[i - 1] + 0.3 * x[i]
        with pytest.raises(DrawsError, match=r"effective sample size of site 'x' is \d\d, of 2000"):
            from_draws({"x": x}, max_rhat=None, min_ess=200)
        assert 20 < read_draws({"x": x}, max_rhat=None, min_ess=None).ess["x"] < 120

    def test_too_few_for_a_covariance(self):
        with pytest.raises(DrawsError, match="'x'"):
            from_draws({"x": normal(60, 100)}, families=dist.MultivariateNormal, min_ess=None)

    def test_unknown_family(self):
        with pytest.raises(UnsupportedFamilyError, match="no family called 'StudentT'"):
            from_draws({"x": normal()}, families=dist.StudentT)

    @pytest.mark.parametrize(
        "options",
        [
            {"max_rhat": 0.9},
            {"max_rhat": math.nan},
            {"min_ess": -1},
            {"min_ess": math.inf},
            {"seed": -1},
        ],
    )
    def test_settings(self, options):
        with pytest.raises(ParameterError, match=next(iter(options))):
            from_draws({"x": normal()}, **options)

    def test_labels_that_do_not_fit(self):
        with pytest.raises(StructureError, match="2 labels"):
            from_draws({"x": normal(1000, 3)}, axes={"x": ("a", "b")})
        with pytest.raises(ParameterError, match="'x': expected a sequence of labels, got 3"):
            from_draws({"x": normal(1000, 3)}, axes={"x": 3})


def test_chains_that_disagree_tell_nothing_of_what_is_lost():
    # Two modes, one for each chain: two effective draws or so, whatever their number.
    apart = torch.stack([normal(500) - 20, normal(500) + 20])
    options: dict[str, Any] = {"group_by_chain": True, "max_rhat": None, "min_ess": None}
    reading = read_draws({"x": apart, "y": normal(2, 500)}, **options)
    assert reading.ess["x"] < 20
    assert math.isnan(reading.lost["x"]) and math.isnan(reading.lost_between)
    assert reading.lost["y"] < 0.1


def test_axes_of_size_one_as_predictive_has_them():
    guide = AutoNormal(model)
    guide(DATA)
    drawn = Predictive(guide, num_samples=200)(DATA)
    draws = {site: x for site, x in drawn.items() if site in model_draws()}
    assert draws["weights"].shape[:2] == (200, 1)
    bare = {site: x.reshape(len(x), *model_draws(1)[site].shape[1:]) for site, x in draws.items()}
    options: dict[str, Any] = {"min_ess": None, "relabel": False}
    mine = from_draws(draws, model, DATA, **options)
    theirs = from_draws(bare, model, DATA, **options)
    for site, factor in theirs.decomposed.items():
        for name, value in factor.params.items():
            assert torch.equal(mine.decomposed[site].params[name], value)


class TestBadModels:
    def test_other_arguments(self):
        with pytest.raises(DrawsError, match=r"'weights' has draws of shape \(3,\), .* \(4,\)"):
            from_draws(model_draws(), model, DATA, 4)

    def test_fails(self):
        with pytest.raises(GuideError, match="the model failed"):
            from_draws(model_draws(), model, 3)

    def test_knows_none_of_the_sites(self):
        with pytest.raises(DrawsError, match="the latent sites of the model are"):
            from_draws({"z": normal()}, model, DATA)

    def test_arguments_without_a_model(self):
        with pytest.raises(ParameterError, match="without a model"):
            from_draws({"z": normal()}, None, DATA)

    def test_support_that_depends_on_another_site(self):
        def nested() -> None:
            a = pyro.sample("a", dist.Uniform(0.0, 1.0))
            pyro.sample("b", dist.Uniform(0.0, a))

        a = torch.rand(1000)
        draws = {"a": a, "b": a * torch.rand(1000)}
        with pytest.raises(DrawsError, match="'b': its support depends on other sites"):
            from_draws(draws, nested)
        assert list(from_draws(draws, nested, sites=["a"]).factors) == ["a"]

    def test_discrete_site(self):
        def mixture() -> None:
            pyro.sample("k", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(0.0, 1.0))

        draws = {"k": torch.randint(2, (1000,)), "x": normal()}
        with pytest.raises(DrawsError, match=r"'k': expected floating-point .*sites=\[...\]"):
            from_draws(draws, mixture)
        assert list(from_draws({"x": draws["x"]}, mixture).factors) == ["x"]
