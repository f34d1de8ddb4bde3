# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""How many atoms come out, and how far they are from the truth: two simulations.

1. The paper's: 3 to 5 Gaussians in the plane that overlap, 10 parties of 300 points each, which
   lack some of them; every party fits a Bayesian Gaussian mixture of its own.
2. SPAHM's: 50 atoms in 50 dimensions, 10 parties whose own atoms are off by noise, taken as they
   are or found by k-means.

Run ``python benchmarks/simulation.py``; most of the time goes into the local fits, which
``--cache`` keeps. Every problem has a fixed seed, and no setting depends on the problem.

Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), sec. 6.1;
Yurochkin et al., *Statistical Model Aggregation via Parameter Matching* (NeurIPS 2019), sec. 5.1.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from pyro.distributions import Normal
from scipy import sparse
from scipy.optimize import linear_sum_assignment, linprog
from scipy.spatial.distance import cdist
from scipy.stats import wishart
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture
from threadpoolctl import threadpool_limits
from torch.distributions import Distribution, MultivariateNormal, kl_divergence
from tqdm import tqdm

import pyro_fusion
from pyro_fusion import FixedAtoms, GroupNormPrior, NormalWishart, Posterior, fuse
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.families import Factor
from pyro_fusion.pooling import pooling_named

Array = NDArray[np.float64]
Fits = dict[str, np.ndarray]

NUM_PARTIES = 10

# What issue 3 asks of the defaults: per cent right; OT per separation; Hausdorff over that of the
# true matches.
RIGHT = 85
TRANSPORT = {0.1: 0.35, 1.0: 0.35, 10.0: 0.8}
RATIO = 1.02


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
    """What is random in simulation 1. It is not in the cache, since drawing it again costs nothing.

    :ivar truth: the atoms that some party has, ``[K, 2]``.
    :ivar atoms: which of them each party has, as indices.
    :ivar means: of each party's own Gaussians, jittered.
    :ivar covariances: theirs.
    :ivar data: each party's points.
    """

    truth: Array
    atoms: list[NDArray[np.intp]]
    means: list[Array]
    covariances: list[Array]
    data: list[Array]


def draw_overlapping(task: Task) -> Draw:
    """Simulation 1: centres ``N(0, sep L I)``, and each party's own about them."""
    rng = task.generator()
    centres = rng.normal(size=(task.size, 2)) * np.sqrt(task.spread * task.size)
    shapes = np.stack([_covariance(rng, l) for l in range(1, task.size + 1)])
    has = _presence(rng, task.size)
    jitter = 0.5 if task.spread == 1 else 0.1
    means, covariances, data = [], [], []
    for own in has:
        means.append(centres[own] + jitter * rng.normal(size=(own.sum(), 2)))
        scatter = [wishart.rvs(200, c / 200, random_state=rng) for c in shapes[own]]
        covariances.append(np.stack(scatter))
        roots = np.linalg.cholesky(covariances[-1])
        proportions = rng.dirichlet(np.full(len(roots), 10))
        which = rng.choice(len(roots), p=proportions, size=task.points)
        noise = rng.normal(size=(task.points, 2, 1))
        data.append(means[-1][which] + (roots[which] @ noise)[..., 0])
    used = has.any(0)
    atoms = [np.nonzero(own)[0] for own in has[:, used]]
    return Draw(centres[used], atoms, means, covariances, data)


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


def _fit_many(task: Task) -> Fits:
    """Simulation 2: centres ``N(0, 50 I)``, a party's own off by noise; k-means per party, on
    points in equal proportions about its own centres, sd 0.1."""
    rng = task.generator()
    centres = rng.normal(size=(task.size, task.dim)) * np.sqrt(50)
    has = _presence(rng, task.size)
    own = [centres[row] + task.spread * rng.normal(size=(row.sum(), task.dim)) for row in has]
    data = [
        m[np.arange(task.points) % len(m)] + 0.1 * rng.normal(size=(task.points, task.dim))
        for m in own
    ]
    used = has.any(0)
    members = has[:, used]
    return {
        "truth": centres[used],
        "sizes": has.sum(1),
        "atom": np.nonzero(members)[1],
        "jittered": np.concatenate(own),
        "kmeans": np.concatenate(
            [_kmeans(x, len(m), task.inits) for x, m in zip(data, own, strict=True)]
        ),
        "pooled": _kmeans(np.concatenate(data), int(used.sum()), task.inits),
    }


def _kmeans(data: Array, size: int, inits: int) -> Array:
    model = KMeans(size, n_init=inits, random_state=0).fit(data)
    return np.asarray(model.cluster_centers_)


# -- what there is to fuse -------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What the parties hand over, and what it is judged by.

    :ivar truth: the atoms that some party has, ``[K, D]``.
    :ivar means: of each party's components.
    :ivar parties: their posteriors.
    :ivar messages: the same, all with the prior ``base``, for ``product``.
    :ivar pooled: k-means on everybody's points, told the number.
    :ivar matched: the average of each atom over the parties that have it, or None.
    :ivar pooled_matches: the exclusive barycentres of the components that are truly of one atom,
        or None.
    """

    truth: Array
    means: list[Array]
    parties: list[Posterior]
    messages: list[Posterior]
    base: Distribution
    pooled: Array
    matched: Array | None
    pooled_matches: Array | None

    def fused(self, pooling: str, prior: AssignmentPrior | None) -> Array:
        parties = self.messages if pooling == "product" else self.parties
        fusion = fuse(parties, pooling, prior, prior={"atom": self.base})
        return _location(fusion.posterior.decomposed["atom"])


def _location(atoms: Factor) -> Array:
    location = atoms.location()
    assert location is not None
    return location.numpy()


def _split(f: Fits, name: str) -> list[Array]:
    return np.split(f[name], f["sizes"].cumsum()[:-1])


def overlapping(f: Fits, drawn: Draw) -> dict[str, Problem]:
    """Simulation 1: Normal-Wishart components, with each party's own prior divided out of its
    messages and one common prior put in.

    :raises ValueError: if the fits are not to what was drawn.
    """
    truth = drawn.truth
    if not np.array_equal(f["truth"], truth):
        raise ValueError("the cached fits are to other draws, of other versions: empty the cache")
    own = Factor.of(_normal_wishart(f, "prior_"))
    local = Factor.of(_normal_wishart(f))
    base = _common_prior(f)
    party = torch.arange(NUM_PARTIES).repeat_interleave(torch.as_tensor(f["sizes"]))
    natural = local.natural - own.natural[party] + Factor.of(base).natural
    message = local.from_natural(natural)
    parties, messages = _parties(local, f), _parties(message, f)
    means = _split(f, "loc")
    groups = torch.as_tensor(true_matches(f, drawn))
    matches = _location(pooling_named("exclusive").barycenter(local, groups, len(truth)))
    return {"": Problem(truth, means, parties, messages, base, f["pooled"], None, matches)}


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


def _gaussians(mean: Array, covariance: Array) -> MultivariateNormal:
    return MultivariateNormal(torch.as_tensor(mean), torch.as_tensor(covariance))


def many(f: Fits) -> dict[str, Problem]:
    """Simulation 2: Normal components with sd 0.1, that of the mean of a hundred points with unit
    noise, under the prior Normal(0, 2 √50); at the party's own atoms, and where k-means put
    them."""
    truth = f["truth"]
    matched = np.stack([f["jittered"][f["atom"] == k].mean(0) for k in range(len(truth))])
    zero = torch.zeros(truth.shape[1], dtype=torch.float64)
    base = Normal(zero, 2 * 50**0.5).to_event(1)
    result = {}
    for name, source in {"jittered truth": "jittered", "k-means": "kmeans"}.items():
        local = Factor.of(Normal(torch.as_tensor(f[source]), 0.1).to_event(1))
        parties = _parties(local, f)
        result[name] = Problem(
            truth, _split(f, source), parties, parties, base, f["pooled"], matched, None
        )
    return result


# -- how good the atoms are ------------------------------------------------------------------------

COLUMNS = ("right %", "K - truth", "Hausdorff", "OT", "seconds")
RATIO_COLUMNS = ("ratio", "worst")
Score = tuple[float, ...]


def hausdorff(x: Array, y: Array) -> float:
    distance = cdist(x, y)
    return float(max(distance.min(0).max(), distance.min(1).max()))


def transport(x: Array, y: Array) -> float:
    """The 1-Wasserstein distance between uniform measures on ``x`` and ``y``, exact."""
    distance = cdist(x, y)
    n, m = distance.shape
    if n == m:
        return float(distance[linear_sum_assignment(distance)].mean())
    rows = sparse.kron(sparse.eye(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.eye(m))
    marginals = np.repeat([1 / n, 1 / m], [n, m])
    plan = linprog(distance.ravel(), A_eq=sparse.vstack([rows, columns]).tocsr(), b_eq=marginals)
    return float(plan.fun)


def score(problem: Problem, atoms: Array, seconds: float = np.nan) -> Score:
    """``K - truth``, Hausdorff, OT, seconds, and Hausdorff over that of the true matches."""
    far = hausdorff(atoms, problem.truth)
    matched = problem.matched
    ratio = np.nan if matched is None else far / hausdorff(matched, problem.truth)
    excess = len(atoms) - len(problem.truth)
    return (excess, far, transport(atoms, problem.truth), seconds, ratio)


DEFAULTS = ("inclusive", "exclusive", "product")

# Row -> pooling, prior given the true number.
FUSIONS: dict[str, tuple[str, Callable[[int], AssignmentPrior | None]]] = {
    **{p: (p, lambda k: None) for p in DEFAULTS},
    "product, GroupNormPrior": ("product", lambda k: GroupNormPrior()),
    **{f"{p}, ranked": (p, lambda k: GroupNormPrior(ranked=True)) for p in DEFAULTS[:2]},
    **{f"{p}, auto": (p, lambda k: GroupNormPrior(scale="auto")) for p in DEFAULTS[:2]},
    **{
        f"{p}, auto, ranked": (p, lambda k: GroupNormPrior(scale="auto", ranked=True))
        for p in DEFAULTS[:2]
    },
    **{f"{p}, true K": (p, FixedAtoms) for p in DEFAULTS},
}


def solve(task: Task, cache: Path | None, rows: Sequence[str]) -> dict[str, dict[str, Score]]:
    """Source of the local posteriors -> row -> score.

    :param rows: of ``FUSIONS``, those to run; the baselines come with them.
    """
    with one_thread():
        f = local_fits(task, cache)
        problems = overlapping(f, draw_overlapping(task)) if task.simulation == 1 else many(f)
        return {source: scores(problem, rows) for source, problem in problems.items()}


def scores(problem: Problem, rows: Sequence[str]) -> dict[str, Score]:
    result = {}
    for name in rows:
        pooling, prior = FUSIONS[name]
        start = time.perf_counter()
        atoms = problem.fused(pooling, prior(len(problem.truth)))
        result[name] = score(problem, atoms, time.perf_counter() - start)
    result["k-means on all points, true K"] = score(problem, problem.pooled)
    parties = (score(problem, means) for means in problem.means)
    result["best single party (oracle)"] = min(parties, key=lambda s: s[2])
    if problem.pooled_matches is not None:
        result["exclusive, true matches"] = score(problem, problem.pooled_matches)
    if problem.matched is not None:
        result["average of the true matches"] = score(problem, problem.matched)
    return result


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


# -- tables ----------------------------------------------------------------------------------------

Results = list[tuple[Task, dict[str, dict[str, Score]]]]
# The scores of one row, ``[problems, columns]`` -> which targets it meets.
Targets = Callable[[Array], str]


def print_block(title: str, runs: Sequence[dict[str, Score]], targets: Targets) -> None:
    """One row per method, averaged over the problems."""
    width = max(map(len, runs[0])) + 2
    with_ratio = not np.isnan(runs[0]["inclusive"][-1])
    names = COLUMNS + RATIO_COLUMNS * with_ratio
    print(f"\n{title}, {len(runs)} problem{'s' * (len(runs) > 1)}")
    print(" " * width + "".join(f"{name:>11}" for name in names))
    for row in runs[0]:
        values = np.array([run[row] for run in runs])
        mean = summary(values)[: len(names)]
        cells = "".join(f"{'-':>11}" if np.isnan(v) else f"{v:>11.2f}" for v in mean)
        print((f"{row:<{width}}{cells}   {targets(values) if row in DEFAULTS else ''}").rstrip())


def summary(values: Array) -> list[float]:
    """Per cent right, the means of all columns, and the worst ratio."""
    right = 100 * float((values[:, 0] == 0).mean())
    return [right, *values.mean(0).tolist(), float(values[:, -1].max())]


def overlapping_targets(separation: float) -> Targets:
    def targets(values: Array) -> str:
        right, _, _, far, *_ = summary(values)
        bound = TRANSPORT[separation]
        number = f"right >= {RIGHT} %: {_met(right >= RIGHT)}"
        return f"{number}, OT <= {bound}: {_met(far <= bound)}"

    return targets


def many_targets(source: str) -> Targets:
    def targets(values: Array) -> str:
        right, *_, worst = summary(values)
        exact = f"right in all: {_met(right == 100)}"
        close = f"worst ratio <= {RATIO}: {_met(worst <= RATIO)}"
        return f"{exact}, {close}" if source == "jittered truth" else close

    return targets


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


def print_overlapping(results: Results, by_size: bool) -> None:
    print("\nSimulation 1: Gaussians in the plane that overlap, 10 parties")
    for separation, size in product(_spreads(results), _sizes(results) if by_size else [None]):
        runs = [
            run[""]
            for task, run in results
            if task.spread == separation and size in (None, task.size)
        ]
        of = "" if size is None else f", {size} atoms"
        print_block(f"separation {separation:g}{of}", runs, overlapping_targets(separation))


def _spreads(results: Results) -> list[float]:
    return sorted({task.spread for task, _ in results})


def _sizes(results: Results) -> list[int]:
    return sorted({task.size for task, _ in results})


def print_many(results: Results) -> None:
    (size,) = _sizes(results)
    print(f"\nSimulation 2: {size} atoms in {size} dimensions, 10 parties")
    for source, noise in product(results[0][1], _spreads(results)):
        runs = [run[source] for task, run in results if task.spread == noise]
        title = f"noise {noise:g}, local posteriors from {source}"
        print_block(title, runs, many_targets(source))


LEGEND = """
right %: problems with as many atoms as some party has. K - truth, Hausdorff and OT (1-Wasserstein
distance between uniform measures on the atoms' means, fused and true): means over the problems.
seconds: to fuse, one thread. ratio, worst: Hausdorff over that of the average of the true matches,
mean and largest. inclusive, exclusive, product: the defaults. ranked, auto:
GroupNormPrior(ranked=True), GroupNormPrior(scale="auto"); true K: FixedAtoms, told the number, as
k-means on all points is. The best single party is the one whose OT is the least, which nobody knows
but the oracle. Nobody else knows the true matches either: each party's components one to one with
the Gaussians that its points are from, by symmetric KL divergence. Pooled, they show the error
that is not the assignment's, but that of the local fits, of what parties differ in, and of the
pooling."""


# -- the whole -------------------------------------------------------------------------------------


def overlapping_tasks(seeds: Iterable[int], small: bool) -> list[Task]:
    if small:
        return [Task(1, 10.0, 3, seed, 1, 300) for seed in seeds]
    return [Task(1, *key, 16, 300) for key in product((0.1, 1.0, 10.0), (3, 4, 5), seeds)]


def many_tasks(seeds: Iterable[int], small: bool) -> list[Task]:
    if small:
        return [Task(2, 1.0, 8, seed, 1, 200) for seed in seeds]
    return [Task(2, noise, 50, seed, 8, 5000) for noise, seed in product((0.1, 1.0, 2.0), seeds)]


def solve_all(tasks: Sequence[Task], cache: Path | None, jobs: int, rows: Sequence[str]) -> Results:
    parallel = Parallel(n_jobs=jobs, return_as="generator")
    runs = parallel(delayed(solve)(task, cache, rows) for task in tasks)
    bar = tqdm(runs, total=len(tasks), unit="problem", desc=f"simulation {tasks[0].simulation}")
    return list(zip(tasks, bar, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    seeds = range(args.first_seed, args.first_seed + (1 if args.small else args.seeds))
    rows = DEFAULTS if args.defaults else tuple(FUSIONS)
    if args.cache is not None:
        args.cache.mkdir(parents=True, exist_ok=True)
    print(f"pyro_fusion {pyro_fusion.__version__}, Python {platform.python_version()}", end="")
    for package in ("torch", "pyro-ppl", "scikit-learn", "scipy", "numpy"):
        print(f", {package} {version(package)}", end="")
    print(f"; seeds {seeds[0]} to {seeds[-1]}; {args.jobs} jobs")
    if 1 in args.simulation:
        results = solve_all(overlapping_tasks(seeds, args.small), args.cache, args.jobs, rows)
        print_overlapping(results, by_size=False)
        if args.by_size:
            print_overlapping(results, by_size=True)
    if 2 in args.simulation:
        print_many(solve_all(many_tasks(seeds, args.small), args.cache, args.jobs, rows))
    print(LEGEND)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Two simulations; see the top of this file.")
    parser.add_argument("--seeds", type=int, default=20, help="problems per setting")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--defaults", action="store_true", help="no other rows but the baselines")
    parser.add_argument("--small", action="store_true", help="one small problem per setting")
    parser.add_argument("--cache", type=Path, help="folder that keeps the local fits")
    parser.add_argument("--by-size", action="store_true", help="simulation 1 also by its atoms")
    parser.add_argument("--simulation", type=int, nargs="+", choices=(1, 2), default=(1, 2))
    return parser


if __name__ == "__main__":
    main()
