# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Factors with bounded evidence: what is kept, what is cut, and that nothing gets surer."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_fusion import NormalGamma, NormalWishart, UnsupportedFamilyError
from pyro_fusion.families import Factor
from pyro_fusion.families.bounded import covariances, limited, widened
from pyro_fusion.families.wishart import Wishart

COVARIANCE = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal_wishart(concentration: Tensor, df: Tensor) -> NormalWishart:
    """Of ``E[Λ] = COVARIANCE⁻¹``, which a scale matrix of ``V⁻¹ = df · COVARIANCE`` has."""
    loc = torch.stack([t(1, 2)] * len(df))
    return NormalWishart(loc, concentration, df, precision_matrix=df[:, None, None] * COVARIANCE)


# Above the bound of five points, and below it, where nothing changes.
CASES = [
    (
        normal_wishart(t(80, 3), t(90, 6)),
        normal_wishart(t(5, 3), t(15, 6)),
    ),
    (
        Wishart(t(40, 7), precision_matrix=t(40, 7)[:, None, None] * COVARIANCE),
        Wishart(t(15, 7), precision_matrix=t(15, 7)[:, None, None] * COVARIANCE),
    ),
    (
        NormalGamma(t(1, 1), t(80, 3), t(45, 6), t(90, 12)),
        NormalGamma(t(1, 1), t(5, 3), t(7.5, 6), t(15, 12)),
    ),
    (dist.Gamma(t(20, 2), t(40, 4)), dist.Gamma(t(5, 2), t(10, 4))),
    (dist.InverseGamma(t(20, 2), t(40, 4)), dist.InverseGamma(t(5, 2), t(10, 4))),
    (dist.Dirichlet(t(15, 5, 10, 20)), dist.Dirichlet(t(3, 1, 2, 4))),
    (dist.Dirichlet(t(0.5, 2, 0.5)), dist.Dirichlet(t(0.5, 2, 0.5))),
    (dist.Beta(t(30, 2), t(10, 3)), dist.Beta(t(7.5 / 2**0.5, 2), t(2.5 / 2**0.5, 3))),
    (dist.Exponential(t(3, 4)), dist.Exponential(t(3, 4))),
]


@pytest.mark.parametrize(("given", "expected"), CASES, ids=lambda d: type(d).__name__)
def test_counts_are_cut_and_means_kept(given: Distribution, expected: Distribution) -> None:
    found = limited(Factor.of(given), 5.0)
    wanted = Factor.of(expected)
    assert found.structure() == wanted.structure()
    for name, value in wanted.params.items():
        torch.testing.assert_close(found.params[name], value)


def test_a_covariance_keeps_a_mean_however_weak_the_prior() -> None:
    weak = limited(Factor.of(normal_wishart(t(80), t(90))), 0.1)
    assert float(weak.params["df"]) == 4  # D + 2
    assert float(weak.params["concentration"]) == pytest.approx(0.1)
    gamma = limited(Factor.of(NormalGamma(t(0), t(9), t(40), t(1))), 0.1)
    assert float(gamma.params["gamma_shape"]) == 1.5  # of the same degrees of freedom, D = 1


def test_a_normal_is_widened_where_it_is_narrow() -> None:
    f = widened(Factor.of(dist.LogNormal(t(1, 2), t(0.1, 3))), t(0.25, 4))
    torch.testing.assert_close(f.params["scale"], t(0.5, 3))
    torch.testing.assert_close(f.params["loc"], t(1, 2))
    torch.testing.assert_close(covariances(f), t(0.25, 9))


def test_a_multivariate_normal_is_widened_in_each_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    root, least = torch.randn(2, 50, 3, 3, generator=generator, dtype=torch.float64)
    root, least = (m @ m.mT + 0.1 * torch.eye(3) for m in (root, least))
    f = Factor.of(dist.MultivariateNormal(torch.zeros(50, 3).double(), root))
    wide = covariances(widened(f, least))
    # No direction in which it is below either, and none in which it is above both: where the two
    # are diagonal at once, it is the larger of each.
    for smaller in (root, least):
        assert torch.linalg.eigvalsh(wide - smaller).min() > -1e-10
    chol = torch.linalg.cholesky(least)
    both = torch.linalg.solve(chol, torch.linalg.solve(chol, root).mT).mT
    values, vectors = torch.linalg.eigh((both + both.mT) / 2)
    axes = torch.linalg.solve(chol.mT, vectors)  # aᵀ least a = 1, aᵀ root a = values
    found = (axes * (wide @ axes)).sum(-2)
    torch.testing.assert_close(found, values.clamp(min=1))


def test_a_wide_multivariate_normal_stays() -> None:
    f = Factor.of(dist.MultivariateNormal(t(0, 0), COVARIANCE))
    torch.testing.assert_close(covariances(widened(f, COVARIANCE / 3)), COVARIANCE)
    torch.testing.assert_close(covariances(widened(f, COVARIANCE * 3)), COVARIANCE * 3)


def test_a_family_without_counts_is_named() -> None:
    with pytest.raises(UnsupportedFamilyError, match="Poisson has no counts"):
        limited(Factor.of(dist.Poisson(t(3))), 5.0)


def test_what_is_kept_is_the_mean() -> None:
    # By the distributions themselves: of the precision, for a Normal's variance.
    f = limited(Factor.of(NormalGamma(t(1), t(80), t(45), t(90))), 5.0)
    assert float(f.distribution().mean[0, 1]) == pytest.approx(0.5)
    g = limited(Factor.of(dist.Dirichlet(t(30, 10, 20))), 5.0).distribution()
    torch.testing.assert_close(g.mean, t(0.5, 1 / 6, 1 / 3))
    assert math.isclose(float(g.concentration.sum()), 5 * 3**0.5)
