# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Where float64 runs out of digits: large means and tiny scales, near-identical components,
concentrations of 1e-3 to 1e8. The truth is mpmath's, at 50 digits, of the float64 parameters."""

import contextlib
import itertools
import math

import mpmath
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_fusion import families
from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor, NormalGamma, NormalWishart, kl, pairwise_kl, special
from pyro_fusion.families.projection import project_draws
from pyro_fusion.families.special import (
    _dirichlet_nested,
    _dirichlet_newton,
    dirichlet_concentration,
    excess,
    gamma_concentration,
    log_minus_digamma,
    stirling_kl,
)

mpmath.mp.dps = 50
mpf = mpmath.mpf

# A divergence below this is nothing to an assignment, and is compared absolutely.
NEGLIGIBLE = 1e-6
RELATIVE = 1e-6


def tensor(*args):
    return torch.tensor(*args, dtype=torch.float64)


# -- divergences at 50 digits -----------------------------------------------------------------


def normal_truth(p, q):
    (m, s), (n, t) = [[mpf(x) for x in v] for v in (p, q)]
    return mpmath.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - mpf(1) / 2


def gamma_truth(p, q):
    (a, r), (b, s) = [[mpf(x) for x in v] for v in (p, q)]
    return (
        (a - b) * mpmath.digamma(a)
        - mpmath.loggamma(a)
        + mpmath.loggamma(b)
        + b * mpmath.log(r / s)
        + a * (s - r) / r
    )


def dirichlet_truth(p, q):
    a, b = [[mpf(x) for x in v] for v in (p, q)]
    total = mpmath.digamma(sum(a))
    result = mpmath.loggamma(sum(a)) - mpmath.loggamma(sum(b))
    for x, y in zip(a, b, strict=True):
        result += mpmath.loggamma(y) - mpmath.loggamma(x)
        result += (x - y) * (mpmath.digamma(x) - total)
    return result


def mvn_truth(p, q):
    (m, s), (n, t) = [[mpmath.matrix(x) for x in v] for v in (p, q)]
    s, t = s * s.T, t * t.T
    inverse = mpmath.inverse(t)
    product, shift = inverse * s, n - m
    trace = product[0, 0] + product[1, 1]
    log_det = mpmath.log(mpmath.det(t) / mpmath.det(s))
    return (trace + (shift.T * inverse * shift)[0] - 2 + log_det) / 2


def normal_gamma_truth(p, q):
    (m, k, a, r), (n, l, b, s) = [[mpf(x) for x in v] for v in (p, q)]
    gaussian = (l / k - 1 - mpmath.log(l / k) + l * a / r * (m - n) ** 2) / 2
    return gaussian + gamma_truth((a, r), (b, s))


def wishart_truth(p, q):
    """Of 2 × 2 Wisharts, given as (df, scale_tril)."""
    (a, v), (b, w) = [(mpf(df), mpmath.matrix(x) * mpmath.matrix(x).T) for df, x in (p, q)]
    product = mpmath.inverse(w) * v

    def half_gamma(x, f):
        return f(x / 2) + f((x - 1) / 2)

    return (
        -b / 2 * mpmath.log(mpmath.det(product))
        + a / 2 * (product[0, 0] + product[1, 1] - 2)
        + half_gamma(b, mpmath.loggamma)
        - half_gamma(a, mpmath.loggamma)
        + (a - b) / 2 * half_gamma(a, mpmath.digamma)
    )


def assert_divergences(make, truth, parameters, other=None, relative=RELATIVE):
    """All pairs of ``parameters``, by the matrix product and one by one."""
    other = parameters if other is None else other
    expected = tensor([[float(truth(p, q)) for q in other] for p in parameters])
    p, q = make(parameters), make(other)
    i, j = torch.meshgrid(torch.arange(len(parameters)), torch.arange(len(other)), indexing="ij")
    one_by_one = kl(
        make([parameters[n] for n in i.flatten()]), make([other[n] for n in j.flatten()])
    )
    for result in (pairwise_kl(p, q), one_by_one.reshape(expected.shape)):
        torch.testing.assert_close(result, expected, rtol=relative, atol=relative * NEGLIGIBLE)
        assert bool((result >= 0).all())


def columns(make):
    return lambda rows: make(*tensor(rows).unbind(-1))


make_normal = columns(dist.Normal)
make_gamma = columns(dist.Gamma)
make_normal_gamma = columns(NormalGamma)


def make_mvn(rows):
    locs, trils = zip(*rows, strict=True)
    return dist.MultivariateNormal(tensor(locs), scale_tril=tensor(trils))


def make_wishart(rows):
    dfs, trils = zip(*rows, strict=True)
    return dist.Wishart(tensor(dfs), scale_tril=tensor(trils))


SIZES = [1e-3, 0.1, 1.0, 19.0, 21.0, 1e3, 1e6, 1e8]
NEAR = [1 - 1e-3, 1 - 1e-7, 1 + 1e-7, 1 + 3e-5, 1 + 1e-2]


class TestDivergences:
    def test_normal_far_from_the_origin(self):
        near = [(1e4 + 1e-4 * i, 1e-4 * (1 + 0.3 * i)) for i in range(5)]
        far = [(-1e4, 1e-4), (0.0, 1.0), (3.0, 1e4), (1e8, 1e-4), (1e4, 1e-8)]
        assert_divergences(make_normal, normal_truth, near + far)

    def test_normal_near_identical(self):
        rows = [(1e4, 1e-4)]
        rows += [
            (1e4 + 1e-4 * e, 1e-4 * f) for e, f in zip((1e-3, 0.01, 0, 0, 1), NEAR, strict=True)
        ]
        assert_divergences(make_normal, normal_truth, [(1e4, 1e-4), *rows, (-1e6, 2.0)])

    @given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-4, 4)), min_size=2, max_size=4))
    def test_normal_anywhere(self, rows):
        assert_divergences(make_normal, normal_truth, [(m, 10**s) for m, s in rows])

    def test_events_of_mixed_scales(self):
        """One coordinate far away and sharp, one wide: the divergences add up."""
        loc = tensor([[1e4, 0.0], [1e4 + 2e-4, 1.0], [-1e4, 5.0]])
        scale = tensor([[1e-4, 10.0], [2e-4, 9.0], [1.0, 1e-3]])
        d = dist.Normal(loc, scale).to_event(1)
        rows = [
            list(zip(m, s, strict=True)) for m, s in zip(loc.tolist(), scale.tolist(), strict=True)
        ]
        expected = tensor([[float(sum(map(normal_truth, p, q))) for q in rows] for p in rows])
        torch.testing.assert_close(pairwise_kl(d, d), expected, rtol=RELATIVE, atol=1e-12)

    def test_multivariate_normal(self):
        def row(m, s, t, correlation):
            return ([m, -m], [[s, 0.0], [t * correlation, t * (1 - correlation**2) ** 0.5]])

        rows = [
            row(1e4, 1e-4, 1e-4, 0.0),
            row(1e4 + 1e-4, 1.1e-4, 1e-4, 0.5),
            row(1e4, 1e-4 * (1 + 1e-3), 1e-4, 0.0),
            row(1e4, 1e-4, 1.0, 0.99999),
            row(1e4, 1e-4, 1.0, 0.999991),
            row(-1e4, 1.0, 10.0, -0.9),
            row(0.0, 1e2, 1e-4, 0.1),
        ]
        assert_divergences(make_mvn, mvn_truth, rows)

    def test_gamma(self):
        rows = [(c, r) for c in SIZES for r in (1e-4, 1.0)] + [(c, c) for c in SIZES]
        assert_divergences(make_gamma, gamma_truth, rows)

    @pytest.mark.parametrize("size", SIZES)
    def test_gamma_near_identical(self, size):
        rows = [(size * f, size * g) for f, g in itertools.product([1.0, *NEAR], [1.0, *NEAR])]
        assert_divergences(make_gamma, gamma_truth, rows[:1] + rows[7:], rows)

    def test_exponential_and_poisson_rates(self):
        rates = [1e-3, 1.0, 1e8, 1e8 * (1 + 1e-5), 1e8 * (1 + 1e-6)]

        def poisson(p, q):
            (a,), (b,) = ([mpf(x) for x in v] for v in (p, q))
            return a * mpmath.log(a / b) + b - a

        def exponential(p, q):
            return gamma_truth((1, *p), (1, *q))

        rows = [(r,) for r in rates]
        assert_divergences(columns(dist.Poisson), poisson, rows)
        assert_divergences(columns(dist.Exponential), exponential, rows)

    def test_beta_and_dirichlet(self):
        rows = [tuple(r) for r in itertools.product(SIZES[::2] + [1e8], repeat=2)]
        assert_divergences(columns(dist.Beta), dirichlet_truth, rows)
        assert_divergences(lambda r: dist.Dirichlet(tensor(r)), dirichlet_truth, rows)

    @pytest.mark.parametrize("size", SIZES)
    def test_dirichlet_near_identical(self, size):
        shape = [1.0, 0.3, 2.0, 5.0, 1e-2]
        rows = [tuple(size * x for x in shape)]
        rows += [tuple(size * x * f for x in shape) for f in NEAR]
        rows += [tuple(size * x * f for x, f in zip(shape, NEAR, strict=True))]
        rows += [tuple(size * x * f for x, f in zip(shape, NEAR[::-1], strict=True))]
        assert_divergences(lambda r: dist.Dirichlet(tensor(r)), dirichlet_truth, rows)

    def test_dirichlet_of_a_hundred_mixed(self):
        generator = torch.Generator().manual_seed(0)
        rows = 10 ** (11 * torch.rand(4, 100, generator=generator).double() - 3)
        other = rows * (1 + 1e-4 * torch.randn(4, 100, generator=generator).double())
        rows = torch.cat([rows, other]).tolist()
        assert_divergences(lambda r: dist.Dirichlet(tensor(r)), dirichlet_truth, rows)

    def test_normal_gamma(self):
        rows = [
            (1e4 + 1e-4 * i, k, a, r)
            for i, (k, a, r) in enumerate(
                [
                    (1.0, 2.0, 1e-8),
                    (1e8, 1e8, 1.0),
                    (1e8, 1.00001e8, 1.0),
                    (1e-3, 1e-3, 1e-3),
                    (1e3, 1e6, 1e6),
                    (1.001e3, 1.001e6, 1.001e6),
                ]
            )
        ]
        rows += [(-1e4, 1.0, 1.0, 1.0), (1e4, 1e8, 1e8, 1.0)]
        assert_divergences(make_normal_gamma, normal_gamma_truth, rows)

    def test_wishart(self):
        tril = [[1.0, 0.0], [0.7, 0.5]]
        rows = []
        for df in (1.001, 2.0, 20.0, 1e3, 1e6, 1e8):
            for f in (1.0, 1 + 1e-3, 1 + 1e-5):
                scaled = [[x / df**0.5 * f for x in row] for row in tril]
                rows += [(df, scaled), (1 + (df - 1) * f, scaled)]
        rows = [r for n, r in enumerate(rows) if n not in (6, 12)]
        with pytest.warns(UserWarning, match="Low df"):
            assert_divergences(make_wishart, wishart_truth, rows)

    def test_the_normal_wishart_of_one_dimension_is_a_normal_gamma(self):
        rows = tensor(
            [[1e4, 1e8, 1e8, 1.0], [1e4, 1.00001e8, 1e8, 1.0], [1e4 + 1e-4, 2.0, 3.0, 4.0]]
        )
        m, k, a, r = rows.unbind(-1)
        d = NormalWishart(m[:, None], k, 2 * a, scale_tril=(0.5 / r).sqrt()[:, None, None])
        torch.testing.assert_close(
            pairwise_kl(d, d), pairwise_kl(NormalGamma(m, k, a, r), NormalGamma(m, k, a, r))
        )

    def test_float32_far_from_the_origin(self):
        """The parameters are rounded, the divergence of the rounded ones is not spoiled."""
        loc = torch.tensor([1e4, 1e4 + 2**-9, -1e4, 0.0])
        scale = torch.tensor([1e-4, 2e-4, 1.0, 1e3])
        result = pairwise_kl(dist.Normal(loc, scale), dist.Normal(loc, scale))
        assert result.dtype == torch.float32
        rows = list(zip(loc.tolist(), scale.tolist(), strict=True))
        expected = tensor([[float(normal_truth(p, q)) for q in rows] for p in rows])
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-12)


class TestSpecial:
    """The functions that the divergences rest on."""

    GRID = [10 ** (k / 7) for k in range(-60, 70)] + [19.999, 20.0, 20.001]

    def test_excess(self):
        for x, y in itertools.product([1e-8, 0.3, 1.0, 1e8], NEAR + [1e-9, 0.4, 0.6, 1e9]):
            truth = mpf(x * y) / mpf(x) - 1 - mpmath.log(mpf(x * y) / mpf(x))
            result = excess(tensor(x * y), tensor(x))
            # The ratio has the rounding of x and y in it, to which near 1 it is sensitive.
            allowed = 1e-14 * float(truth) + 4e-16 * abs(y - 1)
            assert abs(float(result) - float(truth)) <= allowed

    def test_log_minus_digamma(self):
        truth = [float(mpmath.log(c) - mpmath.digamma(c)) for c in self.GRID]
        torch.testing.assert_close(
            log_minus_digamma(tensor(self.GRID)), tensor(truth), rtol=3e-13, atol=0
        )

    def test_stirling_kl(self):
        grid = [self.GRID[i] for i in range(0, len(self.GRID), 9)] + [20.0, 20.001]
        for a, b in itertools.product(grid, repeat=2):
            truth = float(gamma_truth((a, a), (b, b)))
            result = float(stirling_kl(tensor(a), tensor(b)))
            assert abs(result - truth) <= 1e-11 * truth + 1e-14

    def test_gamma_concentration(self):
        truth = tensor(self.GRID)
        s = tensor([float(mpmath.log(c) - mpmath.digamma(c)) for c in self.GRID])
        torch.testing.assert_close(gamma_concentration(s), truth, rtol=1e-12, atol=0)


def exponents(low, high, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (low + (high - low) * torch.rand(*shape, generator=generator).double())


def converted(d):
    """The factor there and back, once it is sure that its mean parameters came back."""
    f = Factor.of(d)
    back = f.from_mean(f.mean)
    # Mean parameters of which the largest part of an event is 1: what a KL can see.
    torch.testing.assert_close(back.mean, f.mean, rtol=1e-10, atol=1e-14)
    return f, back


def allowed(alpha):
    """That of a Dirichlet, as the class below says; of a part that is nearly all, the mean of the
    logarithm is the share of the others."""
    total, least = alpha.sum(-1, keepdim=True), alpha.amin(-1, keepdim=True)
    return 1e-11 + 1e-14 * total * (1 + 1 / least)


class TestConversions:
    """Mean parameters to distributions. What float64 mean parameters determine of a
    concentration c is about c · 1e-16 · (1 + |log mean|) of itself, relatively: log E[x] and
    E[log x] differ by 1/(2c)."""

    @pytest.mark.parametrize("rate", [1e-8, 1.0, 1e8])
    def test_gamma(self, rate):
        c = torch.cat([exponents(-3, 8, 300), tensor([1e-3, 1e8])])
        _f, back = converted(dist.Gamma(c, torch.full_like(c, rate)))
        error = (back.params["concentration"] / c - 1).abs()
        assert bool((error < 1e-12 + 1e-14 * c).all())

    @pytest.mark.parametrize("size", [2, 5, 100])
    @pytest.mark.parametrize("low, high", [(-3, -2), (-1, 1), (3, 4), (7.5, 8), (-3, 4)])
    def test_dirichlet(self, size, low, high):
        alpha = exponents(low, high, 20, size)
        _f, back = converted(dist.Dirichlet(alpha))
        error = (back.params["concentration"] / alpha - 1).abs()
        assert bool((error < allowed(alpha)).all())

    @pytest.mark.parametrize("size", [2, 5, 100])
    def test_dirichlet_of_all_magnitudes_at_once(self, size):
        alpha = exponents(-3, 8, 20, size)
        f = Factor.of(dist.Dirichlet(alpha))
        back = f.from_mean(f.mean)
        torch.testing.assert_close(back.mean, f.mean, rtol=1e-10, atol=1e-13)
        assert float(kl(f, back).max()) < 1e-9

    def test_beta(self):
        c = exponents(-3, 4, 2, 100)
        f, back = converted(dist.Beta(*c))
        for name in f.params:
            error = (back.params[name] / f.params[name] - 1).abs()
            assert bool((error < allowed(c.T).squeeze(-1)).all())

    def test_dirichlet_is_minkas_fixed_point(self):
        """Against an independent solver of the same equations."""
        alpha = exponents(-1, 1, 6, 4)
        t = Factor.of(dist.Dirichlet(alpha)).mean
        x = torch.ones_like(alpha)
        for _ in range(2000):
            y = torch.digamma(x.sum(-1, keepdim=True)) + t
            x = torch.where(y > -2.22, y.exp() + 0.5, -1 / (y + 0.5772156649))
            for _ in range(8):
                x = x - (torch.digamma(x) - y) / torch.polygamma(1, x)
        back = Factor.of(dist.Dirichlet(alpha)).from_mean(t).params["concentration"]
        torch.testing.assert_close(back, x, rtol=1e-8, atol=0)

    @pytest.mark.parametrize("dim", [1, 2, 5])
    def test_wishart(self, dim):
        above = torch.cat([exponents(-3, 8, 100), tensor([1e-3, 1e8])])
        generator = torch.Generator().manual_seed(dim)
        root = torch.randn(len(above), dim, dim, generator=generator).double()
        tril = torch.linalg.cholesky(root @ root.mT + torch.eye(dim)) / above[:, None, None].sqrt()
        with pytest.warns(UserWarning, match="Low df"):
            d = dist.Wishart(dim - 1 + above, scale_tril=tril)
        f = Factor.of(d)
        back = f.from_mean(f.mean)
        torch.testing.assert_close(back.mean, f.mean, rtol=1e-10, atol=1e-12)
        error = ((back.params["df"] - (dim - 1)) / above - 1).abs()
        assert bool((error < 1e-11 + 3e-14 * above + 1e-15 / above).all())

    def test_normal_wishart(self):
        above = torch.cat([exponents(-3, 8, 100), tensor([1e-3, 1e8])])
        n = len(above)
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(n, 2, 2, generator=generator).double()
        tril = torch.linalg.cholesky(root @ root.mT + torch.eye(2)) / above[:, None, None].sqrt()
        loc = torch.randn(n, 2, generator=generator).double()
        k = exponents(-3, 6, n)
        f = Factor.of(NormalWishart(loc, k, 1 + above, scale_tril=tril))
        back = f.from_mean(f.mean)
        torch.testing.assert_close(back.mean, f.mean, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(back.params["loc"], loc, rtol=1e-9, atol=1e-9)
        error = ((back.params["df"] - 1) / above - 1).abs()
        assert bool((error < 1e-11 + 3e-14 * above + 1e-15 / above).all())
        # 1/κ is what is left of E[mᵀΛm] when the mean's own part is taken away.
        part = 1 + k * (f.mean[:, 2] * -2)
        assert bool(((back.params["concentration"] / k - 1).abs() < 1e-12 * part).all())

    def test_normal_gamma(self):
        c = torch.cat([exponents(-3, 8, 200), tensor([1e-3, 1e8])])
        n = len(c)
        loc, k = torch.linspace(-3, 3, n).double(), exponents(-3, 4, n, seed=1)
        _f, back = converted(NormalGamma(loc, k, c, c))
        error = (back.params["gamma_shape"] / c - 1).abs()
        assert bool((error < 1e-12 + 1e-14 * c).all())
        torch.testing.assert_close(back.params["loc"], loc, rtol=1e-12, atol=1e-12)

    def test_centred_means_keep_their_spread(self):
        """Far from the origin the mean parameters have lost it; the shift is for that."""
        d = dist.Normal(tensor([1e4, -1e4]), tensor([1e-4, 1e-5]))
        f = Factor.of(d)
        origin = f.location()
        centred = f.shift(origin)
        back = centred.from_mean(centred.mean).shift(origin, 1.0)
        for name, value in f.params.items():
            torch.testing.assert_close(back.params[name], value, rtol=1e-12, atol=0)

    def test_projected_draws_keep_their_spread(self):
        torch.manual_seed(0)
        loc, scale = tensor([1e4, -1e6]), tensor([1e-4, 1e-2])
        draws = loc + scale * torch.randn(1000, 2, dtype=torch.float64)
        f = project_draws(Factor.of(dist.Normal(loc, scale)), draws)
        torch.testing.assert_close(f.params["scale"], draws.std(0, correction=0), rtol=1e-5, atol=0)
        tril = scale.diag_embed()
        g = project_draws(Factor.of(dist.MultivariateNormal(loc, scale_tril=tril)), draws)
        torch.testing.assert_close(
            g.params["scale_tril"] @ g.params["scale_tril"].mT,
            torch.cov(draws.T, correction=0),
            rtol=1e-5,
            atol=0,
        )

    @pytest.mark.parametrize("size", [2, 5, 100])
    @pytest.mark.parametrize("low, high", [(-8, -6), (-3, -2), (-1, 1), (7.5, 8), (-3, 8)])
    def test_both_solvers_of_dirichlets_agree(self, size, low, high):
        t = Factor.of(dist.Dirichlet(exponents(low, high, 20, size))).mean
        alpha, settled = _dirichlet_newton(t)
        assert bool(settled.all())  # the slow one is for none of these
        for solved in (alpha, _dirichlet_nested(t), dirichlet_concentration(t)):
            mean = Factor.of(dist.Dirichlet(solved)).mean
            torch.testing.assert_close(mean, t, rtol=1e-10, atol=1e-13)

    def test_blocks_give_the_same(self, monkeypatch):
        factor = Factor.of(dist.Dirichlet(exponents(-3, 3, 6, 10)))
        other = Factor.of(dist.Dirichlet(exponents(-2, 3, 6, 10)))

        def everything():
            again = factor.from_mean(factor.mean).params["concentration"]
            fresh = factor.from_natural(factor.natural)
            return fresh.mean, fresh.log_normalizer, fresh.divergence(other), again

        whole = everything()
        monkeypatch.setattr(special, "_BLOCK", 20)
        for one, parts in zip(whole, everything(), strict=True):
            torch.testing.assert_close(parts, one, rtol=1e-14, atol=0)

    def test_dirichlet_means_of_mixtures(self):
        """Far from any one Dirichlet's: what inclusive pooling asks for."""
        t = Factor.of(dist.Dirichlet(exponents(-3, 3, 10, 10, 200))).mean.mean(0)
        alpha, settled = _dirichlet_newton(t)
        assert bool(settled.all())
        torch.testing.assert_close(Factor.of(dist.Dirichlet(alpha)).mean, t, rtol=1e-11, atol=0)

    def test_elements_that_do_not_settle_are_solved_all_the_same(self, monkeypatch):
        alpha = exponents(-3, 4, 20, 5)
        t = Factor.of(dist.Dirichlet(alpha)).mean

        def unsettled(flat):
            alpha, settled = _dirichlet_newton(flat)
            settled[::2] = False
            return torch.where(settled.unsqueeze(-1), alpha, math.nan), settled

        monkeypatch.setattr(special, "_dirichlet_newton", unsettled)
        back = dirichlet_concentration(t)
        torch.testing.assert_close(back, alpha, rtol=1e-8, atol=0)

    def test_no_member_has_them(self):
        """Far from the origin what is left of the spread is rounding."""
        loc = tensor([[1e9, -1e9]])
        d = NormalWishart(loc, tensor([1e3]), tensor([5.0]), scale_tril=torch.eye(2).double()[None])
        mu = families.mean_params(d)
        mu[..., 2] *= 1 - 1e-15  # -E[mᵀΛm]/2
        with pytest.raises(ParameterError):
            families.from_mean_params(d, mu)
        f = Factor.of(d)
        centred = f.shift(f.location())
        back = centred.from_mean(centred.mean).shift(f.location(), 1.0)
        torch.testing.assert_close(back.params["concentration"], d.concentration)
        torch.testing.assert_close(back.params["loc"], loc)

    def test_public_conversions_raise_only_parameter_errors(self):
        above = 10.0 ** torch.arange(-3, 9).double()
        for scale in (1e2, 1e5, 1e8):
            for a, k in itertools.product(above, above):
                tril = torch.eye(2).double()
                d = NormalWishart(torch.full((2,), scale).double(), k, 1 + a, scale_tril=tril)
                with contextlib.suppress(ParameterError):
                    families.from_mean_params(d, families.mean_params(d))
                with contextlib.suppress(ParameterError):
                    families.from_natural_params(d, families.natural_params(d))
        mvn = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
        for bad in (torch.zeros(5), torch.full((5,), math.nan), torch.zeros(3)):
            with pytest.raises(ParameterError):
                families.from_mean_params(mvn, bad)
            with pytest.raises(ParameterError):
                families.from_natural_params(mvn, bad)

    def test_degenerate_means_come_back_finite(self):
        """Equality in Jensen's inequality, as rounding may bring about: a very concentrated one."""
        f = Factor.of(dist.Gamma(tensor([2.0]), tensor([1.0])))
        back = f.from_mean(tensor([[0.0, 1.0]]))
        assert bool(torch.isfinite(back.natural).all())
        f = Factor.of(dist.Dirichlet(tensor([[2.0, 1.0]])))
        back = f.from_mean(tensor([[0.5, 0.5]]).log())
        assert bool((back.params["concentration"] > 1e10).all())
        assert bool(torch.isfinite(back.natural).all())


@pytest.mark.cuda
class TestCuda:
    def test_extremes(self):
        d = dist.Normal(tensor([1e4, 1e4 + 1e-4]).cuda(), tensor([1e-4, 2e-4]).cuda())
        rows = list(zip(d.loc.tolist(), d.scale.tolist(), strict=True))
        expected = tensor([[float(normal_truth(p, q)) for q in rows] for p in rows])
        torch.testing.assert_close(pairwise_kl(d, d).cpu(), expected, rtol=1e-6, atol=1e-12)

    @pytest.mark.parametrize("low, high", [(-3, -2), (-1, 1), (7.5, 8), (-3, 4)])
    def test_dirichlet(self, low, high):
        converted(dist.Dirichlet(exponents(low, high, 20, 5).cuda()))
