# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Plots of atoms with the local posteriors that contributed to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_fusion.errors import UnsupportedFamilyError
from pyro_fusion.fusion.result import Fusion
from pyro_fusion.plotting.common import (
    BLUE,
    CYCLE,
    FONT_SIZE,
    GREY,
    MARKERS,
    MIN_FONT_SIZE,
    cell_points,
    chosen_atoms,
    fused_label,
    new_axes,
    require_matplotlib,
)
from pyro_fusion.plotting.marginals import Dims, Marginals, label_of, marginals

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["axis_names", "contributions", "plot_components"]

# The height of a peak, where the next row begins at 1.
_HEIGHT = 0.85


def plot_components(
    fusion: Fusion,
    site: str,
    *,
    label: str | None = None,
    dims: Dims | None = None,
    atoms: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Each atom with the components that became it, in the coordinates of the site.

    One number of a component gives a row of densities for each atom, the atom filled and the
    parties grey, each scaled to its own peak, since a fused density may be much narrower than the
    local ones. Two numbers give ellipses of 1 and 2 standard deviations for each atom, and thin
    ones of 2 for the parties. A site that all parties share is one atom, which all have.

    :param fusion: the result of :func:`~pyro_fusion.fuse`.
    :param site: whose components to draw.
    :param label: the site's label; may be left out.
    :param dims: which one or two of the numbers of a component; may be left out if there are no
        more. Places along its axis, or tuples of places where it has several: ``((0, 1), (2, 1))``.
    :param atoms: which to draw, from the top; by default all, in their order.
    :param ax: axes to draw into; a new figure by default.
    :raises StructureError: for an unknown site or label, a site with several labels, or unknown
        dims or atoms.
    :raises UnsupportedFamilyError: if the numbers are not Normal, Gamma, Beta or Dirichlet behind
        transforms of single numbers; or two are not Normal.
    :raises ImportError: without matplotlib.
    """
    fused, local, members = contributions(fusion, site, label, dims, most=2)
    chosen = chosen_atoms(atoms, len(members))
    pair = fused.params[0].shape[-1] == 2
    if pair and fused.covariance is None:
        raise UnsupportedFamilyError(
            f"ellipses are of Normal numbers, got {fused.family}; choose one number "
            "for its density, such as dims=(0,)",
            site=site,
        )
    require_matplotlib()
    names = axis_names(fusion, site, dims, 1 + pair)
    if pair:
        return _ellipses(fused, local, members, chosen, names, new_axes(ax, 6, 5.5))
    return _rows(fused, local, members, chosen, names[0], ax)


def contributions(
    fusion: Fusion, site: str, label: str | None, dims: Dims | None, most: int
) -> tuple[Marginals, list[Marginals], list[list[tuple[int, int]]]]:
    """The marginals of the atoms, those of each party, and the ``(party, component)`` pairs of each
    atom.

    :raises StructureError: as :func:`plot_components` does.
    """
    own = label_of(fusion.posterior, site, label)
    fused = marginals(fusion.posterior, site, dims, most)
    local = [marginals(p, site, dims, most) for p in fusion.parties.values()]
    if own is None:
        return fused, local, [[(s, 0) for s in range(len(local))]]
    found = fused_label(fusion, own)
    members: list[list[tuple[int, int]]] = [[] for _ in range(found.num_atoms)]
    for s, a in enumerate(found.assignment):
        for component, k in enumerate(a.tolist()):
            members[k].append((s, component))
    return fused, local, members


def axis_names(fusion: Fusion, site: str, dims: Dims | None, count: int) -> list[str]:
    """Names of the axes: the site, with the places if a component has several numbers."""
    if None not in fusion.posterior.axes[site] or (dims is None and count == 1):
        return [site]
    places = range(count) if dims is None else dims
    return [f"{site}[{', '.join(map(str, d)) if isinstance(d, tuple) else d}]" for d in places]


def _rows(
    fused: Marginals,
    local: Sequence[Marginals],
    members: Sequence[Sequence[tuple[int, int]]],
    atoms: Sequence[int],
    name: str,
    ax: Axes | None,
) -> Axes:
    ax = new_axes(ax, 6, 1.0 + max(1.5, 0.45 * len(atoms)))
    for row, k in enumerate(atoms):
        floor = len(atoms) - 1 - row
        for s, i in members[k]:
            x, density = local[s].density(i)
            y = floor + _HEIGHT * density / density.max()
            ax.plot(x.numpy(), y.numpy(), color=GREY, linewidth=0.7)
        x, density = fused.density(k)
        y = floor + _HEIGHT * density / density.max()
        ax.fill_between(x.numpy(), floor, y.numpy(), color=BLUE, alpha=0.25, linewidth=0)
        ax.plot(x.numpy(), y.numpy(), color=BLUE, linewidth=1.5)
        ax.axhline(floor, color=GREY, linewidth=0.4, zorder=1)
    font_size = min(FONT_SIZE + 1, 0.45 * cell_points(ax, len(atoms), 1))
    if font_size >= MIN_FONT_SIZE:
        labels = [f"{k}  ×{len(members[k])}" for k in atoms]
        ax.set_yticks(range(len(atoms) - 1, -1, -1), labels, fontsize=font_size)
    else:
        ax.set_yticks([])
    low, high = _limits(fused, local)
    ax.set_xlim(low, high)
    ax.set_ylim(-0.1, len(atoms))
    ax.set_xlabel(name)
    ax.set_ylabel("atom, × parties")
    return ax


def _limits(fused: Marginals, local: Sequence[Marginals]) -> tuple[float, float]:
    ends = torch.cat([m.quantiles((0.002, 0.998))[..., 0] for m in (fused, *local)], 1)
    ends = ends[:, ends.isfinite().all(0)]
    low, high = float(ends[0].min()), float(ends[1].max())
    margin = 0.02 * (high - low)
    return low - margin, high + margin


def _ellipses(
    fused: Marginals,
    local: Sequence[Marginals],
    members: Sequence[Sequence[tuple[int, int]]],
    atoms: Sequence[int],
    names: Sequence[str],
    ax: Axes,
) -> Axes:
    from matplotlib.patheffects import withStroke

    for place, k in enumerate(atoms):
        colour = CYCLE[place % len(CYCLE)]
        for s, i in members[k]:
            _outline(ax, local[s].outline(i, 2), color=colour, linewidth=0.6, alpha=0.4)
        x, y = fused.outline(k, 2).T.numpy()
        ax.fill(x, y, facecolor=colour, alpha=0.15, linewidth=0)
        for deviations in (1, 2):
            _outline(ax, fused.outline(k, deviations), color=colour, linewidth=1.3, zorder=3)
        centre = fused.forward(fused.params[0][k])
        x0, y0 = centre.tolist()
        ax.plot(x0, y0, color=colour, marker=MARKERS[place % len(MARKERS)], markersize=3, zorder=3)
        ax.annotate(
            str(k),
            (x0, y0),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=FONT_SIZE + 1,
            fontweight="bold",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=5,
        )
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])
    ax.set_title("atoms, 1 and 2 sd; thin: parties, 2 sd", fontsize=10)
    return ax


def _outline(ax: Axes, points: Tensor, **style: object) -> None:
    x, y = points.T.numpy()
    ax.plot(x, y, **style)  # type: ignore[arg-type]
