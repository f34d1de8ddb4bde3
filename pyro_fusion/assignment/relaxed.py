# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The relaxed solver: the convex group-norm programme with a certificate, then rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_fusion.assignment.coordinate import coordinate, match
from pyro_fusion.assignment.interior import Point, Programme, interior_point
from pyro_fusion.assignment.priors import AssignmentPrior, FixedAtoms, GroupNormPrior
from pyro_fusion.assignment.problem import (
    NEW,
    Assignment,
    AssignmentProblem,
    check_least,
    party_of,
    relative_gap,
)
from pyro_fusion.errors import ParameterError

__all__ = ["RelaxedAssignment", "relaxed"]


@dataclass(frozen=True)
class RelaxedAssignment(Assignment):
    """An assignment rounded from a relaxed one.

    :ivar relaxation: the convex objective of ``soft``.
    :ivar dual: no relaxed assignment has a lower convex objective.
    """

    relaxation: float = math.inf
    dual: float = -math.inf

    @property
    def duality_gap(self) -> float:
        """The most that ``soft`` can be above the convex optimum, relative to its objective."""
        return relative_gap(self.relaxation, self.dual)


def relaxed(
    cost: Sequence[Tensor] | AssignmentProblem,
    assignment_prior: AssignmentPrior,
    *,
    opening: Tensor | None = None,
    start: Sequence[Tensor] | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 200,
) -> RelaxedAssignment:
    r"""The best relaxed assignment, rounded to an assignment.

    .. math:: \min_P \sum_s \langle P_s, C_s \rangle + \lambda \sum_k w_k \lVert P_k \rVert_F
        + \lambda w' \sum_n u_n

    over :math:`P \ge 0` whose columns add up to :math:`1 - u_n \le 1` (``u`` is a new atom's) and
    whose rows add up to at most 1 within each party. With ``w = 1`` this is F where ``P`` is an
    assignment, so that no assignment has F below ``bound``: for multipliers ``y`` of the columns
    and ``z`` of the rows,

    .. math:: \sum_n y_n - \sum_{sk} z_{sk}, \qquad y \le \lambda w', \quad z \ge 0, \quad
        \lVert (y_n - z_{s(n)k} - C_{kn})_+ \rVert_F \le \lambda w_k \text{ for every } k.

    Entries that cost as much as a new atom are left out, and of large problems all but the most
    promising; the bound is of the whole problem, and brings back those that matter.

    :param cost: per party ``[K, L_s]``; ``inf`` forbids a pair. Or a checked problem, which has its
        own opening costs.
    :param assignment_prior: a ``GroupNormPrior``; or a ``FixedAtoms``, whose relaxation is exact.
    :param opening: None or zeros: an opening cost has no convex counterpart here.
    :param start: an assignment, for ``coordinate`` and for the ranks.
    :param tolerance: of the duality gap, relative to the objective, or to what a new atom costs
        where the objective is nearer to zero than that.
    :param max_iterations: limit on interior-point iterations in all.
    :return: the best of what ``coordinate`` finds from ``start`` and from the rounded ``soft``;
        ``converged`` says whether the duality gap is within the tolerance. With
        ``GroupNormPrior(ranked=True)`` each atom's weight is fixed, by its popularity in ``start``,
        or else where every party by itself takes its cheapest atoms. ``dual`` then bounds the
        programme with these weights, and ``bound`` is ``-inf``, since another order may be better.
    :raises StructureError: if shapes do not fit, or a party has more components than there are
        atoms while their number is fixed.
    :raises ParameterError: for another prior or opening costs; and as for :func:`coordinate`.

    Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), eq. 9.
    """
    if not isinstance(assignment_prior, (GroupNormPrior, FixedAtoms)):
        raise ParameterError(
            f"the relaxed solver needs a GroupNormPrior or FixedAtoms, got {assignment_prior}: the "
            "penalty of no other is a convex function of the relaxed assignment; use coordinate"
        )
    check_least(0, tolerance=tolerance)
    check_least(1, max_iterations=max_iterations)
    problem = AssignmentProblem.of(cost, assignment_prior, opening)
    if bool(problem.opening.any()):
        raise ParameterError(
            "the relaxed solver takes no opening costs: they are not convex; use coordinate"
        )
    if bool((problem.penalty == 0).all()):
        # Parties do not interact, and a linear assignment is its own relaxation.
        plain = coordinate(problem, assignment_prior, start=start)
        value = plain.objective
        soft = problem.split(_one_hot(problem, torch.cat(plain.atoms)))
        return RelaxedAssignment(
            atoms=plain.atoms,
            objective=value,
            iterations=0,
            converged=True,
            bound=value,
            soft=soft,
            relaxation=value,
            dual=value,
        )
    first = start
    if first is None:
        first = [match(c, float(problem.penalty[1])) for c in problem.split(problem.host_cost)]
    popularity = problem.popularity(problem.join(first))
    relaxation = _Relaxation.of(problem, popularity)
    result = relaxation.solve(popularity, tolerance, max_iterations)
    joint = result.soft
    nearest = [_round(p) for p in problem.split(joint.cpu())]
    ends = [coordinate(problem, assignment_prior, start=a) for a in (nearest, start)]
    best = min(ends, key=lambda a: a.objective)
    fixed_ranks = bool((problem.weights != 1).any())
    return RelaxedAssignment(
        atoms=best.atoms,
        objective=best.objective,
        iterations=result.iterations,
        converged=relative_gap(result.primal, result.dual, relaxation.scale) <= tolerance,
        bound=-math.inf if fixed_ranks else min(result.dual, best.objective),
        soft=problem.split(joint),
        relaxation=result.primal,
        dual=result.dual,
    )


def _round(soft: Tensor) -> Tensor:
    """The assignment of one party, ``[L]``, that agrees most with ``soft``, ``[K, L]``."""
    return match((1 - soft.sum(0)) - soft, 0.0)


def _one_hot(problem: AssignmentProblem, atoms: Tensor) -> Tensor:
    result = torch.zeros_like(problem.cost)
    n = (atoms != NEW).nonzero().squeeze(-1)
    result[atoms[n].to(result.device), n.to(result.device)] = 1
    return result


@dataclass
class _Result:
    """The best so far; ``entries`` of ``[K, N]`` have the values ``p``, the others none."""

    entries: Tensor
    p: Tensor
    primal: float
    dual: float
    iterations: int = 0

    @property
    def soft(self) -> Tensor:
        result = torch.zeros(self.entries.shape, dtype=self.p.dtype, device=self.p.device)
        result[self.entries] = self.p
        return result


# So many entries, or such a part of all, are solved for at first. Entries left out cost neither
# time nor memory, but may have to be brought back.
_MAX_ENTRIES, _MAX_PART = 1 << 15, 0.04

# The gap at which those left out are looked at first, and how near to being worth their cost (in
# units of what a component costs on average) they are brought back.
_FIRST_GAP, _NEAR = 1e-2, 0.1

# Costs are read in blocks of so many numbers.
_MAX_NUMBERS = 1 << 16


@dataclass(frozen=True)
class _Relaxation:
    """The whole programme: float64, but for the costs.

    :ivar norm: ``λ w``, ``[K]``.
    :ivar alone: ``λ w'``, the cost of a new atom.
    """

    problem: AssignmentProblem
    norm: Tensor
    alone: float

    @classmethod
    def of(cls, problem: AssignmentProblem, popularity: Tensor) -> _Relaxation:
        scale, num_atoms = float(problem.penalty[1]), problem.num_atoms
        norm = torch.empty(num_atoms, dtype=torch.float64)
        ranks = popularity.argsort(descending=True, stable=True)
        norm[ranks] = scale * problem.weights[:num_atoms]
        alone = scale * float(problem.weights[num_atoms])
        return cls(problem, norm.to(problem.cost.device, non_blocking=True), alone)

    @property
    def scale(self) -> float:
        """The least number that a gap is taken relative to: the cost of a new atom."""
        return max(self.alone, 1e-300)

    @cached_property
    def party(self) -> Tensor:
        """The party of each component, ``[N]``."""
        return party_of(self.problem.sizes).to(self.norm.device, non_blocking=True)

    @cached_property
    def place(self) -> Tensor:
        """The place of each component if all parties were as large as the largest, ``[N]``."""
        sizes = self.problem.sizes
        width = max(sizes)
        within = torch.arange(width) < torch.tensor(sizes)[:, None]
        return within.flatten().nonzero().squeeze(-1).to(self.norm.device, non_blocking=True)

    @cached_property
    def low(self) -> Tensor:
        """The least cost of each component, ``[N]``."""
        return self.problem.cost.amin(0).double().clamp(max=self.alone)

    def solve(self, popularity: Tensor, tolerance: float, max_iterations: int) -> _Result:
        """Solve on some entries, check all, and go on with those that were missing."""
        cost = self.problem.cost
        candidates = cost < self.alone  # no other takes part in an optimum
        lone = self.alone * cost.shape[1]
        if not bool(candidates.any()):
            return _Result(candidates, cost.new_zeros(0), lone, lone)
        best = _Result(torch.zeros_like(candidates), cost.new_zeros(0), lone, -math.inf)
        active = self._promising(candidates, popularity)
        target = tolerance if torch.equal(active, candidates) else max(_FIRST_GAP, tolerance)
        while best.iterations < max_iterations:
            programme, unit, rest = self._restrict(active)
            closest = None
            for point in interior_point(programme):
                best.iterations += 1
                primal = unit * point.primal + rest
                if primal < best.primal:
                    best.entries, best.p, best.primal = active, point.p.to(cost.dtype), primal
                if closest is None or point.difference < closest.difference:
                    closest = point
                last = best.iterations == max_iterations
                if not last and unit * point.difference > target * max(abs(primal), self.scale):
                    continue
                bound, missing = self._certify(closest if last else point, unit)
                best.dual = max(best.dual, bound)
                if last or relative_gap(best.primal, best.dual, self.scale) <= tolerance:
                    return best
                target = max(tolerance, target / 100)
                missing &= candidates & ~active
                if bool(missing.any()):
                    active = active | missing
                    break
            else:  # rounding errors let it go no further
                if closest is not None:
                    best.dual = max(best.dual, self._certify(closest, unit)[0])
                return best
        return best

    def _promising(self, candidates: Tensor, popularity: Tensor) -> Tensor:
        """The candidates to begin with, ``[K, N]``: those nearest to the cheapest of their column,
        where each costs what it adds to an assignment with these popularities."""
        cost = self.problem.cost
        room = max(_MAX_ENTRIES, int(_MAX_PART * cost.numel()))
        if int(candidates.count_nonzero()) <= room:
            return candidates
        m = popularity.to(cost.device).double()
        price = self.norm * ((m + 1).sqrt() - m.sqrt())
        above = cost + price.to(cost.dtype)[:, None]
        above -= above.amin(0)
        # A sample of entries says where to cut; an odd step does not keep to some columns.
        sample = above.masked_fill_(~candidates, torch.inf).flatten()[:: cost.numel() >> 16 | 1]
        return above <= sample.kthvalue(1 + int(len(sample) * room / cost.numel())).values

    def _restrict(self, active: Tensor) -> tuple[Programme, float, float]:
        """The programme on these entries of ``[K, N]``, its unit of cost, and what is outside."""
        parties = self.problem.num_parties
        atom, n = active.nonzero(as_tuple=True)
        alone = self.alone - self.low
        unit = max(float(alone.max()), float(self.norm.max()))
        padded = alone.new_ones(parties * max(self.problem.sizes))
        padded[self.place] = alone / unit
        programme = Programme(
            (self.problem.cost[atom, n].double() - self.low[n]) / unit,
            atom * parties + self.party[n],
            self.place[n],
            self.norm / unit,
            padded,
            parties,
        )
        return programme, unit, float(self.low.sum()) - unit * (len(padded) - len(alone))

    def _certify(self, point: Point, unit: float) -> tuple[float, Tensor]:
        """The lower bound from the multipliers of ``point``, with ``z`` raised until they are
        feasible; and the entries, ``[K, N]``, that are violated or nearly so."""
        cost, party = self.problem.cost, self.party
        near = _NEAR * unit * abs(point.primal) / len(party)
        y = (unit * point.y[self.place] + self.low).clamp(max=self.alone)
        z = unit * point.z.view(len(cost), -1)
        bound, violated = float(y.sum() - z.sum()), []
        for block in torch.arange(len(cost)).split(max(1, _MAX_NUMBERS // len(y))):
            k = slice(int(block[0]), int(block[-1]) + 1)
            excess = y - cost[k] - z[k][:, party]
            violated.append(excess > -near)
            norm = excess.clamp_(min=0).norm(dim=1)
            top = torch.zeros_like(z[k])
            top.scatter_reduce_(1, party.expand_as(excess), excess, "amax")
            # With z raised by this part of the largest excess of its row, all excesses shrink so.
            part = (1 - self.norm[k] / norm).nan_to_num_(0.0).clamp_(min=0)
            bound -= float(part @ top.sum(1))
        return bound, torch.cat(violated)
