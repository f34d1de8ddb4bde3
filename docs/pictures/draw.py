# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Draws the pictures in this folder, for the pages beside it and the README: ``python
docs/pictures/draw.py``. Needs matplotlib, the Python package graphviz, and its command ``dot``."""

from pathlib import Path

import graphviz
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse

from pyro_fusion import FusionModel, Posterior, fuse
from pyro_fusion.plotting import plot_components

FOLDER = Path(__file__).parent
FONT = {"fontname": "Helvetica", "fontsize": "11"}
# Of Okabe & Ito's colours the light ones, under black text.
READ, CORE, OUT = "#CFE8F6", "#FBE3B5", "#CDEBDF"


def programs() -> None:
    """The Pyro program of each pooling."""
    prior = {
        "loc": dist.Normal(torch.zeros(2), 10.0).to_event(1),
        "noise": dist.Gamma(torch.tensor(1.0), torch.tensor(1.0)),
    }
    posteriors = [
        Posterior(
            {
                "loc": dist.Normal(torch.randn(3, 2), 0.2).to_event(1),
                "noise": dist.Gamma(torch.tensor(40.0), torch.tensor(20.0 + s)),
            },
            {"loc": "component"},
        )
        for s in range(4)
    ]
    for pooling in ("exclusive", "inclusive", "product"):
        model = FusionModel(posteriors, pooling=pooling, prior=prior)
        graph = pyro.render_model(model, render_distributions=True)
        graph.render(FOLDER / pooling, format="svg", cleanup=True)


def architecture() -> None:
    """The way of a posterior through the rooms of the package; dashed is what a room uses."""
    graph = graphviz.Digraph(
        graph_attr={"rankdir": "LR", "nodesep": "0.3", "ranksep": "0.45", "compound": "true"},
        node_attr={"shape": "box", "style": "filled,rounded", "color": "#666666"} | FONT,
        edge_attr={"color": "#444444"} | FONT,
    )
    sources = {
        "guide": "Pyro, NumPyro\nguides",
        "draws": "MCMC draws",
        "fit": "scikit-learn\nfits",
        "network": "trained\nnetworks",
    }
    for name, text in sources.items():
        graph.node(name, text, fillcolor="white")
        graph.edge(name, "readers")
    graph.node("readers", "readers/", fillcolor=READ)
    graph.node(
        "posterior", "posterior/\na Posterior has\nfactors on\nlabelled axes", fillcolor=READ
    )
    graph.edge("readers", "posterior")
    graph.node(
        "program",
        "program/\nthe same problem as\nmodel and guide:\nEM, SVI, Gibbs",
        fillcolor=CORE,
    )
    with graph.subgraph(name="cluster_fusion") as inner:
        inner.attr(label="fusion/: fuse() is search(FusionProblem)", **FONT)
        inner.attr(style="rounded", color="#888888")
        with inner.subgraph() as steps:
            steps.attr(rank="same")
            steps.node(
                "assignment", "E-step: assignment/\nwith an assignment prior", fillcolor=CORE
            )
            steps.node("pooling", "M-step: pooling/\nin one of three ways", fillcolor=CORE)
        inner.edge("assignment", "pooling", dir="both")
        inner.node(
            "families", "families/\ndivergences,\nnatural and mean\nparameters", fillcolor="white"
        )
        inner.edge("pooling", "families", dir="back", style="dashed")
        inner.edge("assignment", "families", style="invis")
    graph.edge("posterior", "pooling", lhead="cluster_fusion")
    graph.edge("posterior", "program", style="invis")
    graph.edge("program", "families", lhead="cluster_fusion", dir="back", style="dashed")
    graph.node("fused", "Fusion\nwith the fused\nPosterior", fillcolor=OUT)
    graph.edge("families", "fused", ltail="cluster_fusion")
    for name, text in {
        "result": "Pyro or NumPyro guide:\nPredictive, warm start",
        "file": "file; the command: cli/",
        "module": "torch module; merging: nn/",
        "picture": "pictures: plotting/",
        "again": "the next fusion",
    }.items():
        graph.node(name, text, fillcolor="white")
        graph.edge("fused", name)
    graph.render(FOLDER / "architecture", format="svg", cleanup=True)


def idea() -> None:
    """Three parties, each with its own components in its own order, and what they are fused to."""
    centres = torch.tensor([[-4.0, -1.5], [0.0, 3.5], [4.0, -1.5], [0.3, -3.6]])
    scale = torch.tensor([0.75, 0.55])
    torch.manual_seed(3)
    posteriors = []
    for seen in ([1, 0], [2, 1, 0, 3], [3, 2, 1]):
        loc = centres[seen] + 0.6 * torch.randn(len(seen), 2)
        posteriors.append(
            Posterior({"loc": dist.Normal(loc, scale).to_event(1)}, {"loc": "component"})
        )
    fusion = fuse(posteriors)
    figure, panels = plt.subplots(
        1, 4, figsize=(10, 2.9), sharex=True, sharey=True, layout="constrained"
    )
    for s, (ax, posterior) in enumerate(zip(panels[:3], posteriors, strict=True)):
        party(ax, posterior)
        ax.set_title(f"party {'ABC'[s]}: {posterior.components('component')} components")
    plot_components(fusion, "loc", ax=panels[3])
    if (legend := panels[3].get_legend()) is not None:
        legend.remove()
    panels[3].set_title(f"fused: {fusion.num_atoms} atoms")
    for ax in panels:
        ax.set(xlabel="", ylabel="", xticks=[], yticks=[])
    plt.rcParams["svg.hashsalt"] = "pyro_fusion"
    figure.savefig(FOLDER / "idea.svg", metadata={"Date": None})
    plt.close(figure)


def party(ax: Axes, posterior: Posterior) -> None:
    """What one party believes of each of its components, by its own numbers."""
    loc, scale = posterior.factors["loc"].mean, posterior.factors["loc"].stddev
    for i, (mean, sd) in enumerate(zip(loc.tolist(), scale.tolist(), strict=True)):
        for k in (1, 2):
            shape = Ellipse(mean, 2 * k * sd[0], 2 * k * sd[1], fill=False, color="0.35", lw=1)
            ax.add_patch(shape)
        ax.text(*mean, str(i), ha="center", va="center", fontsize=12)


if __name__ == "__main__":
    programs()
    architecture()
    idea()
