# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of a fusion. Matplotlib is optional and imported only here; each function draws into
the given axes and returns them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_fusion.fuse import Fusion

__all__ = ["plot_assignment", "plot_objective"]

# Okabe & Ito's blue: legible in print and for the colour-blind.
_BLUE = "#0072B2"


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as e:
        raise ImportError("plots need matplotlib: pip install 'pyro-fusion[plot]'") from e
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def plot_assignment(fusion: Fusion, label: str | None = None, ax: Axes | None = None) -> Axes:
    """Parties by atoms: a filled cell where a party has the atom, with the number of its component
    in it; popularities above.

    :param fusion: the result of :func:`~pyro_fusion.fuse`.
    :param label: which label; may be left out if there is one.
    :param ax: axes to draw into; new ones by default.
    """
    matching = fusion.matchings[label] if label is not None else fusion.only_matching()
    num_parties, num_atoms = len(fusion.party_names), matching.num_atoms
    table = torch.full((num_parties, num_atoms), -1)
    for s, a in enumerate(matching.assignment):
        table[s, a] = torch.arange(len(a))
    ax = _axes(ax, 1.5 + 0.35 * num_atoms, 1.2 + 0.3 * num_parties)
    from matplotlib.colors import ListedColormap

    ax.imshow(
        (table >= 0).numpy(), cmap=ListedColormap(["#f2f2f2", _BLUE]), vmin=0, vmax=1, aspect="auto"
    )
    if num_parties <= 30 and num_atoms <= 40:
        for s in range(num_parties):
            for k in range(num_atoms):
                if table[s, k] >= 0:
                    text = str(int(table[s, k]))
                    ax.text(k, s, text, ha="center", va="center", color="white", fontsize=8)
        ax.set_xticks([k - 0.5 for k in range(1, num_atoms)], minor=True)
        ax.set_yticks([s - 0.5 for s in range(1, num_parties)], minor=True)
        ax.grid(which="minor", color="white", linewidth=2)
        ax.tick_params(which="minor", length=0)
        ax.set_xticks(
            range(num_atoms),
            [f"{k}\n×{int(m)}" for k, m in enumerate(matching.popularity)],
        )
        ax.set_yticks(range(num_parties), list(fusion.party_names))
    ax.set_xlabel("atom, × number of parties that have it")
    ax.set_ylabel("party")
    ax.set_title(f"which {matching.label} of each party became which atom", fontsize=10)
    return ax


def plot_objective(fusion: Fusion, ax: Axes | None = None) -> Axes:
    """The objective F after each iteration."""
    ax = _axes(ax, 5, 3)
    ax.plot(range(len(fusion.objective)), fusion.objective, marker="o", color=_BLUE)
    ax.set_xlabel("iteration")
    ax.set_ylabel("objective F")
    return ax
