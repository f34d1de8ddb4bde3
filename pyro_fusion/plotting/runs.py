# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Plots of runs: the objective of a fusion, and the number of atoms that Gibbs sampling drew."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyro_fusion.errors import StructureError
from pyro_fusion.fusion.draws import AssignmentDraws
from pyro_fusion.fusion.result import Fusion
from pyro_fusion.plotting.common import (
    BLUE,
    FONT_SIZE,
    MIN_FONT_SIZE,
    cell_points,
    fused_label,
    new_axes,
    require_matplotlib,
)
from pyro_fusion.program.gibbs import GibbsResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_num_atoms", "plot_objective"]


def plot_objective(fusion: Fusion, ax: Axes | None = None) -> Axes:
    """The objective F after the start and after each iteration; it never rises.

    :param fusion: the result of :func:`~pyro_fusion.fuse`.
    :param ax: axes to draw into; a new figure by default.
    :raises ImportError: without matplotlib.
    """
    require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    ax = new_axes(ax, 5, 3)
    ax.plot(range(len(fusion.objective)), fusion.objective, marker="o", color=BLUE)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel("iteration")
    ax.set_ylabel("objective F")
    return ax


def plot_num_atoms(
    fusion: Fusion | None,
    draws: GibbsResult | AssignmentDraws,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The posterior of the number of atoms, a bar of height ``P(K)`` for each K from the least to
    the largest that was drawn.

    :param fusion: the result of :func:`~pyro_fusion.fuse`, whose own K is marked; None to mark
        none.
    :param draws: what :meth:`FusionGibbs.run <pyro_fusion.FusionGibbs.run>` returns, or its draws
        of one label.
    :param label: which label; may be left out if there is one.
    :param ax: axes to draw into; a new figure by default.
    :raises StructureError: for a label that the draws or the fusion do not have, or if there are
        several and none is given.
    :raises ImportError: without matplotlib.
    """
    of_label = _draws_of(draws, label)
    own = None if fusion is None else fused_label(fusion, of_label.label).num_atoms
    require_matplotlib()
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import MaxNLocator

    probabilities = of_label.num_atoms_distribution().tolist()
    low, high = int(of_label.num_atoms.min()), len(probabilities) - 1
    numbers = range(low, high + 1)
    first, last = (low, high) if own is None else (min(low, own), max(high, own))
    centre, count = (first + last) / 2, max(6, last - first + 1)
    ax = new_axes(ax, max(4.0, 1.2 + 0.4 * count), 3)
    bars = ax.bar(numbers, probabilities[low:], color=BLUE, width=0.8)
    font_size = min(FONT_SIZE, 0.35 * cell_points(ax, 1, count))
    if font_size >= MIN_FONT_SIZE:
        shown = [f"{p:.2f}" if p >= 0.005 else "<.01" if p > 0 else "" for p in probabilities[low:]]
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        ax.bar_label(bars, shown, fontsize=font_size, padding=2, bbox=white, zorder=3)
    if own is not None:
        halo = [withStroke(linewidth=3.5, foreground="white")]  # the line crosses a bar
        ax.axvline(own, color="black", linestyle="--", linewidth=1.5, path_effects=halo)
    # A single bar should not fill the picture.
    ax.set_xlim(min(first - 0.6, centre - 3), max(last + 0.6, centre + 3))
    ax.set_ylim(0, 1.12 * max(probabilities))
    steps = MaxNLocator(integer=True, min_n_ticks=1).tick_values(first, last)
    ax.set_xticks([k for k in steps if first <= k <= last])
    ax.set_xlabel("number of atoms K")
    ax.set_ylabel("probability")
    title = f"atoms of {of_label.label}, {len(of_label.num_atoms)} draws"
    ax.set_title(title + ("" if own is None else f"\ndashed: {own}, as fused"), fontsize=10)
    return ax


def _draws_of(draws: GibbsResult | AssignmentDraws, label: str | None) -> AssignmentDraws:
    if not isinstance(draws, GibbsResult | AssignmentDraws):
        raise StructureError(
            "expected what FusionGibbs.run() returns, or its draws of one label, got "
            f"{type(draws).__name__}"
        )
    if isinstance(draws, GibbsResult):
        if label is None:
            return draws.only_label()
        labels = draws.labels
    else:
        labels = {draws.label: draws}
    if label is not None and label not in labels:
        raise StructureError(f"there are no draws of the label '{label}', only of {sorted(labels)}")
    return labels[draws.label if isinstance(draws, AssignmentDraws) else str(label)]
