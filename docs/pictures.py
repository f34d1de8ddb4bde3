# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Draws the pictures of ``program.md``: ``python docs/pictures.py``. Needs the Python package
graphviz, and its command ``dot``."""

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from pyro_fusion import FusionModel, Posterior


def main() -> None:
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
        model = FusionModel(posteriors, pooling=pooling, base=prior)
        graph = pyro.render_model(model, render_distributions=True)
        graph.render(Path(__file__).with_name(pooling), format="svg", cleanup=True)


if __name__ == "__main__":
    main()
