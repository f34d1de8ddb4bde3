# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""E-step: costs and a prior in, an assignment out. Pure tensor code.

Minimised over assignments in which each component has one atom and no two components of a party
share one:

.. math:: F = \sum_s \sum_l C_s[k_{sl}, l] + \sum_k \varphi(m_k) + \sum_{k: m_k > 0} o_k

``C_s`` the divergences over the dispersion, ``m_k`` the number of parties that have atom ``k``,
``o_k`` an opening cost. A component may also have a new atom of its own, at ``φ(1)`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_fusion.errors import ParameterError, StructureError

__all__ = ["NEW", "Assignment", "assignment_objective", "coordinate", "match"]

NEW = -1
"""Marks a component that opens an atom of its own."""


@dataclass(frozen=True)
class Assignment:
    """The result of an E-step.

    :ivar atoms: per party a LongTensor ``[L_s]``: the atom of each component, or :data:`NEW`.
    :ivar objective: F of this assignment.
    :ivar iterations: sweeps over all parties, in the best restart.
    :ivar converged: whether the last sweep changed nothing, so that no party alone can improve.
    """

    atoms: list[Tensor]
    objective: float
    iterations: int
    converged: bool


def assignment_objective(
    cost: Sequence[Tensor],
    penalty: Tensor,
    atoms: Sequence[Tensor],
    opening: Tensor | None = None,
) -> float:
    """F of an assignment; arguments as for :func:`coordinate`."""
    problem = _Problem.of(cost, penalty, opening, new_atoms=True)
    return problem.objective([np.asarray(a) for a in atoms])


def coordinate(
    cost: Sequence[Tensor],
    penalty: Tensor,
    *,
    opening: Tensor | None = None,
    start: Sequence[Tensor] | None = None,
    new_atoms: bool = True,
    restarts: int = 0,
    seed: int = 0,
    max_sweeps: int = 100,
) -> Assignment:
    """One party at a time, each an exact rectangular linear assignment given the others, until a
    sweep changes nothing. F never rises.

    :param cost: per party ``[K, L_s]``; ``inf`` forbids a pair.
    :param penalty: ``φ(0), ..., φ(S)``, shape ``[S + 1]``.
    :param opening: cost of using an atom at all, ``[K]``; zero by default.
    :param start: an assignment to start from; by default all components open new atoms, or, where
        that is not allowed, each party takes its cheapest atoms.
    :param new_atoms: whether components may open atoms of their own.
    :param restarts: further starts from random assignments, with the parties in random order.
    :param seed: of the random starts and orders.
    :param max_sweeps: limit on sweeps per start.
    :raises StructureError: if shapes do not fit, or a party has more components than there are
        atoms while ``new_atoms`` is False.
    :raises ParameterError: if costs are NaN or ``-inf``, or if every assignment is forbidden.

    Source: Yurochkin et al., *Statistical Model Aggregation via Parameter Matching* (NeurIPS
    2019), alg. 1; exact linear assignment by ``scipy.optimize.linear_sum_assignment``.
    """
    problem = _Problem.of(cost, penalty, opening, new_atoms)
    _check(problem)
    rng = np.random.default_rng(seed)
    first = _first(problem) if start is None else [np.asarray(a) for a in start]
    best = problem.descend(first, np.arange(len(cost)), max_sweeps)
    for _ in range(restarts):
        order = rng.permutation(len(cost))
        candidate = problem.descend(_random(problem, rng), order, max_sweeps)
        if candidate[1] < best[1]:
            best = candidate
    atoms, objective, sweeps, converged = best
    return Assignment([torch.as_tensor(a) for a in atoms], objective, sweeps, converged)


def match(cost: Tensor, new: float, room: int | None = None) -> Tensor:
    """One party: each component its cheapest atom, no atom twice, or a new one at cost ``new``.

    :param cost: ``[K, L]``.
    :param room: how many new atoms there may be; by default one for each component.
    :return: LongTensor ``[L]`` of atoms or :data:`NEW`; an exact linear assignment.
    """
    return torch.as_tensor(_solve(_array(cost), new, room))


def _check(problem: _Problem) -> None:
    cost, penalty = problem.cost, problem.penalty
    if not cost:
        raise StructureError("expected at least one party, got none")
    num_atoms = cost[0].shape[0]
    for s, c in enumerate(cost):
        if c.ndim != 2 or c.shape[0] != num_atoms:
            raise StructureError(
                f"party {s}: expected costs of shape [{num_atoms}, L], got {list(c.shape)}"
            )
        if not problem.new_atoms and c.shape[1] > num_atoms:
            raise StructureError(
                f"party {s} has {c.shape[1]} components, but there are only {num_atoms} atoms"
            )
        if np.isnan(c).any() or np.isneginf(c).any():
            raise ParameterError(f"party {s}: costs must not be NaN or -inf")
    if penalty.shape != (len(cost) + 1,):
        raise StructureError(
            f"expected a penalty of shape [{len(cost) + 1}], got {list(penalty.shape)}"
        )


_Atoms = list[np.ndarray]


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def _solve(cost: np.ndarray, new: float, room: int | None) -> np.ndarray:
    """:func:`match` on arrays; ValueError if every assignment has infinite cost."""
    from scipy.optimize import linear_sum_assignment  # slow to import: only when needed

    num_atoms, size = cost.shape
    slots = size if room is None else min(size, room)
    _, columns = linear_sum_assignment(np.concatenate([cost.T, np.full((size, slots), new)], 1))
    return np.where(columns < num_atoms, columns, NEW)


@dataclass
class _Problem:
    cost: list[np.ndarray]
    penalty: np.ndarray
    opening: np.ndarray
    new_atoms: bool

    @classmethod
    def of(
        cls, cost: Sequence[Tensor], penalty: Tensor, opening: Tensor | None, new_atoms: bool
    ) -> _Problem:
        arrays = [_array(c) for c in cost]
        if opening is None:
            opening = torch.zeros(cost[0].shape[:1] if len(cost) else 0, dtype=torch.float64)
        return cls(arrays, _array(penalty), _array(opening), new_atoms)

    def popularity(self, atoms: _Atoms) -> np.ndarray:
        m = np.zeros(len(self.opening), dtype=np.int64)
        for a in atoms:
            m[a[a != NEW]] += 1
        return m

    def objective(self, atoms: _Atoms) -> float:
        total = 0.0
        for c, a in zip(self.cost, atoms, strict=True):
            standing = np.flatnonzero(a != NEW)
            total += c[a[standing], standing].sum() + self.penalty[1] * (len(a) - len(standing))
        m = self.popularity(atoms)
        return float(total + self.penalty[m].sum() + self.opening[m > 0].sum())

    def visit(self, s: int, m: np.ndarray) -> np.ndarray:
        """The best assignment of party ``s`` given popularities ``m`` among the others."""
        join = self.penalty[m + 1] - self.penalty[m] + np.where(m == 0, self.opening, 0.0)
        room = None if self.new_atoms else 0
        try:
            return _solve(self.cost[s] + join[:, None], self.penalty[1], room)
        except ValueError as e:
            raise ParameterError(f"party {s}: every assignment has infinite cost") from e

    def descend(
        self, start: _Atoms, order: np.ndarray, max_sweeps: int
    ) -> tuple[_Atoms, float, int, bool]:
        atoms = [a.copy() for a in start]
        m = self.popularity(atoms)
        converged, sweep = False, 0
        while not converged and sweep < max_sweeps:
            converged, sweep = True, sweep + 1
            for s in order:
                old = atoms[s]
                m[old[old != NEW]] -= 1
                new = self.visit(s, m)
                m_old = self.value(s, old, m)
                # Ties are broken in favour of what stands, so that sweeps come to an end.
                if self.value(s, new, m) < m_old - 1e-12 * abs(m_old):
                    atoms[s], converged = new, False
                kept = atoms[s]
                m[kept[kept != NEW]] += 1
        return atoms, self.objective(atoms), sweep, converged

    def value(self, s: int, a: np.ndarray, m: np.ndarray) -> float:
        """What party ``s`` adds to F with assignment ``a``."""
        standing = np.flatnonzero(a != NEW)
        k = a[standing]
        join = self.penalty[m[k] + 1] - self.penalty[m[k]] + np.where(m[k] == 0, self.opening[k], 0)
        new = self.penalty[1] * (len(a) - len(standing))
        return float(self.cost[s][k, standing].sum() + join.sum() + new)


def _first(problem: _Problem) -> _Atoms:
    if problem.new_atoms:
        return [np.full(c.shape[1], NEW) for c in problem.cost]
    return [_solve(c, 0.0, 0) for c in problem.cost]


def _random(problem: _Problem, rng: np.random.Generator) -> _Atoms:
    atoms = []
    for c in problem.cost:
        num_atoms, size = c.shape
        slots = num_atoms + size if problem.new_atoms else num_atoms
        a = rng.permutation(slots)[:size]
        atoms.append(np.where(a < num_atoms, a, NEW))
    return atoms
