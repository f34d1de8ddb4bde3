# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The path of the dispersion as a picture: which components come together as T grows."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from pyro_fusion.errors import StructureError
from pyro_fusion.fusion.persistence import DispersionPath
from pyro_fusion.fusion.result import Fusion
from pyro_fusion.plotting.common import (
    BLUE,
    FONT_SIZE,
    GREY,
    VERMILION,
    cell_points,
    fused_label,
    new_axes,
    require_matplotlib,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_dispersion_path"]


def plot_dispersion_path(
    path: DispersionPath | Fusion, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """The components as a tree: they come together as the dispersion T grows, from left to right.

    A line is an atom, from the T at which it begins to that at which it changes; at the top stands
    how many there are. The plateau that T was taken from is shaded, T itself dashed, and the T at
    which a quarter of the components would be the same as another one of their party dotted.

    :param path: what :func:`~pyro_fusion.dispersion_path` returns, or a fusion of which T was
        estimated.
    :param label: which label of a fusion; may be left out if there is one.
    :param ax: axes to draw into; a new figure by default.
    :raises StructureError: for an unknown label, or a fusion whose T was given.
    :raises ImportError: without matplotlib.
    """
    path = _path_of(path, label)
    require_matplotlib()
    steps = path.assignment.unique_consecutive(dim=0)
    count = steps.shape[1]
    ax = new_axes(ax, 7, 1.2 + 0.12 * max(count, 16))
    # Components of one atom side by side, first by those at the largest T.
    order = torch.arange(count)
    for groups in steps:
        order = order[groups[order].argsort(stable=True)]
    place = torch.empty(count, dtype=torch.float64)
    place[order] = torch.arange(count, dtype=torch.float64)
    heights = []
    for groups, plateau in zip(steps, path.plateaus, strict=True):
        members = torch.bincount(groups)
        height = torch.zeros(len(members), dtype=torch.float64).index_add_(0, groups, place)
        heights.append((height / members)[groups])
        own = (height / members).tolist()
        ax.hlines(own, plateau.low, plateau.high, color=BLUE, linewidth=1.2)
    for (before, after), plateau in zip(pairwise(heights), path.plateaus, strict=False):
        low, high = torch.minimum(before, after), torch.maximum(before, after)
        moved = low < high
        ax.vlines([plateau.high] * int(moved.sum()), low[moved], high[moved], BLUE, linewidth=0.8)
    ax.set_xscale("log")
    left, right = path.plateaus[0].low, path.plateaus[-1].high
    ax.set_xlim(left, max(right, 1.05 * path.estimate))
    ax.set_ylim(-1, 1.06 * count)
    room = cell_points(ax, 1, 1)
    span = torch.tensor([left, right]).log().diff().item()
    for plateau in path.plateaus:
        width = torch.tensor([plateau.low, plateau.high]).log().diff().item() / span * room
        if width > 2 * FONT_SIZE:
            middle = (plateau.low * plateau.high) ** 0.5
            number = str(plateau.num_atoms)
            ax.text(middle, 1.01 * count, number, ha="center", va="center", fontsize=FONT_SIZE)
    if path.chosen is not None:
        ax.axvspan(path.chosen.low, path.chosen.high, color=BLUE, alpha=0.12, linewidth=0)
    ax.axvline(path.estimate, color=VERMILION, linestyle="--", linewidth=1.2)
    if left < path.cap < right:
        ax.axvline(path.cap, color=GREY, linestyle=":", linewidth=1.2)
    ax.set_yticks([])
    ax.set_xlabel("dispersion T")
    ax.set_ylabel(f"{count} components along {path.label}")
    how = "the middle of a plateau" if path.chosen is not None else "a rule of thumb: no plateau"
    ax.set_title(f"dashed: T = {path.estimate:.3g}, {how}", fontsize=10)
    return ax


def _path_of(path: DispersionPath | Fusion, label: str | None) -> DispersionPath:
    if isinstance(path, DispersionPath):
        if label not in (None, path.label):
            raise StructureError(f"the path is that of '{path.label}', not of '{label}'")
        return path
    if not isinstance(path, Fusion):
        raise StructureError(
            f"expected what dispersion_path() returns, or a fusion, got {type(path).__name__}"
        )
    found = fused_label(path, label).dispersion_path
    if found is None:
        raise StructureError(
            "the dispersion of this fusion was given, so there is no path: draw that of "
            "dispersion_path(posteriors, ...)"
        )
    return found
