# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures: where they are drawn, what is in them, what they need."""

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pyro.distributions as dist
import pytest
import torch

from pyro_fusion import Fusion, Matching, Posterior, StructureError, fuse
from pyro_fusion.plotting import plot_assignment, plot_atoms, plot_objective
from pyro_fusion.priors import Parametric

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def fusion(assignment: list[list[int]], names: list[str] | None = None) -> Fusion:
    """A fusion with this assignment: pictures need no more of it than that."""
    num_atoms = 1 + max(map(max, assignment))
    atoms = torch.arange(float(num_atoms))
    tensors = [torch.tensor(a) for a in assignment]
    matching = Matching(
        label="component",
        assignment=tensors,
        num_atoms=num_atoms,
        popularity=torch.bincount(torch.cat(tensors), minlength=num_atoms),
        objective=[5.0, 3.0, 2.5],
        dispersion=1.0,
        prior=Parametric(num_atoms),
        converged=True,
        restarts=[2.5],
    )
    posterior = Posterior({"loc": dist.Normal(atoms, 1.0)}, {"loc": "component"})
    party_names = tuple(names or map(str, range(len(assignment))))
    trace = matching.objective
    return Fusion(posterior, "inclusive", {"component": matching}, trace, 0.0, party_names)


def many(num_parties: int, num_atoms: int, size: int) -> Fusion:
    rng = np.random.default_rng(0)
    return fusion([rng.permutation(num_atoms)[:size].tolist() for _ in range(num_parties)])


THREE = [[0, 1], [2, 0], [1]]


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
    ax = result.plot()
    assert len(ax.texts) == 4
    other = plt.figure().subplots()
    assert result.plot(ax=other) is other


@pytest.mark.parametrize("plot", [plot_assignment, plot_objective])
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
    with pytest.raises(StructureError, match="expected one label"):
        fuse(shared).plot()


# -- plot_objective --------------------------------------------------------------------------------


def test_objective() -> None:
    ax = plot_objective(fusion(THREE))
    (line,) = ax.get_lines()
    assert np.asarray(line.get_ydata()).tolist() == [5.0, 3.0, 2.5]
    assert all(float(t).is_integer() for t in ax.get_xticks())


# -- plot_atoms ------------------------------------------------------------------------------------


def images(counts: list[int]) -> list[np.ndarray]:
    """Constant images, 3 by 2 pixels: of party s (the fused one is -1), component l, 10 s + l."""
    return [
        np.ones((n, 3, 2)) * (10 * s + np.arange(n))[:, None, None]
        for s, n in enumerate(counts, start=-1)
    ]


def test_atoms_show_each_image_in_its_column() -> None:
    fused, *local = images([3, 2, 2, 1])
    figure = plot_atoms(
        fusion(THREE), torch.tensor(fused), local, order=[2, 0, 1], titles=["a", "b", "c"]
    )
    shown = [
        [float(np.mean(ax.images[0].get_array())) if ax.images else None for ax in row]
        for row in np.array(figure.axes).reshape(4, 3)
    ]
    assert shown == [[-8, -10, -9], [None, 0, 1], [10, 11, None], [None, None, 20]]
    assert [ax.get_title() for ax in figure.axes[:3]] == ["c", "a", "b"]
    assert [ax.get_ylabel() for ax in figure.axes[::3]] == ["fused"] + [
        f"party {s}" for s in range(3)
    ]
    assert {ax.images[0].get_clim() for ax in figure.axes if ax.images} == {(-10.0, 20.0)}
    assert plt.get_fignums() == []


def test_atoms_take_a_figure_limits_and_names(tmp_path: Path) -> None:
    fused, *local = images([3, 2, 2, 1])
    figure = Figure()
    given = plot_atoms(
        fusion(THREE), fused, local, limits=(0, 1), names=["x", "y", "z"], figure=figure
    )
    assert given is figure
    assert figure.axes[3].get_ylabel() == "x"
    assert figure.axes[0].images[0].get_clim() == (0, 1)
    figure.savefig(tmp_path / "atoms.png")


def test_atoms_need_an_image_each() -> None:
    fused, *local = images([3, 2, 2, 1])
    with pytest.raises(StructureError, match="images of 3 parties, got those of 2"):
        plot_atoms(fusion(THREE), fused, local[:2])
    with pytest.raises(StructureError, match=r"party 2: expected 1 images, .* got \[2, 3, 2\]"):
        plot_atoms(fusion(THREE), fused, [*local[:2], local[1]])
    with pytest.raises(StructureError, match=r"fused posterior: expected 3 .* got \[3, 6\]"):
        plot_atoms(fusion(THREE), fused.reshape(3, 6), local)


# -- without matplotlib ----------------------------------------------------------------------------


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = fusion(THREE)
    fused, *local = images([3, 2, 2, 1])
    for draw in (
        result.plot,
        lambda: plot_objective(result),
        lambda: plot_atoms(result, fused, local),
    ):
        with pytest.raises(ImportError, match=r"pip install 'pyro-fusion\[plot\]'"):
            draw()
