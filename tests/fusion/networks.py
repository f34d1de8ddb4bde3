# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Parties that have some units of one network each: the weights are labelled along two layers."""

import pyro.distributions as dist
import torch

from pyro_fusion import Posterior

AXES = {
    "W1": ("h1", None),
    "b1": ("h1",),
    "W2": ("h2", "h1"),
    "b2": ("h2",),
    "W3": (None, "h2"),
}


OUTGOING = {"W2": "h1", "W3": "h2"}


SITES = [*AXES, "b3"]


BASE = {site: dist.Normal(torch.zeros((), dtype=torch.float64), 3.0) for site in SITES}


def network(seed, num_units=(6, 5), inputs=4, classes=3):
    """All weights of a network with two hidden layers."""
    g = torch.Generator().manual_seed(seed)
    n1, n2 = num_units
    shapes = {"W1": (n1, inputs), "b1": (n1,), "W2": (n2, n1), "b2": (n2,), "W3": (classes, n2)}
    shapes["b3"] = (classes,)
    return {k: torch.randn(*v, generator=g, dtype=torch.float64) for k, v in shapes.items()}


def parties(seed=0, sizes=((4, 3), (5, 4), (4, 3), (5, 4)), noise=0.05, scale=0.1, **settings):
    """Each party has some units of each layer, in an order of its own; also which."""
    every = network(seed, **settings)
    g = torch.Generator().manual_seed(seed + 1)
    posteriors, truth = [], []
    for size in sizes:
        i, j = (
            torch.randperm(len(every[b]), generator=g)[:n]
            for b, n in zip(("b1", "b2"), size, strict=True)
        )
        own = {
            "W1": every["W1"][i],
            "b1": every["b1"][i],
            "W2": every["W2"][j][:, i],
            "b2": every["b2"][j],
            "W3": every["W3"][:, j],
            "b3": every["b3"],
        }
        own = {
            k: v + noise * torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in own.items()
        }
        factors = {k: dist.Normal(v, torch.full_like(v, scale)) for k, v in own.items()}
        posteriors.append(Posterior(factors, AXES, outgoing=settings.get("outgoing")))
        truth.append({"h1": i, "h2": j})
    return posteriors, truth


def settings_of(pooling):
    return {"pooling": pooling, **({"prior": BASE} if pooling == "product" else {})}
