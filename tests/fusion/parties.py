# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Parties that have some of four true components each, and know them up to noise."""

import pyro.distributions as dist
import torch

from pyro_fusion import Posterior

TRUTH = torch.tensor([[0.0, 0.0], [6.0, 1.0], [-5.0, 4.0], [2.0, -7.0]], dtype=torch.float64)


HOLDS = [[0, 1, 2], [2, 0], [3, 1, 0], [1, 2, 3]]


BASE = {
    "loc": dist.Normal(torch.zeros(2).double(), 20.0).to_event(1),
    "scale": dist.LogNormal(torch.zeros(2).double(), 3.0).to_event(1),
    "weights": dist.Dirichlet(torch.ones(3).double()),
    "noise": dist.Gamma(torch.tensor(1.0).double(), torch.tensor(0.1).double()),
}


AXES = {"loc": ("component", None), "scale": ("component", None), "weights": ("component",)}


def party(holds, seed, noise=0.1):
    """A party that has some of the true components, in an order of its own."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    loc = TRUTH[holds] + noise * randn(len(holds), 2)
    return Posterior(
        {
            "loc": dist.Normal(loc, 0.1 + 0.05 * randn(len(holds), 2).abs()).to_event(1),
            "scale": dist.LogNormal(
                0.1 * randn(len(holds), 2), torch.tensor(0.1).double().expand(len(holds), 2)
            ).to_event(1),
            "weights": dist.Dirichlet(10 * (torch.tensor(holds).double() + 1)),
            "noise": dist.Gamma(20 + randn().abs(), 10 + randn().abs()),
        },
        AXES,
    )


def parties(noise=0.1):
    return [party(h, s, noise) for s, h in enumerate(HOLDS)]


def same_grouping(assignment, holds):
    """Whether components share an atom exactly if they are the same true component."""
    atoms = torch.cat(list(assignment))
    truth = torch.tensor([k for h in holds for k in h])
    return torch.equal(atoms[:, None] == atoms, truth[:, None] == truth)
