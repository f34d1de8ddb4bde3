# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Forest plots: where intervals and diamonds end, and which I² is beside them."""

import math
from dataclasses import replace

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from matplotlib.patches import Polygon

from pyro_fusion import Posterior
from pyro_fusion.plotting import plot_forest
from tests.plotting.examples import THREE, fusion, normals

Z = 1.959963984540054


def intervals(ax) -> list[tuple[float, float, float]]:
    """``(row, left, right)`` of each party."""
    lines = [line for line in ax.lines if line.get_transform() == ax.transData]
    spans = [line.get_xdata() for line in lines if len(line.get_xdata()) == 2]
    rows = [line.get_ydata()[0] for line in lines if len(line.get_xdata()) == 2]
    return [(float(y), float(x[0]), float(x[1])) for y, x in zip(rows, spans, strict=True)]


def diamonds(ax) -> list[np.ndarray]:
    return [p.get_xy()[:4] for p in ax.patches if isinstance(p, Polygon)]


def labels(ax) -> dict[float, str]:
    return dict(zip(ax.get_yticks(), (t.get_text() for t in ax.get_yticklabels()), strict=True))


def test_intervals_and_diamonds_are_95_per_cent_wide() -> None:
    ax = plot_forest(fusion(THREE, ["north", "south", "west"]), "loc")
    # Atom 0 is of north at 0 and south at 0.5; then atom 1 of north and west, atom 2 of south.
    rows = [0, 1, 3.5, 4.5, 7]
    centres = [0, 0.5, 1, 2, 2.5]
    assert intervals(ax) == [
        pytest.approx((y, c - 2 * Z, c + 2 * Z)) for y, c in zip(rows, centres, strict=True)
    ]
    found = diamonds(ax)
    for k, row in enumerate((2, 5.5, 8)):
        assert found[k][:, 0] == pytest.approx([k - Z, k, k + Z, k])
        assert found[k][[0, 2], 1] == pytest.approx([row, row])
    named = ["north", "south", "atom 0", "north", "west", "atom 1", "south", "atom 2"]
    assert list(labels(ax).values()) == named
    assert ax.yaxis_inverted()


def test_i_squared_is_beside_each_atom_that_several_have() -> None:
    parties = normals([[0], [0], [0]], offset=3.0, scale=1.0)
    ax = plot_forest(fusion([[0], [0], [0]], parties=parties), "loc")
    # Q of 0, 3, 6 with variance 1 is 18; its df 2.
    assert [t.get_text() for t in ax.texts if t.get_text()] == ["I² = 89%"]
    (text,) = ax.texts
    assert text.xy == (1.01, 3)
    ax = plot_forest(fusion([[0]]), "loc")
    assert [t.get_text() for t in ax.texts if t.get_text()] == []


def test_each_atom_has_its_own_i_squared() -> None:
    parties = [
        Posterior({"loc": dist.Normal(torch.tensor([0.0, 3.0 * s]), 1.0)}, {"loc": "component"})
        for s in range(3)
    ]
    ax = plot_forest(fusion([[0, 1]] * 3, posterior=parties[1], parties=parties), "loc")
    assert [(t.get_text(), t.xy[1]) for t in ax.texts] == [("I² = 0%", 3), ("I² = 89%", 7.5)]


def test_a_positive_number_has_a_positive_interval_and_the_i_squared_of_its_log() -> None:
    parties = [
        Posterior({"s": dist.LogNormal(torch.tensor([3.0 * s]), 1.0)}, {"s": "component"})
        for s in range(3)
    ]
    ax = plot_forest(fusion([[0], [0], [0]], posterior=parties[0], parties=parties), "s")
    assert [row[1:] for row in intervals(ax)] == [
        pytest.approx((math.exp(m - Z), math.exp(m + Z)), rel=1e-5) for m in (0, 3, 6)
    ]
    assert ax.texts[0].get_text() == "I² = 89%"


def test_one_of_several_numbers_and_of_several_atoms() -> None:
    loc = torch.tensor([[0.0, 10.0], [1.0, 20.0]])
    party = Posterior({"x": dist.Normal(loc, 1.0).to_event(1)}, {"x": "component"})
    ax = plot_forest(fusion([[0, 1]], posterior=party, parties=[party]), "x", dims=(1,), atoms=[1])
    assert intervals(ax) == [pytest.approx((0, 20 - Z, 20 + Z))]
    assert list(labels(ax).values()) == ["0", "atom 1"]
    assert ax.get_xlabel().startswith("x[1]")


def test_a_shared_site() -> None:
    parties = [Posterior({"b": dist.Normal(torch.tensor(float(s)), 1.0)}) for s in range(3)]
    result = replace(fusion([[0]] * 3, posterior=parties[1], parties=parties), labels={})
    ax = plot_forest(result, "b")
    assert [row[1] + Z for row in intervals(ax)] == pytest.approx([0, 1, 2])
    assert list(labels(ax).values()) == ["0", "1", "2", "fused"]


def test_names_of_parties_are_left_out_where_there_is_no_room() -> None:
    assignment = [list(range(20))] * 20
    ax = plot_forest(fusion(assignment), "loc")
    assert list(labels(ax).values()) == [f"atom {k}" for k in range(20)]
    assert len(intervals(ax)) == 400
    one = plot_forest(fusion(assignment), "loc", atoms=[7])
    assert len(labels(one)) == 21
    assert all(t.get_fontsize() >= 8 for t in one.get_yticklabels())
