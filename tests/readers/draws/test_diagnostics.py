# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""R-hat and effective sample size against ArviZ and Pyro; what a projection loses against closed
forms and quadrature."""

import math
import warnings
from typing import Any

import numpy as np
import pyro.distributions as dist
import pyro.ops.stats
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from torch.distributions import constraints

from pyro_fusion import Posterior
from pyro_fusion.families import Factor
from pyro_fusion.readers.draws import read_draws
from pyro_fusion.readers.draws.diagnostics import effective_sample_size, normal_scores, split_r_hat
from pyro_fusion.readers.draws.projection_loss import dependence, marginal_losses, standard_normals


def autoregressive(chains: int, n: int, rho: float, size: int = 3) -> Tensor:
    noise = torch.randn(chains, n, size, dtype=torch.float64)
    x = noise.clone()
    for i in range(1, n):
        x[:, i] = rho * x[:, i - 1] + (1 - rho**2) ** 0.5 * noise[:, i]
    return x


@pytest.fixture(scope="module")
def az() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("arviz")


CHAINS = [(4, 300, 0.5), (2, 501, 0.9), (4, 200, 0.0), (2, 400, -0.4)]


class TestChains:
    @pytest.mark.parametrize(("chains", "n", "rho"), CHAINS)
    def test_as_arviz(self, az, chains, n, rho):
        x = autoregressive(chains, n, rho).exp()  # a tail that ranks have not
        x[0, : n // 4] += 0.2
        rhat, ess = split_r_hat(x), effective_sample_size(x)
        for d in range(3):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = (az.rhat(x[..., d].numpy()), az.ess(x[..., d].numpy()))
            assert float(rhat[d]) == pytest.approx(float(theirs[0]), abs=2e-4)
            assert float(ess[d]) == pytest.approx(float(theirs[1]), rel=0.02)

    def test_as_arviz_was(self):
        """Numbers of ArviZ 0.23.4, for where it is not installed."""
        noise = np.random.default_rng(0)
        noise.normal(size=(2, 200, 40))
        x = noise.normal(size=(2, 200, 3))
        for i in range(1, 200):
            x[:, i] += np.array([0.0, 0.5, -0.5]) * x[:, i - 1]
        x[0, :, 0] += 0.5
        rhat, ess = split_r_hat(torch.tensor(x)), effective_sample_size(torch.tensor(x))
        assert rhat.tolist() == pytest.approx([1.040999, 1.004419, 1.005289], abs=1e-6)
        # The first chain is shifted, and its correlations last: ArviZ stops before the last lags.
        assert ess.tolist() == pytest.approx([51.9947, 119.0388, 1040.8240], rel=0.03)
        assert ess[1:].tolist() == pytest.approx([119.0388, 1040.8240], rel=1e-5)

    @pytest.mark.parametrize(("chains", "n", "rho"), CHAINS)
    def test_as_pyro(self, chains, n, rho):
        """Pyro's, of the normal scores of half chains."""
        x = autoregressive(chains, n - n % 4, rho)
        half = x.shape[1] // 2
        halves = torch.cat([x[:, :half], x[:, half:]])
        z = normal_scores(halves.flatten(0, 1)).reshape(halves.shape)
        if 0 <= rho < 0.6:  # else they differ at long lags, and where the sequence ends
            theirs = pyro.ops.stats.effective_sample_size(z)
            torch.testing.assert_close(effective_sample_size(x), theirs, rtol=0.05, atol=0)
        bulk = pyro.ops.stats.gelman_rubin(z)
        assert (split_r_hat(x) >= bulk - 1e-12).all()

    def test_of_autoregression(self):
        """Its autocorrelation time is (1 + ρ) / (1 - ρ)."""
        x = autoregressive(8, 4000, 0.6, size=6)
        ess = effective_sample_size(x) * (1.6 / 0.4) / (8 * 4000)
        assert (ess - 1).abs().max() < 0.1

    def test_chains_of_other_widths(self):
        """The mean is the same: only folding tells."""
        x = torch.randn(4, 500, 1, dtype=torch.float64)
        x[0] *= 4
        assert float(split_r_hat(x)) > 1.1

    def test_by_blocks(self, monkeypatch):
        x = autoregressive(2, 100, 0.3, size=7)
        whole = split_r_hat(x), effective_sample_size(x)
        monkeypatch.setattr("pyro_fusion.readers.draws.diagnostics._BLOCK", 500)
        assert torch.equal(split_r_hat(x), whole[0])
        torch.testing.assert_close(effective_sample_size(x), whole[1])

    def test_ties_have_their_mean_rank(self):
        z = normal_scores(torch.tensor([[1.0], [5.0], [5.0], [7.0]]))
        assert z[1] == z[2]
        torch.testing.assert_close(float(z[1]), 0.0)
        torch.testing.assert_close(z[0], -z[3])


FAMILIES: dict[str, Any] = {
    "Normal": dist.Normal(torch.tensor([1.0, -3.0]), torch.tensor([0.1, 5.0])),
    "LogNormal": dist.LogNormal(torch.tensor([1.0, -3.0]), torch.tensor([0.1, 2.0])),
    "MultivariateNormal": dist.MultivariateNormal(
        torch.tensor([1.0, 2.0, 3.0]),
        scale_tril=torch.tensor([[1.0, 0, 0], [2.0, 0.3, 0], [-1, 0.5, 0.2]]),
    ),
    "Gamma": dist.Gamma(torch.tensor([0.3, 40.0]), torch.tensor([2.0, 0.1])),
    "InverseGamma": dist.InverseGamma(torch.tensor([3.0, 8.0]), 2.0),
    "Exponential": dist.Exponential(torch.tensor([3.0, 0.1])),
    "Beta": dist.Beta(torch.tensor([0.5, 30.0]), torch.tensor([3.0, 2.0])),
    "Dirichlet": dist.Dirichlet(torch.tensor([[0.5, 3.0, 9.0], [1.0, 20.0, 2.0]])),
}


class TestLost:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_nothing_where_the_family_is_right(self, name):
        d = FAMILIES[name]
        z = standard_normals(Factor.of(d), d.expand(d.batch_shape).sample([4000]).double())
        z = z.flatten(1)
        # Kolmogorov and Smirnov's 99.99 % quantile is 2.2 / √n.
        uniform = torch.special.ndtr(z).sort(0).values
        steps = torch.arange(1, 4001) / 4000
        assert (uniform - steps.unsqueeze(1)).abs().max() < 2.3 / math.sqrt(4000)
        # Of 4000 spacings of 63, a number's standard deviation is 0.002.
        assert marginal_losses(z).abs().max() < 0.01
        assert abs(float(dependence(z))) < 0.01

    def test_far_out(self):
        """Tails in which one probability is 1 to all digits."""
        z = standard_normals(
            Factor.of(dist.Gamma(torch.tensor(50.0, dtype=torch.float64), 1.0)),
            torch.tensor([1.0, 50.0, 400.0], dtype=torch.float64),
        )
        assert torch.isfinite(z).all()
        assert float(z[0, 0]) < -10
        assert float(z[2, 0]) > 10

    @pytest.mark.parametrize("rho", [0.3, 0.8])
    def test_correlation_of_a_gaussian(self, rho):
        """KL to the product of its marginals is -½ log det R."""
        r = torch.full((4, 4), rho) + (1 - rho) * torch.eye(4)
        draws = {"x": dist.MultivariateNormal(torch.zeros(4), 3 * r).sample([4000])}
        exact = -0.5 * float(torch.logdet(r))
        if exact > 0.4:
            with pytest.warns(UserWarning, match=r"loses \d.\d nats of 'x' \(4 numbers\)"):
                reading = read_draws(draws)
        else:
            reading = read_draws(draws)
        assert reading.lost["x"] == pytest.approx(exact, abs=0.06)
        joint = read_draws(draws, families="MultivariateNormal")
        assert joint.lost["x"] < 0.02

    @pytest.mark.parametrize("shape", [0.5, 4.0])
    def test_gamma_as_a_normal_behind_exp(self, shape):
        truth = dist.Gamma(shape, 1.0)
        draws = {"x": truth.sample([8000]).double().clamp(min=1e-30)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as it may lose more than a tenth
            reading = read_draws(draws, supports={"x": constraints.positive})
        f = reading.posterior.decomposed["x"].params
        loc, scale = float(f["loc"]), float(f["scale"])

        def integrand(y: float) -> float:  # of y = log x
            p = shape * y - math.exp(y) - math.lgamma(shape)
            q = -0.5 * ((y - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)
            return math.exp(p) * (p - q)

        exact = quad(integrand, -60, 6, limit=500)[0]
        assert exact > 0.02
        assert reading.lost["x"] == pytest.approx(exact, rel=0.3)
        gamma = read_draws(draws, families=dist.Gamma)
        assert gamma.lost["x"] < 0.01

    def test_two_modes(self):
        x = 0.3 * torch.randn(4000) + torch.where(torch.rand(4000) < 0.5, -1.0, 1.0)
        with pytest.warns(UserWarning, match=r"loses 0.\d nats of 'x' \(1 numbers\)"):
            reading = read_draws({"x": x})
        assert reading.lost["x"] == pytest.approx(0.555, abs=0.05)  # by quadrature

    def test_ties(self):
        """Rounded, or repeated as where proposals are refused, draws lose no more than they did."""
        x = torch.randn(4000, dtype=torch.float64)
        for draws in (0.05 * (2 * x).round(), (1000 + x).half(), x[:200].repeat_interleave(20)):
            assert read_draws({"x": draws}).lost["x"] < 0.05
        skewed = -torch.rand(4000, dtype=torch.float64).log()
        with pytest.warns(UserWarning, match=r"loses 0.\d nats of 'x'"):
            exact, rounded = (
                read_draws({"x": y}).lost["x"] for y in (skewed, (10 * skewed).round() / 10)
            )
        assert rounded == pytest.approx(exact, abs=0.05)

    def test_constant_after_thinning(self):
        x = torch.randn(400, 2, dtype=torch.float64)
        x[:, 1] = 0
        assert abs(float(dependence(x))) < 0.02

    def test_between_sites(self):
        a = torch.randn(4000, 2)
        b = 0.9 * a + math.sqrt(1 - 0.81) * torch.randn(4000, 2)
        with pytest.warns(UserWarning, match=r"sites depend on each other, and 1.\d nats"):
            reading = read_draws({"a": a, "b": b})
        assert reading.lost_between == pytest.approx(-math.log(1 - 0.81), abs=0.1)
        assert max(reading.lost.values()) < 0.02

    def test_correlated_draws_look_no_worse(self):
        """Chains are thinned to their effective number."""
        x = autoregressive(2, 3000, 0.95, size=2)
        assert read_draws({"x": x}, group_by_chain=True, min_ess=20).lost["x"] < 0.15

    def test_too_many_numbers_for_correlations(self):
        """A hundred draws say nothing of the correlations of 50 numbers; of two of a component they
        do."""
        x = torch.randn(150, 50, 1).expand(150, 50, 2) + 0.1 * torch.randn(150, 50, 2)
        x = x + 10 * torch.arange(50).unsqueeze(1)
        with pytest.warns(UserWarning, match="nats of 'x'"):
            within = read_draws({"x": x}, axes={"x": ("c", None)}, min_ess=None).lost["x"]
        shared = read_draws({"x": x.flatten(1)}, min_ess=None).lost["x"]
        exact = -50 * 0.5 * math.log(1 - (1 / 1.01) ** 2)
        assert within == pytest.approx(exact, rel=0.1)
        assert shared < 5

    def test_a_family_of_which_nothing_is_known(self):
        root = torch.randn(500, 2, 9, dtype=torch.float64)
        reading = read_draws({"x": root @ root.mT}, families="Wishart")
        assert math.isnan(reading.lost["x"])
        assert "nan" in str(reading)
        assert float(reading.posterior.decomposed["x"].params["df"]) == pytest.approx(9, rel=0.3)


def test_nothing_is_lost_of_what_is_handed_over() -> None:
    """A stick-breaking simplex with a label is a Dirichlet, and that is what is measured."""
    d = dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0]))
    draws = {"w": d.sample([3000])}
    labelled = read_draws(draws, supports={"w": constraints.simplex}, axes={"w": "c"})
    assert labelled.lost["w"] < 0.01
    assert np.isfinite(labelled.ess["w"])
    assert isinstance(labelled.posterior, Posterior)
