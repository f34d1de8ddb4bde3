# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Which party has which atom, and how many have each: where it is drawn, and what is in it."""

from itertools import pairwise

import matplotlib
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pyro_fusion import Posterior, StructureError, fuse
from pyro_fusion.plotting import plot_assignment, plot_popularity
from tests.plotting.examples import THREE, fusion, many

# -- plot_assignment -------------------------------------------------------------------------------


def test_assignment_shows_each_component_in_its_cell() -> None:
    ax = plot_assignment(fusion(THREE, ["north", "south", "west"]))
    numbers = {tuple(map(int, t.get_position())): t.get_text() for t in ax.texts}
    # (atom, party) -> component
    assert numbers == {(0, 0): "0", (1, 0): "1", (2, 1): "0", (0, 1): "1", (1, 2): "0"}
    filled = np.asarray(ax.images[0].get_array())
    assert filled.tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 0]]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["north", "south", "west"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0\n×2", "1\n×2", "2\n×1"]


def test_fusion_plots_itself() -> None:
    loc = torch.tensor([[-90.0], [90.0]])
    party = Posterior({"loc": dist.Normal(loc, 0.1).to_event(1)}, {"loc": ("component", None)})
    result = fuse([party, party.permute("component", [1, 0])], dispersion=1.0)
    ax = plot_assignment(result)
    assert len(ax.texts) == 4
    other = plt.figure().subplots()
    assert plot_assignment(result, ax=other) is other


@pytest.mark.parametrize("plot", [plot_assignment, plot_popularity])
def test_draws_into_given_axes_and_opens_no_figure(plot) -> None:
    figure = Figure()
    axes = figure.subplots(1, 2)
    assert plot(fusion(THREE), ax=axes[1]) is axes[1]
    assert not axes[0].has_data()
    assert axes[1].has_data()
    assert plt.get_fignums() == []


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 3, 2), (20, 20, 12), (60, 50, 20), (300, 200, 9)])
def test_every_label_is_inside_and_none_overlaps(shape: tuple[int, int, int]) -> None:
    ax = plot_assignment(many(*shape))
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    width, height = figure.get_size_inches()
    assert width <= 12 and height <= 12
    figure.canvas.draw()
    canvas = figure.bbox
    # Ticks outside of the view are there, but not drawn.
    x = [t for t in ax.get_xticklabels() if -0.5 <= t.get_position()[0] <= shape[1] - 0.5]
    y = [t for t in ax.get_yticklabels() if -0.5 <= t.get_position()[1] <= shape[0] - 0.5]
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label, *x, *y):
        box = text.get_window_extent()
        inside = canvas.x0 <= box.x0 and box.x1 <= canvas.x1
        assert inside and canvas.y0 <= box.y0 and box.y1 <= canvas.y1, text
    for labels in (x, y):
        boxes = [t.get_window_extent() for t in labels]
        assert len(boxes) > 0
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    cell = ax.get_window_extent().width / shape[1], ax.get_window_extent().height / shape[0]
    for text in ax.texts:
        box = text.get_window_extent()
        assert box.width < cell[0] and box.height < cell[1]


def test_numbers_are_left_out_where_there_is_no_room() -> None:
    small = Figure(figsize=(2, 2)).subplots()
    assert len(plot_assignment(many(20, 20, 12), ax=small).texts) == 0
    assert len(plot_assignment(many(20, 20, 12)).texts) == 20 * 12


def test_ink_and_ground_differ_enough() -> None:
    # WCAG 2: at least 4.5 between a number and its cell, and cells told apart by lightness alone.
    def luminance(colour: tuple[float, ...] | str) -> float:
        c = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(a: tuple[float, ...] | str, b: tuple[float, ...] | str) -> float:
        low, high = sorted([luminance(a), luminance(b)])
        return (high + 0.05) / (low + 0.05)

    ax = plot_assignment(fusion(THREE))
    cmap = ax.images[0].get_cmap()
    assert contrast(str(ax.texts[0].get_color()), cmap(1)) > 4.5
    assert contrast(cmap(0), cmap(1)) > 4.5


def test_labels_are_checked() -> None:
    with pytest.raises(StructureError, match="no label 'topic'; its labels are \\['component'\\]"):
        plot_assignment(fusion(THREE), "topic")
    shared = [Posterior({"b": dist.Normal(torch.full((2,), x), 1.0)}) for x in (0.0, 1.0)]
    with pytest.raises(StructureError, match="no site has a label"):
        plot_assignment(fuse(shared))


# -- plot_popularity -------------------------------------------------------------------------------


def test_popularity_is_the_height_of_a_bar() -> None:
    ax = plot_popularity(fusion(THREE))
    assert [b.get_x() + b.get_width() / 2 for b in ax.patches] == pytest.approx([0, 1, 2])
    assert [b.get_height() for b in ax.patches] == [2, 2, 1]
    assert [t.get_text() for t in ax.texts] == ["2", "2", "1"]
    assert ax.get_ylabel() == "parties, of 3"
    assert max(ax.get_yticks()) == 3  # and no more than there are


@pytest.mark.parametrize("num_atoms", [1, 20, 400])
def test_numbers_of_parties_do_not_touch(num_atoms: int) -> None:
    ax = plot_popularity(many(20, num_atoms, max(1, num_atoms // 2)))
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.texts]
    assert len(boxes) == (num_atoms if num_atoms < 400 else 0)
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    ticks = [t.get_window_extent() for t in ax.get_xticklabels()]
    assert not any(a.overlaps(b) for a, b in pairwise(ticks))


def test_popularity_checks_labels() -> None:
    with pytest.raises(StructureError, match="no label 'topic'"):
        plot_popularity(fusion(THREE), "topic")
    assert plt.get_fignums() == []
