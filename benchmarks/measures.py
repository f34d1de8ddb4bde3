# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""How good a fusion is: who is who, how many atoms there are, and how far from the true ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from mixtures import Array
from numpy.typing import NDArray
from problems import Problem
from scipy import sparse
from scipy.optimize import linear_sum_assignment, linprog
from scipy.spatial.distance import cdist
from sklearn.metrics import adjusted_rand_score


class Score(NamedTuple):
    """The scores of one row in one problem; NaN where there is none.

    :ivar excess: K less the true number.
    :ivar hausdorff: distance between the atoms' means and the true ones.
    :ivar transport: 1-Wasserstein distance between uniform measures on them.
    :ivar seconds: how long it took.
    :ivar ratio: Hausdorff over that of the average of the true matches.
    :ivar components: the adjusted Rand index of the assignment, against the components' true atoms.
    :ivar points: the same of all points, each put where its component by its party's fit is.
    """

    excess: float
    hausdorff: float
    transport: float
    seconds: float = np.nan
    ratio: float = np.nan
    components: float = np.nan
    points: float = np.nan


@dataclass(frozen=True)
class Found:
    """Atoms, and who has which.

    :ivar atoms: their means, ``[K, D]``.
    :ivar assignment: the atom of each component, ``[N]``.
    :ivar matches: the true atom of each component, where they are not the problem's.
    :ivar members: the component of each point, where they are not the problem's.
    """

    atoms: Array
    assignment: NDArray[np.intp]
    matches: NDArray[np.intp] | None = None
    members: NDArray[np.intp] | None = None


def score(problem: Problem, atoms: Array, seconds: float = np.nan) -> Score:
    """The score of atoms alone."""
    far = hausdorff(atoms, problem.truth)
    matched = problem.matched
    ratio = np.nan if matched is None else far / hausdorff(matched, problem.truth)
    excess = len(atoms) - len(problem.truth)
    return Score(excess, far, transport(atoms, problem.truth), seconds, ratio)


def score_found(problem: Problem, found: Found, seconds: float = np.nan) -> Score:
    """The score of atoms and of who has which."""
    matches = problem.matches if found.matches is None else found.matches
    members = problem.members if found.members is None else found.members
    labels = problem.drawn.true_labels
    return score(problem, found.atoms, seconds)._replace(
        components=adjusted_rand_score(matches, found.assignment),
        points=adjusted_rand_score(labels, found.assignment[members]),
    )


def hausdorff(x: Array, y: Array) -> float:
    """The Hausdorff distance between sets of points."""
    distance = cdist(x, y)
    return float(max(distance.min(0).max(), distance.min(1).max()))


def transport(x: Array, y: Array) -> float:
    """The 1-Wasserstein distance between uniform measures on ``x`` and ``y``, exact."""
    distance = cdist(x, y)
    n, m = distance.shape
    if n == m:
        return float(distance[linear_sum_assignment(distance)].mean())
    rows = sparse.kron(sparse.eye(n), np.ones((1, m)))
    columns = sparse.kron(np.ones((1, n)), sparse.eye(m))
    marginals = np.repeat([1 / n, 1 / m], [n, m])
    plan = linprog(distance.ravel(), A_eq=sparse.vstack([rows, columns]).tocsr(), b_eq=marginals)
    return float(plan.fun)
