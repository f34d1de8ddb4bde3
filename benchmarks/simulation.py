# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Who is who, how many atoms come out, and how far they are from the truth: three simulations.

1. The paper's: 3 to 5 Gaussians in the plane that overlap, 10 parties that lack some of them and
   fit a Bayesian Gaussian mixture each.
2. SPAHM's: 50 atoms in 50 dimensions, 10 parties whose own atoms are off by noise.
3. Separated components of several families, any share of which the parties have in common.

Run ``python benchmarks/simulation.py``; most of the time goes into the local fits of the first two
(``mixtures.py``), which ``--cache`` keeps. Every problem has a fixed seed, and no setting depends
on the problem. The problems of the third are in ``overlap.py``, and its table in ``shares.py``.

Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), sec. 6.1;
Yurochkin et al., *Statistical Model Aggregation via Parameter Matching* (NeurIPS 2019), sec. 5.1.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import shares
import torch
from beyond import BEYOND
from credible_sets import aims, of_task
from credible_sets import table as coverage_table
from joblib import Parallel, delayed
from measures import Found, Score, score, score_found
from mixtures import Task, many_tasks, overlapping_tasks, quiet_thread
from problems import Problem, locations, problems_of
from scipy.spatial.distance import cdist
from sklearn.metrics import adjusted_rand_score
from tqdm import tqdm

import pyro_fusion
from pyro_fusion import FixedAtoms, Fusion, GroupNormPrior
from pyro_fusion.assignment.priors import AssignmentPrior

# What is asked of the defaults per separation, adjusted Rand index of the components; of what goes
# on from them, that and OT; and in simulation 2 Hausdorff over that of the true matches.
ARI = {0.1: 0.55, 1.0: 0.80, 10.0: 0.96}
ARI_BEYOND = {0.1: 0.76, 1.0: 0.90, 10.0: 0.98}
TRANSPORT_BEYOND = {0.1: 0.30, 1.0: 0.50, 10.0: 0.30}
RATIO = 1.02

# -- rows ------------------------------------------------------------------------------------------

DEFAULTS = ("inclusive", "exclusive", "product")

# Row -> pooling, assignment prior for a problem.
FUSIONS: dict[str, tuple[str, Callable[[Problem], AssignmentPrior | None]]] = {
    **{p: (p, lambda problem: None) for p in DEFAULTS},
    "product, GroupNormPrior": ("product", lambda problem: GroupNormPrior()),
    **{f"{p}, ranked": (p, lambda problem: GroupNormPrior(ranked=True)) for p in DEFAULTS[:2]},
    **{f"{p}, auto": (p, lambda problem: GroupNormPrior(scale="auto")) for p in DEFAULTS[:2]},
    **{
        f"{p}, auto, ranked": (p, lambda problem: GroupNormPrior(scale="auto", ranked=True))
        for p in DEFAULTS[:2]
    },
    "exclusive, largest party's K": ("exclusive", lambda problem: FixedAtoms(problem.largest)),
    **{f"{p}, true K": (p, lambda problem: FixedAtoms(len(problem.truth))) for p in DEFAULTS},
}

# The rule that looks at no posterior, beside the defaults in any case.
RULE = "exclusive, largest party's K"


def solve(task: Task, cache: Path | None, rows: Sequence[str]) -> dict[str, dict[str, Score]]:
    """Source of the local posteriors -> row -> score.

    :param rows: of ``FUSIONS`` and ``BEYOND``, those to run; the baselines come with them.
    """
    with quiet_thread():
        problems = problems_of(task, cache)
        return {source: scores(problem, rows) for source, problem in problems.items()}


def scores(problem: Problem, rows: Sequence[str]) -> dict[str, Score]:
    """Row -> score."""
    result: dict[str, Score] = {}
    fusions: dict[str, Fusion] = {}
    for name in rows:
        start = time.perf_counter()
        if name in FUSIONS:
            pooling, prior = FUSIONS[name]
            # T is that of the pooling, whatever the assignment prior.
            t = fusions[pooling].dispersion if pooling in fusions else None
            fusions[name] = problem.fusion(pooling, prior(problem), t)
            found = of_fusion(fusions[name])
        elif problem.gaussians:
            first, go_on = BEYOND[name]
            found = go_on(problem, fusions[first])
        else:
            continue
        result[name] = score_found(problem, found, time.perf_counter() - start)
    everything = score(problem, problem.pooled)
    # Each point where its nearest centre is: it has no components.
    nearest = cdist(np.concatenate(problem.drawn.data), problem.pooled).argmin(1)
    points = adjusted_rand_score(problem.drawn.true_labels, nearest)
    result["k-means on all points, true K"] = everything._replace(points=points)
    parties = (score(problem, means) for means in problem.means)
    result["best single party (oracle)"] = min(parties, key=lambda s: s.transport)
    for name, atoms in {
        "exclusive, true matches": problem.pooled_matches,
        "average of the true matches": problem.matched,
    }.items():
        if atoms is not None:
            result[name] = score_found(problem, Found(atoms, problem.matches))
    return result


def of_fusion(fusion: Fusion) -> Found:
    """The atoms at site "atom", and who has which."""
    atoms = locations(fusion.posterior.decomposed["atom"])
    return Found(atoms, torch.cat(list(fusion.assignment)).numpy())


# -- tables ----------------------------------------------------------------------------------------

COLUMNS = ("right %", "K - truth", "ARI", "of points", "Hausdorff", "OT", "seconds")
RATIO_COLUMNS = ("ratio", "worst")

Results = list[tuple[Task, dict[str, dict[str, Score]]]]
# Row and its columns -> which targets it meets.
Targets = Callable[[str, dict[str, float]], str]


def print_block(title: str, runs: Sequence[dict[str, Score]], targets: Targets) -> None:
    """One row per method, averaged over the problems."""
    width = max(map(len, runs[0])) + 2
    with_ratio = not np.isnan(runs[0]["inclusive"].ratio)
    names = COLUMNS + RATIO_COLUMNS * with_ratio
    print(f"\n{title}, {len(runs)} problem{'s' * (len(runs) > 1)}")
    print(" " * width + "".join(f"{name:>11}" for name in names))
    for row in runs[0]:
        values = summary([run[row] for run in runs])
        cells = "".join(_cell(values[name]) for name in names)
        print(f"{row:<{width}}{cells}   {targets(row, values)}".rstrip())


def _cell(value: float) -> str:
    return f"{'-':>11}" if np.isnan(value) else f"{value:>11.2f}"


def summary(scores: Sequence[Score]) -> dict[str, float]:
    """Column -> value of a row: per cent right, means of the others, and the worst ratio."""
    mean = Score(*np.mean(scores, axis=0))
    return {
        "right %": 100 * float(np.mean([s.excess == 0 for s in scores])),
        "K - truth": mean.excess,
        "ARI": mean.components,
        "of points": mean.points,
        "Hausdorff": mean.hausdorff,
        "OT": mean.transport,
        "seconds": mean.seconds,
        "ratio": mean.ratio,
        "worst": max(s.ratio for s in scores),
    }


def overlapping_targets(separation: float) -> Targets:
    """The targets of simulation 1."""

    def targets(row: str, values: dict[str, float]) -> str:
        if row in DEFAULTS:
            return _at_least("ARI", values, ARI[separation])
        if row.endswith(("second round", "refined")):
            far, bound = values["OT"], TRANSPORT_BEYOND[separation]
            ari = _at_least("ARI", values, ARI_BEYOND[separation])
            return f"{ari}, OT <= {bound}: {_met(far <= bound)}"
        return ""

    return targets


def many_targets(source: str) -> Targets:
    """The targets of simulation 2."""

    def targets(row: str, values: dict[str, float]) -> str:
        if row not in DEFAULTS:
            return ""
        close = f"worst ratio <= {RATIO}: {_met(values['worst'] <= RATIO)}"
        exact = f"right in all: {_met(values['right %'] == 100)}, "
        return exact * (source == "jittered truth") + close

    return targets


def _at_least(column: str, values: dict[str, float], bound: float) -> str:
    return f"{column} >= {bound}: {_met(values[column] >= bound)}"


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


def print_overlapping(results: Results, by_size: bool) -> None:
    """The blocks of simulation 1."""
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


def print_coverage(tasks: Sequence[Task], cache: Path | None, jobs: int, draws: int) -> None:
    """How often sets of the number of atoms hold the truth in simulation 1, by separation."""
    parallel = Parallel(n_jobs=jobs, return_as="generator")
    runs = parallel(delayed(of_task)(task, cache, draws) for task in tasks)
    found = list(zip(tasks, tqdm(runs, total=len(tasks), unit="problem", desc="P(K)"), strict=True))
    groups = {
        f"separation {x:g}": [run for task, run in found if task.spread == x]
        for x in sorted({task.spread for task in tasks})
    }
    print("\nSets of K that hold the truth, per cent, and their sizes: product")
    print(coverage_table(groups))
    print(aims([run for _, run in found]))


def print_many(results: Results) -> None:
    """The blocks of simulation 2."""
    (size,) = _sizes(results)
    print(f"\nSimulation 2: {size} atoms in {size} dimensions, 10 parties")
    for source, noise in product(results[0][1], _spreads(results)):
        runs = [run[source] for task, run in results if task.spread == noise]
        title = f"noise {noise:g}, local posteriors from {source}"
        print_block(title, runs, many_targets(source))


LEGEND = """
right %: problems with as many atoms as some party has. ARI: adjusted Rand index of the components'
atoms against their true ones; of points: that of all points, each put where its component by its
party's fit is. K - truth, ARI, Hausdorff and OT (1-Wasserstein distance between uniform measures on
the atoms' means, fused and true): means over the problems. seconds: to fuse, one thread. ratio,
worst: Hausdorff over that of the average of the true matches, mean and largest. inclusive,
exclusive, product: the defaults; the rows below are at their T, and do not count the seconds of its
estimate. ranked, auto: GroupNormPrior(ranked=True), GroupNormPrior(scale="auto"); true K:
FixedAtoms, told the number, as k-means on all points is; largest party's K: FixedAtoms, told the
number of components of the party that has most, a rule that looks at no posterior. The best single
party is the one whose OT is the least, which nobody knows but the oracle. Nobody else knows the
true matches either: each party's components one to one with the Gaussians that its points are from,
by symmetric KL divergence (by distance in simulation 2). Pooled, they show the error that is not
the assignment's, but that of the local fits, of what parties differ in, and of the pooling.

second round, refined: seconds are those beyond the default that they begin with. Components are
then those that parties have after it, which are matched with the truth anew: those of the second
fits, or each party's own atoms. its atoms: the default, judged by these."""


# -- the whole -------------------------------------------------------------------------------------


def solve_all(tasks: Sequence[Task], cache: Path | None, jobs: int, rows: Sequence[str]) -> Results:
    """Each problem with its scores, in as many processes."""
    parallel = Parallel(n_jobs=jobs, return_as="generator")
    runs = parallel(delayed(solve)(task, cache, rows) for task in tasks)
    bar = tqdm(runs, total=len(tasks), unit="problem", desc=f"simulation {tasks[0].simulation}")
    return list(zip(tasks, bar, strict=True))


def solve_shares(seeds: Sequence[int], jobs: int, small: bool) -> shares.Results:
    """The name of each case with its scores for each seed, in as many processes."""
    keys = list(product(shares.cases(small), seeds))
    parallel = Parallel(n_jobs=jobs, return_as="generator")
    runs = parallel(delayed(shares.solve_shares)(case, seed) for case, seed in keys)
    bar = tqdm(runs, total=len(keys), unit="problem", desc="simulation 3")
    return [(case.name, run) for (case, _), run in zip(keys, bar, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    seeds = range(args.first_seed, args.first_seed + (1 if args.small else args.seeds))
    rows = [*((*DEFAULTS, RULE) if args.defaults else FUSIONS), *BEYOND]
    if args.cache is not None:
        args.cache.mkdir(parents=True, exist_ok=True)
    print(f"pyro_fusion {pyro_fusion.__version__}, Python {platform.python_version()}", end="")
    for package in ("torch", "pyro-ppl", "scikit-learn", "scipy", "numpy"):
        print(f", {package} {version(package)}", end="")
    print(f"; seeds {seeds[0]} to {seeds[-1]}; {args.jobs} jobs")
    if 1 in args.simulation:
        tasks = overlapping_tasks(seeds, args.small)
        results = solve_all(tasks, args.cache, args.jobs, rows)
        print_overlapping(results, by_size=False)
        if args.by_size:
            print_overlapping(results, by_size=True)
        if args.draws:
            print_coverage(tasks, args.cache, args.jobs, args.draws)
    if 2 in args.simulation:
        print_many(solve_all(many_tasks(seeds, args.small), args.cache, args.jobs, rows))
    if {1, 2}.intersection(args.simulation):
        print(LEGEND)
    if 3 in args.simulation:
        shares.print_shares(solve_shares(seeds, args.jobs, args.small))
        print(shares.LEGEND)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Three simulations; see the top of this file.")
    parser.add_argument("--seeds", type=int, default=20, help="problems per setting")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--defaults", action="store_true", help="no other priors")
    parser.add_argument("--small", action="store_true", help="one small problem per setting")
    parser.add_argument("--cache", type=Path, help="folder that keeps the local fits")
    parser.add_argument("--draws", type=int, default=100, help="for P(K); 0: without it")
    parser.add_argument("--by-size", action="store_true", help="simulation 1 also by its atoms")
    parser.add_argument("--simulation", type=int, nargs="+", choices=(1, 2, 3), default=(1, 2, 3))
    return parser


if __name__ == "__main__":
    main()
