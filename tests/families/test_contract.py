# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What every family must satisfy, bare and through every wrapper.

Monte Carlo tolerances are ``SIGMAS`` standard errors, seeds are fixed.
"""

import math

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch.distributions import Independent, biject_to, kl_divergence, transform_to
from torch.distributions import transforms as tt

from pyro_fusion import families
from pyro_fusion.errors import StructureError, UnsupportedFamilyError
from pyro_fusion.families import Factor, kl, pairwise_kl
from pyro_fusion.families.transforms import describe, rebuild
from pyro_fusion.testing import check_family
from tests.families.members import BARE, MEMBERS, Member, gamma, mvn, normal, wishart, wishart_kl

SIGMAS = 5
OTHERS = [Factor.of(make(torch.arange(2))) for make, _, _ in BARE.values()]
ROWS, COLUMNS = torch.arange(3), torch.arange(10, 14)


@pytest.fixture(params=MEMBERS, ids=str)
def member(request) -> Member:
    return request.param


def one_hot(value):
    return F.one_hot(value.long(), 4).double()


def statistics(f: Factor, value):
    """``T`` of a draw of ``f``: ``[..., *batch_shape, P]``, event axes flattened."""
    for t in reversed(f.transforms):
        value = t.inv(value)
    t = one_hot(value) if f.family.name == "Categorical" else f.family.statistics(value)
    first = t.dim() - 1 - len(f.base_shape) + f.batch_dim
    return t.flatten(first) if t.dim() - 1 > first else t


def sample(f: Factor, *shape: int):
    torch.manual_seed(11)
    return f.distribution().sample(torch.Size(shape))


class TestContract:
    def test_it_holds(self, member):
        i, j = (x.flatten() for x in torch.meshgrid(ROWS, COLUMNS, indexing="ij"))
        check_family(
            member.make(ROWS),
            member.make(COLUMNS),
            divergence=member.kl(i, j).reshape(3, 4),
            statistics=one_hot if "Categorical" in member.name else None,
        )

    def test_values_are_copied(self, member):
        d = member.make(ROWS)
        f = Factor.of(d)
        before = {k: v.clone() for k, v in f.params.items()}
        base = d
        while hasattr(base, "base_dist"):
            base = base.base_dist
        for name in list(vars(base)):
            value = getattr(base, name)
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                vars(base)[name] = value.clone()  # expanded tensors cannot be written to
                value.untyped_storage().fill_(0)
        for k, v in f.params.items():
            assert torch.equal(v, before[k])
            assert not v.requires_grad

    def test_log_prob_itself_where_the_carrier_is_one(self, member):
        f = Factor.of(member.make(ROWS))
        if f.transforms or f.family.name == "Poisson":
            pytest.skip("has a carrier or a Jacobian; see the test of differences")
        value = sample(f, 7)
        actual = (f.natural * statistics(f, value)).sum(-1) - f.log_normalizer
        expected = member.make(ROWS).log_prob(value)
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)

    def test_float32_comes_back_as_float32(self, member):
        p32, q32 = member.make(ROWS, torch.float32), member.make(COLUMNS, torch.float32)
        result = pairwise_kl(p32, q32)
        assert result.dtype == torch.float32
        truth = pairwise_kl(member.make(ROWS), member.make(COLUMNS))
        torch.testing.assert_close(result.double(), truth, rtol=1e-4, atol=0)
        f = Factor.of(p32)
        assert f.dtype == torch.float32
        back = f.from_mean(f.mean)
        assert back.dtype == torch.float32
        assert back.distribution().sample().dtype == sample(f).dtype
        assert all(v.dtype == torch.float32 for v in back.params.values())
        assert_same_factor(back, f, 1e-5)

    def test_expand(self, member):
        f = Factor.of(member.make(ROWS))
        wide = f.expand((2,) + tuple(f.base_shape))
        assert wide.base_shape == (2,) + f.base_shape
        d = member.make(ROWS)
        outer = Factor.of(ExpandedDistribution(d, (2, 3)))
        assert outer.batch_shape == (2, 3) and outer.event_shape == d.event_shape
        value = sample(outer)
        torch.testing.assert_close(outer.distribution().log_prob(value), d.log_prob(value))

    def test_transforms_survive_description(self, member):
        f = Factor.of(member.make(ROWS))
        descriptions = [describe(t) for t in f.transforms]
        again = Factor(f.family, f.params, tuple(rebuild(d) for d in descriptions), f.batch_dim)
        assert again.structure() == f.structure()
        value = sample(f)
        torch.testing.assert_close(
            again.distribution().log_prob(value), f.distribution().log_prob(value)
        )

    def test_functions_of_distributions_agree_with_the_factor(self, member):
        d = member.make(ROWS)
        f = Factor.of(d)
        assert torch.equal(families.natural_params(d), f.natural)
        assert torch.equal(families.mean_params(d), f.mean)
        assert torch.equal(families.log_normalizer(d), f.log_normalizer)
        again = families.from_natural_params(d, f.natural)
        assert type(again) is type(f.distribution())
        value = sample(f)
        torch.testing.assert_close(again.log_prob(value), d.log_prob(value), rtol=1e-8, atol=1e-8)
        single = families.from_mean_params(d, f.mean[1])
        assert single.batch_shape == () and single.event_shape == f.event_shape

    def test_others_are_refused(self, member):
        """A LogNormal is no Normal, a Gamma no InverseGamma, nor are two shapes one."""
        f = Factor.of(member.make(ROWS))
        pairwise_kl(f, f)
        for other in OTHERS:
            if other.structure() != f.structure() or other.event_shape != f.event_shape:
                with pytest.raises(StructureError, match="no common exponential family"):
                    pairwise_kl(f, other)


def assert_same_factor(actual: Factor, expected: Factor, tolerance: float) -> None:
    assert actual.structure() == expected.structure()
    assert actual.batch_dim == expected.batch_dim
    for name, value in expected.params.items():
        torch.testing.assert_close(
            actual.params[name], value, rtol=tolerance, atol=tolerance, msg=name
        )


class TestWishart:
    def test_the_textbook_is_right(self):
        """torch has no KL of Wisharts; its generic one gives another number."""
        p, q = wishart(ROWS), wishart(ROWS + 10)
        draws = torch.stack(
            [
                torch.as_tensor(
                    scipy.stats.wishart(float(df), (tril @ tril.mT).numpy()).rvs(
                        40_000, random_state=3
                    )
                )
                for df, tril in zip(p.df, p.scale_tril, strict=True)
            ],
            1,
        )
        terms = p.log_prob(draws) - q.log_prob(draws)
        standard_error = terms.std(0) / math.sqrt(len(terms))
        for truth in (wishart_kl(p, q), kl(p, q)):
            assert bool(((terms.mean(0) - truth).abs() < SIGMAS * standard_error).all())
        # The mean statistics, from an independent sampler.
        f = Factor.of(p)
        t = f.family.statistics(draws)
        error = (t.mean(0) - f.mean).abs()
        assert bool((error < SIGMAS * t.std(0) / math.sqrt(len(t))).all())

    def test_few_degrees_of_freedom_do_not_warn(self):
        with pytest.warns(UserWarning, match="Low df"):
            d = dist.Wishart(torch.tensor(2.2), scale_tril=torch.eye(3))
        again = Factor.of(d).distribution()
        assert again.sample((100,)).shape == (100, 3, 3)
        assert isinstance(again, dist.Wishart)

    def test_draws_have_the_right_mean(self):
        d = Factor.of(wishart(ROWS)).distribution()
        draws = d.rsample((20_000,))
        error = (draws.mean(0) - d.mean).abs()
        assert bool((error < SIGMAS * draws.std(0) / math.sqrt(len(draws))).all())


class TestWrappers:
    def test_partial_mask_is_refused(self):
        d = normal(ROWS).mask(torch.tensor([True, False, True]))
        with pytest.raises(UnsupportedFamilyError, match="masked"):
            Factor.of(d)
        with pytest.raises(UnsupportedFamilyError, match="masked"):
            Factor.of(normal(ROWS).mask(False))

    def test_mask_may_be_wider(self):
        d = normal(ROWS).mask(torch.ones(4, 3, dtype=torch.bool))
        assert d.batch_shape == Factor.of(d).batch_shape == (4, 3)

    def test_expansion_below_independent(self):
        """What Independent makes of an expanded scalar must not be lost."""
        d = dist.Independent(ExpandedDistribution(dist.Gamma(2.0, 1.0), (4, 3)), 1)
        f = Factor.of(d)
        assert (f.batch_shape, f.event_shape) == ((4,), (3,))
        f = Factor.of(dist.Independent(ExpandedDistribution(dist.Gamma(2.0, 1.0), (3,)), 1))
        assert (f.batch_shape, f.event_shape) == ((), (3,))

    def test_nested_expansion_keeps_which_axis_is_which(self):
        loc = torch.arange(6.0).reshape(2, 1, 3)
        d = dist.Normal(loc, 1.0).to_event(1)  # [2, 1] x [3]
        wide = ExpandedDistribution(d, (5, 2, 4)).to_event(1)  # [5, 2] x [4, 3]
        f = Factor.of(wide)
        assert (f.batch_shape, f.event_shape) == ((5, 2), (4, 3))
        assert torch.equal(f.params["loc"], loc.expand(5, 2, 4, 3))

    def test_pyro_broadcast_by_plates_of_a_narrow_site(self):
        d = dist.LogNormal(0.0, 1.0).expand([3]).to_event(1).expand([2])
        f = Factor.of(d)
        assert (f.batch_shape, f.event_shape) == ((2,), (3,))
        assert type(Independent(f.distribution(), 0).base_dist.base_dist) is dist.LogNormal

    @pytest.mark.parametrize(
        "make, name",
        [
            (lambda: dist.StudentT(3.0), "StudentT"),
            (lambda: dist.HalfNormal(1.0), "HalfNormal"),
            (lambda: dist.Delta(torch.zeros(3)), "Delta"),
            (lambda: dist.VonMises(0.0, 1.0), "VonMises"),
        ],
    )
    def test_unsupported(self, make, name):
        with pytest.raises(UnsupportedFamilyError, match=name):
            Factor.of(make())

    def test_a_map_that_is_no_bijection(self):
        d = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0), [tt.AbsTransform()])
        with pytest.raises(UnsupportedFamilyError, match=r"AbsTransform.*not a bijection"):
            Factor.of(d)

    def test_an_affine_map_that_differs_along_an_axis(self):
        d = dist.TransformedDistribution(
            gamma(ROWS), [tt.AffineTransform(torch.arange(3.0).double(), 1.0)]
        )
        with pytest.raises(UnsupportedFamilyError, match="not one bijection"):
            Factor.of(d)
        same = tt.AffineTransform(torch.ones(3).double(), 2.0)
        f = Factor.of(dist.TransformedDistribution(gamma(ROWS), [same]))
        assert describe(f.transforms[0]) == ["AffineTransform", {"loc": 1.0, "scale": 2.0}]

    def test_inverse_affine_and_power(self):
        moves = [tt.AffineTransform(1.0, 4.0).inv, tt.PowerTransform(torch.tensor(2.0)).inv]
        d = dist.TransformedDistribution(
            dist.TransformedDistribution(gamma(ROWS), [tt.AffineTransform(1.0, 2.0)]), moves
        )
        f = Factor.of(d)
        value = sample(f, 4)
        torch.testing.assert_close(f.distribution().log_prob(value), d.log_prob(value))
        assert f.structure() == Factor.of(f.distribution()).structure()

    def test_correlation_matrix(self):
        base = normal(ROWS, event=(3,)).to_event(1)
        d = dist.TransformedDistribution(base, biject_to(constraints.corr_matrix))
        f = Factor.of(d)
        assert f.event_shape == (3, 3)
        again = [rebuild(describe(t)) for t in f.transforms]
        x = f.params["loc"]
        for t in again:
            x = t(x)
        expected = biject_to(constraints.corr_matrix)(f.params["loc"])
        torch.testing.assert_close(x, expected)
        truth = kl_divergence(base, normal(ROWS + 10, event=(3,)).to_event(1))
        other = dist.TransformedDistribution(
            normal(ROWS + 10, event=(3,)).to_event(1), biject_to(constraints.corr_matrix)
        )
        torch.testing.assert_close(kl(d, other), truth)

    @pytest.mark.parametrize(
        "support",
        [
            constraints.lower_cholesky,
            constraints.positive_definite,
            constraints.softplus_lower_cholesky,
            constraints.unit_lower_cholesky,
        ],
        ids=str,
    )
    def test_maps_that_ignore_the_upper_triangle_are_no_bijections(self, support):
        base = normal(ROWS, event=(2, 2)).to_event(2)
        d = dist.TransformedDistribution(base, transform_to(support))
        with pytest.raises(UnsupportedFamilyError, match="not a bijection"):
            Factor.of(d)

    def test_unknown_transform_names_the_remedy(self):
        f = Factor.of(
            dist.TransformedDistribution(
                normal(ROWS).to_event(1), [dist.transforms.Permute(torch.tensor([1, 0, 2]))]
            )
        )
        with pytest.raises(UnsupportedFamilyError, match="register_transform"):
            f.structure()

    def test_mixed_dtypes_are_promoted(self):
        d = dist.Normal(torch.zeros(3), torch.ones(3, dtype=torch.float64))
        assert {v.dtype for v in Factor.of(d).params.values()} == {torch.float64}

    def test_gradients_do_not_come_along(self):
        loc = torch.zeros(3, requires_grad=True)
        f = Factor.of(dist.LogNormal(loc, 1.0))
        assert not any(v.requires_grad for v in f.params.values())


class TestPairwise:
    def test_batch_shapes(self):
        d = normal(ROWS)
        with pytest.raises(StructureError, match="one batch axis"):
            pairwise_kl(d, normal(torch.arange(6).reshape(2, 3)))
        with pytest.raises(StructureError, match="one batch axis"):
            pairwise_kl(normal(torch.tensor(0)), d)

    def test_products_add_up(self):
        a = {"x": normal(ROWS), "y": mvn(ROWS)}
        b = {"y": mvn(COLUMNS), "x": normal(COLUMNS)}
        expected = pairwise_kl(a["x"], b["x"]) + pairwise_kl(a["y"], b["y"])
        torch.testing.assert_close(pairwise_kl(a, b), expected)
        for wrong in ({"x": a["x"]}, {}, a["x"]):
            with pytest.raises(StructureError, match="same, non-empty set"):
                pairwise_kl(a, wrong)
        with pytest.raises(StructureError):
            pairwise_kl({}, {})

    def test_kl_broadcasts(self):
        p, q = normal(torch.arange(3).reshape(3, 1)), normal(torch.arange(4) + 10)
        assert kl(p, q).shape == (3, 4)
        torch.testing.assert_close(kl(p, q), pairwise_kl(normal(ROWS), normal(COLUMNS)))

    def test_categories_must_agree(self):
        a, b = (dist.Categorical(logits=torch.zeros(3, n)) for n in (4, 5))
        with pytest.raises(StructureError, match="Categorical"):
            pairwise_kl(a, b)

    def test_many_pairs_without_a_quadratic_intermediate(self):
        """The blocks of the fall-back are bounded; all pairs here take it."""
        loc = 1e4 + 1e-4 * torch.randn(300, 40, dtype=torch.float64)
        d = dist.Normal(loc, 1e-4).to_event(1)
        truth = kl_divergence(
            dist.Normal(loc[:, None], 1e-4).to_event(1), dist.Normal(loc, 1e-4).to_event(1)
        )
        torch.testing.assert_close(pairwise_kl(d, d), truth, rtol=1e-6, atol=1e-12)

    def test_inputs_are_not_written_to(self):
        d, e = normal(ROWS), normal(COLUMNS)
        before = d.loc.clone(), e.loc.clone()
        pairwise_kl(d, e)
        assert torch.equal(d.loc, before[0]) and torch.equal(e.loc, before[1])


class TestRegistry:
    def test_every_registered_family_is_under_contract(self):
        tested = {Factor.of(make(ROWS)).family.name for make, _, _ in BARE.values()}
        assert tested == set(families.family_names())

    def test_names(self):
        for name in families.family_names():
            assert families.family_named(name).name == name
        with pytest.raises(UnsupportedFamilyError, match="Dirichlet"):
            families.family_named("Cauchy")


@pytest.mark.cuda
class TestCuda:
    def test_pairwise_kl_and_conversions(self, member):
        device = torch.device("cuda")
        p, q = Factor.of(member.make(ROWS)), Factor.of(member.make(COLUMNS))
        gp, gq = p.to(device), q.to(device)
        result = pairwise_kl(gp, gq)
        assert result.device.type == "cuda"
        torch.testing.assert_close(result.cpu(), pairwise_kl(p, q), rtol=1e-9, atol=1e-12)
        for convert in ("natural", "mean"):
            flat = getattr(gp, convert)
            assert flat.device.type == "cuda"
            back = getattr(gp, f"from_{convert}")(flat)
            assert back.device.type == "cuda"
            assert_same_factor(back.to("cpu"), p, 1e-8)
        d = gp.distribution()
        assert d.log_prob(d.sample()).device.type == "cuda"
