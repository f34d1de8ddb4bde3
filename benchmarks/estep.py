# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""How fast the E-step is: cost matrices, the three solvers, whole fusions, each beside a peer.

One table, all in one run. Times that are compared are taken in turn, so that what else the machine
does hits both, and medians are printed. Peak memory is that of a process of its own.

Run ``python benchmarks/estep.py``; most of the time goes into the largest problem of cvxpy, which
``--quick`` leaves out. Parties are simulated: each has a random subset of the true atoms, jittered.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import scipy.optimize
import scipy.sparse
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

import pyro_fusion
from pyro_fusion import GroupNormPrior, NormalWishart, Posterior, fuse
from pyro_fusion.assignment import NEW, RelaxedAssignment, coordinate, relaxed, sinkhorn
from pyro_fusion.families import Factor
from pyro_fusion.pooling import pooling_named

COLUMNS = "{:<22} {:<31} {:>11}  {:<24} {:>11} {:>8}  {:<11} {:<4} {}"
FULL, DIAGONAL = "full", "diagonal"
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """``parties`` of ``components`` of the ``atoms``, in ``dim`` dimensions."""

    atoms: int
    parties: int
    components: int
    dim: int

    def __str__(self) -> str:
        return f"K={self.atoms} S={self.parties} L={self.components} D={self.dim}"


@dataclass(frozen=True)
class Scale:
    """Which problems are solved, and how often."""

    costs: tuple[tuple[str, Size], ...] = (
        (FULL, Size(60, 20, 20, 10)),
        (FULL, Size(200, 10, 50, 20)),
        (FULL, Size(400, 20, 100, 50)),
        (DIAGONAL, Size(60, 10_000, 20, 50)),
    )
    solvers: tuple[tuple[Size, float], ...] = (  # and how many times faster than cvxpy, 0 for any
        (Size(60, 20, 20, 8), 10),
        (Size(200, 10, 50, 8), 0),
        (Size(400, 20, 100, 8), 100),
    )
    small_fusion: Size = Size(60, 20, 20, 10)
    large_fusion: Size = Size(400, 20, 100, 50)
    many_parties: Size = Size(60, 10_000, 20, 50)
    parties: tuple[int, ...] = (100, 300, 1000, 3000, 10_000)
    repetitions: int = 7


SMALL = Scale(
    costs=((FULL, Size(6, 4, 3, 2)), (DIAGONAL, Size(6, 4, 3, 2))),
    solvers=((Size(6, 4, 3, 2), 10),),
    small_fusion=Size(6, 4, 3, 2),
    large_fusion=Size(8, 4, 4, 3),
    many_parties=Size(6, 20, 3, 2),
    parties=(5, 20),
    repetitions=1,
)


# -- problems --------------------------------------------------------------------------------------


def components(kind: str, which: Tensor, size: Size, device: str, seed: int = 1) -> Distribution:
    """Jittered copies of the true atoms ``which``, ``[N]``."""
    truth, noise = (torch.Generator().manual_seed(s) for s in (0, seed))
    shape = (size.atoms, size.dim)

    def jittered(generator_shape: tuple[int, ...], spread: float) -> Tensor:
        x = spread * torch.randn(*generator_shape, generator=truth, dtype=torch.float64)
        own = (len(which), *generator_shape[1:])
        return x[which] + 0.1 * torch.randn(*own, generator=noise, dtype=torch.float64)

    loc = jittered(shape, 5.0).to(device)
    spread = torch.rand(*loc.shape, generator=noise, dtype=torch.float64).to(device)
    if kind == DIAGONAL:
        return Independent(Normal(loc, 0.1 + 0.02 * spread), 1)
    root = jittered((*shape, 2 * size.dim), 1.0).to(device)
    concentration = 50 + 100 * spread[:, 0]
    df = concentration + size.dim
    scale = (root @ root.mT) / size.dim / df[:, None, None]
    return NormalWishart(loc, concentration, df, covariance_matrix=scale)


def subsets(size: Size) -> list[Tensor]:
    """The true atoms that each party has."""
    generator = torch.Generator().manual_seed(2)
    picks = (torch.randperm(size.atoms, generator=generator) for _ in range(size.parties))
    return [pick[: size.components] for pick in picks]


def posteriors(kind: str, size: Size, device: str = "cpu") -> list[Posterior]:
    """One per party."""
    return [
        Posterior(
            {"atom": components(kind, which, size, device, seed=3 + s)}, {"atom": "component"}
        )
        for s, which in enumerate(subsets(size))
    ]


def solver_problem(size: Size, device: str = "cpu") -> tuple[list[Tensor], GroupNormPrior]:
    """Costs of overlapping Gaussians, and the paper's λ: half their standard deviation."""
    generator = torch.Generator().manual_seed(0)

    def noise(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    centre = noise(1.0, size.atoms, size.dim)
    local = centre[torch.cat(subsets(size))]
    local = local + noise(0.6, *local.shape)
    atoms = centre + noise(0.2, *centre.shape)
    unit = torch.ones(())
    cost = pooling_named("inclusive").cost(
        *(Factor.of(Independent(Normal(x, unit.expand_as(x).double()), 1)) for x in (atoms, local))
    )
    parties = [c.contiguous().to(device) for c in cost.split(size.components, 1)]
    return parties, GroupNormPrior(float(cost.std()) / 2)


# -- measuring -------------------------------------------------------------------------------------


def seconds(function: Callable[[], Any], device: str = "cpu") -> float:
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(
    functions: Sequence[Callable[[], Any]], repetitions: int, device: str = "cpu"
) -> list[float]:
    """The median time of each, after one call that is not counted."""
    for f in functions:
        f()
    times = [[seconds(f, device) for f in functions] for _ in range(repetitions)]
    return [median(t) for t in zip(*times, strict=True)]


def isolated(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function in a process of its own."""
    threads = (torch.get_num_threads(),)
    context = get_context("forkserver")
    context.set_forkserver_preload(["pyro_fusion"])  # else each process imports it anew
    with ProcessPoolExecutor(1, context, torch.set_num_threads, threads) as pool:
        return pool.submit(function, *args).result()


def memory(field: str) -> float:
    """Bytes of this process: ``VmRSS``, now, or ``VmHWM``, at most since the last reset; NaN where
    there is no ``/proc``. (``getrusage`` would count what the parent had before the start.)"""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    match = re.search(rf"^{field}:\s+(\d+)", text, re.MULTILINE)
    return math.nan if match is None else 1024.0 * int(match[1])


def copies(size: Size) -> float:
    """Peak memory of ``relaxed`` beyond its input, in copies of that. Linux only."""
    cost, prior = solver_problem(size)
    relaxed([c[:40, :30] for c in cost], prior)  # what libraries take once is not its memory
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    relaxed(cost, prior)
    return (memory("VmHWM") - before) / sum(c.nbytes for c in cost)


def fused(kind: str, size: Size) -> tuple[float, float, int]:
    """Seconds of one fusion, peak memory of the whole process in GiB, and the number of atoms."""
    fuse(posteriors(kind, replace(size, parties=2)))  # what is loaded once takes a second
    parties = posteriors(kind, size)
    start = time.perf_counter()
    atoms = fuse(parties).num_atoms
    elapsed = time.perf_counter() - start
    return elapsed, memory("VmHWM") / GIB, atoms


# -- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line: times in seconds, but for ``unit``.

    :ivar limit: the most that ours may be, or with ``of_ratio`` ours over theirs, or with
        ``speedup`` the least that theirs over ours may be.
    """

    quantity: str
    problem: object
    ours: float
    peer: str = ""
    theirs: float = math.nan
    limit: float = math.nan
    measure: str = "ours"
    note: str = ""
    unit: str = "s"

    @property
    def value(self) -> float:
        """What the limit is of."""
        by_measure = {
            "ours": self.ours,
            "ratio": self.ours / self.theirs,
            "speedup": self.theirs / self.ours,
        }
        return by_measure[self.measure]

    def __str__(self) -> str:
        faster = self.measure == "speedup"
        target = met = ""
        if not math.isnan(self.limit):
            unit = f" {self.unit}" if self.measure == "ours" else " x"
            target = f"{'>=' if faster else '<='} {self.limit:g}{unit}"
            met = (
                "yes"
                if (self.value >= self.limit if faster else self.value <= self.limit)
                else "NO"
            )
        compared = not math.isnan(self.theirs)
        ratio = self.theirs / self.ours if faster else self.ours / self.theirs
        return COLUMNS.format(
            self.quantity,
            str(self.problem),
            f"{self.ours:.4g} {self.unit}",
            self.peer,
            f"{self.theirs:.4g} {self.unit}" if compared else "",
            f"{ratio:.3g}{' x' if faster else ''}" if compared else "",
            target,
            met,
            self.note,
        ).rstrip()


HEADER = COLUMNS.format(
    "quantity", "problem", "ours", "peer", "peer's", "ratio", "target", "met", "also"
)


def machine(device: str) -> str:
    packages = ("torch", "scipy", "cvxpy", "clarabel", "scs", "numpy")
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return (
        f"pyro_fusion {pyro_fusion.__version__}, Python {platform.python_version()}, "
        + ", ".join(f"{p} {version(p)}" for p in packages)
        + f"\n{name}; {os.cpu_count()} cores, {torch.get_num_threads()} threads, load "
        + " ".join(f"{x:.1f}" for x in os.getloadavg())
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


# -- cost matrices ---------------------------------------------------------------------------------


def cost_rows(scale: Scale, device: str) -> Iterator[Row]:
    for kind, size in scale.costs:
        which = torch.arange(size.parties * size.components) % size.atoms
        local = Factor.of(components(kind, which, size, device))
        a, b = (
            torch.randn(n, local.natural.shape[1], dtype=torch.float64, device=device)
            for n in (size.atoms, len(which))
        )
        for name in ("inclusive", "exclusive"):
            pooling = pooling_named(name)
            atoms = pooling.barycenter(local, which.to(device), size.atoms)
            # A copy has nothing in its cache, as atoms have that were just computed.
            functions = (lambda: pooling.cost(replace(atoms), local), lambda: a @ b.mT)  # noqa: B023
            ours, theirs = in_turn(functions, scale.repetitions, device)
            problem = f"{kind} K={size.atoms} N={len(which)} D={size.dim}"
            yield Row(f"cost, {name}", problem, ours, "matmul", theirs, 2, "ratio")


# -- solvers ---------------------------------------------------------------------------------------


def coordinate_rows(scale: Scale) -> Iterator[Row]:
    for size, _ in scale.solvers:
        cost, prior = solver_problem(size)
        generator = torch.Generator().manual_seed(4)
        start = [torch.randperm(size.atoms, generator=generator)[: c.shape[1]] for c in cost]
        setup = partial(coordinate, cost, prior, start=start, moves=False, max_sweeps=0)
        for sweeps in (1, 100):
            solve = partial(setup, max_sweeps=sweeps)
            result, matrices = recorded(solve)
            functions = (solve, setup, partial(_assign_all, matrices))
            whole, before, theirs = in_turn(functions, scale.repetitions)
            count = result.iterations
            yield Row(
                "coordinate, sweep",
                size,
                (whole - before) / count,
                "linear_sum_assignment",
                theirs / count,
                2,
                "ratio",
                f"{count} sweeps from a random start, {len(matrices)} linear assignments; in all "
                f"{whole:.2g} s, {before:.2g} s of it before the first sweep",
            )


def recorded(solve: Callable[[], Any]) -> tuple[Any, list[np.ndarray]]:
    """A result, and the matrices that scipy was given on the way."""
    assign = scipy.optimize.linear_sum_assignment
    matrices: list[np.ndarray] = []

    def record(matrix: np.ndarray) -> Any:
        matrices.append(matrix.copy())
        return assign(matrix)

    with mock.patch("scipy.optimize.linear_sum_assignment", record):
        return solve(), matrices


def _assign_all(matrices: list[np.ndarray]) -> None:
    for m in matrices:
        scipy.optimize.linear_sum_assignment(m)


def convex(cost: list[Tensor], scale: float, solver: str) -> Tensor:
    """The relaxed assignment ``[K, N]`` by cvxpy, all parties in one matrix."""
    import cvxpy as cp  # takes a second, also of each process that measures memory

    c = torch.cat(cost, 1).numpy()
    sizes = [p.shape[1] for p in cost]
    party = scipy.sparse.csr_matrix(np.repeat(np.eye(len(cost)), sizes, axis=0))
    p, new = cp.Variable(c.shape, nonneg=True), cp.Variable(c.shape[1], nonneg=True)
    norms = cp.sum(cp.norm(p, 2, axis=1))
    objective = cp.sum(cp.multiply(c, p)) + scale * norms + scale * cp.sum(new)
    constraints = [cp.sum(p, axis=0) + new == 1, p @ party <= 1]
    cp.Problem(cp.Minimize(objective), constraints).solve(solver=solver)
    return torch.as_tensor(p.value)


def convex_objective(cost: list[Tensor], scale: float, soft: Tensor) -> float:
    """Of what cvxpy returns, made feasible first."""
    parties = soft.clamp(min=0).split([c.shape[1] for c in cost], 1)
    rows = torch.cat([p / p.sum(1, keepdim=True).clamp(min=1) for p in parties], 1)
    p = rows / rows.sum(0).clamp(min=1)
    linear = (p * torch.cat(cost, 1)).sum()
    return float(linear + scale * (p.norm(dim=1).sum() + (1 - p.sum(0)).sum()))


# Gaps that the peers' are compared at: beyond, rounding errors decide.
FINEST, COARSEST = 1e-8, 1e-2


def relaxed_rows(scale: Scale, quick: bool) -> Iterator[Row]:
    for size, speedup in scale.solvers:
        cost, prior = solver_problem(size)
        strength = float(prior.penalty(1)[1])  # λ
        dual = relaxed(cost, prior, tolerance=FINEST).dual
        for solver in ("SCS", "CLARABEL"):
            if quick and speedup == 100:
                break
            peer: list[Tensor] = []
            theirs = seconds(lambda: peer.append(convex(cost, strength, solver)))  # noqa: B023
            primal = convex_objective(cost, strength, peer[0])
            gap = (primal - dual) / primal
            tolerance = min(max(gap, FINEST), COARSEST)
            (ours,) = in_turn(
                [partial(relaxed, cost, prior, tolerance=tolerance)], scale.repetitions
            )
            reached = relaxed(cost, prior, tolerance=tolerance).duality_gap
            limit = speedup or math.nan
            note = f"gap {reached:.0e}, {solver}'s {gap:.0e}"
            yield Row("relaxed", size, ours, f"cvxpy, {solver}", theirs, limit, "speedup", note)
        result = relaxed(cost, prior)
        (ours,) = in_turn([partial(relaxed, cost, prior)], scale.repetitions)
        yield Row("relaxed, by default", size, ours, note=_certificate(result))
    size = scale.solvers[-1][0]
    if Path("/proc/self/clear_refs").exists():
        yield Row("relaxed, peak memory", size, isolated(copies, size), limit=5, unit="copies")


def _certificate(result: RelaxedAssignment) -> str:
    assert result.soft is not None
    p = torch.cat(result.soft, 1)
    fractional = ((p > 1e-3) & (p < 1 - 1e-3)).any(0)
    return (
        f"gap {result.duality_gap:.0e}; {_percent(p > 1e-6)} of P non-zero, "
        f"{_percent(fractional)} of its columns fractional; F {result.objective:.6g}, bound "
        f"{result.bound:.6g}: within {100 * result.gap:.2g} %"
    )


def _percent(x: Tensor) -> str:
    return f"{100 * float(x.double().mean()):.2g} %"


def other_rows(scale: Scale) -> Iterator[Row]:
    for size, _ in scale.solvers:
        cost, prior = solver_problem(size)
        bound = relaxed(cost, prior).bound
        for solver in (coordinate, sinkhorn):
            result = solver(cost, prior)
            (ours,) = in_turn([partial(solver, cost, prior)], scale.repetitions)
            above = 100 * (result.objective - bound) / result.objective
            new = sum(int((a == NEW).sum()) for a in result.atoms)
            note = f"F {result.objective:.6g}: within {above:.2g} % of relaxed's bound, {new} new"
            yield Row(solver.__name__, size, ours, note=note)


# -- whole fusions ---------------------------------------------------------------------------------


def fusion_rows(scale: Scale) -> Iterator[Row]:
    for kind in (FULL, DIAGONAL):
        parties = posteriors(kind, scale.small_fusion)
        atoms = fuse(parties).num_atoms
        (ours,) = in_turn([partial(fuse, parties)], scale.repetitions)
        problem = f"{kind} {scale.small_fusion}"
        yield Row("fuse", problem, ours, limit=0.2, note=f"{atoms} atoms")
    ours, peak, atoms = isolated(fused, FULL, scale.large_fusion)
    problem = f"{FULL} {scale.large_fusion}"
    yield Row("fuse", problem, ours, limit=60, note=f"{atoms} atoms")
    yield Row("fuse, peak memory", problem, peak, limit=4, unit="GiB")


def scaling_rows(scale: Scale, plot: str | None) -> Iterator[Row]:
    times = {}
    for parties in scale.parties:
        size = replace(scale.many_parties, parties=parties)
        times[parties], peak, atoms = isolated(fused, DIAGONAL, size)
        each = 1e3 * times[parties] / parties
        note = f"{each:.3g} ms per party, {atoms} atoms, peak {peak:.2g} GiB"
        limit = 180 if parties == scale.parties[-1] else math.nan
        yield Row(
            "fuse, many parties", f"{DIAGONAL} {size}", times[parties], limit=limit, note=note
        )
    slope = np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0]
    yield Row(
        "fuse, growth",
        f"S={min(times)} to {max(times)}",
        slope,
        note="seconds as a power of S: 1 is linear",
        unit="",
    )
    if plot is not None:
        _plot(times, plot)


def _plot(times: dict[int, float], file: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    parties = np.array(list(times))
    axes.loglog(parties, list(times.values()), "o-", label="fuse")
    axes.loglog(parties, parties * times[parties[0]] / parties[0], "k:", label="slope one")
    axes.set(xlabel="parties", ylabel="seconds")
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


# -- on a GPU --------------------------------------------------------------------------------------


def device_rows(scale: Scale, device: str) -> Iterator[Row]:
    """What runs on the device, beside the same on the CPU; the CPU's repetitions are few."""

    def beside(quantity: str, problem: object, make: Callable[[str], Callable[[], Any]]) -> Row:
        (ours,) = in_turn([make(device)], scale.repetitions, device)
        (theirs,) = in_turn([make("cpu")], 1)
        return Row(quantity, problem, ours, "same on the CPU", theirs, measure="speedup")

    for kind, size in scale.costs:
        problem = f"{kind} K={size.atoms} N={size.parties * size.components} D={size.dim}"
        yield beside("cost, inclusive", problem, partial(_cost_on, kind, size))
        yield beside("matmul", problem, partial(_matmul_on, kind, size))
    for size, _ in scale.solvers:
        for solver in (relaxed, sinkhorn):
            yield beside(solver.__name__, size, partial(_solver_on, solver, size))
    fusions = (
        (FULL, scale.small_fusion),
        (DIAGONAL, scale.small_fusion),
        (FULL, scale.large_fusion),
        (DIAGONAL, replace(scale.many_parties, parties=scale.parties[len(scale.parties) // 2])),
    )
    for kind, size in fusions:
        yield beside("fuse", f"{kind} {size}", partial(_fusion_on, kind, size))


def _cost_on(kind: str, size: Size, device: str) -> Callable[[], Any]:
    which = torch.arange(size.parties * size.components) % size.atoms
    local = Factor.of(components(kind, which, size, device))
    pooling = pooling_named("inclusive")
    atoms = pooling.barycenter(local, which.to(device), size.atoms)
    return lambda: pooling.cost(replace(atoms), local)


def _matmul_on(kind: str, size: Size, device: str) -> Callable[[], Any]:
    width = Factor.of(components(kind, torch.zeros(1).long(), size, device)).natural.shape[1]
    a, b = (
        torch.randn(n, width, dtype=torch.float64, device=device)
        for n in (size.atoms, size.parties * size.components)
    )
    return lambda: a @ b.mT


def _solver_on(solver: Callable[..., Any], size: Size, device: str) -> Callable[[], Any]:
    return partial(solver, *solver_problem(size, device))


def _fusion_on(kind: str, size: Size, device: str) -> Callable[[], Any]:
    return partial(fuse, posteriors(kind, size, device))


# -- all of it -------------------------------------------------------------------------------------


def rows(scale: Scale, device: str, quick: bool, plot: str | None) -> Iterator[Row]:
    yield from cost_rows(scale, device)
    if device != "cpu":
        yield from device_rows(scale, device)
        return
    yield from coordinate_rows(scale)
    yield from relaxed_rows(scale, quick)
    yield from other_rows(scale)
    yield from fusion_rows(scale)
    yield from scaling_rows(scale, plot)


LEGEND = """\
cost: fresh atoms against local factors whose coordinates are cached; matmul: [K, P] x [P, N].
coordinate: per sweep, against scipy alone on the matrices that coordinate gives it.
relaxed: all of it, with coordinate and rounding, to the gap that cvxpy reached; cvxpy's seconds
include its own compilation; its gap is that of its solution made feasible, to our bound.
full: Normal-Wishart; diagonal: Normals of one variance per dimension; solvers: overlapping Normals.
ratio: ours over the peer's; with an x, the peer's over ours: how many times faster."""


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no CUDA device here (torch.cuda.is_available() is False)")
        return
    torch.set_num_threads(args.threads)
    print(machine(args.device), HEADER, "-" * len(HEADER), sep="\n")
    for row in rows(SMALL if args.small else Scale(), args.device, args.quick, args.plot):
        # What is tiny meets no target, and need not.
        print(replace(row, limit=math.nan) if args.small else row, flush=True)
    print(LEGEND)
    if args.plot is not None and args.device == "cpu":
        print(f"Seconds over the number of parties: {args.plot}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="The speed of the E-step; see the top of this file."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more pay on idle cores")
    parser.add_argument("--small", action="store_true", help="tiny problems, a few seconds")
    parser.add_argument("--quick", action="store_true", help="without the peers that take minutes")
    parser.add_argument("--plot", metavar="FILE", help="picture of seconds over parties")
    return parser


if __name__ == "__main__":
    main()
