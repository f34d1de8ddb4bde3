# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The state of a coordinate descent on an assignment: who has what, prices, and the objective."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from pyro_fusion.assignment.problem import NEW, AssignmentProblem
from pyro_fusion.errors import ParameterError

__all__ = ["EPS", "MAX_NUMBERS", "Descent", "solve"]

# A change below rounding is no improvement, so that sweeps come to an end.
EPS = 1e-12


# Costs are read in blocks of so many numbers, which fit a cache.
MAX_NUMBERS = 1 << 16


@dataclass
class Descent:
    """A problem as numpy arrays; an assignment is an array ``[N]``, ``m`` its popularities.

    Ranks are kept fixed while a party or a move is decided. F is no higher than with any other
    order of the ranks, so an improvement with the present order lowers F.
    """

    problem: AssignmentProblem
    cost: np.ndarray  # [N, K]: a party is a block of rows
    ends: list[int]
    party: np.ndarray  # [N]
    penalty: np.ndarray
    step: np.ndarray  # φ(m + 1) - φ(m), and zero where all have the atom
    weights: np.ndarray
    ranked: bool
    opening: np.ndarray
    opens: bool  # whether opening costs anything
    free: bool  # whether parties do not interact

    @classmethod
    def of(cls, problem: AssignmentProblem) -> Descent:
        cost = problem.host_cost.double().T.contiguous().numpy()
        sizes = np.array(problem.sizes)
        penalty, weights = problem.penalty.numpy(), problem.weights.numpy()
        opening = problem.opening.numpy()
        return cls(
            problem,
            cost,
            [0, *np.cumsum(sizes).tolist()],
            np.repeat(np.arange(len(sizes)), sizes),
            penalty,
            np.append(np.diff(penalty), 0.0),
            weights,
            bool((weights != 1).any()),
            opening,
            bool(opening.any()),
            not penalty.any() and not opening.any(),
        )

    # -- starts ------------------------------------------------------------------------------------

    def order(self) -> np.ndarray:
        """The parties, those that fit best first, independently of the order they are given in."""
        best = self.cost.min(1)
        return np.argsort(np.bincount(self.party, best, self.problem.num_parties), kind="stable")

    def first(self) -> np.ndarray:
        """The first assignment: each party by itself, where joining an atom costs each the average
        of what it costs if all parties join."""
        chord = (self.penalty[-1] + self.opening) / self.problem.num_parties
        return self.alone(np.arange(self.problem.num_parties), chord, self.penalty[1])

    def alone(self, parties: np.ndarray, price: np.ndarray, new: float) -> np.ndarray:
        """The best assignments of some parties, given in rising order, if joining an atom has one
        price for all: ``[N']``, side by side."""
        from scipy.optimize import linear_sum_assignment  # slow to import: only when needed

        sizes = np.diff(self.ends)[parties]
        chosen = np.zeros(self.problem.num_parties, dtype=bool)
        chosen[parties] = True
        rows = np.flatnonzero(chosen[self.party])
        ends = np.append(0, sizes.cumsum())
        result = np.full(len(rows), NEW)
        part = max(1, MAX_NUMBERS // len(price))
        i = 0
        while i < len(parties):
            j = max(i + 1, int(np.searchsorted(ends, ends[i] + part, "right")) - 1)
            start, *_ = bounds = ends[i : j + 1].tolist()
            cost = self.cost[rows[start : bounds[-1]]]
            cost += price
            if self.problem.new_atoms:
                np.minimum(cost, new, out=cost)
            for s, (a, b) in enumerate(pairwise(bounds), i):
                try:
                    n, k = linear_sum_assignment(cost[a - start : b - start])
                except ValueError as e:
                    raise ParameterError(
                        "every assignment has infinite cost", party=parties[s]
                    ) from e
                result[a + n] = k
            i = j
        if self.problem.new_atoms:
            dear = self.cost[rows, result] + price[result] >= new
            result[dear] = NEW
        return result

    def random(self, rng: np.random.Generator) -> np.ndarray:
        atoms = []
        num_atoms = self.cost.shape[1]
        for size in self.problem.sizes:
            slots = num_atoms + size if self.problem.new_atoms else num_atoms
            a = rng.permutation(slots)[:size]
            atoms.append(np.where(a < num_atoms, a, NEW))
        return np.concatenate(atoms)

    # -- prices and parties ------------------------------------------------------------------------

    def factors(self, m: np.ndarray, spare: int = 0) -> np.ndarray | float:
        """The weight of each atom's rank, ``[K]``. New atoms, and ``spare`` further ones, rank
        before atoms that nobody has."""
        if not self.ranked:
            return 1.0
        order, used, lone = np.argsort(-m, kind="stable"), *self.counts(m)
        result = np.empty(len(m))
        result[order[:used]] = self.weights[:used]
        result[order[used:]] = self.weights[used + lone + spare :][: len(m) - used]
        return result

    def counts(self, m: np.ndarray) -> tuple[int, int]:
        """The number of standing atoms in use, and the number of new ones."""
        return int((m > 0).sum()), len(self.cost) - int(m.sum())

    def prices(self, m: np.ndarray, spare: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The price of joining each atom, and the price that a party pays which has it: ``[K]``
        each."""
        join, own = self.step[m], self.step[m - 1]
        if self.ranked:
            factors = self.factors(m, spare)
            join, own = factors * join, factors * own
        if self.opens:
            join = join + np.where(m == 0, self.opening, 0.0)
            own = own + np.where(m == 1, self.opening, 0.0)
        return join, own

    def unstable(self, atoms: np.ndarray, m: np.ndarray) -> np.ndarray:
        """The parties that might gain from another assignment, in order. The others need no linear
        assignment, since each of their components already has its cheapest atom."""
        count, last = self.problem.num_parties, sum(self.counts(m))
        standing = np.flatnonzero(atoms != NEW)
        k, party = atoms[standing], self.party[standing]
        join, own = self.prices(m)
        price = np.tile(join, (count, 1))
        price[party, k] = own[k]
        now = np.bincount(party, self.cost[standing, k] + own[k], count)
        new = np.full(count, np.inf)
        if self.problem.new_atoms:
            first = last - np.bincount(self.party[atoms == NEW], minlength=count)
            total = np.append(0.0, self.weights[:last].cumsum())
            now = now + self.penalty[1] * (total[last] - total[first])
            new = self.penalty[1] * self.weights[first]
        best = np.empty(len(atoms))
        part = max(1, MAX_NUMBERS // len(m))
        for i in range(0, len(atoms), part):
            rows = slice(i, i + part)
            there = price[self.party[rows]]
            there += self.cost[rows]
            best[rows] = there.min(1)
        least = np.bincount(self.party, np.minimum(best, new[self.party]), count)
        return _improves(least, now)

    def visit_together(self, parties: np.ndarray, atoms: np.ndarray, m: np.ndarray) -> bool:
        """Give all these parties their best assignments at the present prices; True if F fell.

        φ is concave, so it is nowhere above a line at prices between those of one party more and
        less: F falls with what they pay, but parties that pay different prices may go further.
        """
        if len(parties) == 0:
            return False
        join, own = self.prices(m)
        price = np.where(
            m == 0, join, np.where(m == self.problem.num_parties, own, (join + own) / 2)
        )
        new = self.penalty[1] * self.weights[sum(self.counts(m))]
        rows = np.zeros(self.problem.num_parties, dtype=bool)
        rows[parties] = True
        rows = rows[self.party]
        proposal = atoms.copy()
        proposal[rows] = self.alone(parties, price, new)
        popularity = np.bincount(proposal[proposal != NEW], minlength=len(m))
        improved = bool(_improves(self.objective(proposal, popularity), self.objective(atoms, m)))
        if improved:
            atoms[:], m[:] = proposal, popularity
        return improved

    def objective(self, atoms: np.ndarray, m: np.ndarray) -> float:
        standing = np.flatnonzero(atoms != NEW)
        used, lone = self.counts(m)
        ranks = np.sort(m)[::-1][:used]
        total = self.cost[standing, atoms[standing]].sum() + self.opening[m > 0].sum()
        total += self.weights[:used] @ self.penalty[ranks]
        return float(total + self.penalty[1] * self.weights[used : used + lone].sum())

    def visit(self, s: int, atoms: np.ndarray, m: np.ndarray) -> bool:
        """Give party ``s`` its best assignment given the others; True if that changed it."""
        part = slice(self.ends[s], self.ends[s + 1])
        old = atoms[part]
        standing = (old != NEW).nonzero()[0]
        k, size = old[standing], len(old)
        join, own = self.prices(m, len(standing))
        join[k] = own[k]
        new = np.empty(0)
        if self.problem.new_atoms:
            # Its new atoms rank after those of the others.
            first = sum(self.counts(m)) - size + len(k) if self.ranked else 0
            new = self.penalty[1] * self.weights[first : first + size]
        cost = self.cost[part] + join
        before = cost[standing, k].sum() + new[: size - len(k)].sum()
        taken, chosen = solve(cost, new)
        after = cost[taken, chosen].sum() + new[: size - len(chosen)].sum()
        improved = bool(_improves(after, before))
        if improved:
            m[k] -= 1
            old[:] = NEW
            old[taken] = chosen
            m[chosen] += 1
        return improved


def _improves(after: Any, before: Any) -> Any:
    """True where ``after`` is below ``before`` by more than rounding; elementwise."""
    return (after < before) & (after + EPS * np.abs(after) < before)


def solve(cost: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The linear assignment of components to atoms at costs ``[L, K]``, or to new atoms at the
    prices ``new``, which never fall: the rows that get a standing atom, and which.

    :raises ValueError: if every assignment has infinite cost.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import: only when needed

    size, num_atoms = cost.shape
    if len(new) < max(size, 1) or new[0] != new[-1]:
        slots = np.broadcast_to(new, (size, len(new)))
        rows, columns = linear_sum_assignment(np.concatenate([cost, slots], 1))
        standing = columns < num_atoms
    else:
        # With room for all at one price, a component whose pair costs more gets a new atom.
        rows, columns = linear_sum_assignment(np.minimum(cost, new[0]))
        standing = cost[rows, columns] < new[0]
    return rows[standing], columns[standing]
