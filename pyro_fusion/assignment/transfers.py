# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Moves of several parties at once, for the coordinate solver where no party alone can improve."""

from __future__ import annotations

import numpy as np

from pyro_fusion.assignment.descent import EPS, MAX_NUMBERS, Descent
from pyro_fusion.assignment.problem import NEW

__all__ = ["transfer"]


def transfer(d: Descent, atoms: np.ndarray, m: np.ndarray) -> bool:
    """Transfer several parties' components from one atom to another where that lowers F, the
    best transfers first and each atom in one of them; True if there was any.

    For each pair of atoms, the parties that have the first and not the second are sorted by
    the gain of their transfer; the best number of them is then read off.
    """
    standing = np.flatnonzero(atoms != NEW)
    standing = standing[np.argsort(atoms[standing], kind="stable")]
    sources, first = np.unique(atoms[standing], return_index=True)
    if len(sources) == 0:
        return False
    has = np.zeros((d.problem.num_parties, len(m)), dtype=bool)
    has[d.party[standing], atoms[standing]] = True
    factors = np.broadcast_to(d.factors(m), m.shape)
    last = len(d.penalty) - 1
    # The most that leaving an atom can gain, and the least that joining one can cost.
    least = np.minimum.accumulate(d.penalty)[m - 1]
    leave = factors * (d.penalty[m] - least) + np.maximum(d.opening, 0.0)
    least = np.minimum.accumulate(d.penalty[::-1])[::-1][np.minimum(m + 1, last)]
    join = factors * (least - d.penalty[m]) + np.where(m == 0, d.opening, 0.0)
    worth = EPS * (1 + abs(d.objective(atoms, m)))
    ends = np.append(first[1:], len(standing))
    found = []
    i = 0
    while i < len(sources):
        room = first[i] + MAX_NUMBERS // len(m)
        j = max(i + 1, int(np.searchsorted(ends, room, "right")))
        gains = _gains(d, standing[first[i] : ends[j - 1]], atoms, has)
        at = first[i:j] - first[i]
        bound = np.minimum(np.maximum.reduceat(gains, at), 0.0) + leave[sources[i:j], None]
        bound += np.add.reduceat(np.maximum(gains, 0.0), at) - join
        for r in np.flatnonzero((bound > worth).any(1)):
            own = gains[at[r] : ends[i + r] - first[i]]
            to = np.flatnonzero(bound[r] > worth)
            found.append(_best(d, sources[i + r], to, own[:, to], m, factors))
        i = j
    moved = np.zeros(len(m), dtype=bool)
    for change, a, b, count in sorted(found):
        if change >= -worth:
            break
        if moved[a] or moved[b]:
            continue
        members = np.flatnonzero(atoms == a)
        gains = _gains(d, members, atoms, has)[:, b]
        atoms[members[np.argsort(-gains, kind="stable")[:count]]] = b
        m[a] -= count
        m[b] += count
        moved[a] = moved[b] = True
    return bool(moved.any())


def _gains(d: Descent, members: np.ndarray, atoms: np.ndarray, has: np.ndarray) -> np.ndarray:
    """The saving of each of these components in each other atom, ``[n, K]``; ``-inf`` where its
    party has that atom already."""
    there = d.cost[members]
    here = d.cost[members, atoms[members]]
    forbidden = has[d.party[members]] | np.isinf(there) | np.isinf(here)[:, None]
    there[forbidden] = 0.0
    np.subtract(np.where(np.isinf(here), 0.0, here)[:, None], there, out=there)
    there[forbidden] = -np.inf
    return there


def _best(
    d: Descent, a: int, to: np.ndarray, gains: np.ndarray, m: np.ndarray, factors: np.ndarray
) -> tuple[float, int, int, int]:
    """The best transfer from atom ``a`` to one of ``to``, where it saves its members ``gains``:
    the change of F, the two atoms, and how many members move."""
    gains = np.sort(-gains, 0).cumsum(0)
    count = np.arange(1, len(gains) + 1)
    left = factors[a] * (d.penalty[m[a] - count] - d.penalty[m[a]])
    left[-1] -= d.opening[a]
    more = d.penalty[np.minimum(m[to] + count[:, None], len(d.penalty) - 1)]
    more = factors[to] * (more - d.penalty[m[to]]) + np.where(m[to] == 0, d.opening[to], 0)
    change = gains + left[:, None] + more
    i, j = np.unravel_index(change.argmin(), change.shape)
    return float(change[i, j]), int(a), int(to[j]), int(i) + 1
