# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Reliability curves."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pyro_fusion import ParameterError, StructureError
from pyro_fusion.plotting import plot_calibration

# Ten forecasts of 0.9, six of them right; five of 0.6, three right.
P = torch.tensor([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 5)
Y = torch.tensor([0] * 6 + [1] * 4 + [0] * 3 + [1] * 2)
SURE = torch.tensor([[1.0, 0.0]] * 15)


def drawn(ax) -> dict[str, list]:
    """Legend -> the points of its curve."""
    lines = {line.get_label().lstrip("_"): line.get_xydata() for line in ax.lines}
    return {k: v.round(6).tolist() for k, v in lines.items() if k in ("before", "after", "perfect")}


def test_curves_and_errors() -> None:
    ax = plot_calibration(P, Y, before=SURE)
    assert drawn(ax) == {
        "perfect": [[0, 0], [1, 1]],
        "before": [[1, 0.6]],
        "after": [[0.6, 0.6], [0.9, 0.6]],
    }
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert texts == ["perfect", "before, error 0.400", "after, error 0.200"]


def test_curves_differ_without_colour() -> None:
    ax = plot_calibration(P, Y, before=SURE)
    handles = ax.get_legend().get_lines()
    assert len({h.get_linestyle() for h in handles}) == 3
    assert len({h.get_marker() for h in handles}) == 3


def test_markers_are_larger_where_there_are_more() -> None:
    (points,) = plot_calibration(P, Y).collections
    small, large = points.get_sizes()
    assert np.asarray(points.get_offsets())[:, 0] == pytest.approx([0.6, 0.9])
    assert small < large


def test_one_curve_alone_names_and_given_axes() -> None:
    axes = Figure().subplots(1, 2)
    names = ("fused", "x")
    assert plot_calibration(P.numpy(), Y.numpy(), names=names, ax=axes[1]) is axes[1]
    assert not axes[0].has_data()
    texts = [t.get_text() for t in axes[1].get_legend().get_texts()]
    assert texts == ["perfect", "fused, error 0.200"]
    assert plt.get_fignums() == []


def test_bad_input_opens_no_figure() -> None:
    with pytest.raises(StructureError, match=r"\[N, C\], got \[15\]"):
        plot_calibration(P[:, 0], Y)
    with pytest.raises(StructureError, match=r"classes of 3 forecasts"):
        plot_calibration(P, Y, before=P[:3])
    with pytest.raises(ParameterError, match="bins must be at least 1, got 0"):
        plot_calibration(P, Y, bins=0)
    assert plt.get_fignums() == []
