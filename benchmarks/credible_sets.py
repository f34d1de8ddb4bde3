# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""How often sets of the number of atoms hold the truth, and how good P(same) is: draws of the
assignment in the first simulation (``simulation.py``), by ``product`` at the estimated T.

Sets of whole numbers hold the truth more often than they say. Run ``python
benchmarks/credible_sets.py --cache FOLDER``, or call :func:`coverage` for a problem and
:func:`table` and :func:`aims` for many.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mixtures import Task, overlapping_tasks, quiet_thread
from numpy.typing import NDArray
from problems import Problem, problems_of
from tqdm import tqdm

from pyro_fusion import fuse
from pyro_fusion.fusion.draws import AssignmentDraws

LEVELS = (0.5, 0.8, 0.95)

# Of the sets of 50, 80 and 95 %: in how many problems they should hold the truth.
AIMS = ((0.5, 0.9), (0.8, 0.97), (0.92, 0.99))


@dataclass(frozen=True)
class Coverage:
    """What draws of the assignment say of one problem.

    :ivar held: whether the set of each level holds the true K.
    :ivar sizes: how many numbers are in these sets.
    :ivar mode: whether the most probable K is right.
    :ivar of_truth: P(true K).
    :ivar excess: E[K] less the true K.
    :ivar brier: of P(same) against the true matches, over pairs of different parties; None where
        these are not known.
    :ivar base_rate: Brier score of the share of pairs that are the same, said of each.
    :ivar seconds: for fusion and draws.
    """

    held: tuple[bool, ...]
    sizes: tuple[int, ...]
    mode: bool
    of_truth: float
    excess: float
    brier: float | None
    base_rate: float | None
    seconds: float


def coverage(
    problem: Problem,
    matches: NDArray[np.intp] | None = None,
    num_draws: int = 100,
) -> Coverage:
    """What draws at the estimated T say of a problem of the first simulation.

    :param matches: the true atom of each component, ``[N]``, by ``problems.true_matches``.
    """
    begin = time.perf_counter()
    fusion = fuse(
        problem.messages, "product", prior={"atom": problem.base}, num_draws=num_draws, seed=0
    )
    draws = fusion.only_label().draws
    assert draws is not None
    return compare(draws, len(problem.truth), matches, time.perf_counter() - begin)


def compare(
    draws: AssignmentDraws,
    true_number: int,
    matches: NDArray[np.intp] | None = None,
    seconds: float = np.nan,
) -> Coverage:
    """Compare draws with the true number of atoms, and the true matches ``[N]`` if known."""
    sets = [draws.num_atoms_set(level) for level in LEVELS]
    brier = base_rate = None
    if matches is not None:
        party = torch.arange(len(draws.sizes)).repeat_interleave(torch.tensor(draws.sizes))
        pairs = (party[:, None] != party).triu()
        atom = torch.as_tensor(matches)
        same = (atom[:, None] == atom)[pairs].double()
        brier = float((draws.same()[pairs] - same).square().mean())
        base_rate = float(same.mean() * (1 - same.mean()))
    count = draws.num_atoms.double()
    return Coverage(
        held=tuple(true_number in x for x in sets),
        sizes=tuple(map(len, sets)),
        mode=sets[0][0] == true_number,
        of_truth=float((count == true_number).double().mean()),
        excess=float(count.mean()) - true_number,
        brier=brier,
        base_rate=base_rate,
        seconds=seconds,
    )


def of_task(task: Task, cache: Path | None, num_draws: int = 100) -> Coverage:
    """The coverage of one problem of the first simulation."""
    with quiet_thread():
        (problem,) = problems_of(task, cache).values()
        return coverage(problem, problem.matches, num_draws)


def table(groups: Mapping[str, Sequence[Coverage]]) -> str:
    """A row for each group of problems: per cent of sets that hold the truth and their mean
    sizes, and whether the aims are met."""
    lines = [f"{'':<16}{'problems':>9}"]
    lines[0] += "".join(f"{f'{100 * x:g} %':>8}{'size':>6}" for x in LEVELS)
    lines[0] += f"{'mode':>7}{'P(K)':>7}{'E[K]-K':>8}{'Brier':>7}{'(base)':>8}{'seconds':>9}"
    for name, runs in groups.items():
        row = f"{name:<16}{len(runs):>9}"
        for i in range(len(LEVELS)):
            held = np.mean([r.held[i] for r in runs])
            row += f"{100 * held:>8.0f}{np.mean([r.sizes[i] for r in runs]):>6.1f}"
        row += f"{100 * np.mean([r.mode for r in runs]):>7.0f}"
        row += f"{np.mean([r.of_truth for r in runs]):>7.2f}"
        row += f"{np.mean([r.excess for r in runs]):>+8.2f}"
        for x in ([r.brier for r in runs], [r.base_rate for r in runs]):
            known = [b for b in x if b is not None]
            row += f"{np.mean(known) if known else np.nan:>{7 if x[0] == runs[0].brier else 8}.3f}"
        row += f"{np.mean([r.seconds for r in runs]):>9.1f}"
        lines.append(row)
    return "\n".join(lines)


def aims(runs: Sequence[Coverage]) -> str:
    """One line: which of the aims are met over all problems."""
    shown = []
    for i, (low, high) in enumerate(AIMS):
        held = float(np.mean([r.held[i] for r in runs]))
        met = "met" if low <= held <= high else "MISSED"
        shown.append(
            f"{100 * LEVELS[i]:g} % sets in {100 * low:g} to {100 * high:g} %: "
            f"{100 * held:.0f} %, {met}"
        )
    return "; ".join(shown)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Coverage; see the top of this file.")
    parser.add_argument("--seeds", type=int, default=5, help="problems per setting")
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--small", action="store_true", help="small problems of one setting")
    parser.add_argument("--cache", type=Path, help="folder that keeps the local fits")
    args = parser.parse_args(arguments)
    if args.cache is not None:
        args.cache.mkdir(parents=True, exist_ok=True)
    tasks = overlapping_tasks(range(args.first_seed, args.first_seed + args.seeds), args.small)
    runs = [of_task(task, args.cache, args.draws) for task in tqdm(tasks)]
    spreads = sorted({task.spread for task in tasks})
    groups = {
        f"separation {x:g}": [r for task, r in zip(tasks, runs, strict=True) if task.spread == x]
        for x in spreads
    }
    print(table(groups | {"all": runs}))
    print(aims(runs))


if __name__ == "__main__":
    main()
