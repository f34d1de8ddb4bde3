# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What pictures need."""

import sys
from dataclasses import replace
from itertools import pairwise

import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch.distributions.transforms import StickBreakingTransform

from pyro_fusion import Posterior, StructureError, UnsupportedFamilyError
from pyro_fusion.plotting import (
    plot_atoms,
    plot_calibration,
    plot_components,
    plot_forest,
    plot_num_atoms,
    plot_objective,
    plot_popularity,
)
from tests.plotting.examples import THREE, draws, fusion, images, many, normals


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = fusion(THREE)
    fused, *local = images([3, 2, 2, 1])
    for draw in (
        result.plot,
        lambda: plot_objective(result),
        lambda: plot_atoms(result, fused, local),
        lambda: plot_popularity(result),
        lambda: plot_num_atoms(draws([2])),
        lambda: plot_components(normals(THREE), result, "loc"),
        lambda: plot_forest(normals(THREE), result, "loc"),
        lambda: plot_calibration(torch.tensor([[0.5, 0.5]]), torch.tensor([0])),
    ):
        with pytest.raises(ImportError, match=r"pip install 'pyro-fusion\[plot\]'"):
            draw()


@pytest.mark.parametrize("plot", [plot_components, plot_forest])
class TestPosteriors:
    def test_draws_into_given_axes_and_opens_no_figure(self, plot) -> None:
        axes = Figure().subplots(1, 2)
        assert plot(normals(THREE), fusion(THREE), "loc", ax=axes[1]) is axes[1]
        assert not axes[0].has_data() and axes[1].has_data()
        assert plt.get_fignums() == []

    @pytest.mark.parametrize(
        "posteriors, options, message",
        [
            (normals(THREE)[:2], {}, "posteriors of 3 parties, got 2"),
            (normals([[0, 1], [2], [1]]), {}, "party 1 has 1 components .* but 2 were fused"),
            (normals(THREE), {"site": "x"}, r"no site 'x'; the sites are \['loc'\]"),
            (normals(THREE), {"label": "x"}, "has the label 'component', got label 'x'"),
            (normals(THREE), {"atoms": [3]}, r"the atoms 0 to 2, got \[3\]"),
            (normals(THREE), {"atoms": [0.5]}, r"the atoms 0 to 2, got \[0.5\]"),
            (normals(THREE), {"atoms": []}, r"the atoms 0 to 2, got \[\]"),
            (normals(THREE), {"atoms": [1, 1]}, r"the atoms 0 to 2, got \[1, 1\]"),
            (normals(THREE), {"dims": (1,)}, r"dims from 0 to 0, such as dims=\(0,\), got \(1,\)"),
        ],
    )
    def test_what_is_wrong_is_said_and_no_figure_opened(
        self, plot, posteriors, options, message
    ) -> None:
        with pytest.raises(StructureError, match=message):
            plot(posteriors, fusion(THREE), **{"site": "loc", **options})
        assert plt.get_fignums() == []

    def test_of_several_numbers_those_are_named_that_may_be_chosen(self, plot) -> None:
        party = Posterior({"w": dist.Normal(torch.zeros(2, 3, 4), 1.0)}, {"w": ("component",)})
        result = fusion([[0, 1]], posterior=party)
        expected = r"12 numbers .* from \(0, 0\) to \(2, 3\), such as dims=\(\(0, 0\), "
        with pytest.raises(StructureError, match=expected if plot is plot_components else "12 num"):
            plot([party], result, "w")
        for dims in ((0,), ((0, 4),), ((0, -1),), (), ((0, 1), (0, 1)), ((0, 0), (0, 1), (0, 2))):
            with pytest.raises(StructureError, match="expected at most"):
                plot([party], result, "w", dims=dims)
        assert plt.get_fignums() == []
        assert plot([party], result, "w", dims=((2, 3),)).get_xlabel().startswith("w[2, 3]")

    def test_a_site_with_two_labels_is_refused(self, plot) -> None:
        party = Posterior({"t": dist.Normal(torch.zeros(2, 2), 1.0)}, {"t": ("state", "state")})
        with pytest.raises(StructureError, match=r"labels \['state', 'state'\]: expected one"):
            plot([party], replace(fusion([[0, 1]], posterior=party), matchings={}), "t")

    def test_families_without_single_numbers_are_refused(self, plot) -> None:
        joint = dist.Wishart(torch.tensor([4.0, 4.0]), torch.eye(2).expand(2, 2, 2))
        party = Posterior({"w": joint}, {"w": ("component",)})
        with pytest.raises(
            UnsupportedFamilyError, match=r"site 'w': expected a Normal.* got Wishart"
        ):
            plot([party], fusion([[0, 1]], posterior=party), "w", dims=((0, 0),))
        simplex = dist.TransformedDistribution(
            dist.Normal(torch.zeros(2, 3), 1.0).to_event(1), [StickBreakingTransform()]
        )
        party = Posterior({"w": simplex}, {"w": ("component",)})
        with pytest.raises(UnsupportedFamilyError, match="got StickBreakingTransform"):
            plot([party], fusion([[0, 1]], posterior=party), "w", dims=(0,))

    @pytest.mark.parametrize("num_parties, num_atoms", [(3, 3), (20, 20), (1, 1)])
    def test_labels_are_inside_and_none_overlaps(self, plot, num_parties, num_atoms) -> None:
        result = many(num_parties, num_atoms, min(12, num_atoms))
        posteriors = normals([a.tolist() for a in result.assignment])
        ax = plot(posteriors, result, "loc")
        figure = ax.figure
        assert max(figure.get_size_inches()) <= 12
        figure.canvas.draw()
        texts = [ax.xaxis.label, ax.yaxis.label, *ax.texts, *ax.get_yticklabels()]
        for text in filter(Text.get_text, texts):
            box = text.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, text
            assert box.y0 >= 0 and box.y1 <= figure.bbox.y1, text
        boxes = sorted((t.get_window_extent() for t in ax.get_yticklabels()), key=lambda b: b.y0)
        assert len(boxes) >= num_atoms
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))
        for label in ax.get_yticklabels():
            assert label.get_fontsize() >= 4.5
