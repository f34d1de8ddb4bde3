# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Reliability curves: whether forecasts are right as often as they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_fusion.plotting.common import BLUE, VERMILION, new_axes, require_matplotlib
from pyro_fusion.plotting.diagnostics import Reliability, reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

__all__ = ["plot_calibration"]

_LEAST, _LARGEST = 3.0, 10.0


def plot_calibration(
    probabilities: ArrayLike | Tensor,
    targets: ArrayLike | Tensor,
    *,
    before: ArrayLike | Tensor | None = None,
    bins: int = 15,
    names: tuple[str, str] = ("after", "before"),
    ax: Axes | None = None,
) -> Axes:
    """Reliability curves: accuracy by confidence, a marker for each bin that has forecasts, larger
    for more forecasts. The diagonal is perfect calibration; the legend has the expected calibration
    error. See :func:`~pyro_fusion.plotting.diagnostics.reliability`.

    :param probabilities: of the classes, ``[N, C]``.
    :param targets: the true classes, integers ``[N]``.
    :param before: the probabilities before calibration, or those of another forecaster,
        ``[N, C]``.
    :param bins: the number of bins of confidence, of equal width.
    :param names: of ``probabilities`` and ``before`` in the legend.
    :param ax: axes to draw into; a new figure by default.
    :raises StructureError: if the shapes do not fit.
    :raises ParameterError: if rows are no probabilities, a class is out of range, or ``bins < 1``.
    :raises ImportError: without matplotlib.
    """
    y = torch.as_tensor(targets)
    after = reliability(torch.as_tensor(probabilities), y, bins)
    curves: list[tuple[Reliability, str, dict[str, Any]]] = []
    if before is not None:
        hollow = {"marker": "s", "linestyle": "--", "color": VERMILION, "facecolors": "white"}
        curves.append((reliability(torch.as_tensor(before), y, bins), names[1], hollow))
    filled = {"marker": "o", "linestyle": "-", "color": BLUE, "facecolors": BLUE}
    curves.append((after, names[0], filled))
    require_matplotlib()

    ax = new_axes(ax, 4.2, 4.2)
    ax.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":", label="perfect")
    for curve, name, style in curves:
        _draw(ax, curve, name, style)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.03)
    ax.set_aspect("equal")
    ax.set_xlabel("confidence")
    ax.set_ylabel("accuracy")
    ax.legend(loc="best", fontsize=9)
    return ax


def _draw(ax: Axes, curve: Reliability, name: str, style: dict[str, Any]) -> None:
    full = curve.count > 0
    x, y = curve.confidence[full].cpu().numpy(), curve.accuracy[full].cpu().numpy()
    share = (curve.count[full] / curve.count.max()).cpu().sqrt().numpy()
    # Hidden from the legend; an empty line with the marker stands there for both.
    ax.plot(x, y, color=style["color"], linestyle=style["linestyle"], label="_" + name, zorder=2)
    ax.scatter(
        x,
        y,
        s=(_LEAST + (_LARGEST - _LEAST) * share) ** 2,
        marker=style["marker"],
        facecolors=style["facecolors"],
        edgecolors=style["color"],
        zorder=3,
    )
    ax.plot(
        [],
        [],
        color=style["color"],
        linestyle=style["linestyle"],
        marker=style["marker"],
        markerfacecolor=style["facecolors"],
        label=f"{name}, error {curve.error:.3f}",
    )
