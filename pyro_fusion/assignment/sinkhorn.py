# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The entropic solver: all parties at once on the costs' device, soft assignments at a temperature,
and annealing. Nothing here loops over parties, atoms or components but the rounding at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from pyro_fusion.assignment.coordinate import coordinate, match
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.assignment.problem import Assignment, AssignmentProblem, check_least
from pyro_fusion.assignment.scaling import Scaled, Scaling
from pyro_fusion.errors import ParameterError

__all__ = ["SoftAssignment", "sinkhorn", "soft_assignment"]

# Annealing ends when, on average, so little of a component is outside its most probable atom, or at
# so small a fraction of the first temperature.
_INTEGRAL = 1e-3
_COLDEST = 1e-5

# The tolerance of rows and prices at all temperatures but the last.
_ROUGHLY = 0.1

# The temperature from which multipliers follow prices, over the change of the prices.
_FOLLOW = 0.25

# Rows sum to at most 1 and this, whatever the tolerance.
_FEASIBLE = 1e-3

# A median needs no more numbers than this, about.
_MAX_NUMBERS = 1 << 20


@dataclass(frozen=True)
class SoftAssignment:
    """The result of :func:`soft_assignment`.

    :ivar soft: ``P``, ``[K, N]``; what a column lacks to 1 is a new atom's.
    :ivar dual: the multipliers of the row constraints, ``[S, K]``, never positive.
    :ivar price: of joining each atom for each party, ``[S, K]``.
    :ivar new: of new atoms, ``[]`` or ``[N]``.
    :ivar heat: the temperature at which each party's multipliers are right, ``[S, 1]``.
    :ivar iterations: of Sinkhorn and Newton.
    :ivar converged: whether rows and prices stand still up to the tolerance.
    """

    soft: Tensor
    dual: Tensor
    price: Tensor
    new: Tensor
    heat: Tensor
    iterations: int
    converged: bool


def sinkhorn(
    cost: Sequence[Tensor] | AssignmentProblem,
    assignment_prior: AssignmentPrior,
    *,
    opening: Tensor | None = None,
    start: Sequence[Tensor] | None = None,
    temperature: float | None = None,
    annealing: float = 0.5,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
) -> Assignment:
    """Soft assignments at falling temperatures, each rounded by an exact linear assignment per
    party; the best of them, polished by :func:`coordinate`. ``soft`` is that of the last
    temperature.

    :param cost: per party ``[K, L_s]``; ``inf`` forbids a pair. Or a checked problem, which has its
        own opening costs.
    :param assignment_prior: if it fixes the number of atoms, they are the ``K`` of ``cost``.
    :param opening: cost of using an atom at all, ``[K]``; zero by default.
    :param start: an assignment whose popularities set the first prices; the result is no worse. By
        default all atoms are priced alike, by the convex envelope of ``φ``.
    :param temperature: a single temperature, in the units of the costs. By default they fall from
        the median of an atom's extra cost over the cheapest to where the assignment is all but
        integral.
    :param annealing: the factor from one temperature to the next, between 0 and 1.
    :param tolerance: of :func:`soft_assignment` at the last temperature.
    :param max_iterations: of :func:`soft_assignment` at each temperature.
    :raises StructureError: if shapes do not fit, or a party has more components than there are
        atoms while their number is fixed.
    :raises ParameterError: as for :func:`coordinate`.

    Source: as for :func:`soft_assignment`; annealing after Rose, *Deterministic Annealing for
    Clustering, Compression, Classification, Regression, and Related Optimization Problems* (Proc.
    IEEE 1998).
    """
    problem = AssignmentProblem.of(cost, assignment_prior, opening)
    if not 0 < annealing < 1:
        raise ParameterError(f"annealing must be between 0 and 1, got {annealing}")
    check_least(0, tolerance=tolerance)
    check_least(1, max_iterations=max_iterations)
    state, candidates, iterations = None, [], 0
    if start is not None:
        candidates.append(problem.join(start))
        state = _hard(problem, candidates[0])
    if temperature is None:
        temperature = first = _scale(problem)
        while True:
            state = soft_assignment(
                problem, temperature, state, tolerance=_ROUGHLY, max_iterations=max_iterations
            )
            iterations += state.iterations
            soft = state.soft.cpu()
            if _is_integral(soft) or temperature <= _COLDEST * first:
                break
            candidates.append(_round(problem, soft))
            temperature *= annealing
    state = soft_assignment(
        problem, temperature, state, tolerance=tolerance, max_iterations=max_iterations
    )
    candidates.append(_round(problem, state.soft.cpu()))
    best = min(candidates, key=problem.objective)
    polished = coordinate(problem, assignment_prior, start=problem.split(best))
    return Assignment(
        atoms=polished.atoms,
        objective=polished.objective,
        iterations=iterations + state.iterations,
        converged=state.converged and polished.converged,
        soft=problem.split(state.soft),
    )


def soft_assignment(
    problem: AssignmentProblem,
    temperature: float,
    start: SoftAssignment | None = None,
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 1000,
) -> SoftAssignment:
    r"""The mean-field assignment at temperature ``ε``: for each party the entropic programme

    .. math:: \min_P \sum_{kl} P_{kl} (C_{kl} + c_k + \varepsilon \log P_{kl})
        + \sum_l u_l (\varphi(1) + \varepsilon \log u_l), \quad
        \sum_k P_{kl} + u_l = 1, \quad \sum_l P_{kl} \le 1

    at prices ``c_k`` that depend on the other parties: the expected cost of joining atom ``k``,
    ``φ(m + 1) - φ(m)`` at their popularity ``m``, interpolated between integers. ``u`` are new
    atoms, and the inequality lets a party lack an atom.

    Given prices, rows and columns are scaled until the rows hold, all parties at once
    (``scaling.Scaling``). Then prices move half the way to those that the new assignment implies,
    less where they overshoot, since all parties react at once, and more where they do not; and so
    on. At the end the part of a row beyond 1 goes to new atoms; or if there are none, and rows do
    not hold yet, the party is mixed with its rounded assignment. So ``soft`` is always feasible.

    :param temperature: ``ε``, positive, in the units of the costs.
    :param start: a result to go on from, at this or another temperature and other costs.
    :param tolerance: when converged, multipliers and prices are right up to ``tolerance`` times
        ``ε``. Columns are exact, and rows sum to at most 1, or without new atoms 1.001, always.
    :param max_iterations: limit on the scalings.
    :raises ParameterError: for settings out of range, or if every assignment is forbidden.

    Source: Cuturi, *Sinkhorn Distances* (NeurIPS 2013); Peyré & Cuturi, *Computational Optimal
    Transport* (2019), sec. 4.4, for the log domain; Chizat et al., *Scaling Algorithms for
    Unbalanced Optimal Transport Problems* (Math. Comp. 2018), for inequalities.
    """
    if not 0 < temperature < math.inf:
        raise ParameterError(f"temperature must be positive and finite, got {temperature}")
    check_least(0, tolerance=tolerance)
    check_least(1, max_iterations=max_iterations)
    cost, num_atoms = problem.cost, problem.num_atoms
    tiny = torch.finfo(cost.dtype).tiny
    temperature = max(temperature, tiny**0.5)  # colder, costs over it overflow
    scaling = Scaling(problem.sizes, num_atoms, cost.device)
    slack = int(problem.new_atoms)
    costs = pad(cost.T, (0, slack))  # [N, K + 1]: a new atom is one more
    if start is None:
        start = _first(problem)
    dual, price, new = start.dual, start.price, start.new
    heat = start.heat.clamp(min=temperature)
    # Without new atoms a row's excess has nowhere to go.
    accuracy = tolerance if slack else min(tolerance, _FEASIBLE)
    part, last = torch.full_like(price, 0.5), torch.zeros_like(price)
    converged, iteration = False, 0
    while True:
        if slack:
            costs[:, -1] = new
        room = max_iterations - iteration
        result = scaling.solve(costs, price, dual, heat, temperature, accuracy, room)
        iteration, dual = iteration + result.iterations, result.dual
        target, new = _prices(problem, result.p, result.rows)
        off = target - price
        converged = result.converged and bool((off.abs() <= tolerance * temperature).all())
        if converged or iteration >= max_iterations:
            soft = _feasible(problem, scaling, result)
            return SoftAssignment(
                soft=soft,
                dual=dual,
                price=price,
                new=new,
                heat=result.heat,
                iterations=iteration,
                converged=converged,
            )
        part = torch.where(off * last < 0, part / 2, (1.5 * part).clamp_(max=1))
        last, before = off, price
        price = price.lerp(target, part)
        # The furthest that the multipliers of rows may have to follow.
        moved = (price - before).abs_().amax(1, keepdim=True)
        heat = (_FOLLOW * moved).clamp_(min=temperature)


def _first(problem: AssignmentProblem) -> SoftAssignment:
    """The first soft assignment, when nothing is known: its prices are the chord of φ, its convex
    envelope, where the best assignment depends on no start."""
    cost, num_parties = problem.cost, problem.num_parties
    price = ((problem.penalty[-1] + problem.opening) / num_parties).to(cost, non_blocking=True)
    price = price.expand(num_parties, -1)
    heat = cost.new_full((num_parties, 1), _scale(problem))
    new = problem.penalty[1].to(cost, non_blocking=True)
    return SoftAssignment(
        soft=cost,
        dual=torch.zeros_like(price),
        price=price,
        new=new,
        heat=heat,
        iterations=0,
        converged=False,
    )


def _feasible(problem: AssignmentProblem, scaling: Scaling, result: Scaled) -> Tensor:
    """``P``, ``[K, N]``, with rows that sum to at most 1."""
    soft = result.p[:, : problem.num_atoms].T
    if problem.new_atoms:
        return soft / result.rows.clamp(min=1).T.index_select(1, scaling.party)
    excess = result.rows.amax(1) - 1
    if not bool((excess > _FEASIBLE).any()):
        return soft
    part = (_FEASIBLE / excess.clamp(min=_FEASIBLE)).index_select(0, scaling.party)
    return _one_hot(problem, _round(problem, soft.cpu())).lerp(soft, part)


def _prices(problem: AssignmentProblem, p: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Prices of joining each atom for each party, ``[S, K]``, and of new atoms, ``[]`` or ``[N]``.

    :param p: the columns, ``[N, K]`` or, with new atoms, ``[N, K + 1]``.
    :param rows: their sums per party.
    """
    num_atoms = problem.num_atoms
    # Before the rows hold, a party may claim an atom more than once; it counts as one.
    own = rows[:, :num_atoms].clamp(max=1)
    m = own.sum(0)
    others = (m - own).clamp_(0, problem.num_parties - 1)
    step = problem.penalty.diff().to(own, non_blocking=True)
    low = others.floor()
    price = step[low.long()].lerp(step[others.ceil().long()], others - low)
    new = problem.penalty[1].to(own, non_blocking=True)
    if bool((problem.weights != 1).any()):
        factor = _rank_weights(problem, torch.cat([m, p[:, num_atoms:].flatten()]))
        price, new = price * factor[:num_atoms], new * factor[num_atoms:]
    price += problem.opening.to(own, non_blocking=True) * (1 - others).clamp_(min=0)
    return price, new


def _rank_weights(problem: AssignmentProblem, m: Tensor) -> Tensor:
    """The weight of each atom, also of new ones, by the number of more popular ones; an atom of
    popularity ``m < 1`` counts as the part ``m`` of one."""
    order = m.argsort(descending=True, stable=True)
    there = m[order].clamp(max=1)
    rank = (there.cumsum(0) - there).round().long()
    return torch.empty_like(m).index_copy_(0, order, problem.weights.to(m, non_blocking=True)[rank])


def _hard(problem: AssignmentProblem, atoms: Tensor) -> SoftAssignment:
    """The start that an assignment ``[N]`` gives: itself and its prices."""
    result, soft = _first(problem), _one_hot(problem, atoms)
    p = torch.cat([soft, 1 - soft.sum(0, keepdim=True)]) if problem.new_atoms else soft
    scaling = Scaling(problem.sizes, problem.num_atoms, soft.device)
    price, new = _prices(problem, p.T, scaling.sums(p.T))
    return replace(result, soft=soft, price=price, new=new)


def _one_hot(problem: AssignmentProblem, atoms: Tensor) -> Tensor:
    """An assignment ``[N]`` as a matrix of zeros and ones, ``[K, N]``."""
    atoms = atoms.to(problem.cost.device, non_blocking=True)
    soft = one_hot(atoms + 1, problem.num_atoms + 1)[:, 1:].T
    return soft.to(problem.cost)


def _scale(problem: AssignmentProblem) -> float:
    """The median of an atom's extra cost over the component's cheapest, or a new, atom; 1 if no
    atom costs more."""
    cost = problem.cost[:, :: 1 + problem.cost.numel() // _MAX_NUMBERS]
    cheapest = cost.amin(0)
    if problem.new_atoms:
        cheapest = cheapest.clamp(max=float(problem.penalty[1]))
    more = (cost - cheapest).flatten()
    more = more[more.isfinite() & (more > 0)]
    return float(more.median()) if len(more) else 1.0


def _is_integral(soft: Tensor) -> bool:
    elsewhere = torch.minimum(1 - soft.amax(0), soft.sum(0))
    return bool(elsewhere.mean() <= _INTEGRAL)


def _round(problem: AssignmentProblem, soft: Tensor) -> Tensor:
    """The assignment ``[N]`` that agrees most with ``soft``, on the CPU, party by party."""
    value = -soft
    if problem.new_atoms:
        value += 1 - soft.sum(0)  # against that of a new atom
    value = torch.where(problem.host_cost.isfinite(), value, torch.inf)
    room = None if problem.new_atoms else 0
    atoms = []
    for s, v in enumerate(problem.split(value)):
        try:
            atoms.append(match(v, 0.0, room))
        except ValueError as e:
            raise ParameterError("every assignment has infinite cost", party=s) from e
    return torch.cat(atoms)
