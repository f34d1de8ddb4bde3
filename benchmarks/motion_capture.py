# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Six motion-capture sequences, each with a hidden Markov model of its own, and the six fused.

Run ``python benchmarks/motion_capture.py --data FOLDER``, with ``mocap6.npz`` in the folder: 2058
frames of 12 channels at ten frames a second, of two subjects, each frame labelled with one of 12
actions. The fits see no label.

Source: the experiment is that of Claici et al., *Model Fusion with Kullback-Leibler Divergence*
(ICML 2020), sec. 6; the data that of Fox et al., *Joint modeling of multiple time series via the
beta process* (AOAS 2014), as in bnpy. Their emissions are autoregressive or Gaussian; these are
Gaussian.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from hidden_markov import HMM, Prior, fit, log_predictive, predictive, viterbi
from pyro.distributions import constraints
from state_sequences import draw, hamming
from torch import Tensor
from tqdm import tqdm

import pyro_fusion
from pyro_fusion import (
    Fusion,
    GroupNormPrior,
    IndianBuffetPrior,
    NormalWishart,
    Posterior,
    from_guide,
    fuse,
)
from pyro_fusion.assignment.priors import AssignmentPrior

AXES = {"initial": "state", "transition": ("state", "state")}
POOLINGS = ("inclusive", "exclusive", "product")
PRIORS = {"IndianBuffetPrior": IndianBuffetPrior(), "GroupNormPrior": GroupNormPrior()}
# Row -> pooling, prior of the assignment, and what the estimated dispersion is multiplied by.
FUSIONS: dict[str, tuple[str, AssignmentPrior, float]] = {
    **{f"{p}, {name}": (p, prior, 1.0) for p in POOLINGS for name, prior in PRIORS.items()},
    **{f"{p}, GroupNormPrior, 2 T": (p, GroupNormPrior(), 2.0) for p in POOLINGS[:2]},
}
SEPARATE, BEST, JOINT = "separate", "separate, best (oracle)", "one HMM on all sequences"
SHOWN = ("exclusive, GroupNormPrior", "product, IndianBuffetPrior")  # defaults


@dataclass(frozen=True)
class Data:
    """Sequences and the actions in them.

    :ivar frames: of each sequence, ``[T, D]``.
    :ivar actions: of each frame, from 0, ``[T]`` each.
    :ivar names: of the sequences.
    :ivar action_names: of the actions.
    """

    frames: list[Tensor]
    actions: list[Tensor]
    names: list[str]
    action_names: list[str]


def motion_capture(folder: Path) -> Data:
    """The sequences, whose channels have mean zero, in units of each channel's standard deviation
    over all of them: twelve numbers that the parties agree on."""
    with np.load(folder / "mocap6.npz", allow_pickle=False) as file:
        x = torch.as_tensor(file["X"], dtype=torch.float64)
        actions = torch.as_tensor(file["z_true"]).long() - 1
        sizes = np.diff(file["doc_range"]).tolist()
        names, action_names = file["seq_names"].tolist(), file["state_names"].tolist()
    x = x / x.std(0)
    return Data(list(x.split(sizes)), list(actions.split(sizes)), names, action_names)


# The simulation of --small: states in the plane, and those that each party visits.
MEANS = 6.0 * torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.float64)
HOLDS = ((0, 1, 2), (2, 0), (3, 1, 0), (1, 2, 3))


def simulated(num_frames: int = 150, seed: int = 0) -> Data:
    """Chains that stay with probability 0.9, or move to any other state of their party; the actions
    are the true states."""
    generator = torch.Generator().manual_seed(seed)
    frames, actions = [], []
    for holds in HOLDS:
        moves = torch.randint(1, len(holds), (num_frames,), generator=generator)
        moves *= torch.rand(num_frames, generator=generator) > 0.9
        state = torch.tensor(holds)[moves.cumsum(0) % len(holds)]
        noise = torch.randn(num_frames, 2, generator=generator, dtype=torch.float64)
        frames.append(MEANS[state] + noise)
        actions.append(state)
    names = [f"simulated {s}" for s in range(len(HOLDS))]
    return Data(frames, actions, names, [f"state {k}" for k in range(len(MEANS))])


def prior_of(dim: int, spread: float = 1.0) -> Prior:
    """The prior of all fits: a state's variances are about ``spread``, those of all frames 1."""
    zero, eye = torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
    return Prior(NormalWishart(zero, 0.1, dim + 2.0, precision_matrix=spread * eye))


# -- between fits and posteriors -------------------------------------------------------------------


def guide_of(hmm: HMM) -> Callable[[], None]:
    """The hand-written Pyro guide of a fit."""

    def guide() -> None:
        e = hmm.emission
        matrix, df = e.precision_matrix[0], constraints.greater_than(e.loc.shape[-1] - 1)
        initial = pyro.param("alpha", hmm.initial[0], constraint=constraints.positive)
        moves = pyro.param("moves", hmm.transition[0], constraint=constraints.positive)
        loc = pyro.param("loc", e.loc[0])
        count = pyro.param("count", e.concentration[0], constraint=constraints.positive)
        df = pyro.param("df", e.df[0], constraint=df)
        matrix = pyro.param("matrix", matrix, constraint=constraints.positive_definite)
        pyro.sample("initial", dist.Dirichlet(initial))
        with pyro.plate("state", hmm.num_states):
            pyro.sample("transition", dist.Dirichlet(moves))
            pyro.sample("emission", NormalWishart(loc, count, df, precision_matrix=matrix))

    return guide


def posterior_of(hmm: HMM) -> Posterior:
    """A fit as its party hands it over."""
    guide = guide_of(hmm)
    with pyro.get_param_store().scope():
        guide()  # as SVI does: it makes the parameters
        return from_guide(guide, axes=AXES)


def model_of(prior: Prior) -> Callable[..., None]:
    """The prior as a Pyro model, which ``product`` divides out."""

    def model(num_states: int = 2) -> None:
        initial = torch.full((num_states,), prior.initial, dtype=torch.float64)
        pyro.sample("initial", dist.Dirichlet(initial))
        with pyro.plate("state", num_states):
            pyro.sample("transition", dist.Dirichlet(prior.transition(num_states)))
            pyro.sample("emission", prior.emission)

    return model


def hmm_of(posterior: Posterior) -> HMM:
    f = posterior.factors
    emission = f["emission"].expand([1, posterior.components("state")])
    return HMM(f["initial"].concentration[None], f["transition"].concentration[None], emission)


# -- scores ----------------------------------------------------------------------------------------


def decoded(hmm: HMM, frames: Sequence[Tensor]) -> list[Tensor]:
    return [viterbi(*predictive(hmm, x)) for x in frames]


COLUMNS = ("Hamming", "per sequence", "states", "held out", "fusion s", "fits s")


@dataclass
class Row:
    """The scores of one method, a value per seed each.

    :ivar cells: column -> values.
    """

    cells: dict[str, list[float]] = field(default_factory=lambda: {c: [] for c in COLUMNS})

    def add(self, column: str, value: float) -> None:
        self.cells[column].append(value)

    def add_paths(self, data: Data, paths: Sequence[Tensor]) -> None:
        own = [hamming([p], [a]) * len(p) for p, a in zip(paths, data.actions, strict=True)]
        self.add("Hamming", hamming(paths, data.actions))
        self.add("per sequence", sum(own) / sum(map(len, paths)))


# -- local fits ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitter:
    """Fits of one seed, kept in a folder if there is one.

    :ivar prior: of all fits.
    :ivar max_states: that a fit starts with.
    :ivar restarts: of each.
    :ivar seed: of what is random in them.
    :ivar cache: the folder.
    """

    prior: Prior
    max_states: int
    restarts: int
    seed: int
    cache: Path | None

    def __call__(self, data: Data, which: Sequence[int]) -> tuple[HMM, float]:
        """An HMM on these sequences, and the seconds that it took."""
        settings = (self.max_states, self.restarts, self.seed)
        spread = float(self.prior.emission.precision_matrix[0, 0])
        name = "-".join(map(str, [spread, *settings, *(data.names[i] for i in which)]))
        path = None if self.cache is None else self.cache / f"{name}.npz"
        if path is None or not path.exists():
            start = time.perf_counter()
            hmm = fit([data.frames[i] for i in which], self.prior, *settings).hmm
            seconds = time.perf_counter() - start
            if path is None:
                return hmm, seconds
            arrays = {name: f(hmm).numpy() for name, f in PARAMETERS.items()}
            np.savez(path, allow_pickle=False, seconds=seconds, **arrays)
        with np.load(path, allow_pickle=False) as file:
            initial, transition, *rest = (torch.as_tensor(file[name]) for name in PARAMETERS)
            loc, concentration, df, matrix = rest
            emission = NormalWishart(loc, concentration, df, precision_matrix=matrix)
            return HMM(initial, transition, emission), float(file["seconds"])


PARAMETERS: dict[str, Callable[[HMM], Tensor]] = {
    "initial": lambda h: h.initial,
    "transition": lambda h: h.transition,
    "loc": lambda h: h.emission.loc,
    "concentration": lambda h: h.emission.concentration,
    "df": lambda h: h.emission.df,
    "matrix": lambda h: h.emission.precision_matrix,
}


# -- the methods -----------------------------------------------------------------------------------

Rows = dict[str, Row]
Paths = dict[str, list[Tensor]]


def others(n: int, i: int) -> list[int]:
    return [j for j in range(n) if j != i]


def fused(posteriors: Sequence[Posterior], name: str, prior: Prior) -> Fusion:
    """A row of ``FUSIONS``."""
    pooling, belief, factor = FUSIONS[name]
    base = model_of(prior)
    fusion = fuse(posteriors, pooling, belief, prior=base)
    if factor == 1:
        return fusion
    return fuse(posteriors, pooling, belief, prior=base, dispersion=factor * fusion.dispersion)


def solve(data: Data, fitter: Fitter, rows: Rows) -> Paths:
    """One seed: adds to all rows; row -> the decoded states of each sequence."""
    n, frames = len(data.frames), data.frames
    total = sum(map(len, frames))
    result: Paths = {}

    def add(name: str, paths: list[Tensor], **cells: float) -> None:
        rows[name].add_paths(data, paths)
        for column, value in cells.items():
            rows[name].add(column.replace("_", " "), value)
        result[name] = paths

    fits, seconds = zip(*(fitter(data, [i]) for i in range(n)), strict=True)
    # States of different sequences are different states.
    ends = np.cumsum([0, *(h.num_states for h in fits)]).tolist()
    paths = [decoded(h, [x])[0] + end for h, x, end in zip(fits, frames, ends, strict=False)]
    scores = [[log_predictive(fits[j], x) for j in others(n, i)] for i, x in enumerate(frames)]
    # The log-densities of a whole sequence, under each HMM that did not see it, and the mixture of
    # these.
    held_out = sum(float(np.logaddexp.reduce(s)) - math.log(len(s)) for s in scores)
    add(SEPARATE, paths, states=ends[-1], held_out=held_out / total, fits_s=sum(seconds))
    rows[BEST].add("held out", sum(map(max, scores)) / total)

    posteriors = [posterior_of(h) for h in fits]
    for name in FUSIONS:
        start = time.perf_counter()
        fusion = fused(posteriors, name, fitter.prior)
        fusion_s = time.perf_counter() - start
        held_out = 0.0
        for i, x in enumerate(frames):
            without = fused([posteriors[j] for j in others(n, i)], name, fitter.prior)
            held_out += log_predictive(hmm_of(without.posterior), x)
        paths = decoded(hmm_of(fusion.posterior), frames)
        scored = {"states": fusion.num_atoms, "held_out": held_out / total}
        add(name, paths, **scored, fusion_s=fusion_s, fits_s=sum(seconds))

    hmm, joint_s = fitter(data, range(n))
    without_each = (fitter(data, others(n, i))[0] for i in range(n))
    held_out = sum(log_predictive(h, x) for h, x in zip(without_each, frames, strict=True))
    scored = {"states": hmm.num_states, "held_out": held_out / total}
    add(JOINT, decoded(hmm, frames), **scored, fits_s=joint_s)
    return result


# -- table -----------------------------------------------------------------------------------------


def print_table(rows: Rows) -> None:
    width = max(map(len, rows)) + 2
    print(" " * width + "".join(f"{name:>16}" for name in COLUMNS))
    for name, row in rows.items():
        print((f"{name:<{width}}" + "".join(map(_cell, COLUMNS, row.cells.values()))).rstrip())


def _cell(column: str, values: list[float]) -> str:
    if not values:
        return f"{'-':>16}"
    digits = {"Hamming": 3, "per sequence": 3, "states": 1}.get(column, 2)
    mean, deviation = np.mean(values), np.std(values, ddof=len(values) > 1)
    return f"{f'{mean:.{digits}f} ± {deviation:.{digits}f}':>16}"


# -- the whole -------------------------------------------------------------------------------------

LEGEND = """
Hamming: the share of frames whose state is not matched to their action, one state to one action,
over all sequences together; per sequence: matched anew in each. Of `separate`, states of different
sequences are different. States are those of the most likely path under mean transitions and Student
t emissions. held out: log predictive density per frame (channels in units of their deviation), one
sequence left out and the rest fused; of `separate`, by the mixture of the other HMMs, and below
that by the best. fusion s, fits s: seconds to fuse, and to fit all HMMs before. 2 T: with twice the
dispersion that is estimated. Mean ± deviation over seeds, which are those of the local fits."""


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    for folder in (args.out, args.cache):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    if args.small:
        data, max_states, restarts, seeds = simulated(), 6, 2, range(1)
    else:
        data, max_states, restarts = motion_capture(args.data), args.states, args.restarts
        seeds = range(args.seeds)
    prior = prior_of(data.frames[0].shape[1], args.spread)
    print(f"pyro_fusion {pyro_fusion.__version__}, Python {platform.python_version()}", end="")
    for package in ("torch", "pyro-ppl", "scipy", "numpy"):
        print(f", {package} {version(package)}", end="")
    print(f"; seeds 0 to {seeds[-1]}, {restarts} starts of {max_states} states each", end="")
    print(f", spread {args.spread}\n")
    rows: Rows = {name: Row() for name in (SEPARATE, BEST, *FUSIONS, JOINT)}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for seed in tqdm(seeds, unit="seed"):
            paths = solve(data, Fitter(prior, max_states, restarts, seed, args.cache), rows)
            if seed == 0:
                strips = {name: paths[name] for name in SHOWN}
                file = args.out / "motion_capture.png"
                draw(strips, data.actions, data.names, data.action_names, file)
    finally:
        torch.set_num_threads(before)
    print_table(rows)
    print(LEGEND)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Motion capture; see the top of this file.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder with mocap6.npz")
    source.add_argument("--small", action="store_true", help="a small simulation instead")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the picture")
    parser.add_argument("--cache", type=Path, help="folder that keeps the fits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--restarts", type=int, default=5, help="starts of each fit")
    parser.add_argument("--states", type=int, default=20, help="at each start")
    parser.add_argument(
        "--spread", type=float, default=1.0, help="a state's variance to expect, in that of all"
    )
    return parser


if __name__ == "__main__":
    main()
