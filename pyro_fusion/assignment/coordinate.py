# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The coordinate solver: one party at a time, exactly; and moves of many parties at once where that
is stuck. In NumPy on the CPU, as linear assignment is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_fusion.assignment.descent import Descent, solve
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.assignment.problem import NEW, Assignment, AssignmentProblem, check_least
from pyro_fusion.assignment.transfers import transfer

__all__ = ["coordinate", "match"]


def coordinate(
    cost: Sequence[Tensor] | AssignmentProblem,
    assignment_prior: AssignmentPrior,
    *,
    opening: Tensor | None = None,
    start: Sequence[Tensor] | None = None,
    moves: bool = True,
    restarts: int = 0,
    seed: int = 0,
    max_sweeps: int = 100,
) -> Assignment:
    """Coordinate descent on F: one party at a time, each an exact rectangular linear assignment
    given the others, until a sweep changes nothing. F never rises.

    :param cost: per party ``[K, L_s]``; ``inf`` forbids a pair. Or a checked problem, which has its
        own opening costs.
    :param assignment_prior: if it fixes the number of atoms, they are the ``K`` of ``cost``.
    :param opening: cost of using an atom at all, ``[K]``; zero by default.
    :param start: an assignment to start from. By default each party takes its cheapest atoms, all
        priced alike by the convex envelope of ``φ``; and if that ends no better than an assignment
        of all components to new atoms, descent starts from this one too.
    :param moves: where no party alone can improve, let several move together from one atom to
        another (all of them: a merge; some, to an atom that nobody has: a split), and go on.
    :param restarts: further starts from random assignments, with the parties in random order.
    :param seed: of the random starts and orders.
    :param max_sweeps: limit on sweeps per start.
    :raises StructureError: if shapes do not fit, or a party has more components than there are
        atoms while their number is fixed.
    :raises ParameterError: as :meth:`AssignmentProblem.of` and, for ``start``,
        :meth:`AssignmentProblem.join`; for settings out of range; or if every assignment is
        forbidden.

    Source: Yurochkin et al., *Statistical Model Aggregation via Parameter Matching* (NeurIPS
    2019), alg. 1; exact linear assignment by ``scipy.optimize.linear_sum_assignment``.
    """
    problem = AssignmentProblem.of(cost, assignment_prior, opening)
    check_least(0, restarts=restarts, seed=seed, max_sweeps=max_sweeps)
    descent = Descent.of(problem)
    rng = np.random.default_rng(seed)
    order = descent.order()
    if start is not None:
        best = _descend(descent, problem.join(start).numpy(), order, moves, max_sweeps)
    else:
        best = _descend(descent, None, order, moves, max_sweeps)
        if problem.new_atoms:
            alone = torch.full((len(descent.cost),), NEW)
            if not best[1] < problem.objective(alone):
                other = _descend(descent, alone.numpy(), order, moves, max_sweeps)
                best = min(best, other, key=lambda b: b[1])
    for _ in range(restarts):
        shuffled = rng.permutation(order)
        candidate = _descend(descent, descent.random(rng), shuffled, moves, max_sweeps)
        if candidate[1] < best[1]:
            best = candidate
    atoms, objective, sweeps, converged = best
    return Assignment(
        atoms=problem.split(torch.as_tensor(atoms)),
        objective=objective,
        iterations=sweeps,
        converged=converged,
    )


def match(cost: Tensor, new: float, room: int | None = None) -> Tensor:
    """The cheapest assignment of one party's components, no atom twice, or new ones at cost
    ``new``; an exact linear assignment.

    :param cost: ``[K, L]``.
    :param room: the most new atoms that there may be; by default one for each component.
    :return: LongTensor ``[L]`` of atoms or :data:`NEW`.
    """
    rows = cost.detach().cpu().double().numpy().T
    slots = len(rows) if room is None else min(len(rows), room)
    result = np.full(len(rows), NEW)
    taken, chosen = solve(rows, np.full(slots, new))
    result[taken] = chosen
    return torch.as_tensor(result)


def _descend(
    d: Descent, start: np.ndarray | None, order: np.ndarray, moves: bool, max_sweeps: int
) -> tuple[np.ndarray, float, int, bool]:
    """Descend from ``start``, or else from a first sweep in which parties do not see each other."""
    atoms = d.first() if start is None else start.copy()
    m = np.bincount(atoms[atoms != NEW], minlength=d.cost.shape[1])
    sweep, together = int(start is None), True
    converged = d.free and start is None
    while not converged and sweep < max_sweeps:
        sweep += 1
        unstable = d.unstable(atoms, m)
        together = together and d.visit_together(np.flatnonzero(unstable), atoms, m)
        converged = d.free
        if together or converged:
            continue
        changed = [d.visit(s, atoms, m) for s in order[unstable[order]]]
        converged = not any(changed) and not (moves and transfer(d, atoms, m))
    return atoms, d.problem.objective(torch.as_tensor(atoms)), sweep, converged
