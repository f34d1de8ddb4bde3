# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What the parties of a simulated problem hand over, and what a fusion of it is judged by: the true
atom of each component and of each point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mixtures import (
    NUM_PARTIES,
    Array,
    Draw,
    Fits,
    Task,
    draw_many,
    draw_overlapping,
    local_fits,
)
from numpy.typing import NDArray
from pyro.distributions import Normal
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import digamma
from scipy.stats import multivariate_normal
from torch.distributions import Distribution, MultivariateNormal, kl_divergence

from pyro_fusion import Fusion, NormalWishart, Posterior, fuse
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.families import Factor
from pyro_fusion.pooling import pooling_named


@dataclass(frozen=True)
class Problem:
    """What the parties hand over, and what it is judged by.

    :ivar fits: the local fits.
    :ivar drawn: what they are to.
    :ivar means: of each party's components.
    :ivar matches: the true atom of each component, ``[N]``.
    :ivar members: the component of each point by its party's fit, numbered over all parties.
    :ivar parties: the local posteriors.
    :ivar messages: the same, all with the prior ``base``, for ``product``.
    :ivar pooled: k-means on everybody's points, told the number.
    :ivar matched: the average of each atom over the parties that have it, or None.
    :ivar pooled_matches: the exclusive barycentres of the components that are truly of one atom,
        or None.
    """

    fits: Fits
    drawn: Draw
    means: list[Array]
    matches: NDArray[np.intp]
    members: NDArray[np.intp]
    parties: list[Posterior]
    messages: list[Posterior]
    base: Distribution
    pooled: Array
    matched: Array | None = None
    pooled_matches: Array | None = None

    @property
    def truth(self) -> Array:
        """The atoms that some party has, ``[K, D]``."""
        return self.drawn.truth

    @property
    def gaussians(self) -> bool:
        """Whether components are Gaussians, mean and precision: those of simulation 1."""
        return len(self.drawn.covariances) > 0

    @property
    def largest(self) -> int:
        """The number of components of the party that has most."""
        return max(map(len, self.means))

    def fusion(
        self,
        pooling: str,
        assignment_prior: AssignmentPrior | None = None,
        dispersion: float | None = None,
    ) -> Fusion:
        """The parties fused by a pooling."""
        parties = self.messages if pooling == "product" else self.parties
        given = {"atom": self.base}
        return fuse(parties, pooling, assignment_prior, prior=given, dispersion=dispersion)


def locations(atoms: Factor) -> Array:
    """The means of atoms, ``[K, D]``."""
    location = atoms.location()
    assert location is not None
    return location.numpy()


def problems_of(task: Task, cache: Path | None) -> dict[str, Problem]:
    """Source of the local posteriors -> problem."""
    fits = local_fits(task, cache)
    if task.simulation == 1:
        return overlapping(fits, draw_overlapping(task))
    return many(fits, draw_many(task))


def _split(f: Fits, name: str) -> list[Array]:
    return np.split(f[name], f["sizes"].cumsum()[:-1])


def _check(f: Fits, drawn: Draw) -> None:
    """:raises ValueError: if the fits are not to what was drawn."""
    if not np.array_equal(f["truth"], drawn.truth):
        raise ValueError("the cached fits are to other draws, of other versions: empty the cache")


def overlapping(f: Fits, drawn: Draw) -> dict[str, Problem]:
    """Simulation 1: Normal-Wishart components, with each party's own prior divided out of its
    messages and one common prior put in.

    :raises ValueError: if the fits are not to what was drawn.
    """
    _check(f, drawn)
    own = Factor.of(_normal_wishart(f, "prior_"))
    local = Factor.of(_normal_wishart(f))
    base = _common_prior(f)
    points = f["concentration"] - np.repeat(f["prior_concentration"], f["sizes"])
    party = torch.arange(NUM_PARTIES).repeat_interleave(torch.as_tensor(f["sizes"]))
    natural = local.natural - own.natural[party] + Factor.of(base).natural
    matches = true_matches(f, drawn)
    pooled = pooling_named("exclusive").barycenter(
        local, torch.as_tensor(matches), len(drawn.truth)
    )
    problem = Problem(
        fits=f,
        drawn=drawn,
        means=_split(f, "loc"),
        matches=matches,
        members=predicted(f, points, drawn.data),
        parties=_parties(local, f),
        messages=_parties(local.from_natural(natural), f),
        base=base,
        pooled=f["pooled"],
        pooled_matches=locations(pooled),
    )
    return {"": problem}


def _normal_wishart(f: Fits, prefix: str = "") -> NormalWishart:
    names = ("loc", "concentration", "df", "precision")
    loc, concentration, df, precision = (torch.as_tensor(f[prefix + name]) for name in names)
    return NormalWishart(loc, concentration, df, precision_matrix=precision)


def _common_prior(f: Fits) -> NormalWishart:
    """Scikit-learn's rule on everybody's points, made from the parties' priors alone: the mean of
    their means, and within plus between covariance."""
    between = np.cov(f["prior_loc"].T)
    covariance = torch.as_tensor(f["prior_precision"].mean(0) + between)
    return NormalWishart(
        torch.as_tensor(f["prior_loc"].mean(0)), 1.0, 2.0, precision_matrix=covariance
    )


def _parties(local: Factor, f: Fits) -> list[Posterior]:
    ends = f["sizes"].cumsum()
    return [
        Posterior(
            {"atom": local.index_select(0, torch.arange(end - size, end))}, {"atom": "component"}
        )
        for end, size in zip(ends, f["sizes"], strict=True)
    ]


def true_matches(f: Fits, drawn: Draw) -> NDArray[np.intp]:
    """The true atom of each component, ``[N]``: each party's are matched one to one with its own
    true Gaussians, so that the symmetric KL divergences between them add up to the least."""
    fitted = zip(_split(f, "loc"), _split(f, "precision"), _split(f, "df"), strict=True)
    own = zip(drawn.means, drawn.covariances, drawn.atoms, strict=True)
    groups = []
    for (loc, precision, df), (mean, covariance, atoms) in zip(fitted, own, strict=True):
        p = _gaussians(loc[:, None], precision[:, None] / df[:, None, None, None])
        q = _gaussians(mean, covariance)
        cost = kl_divergence(p, q) + kl_divergence(q, p)  # of all pairs
        groups.append(atoms[linear_sum_assignment(cost)[1]])
    return np.concatenate(groups)


def predicted(f: Fits, points: Array, data: Sequence[Array]) -> NDArray[np.intp]:
    """The component of each point by its party's mixture, as scikit-learn's ``predict`` finds it:
    the greatest expected log density, weights included. Components are numbered over all parties,
    points are in the order of the parties.

    :param f: "sizes", "loc", "concentration", "df" and "precision" of fits.
    :param points: of each component, ``[N]``, which make its weight.
    :param data: each party's points.
    """
    sizes = f["sizes"]
    size = np.repeat(sizes, sizes)  # of the party, for each component
    dim = f["loc"].shape[1]
    half = digamma((f["df"][:, None] - np.arange(dim)) / 2).sum(1)
    # Up to what is the same for all components of a party.
    constant = (half + dim * np.log(2 / f["df"]) - dim / f["concentration"]) / 2
    constant += digamma(points + 1 / size)
    covariances = f["precision"] / f["df"][:, None, None]
    members, first = [], 0
    for x, own in zip(data, sizes, strict=True):
        scores = [
            constant[k] + multivariate_normal.logpdf(x, f["loc"][k], covariances[k])
            for k in range(first, first + own)
        ]
        members.append(first + np.argmax(scores, axis=0))
        first += own
    return np.concatenate(members)


def _gaussians(mean: Array, covariance: Array) -> MultivariateNormal:
    return MultivariateNormal(torch.as_tensor(mean), torch.as_tensor(covariance))


def many(f: Fits, drawn: Draw) -> dict[str, Problem]:
    """Simulation 2: Normal components with sd 0.1, that of the mean of a hundred points with unit
    noise, under the prior Normal(0, 2 √50); at the party's own atoms, and where k-means put
    them.

    :raises ValueError: if the fits are not to what was drawn.
    """
    _check(f, drawn)
    truth = drawn.truth
    matched = np.stack([f["jittered"][f["atom"] == k].mean(0) for k in range(len(truth))])
    zero = torch.zeros(truth.shape[1], dtype=torch.float64)
    base = Normal(zero, 2 * 50**0.5).to_event(1)
    result = {}
    for name, source in {"jittered truth": "jittered", "k-means": "kmeans"}.items():
        local = Factor.of(Normal(torch.as_tensor(f[source]), 0.1).to_event(1))
        parties = _parties(local, f)
        means = _split(f, source)
        matches = [
            atoms[linear_sum_assignment(cdist(found, own, "sqeuclidean"))[1]]
            for found, own, atoms in zip(means, drawn.means, drawn.atoms, strict=True)
        ]
        result[name] = Problem(
            fits=f,
            drawn=drawn,
            means=means,
            matches=np.concatenate(matches),
            members=_nearest(means, drawn.data),
            parties=parties,
            messages=parties,
            base=base,
            pooled=f["pooled"],
            matched=matched,
        )
    return result


def _nearest(means: Sequence[Array], data: Sequence[Array]) -> NDArray[np.intp]:
    """The nearest of its party's means for each point, numbered over all parties."""
    first = np.cumsum([0, *map(len, means)])
    parties = zip(first, data, means, strict=False)
    return np.concatenate([i + cdist(x, m).argmin(1) for i, x, m in parties])
