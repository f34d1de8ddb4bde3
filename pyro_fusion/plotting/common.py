# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Parts that pictures have in common: colours, new axes, and checks of what is to be drawn."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyro_fusion.errors import StructureError
from pyro_fusion.fusion.result import FusedLabel, Fusion

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "BLUE",
    "CYCLE",
    "EMPTY",
    "FONT_SIZE",
    "GREY",
    "MARKERS",
    "MAX_INCHES",
    "MIN_FONT_SIZE",
    "VERMILION",
    "cell_points",
    "chosen_atoms",
    "fused_label",
    "new_axes",
    "require_matplotlib",
]

# Okabe & Ito's colours, which the colour-blind can tell apart; without yellow, too pale in print.
BLUE, VERMILION = "#0072B2", "#D55E00"
CYCLE = (BLUE, VERMILION, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Their number differs from that of the colours, so that 28 atoms look different.
MARKERS = ("o", "s", "^", "D")
GREY = "#999999"
EMPTY = "#F2F2F2"

MAX_INCHES = 12.0
# Where a cell is too small for its number, numbers and names are left out.
FONT_SIZE, MIN_FONT_SIZE = 8.0, 4.5


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ImportError("plots need matplotlib: pip install 'pyro-fusion[plot]'") from e


def fused_label(fusion: Fusion, label: str | None) -> FusedLabel:
    """The fused label called ``label``, which may be left out if there is only one.

    :raises StructureError: for an unknown label, or none where there are several.
    """
    if label is None:
        return fusion.only_label()
    if label not in fusion.labels:
        raise StructureError(
            f"the fusion has no label '{label}'; its labels are {sorted(fusion.labels)}"
        )
    return fusion.labels[label]


def new_axes(ax: Axes | None, width: float, height: float) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    size = (min(width, MAX_INCHES), min(height, MAX_INCHES))
    return plt.subplots(figsize=size, layout="constrained")[1]


def cell_points(ax: Axes, rows: int, columns: int) -> float:
    """The smaller side of a cell, in points, before the layout is final."""
    figure: Any = ax.figure
    box = ax.get_window_extent()
    return 72 / figure.dpi * min(box.width / columns, box.height / rows)


def chosen_atoms(atoms: Sequence[int] | None, num_atoms: int) -> list[int]:
    """The atoms to draw; by default all.

    :raises StructureError: for an empty list, an unknown atom, or one that is named twice.
    """
    given = range(num_atoms) if atoms is None else atoms
    try:
        chosen = [operator.index(k) for k in given]
    except TypeError:
        chosen = []
    known = all(0 <= k < num_atoms for k in chosen)
    if not chosen or not known or len(set(chosen)) < len(chosen):
        raise StructureError(f"expected some of the atoms 0 to {num_atoms - 1}, got {list(given)}")
    return chosen
