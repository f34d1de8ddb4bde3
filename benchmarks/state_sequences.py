# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Sequences of states against labels: how far they are from each other, and a picture of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def matched(paths: Sequence[Tensor], actions: Sequence[Tensor]) -> dict[int, int]:
    """State -> action, one to one, for as many frames as possible."""
    return _matched(paths, actions)[0]


def hamming(paths: Sequence[Tensor], actions: Sequence[Tensor]) -> float:
    """The share of frames whose state is not :func:`matched` to their action."""
    return 1 - _matched(paths, actions)[1] / sum(map(len, paths))


def _matched(paths: Sequence[Tensor], actions: Sequence[Tensor]) -> tuple[dict[int, int], int]:
    state, action = torch.cat(list(paths)), torch.cat(list(actions))
    together = torch.zeros(int(state.max()) + 1, int(action.max()) + 1, dtype=torch.long)
    together.index_put_((state, action), torch.ones_like(state), accumulate=True)
    rows, columns = linear_sum_assignment(together, maximize=True)
    pairs = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    return pairs, int(together[rows, columns].sum())


# Paul Tol's qualitative colours, which those who see fewer colours can tell apart, and blends.
COLOURS = (
    ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77")
    + ("#CC6677", "#882255", "#AA4499", "#6699CC", "#E69F00", "#661100")
)  # fmt: skip


def draw(
    strips: Mapping[str, Sequence[Tensor]],
    actions: Sequence[Tensor],
    names: Sequence[str],
    action_names: Sequence[str],
    file: Path,
) -> None:
    """Each sequence: strips of its states, in the colours of the actions that they are matched to,
    or grey, above its actions. Numbers are those of states and actions.

    :param strips: name -> states of each sequence.
    :param names: of the sequences.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(len(names), 1, figsize=(14, 1.5 * len(names) + 1.5))
    strips = {**strips, "action": actions}
    matches = {name: matched(p, actions) for name, p in strips.items()}
    for i, ax in enumerate(axes):
        for y, (name, of) in enumerate(strips.items()):
            for start, end, value in runs(of[i]):
                action = matches[name].get(value)
                colour = "#DDDDDD" if action is None else COLOURS[action % len(COLOURS)]
                ax.broken_barh([(start, end - start)], (-y, 0.85), facecolor=colour, ec="white")
                if end - start >= len(of[i]) / 60:
                    dark = action is None or sum(matplotlib.colors.to_rgb(colour)) > 1.6
                    ax.text(
                        (start + end) / 2, 0.42 - y, str(value), ha="center", va="center",
                        fontsize=7, color="black" if dark else "white",
                    )  # fmt: skip
        ax.set_yticks([0.42 - y for y in range(len(strips))], list(strips), fontsize=8)
        ax.set_xlim(0, len(actions[i]))
        ax.set_title(names[i], loc="left", fontsize=9)
        ax.spines[:].set_visible(False)
    axes[-1].set_xlabel("frame")
    patches = [
        Patch(color=COLOURS[a % len(COLOURS)], label=f"{a} {name}")
        for a, name in enumerate(action_names)
    ]
    patches.append(Patch(color="#DDDDDD", label="states without an action of their own"))
    figure.legend(handles=patches, ncols=5, loc="lower center", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.9 / figure.get_figheight(), 1, 1))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def runs(path: Tensor) -> list[tuple[int, int, int]]:
    """``(start, end, value)`` of each stretch of one value."""
    ends = [0, *((path.diff() != 0).nonzero().flatten() + 1).tolist(), len(path)]
    return [(a, b, int(path[a])) for a, b in pairwise(ends)]
