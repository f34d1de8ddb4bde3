# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The objective, and the posterior of the number of atoms."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pyro_fusion import StructureError
from pyro_fusion.plotting import plot_num_atoms, plot_objective
from pyro_fusion.program.gibbs import GibbsResult
from tests.plotting.examples import THREE, draws, fusion


def test_objective() -> None:
    ax = plot_objective(fusion(THREE))
    (line,) = ax.get_lines()
    assert np.asarray(line.get_ydata()).tolist() == [5.0, 3.0, 2.5]
    assert all(float(t).is_integer() for t in ax.get_xticks())


def test_number_of_atoms_is_drawn_with_its_probability() -> None:
    ax = plot_num_atoms(draws([3, 3, 5, 3, 4, 3, 3, 5]))
    assert [b.get_x() + b.get_width() / 2 for b in ax.patches] == pytest.approx([3, 4, 5])
    assert [b.get_height() for b in ax.patches] == [5 / 8, 1 / 8, 2 / 8]
    assert [t.get_text() for t in ax.texts] == ["0.62", "0.12", "0.25"]
    assert ax.get_xticks().tolist() == [3, 4, 5]
    assert len(ax.lines) == 0
    assert "8 draws" in ax.get_title() and "dashed" not in ax.get_title()


@pytest.mark.parametrize("num_atoms", [3, 40])
def test_the_number_that_was_fused_is_marked_even_if_never_drawn(num_atoms: int) -> None:
    result = GibbsResult({"component": draws([10, 11, 11])})
    ax = plot_num_atoms(result, fusion([list(range(num_atoms))]))
    (line,) = ax.lines
    assert set(line.get_xdata()) == {num_atoms}
    low, high = ax.get_xlim()
    assert low < min(num_atoms, 10) and high > max(num_atoms, 11)
    assert f"dashed: {num_atoms}, as fused" in ax.get_title()


def test_rare_and_missing_numbers_are_told_apart() -> None:
    ax = plot_num_atoms(draws([2] * 999 + [4]))
    assert [t.get_text() for t in ax.texts] == ["1.00", "", "<.01"]


def test_numbers_are_left_out_where_they_would_touch() -> None:
    assert len(plot_num_atoms(draws(list(range(1, 200)))).texts) == 0


@pytest.mark.parametrize(
    "plot", [plot_objective, lambda f, ax: plot_num_atoms(draws([2]), f, ax=ax)]
)
def test_draws_into_given_axes_and_opens_no_figure(plot) -> None:
    axes = Figure().subplots(1, 2)
    assert plot(fusion(THREE), ax=axes[1]) is axes[1]
    assert not axes[0].has_data() and axes[1].has_data()
    assert plt.get_fignums() == []


def test_draws_of_which_label() -> None:
    two = GibbsResult({x: draws([2], x) for x in ("state", "topic")})
    with pytest.raises(StructureError, match=r"expected one label, got \['state', 'topic'\]"):
        plot_num_atoms(two)
    with pytest.raises(StructureError, match=r"label 'x', only of \['state', 'topic'\]"):
        plot_num_atoms(two, label="x")
    with pytest.raises(StructureError, match=r"label 'x', only of \['component'\]"):
        plot_num_atoms(draws([2]), label="x")
    assert plot_num_atoms(two, label="topic").get_title().startswith("atoms of topic")
    plt.close("all")
    with pytest.raises(StructureError, match="no label 'topic'"):
        plot_num_atoms(two, fusion(THREE), label="topic")
    with pytest.raises(StructureError, match=r"FusionGibbs.run.*got Fusion"):
        plot_num_atoms(fusion(THREE))  # type: ignore[arg-type]
    assert plt.get_fignums() == []
