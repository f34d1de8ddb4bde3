# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0
"""NormalWishart and NormalGamma against scipy, torch, quadrature, mpmath and Monte Carlo.

Monte Carlo tolerances are 5 standard errors (``SIGMAS``), seeds are fixed.
"""

import inspect
import math

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import Gamma, MultivariateNormal, Wishart, biject_to, kl_divergence

from pyro_fusion.families import NormalGamma, NormalWishart
from pyro_fusion.families.special import stirling_rest, stirling_rest_slope

SIGMAS = 5
DTYPES = [torch.float32, torch.float64]
CHOICES = ["covariance_matrix", "precision_matrix", "scale_tril"]


@pytest.fixture(autouse=True)
def _seed():
    pyro.clear_param_store()
    torch.manual_seed(20260101)


def tensor(*args, dtype=torch.float64, **kwargs):
    return torch.tensor(*args, dtype=dtype, **kwargs)


def spd(*batch, dim, dtype=torch.float64, seed=0):
    """Well-conditioned symmetric positive definite matrices."""
    generator = torch.Generator().manual_seed(seed + 100 * dim)
    root = torch.randn(*batch, dim, dim + 2, generator=generator, dtype=torch.float64)
    return (root @ root.mT / (dim + 2) + 0.2 * torch.eye(dim, dtype=torch.float64)).to(dtype)


def normal_wishart(*batch, dim=2, df=None, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + 7)
    loc = torch.randn(*batch, dim, generator=generator, dtype=torch.float64)
    concentration = 0.5 + 3 * torch.rand(batch, generator=generator, dtype=torch.float64)
    if df is None:
        df = dim + 10 * torch.rand(batch, generator=generator, dtype=torch.float64)
    df = torch.as_tensor(df, dtype=dtype)
    matrix = spd(*batch, dim=dim, seed=seed, dtype=dtype)
    return NormalWishart(loc.to(dtype), concentration.to(dtype), df, covariance_matrix=matrix)


def normal_gamma(*batch, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + 11)
    loc = torch.randn(batch, generator=generator, dtype=torch.float64)
    rest = 0.5 + 4 * torch.rand(3, *batch, generator=generator, dtype=torch.float64)
    return NormalGamma(loc.to(dtype), *rest.to(dtype))


MAKERS = [normal_wishart, normal_gamma]
makers = pytest.mark.parametrize("make", MAKERS)


def composed_log_prob(d, value):
    """Wishart times conditional normal, one batch element at a time, by scipy."""
    mean, precision = value[..., 0].numpy(), value[..., 1:].numpy()
    wishart = scipy.stats.wishart(df=d.df.item(), scale=d.covariance_matrix.numpy())
    covariance = torch.linalg.inv(d.concentration * value[..., 1:]).numpy()
    normal = scipy.stats.multivariate_normal(d.loc.numpy(), covariance)
    return wishart.logpdf(precision) + normal.logpdf(mean)


def assert_within(estimates, truth, what=""):
    """The mean of estimates along axis 0 lies within SIGMAS standard errors of truth."""
    error = (estimates.mean(0) - truth).abs()
    standard_error = estimates.std(0) / len(estimates) ** 0.5
    worst = (error / standard_error).max().item()
    assert worst < SIGMAS, f"{what} off by {worst:.1f} standard errors"


class TestContract:
    @makers
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
    def test_shapes_and_dtype(self, make, batch, dtype):
        d = make(*batch, dtype=dtype)
        value = d.rsample((4, 1))
        assert d.batch_shape == batch
        assert d.event_shape == ((2, 3) if make is normal_wishart else (2,))
        assert value.shape == d.shape((4, 1)) == (4, 1, *batch, *d.event_shape)
        assert d.log_prob(value).shape == (4, 1, *batch)
        assert d.entropy().shape == kl_divergence(d, d).shape == batch
        assert d.mean.shape == d.variance.shape == d.shape()
        results = (value, d.log_prob(value), d.entropy(), d.mean, d.variance, kl_divergence(d, d))
        assert all(result.dtype == dtype for result in results)
        assert d.support.check(value).all()
        assert d.has_rsample

    @makers
    def test_float32_agrees_with_float64(self, make):
        single, double = make(3, dtype=torch.float32), make(3, dtype=torch.float64)
        other_single, other_double = make(3, seed=1, dtype=torch.float32), make(3, seed=1)
        value = double.sample()
        for a, b in [
            (single.log_prob(value.float()), double.log_prob(value)),
            (single.entropy(), double.entropy()),
            (kl_divergence(single, other_single), kl_divergence(double, other_double)),
        ]:
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)

    @makers
    def test_expand(self, make):
        d = make(3)
        wide = d.expand((4, 3))
        assert type(wide) is type(d)
        assert wide.batch_shape == (4, 3) and wide.event_shape == d.event_shape
        value = wide.sample()
        torch.testing.assert_close(wide.log_prob(value), d.log_prob(value))
        torch.testing.assert_close(wide.mean, d.mean.expand(wide.shape()))
        torch.testing.assert_close(wide.variance, d.variance.expand(wide.shape()))
        torch.testing.assert_close(wide.entropy(), d.entropy().expand(4, 3))
        torch.testing.assert_close(
            kl_divergence(wide, make(3, seed=1))[2], kl_divergence(d, make(3, seed=1))
        )
        d._validate_args = True
        assert d.expand((4, 3))._validate_args
        assert wide.expand((2, 4, 3)).sample().shape == (2, 4, 3, *d.event_shape)

    @makers
    def test_to_event_and_mask(self, make):
        d, other = make(2, 3), make(2, 3, seed=1)
        value = d.sample()
        joint = d.to_event(1)
        assert joint.batch_shape == (2,) and joint.event_shape == (3, *d.event_shape)
        torch.testing.assert_close(joint.log_prob(value), d.log_prob(value).sum(-1))
        expected = kl_divergence(d, other).sum(-1)
        torch.testing.assert_close(kl_divergence(joint, other.to_event(1)), expected)
        mask = tensor([True, False, True], dtype=torch.bool)
        torch.testing.assert_close(d.mask(mask).log_prob(value), d.log_prob(value) * mask)

    @makers
    def test_same_seed_same_bits(self, make):
        draws = []
        for _ in range(2):
            torch.manual_seed(3)
            draws.append(make(2).sample((5,)))
        assert torch.equal(*draws)

    @makers
    def test_sample_in_a_plate(self, make):
        def model():
            with pyro.plate("component", 3):
                return pyro.sample("theta", make())

        with pyro.validation_enabled():
            trace = pyro.poutine.trace(model).get_trace()
            trace.compute_log_prob()
        site = trace.nodes["theta"]
        assert site["value"].shape == (3, *make().event_shape)
        assert site["log_prob"].shape == (3,)
        torch.testing.assert_close(site["log_prob"], make().log_prob(site["value"]))

    @makers
    def test_autoguide_and_svi(self, make):
        def model():
            with pyro.plate("component", 3):
                pyro.sample("theta", make())

        guide = AutoNormal(model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        assert all(math.isfinite(svi.step()) for _ in range(3))
        assert make().support.check(guide()["theta"]).all()

    @makers
    def test_gradients_flow_through_rsample(self, make):
        d = make(3)
        if make is normal_wishart:
            leaves = [d.loc, d.concentration, d.df, d.scale_tril]
        else:
            leaves = [d.loc, d.concentration, d.gamma_shape, d.rate]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        if make is normal_wishart:
            d = NormalWishart(*leaves[:3], scale_tril=leaves[3])
        else:
            d = NormalGamma(*leaves)
        for output in (d.rsample((7,)), kl_divergence(d, make(3, seed=1)), d.entropy()):
            grads = torch.autograd.grad(
                output.sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            assert all(grad.isfinite().all() for grad in grads)
            assert all((grad != 0).any() for grad in grads[1:])

    @makers
    def test_pathwise_gradient_of_the_mean(self, make):
        """d E[Λ] / d df = V and d E[τ] / d shape = 1 / rate, within 5 standard errors."""
        d = make()
        samples = 20_000
        if make is normal_wishart:
            df = d.df.expand(samples).clone().requires_grad_()
            draws = NormalWishart(d.loc, d.concentration, df, d.covariance_matrix).rsample()[
                :, 0, 1
            ]
            (grad,) = torch.autograd.grad(draws.sum(), df)
            truth = d.covariance_matrix[0, 0]
        else:
            shape = d.gamma_shape.expand(samples).clone().requires_grad_()
            draws = NormalGamma(d.loc, d.concentration, shape, d.rate).rsample()[:, 1]
            (grad,) = torch.autograd.grad(draws.sum(), shape)
            truth = 1 / d.rate
        assert_within(grad, truth)


class TestMoments:
    @pytest.mark.parametrize(
        "d",
        [
            normal_wishart(dim=1, df=14.0),
            normal_wishart(dim=3, df=17.0),
        ]
        + [NormalGamma(tensor(2.0), 0.5, 6.0, 3.0)],
        ids=["wishart1", "wishart3", "gamma"],
    )
    def test_mean_and_variance(self, d):
        """First moments and squared deviations of 20,000 draws, within 5 standard errors."""
        draws = d.sample((20_000,))
        assert_within(draws, d.mean, "mean")
        assert_within((draws - d.mean).square(), d.variance, "variance")

    @pytest.mark.parametrize("d", [normal_wishart(dim=3), normal_gamma()], ids=["wishart", "gamma"])
    def test_entropy(self, d):
        assert_within(-d.log_prob(d.sample((20_000,))), d.entropy())

    @pytest.mark.parametrize(("dim", "df"), [(1, 0.5), (2, 1.5), (3, 2.5), (3, 3.0), (5, 40.0)])
    def test_log_determinant(self, dim, df):
        """E log|Λ| = Σ digamma((df - i)/2) + D log 2 + log|V|, within 5 standard errors."""
        d = normal_wishart(dim=dim, df=df)
        draws = torch.linalg.slogdet(d.sample((20_000,))[..., 1:]).logabsdet
        truth = sum(scipy.special.digamma((df - i) / 2) for i in range(dim)) + dim * math.log(2)
        assert_within(draws, truth + torch.linalg.slogdet(d.covariance_matrix).logabsdet)

    def test_marginal_distributions(self):
        """Kolmogorov-Smirnov: Λ_11 / V_11 ~ chi2(df); μ_1 is t with df - D + 1 degrees."""
        d = normal_wishart(dim=3, df=5.5)
        draws = d.sample((5_000,))
        chi2 = (draws[:, 0, 1] / d.covariance_matrix[0, 0]).numpy()
        assert scipy.stats.kstest(chi2, scipy.stats.chi2(5.5).cdf).pvalue > 1e-3
        freedom = 5.5 - 3 + 1
        scale = (d.precision_matrix[1, 1] / (d.concentration * freedom)).sqrt()
        t = ((draws[:, 1, 0] - d.loc[1]) / scale).numpy()
        assert scipy.stats.kstest(t, scipy.stats.t(freedom).cdf).pvalue > 1e-3

    def test_mean_given_precision(self):
        """κ Λ (μ - loc)(μ - loc)ᵀ has expectation I, also where Λ is large or small."""
        d = normal_wishart(dim=3, df=8.0)
        draws = d.sample((40_000,))
        offset, precision = (draws[..., 0] - d.loc).unsqueeze(-1), draws[..., 1:]
        products = d.concentration * precision @ offset @ offset.mT
        large = torch.linalg.slogdet(precision).logabsdet > math.log(300 * spd(dim=3).det())
        assert 0.1 < large.double().mean() < 0.9
        for chosen in (products[large], products[~large]):
            assert_within(chosen, torch.eye(3, dtype=torch.float64))

    @pytest.mark.parametrize(
        ("df", "mean_exists", "variance"),
        [(1.5, False, "nan"), (2.0, False, "nan"), (2.5, True, "inf"), (3.0, True, "inf")],
    )
    def test_moments_that_do_not_exist(self, df, mean_exists, variance):
        for d in (
            normal_wishart(dim=2, df=df),
            NormalGamma(tensor(1.0), 1.0, (df - 1) / 2, 1.0),  # as many degrees of freedom
        ):
            mean, spread = (m[..., 0] if m.dim() > 1 else m[:1] for m in (d.mean, d.variance))
            assert torch.isfinite(mean).all() if mean_exists else torch.isnan(mean).all()
            assert torch.isinf(spread).all() if variance == "inf" else torch.isnan(spread).all()
            assert (
                torch.isfinite(d.mean[..., 1:]).all() and torch.isfinite(d.variance[..., 1:]).all()
            )


class TestNormalWishart:
    @pytest.mark.parametrize("dim", [1, 2, 5])
    def test_log_prob_against_scipy(self, dim):
        d = normal_wishart(dim=dim)
        for value in d.sample((5,)):
            assert d.log_prob(value).item() == pytest.approx(composed_log_prob(d, value), rel=1e-9)

    @pytest.mark.parametrize("dim", [1, 2, 5])
    def test_log_prob_against_torch(self, dim):
        d = normal_wishart(4, dim=dim)
        value = d.sample((6,))
        precision = d.concentration[:, None, None] * value[..., 1:]
        expected = Wishart(d.df, d.covariance_matrix).log_prob(value[..., 1:])
        expected = expected + MultivariateNormal(d.loc, precision_matrix=precision).log_prob(
            value[..., 0]
        )
        torch.testing.assert_close(d.log_prob(value), expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("name", CHOICES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_three_ways_to_give_the_matrix(self, name, dtype):
        reference = Wishart(tensor(9.0, dtype=dtype), spd(4, dim=3, dtype=dtype))
        matrix = getattr(reference, name)
        d = NormalWishart(torch.zeros(3, dtype=dtype), 2.0, 9.0, **{name: matrix})
        assert d.batch_shape == (4,)
        for other in CHOICES:
            torch.testing.assert_close(getattr(d, other), getattr(reference, other))
            torch.testing.assert_close(
                getattr(d.expand((2, 4)), other)[1], getattr(reference, other)
            )

    def test_parameters_broadcast(self):
        d = NormalWishart(
            torch.zeros(5, 1, 1, 2), torch.ones(4, 1), 3 * torch.ones(3), scale_tril=torch.eye(2)
        )
        assert d.batch_shape == (5, 4, 3)
        assert d.sample((2,)).shape == (2, 5, 4, 3, 2, 3)
        assert d.loc.shape == (5, 4, 3, 2) and d.df.shape == (5, 4, 3)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("dim", [1, 2, 10, 30])
    def test_low_df_draws_are_legal_and_silent(self, dim, dtype):
        """df just above D - 1: torch's Wishart warns here, and draws singular matrices."""
        for excess in (0.05, 0.5):
            d = normal_wishart(dim=dim, df=dim - 1 + excess, dtype=dtype)
            value = d.sample((2000 // dim,))
            assert d.support.check(value).all()
            assert d.log_prob(value).isfinite().all()

    def test_support(self):
        d = normal_wishart(dim=2)
        good = d.sample((3,))
        asymmetric, indefinite, infinite, missing = (good.clone() for _ in range(4))
        asymmetric[0, 0, 2] += 0.1
        indefinite[0, :, 1:] *= -1
        infinite[0, 0, 0] = math.inf
        missing[0, 1, 2] = math.nan
        assert d.support.event_dim == 2
        for value in (asymmetric, indefinite, infinite, missing):
            assert d.support.check(value).tolist() == [False, True, True]
            with pytest.raises(ValueError, match="support"):
                d.log_prob(value)

    @pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
    def test_support_does_not_depend_on_the_unit(self, unit):
        value = normal_wishart(dim=3).sample() * unit
        crooked = value.clone()
        crooked[0, 2] *= 1.01
        support = NormalWishart.support
        assert support.check(value) and not support.check(crooked)

    @pytest.mark.parametrize("dim", [1, 2, 4])
    def test_bijection(self, dim):
        transform = biject_to(NormalWishart.support)
        length = dim * (dim + 3) // 2
        x = torch.randn(6, length, dtype=torch.float64)
        y = transform(x)
        assert y.shape == transform.forward_shape(x.shape) and transform.codomain.check(y).all()
        assert transform.inverse_shape(y.shape) == x.shape
        torch.testing.assert_close(transform.inv(y.clone()), x)
        i, j = torch.tril_indices(dim, dim)

        def lower_triangle(vector):
            value = transform(vector)
            return torch.cat([value[:, 0], value[i, j + 1]])

        for vector, log_det in zip(x, transform.log_abs_det_jacobian(x, y), strict=True):
            jacobian = torch.autograd.functional.jacobian(lower_triangle, vector)
            torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_det)

    def test_bijection_rejects_an_impossible_length(self):
        with pytest.raises(ValueError, match="got 4"):
            biject_to(NormalWishart.support)(torch.zeros(4))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"covariance_matrix": None}, "exactly one of"),
            ({"scale_tril": torch.eye(2)}, "exactly one of"),
            ({"loc": torch.tensor(0.0)}, "loc: expected shape"),
            ({"loc": torch.zeros(3)}, r"covariance_matrix: expected .* D = 3 .* got \(2, 2\)"),
            ({"covariance_matrix": torch.ones(2)}, "covariance_matrix: expected shape"),
            ({"loc": torch.zeros(3, 2), "df": torch.ones(4)}, r"loc \(3,\).* df \(4,\)"),
            ({"df": 1.0}, "parameter df"),
            ({"df": torch.tensor([5.0, 0.5])}, "parameter df"),
            ({"concentration": 0.0}, "parameter concentration"),
            ({"loc": torch.tensor([0.0, math.nan])}, "parameter loc"),
            ({"covariance_matrix": -torch.eye(2)}, "parameter covariance_matrix"),
            ({"covariance_matrix": None, "precision_matrix": -torch.eye(2)}, "precision_matrix"),
            ({"covariance_matrix": None, "scale_tril": torch.ones(2, 2)}, "scale_tril"),
        ],
    )
    def test_errors(self, change, message):
        arguments = {"loc": torch.zeros(2), "concentration": 1.0, "df": 3.0}
        arguments = arguments | {"covariance_matrix": torch.eye(2)} | change
        with pytest.raises(ValueError, match=message):
            NormalWishart(**arguments, validate_args=True)

    def test_signature(self):
        names = list(inspect.signature(NormalWishart).parameters)
        assert names == ["loc", "concentration", "df", *CHOICES, "validate_args"]


class TestNormalGamma:
    @pytest.mark.parametrize("shape", [0.7, 1.0, 4.0, 60.0])
    def test_normalised_and_entropy_by_quadrature(self, shape):
        """Simpson's rule over log τ and the mean in units of its conditional deviation."""
        d = NormalGamma(tensor(1.5), 2.5, shape, 3.0)
        middle, width = math.log(shape / 3), 12 / shape**0.5
        log_tau = torch.linspace(middle - 3 * width, middle + width, 2001, dtype=torch.float64)
        z = torch.linspace(-10, 10, 201, dtype=torch.float64)
        deviation = (2.5 * log_tau.exp()).rsqrt()
        mean = d.loc + z * deviation.unsqueeze(-1)
        value = torch.stack([mean, log_tau.exp().unsqueeze(-1).expand_as(mean)], dim=-1)
        log_prob = d.log_prob(value)
        measure = log_prob.exp() * (deviation * log_tau.exp()).unsqueeze(-1)

        def integral(density):
            inner = scipy.integrate.simpson(density.numpy(), x=z.numpy(), axis=-1)
            return scipy.integrate.simpson(inner, x=log_tau.numpy())

        assert integral(measure) == pytest.approx(1, rel=1e-8)
        assert integral(-measure * log_prob) == pytest.approx(d.entropy().item(), rel=1e-7)

    def test_log_prob_against_scipy(self):
        d = normal_gamma()
        for mean, precision in d.sample((10,)):
            gamma = scipy.stats.gamma(d.gamma_shape.item(), scale=1 / d.rate.item())
            normal = scipy.stats.norm(d.loc.item(), (d.concentration * precision).item() ** -0.5)
            expected = gamma.logpdf(precision.item()) + normal.logpdf(mean.item())
            assert d.log_prob(torch.stack([mean, precision])).item() == pytest.approx(expected)

    def test_is_the_normal_wishart_of_one_dimension(self):
        gammas = normal_gamma(3), normal_gamma(3, seed=1)
        wisharts = [
            NormalWishart(
                g.loc.unsqueeze(-1),
                g.concentration,
                2 * g.gamma_shape,
                covariance_matrix=(0.5 / g.rate)[..., None, None],
            )
            for g in gammas
        ]
        value = gammas[0].sample((4,))
        for of_gamma, of_wishart in [
            (gammas[0].log_prob(value), wisharts[0].log_prob(value.unsqueeze(-2))),
            (gammas[0].entropy(), wisharts[0].entropy()),
            (gammas[0].mean, wisharts[0].mean.squeeze(-2)),
            (gammas[0].variance, wisharts[0].variance.squeeze(-2)),
            (kl_divergence(*gammas), kl_divergence(*wisharts)),
        ]:
            torch.testing.assert_close(of_gamma, of_wishart, equal_nan=True)

    def test_numbers_broadcast(self):
        d = NormalGamma(0.0, torch.ones(3, 1), 2.0, torch.ones(4))
        assert d.batch_shape == d.gamma_shape.shape == (3, 4)

    def test_shape_stays_a_method(self):
        """Pyro calls ``d.shape()``; the parameter is kept as ``gamma_shape``."""
        d = NormalGamma(0.0, 1.0, gamma_shape=2.0, rate=3.0)
        assert d.shape() == (2,) and d.gamma_shape == 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rate": -1.0}, "parameter rate"),
            ({"gamma_shape": 0.0}, "parameter gamma_shape"),
            ({"concentration": torch.tensor([1.0, -1.0])}, "parameter concentration"),
            ({"loc": math.nan}, "parameter loc"),
            ({"loc": torch.zeros(3), "rate": torch.ones(2)}, r"loc \(3,\), rate \(2,\)"),
        ],
    )
    def test_errors(self, change, message):
        arguments = {"loc": 0.0, "concentration": 1.0, "gamma_shape": 2.0, "rate": 3.0} | change
        with pytest.raises(ValueError, match=message):
            NormalGamma(**arguments, validate_args=True)

    def test_support(self):
        d = normal_gamma()
        with pytest.raises(ValueError, match="support"):
            d.log_prob(tensor([0.0, -1.0]))
        x = torch.randn(5, 2, dtype=torch.float64)
        transform = biject_to(d.support)
        y = transform(x)
        torch.testing.assert_close(y, torch.stack([x[:, 0], x[:, 1].exp()], -1))
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), x[:, 1])


def exact_kl_same_mean(p_df, q_df, dim):
    """KL between Wisharts of equal mean by the textbook formula, in 60 digits."""
    with mpmath.workdps(60):
        p, q = mpmath.mpf(p_df), mpmath.mpf(q_df)
        total = dim * (q - p) / 2 + dim * q / 2 * mpmath.log(p / q)
        for i in range(dim):
            a, b = (p - i) / 2, (q - i) / 2
            total += mpmath.loggamma(b) - mpmath.loggamma(a) + (a - b) * mpmath.digamma(a)
        return float(total)


class TestKL:
    @pytest.mark.parametrize("dim", [1, 2, 4])
    def test_wishart_against_monte_carlo(self, dim):
        p, q = normal_wishart(dim=dim), normal_wishart(dim=dim, seed=1)
        draws = p.sample((20_000,))
        assert_within(p.log_prob(draws) - q.log_prob(draws), kl_divergence(p, q))

    def test_gamma_against_monte_carlo(self):
        p, q = normal_gamma(), normal_gamma(seed=1)
        draws = p.sample((20_000,))
        assert_within(p.log_prob(draws) - q.log_prob(draws), kl_divergence(p, q))

    @pytest.mark.parametrize("dim", [1, 2, 5])
    def test_wishart_part_against_torch(self, dim):
        """Unbatched: torch 2.13 sums wrongly over the batch of a Wishart KL."""
        p, q = normal_wishart(3, dim=dim), normal_wishart(3, dim=dim, seed=1)
        q = NormalWishart(p.loc, p.concentration, q.df, q.covariance_matrix)
        for i, ours in enumerate(kl_divergence(p, q)):
            theirs = kl_divergence(
                Wishart(p.df[i], p.covariance_matrix[i]), Wishart(q.df[i], q.covariance_matrix[i])
            )
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-11)

    def test_gamma_part_against_torch(self):
        p, q = normal_gamma(5), normal_gamma(5, seed=1)
        q = NormalGamma(p.loc, p.concentration, q.gamma_shape, q.rate)
        theirs = kl_divergence(Gamma(p.gamma_shape, p.rate), Gamma(q.gamma_shape, q.rate))
        torch.testing.assert_close(kl_divergence(p, q), theirs, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("ratio", [0.1, 7.0])
    def test_ratio_of_concentrations(self, ratio):
        """With Wisharts alike it is E[KL(N ‖ N)]: D/2 (r - 1 - log r), r = κ_q / κ_p."""
        p = normal_wishart(dim=3)
        q = NormalWishart(p.loc, ratio * p.concentration, p.df, p.covariance_matrix)
        precision = p.sample()[:, 1:]
        normals = [
            MultivariateNormal(d.loc, precision_matrix=d.concentration * precision) for d in (p, q)
        ]
        torch.testing.assert_close(kl_divergence(p, q), kl_divergence(*normals))

    @makers
    def test_broadcasts(self, make):
        p, q = make(4, 1), make(3, seed=1)
        matrix = kl_divergence(p, q)
        assert matrix.shape == (4, 3)
        wide_p, wide_q = p.expand((4, 3)), q.expand((4, 3))
        torch.testing.assert_close(matrix, kl_divergence(wide_p, wide_q))

    @pytest.mark.parametrize("dim", [1, 3, 10])
    @pytest.mark.parametrize(
        ("above", "other"), [(0.5, 0.1), (0.01, 1e3), (12, 9.5), (1e3, 1.1e3), (1e7, 1e7 + 1e4)]
    )
    def test_degrees_of_freedom_to_nine_digits(self, dim, above, other):
        """The textbook formula in float64 has lost all but 3 digits at df = 1e7."""
        for p_df, q_df in [(dim - 1 + above, dim - 1 + other), (dim - 1 + other, dim - 1 + above)]:
            loc, eye = torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
            p = NormalWishart(loc, 1.0, p_df, eye / p_df)
            q = NormalWishart(loc, 1.0, q_df, eye / q_df)
            exact = exact_kl_same_mean(p_df, q_df, dim)
            assert kl_divergence(p, q).item() == pytest.approx(exact, rel=1e-9)
            gammas = [NormalGamma(tensor(0.0), 1.0, df / 2, df / 2) for df in (p_df, q_df)]
            if dim == 1:
                assert kl_divergence(*gammas).item() == pytest.approx(exact, rel=1e-9)

    @pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
    @pytest.mark.parametrize("shift", [0.0, 1e6])
    def test_unchanged_by_units_and_origin(self, scale, shift):
        """A common affine map x -> scale x + shift leaves the divergence as it is."""
        p, q = normal_wishart(dim=3), normal_wishart(dim=3, seed=1)
        moved = [
            NormalWishart(
                scale * (d.loc + shift), d.concentration, d.df, d.covariance_matrix / scale**2
            )
            for d in (p, q)
        ]
        torch.testing.assert_close(kl_divergence(*moved), kl_divergence(p, q), rtol=1e-8, atol=0)

    @given(
        seeds=st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)),
        dim=st.integers(1, 6),
        excess=st.tuples(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6)),
        dtype=st.sampled_from(DTYPES),
    )
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_never_negative_and_zero_at_itself(self, seeds, dim, excess, dtype):
        p, q = (
            normal_wishart(dim=dim, df=dim - 1 + e, seed=s, dtype=dtype)
            for e, s in zip(excess, seeds, strict=True)
        )
        assert kl_divergence(p, q) >= 0
        near = NormalWishart(p.loc, p.concentration, p.df * (1 + 1e-6), scale_tril=p.scale_tril)
        eps = torch.finfo(dtype).eps
        assert kl_divergence(p, near) >= -eps
        assert kl_divergence(p, p).abs() <= eps
        gammas = [NormalGamma(d.loc[0], d.concentration, d.df, d.df / 2) for d in (p, q)]
        assert kl_divergence(*gammas) >= -eps and kl_divergence(gammas[0], gammas[0]) == 0

    @pytest.mark.parametrize("x", [0.01, 1.0, 9.99, 10.0, 10.01, 12.0, 100.0, 1e6])
    def test_rest_of_stirlings_formula(self, x):
        value, slope = (float(f(tensor(x))) for f in (stirling_rest, stirling_rest_slope))
        with mpmath.workdps(60):
            z = mpmath.mpf(x)
            formula = (z - 0.5) * mpmath.log(z) - z + mpmath.log(2 * mpmath.pi) / 2
            exact = float(mpmath.loggamma(z) - formula)
            exact_slope = float(mpmath.digamma(z) - mpmath.log(z) + 1 / (2 * z))
        assert value == pytest.approx(exact, rel=1e-14, abs=2e-14)
        assert slope == pytest.approx(exact_slope, rel=1e-14, abs=2e-14)

    def test_event_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"q: expected event shape \(2, 3\)"):
            kl_divergence(normal_wishart(dim=2), normal_wishart(dim=3))

    def test_pyro_distributions_too(self):
        assert isinstance(normal_gamma(), dist.TorchDistribution)
        assert isinstance(normal_wishart(), dist.TorchDistribution)
