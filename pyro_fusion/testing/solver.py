# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a solver of the assignment, against an enumeration of small problems."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_fusion.assignment import (
    NEW,
    Assignment,
    AssignmentProblem,
    assignment_objective,
)
from pyro_fusion.assignment.priors import (
    AssignmentPrior,
    FixedAtoms,
    GroupNormPrior,
    IndianBuffetPrior,
)

__all__ = ["check_assignment", "check_solver", "lowest_objective"]

Solver = Callable[..., Assignment]


def check_solver(
    solver: Solver,
    priors: Sequence[AssignmentPrior] = (
        GroupNormPrior(),
        IndianBuffetPrior(1.0),
        FixedAtoms(1),
    ),
    *,
    opening: bool = True,
) -> None:
    """Check a solver, called as ``fuse`` does: ``solver(problem, prior, start=assignment)``.

    Its assignments are feasible and cost what it says; they are no worse than the start, nor better
    than the best of all, which is at least its bound. The same problem gives the same result, in
    float32 nearly so, and what was given stays as it is. Problems are with as many components as
    atoms and with none, with equal components, forbidden pairs, and a party that is unlike all.

    :param priors: those that it is for. A ``FixedAtoms`` stands for that of each problem, whatever
        its number.
    :param opening: whether it takes costs of opening an atom, as the pooling ``product`` has them.
    :raises AssertionError: with what was expected and what came.
    """
    for prior in priors:
        fixed = prior.num_atoms is not None
        for task in _tasks(fixed, opening):
            k = len(task.cost[0])
            _check_task(solver, task, FixedAtoms(k) if fixed else prior)


@dataclass(frozen=True)
class _Task:
    name: str
    cost: list[Tensor]
    start: list[Tensor]
    opening: Tensor | None = None
    least: bool = False
    """Whether it is small enough for an enumeration."""


def _random(
    name: str,
    seed: int,
    num_atoms: int,
    sizes: Sequence[int],
    forbidden: float = 0.0,
    least: bool = False,
) -> _Task:
    g = torch.Generator().manual_seed(seed)
    start = [torch.randperm(num_atoms, generator=g)[:n] for n in sizes]
    cost = []
    for n, own in zip(sizes, start, strict=True):
        c = 3 * torch.rand(num_atoms, n, generator=g, dtype=torch.float64)
        gone = torch.rand(c.shape, generator=g) < forbidden
        gone[own, torch.arange(n)] = False  # the start is allowed
        cost.append(c.masked_fill(gone, torch.inf))
    return _Task(name, cost, start, least=least)


def _tasks(fixed: bool, opening: bool) -> list[_Task]:
    tasks = [_random("a small one", seed, 3, [3, 1, 2, 3], least=True) for seed in range(3)]
    tasks += [_random("of one atom", 6, 1, [1, 1, 1], least=True)]
    tasks += [_random("of one party", 8, 4, [3], least=True)]
    tasks += [_random("with a party that has nothing", 7, 4, [2, 0, 3])]
    tasks += [_random("of as many components as atoms", 0, 6, [6, 2, 6, 5])]
    tasks += [_random("with forbidden pairs", s, 5, [4, 1, 3, 2], 0.5) for s in range(3)]
    same = _random("of equal components", 3, 4, [1]).cost[0]
    start = [torch.arange(n) for n in (4, 1, 3)]
    tasks += [_Task("of equal components", [same.repeat(1, n) for n in (4, 1, 3)], start)]
    zeros = [torch.zeros(4, n, dtype=torch.float64) for n in (4, 1, 3)]
    tasks += [_Task("of costs that are all zero", zeros, start)]
    usual = _random("", 4, 4, [3, 3, 3])
    far = torch.full((4, 2), 1e12, dtype=torch.float64)
    start = [*usual.start, torch.arange(2)]
    tasks += [_Task("with a party that is unlike all", [*usual.cost, far], start)]
    if not fixed:
        never = torch.full_like(far, torch.inf)
        start = [*usual.start, torch.full((2,), NEW)]
        tasks += [_Task("with a party that may have no atom", [*usual.cost, never], start)]
        none = [torch.zeros(0, n, dtype=torch.float64) for n in (2, 3)]
        start = [torch.full((n,), NEW) for n in (2, 3)]
        tasks += [_Task("without an atom", none, start)]
    if opening:
        price = torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
        for seed in range(3):
            small = _random("", seed, 3, [2, 3, 1])
            tasks += [_Task("with opening costs", small.cost, small.start, price, least=True)]
    return tasks


def _check_task(solver: Solver, task: _Task, prior: AssignmentPrior) -> None:
    start, what = task.start, f"problem {task.name!r} under {prior}"
    problem = AssignmentProblem.of(task.cost, prior, task.opening)
    cost = problem.split(problem.cost)
    before = [x.clone() for x in (problem.cost, *start)]
    result = solver(problem, prior, start=start)
    check_assignment(cost, prior, result, task.opening, what)
    if not all(map(torch.equal, before, (problem.cost, *start))):
        raise AssertionError(f"{what}: expected that costs and start stay as they are")
    given = assignment_objective(cost, prior, start, task.opening)
    slack = 1e-9 * max(1.0, abs(given))
    if not result.objective <= given + slack:
        raise AssertionError(
            f"{what}: expected F of at most the start's {given}, got {result.objective}"
        )
    if task.least:
        best = lowest_objective(cost, prior, task.opening)
        if not result.bound - slack <= best <= result.objective + slack:
            raise AssertionError(
                f"{what}: the least F of all assignments is {best}; expected a bound of at most "
                f"that, got {result.bound}, and F of at least that, got {result.objective}"
            )
    again = solver(problem, prior, start=start)
    if again.objective != result.objective or not all(map(torch.equal, again.atoms, result.atoms)):
        raise AssertionError(
            f"{what}: expected the same result each time, got F = {result.objective} and "
            f"{again.objective}"
        )
    further = solver(problem, prior, start=result.atoms)
    if not further.objective <= result.objective + slack:
        raise AssertionError(
            f"{what}, started from its own result: expected F of at most {result.objective}, got "
            f"{further.objective}"
        )
    if not any(bool(c.isinf().any()) for c in cost):
        _check_precision(solver, task, prior, what)


def _check_precision(solver: Solver, task: _Task, prior: AssignmentPrior, what: str) -> None:
    single = [c.float() for c in task.cost]
    results = []
    for cost in (single, [c.double() for c in single]):
        problem = AssignmentProblem.of(cost, prior, task.opening)
        results.append(solver(problem, prior, start=task.start))
        check_assignment(cost, prior, results[-1], task.opening, what)
    small, large = (r.objective for r in results)
    if not math.isclose(small, large, rel_tol=1e-5, abs_tol=1e-9):
        raise AssertionError(f"{what}: F is {small} in float32, {large} in float64")


def check_assignment(
    cost: Sequence[Tensor],
    prior: AssignmentPrior,
    result: Assignment,
    opening: Tensor | None = None,
    what: str = "result",
) -> None:
    """Check what holds of any result of a solver: feasible, at the cost that it says, not below its
    bound, and with a relaxed assignment, if it has one, that is one.

    :param cost: per party ``[K, L_s]``.
    :raises AssertionError: with what was expected and what came.
    """
    if not isinstance(result, Assignment):
        raise AssertionError(f"{what}: expected an Assignment, got {type(result).__name__}")
    if len(result.atoms) != len(cost):
        raise AssertionError(f"{what}: expected {len(cost)} parties, got {len(result.atoms)}")
    for s, (atoms, c) in enumerate(zip(result.atoms, cost, strict=True)):
        _check_party(atoms, c, prior, f"{what}, party {s}")
    if result.soft is not None:
        for s, (p, c) in enumerate(zip(result.soft, cost, strict=True)):
            _check_soft(p, c, prior, f"{what}, relaxed, party {s}")
    value = assignment_objective(cost, prior, result.atoms, opening)
    if not math.isclose(result.objective, value, rel_tol=1e-12, abs_tol=1e-12):
        raise AssertionError(
            f"{what}: the assignment costs F = {value}, the result says {result.objective}"
        )
    if not result.bound <= result.objective:
        raise AssertionError(
            f"{what}: expected a bound of at most F = {result.objective}, got {result.bound}"
        )


def _check_party(atoms: Tensor, cost: Tensor, prior: AssignmentPrior, what: str) -> None:
    num_atoms, size = cost.shape
    if atoms.dtype != torch.long or atoms.device.type != "cpu" or atoms.shape != (size,):
        raise AssertionError(
            f"{what}: expected int64 [{size}] on the CPU, got {atoms.dtype} {list(atoms.shape)} on "
            f"{atoms.device}"
        )
    if not bool(((atoms >= NEW) & (atoms < num_atoms)).all()):
        raise AssertionError(f"{what}: expected atoms from {NEW} to {num_atoms - 1}, got {atoms}")
    standing = atoms[atoms != NEW]
    if len(standing.unique()) != len(standing):
        raise AssertionError(f"{what}: expected each atom at most once, got {atoms.tolist()}")
    if prior.num_atoms is not None and len(standing) != size:
        raise AssertionError(f"{what}: expected no new atom under {prior}, got {atoms.tolist()}")
    if not bool(cost[standing, (atoms != NEW).nonzero().squeeze(-1)].isfinite().all()):
        raise AssertionError(f"{what}: expected no forbidden pair, got {atoms.tolist()}")


def _check_soft(p: Tensor, cost: Tensor, prior: AssignmentPrior, what: str) -> None:
    if (p.shape, p.dtype, p.device) != (cost.shape, cost.dtype, cost.device):
        raise AssertionError(
            f"{what}: expected {cost.dtype} {list(cost.shape)} on {cost.device}, got {p.dtype} "
            f"{list(p.shape)} on {p.device}"
        )
    eps = 20 * torch.finfo(p.dtype).eps
    if not bool((p >= 0).all()) or not bool((p[cost.isinf()] == 0).all()):
        raise AssertionError(f"{what}: expected entries >= 0, and 0 where a pair is forbidden")
    columns, rows = p.double().sum(0), p.double().sum(1)
    full = prior.num_atoms is None or bool((columns >= 1 - eps).all())
    if not bool((columns <= 1 + eps).all()) or not full:
        raise AssertionError(
            f"{what}: expected columns that sum to {'at most ' if prior.num_atoms is None else ''}1"
            f", got {columns.tolist()}"
        )
    if not bool((rows <= 1 + 1e-3 + eps).all()):
        raise AssertionError(f"{what}: expected rows that sum to at most 1, got {rows.tolist()}")


def _choices(num_atoms: int, size: int, new_atoms: bool) -> list[list[int]]:
    """All ways to give ``size`` components different atoms, or new ones."""
    result = []
    for a in itertools.product(range(NEW if new_atoms else 0, num_atoms), repeat=size):
        standing = [k for k in a if k != NEW]
        if len(set(standing)) == len(standing):
            result.append(list(a))
    return result


def lowest_objective(
    cost: Sequence[Tensor], prior: AssignmentPrior, opening: Tensor | None = None
) -> float:
    """The lowest F over all assignments of all parties, by enumeration: for a few parties with a
    few components.

    :param cost: per party ``[K, L_s]``.
    """
    num_atoms, count = len(cost[0]), sum(c.shape[1] for c in cost)
    value, used = torch.zeros(1).double(), torch.zeros(1, num_atoms + 1, dtype=torch.long)
    for c in cost:
        c = c.double()
        options = torch.tensor(_choices(num_atoms, c.shape[1], prior.num_atoms is None))
        index = options.clamp(min=0)
        own = c[index, torch.arange(c.shape[1])] if num_atoms else torch.zeros(options.shape)
        own = torch.where(options == NEW, 0.0, own).sum(1)
        has = torch.zeros(len(options), num_atoms + 1, dtype=torch.long)
        has.scatter_add_(1, options % (num_atoms + 1), torch.ones_like(options))
        value = (value[:, None] + own).flatten()
        used = (used[:, None] + has).flatten(0, 1)
    m, new = used[:, :-1], used[:, -1:]
    if opening is not None:
        value = value + (opening * (m > 0)).sum(1)
    lone = (torch.arange(count) < new).long()
    penalty = prior.penalty(len(cost))[torch.cat([m, lone], 1).sort(descending=True).values]
    weights = prior.rank_weights(num_atoms + count, max(c.shape[1] for c in cost))
    return float((value + penalty @ weights).min())
