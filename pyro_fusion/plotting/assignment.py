# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Plots of the assignment: which party has which atom, and how many parties have each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pyro_fusion.fusion.result import Fusion
from pyro_fusion.plotting.common import (
    BLUE,
    EMPTY,
    FONT_SIZE,
    MIN_FONT_SIZE,
    cell_points,
    fused_label,
    new_axes,
    require_matplotlib,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_assignment", "plot_popularity"]


def plot_assignment(fusion: Fusion, label: str | None = None, ax: Axes | None = None) -> Axes:
    """A table of parties by atoms: a filled cell where a party has the atom, with the number of its
    component; below each atom how many parties have it. Numbers that do not fit are left out.

    :param fusion: the result of :func:`~pyro_fusion.fuse`.
    :param label: which label; may be left out if there is one.
    :param ax: axes to draw into; a new figure by default.
    :raises StructureError: for a label that the fusion does not have, or if there are several and
        none is given.
    :raises ImportError: without matplotlib.
    """
    found = fused_label(fusion, label)
    require_matplotlib()
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    names = list(fusion.party_names)
    num_parties, num_atoms = len(names), found.num_atoms
    table = torch.full((num_parties, num_atoms), -1)
    for s, a in enumerate(found.assignment):
        table[s, a] = torch.arange(len(a))
    margin = 1.2 + 0.07 * max(map(len, names))
    ax = new_axes(ax, max(4.0, margin + 0.35 * num_atoms), 1.3 + 0.3 * num_parties)
    ax.imshow(
        (table >= 0).numpy(),
        cmap=ListedColormap([EMPTY, BLUE]),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
    )
    ax.set_xlabel("atom")
    ax.set_ylabel("party")
    ax.set_title(f"which {found.label} of each party is in which atom", fontsize=10)

    font_size = min(FONT_SIZE, 0.45 * cell_points(ax, num_parties, num_atoms))
    if font_size < MIN_FONT_SIZE:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        return ax
    for s, k in (table >= 0).nonzero().tolist():
        text = str(int(table[s, k]))
        ax.text(k, s, text, ha="center", va="center", color="white", fontsize=font_size)
    ax.set_xticks([k - 0.5 for k in range(1, num_atoms)], minor=True)
    ax.set_yticks([s - 0.5 for s in range(1, num_parties)], minor=True)
    ax.grid(which="minor", color="white", linewidth=font_size / 4)
    ax.tick_params(which="minor", length=0)
    ax.tick_params(which="major", labelsize=font_size + 1)
    ax.set_xticks(range(num_atoms), [f"{k}\n×{int(m)}" for k, m in enumerate(found.popularity)])
    ax.set_yticks(range(num_parties), names)
    ax.set_xlabel("atom, × number of parties that have it")
    return ax


def plot_popularity(fusion: Fusion, label: str | None = None, ax: Axes | None = None) -> Axes:
    """A bar for each atom: how many parties have it. The axis ends at the number of parties.

    :param fusion: the result of :func:`~pyro_fusion.fuse`.
    :param label: which label; may be left out if there is one.
    :param ax: axes to draw into; a new figure by default.
    :raises StructureError: for a label that the fusion does not have, or if there are several and
        none is given.
    :raises ImportError: without matplotlib.
    """
    found = fused_label(fusion, label)
    require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    num_parties, num_atoms = len(fusion.party_names), found.num_atoms
    popularity = found.popularity.tolist()
    ax = new_axes(ax, max(4.0, 1.2 + 0.3 * num_atoms), 3)
    bars = ax.bar(range(num_atoms), popularity, color=BLUE, width=0.8)
    font_size = min(FONT_SIZE + 1, 0.6 * cell_points(ax, 1, num_atoms))
    if font_size >= MIN_FONT_SIZE:
        ax.bar_label(bars, fontsize=font_size, padding=1)
        ax.set_xticks(range(num_atoms))
        ax.tick_params(axis="x", labelsize=font_size)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.axhline(num_parties, color="black", linestyle="--", linewidth=0.8)
    centre = (num_atoms - 1) / 2  # a few bars should not fill the picture
    ax.set_xlim(min(-0.6, centre - 3), max(num_atoms - 0.4, centre + 3))
    ax.set_ylim(0, 1.12 * num_parties)  # room for a number above the highest bar
    steps = MaxNLocator(nbins=6, integer=True, min_n_ticks=1).tick_values(0, num_parties)
    ax.set_yticks([y for y in steps if y <= num_parties])
    ax.set_xlabel("atom")
    ax.set_ylabel(f"parties, of {num_parties}")
    ax.set_title(f"how many parties have each {found.label}", fontsize=10)
    return ax
