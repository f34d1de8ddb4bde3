# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""``Posterior``: its checks, and its operations against computation by hand."""

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints

from pyro_fusion.errors import FusionError, ParameterError, StructureError, UnsupportedFamilyError
from pyro_fusion.families import Factor
from pyro_fusion.fusion.fuse import fuse
from pyro_fusion.posterior.posterior import Posterior

SIGMAS = 5


def mixture(dtype=torch.float64):
    """Three components in two dimensions, and something shared."""
    torch.manual_seed(1)
    return Posterior(
        {
            "loc": dist.Normal(
                torch.randn(3, 2, dtype=dtype), torch.rand(3, 2).to(dtype) + 0.5
            ).to_event(1),
            "scale": dist.LogNormal(torch.randn(3, dtype=dtype), torch.ones(3, dtype=dtype)),
            "weights": dist.Dirichlet(torch.tensor([1.0, 2.0, 4.0], dtype=dtype)),
            "noise": dist.Gamma(torch.tensor(3.0, dtype=dtype), torch.tensor(2.0, dtype=dtype)),
        },
        {"loc": ("component",), "scale": "component", "weights": ("component",)},
    )


def chain():
    """A hidden Markov model: a label on two axes of one site."""
    alpha = torch.arange(1.0, 10.0).reshape(3, 3)
    return Posterior({"transition": dist.Dirichlet(alpha)}, {"transition": ("state", "state")})


class TestConstructor:
    def test_labels_and_sizes(self):
        p = mixture()
        assert p.labels == ("component",) and p.components("component") == 3
        assert p.axes["loc"] == ("component", None)
        assert p.axes["noise"] == ()
        assert p.plates["loc"] == ("component",) and p.plates["weights"] == ()
        assert list(p.factors) == ["loc", "scale", "weights", "noise"]
        assert p.dtype == torch.float64 and p.device == torch.device("cpu")

    def test_no_factors(self):
        with pytest.raises(StructureError, match="at least one factor"):
            Posterior({})

    @pytest.mark.parametrize("name", ["", 3, None])
    def test_a_site_needs_a_name(self, name):
        with pytest.raises(StructureError, match="needs a name"):
            Posterior({name: dist.Normal(0.0, 1.0)})

    @pytest.mark.parametrize("argument", ["axes", "plates"])
    def test_unknown_site(self, argument):
        with pytest.raises(StructureError, match=rf"{argument} names sites \['y'\].*\['x'\]"):
            Posterior({"x": dist.Normal(0.0, 1.0)}, **{argument: {"y": ("a",)}})

    def test_too_many_labels(self):
        with pytest.raises(StructureError, match=r"site 'x': 2 labels .* shape \(3,\)"):
            Posterior({"x": dist.Normal(torch.zeros(3), 1.0)}, {"x": ("a", "b")})

    def test_one_label_of_two_sizes_names_both_sites(self):
        factors = {"x": dist.Normal(torch.zeros(3), 1.0), "y": dist.Normal(torch.zeros(4), 1.0)}
        message = r"label 'a' has size 4 at site 'y' \(shape \(4,\)\) but size 3 at site 'x'"
        with pytest.raises(StructureError, match=message):
            Posterior(factors, {"x": "a", "y": "a"})
        with pytest.raises(StructureError, match="label 'a' has size 4"):
            Posterior({"z": dist.Normal(torch.zeros(3, 4), 1.0)}, {"z": ("a", "a")})

    def test_one_plate_of_two_sizes(self):
        factors = {"x": dist.Normal(torch.zeros(3), 1.0), "y": dist.Normal(torch.zeros(4), 1.0)}
        with pytest.raises(StructureError, match="plate 'p' has size 4"):
            Posterior(factors, plates={"x": "p", "y": "p"})

    def test_wrong_number_of_plates(self):
        with pytest.raises(StructureError, match="2 plates"):
            Posterior({"x": dist.Normal(torch.zeros(3), 1.0)}, plates={"x": ("p", "q")})

    @pytest.mark.parametrize("labels", [("",), (3,), (None, 3.5), ("a", "")])
    def test_labels_must_be_names(self, labels):
        d = {"x": dist.Normal(torch.zeros(3, 3), 1.0)}
        with pytest.raises(StructureError, match="site 'x': labels must be names"):
            Posterior(d, {"x": labels})
        with pytest.raises(StructureError, match="site 'x': labels must be names"):
            Posterior(d, plates={"x": labels})

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("parameter", ["loc", "scale"])
    def test_not_finite(self, parameter, bad):
        params = {"loc": torch.zeros(3), "scale": torch.ones(3)}
        params[parameter][1] = bad
        with pytest.raises(ParameterError, match=f"site 'x': {parameter} must be finite, got"):
            Posterior({"x": dist.Normal(**params, validate_args=False)})

    @pytest.mark.parametrize(
        "d",
        [
            dist.Normal(0.0, torch.tensor([1.0, -1.0]), validate_args=False),
            dist.Normal(0.0, torch.tensor([1.0, 0.0]), validate_args=False),
            dist.Gamma(torch.tensor(-1.0), torch.tensor(1.0), validate_args=False),
            dist.Dirichlet(torch.tensor([1.0, 0.0]), validate_args=False),
            dist.MultivariateNormal(
                torch.zeros(2),
                scale_tril=torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
                validate_args=False,
            ),
            dist.MultivariateNormal(
                torch.zeros(2), scale_tril=torch.ones(2, 2), validate_args=False
            ),
        ],
        ids=str,
    )
    def test_out_of_range_or_singular(self, d):
        with pytest.raises(ParameterError, match="site 'x'"):
            Posterior({"x": d})

    def test_factor_of_mismatched_shapes(self):
        mvn = Factor.of(dist.MultivariateNormal(torch.zeros(3), torch.eye(3)))
        for tril in (torch.eye(2), torch.eye(1), torch.ones(3, 2).tril(), torch.ones(2, 3).tril()):
            broken = Factor(mvn.family, {"loc": torch.zeros(3), "scale_tril": tril}, (), 0)
            with pytest.raises(ParameterError):
                Posterior({"x": broken})
        normal = Factor.of(dist.Normal(torch.zeros(3), 1.0))
        for scale in (torch.ones(2), torch.ones(2, 3)):
            broken = Factor(normal.family, {"loc": torch.zeros(3), "scale": scale}, (), 1)
            with pytest.raises(ParameterError):
                Posterior({"x": broken})

    def test_integers_and_mixed_dtypes(self):
        normal = Factor.of(dist.Normal(torch.zeros(3), 1.0))
        whole = {"loc": torch.zeros(3, dtype=torch.long), "scale": torch.ones(3)}
        with pytest.raises(ParameterError, match="loc must be floating point"):
            Posterior({"x": Factor(normal.family, whole, (), 1)})
        mixed = {"loc": torch.zeros(3), "scale": torch.ones(3).double()}
        with pytest.raises(ParameterError, match=r"scale must be torch\.float32"):
            Posterior({"x": Factor(normal.family, mixed, (), 1)})

    def test_unsupported_family(self):
        with pytest.raises(UnsupportedFamilyError, match=r"site 'x': .*Cauchy.*register_family"):
            Posterior({"x": dist.Cauchy(0.0, 1.0)})

    def test_every_error_is_a_fusion_error_of_one_line(self):
        for factors in ({}, {"x": dist.Cauchy(0.0, 1.0)}):
            with pytest.raises(FusionError) as caught:
                Posterior(factors)
            assert "\n" not in str(caught.value)

    def test_values_are_copied(self):
        loc = torch.zeros(3)
        f = Factor.of(dist.Normal(loc, 1.0))
        p, q = Posterior({"x": dist.Normal(loc, 1.0)}), Posterior({"x": f})
        loc.add_(1)
        f.params["loc"].add_(1)
        p.factors["x"].loc.add_(1)
        for posterior in (p, q):
            assert torch.equal(posterior.factors["x"].loc, torch.zeros(3))

    def test_mappings_cannot_be_written_to(self):
        p = mixture()
        for mapping in (p.factors, p.axes, p.plates, p.decomposed):
            with pytest.raises(TypeError):
                mapping["loc"] = None


class TestRepr:
    def test_says_what_is_where(self):
        lines = repr(mixture()).splitlines()
        assert lines[0] == "Posterior(3 × component)"
        assert [line.split()[:2] for line in lines[1:]] == [
            ["loc", "Normal"],
            ["scale", "LogNormal"],
            ["weights", "Dirichlet"],
            ["noise", "Gamma"],
        ]
        assert "[3, 2]" in lines[1] and lines[1].endswith("(component, ·)")
        assert lines[4].endswith("shared")

    def test_transforms(self):
        base = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
        d = dist.TransformedDistribution(base, biject_to(constraints.interval(0.0, 2.0)))
        p = Posterior({"x": d})
        assert repr(p).splitlines()[0] == "Posterior"
        assert "Normal → Sigmoid → Affine" in repr(p)


class TestOperations:
    def test_unknown_label(self):
        for call in (lambda p: p.components("topic"), lambda p: p.select("topic", [0])):
            with pytest.raises(
                StructureError, match=r"label 'topic'; the labels are \['component'\]"
            ):
                call(mixture())

    @pytest.mark.parametrize("index", [[2, 0], torch.tensor([2, 0]), (2, 0), range(2, -1, -2)])
    def test_select(self, index):
        p = mixture()
        q = p.select("component", index)
        assert q.components("component") == 2 and q.axes == p.axes
        assert torch.equal(q.factors["loc"].base_dist.loc, p.factors["loc"].base_dist.loc[[2, 0]])
        assert torch.equal(q.factors["scale"].loc, p.factors["scale"].loc[[2, 0]])
        assert q.factors["weights"].concentration.tolist() == [4.0, 1.0]
        assert torch.equal(q.factors["noise"].rate, p.factors["noise"].rate)
        # The original is as it was.
        assert p.components("component") == 3

    @pytest.mark.parametrize(
        "index", [[], [3], [-1], [0.5], torch.tensor([True, False, True]), [True]]
    )
    def test_wrong_index(self, index):
        with pytest.raises(StructureError):
            mixture().select("component", index)

    def test_select_on_both_axes(self):
        q = chain().select("state", [2, 0])
        assert q.factors["transition"].concentration.tolist() == [[9.0, 7.0], [3.0, 1.0]]

    def test_permute(self):
        p = mixture()
        q = p.permute("component", [1, 2, 0])
        values = p.sample((4,))
        moved = dict(values)
        moved["loc"] = values["loc"][:, [1, 2, 0]]
        for site in ("scale", "weights"):
            moved[site] = values[site][..., [1, 2, 0]]
        torch.testing.assert_close(q.log_prob(moved), p.log_prob(values))
        back = q.permute("component", [2, 0, 1])
        torch.testing.assert_close(back.log_prob(values), p.log_prob(values))
        alpha = chain().permute("state", [2, 0, 1]).factors["transition"].concentration
        assert alpha.tolist() == [[9, 7, 8], [3, 1, 2], [6, 4, 5]]

    @pytest.mark.parametrize("order", [[0, 1], [0, 0, 1], [0, 1, 3], [0, 1, 2, 2], []])
    def test_no_permutation(self, order):
        with pytest.raises(StructureError, match="permutation of the 3 components"):
            mixture().permute("component", order)

    def test_to(self):
        p = mixture().to(dtype=torch.float32)
        assert p.dtype == torch.float32
        assert {v.dtype for v in p.sample().values()} == {torch.float32}
        assert mixture().to("cpu").device == torch.device("cpu")
        with pytest.raises(ParameterError, match=r"site 'x': .* must be finite"):
            Posterior({"x": dist.Normal(torch.tensor(1e300).double(), 1.0)}).to(dtype=torch.float32)

    def test_log_prob_is_the_sum_over_everything(self):
        p = mixture()
        values = p.sample((5, 2))
        loc, scale, weights, noise = (p.factors[k] for k in p.factors)
        expected = (
            dist.Normal(loc.base_dist.loc, loc.base_dist.scale)
            .log_prob(values["loc"])
            .sum((-1, -2))
            + dist.LogNormal(scale.loc, scale.scale).log_prob(values["scale"]).sum(-1)
            + dist.Dirichlet(weights.concentration).log_prob(values["weights"])
            + dist.Gamma(noise.concentration, noise.rate).log_prob(values["noise"])
        )
        result = p.log_prob(values)
        assert result.shape == (5, 2)
        torch.testing.assert_close(result, expected)

    def test_log_prob_of_the_wrong_sites(self):
        p = mixture()
        values = p.sample()
        for wrong in ({}, {"loc": values["loc"]}, {**values, "more": values["noise"]}):
            with pytest.raises(StructureError, match="expected a value for each of"):
                p.log_prob(wrong)

    def test_sample(self):
        p = mixture()
        values = p.sample((20_000,))
        assert {k: tuple(v.shape[1:]) for k, v in values.items()} == {
            "loc": (3, 2),
            "scale": (3,),
            "weights": (3,),
            "noise": (),
        }
        for site in ("loc", "weights", "noise"):
            x, d = values[site], p.factors[site]
            error = (x.mean(0) - d.mean).abs() / (x.std(0) / len(x) ** 0.5)
            assert float(error.max()) < SIGMAS
        assert p.sample()["loc"].shape == (3, 2)


class TestSeparation:
    """Axes whose components are not independent are projected when they are labelled."""

    def stick_breaking(self, **kwargs):
        loc = torch.tensor([0.5, -1.0, 2.0]).double()
        base = dist.Normal(loc, torch.tensor([0.3, 0.5, 1.0]).double()).to_event(1)
        return dist.TransformedDistribution(base, biject_to(constraints.simplex))

    def test_stick_breaking_becomes_a_dirichlet_of_the_same_expected_log(self):
        d = self.stick_breaking()
        p = Posterior({"w": d}, {"w": "component"})
        dirichlet = p.factors["w"]
        assert isinstance(dirichlet, dist.Dirichlet) and p.components("component") == 4
        logs = d.sample((50_000,)).log()
        alpha = dirichlet.concentration
        expected = torch.digamma(alpha) - torch.digamma(alpha.sum())
        error = (logs.mean(0) - expected).abs() / (logs.std(0) / len(logs) ** 0.5)
        assert float(error.max()) < SIGMAS
        order = [3, 1, 0, 2]
        permuted = p.permute("component", order).factors["w"].concentration
        assert torch.equal(permuted, alpha[order])

    def test_unlabelled_it_stays_what_it_was(self):
        p = Posterior({"w": self.stick_breaking()})
        assert "StickBreaking" in repr(p)

    def test_batches_of_sticks_are_separable(self):
        base = dist.Normal(torch.randn(4, 2), 1.0).to_event(1)
        d = dist.TransformedDistribution(base, biject_to(constraints.simplex))
        p = Posterior({"topics": d}, {"topics": "topic"})
        assert "StickBreaking" in repr(p)
        q = p.select("topic", [3, 1])
        assert torch.equal(
            q.decomposed["topics"].params["loc"], p.decomposed["topics"].params["loc"][[3, 1]]
        )

    def test_hopeless_sticks_are_an_error(self):
        base = dist.Normal(torch.full((2,), -1e308, dtype=torch.float64), 1.0).to_event(1)
        d = dist.TransformedDistribution(base, biject_to(constraints.simplex))
        with pytest.raises(ParameterError, match="site 'w'"):
            Posterior({"w": d}, {"w": "component"})

    def test_multivariate_normal_becomes_its_marginals_with_a_warning(self):
        covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        d = dist.MultivariateNormal(torch.tensor([1.0, 2.0]), covariance)
        with pytest.warns(UserWarning, match=r"site 'x'.* loses 0\.8 nats of correlation"):
            p = Posterior({"x": d}, {"x": "component"})
        f = p.decomposed["x"]
        assert f.family.name == "Normal" and f.event_shape == (2,)
        assert f.params["loc"].tolist() == [1.0, 2.0]
        torch.testing.assert_close(f.params["scale"], torch.ones(2))
        assert p.permute("component", [1, 0]).decomposed["x"].params["loc"].tolist() == [2.0, 1.0]

    def test_without_correlation_there_is_no_warning(self):
        d = dist.MultivariateNormal(torch.zeros(2), torch.diag(torch.tensor([1.0, 4.0])))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            p = Posterior({"x": d}, {"x": "component"})
        torch.testing.assert_close(p.decomposed["x"].params["scale"], torch.tensor([1.0, 2.0]))

    def test_behind_an_elementwise_transform(self):
        base = dist.MultivariateNormal(torch.zeros(2), torch.diag(torch.tensor([1.0, 4.0])))
        d = dist.TransformedDistribution(base, [dist.transforms.ExpTransform()])
        p = Posterior({"x": d}, {"x": "component"})
        value = torch.tensor([0.5, 3.0])
        expected = dist.LogNormal(torch.zeros(2), torch.tensor([1.0, 2.0])).log_prob(value).sum()
        torch.testing.assert_close(p.log_prob({"x": value}), expected)

    @pytest.mark.parametrize(
        "support, size",
        [(dist.constraints.ordered_vector, 3), (dist.constraints.corr_cholesky, 3)],
    )
    def test_axes_that_cannot_be_separated(self, support, size):
        base = dist.Normal(torch.zeros(size), 1.0).to_event(1)
        d = dist.TransformedDistribution(base, biject_to(support))
        with pytest.raises(StructureError, match=r"site 'x': axis 0 lies behind"):
            Posterior({"x": d}, {"x": "component"})

    def test_event_axes_of_a_wishart(self):
        d = dist.Wishart(torch.tensor(4.0), torch.eye(3))
        with pytest.raises(StructureError, match=r"site 'x'.*Wishart cannot be labelled"):
            Posterior({"x": d}, {"x": ("component", "component")})


@pytest.mark.cuda
def test_to_cuda_and_back():
    p = mixture().to("cuda")
    assert p.device.type == "cuda"
    q = p.permute("component", [1, 2, 0]).permute("component", [2, 0, 1]).to("cpu")
    values = mixture().sample()
    torch.testing.assert_close(q.log_prob(values), mixture().log_prob(values))


@pytest.mark.parametrize("labels", [None, 3])
def test_labels_that_are_no_sequence(labels):
    with pytest.raises(StructureError, match="site 'x': expected a sequence of labels"):
        Posterior({"x": dist.Normal(torch.zeros(2), 1.0)}, {"x": labels})


@pytest.mark.parametrize("index", [["b"], "b", [None]])
def test_index_that_is_no_number(index):
    p = Posterior({"x": dist.Normal(torch.zeros(2), 1.0)}, {"x": "a"})
    with pytest.raises(StructureError, match="expected the numbers of components"):
        p.select("a", index)


class TestMeanField:
    def joint(self, transforms=()):
        torch.manual_seed(0)
        tril = torch.randn(2, 3, 3).tril(-1) + torch.rand(2, 3).exp().diag_embed()
        d = dist.MultivariateNormal(torch.randn(2, 3), scale_tril=tril)
        return dist.TransformedDistribution(d, list(transforms)) if transforms else d

    def test_keeps_means_and_variances(self):
        p = Posterior({"z": self.joint(), "k": dist.Gamma(1.0, 1.0)}, {"z": ("state", None)})
        field = p.mean_field()
        mine, joint = field.factors["z"], p.factors["z"]
        assert field.decomposed["z"].family.name == "Normal"
        assert field.axes == p.axes
        torch.testing.assert_close(mine.mean, joint.mean)
        torch.testing.assert_close(mine.variance, joint.variance)
        assert field.mean_field().factors["z"].mean.equal(mine.mean)

    def test_behind_a_bijection(self):
        p = Posterior({"z": self.joint([torch.distributions.ExpTransform()])}, {"z": "state"})
        mine = p.mean_field().factors["z"]
        normal = self.joint()
        expected = dist.LogNormal(normal.mean, normal.stddev).to_event(1)
        x = expected.sample()
        torch.testing.assert_close(mine.log_prob(x), expected.log_prob(x))

    def test_lets_parties_be_fused(self):
        plain = Posterior({"z": dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)}, {"z": "state"})
        joint = Posterior({"z": self.joint()}, {"z": "state"})
        with pytest.raises(StructureError, match=r"posterior.mean_field\(\)"):
            fuse([plain, joint])
        assert fuse([plain, joint.mean_field()]).posterior.axes == {"z": ("state", None)}


def test_a_number_of_draws():
    p = Posterior({"z": dist.Normal(torch.zeros(3), 1.0)})
    assert p.sample(5)["z"].shape == p.sample([5])["z"].shape == (5, 3)
