# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Atoms with what they were made of: densities and ellipses are where the distributions are."""

import math
from dataclasses import replace

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from scipy import stats

from pyro_fusion import Posterior, UnsupportedFamilyError
from pyro_fusion.plotting import plot_components
from pyro_fusion.plotting.marginals import marginals
from tests.plotting.examples import THREE, fusion


def curves(ax) -> list[np.ndarray]:
    """Of all lines but the floors of rows."""
    return [np.stack(line.get_data()) for line in ax.lines if len(line.get_xdata()) > 2]


# -- one number ------------------------------------------------------------------------------------


def test_each_row_has_its_atom_and_its_parties() -> None:
    ax = plot_components(fusion(THREE), "loc")
    peaks = sorted((int(y.min()), float(x[y.argmax()])) for x, y in curves(ax))
    # Row 2 is atom 0, of party 0 at 0 and party 1 at 0.5; the atom itself is at 0.
    expected = [(0, 2), (0, 2.5), (1, 1), (1, 1), (1, 2), (2, 0), (2, 0), (2, 0.5)]
    assert [row for row, _ in peaks] == [row for row, _ in expected]
    assert [x for _, x in peaks] == pytest.approx([x for _, x in expected], abs=0.04)
    ticks = dict(zip(ax.get_yticks(), (t.get_text() for t in ax.get_yticklabels()), strict=True))
    assert ticks == {2: "0  ×2", 1: "1  ×2", 0: "2  ×1"}
    assert ax.get_xlabel() == "loc"


def test_atoms_are_chosen_and_stronger_than_parties() -> None:
    ax = plot_components(fusion(THREE), "loc", atoms=[1])
    lines = [line for line in ax.lines if len(line.get_xdata()) > 2]
    *parties, atom = sorted(lines, key=Line2D.get_linewidth)
    assert len(parties) == 2
    assert all(atom.get_linewidth() >= 2 * p.get_linewidth() for p in parties)
    assert {to_hex(str(p.get_color())) for p in parties} == {"#999999"}


def test_the_density_of_a_positive_number_is_that_of_the_constrained_one() -> None:
    scale = dist.LogNormal(torch.tensor([0.3, 1.0]), torch.tensor([0.5, 0.2]))
    party = Posterior({"scale": scale}, {"scale": "component"})
    ax = plot_components(fusion([[0, 1]], posterior=party, parties=[party]), "scale", atoms=[0])
    for x, y in curves(ax):
        assert (x > 0).all()
        shape = stats.lognorm(0.5, scale=math.exp(0.3)).pdf(x)
        assert y / y.max() == pytest.approx(shape / shape.max(), rel=1e-5)
    assert ax.get_xlim()[0] > 0


@pytest.mark.parametrize(
    "factor, expected",
    [
        (dist.Gamma(torch.tensor([3.0]), torch.tensor([2.0])), stats.gamma(3, scale=0.5)),
        (dist.Exponential(torch.tensor([2.0])), stats.expon(scale=0.5)),
        (dist.InverseGamma(torch.tensor([3.0]), torch.tensor([2.0])), stats.invgamma(3, scale=2)),
        (dist.Beta(torch.tensor([2.0]), torch.tensor([5.0])), stats.beta(2, 5)),
        (dist.Dirichlet(torch.tensor([[2.0, 4.0, 1.0]])), stats.beta(4, 3)),
        (
            dist.MultivariateNormal(torch.ones(1, 2), torch.tensor([[4.0, 1.0], [1.0, 9.0]])),
            stats.norm(1, 3),
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_densities_and_quantiles_of_each_family(factor, expected) -> None:
    dims = (1,) if factor.event_shape else None
    m = marginals(Posterior({"x": factor}, {"x": ("component",)}), "x", dims, 1)
    x, density = (v.numpy() for v in m.density(0))
    assert (np.diff(x) > 0).all()
    assert density == pytest.approx(expected.pdf(x), rel=1e-5)
    levels = (0.025, 0.5, 0.975)
    assert m.quantiles(levels).flatten().numpy() == pytest.approx(expected.ppf(levels), rel=1e-5)


@pytest.mark.parametrize(
    "factor, coordinate",
    [
        (dist.Gamma(torch.tensor([3.0]), torch.tensor([2.0])), torch.log),
        (dist.Beta(torch.tensor([2.0]), torch.tensor([5.0])), torch.logit),
        (dist.LogNormal(torch.tensor([2.0]), torch.tensor([0.5])), torch.log),
    ],
)
def test_moments_are_those_of_unconstrained_coordinates(factor, coordinate) -> None:
    m = marginals(Posterior({"x": factor}, {"x": "component"}), "x", None, 1)
    mean, scale = (float(v) for v in m.unconstrained())
    draws = coordinate(factor.sample((100_000,)).double())
    error = float(draws.std()) / math.sqrt(len(draws))
    assert mean == pytest.approx(float(draws.mean()), abs=5 * error)
    assert scale == pytest.approx(float(draws.std()), rel=0.02)


def test_a_pole_is_left_out() -> None:
    for factor in (
        dist.Gamma(torch.tensor([1e-3]), 1.0),
        dist.InverseGamma(torch.tensor([1e-3]), 1.0),
    ):
        m = marginals(Posterior({"x": factor}, {"x": "component"}), "x", None, 1)
        x, density = m.density(0)
        assert len(x) > 10 and x.isfinite().all() and density.isfinite().all()


def test_weights_along_the_label_are_one_number_each() -> None:
    party = Posterior({"w": dist.Dirichlet(torch.tensor([2.0, 4.0, 1.0]))}, {"w": "component"})
    m = marginals(party, "w", None, 1)
    assert m.quantiles([0.5]).flatten().numpy() == pytest.approx(
        stats.beta([2, 4, 1], [5, 3, 6]).ppf(0.5)
    )


def test_a_shared_site_is_one_atom_that_all_have() -> None:
    parties = [Posterior({"b": dist.Normal(torch.tensor(float(s)), 1.0)}) for s in range(3)]
    result = replace(fusion([[0]] * 3, posterior=parties[1], parties=parties), labels={})
    ax = plot_components(result, "b")
    assert sorted(float(x[y.argmax()]) for x, y in curves(ax)) == pytest.approx(
        [0, 1, 1, 2], abs=0.02
    )
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0  ×3"]


# -- two numbers -----------------------------------------------------------------------------------

COVARIANCE = torch.tensor([[4.0, 1.5], [1.5, 1.0]]).double()


def test_ellipses_are_one_and_two_deviations_wide() -> None:
    loc = torch.tensor([[0.0, 5.0], [20.0, -3.0]]).double()
    party = Posterior({"x": dist.MultivariateNormal(loc, COVARIANCE)}, {"x": "component"})
    ax = plot_components(fusion([[1, 0]], posterior=party, parties=[party]), "x", atoms=[1])
    found = []
    for points in curves(ax):
        line = points - points.mean(1, keepdims=True)
        # The largest reach along an axis is that many standard deviations of it.
        reach = (points.max(1) - points.min(1)) / 2
        found.append((points[:, :-1].mean(1).round(3).tolist(), (reach / [2, 1]).round(2).tolist()))
        distance = np.einsum("ij,ik,kj->j", line, np.linalg.inv(COVARIANCE.numpy()), line)
        assert np.ptp(distance) < 0.2 * distance.max()
    # Component 0 of the party became atom 1; the atom has both ellipses, the party one.
    assert found == [([0, 5], [2, 2]), ([20, -3], [1, 1]), ([20, -3], [2, 2])]
    assert [t.get_text() for t in ax.texts] == ["1"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x[0]", "x[1]")


def test_a_pair_of_three_and_its_covariance() -> None:
    tril = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.3, -0.8, 2.0]]).double()
    joint = dist.MultivariateNormal(torch.arange(6.0).reshape(2, 3).double(), scale_tril=tril)
    m = marginals(Posterior({"x": joint}, {"x": "component"}), "x", (2, 0), 2)
    full = tril @ tril.T
    assert m.covariance is not None
    torch.testing.assert_close(m.covariance[1], full[[2, 0]][:, [2, 0]])
    assert m.params[0].tolist() == [[2, 0], [5, 3]]


def test_independent_blocks_have_no_covariance() -> None:
    joint = dist.MultivariateNormal(torch.zeros(2, 3, 2).double(), COVARIANCE).to_event(1)
    m = marginals(Posterior({"x": joint}, {"x": "component"}), "x", ((0, 1), (1, 0)), 2)
    assert m.covariance is not None
    torch.testing.assert_close(m.covariance[0], torch.tensor([[1.0, 0.0], [0.0, 4.0]]).double())


def test_the_outline_of_positive_numbers_is_that_behind_the_bijection() -> None:
    scale = dist.LogNormal(torch.zeros(1, 2).double(), 1.0).to_event(1)
    party = Posterior({"x": scale}, {"x": "component"})
    points = marginals(party, "x", None, 2).outline(0, 2.0)
    assert points.log().square().sum(-1).numpy() == pytest.approx(np.full(len(points), 4.0))


def test_twenty_eight_atoms_differ_without_their_numbers() -> None:
    loc = torch.arange(56.0).reshape(28, 2)
    party = Posterior({"x": dist.Normal(loc, 0.1).to_event(1)}, {"x": "component"})
    ax = plot_components(fusion([list(range(28))], posterior=party, parties=[party]), "x")
    marks = [(x.get_color(), x.get_marker()) for x in ax.lines if len(x.get_xdata()) == 1]
    assert len(marks) == len(set(marks)) == 28


def test_ellipses_are_of_normals() -> None:
    gamma = dist.Gamma(torch.ones(1, 2), torch.ones(1, 2)).to_event(1)
    party = Posterior({"x": gamma}, {"x": "component"})
    with pytest.raises(UnsupportedFamilyError, match=r"of Normal numbers, got Gamma.* dims=\(0,\)"):
        plot_components(fusion([[0]], posterior=party, parties=[party]), "x")
