# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Simulated problems with a known truth, and what each party makes of its own data.

1. The paper's: 3 to 5 Gaussians in the plane that overlap, 10 parties of 300 points each, which
   lack some of them; every party fits a Bayesian Gaussian mixture of its own.
2. SPAHM's: 50 atoms in 50 dimensions, 10 parties whose own atoms are off by noise, taken as they
   are or found by k-means.

Every problem has a fixed seed. The local fits take most of the time, and a cache keeps them, as
arrays alone.

Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), sec. 6.1;
Yurochkin et al., *Statistical Model Aggregation via Parameter Matching* (NeurIPS 2019), sec. 5.1.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import wishart
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture
from threadpoolctl import threadpool_limits

Array = NDArray[np.float64]
Fits = dict[str, np.ndarray]

NUM_PARTIES = 10


@dataclass(frozen=True)
class Task:
    """One problem.

    :ivar simulation: 1 or 2.
    :ivar spread: the separation of the atoms, or the sd of the noise on a party's atoms.
    :ivar size: the number of atoms before those that no party has are dropped.
    :ivar seed: of everything random.
    :ivar inits: the starts of each local fit.
    :ivar points: of each party.
    """

    simulation: int
    spread: float
    size: int
    seed: int
    inits: int
    points: int

    @property
    def dim(self) -> int:
        return 2 if self.simulation == 1 else self.size

    @property
    def name(self) -> str:
        return "-".join(str(v) for v in vars(self).values())

    def generator(self) -> np.random.Generator:
        return np.random.default_rng([self.simulation, self.seed, self.size, int(10 * self.spread)])


# -- problems and local fits: arrays alone ---------------------------------------------------------


def local_fits(task: Task, cache: Path | None) -> Fits:
    """The truth and what each party makes of its data, from ``cache`` if it is there."""
    fit = _fit_overlapping if task.simulation == 1 else _fit_many
    if cache is None:
        return fit(task)
    path = cache / f"{task.name}.npz"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.part")
        with open(part, "wb") as file:
            np.savez(file, allow_pickle=False, **fit(task))
        os.replace(part, path)
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _presence(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """Which party has which atom, ``[S, size]``: with a probability per atom that is uniform; a
    party draws again until it has two."""
    while True:
        probability = rng.beta(1, 1, size)
        has: list[NDArray[np.bool_]] = []
        for _ in range(NUM_PARTIES):
            tries = (rng.random(size) < probability for _ in range(1000))
            has += islice((row for row in tries if row.sum() >= 2), 1)
        if len(has) == NUM_PARTIES:
            return np.stack(has)


@dataclass(frozen=True)
class Draw:
    """What is random in a problem. It is not in the cache, since drawing it again costs little.

    :ivar truth: the atoms that some party has, ``[K, D]``.
    :ivar atoms: which of them each party has, as indices.
    :ivar means: of each party's own Gaussians, jittered.
    :ivar covariances: theirs; none in simulation 2, where all have sd 0.1.
    :ivar data: each party's points.
    :ivar labels: which of the party's own Gaussians each of these is from, as indices.
    """

    truth: Array
    atoms: list[NDArray[np.intp]]
    means: list[Array]
    covariances: list[Array]
    data: list[Array]
    labels: list[NDArray[np.intp]]

    @property
    def true_labels(self) -> NDArray[np.intp]:
        """The true atom of every point, the parties in turn."""
        pairs = zip(self.atoms, self.labels, strict=True)
        return np.concatenate([own[which] for own, which in pairs])


def draw_overlapping(task: Task) -> Draw:
    """Simulation 1: centres ``N(0, sep L I)``, and each party's own about them."""
    rng = task.generator()
    centres = rng.normal(size=(task.size, 2)) * np.sqrt(task.spread * task.size)
    shapes = np.stack([_covariance(rng, l) for l in range(1, task.size + 1)])
    has = _presence(rng, task.size)
    jitter = 0.5 if task.spread == 1 else 0.1
    means, covariances, data, labels = [], [], [], []
    for own in has:
        means.append(centres[own] + jitter * rng.normal(size=(own.sum(), 2)))
        scatter = [wishart.rvs(200, c / 200, random_state=rng) for c in shapes[own]]
        covariances.append(np.stack(scatter))
        roots = np.linalg.cholesky(covariances[-1])
        proportions = rng.dirichlet(np.full(len(roots), 10))
        which = rng.choice(len(roots), p=proportions, size=task.points)
        labels.append(which)
        noise = rng.normal(size=(task.points, 2, 1))
        data.append(means[-1][which] + (roots[which] @ noise)[..., 0])
    used = has.any(0)
    atoms = [np.nonzero(own)[0] for own in has[:, used]]
    return Draw(centres[used], atoms, means, covariances, data, labels)


def _fit_overlapping(task: Task) -> Fits:
    """Simulation 1: a Bayesian Gaussian mixture per party, told how many Gaussians it has."""
    drawn = draw_overlapping(task)
    sizes = [len(own) for own in drawn.atoms]
    fits = [_mixture(x, size, task.inits) for x, size in zip(drawn.data, sizes, strict=True)]
    return {
        "truth": drawn.truth,
        "sizes": np.array(sizes),
        "pooled": _kmeans(np.concatenate(drawn.data), len(drawn.truth), task.inits),
        **{k: np.concatenate([f[k] for f in fits]) for k in fits[0]},
    }


def _covariance(rng: np.random.Generator, l: int) -> Array:
    angle = rng.uniform(0, np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, -sin], [sin, cos]])
    return rotation @ np.diag([2 * np.sqrt(l) + 0.8, rng.uniform(0.3, 1)]) @ rotation.T


def _mixture(data: Array, size: int, inits: int) -> Fits:
    """Posterior and prior of a mixture's components: those of Normal-Wisharts."""
    model = BayesianGaussianMixture(
        n_components=size,
        n_init=inits,
        random_state=0,
        weight_concentration_prior_type="dirichlet_distribution",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(data)
    df = model.degrees_of_freedom_
    return {
        "loc": model.means_,
        "concentration": model.mean_precision_,
        "df": df,
        "precision": model.covariances_ * df[:, None, None],
        "prior_loc": model.mean_prior_[None],
        "prior_concentration": np.array([model.mean_precision_prior_]),
        "prior_df": np.array([model.degrees_of_freedom_prior_]),
        "prior_precision": model.covariance_prior_[None],
    }


def draw_many(task: Task) -> Draw:
    """Simulation 2: centres ``N(0, 50 I)``, a party's own off by noise; points in equal proportions
    about its own centres, sd 0.1."""
    rng = task.generator()
    centres = rng.normal(size=(task.size, task.dim)) * np.sqrt(50)
    has = _presence(rng, task.size)
    means = [centres[row] + task.spread * rng.normal(size=(row.sum(), task.dim)) for row in has]
    labels = [np.arange(task.points) % len(m) for m in means]
    data = [
        m[which] + 0.1 * rng.normal(size=(task.points, task.dim))
        for m, which in zip(means, labels, strict=True)
    ]
    used = has.any(0)
    atoms = [np.nonzero(own)[0] for own in has[:, used]]
    return Draw(centres[used], atoms, means, [], data, labels)


def _fit_many(task: Task) -> Fits:
    """Simulation 2: k-means per party, told how many centres it has."""
    drawn = draw_many(task)
    pairs = zip(drawn.data, drawn.means, strict=True)
    return {
        "truth": drawn.truth,
        "sizes": np.array([len(own) for own in drawn.atoms]),
        "atom": np.concatenate(drawn.atoms),
        "jittered": np.concatenate(drawn.means),
        "kmeans": np.concatenate([_kmeans(x, len(m), task.inits) for x, m in pairs]),
        "pooled": _kmeans(np.concatenate(drawn.data), len(drawn.truth), task.inits),
    }


def _kmeans(data: Array, size: int, inits: int) -> Array:
    model = KMeans(size, n_init=inits, random_state=0).fit(data)
    return np.asarray(model.cluster_centers_)


# -- which problems --------------------------------------------------------------------------------


def overlapping_tasks(seeds: Iterable[int], small: bool) -> list[Task]:
    """The nine settings of simulation 1, or one small one, for each seed."""
    if small:
        return [Task(1, 10.0, 3, seed, 1, 300) for seed in seeds]
    return [Task(1, *key, 16, 300) for key in product((0.1, 1.0, 10.0), (3, 4, 5), seeds)]


def many_tasks(seeds: Iterable[int], small: bool) -> list[Task]:
    """The three settings of simulation 2, or one small one, for each seed."""
    if small:
        return [Task(2, 1.0, 8, seed, 1, 200) for seed in seeds]
    return [Task(2, noise, 50, seed, 8, 5000) for noise, seed in product((0.1, 1.0, 2.0), seeds)]


@contextmanager
def one_thread() -> Iterator[None]:
    """All libraries on one thread, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet_thread() -> Iterator[None]:
    """One thread, and no warnings of how sure a fusion is: the tables show how good it is."""
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
