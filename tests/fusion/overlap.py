# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Parties that have some components in common, all, or none, in several families."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import torch

from pyro_fusion import NormalWishart, Posterior

# Far apart, but in some dimensions closer than in others.
_SPACING = 12.0


def layout(own: int, shared: int, parties: int) -> list[list[int]]:
    """The true atoms of each party: the first are those of all."""
    rest = own - shared
    return [
        [*range(shared), *range(shared + s * rest, shared + (s + 1) * rest)] for s in range(parties)
    ]


def problem(
    family: str, own: int, shared: int, parties: int, seed: int
) -> tuple[list[Posterior], dict[str, dist.Distribution], list[int]]:
    """Local posteriors, the prior they were made under, and the true atom of each component."""
    rng = np.random.default_rng([seed, own, shared, parties])
    holds = [rng.permutation(h).tolist() for h in layout(own, shared, parties)]
    make = {"normal": _normal, "wishart": _wishart, "gamma": _gamma, "dirichlet": _dirichlet}
    local, prior = make[family](rng, holds, shared + parties * (own - shared))
    posteriors = [Posterior({"atom": f}, {"atom": "component"}) for f in local]
    return posteriors, {"atom": prior}, [k for h in holds for k in h]


def _normal(rng, holds, count):
    centres = _SPACING * rng.permutation(count)[:, None] + rng.normal(size=(count, 3))
    local = [
        dist.Normal(torch.tensor(centres[h] + 0.3 * rng.normal(size=(len(h), 3))), 0.3).to_event(1)
        for h in holds
    ]
    return local, dist.Normal(torch.zeros(3).double(), _SPACING * count).to_event(1)


def _wishart(rng, holds, count, points=60):
    """The exact posteriors of Gaussians in the plane, from their points."""
    centres = _SPACING * rng.permutation(count)[:, None] + rng.normal(size=(count, 2))
    k0, df0, p0 = 0.01, 4.0, np.eye(2)
    local = []
    for h in holds:
        rows = []
        for k in h:
            x = centres[k] + rng.normal(size=(points, 2))
            mean, scatter = x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0))
            shrink = k0 * points / (k0 + points) * np.outer(mean, mean)
            rows.append((points * mean / (k0 + points), p0 + scatter + shrink))
        loc, precision = (torch.tensor(np.array(v)) for v in zip(*rows, strict=True))
        counts = torch.full((len(h),), k0 + points).double()
        local.append(NormalWishart(loc, counts, counts - k0 + df0, precision_matrix=precision))
    prior = NormalWishart(torch.zeros(2).double(), k0, df0, precision_matrix=torch.tensor(p0))
    return local, prior


def _gamma(rng, holds, count, exposure=30.0):
    """Rates of events of four kinds, from their counts."""
    rates = rng.gamma(1.0, 20.0, size=(count, 4))
    local = [
        dist.Gamma(
            torch.tensor(1.0 + rng.poisson(exposure * rates[h])), torch.tensor(0.05 + exposure)
        ).to_event(1)
        for h in holds
    ]
    shape = torch.ones(4).double()
    return local, dist.Gamma(shape, 0.05 * shape).to_event(1)


def _dirichlet(rng, holds, count, words=1500):
    """Topics over 60 words, from counts."""
    topics = rng.dirichlet(np.full(60, 0.1), size=count)
    local = [
        dist.Dirichlet(torch.tensor(0.1 + np.array([rng.multinomial(words, topics[k]) for k in h])))
        for h in holds
    ]
    return local, dist.Dirichlet(torch.full((60,), 0.1).double())
