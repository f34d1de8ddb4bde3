# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The coordinate solver: one party at a time, exactly; and moves of many parties at once where that
is stuck. Numpy on the CPU, where linear assignment is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_fusion.assignment.base import NEW, Assignment, AssignmentProblem
from pyro_fusion.priors import AssignmentPrior

__all__ = ["coordinate", "match"]


def coordinate(
    cost: Sequence[Tensor],
    prior: AssignmentPrior,
    *,
    opening: Tensor | None = None,
    start: Sequence[Tensor] | None = None,
    moves: bool = True,
    restarts: int = 0,
    seed: int = 0,
    max_sweeps: int = 100,
) -> Assignment:
    """One party at a time, each an exact rectangular linear assignment given the others, until a
    sweep changes nothing. F never rises.

    :param cost: per party ``[K, L_s]``; ``inf`` forbids a pair.
    :param prior: of the assignment; with a fixed number of atoms they are the ``K`` given.
    :param opening: cost of using an atom at all, ``[K]``; zero by default.
    :param start: an assignment to start from; by default all components open new atoms, or, where
        that is not allowed, each party takes its cheapest atoms.
    :param moves: where no party alone can improve, let several move together from one atom to
        another (all of them: a merge; some, to an atom that nobody has: a split), and go on.
    :param restarts: further starts from random assignments, with the parties in random order.
    :param seed: of the random starts and orders.
    :param max_sweeps: limit on sweeps per start.
    :raises StructureError: if shapes do not fit, or a party has more components than there are
        atoms while their number is fixed.
    :raises ParameterError: if costs are NaN or ``-inf``, or if every assignment is forbidden.

    Source: Yurochkin et al., *Statistical Model Aggregation via Parameter Matching* (NeurIPS
    2019), alg. 1; exact linear assignment by ``scipy.optimize.linear_sum_assignment``.
    """
    problem = AssignmentProblem.of(cost, prior, opening)
    descent = _Descent.of(problem)
    rng = np.random.default_rng(seed)
    if start is None:
        first = descent.first()
    else:
        first = torch.cat([torch.as_tensor(a) for a in start]).numpy()
    order = np.arange(problem.num_parties)
    best = descent.run(first, order, moves, max_sweeps)
    for _ in range(restarts):
        order = rng.permutation(problem.num_parties)
        candidate = descent.run(descent.random(rng), order, moves, max_sweeps)
        if candidate[1] < best[1]:
            best = candidate
    atoms, objective, sweeps, converged = best
    return Assignment(problem.split(torch.as_tensor(atoms)), objective, sweeps, converged)


def match(cost: Tensor, new: float, room: int | None = None) -> Tensor:
    """One party: each component its cheapest atom, no atom twice, or a new one at cost ``new``.

    :param cost: ``[K, L]``.
    :param room: how many new atoms there may be; by default one for each component.
    :return: LongTensor ``[L]`` of atoms or :data:`NEW`; an exact linear assignment.
    """
    rows = cost.detach().cpu().double().numpy().T
    slots = len(rows) if room is None else min(len(rows), room)
    return torch.as_tensor(_solve(rows, np.full(slots, new)))


def _solve(cost: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Costs ``[L, K]`` and a price for each new atom there may be; ValueError if every assignment
    has infinite cost."""
    from scipy.optimize import linear_sum_assignment  # slow to import: only when needed

    size, num_atoms = cost.shape
    if len(new) == size <= num_atoms and (size == 0 or new[0] == new[-1]):
        # With room for all at one price, a pair that costs more than that is a new atom.
        _, columns = linear_sum_assignment(np.minimum(cost, new[0]) if size else cost)
        return np.where(cost[np.arange(size), columns] < new[:1], columns, NEW)
    slots = np.broadcast_to(new, (size, len(new)))
    _, columns = linear_sum_assignment(np.concatenate([cost, slots], 1))
    return np.where(columns < num_atoms, columns, NEW)


# Numbers at once in the search for moves: larger problems are searched in parts.
_MAX_NUMBERS = 1 << 22

# What is less than rounding is no improvement, so that sweeps come to an end.
_EPS = 1e-12


@dataclass
class _Descent:
    """A problem as numpy arrays; an assignment is an array ``[N]``, ``m`` its popularities."""

    problem: AssignmentProblem
    cost: np.ndarray  # [N, K]: a party is a block of rows
    ends: list[int]
    party: np.ndarray  # [N]
    penalty: np.ndarray
    step: np.ndarray  # φ(m + 1) - φ(m)
    weights: np.ndarray
    ranked: bool
    opening: np.ndarray

    @classmethod
    def of(cls, problem: AssignmentProblem) -> _Descent:
        cost = np.ascontiguousarray(problem.cost.cpu().double().numpy().T)
        sizes = np.array(problem.sizes)
        penalty, weights = problem.penalty.numpy(), problem.weights.numpy()
        return cls(
            problem,
            cost,
            [0, *np.cumsum(sizes).tolist()],
            np.repeat(np.arange(len(sizes)), sizes),
            penalty,
            np.append(np.diff(penalty), np.inf),
            weights,
            bool((weights != 1).any()),
            problem.opening.numpy(),
        )

    # -- starts ------------------------------------------------------------------------------------

    def first(self) -> np.ndarray:
        if self.problem.new_atoms:
            return np.full(len(self.cost), NEW)
        none = np.empty(0)
        blocks = zip(self.ends, self.ends[1:], strict=False)
        return np.concatenate([_solve(self.cost[i:j], none) for i, j in blocks])

    def random(self, rng: np.random.Generator) -> np.ndarray:
        atoms = []
        num_atoms = self.cost.shape[1]
        for size in self.problem.sizes:
            slots = num_atoms + size if self.problem.new_atoms else num_atoms
            a = rng.permutation(slots)[:size]
            atoms.append(np.where(a < num_atoms, a, NEW))
        return np.concatenate(atoms)

    # -- descent -----------------------------------------------------------------------------------

    def run(
        self, start: np.ndarray, order: np.ndarray, moves: bool, max_sweeps: int
    ) -> tuple[np.ndarray, float, int, bool]:
        atoms = start.copy()
        m = self.popularity(atoms)
        converged, sweep = False, 0
        while not converged and sweep < max_sweeps:
            sweep += 1
            unstable = self.unstable(atoms, m)
            changed = [self.visit(s, atoms, m) for s in order if unstable[s]]
            converged = not any(changed) and not (moves and self.move(atoms, m))
        return atoms, self.problem.objective(torch.as_tensor(atoms)), sweep, converged

    def popularity(self, atoms: np.ndarray) -> np.ndarray:
        return np.bincount(atoms[atoms != NEW], minlength=self.cost.shape[1])

    def factors(self, m: np.ndarray) -> np.ndarray | float:
        """The weight of each atom's rank: ``[K]``."""
        if not self.ranked:
            return 1.0
        result = np.empty(len(m))
        result[np.argsort(-m, kind="stable")] = self.weights[: len(m)]
        return result

    def prices(self, new_elsewhere: int, m: np.ndarray, size: int) -> np.ndarray:
        """Of the new atoms of one party, where those of others take the ranks before."""
        if not self.problem.new_atoms:
            return np.empty(0)
        if not self.ranked:
            return np.full(size, self.penalty[1])
        first = int((m > 0).sum()) + new_elsewhere
        return self.penalty[1] * self.weights[first : first + size]

    def unstable(self, atoms: np.ndarray, m: np.ndarray) -> np.ndarray:
        """Parties some component of which would rather be elsewhere: ``[S]``. The others need no
        linear assignment, since each of their components already has its cheapest atom."""
        count = self.problem.num_parties
        if self.ranked:
            return np.ones(count, dtype=bool)
        standing = np.flatnonzero(atoms != NEW)
        k = atoms[standing]
        open_at = np.where(m == 0, self.opening, 0.0)
        join = self.step[m] + open_at
        own = self.step[m - 1] + np.where(m == 1, self.opening, 0.0)
        now = np.full(len(atoms), self.penalty[1])
        now[standing] = self.cost[standing, k] + own[k]
        has = np.zeros((count, len(m)), dtype=bool)
        has[self.party[standing], k] = True
        best = (self.cost + np.where(has[self.party], own, join)).min(1)
        if self.problem.new_atoms:
            best = np.minimum(best, self.penalty[1])
        result = np.zeros(count, dtype=bool)
        result[self.party[best < now - _EPS * np.abs(now)]] = True
        return result

    def visit(self, s: int, atoms: np.ndarray, m: np.ndarray) -> bool:
        """Give party ``s`` its best assignment given the others; whether that changed it."""
        i, j = self.ends[s], self.ends[s + 1]
        old = atoms[i:j]
        standing = old != NEW
        factors = self.factors(m)
        k = old[standing]
        m[k] -= 1
        join = self.step[m] * factors
        join += np.where(m == 0, self.opening, 0.0)
        new_elsewhere = 0
        if self.ranked:
            new_elsewhere = int((atoms == NEW).sum() - (~standing).sum())
        prices = self.prices(new_elsewhere, m, j - i)
        cost = self.cost[i:j] + join
        new = _solve(cost, prices)
        before = cost[standing, k].sum() + prices[: (j - i) - len(k)].sum()
        taken = new != NEW
        chosen = new[taken]
        after = cost[taken, chosen].sum() + prices[: (j - i) - len(chosen)].sum()
        improved = bool(after < before - _EPS * abs(before))
        if improved:
            atoms[i:j] = new
            m[chosen] += 1
        else:
            m[k] += 1
        return improved

    # -- moves of several parties ------------------------------------------------------------------

    def move(self, atoms: np.ndarray, m: np.ndarray) -> bool:
        """The best transfer of several parties' components from one atom to another, if it lowers
        F; whether it did.

        For each pair of atoms, the parties that have the first and not the second are sorted by
        what the transfer gains; the best number of them is then read off.
        """
        num_parties, num_atoms = self.problem.num_parties, self.cost.shape[1]
        members = np.full((num_atoms, num_parties), -1)
        standing = np.flatnonzero(atoms != NEW)
        members[atoms[standing], self.party[standing]] = standing
        sources = np.flatnonzero(m > 0)
        part = max(1, _MAX_NUMBERS // max(1, num_atoms * num_parties))
        factors = np.broadcast_to(self.factors(m), (num_atoms,))
        best = (0.0, -1, -1, 0)
        if len(sources) == 0:
            return False
        for a in np.split(sources, range(part, len(sources), part)):
            best = min(best, self._transfer(a, members, m, factors), key=lambda b: b[0])
        change, source, b, count = best
        if not change < -_EPS * (1 + abs(self.problem.objective(torch.as_tensor(atoms)))):
            return False
        gains = self._gains(np.array([source]), members)[0, b]
        chosen = gains.argsort(kind="stable")[::-1][:count]
        atoms[members[source, chosen]] = b
        m[source] -= count
        m[b] += count
        return True

    def _gains(self, a: np.ndarray, members: np.ndarray) -> np.ndarray:
        """What the transfer of each party from atoms ``a`` to each other atom gains in cost:
        ``[A, K, S]``; ``-inf`` where there is none."""
        own = members[a]
        there = self.cost[own].transpose(0, 2, 1)
        here = self.cost[own, a[:, None]][:, None]
        allowed = (own >= 0)[:, None] & (members < 0) & np.isfinite(there)
        with np.errstate(invalid="ignore"):
            return np.where(allowed, here - there, -np.inf)

    def _transfer(
        self, a: np.ndarray, members: np.ndarray, m: np.ndarray, factors: np.ndarray
    ) -> tuple[float, int, int, int]:
        """The best from atoms ``a``: change of F, from, to, how many."""
        gains = np.sort(self._gains(a, members), -1)[..., ::-1].cumsum(-1)
        count = np.arange(1, gains.shape[-1] + 1)
        last = len(self.penalty) - 1
        left = self.penalty[np.maximum(m[a, None] - count, 0)] - self.penalty[m[a]][:, None]
        left = factors[a, None] * left - np.where(m[a, None] == count, self.opening[a, None], 0.0)
        more = self.penalty[np.minimum(m[:, None] + count, last)] - self.penalty[m][:, None]
        more = factors[:, None] * more + np.where(m == 0, self.opening, 0.0)[:, None]
        change = left[:, None] + more - gains
        change = np.where(np.isfinite(gains), change, np.inf)
        i, b, j = np.unravel_index(change.argmin(), change.shape)
        return float(change[i, b, j]), int(a[i]), int(b), int(j) + 1
