# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of a fusion. Matplotlib is optional and imported only here; each function draws into
what it is given, or into something new, and returns it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pyro_fusion.errors import StructureError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

    from pyro_fusion.result import Fusion, Matching

__all__ = ["plot_assignment", "plot_atoms", "plot_objective"]

# Okabe & Ito's blue: legible in print and for the colour-blind.
_BLUE = "#0072B2"
_GREY = "#999999"
_EMPTY = "#F2F2F2"

_MAX_INCHES = 12.0
# Where a cell is too small for its number, numbers and names are left out.
_FONT_SIZE, _MIN_FONT_SIZE = 8.0, 4.5


def plot_assignment(fusion: Fusion, label: str | None = None, ax: Axes | None = None) -> Axes:
    """Parties by atoms: a filled cell where a party has the atom, with the number of its component
    in it; below each atom how many parties have it. Numbers are left out where there is no room.

    :param fusion: the result of :func:`~pyro_fusion.fuse`.
    :param label: which label; may be left out if there is one.
    :param ax: axes to draw into; a new figure by default.
    :raises StructureError: for a label that the fusion does not have, or if there are several and
        none is given.
    :raises ImportError: without matplotlib.
    """
    matching = _matching(fusion, label)
    _require_matplotlib()
    from matplotlib.colors import ListedColormap
    from matplotlib.ticker import MaxNLocator

    names = list(fusion.party_names)
    num_parties, num_atoms = len(names), matching.num_atoms
    table = torch.full((num_parties, num_atoms), -1)
    for s, a in enumerate(matching.assignment):
        table[s, a] = torch.arange(len(a))
    margin = 1.2 + 0.07 * max(map(len, names))
    ax = _axes(ax, max(4.0, margin + 0.35 * num_atoms), 1.3 + 0.3 * num_parties)
    ax.imshow(
        (table >= 0).numpy(),
        cmap=ListedColormap([_EMPTY, _BLUE]),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
    )
    ax.set_xlabel("atom")
    ax.set_ylabel("party")
    ax.set_title(f"which {matching.label} of each party is in which atom", fontsize=10)

    font_size = min(_FONT_SIZE, 0.45 * _cell_points(ax, num_parties, num_atoms))
    if font_size < _MIN_FONT_SIZE:
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
    ax.set_xticks(range(num_atoms), [f"{k}\n×{int(m)}" for k, m in enumerate(matching.popularity)])
    ax.set_yticks(range(num_parties), names)
    ax.set_xlabel("atom, × number of parties that have it")
    return ax


def plot_objective(fusion: Fusion, ax: Axes | None = None) -> Axes:
    """The objective F after the start and after each iteration; it never rises.

    :param ax: axes to draw into; a new figure by default.
    :raises ImportError: without matplotlib.
    """
    _require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    ax = _axes(ax, 5, 3)
    ax.plot(range(len(fusion.objective)), fusion.objective, marker="o", color=_BLUE)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel("iteration")
    ax.set_ylabel("objective F")
    return ax


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
    """Components that are images, a column for each atom: the fused one on top, below it the one
    that each party contributed.

    :param fusion: the result of :func:`~pyro_fusion.fuse`.
    :param fused: the images of the atoms, ``[K, height, width]``.
    :param local: of each party the images of its components, ``[L_s, height, width]``.
    :param label: which label; may be left out if there is one.
    :param order: the atoms to draw, from left to right; by default all, in their order.
    :param titles: above each of the K atoms, in their order.
    :param names: beside each of the S parties.
    :param limits: the values that are drawn white and black; by default the extremes of all.
    :param figure: an empty figure to draw into; by default a new one, which pyplot does not know.
    :raises StructureError: if a party, an atom or a component has no image, or too many.
    :raises ImportError: without matplotlib.
    """
    matching = _matching(fusion, label)
    _require_matplotlib()
    from matplotlib.figure import Figure

    sources = [list(range(matching.num_atoms)), *(a.tolist() for a in matching.assignment)]
    images = _images([fused, *local], [len(source) for source in sources])
    atoms = list(range(matching.num_atoms) if order is None else order)
    titles = [str(k) for k in range(matching.num_atoms)] if titles is None else titles
    names = ["fused", *([f"party {n}" for n in fusion.party_names] if names is None else names)]
    low, high = limits or (min(float(v.min()) for v in images), max(float(v.max()) for v in images))
    if figure is None:
        cell = min(0.8, 2 * _MAX_INCHES / max(len(atoms), len(images)))
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
                spine.set_color(_BLUE if i == 0 else _GREY)
                spine.set_linewidth(2.5 if i == 0 else 0.8)
            if i == 0:
                cell_axes.set_title(titles[k], fontsize=9)
        first = grid[i, 0]
        first.set_ylabel(names[i], rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    return figure


# -- pieces ----------------------------------------------------------------------------------------


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ImportError("plots need matplotlib: pip install 'pyro-fusion[plot]'") from e


def _matching(fusion: Fusion, label: str | None) -> Matching:
    if label is None:
        return fusion.only_matching()
    if label not in fusion.matchings:
        raise StructureError(
            f"the fusion has no label '{label}'; its labels are {sorted(fusion.matchings)}"
        )
    return fusion.matchings[label]


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    size = (min(width, _MAX_INCHES), min(height, _MAX_INCHES))
    return plt.subplots(figsize=size, layout="constrained")[1]


def _cell_points(ax: Axes, rows: int, columns: int) -> float:
    """The smaller side of a cell, in points, before the layout is final."""
    figure: Any = ax.figure
    box = ax.get_window_extent()
    return 72 / figure.dpi * min(box.width / columns, box.height / rows)


def _images(sources: Sequence[ArrayLike], counts: Sequence[int]) -> list[torch.Tensor]:
    """``[n, height, width]`` each, checked against the number of components."""
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
