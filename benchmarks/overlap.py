# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Separated components, any share of which the parties have in common: local posteriors with a
known truth, made from sufficient statistics without a fit.

Atoms drawn at random may lie within the noise of each other, which nobody can tell apart: they are
drawn again until the nearest two are ten posterior standard deviations apart, in a scale in which
these are about one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

from pyro_fusion import NormalWishart, Posterior

Array = NDArray[np.float64]
Atoms = NDArray[np.intp]
# Which atoms each party has, in the order of its components.
Layout = Callable[[np.random.Generator], list[Atoms]]

APART = 10.0
_TRIES = 10_000


@dataclass(frozen=True)
class Overlap:
    """A problem.

    :ivar parties: the local posteriors, of site "x" along the label "component".
    :ivar prior: of one component, for ``product``.
    :ivar matches: the true atom of each component, the parties in turn.
    :ivar sizes: the number of components of each party.
    """

    parties: list[Posterior]
    prior: dist.TorchDistribution
    matches: Atoms
    sizes: list[int]

    @property
    def num_atoms(self) -> int:
        """The number of atoms that some party has."""
        return len(np.unique(self.matches))


class Family(Protocol):
    """A kind of atoms and of posteriors of them."""

    def atoms(self, rng: np.random.Generator, size: int) -> tuple[Array, float]:
        """Atoms ``[size, ...]``, and how many posterior sds the nearest two are apart."""

    def parties(
        self, rng: np.random.Generator, atoms: Array, has: Sequence[Atoms]
    ) -> list[Posterior]:
        """The posterior of each party, of the atoms that it has."""

    def prior(self) -> dist.TorchDistribution:
        """That of one component."""


@dataclass(frozen=True)
class Case:
    """A kind of problem."""

    name: str
    family: Family
    layout: Layout

    def draw(self, seed: int) -> Overlap:
        """The problem of a seed.

        :raises ValueError: if atoms that are far enough apart are too rare.
        """
        rng = np.random.default_rng([seed, crc32(self.name.encode())])
        has = self.layout(rng)
        matches = np.concatenate(has)
        for _ in range(_TRIES):
            atoms, nearest = self.family.atoms(rng, int(matches.max()) + 1)
            if nearest >= APART:
                parties = self.family.parties(rng, atoms, has)
                return Overlap(parties, self.family.prior(), matches, list(map(len, has)))
        raise ValueError(f"{self.name}: no atoms {APART:g} sds apart in {_TRIES} draws")


# -- who has which atom ----------------------------------------------------------------------------


def sharing(sizes: Sequence[int], shared: int) -> Layout:
    """Parties with ``sizes`` components, of which the first ``shared`` are the same atoms in all,
    and the others nobody else's; each in an order of its own."""

    def layout(rng: np.random.Generator) -> list[Atoms]:
        has, used = [], shared
        for size in sizes:
            common = min(shared, size)
            own = np.r_[np.arange(common), used + np.arange(size - common)]
            has.append(rng.permutation(own))
            used += size - common
        return has

    return layout


def by_chance(parties: int, size: int, probability: float) -> Layout:
    """Each party has each of ``size`` atoms with a probability, and one at least."""

    def layout(rng: np.random.Generator) -> list[Atoms]:
        rows: list[NDArray[np.bool_]] = []
        while len(rows) < parties:
            row = rng.random(size) < probability
            if row.any():
                rows.append(row)
        present = np.stack(rows)
        present = present[:, present.any(0)]
        return [rng.permutation(np.flatnonzero(row)) for row in present]

    return layout


# -- families --------------------------------------------------------------------------------------


def _posterior(of: dist.TorchDistribution, event: bool = True) -> Posterior:
    axes = ("component", None) if event else ("component",)
    return Posterior({"x": of}, {"x": axes})


def _tensor(x: Array | NDArray[np.int64]) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


@dataclass(frozen=True)
class Normals:
    """Locations N(0, 10²) in each coordinate, found with an error.

    :ivar dim: of the locations.
    :ivar error: the sd of the error, of each party if there are several.
    :ivar admitted: the sd of the posteriors over that of the error.
    :ivar worse: the error of the first party over that of the others; its posteriors admit no more
        than theirs.
    """

    dim: int
    error: float | tuple[float, ...] = 0.2
    admitted: float = 1.0
    worse: float = 1.0

    def atoms(self, rng: np.random.Generator, size: int) -> tuple[Array, float]:
        atoms = 10 * rng.normal(size=(size, self.dim))
        sd = max(self.admitted, self.worse, 1.0) * np.max(self.error)
        return atoms, _nearest(atoms / sd)

    def parties(
        self, rng: np.random.Generator, atoms: Array, has: Sequence[Atoms]
    ) -> list[Posterior]:
        result = []
        for s, own in enumerate(has):
            error = self.error[s] if isinstance(self.error, tuple) else self.error
            worse = self.worse if s == 0 else 1.0
            loc = atoms[own] + worse * error * rng.normal(size=(len(own), self.dim))
            scale = torch.full(loc.shape, self.admitted * error, dtype=torch.float64)
            result.append(_posterior(dist.Normal(_tensor(loc), scale)))
        return result

    def prior(self) -> dist.TorchDistribution:
        return dist.Normal(torch.zeros(self.dim, dtype=torch.float64), 10.0).to_event(1)


@dataclass(frozen=True)
class NormalWisharts:
    """Gaussians with centres N(0, 10²) in each coordinate: mean and precision, found from points.

    :ivar dim: of the points.
    :ivar points: of each component.
    """

    dim: int
    points: int = 60

    def atoms(self, rng: np.random.Generator, size: int) -> tuple[Array, float]:
        """:return: means, and roots of covariances, ``[size, 1 + dim, dim]``."""
        means = 10 * rng.normal(size=(size, 1, self.dim))
        scatter = rng.normal(size=(size, self.dim, 3 * self.dim + 3))
        covariances = scatter @ scatter.swapaxes(1, 2) / scatter.shape[-1]
        apart = [np.inf]
        for a in range(size):
            for b in range(a):
                step = (means[a] - means[b])[0]
                variance = (covariances[a] + covariances[b]) / 2 / self.points
                apart.append(np.sqrt(step @ np.linalg.solve(variance, step)))
        return np.concatenate([means, np.linalg.cholesky(covariances)], 1), min(apart)

    def parties(
        self, rng: np.random.Generator, atoms: Array, has: Sequence[Atoms]
    ) -> list[Posterior]:
        return [
            _posterior(self._fit(rng.normal(size=(len(own), self.points, self.dim)), atoms[own]))
            for own in has
        ]

    def _fit(self, noise: Array, atoms: Array) -> NormalWishart:
        """The posterior of Gaussians, each of its own points."""
        x = atoms[:, :1] + noise @ atoms[:, 1:].swapaxes(1, 2)
        prior, n = self.prior(), self.points
        concentration = prior.concentration + n
        mean = x.mean(1)
        about = x - mean[:, None]
        between = float(prior.concentration) * n / float(concentration)
        scatter = about.swapaxes(1, 2) @ about + between * mean[:, :, None] * mean[:, None]
        ones = torch.ones(len(x), dtype=torch.float64)
        return NormalWishart(
            _tensor(n * mean / float(concentration)),
            concentration * ones,
            (prior.df + n) * ones,
            precision_matrix=_tensor(scatter + np.eye(self.dim)),
        )

    def prior(self) -> NormalWishart:
        eye = torch.eye(self.dim, dtype=torch.float64)
        return NormalWishart(eye.new_zeros(self.dim), 0.01, self.dim + 2.0, precision_matrix=eye)


@dataclass(frozen=True)
class Gammas:
    """Poisson rates, exponential with mean 10 in each coordinate, found from counts.

    :ivar dim: of the rates.
    :ivar exposure: of each component.
    """

    dim: int
    exposure: float = 50.0

    def atoms(self, rng: np.random.Generator, size: int) -> tuple[Array, float]:
        atoms = rng.gamma(1.0, 10.0, size=(size, self.dim))
        return atoms, _nearest(2 * np.sqrt(self.exposure * atoms))

    def parties(
        self, rng: np.random.Generator, atoms: Array, has: Sequence[Atoms]
    ) -> list[Posterior]:
        result = []
        for own in has:
            counts = _tensor(rng.poisson(atoms[own] * self.exposure))
            rate = torch.full_like(counts, 0.1 + self.exposure)
            result.append(_posterior(dist.Gamma(1 + counts, rate)))
        return result

    def prior(self) -> dist.TorchDistribution:
        ones = torch.ones(self.dim, dtype=torch.float64)
        return dist.Gamma(ones, 0.1 * ones).to_event(1)


@dataclass(frozen=True)
class Dirichlets:
    """Topics, Dirichlet(0.1), found from words.

    :ivar dim: the number of words in the vocabulary.
    :ivar words: of each component.
    """

    dim: int
    words: int = 2000

    def atoms(self, rng: np.random.Generator, size: int) -> tuple[Array, float]:
        atoms = rng.dirichlet(np.full(self.dim, 0.1), size)
        return atoms, _nearest(2 * np.sqrt(self.words * atoms))

    def parties(
        self, rng: np.random.Generator, atoms: Array, has: Sequence[Atoms]
    ) -> list[Posterior]:
        return [
            _posterior(
                dist.Dirichlet(0.1 + _tensor(rng.multinomial(self.words, atoms[own]))), False
            )
            for own in has
        ]

    def prior(self) -> dist.TorchDistribution:
        return dist.Dirichlet(torch.full((self.dim,), 0.1, dtype=torch.float64))


def _nearest(x: Array) -> float:
    """How far the nearest two rows are apart; infinite for one row."""
    return float(pdist(x).min(initial=np.inf))


# -- the cases -------------------------------------------------------------------------------------


def _case(kind: str, family: Family, parties: int | Sequence[int], own: int, shared: int) -> Case:
    """A case of :func:`sharing`; ``parties`` with ``own`` components each, or their numbers."""
    if isinstance(parties, int):
        return Case(
            f"{kind}, {parties} x {own}, {shared}", family, sharing([own] * parties, shared)
        )
    sizes = " + ".join(map(str, parties))
    return Case(f"{kind}, {sizes}, {shared}", family, sharing(parties, shared))


# Dimensions, parties, components of each, how many of them are everybody's: those on which the
# median nearest neighbour misled T ...
_HALF_OR_LESS = [
    *[(20, 2, 5, 0), (20, 2, 5, 2), (20, 6, 5, 2), (5, 4, 6, 0), (5, 4, 6, 2), (2, 6, 5, 1)],
    (50, 3, 8, 1),
]
# ... and more of these.
_ANY_SHARE = [
    *[(2, 2, 5, 0), (2, 2, 5, 2), (2, 2, 6, 3), (2, 2, 5, 4), (2, 4, 6, 2), (2, 10, 4, 3)],
    *[(3, 5, 8, 4), (5, 3, 6, 5), (5, 10, 4, 1), (10, 4, 10, 1), (20, 2, 6, 3), (20, 3, 5, 2)],
    (20, 8, 5, 4),
]

CASES = [
    *[_case(f"Normal {d}", Normals(d), *rest) for d, *rest in _HALF_OR_LESS + _ANY_SHARE],
    _case("Normal-Wishart 3", NormalWisharts(3), 2, 5, 0),
    _case("Normal-Wishart 3", NormalWisharts(3), 4, 5, 2),
    _case("Normal-Wishart 2", NormalWisharts(2), 3, 4, 3),
    _case("Gamma 4", Gammas(4), 2, 5, 0),
    _case("Gamma 4", Gammas(4), 4, 5, 2),
    _case("Gamma 10", Gammas(10), 3, 5, 4),
    _case("Dirichlet 100", Dirichlets(100), 2, 5, 0),
    _case("Dirichlet 100", Dirichlets(100), 4, 5, 2),
    _case("Dirichlet 30", Dirichlets(30), 3, 6, 3),
    _case("Normal 5", Normals(5), (2, 3, 6, 10), 0, 2),
    _case("Normal 10, precisions", Normals(10, (0.02, 0.1, 0.3, 1.0)), 4, 5, 2),
    _case("Normal 5, one bad", Normals(5, worse=5.0), 4, 5, 3),
    _case("Normal 5, too sure", Normals(5, admitted=0.1), 4, 5, 2),
    _case("Normal 2, too sure", Normals(2, admitted=0.1), 4, 4, 3),
    _case("Normal 5, too wide", Normals(5, admitted=3.0), 4, 5, 2),
    _case("Normal 20", Normals(20), 5, 1, 0),
    _case("Normal 20", Normals(20), 5, 1, 1),
    _case("Normal 5", Normals(5), 5, 5, 5),
    _case("Normal 2", Normals(2), 10, 4, 4),
    Case("Normal 2, 6 of 8 by .3", Normals(2), by_chance(6, 8, 0.3)),
    Case("Normal 5, 10 of 6 by .5", Normals(5), by_chance(10, 6, 0.5)),
    Case("Normal 20, 4 of 12 by .4", Normals(20), by_chance(4, 12, 0.4)),
    Case("Normal-Wishart 3, 5 of 8 by .4", NormalWisharts(3), by_chance(5, 8, 0.4)),
    Case("Gamma 6, 5 of 8 by .6", Gammas(6), by_chance(5, 8, 0.6)),
    Case("Dirichlet 50, 6 of 8 by .4", Dirichlets(50), by_chance(6, 8, 0.4)),
]
