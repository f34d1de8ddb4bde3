# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Forest plots: one number of each party's component, and of the atom that they became."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pyro_fusion.fusion.result import Fusion
from pyro_fusion.plotting.common import (
    BLUE,
    EMPTY,
    FONT_SIZE,
    GREY,
    MIN_FONT_SIZE,
    cell_points,
    chosen_atoms,
    new_axes,
    require_matplotlib,
)
from pyro_fusion.plotting.components import axis_names, contributions
from pyro_fusion.plotting.diagnostics import heterogeneity
from pyro_fusion.plotting.marginals import Dims

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_forest"]

_INTERVAL = (0.025, 0.5, 0.975)
_INCHES = 0.19  # of a row
_INK = "#444444"


def plot_forest(
    fusion: Fusion,
    site: str,
    *,
    label: str | None = None,
    dims: Dims | None = None,
    atoms: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A forest plot of one number of a component: for each atom a row for each party that has it,
    with its median and its central 95 % interval; below them the atom's as a diamond, and beside it
    I², the share of the parties' variation that is heterogeneity. The interval is in the
    coordinates of the site, I² in unconstrained ones; see
    :func:`~pyro_fusion.plotting.diagnostics.heterogeneity`. Names that do not fit are left out. A
    site that all parties share is one atom.

    Arguments and errors are those of :func:`plot_components`, for one number: ``dims`` is ``(i,)``,
    or ``((i, j),)`` where a component has two axes. It need not be Normal.
    """
    fused, local, members = contributions(fusion, site, label, dims, most=1)
    chosen = chosen_atoms(atoms, len(members))
    require_matplotlib()

    # A row for each party, one for the atom, and half of one between atoms.
    num_rows = sum(len(members[k]) + 1.5 for k in chosen)
    ax = new_axes(ax, 6, 1.0 + _INCHES * num_rows)
    room = cell_points(ax, math.ceil(num_rows), 1)
    font_size = min(FONT_SIZE + 1, 0.8 * room)
    named = font_size >= MIN_FONT_SIZE
    of_party = [m.quantiles(_INTERVAL)[..., 0] for m in local]
    of_atom = fused.quantiles(_INTERVAL)[..., 0]
    unconstrained = [torch.stack(m.unconstrained())[..., 0] for m in local]
    ticks: dict[float, str] = {}
    half, y = max(0.35, 2.5 / room), 0.0  # of a diamond; of the next row
    for k in chosen:
        low, centre, high = of_atom[:, k].tolist()
        below = y + len(members[k])
        ax.fill_betweenx([y - 0.6, below], low, high, color=EMPTY, linewidth=0, zorder=0)
        for s, i in members[k]:
            left, median, right = of_party[s][:, i].tolist()
            ax.plot([left, right], [y, y], color=_INK, linewidth=min(1.2, 0.3 * room))
            ax.plot(median, y, color=_INK, marker="s", markersize=min(4.0, 0.6 * room))
            if named:
                ticks[y] = fusion.party_names[s]
            y += 1
        ax.axhline(y, color=GREY, linewidth=0.4, zorder=0.5)  # leads from name to I²
        ax.fill(
            [low, centre, high, centre],
            [y, y - half, y, y + half],
            facecolor=BLUE,
            edgecolor=BLUE,
            linewidth=0.8,
            zorder=3,
        )
        ticks[y] = f"atom {k}" if any(fusion.posterior.axes[site]) else "fused"
        share = heterogeneity(*torch.stack([unconstrained[s][:, i] for s, i in members[k]], 1))
        text = "" if math.isnan(share.i_squared) else f"I² = {share.i_squared:.0%}"
        ax.annotate(
            text,
            (1.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=FONT_SIZE,
            annotation_clip=False,
        )
        y += 1.5
    ax.set_yticks(list(ticks), list(ticks.values()), fontsize=font_size if named else FONT_SIZE)
    ax.set_ylim(y - 1.2 + half, -0.9)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(axis_names(fusion, site, dims, 1)[0] + ", 95 % interval")
    return ax
