# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The third table of ``simulation.py``: the defaults of each pooling on separated components, any
share of which the parties have in common."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from mixtures import quiet_thread
from overlap import CASES, Case, Overlap
from sklearn.metrics import adjusted_rand_score

from pyro_fusion import FixedAtoms, Fusion, FusionProblem
from pyro_fusion.fusion.search import search

POOLINGS = ("inclusive", "exclusive", "product")

# What the defaults should reach: mean ARI, per cent right, estimates of T in plain fusions.
ARI, RIGHT, FUSIONS = 0.97, 90, 3

COLUMNS = ("right %", "ARI", "rule: right", "ARI", "T / fusion", "at most", "no plateau")


class Share(NamedTuple):
    """The defaults of a pooling on one problem.

    :ivar excess: K less the true number.
    :ivar ari: the adjusted Rand index of the components.
    :ivar rule_excess: the number of components of the largest party, less the true number of atoms.
    :ivar rule_ari: the index where ``FixedAtoms`` is told that number, at the same T.
    :ivar estimate: seconds of the estimate of T.
    :ivar fusion: seconds of a fusion at that T.
    :ivar plateau: whether T was taken from one.
    """

    excess: int
    ari: float
    rule_excess: int
    rule_ari: float
    estimate: float
    fusion: float
    plateau: bool


def solve_shares(case: Case, seed: int) -> dict[str, Share]:
    """Pooling -> how its defaults do on one problem."""
    with quiet_thread():
        problem = case.draw(seed)
        return {pooling: share(problem, pooling) for pooling in POOLINGS}


def share(problem: Overlap, pooling: str) -> Share:
    """How the defaults of a pooling do on a problem."""
    read = partial(FusionProblem.of, problem.parties, pooling, prior={"x": problem.prior})
    # Of the process, so that others do not count.
    start = time.process_time()
    (part,) = read().parts.values()
    estimated = time.process_time()
    t = part.dispersion
    at_t = read(dispersion=t)
    given = time.process_time()
    fusion = search(at_t)
    end = time.process_time()
    largest = max(problem.sizes)
    rule = search(read(assignment_prior=FixedAtoms(largest), dispersion=t))
    return Share(
        excess=fusion.num_atoms - problem.num_atoms,
        ari=_ari(problem, fusion),
        rule_excess=largest - problem.num_atoms,
        rule_ari=_ari(problem, rule),
        estimate=(estimated - start) - (given - estimated),  # both read and check
        fusion=end - estimated,
        plateau=part.path is not None and part.path.chosen is not None,
    )


def _ari(problem: Overlap, fusion: Fusion) -> float:
    found = torch.cat(list(fusion.assignment)).numpy()
    return float(adjusted_rand_score(problem.matches, found))


def cases(small: bool) -> list[Case]:
    """All cases, or a small one."""
    return [c for c in CASES if c.name == "Normal 2, 2 x 5, 4"] if small else CASES


# -- the table -------------------------------------------------------------------------------------

Results = Sequence[tuple[str, dict[str, Share]]]


def print_shares(results: Results) -> None:
    """One row per pooling, and the cases in which a number is wrong.

    :param results: case and scores of each problem.
    """
    number = len({case for case, _ in results})
    print(f"\nSimulation 3: separated components, {number} cases, {len(results)} problems")
    print(" " * 11 + "".join(f"{name:>12}" for name in COLUMNS))
    for pooling in POOLINGS:
        runs = [run[pooling] for _, run in results]
        values = summary(runs)
        shown = "".join(f"{v:>12.2f}" for v in values[:-1])
        print(f"{pooling:<11}{shown}{values[-1]:>12.0f}   {targets(values)}")
    print("\nNot right in all: pooling, problems that are right, mean ARI, K - truth in each")
    for case, pooling in ((case, p) for case in dict(results) for p in POOLINGS):
        runs = [run[pooling] for name, run in results if name == case]
        excess = [run.excess for run in runs]
        if any(excess):
            right = f"{excess.count(0)} of {len(runs)}"
            ari = np.mean([run.ari for run in runs])
            each = " ".join(f"{x:+d}" for x in excess)
            print(f"{case:<34}{pooling:<11}{right:>8}{ari:>6.2f}   {each}")


def summary(runs: Sequence[Share]) -> list[float]:
    """The columns of a row."""
    ratios = [run.estimate / run.fusion for run in runs]
    return [
        100 * float(np.mean([run.excess == 0 for run in runs])),
        float(np.mean([run.ari for run in runs])),
        100 * float(np.mean([run.rule_excess == 0 for run in runs])),
        float(np.mean([run.rule_ari for run in runs])),
        float(np.mean(ratios)),
        max(ratios),
        sum(not run.plateau for run in runs),
    ]


def targets(values: Sequence[float]) -> str:
    """Which aims a row meets."""
    right, ari, _, _, ratio, *_ = values
    aims = {
        f"right >= {RIGHT} %": right >= RIGHT,
        f"ARI >= {ARI}": ari >= ARI,
        f"T <= {FUSIONS} fusions": ratio <= FUSIONS,
    }
    return ", ".join(f"{aim}: {'met' if met else 'MISSED'}" for aim, met in aims.items())


LEGEND = """
Cases of the third table: family, dimensions, parties x components of each, how many of these are
everybody's; or parties, atoms, and the probability with which a party has an atom. rule: the number
of components of the largest party, which looks at no posterior; its ARI is that of FixedAtoms, told
that number, at the same T. T / fusion, at most: seconds of the estimate of T over those of a fusion
at given T, mean and largest. no plateau: problems in which T was not taken from one."""
