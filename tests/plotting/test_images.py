# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Atoms that are images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pyro_fusion import StructureError
from pyro_fusion.plotting import plot_atoms
from tests.plotting.examples import THREE, fusion, images


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
