# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Plots of components that are images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pyro_fusion.errors import StructureError
from pyro_fusion.fusion.result import Fusion
from pyro_fusion.plotting.common import BLUE, GREY, MAX_INCHES, fused_label, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

__all__ = ["plot_atoms"]


def plot_atoms(
    fusion: Fusion,
    fused: ArrayLike,
    local: Sequence[ArrayLike],
    *,
    label: str | None = None,
    order: Sequence[int] | None = None,
    titles: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Components that are images, a column for each atom: the fused image on top, below it the one
    that each party contributed.

    :param fusion: the result of :func:`~pyro_fusion.fuse`.
    :param fused: the images of the atoms, ``[K, height, width]``.
    :param local: for each party the images of its components, ``[L_s, height, width]``.
    :param label: which label; may be left out if there is one.
    :param order: the atoms to draw, from left to right; by default all, in their order.
    :param titles: a title for each of the K atoms, in their order.
    :param names: a name for each of the S parties.
    :param limits: the values that are drawn white and black; by default the extremes of all.
    :param figure: an empty figure to draw into; by default a new one, which pyplot does not know.
    :raises StructureError: if a party, an atom or a component has no image, or too many.
    :raises ImportError: without matplotlib.
    """
    found = fused_label(fusion, label)
    require_matplotlib()
    from matplotlib.figure import Figure

    sources = [list(range(found.num_atoms)), *(a.tolist() for a in found.assignment)]
    images = _images([fused, *local], [len(source) for source in sources])
    atoms = list(range(found.num_atoms) if order is None else order)
    titles = [str(k) for k in range(found.num_atoms)] if titles is None else titles
    names = ["fused", *([f"party {n}" for n in fusion.party_names] if names is None else names)]
    low, high = limits or (min(float(v.min()) for v in images), max(float(v.max()) for v in images))
    if figure is None:
        cell = min(0.8, 2 * MAX_INCHES / max(len(atoms), len(images)))
        size = (1.7 + cell * len(atoms), 1.1 + 1.07 * cell * len(images))
        figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(images), len(atoms), squeeze=False)
    for i, source in enumerate(sources):
        for j, k in enumerate(atoms):
            cell_axes = grid[i, j]
            cell_axes.set_xticks([])
            cell_axes.set_yticks([])
            if k in source:
                image = images[i][source.index(k)].numpy()
                cell_axes.imshow(image, cmap="gray_r", vmin=low, vmax=high)
            else:
                cell_axes.set_box_aspect(images[0].shape[1] / images[0].shape[2])
            for spine in cell_axes.spines.values():
                spine.set_visible(k in source)
                spine.set_color(BLUE if i == 0 else GREY)
                spine.set_linewidth(2.5 if i == 0 else 0.8)
            if i == 0:
                cell_axes.set_title(titles[k], fontsize=9)
        first = grid[i, 0]
        first.set_ylabel(names[i], rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    return figure


def _images(sources: Sequence[ArrayLike], counts: Sequence[int]) -> list[torch.Tensor]:
    """The images of each source, ``[n, height, width]``, checked against the number of
    components."""
    if len(sources) != len(counts):
        raise StructureError(
            f"expected the images of {len(counts) - 1} parties, got those of {len(sources) - 1}"
        )
    result = [torch.as_tensor(v).detach().cpu() for v in sources]
    for i, (v, count) in enumerate(zip(result, counts, strict=True)):
        what = "the fused posterior" if i == 0 else f"party {i - 1}"
        if v.dim() != 3 or len(v) != count:
            raise StructureError(
                f"{what}: expected {count} images, [{count}, height, width], got {list(v.shape)}"
            )
    return result
