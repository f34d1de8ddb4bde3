# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The dispersion ``T`` by persistence: the assignment is followed along a path of T, and T is taken
from the middle of the longest stretch on which it does not change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pyro_fusion.errors import ParameterError
from pyro_fusion.fusion.ascent import expectation_maximization
from pyro_fusion.pooling.collapsed import group_costs
from pyro_fusion.pooling.components import Components, by_appearance
from pyro_fusion.pooling.dispersion import two_prices
from pyro_fusion.pooling.kl import Exclusive
from pyro_fusion.pooling.merges import Merges

__all__ = ["DispersionPath", "Plateau", "follow", "merges_of"]

# T is taken from a plateau on which the price up to which components merge grows so many times.
LONG = 5.0

# It ends at this quantile of what merges within a party cost.
_CAP = 0.25

# Prices on a path are so many times those before, and so many at most.
_STEP, _MAX_STEPS = 2.2, 64


@dataclass(frozen=True)
class Plateau:
    """A stretch of T on which the assignment does not change.

    :ivar low, high: the T at which it begins and ends.
    :ivar num_atoms: K on it.
    :ivar length: how many times the price up to which two lone components share an atom grows on
        it, from face value (half a nat per dimension, what two posteriors of one truth that admit
        their errors are apart in the mean) to what the cheapest quarter of merges within a party
        cost; 1 if it lies outside of these.
    :ivar counts: whether T may be taken from it: not if every component is alone on it although
        other parties' components are nearer than those of the same party.
    """

    low: float
    high: float
    num_atoms: int
    length: float
    counts: bool = True


@dataclass(frozen=True)
class DispersionPath:
    """The assignment along one label as the dispersion T grows.

    :ivar label: the label.
    :ivar dispersion: values of T, rising, float64 ``[M]``.
    :ivar assignment: the atom of each component at each T, the parties in turn, atoms numbered by
        first appearance: LongTensor ``[M, N]``.
    :ivar num_atoms: K at each T, LongTensor ``[M]``.
    :ivar objective: F at each T, with the pooling's default assignment prior, float64 ``[M]``.
    :ivar plateaus: the stretches between the T at which the assignment changes, rising.
    :ivar chosen: the plateau that T was taken from, None if none is long enough.
    :ivar estimate: T, from the middle of the chosen plateau, else by the rule of two prices.
    :ivar cap: the T at which the cheapest quarter of merges within a party would be made; infinite
        where no party has two components.
    :ivar parties: the numbers of the parties it was followed on, LongTensor: all, or of many a
        random selection.
    :ivar sizes: ``L_s`` of each of these; they add up to ``N``.

    Source: Leung, Zhang & Xu, *Clustering by scale-space filtering* (IEEE PAMI 2000), for the
    lifetime criterion.
    """

    label: str
    dispersion: Tensor
    assignment: Tensor
    num_atoms: Tensor
    objective: Tensor
    plateaus: tuple[Plateau, ...]
    chosen: Plateau | None
    estimate: float
    cap: float
    parties: Tensor
    sizes: tuple[int, ...]

    @property
    def plateau(self) -> Plateau | None:
        """The plateau that the estimate lies on; None if it is below or above the path."""
        on = [x for x in self.plateaus if x.low <= self.estimate <= x.high]
        return on[0] if on else None

    @property
    def identified(self) -> bool:
        """True if the estimate lies on a long plateau: over a factor of five in the price of a
        merge T does not matter."""
        return self.plateau is not None and self.plateau.length >= LONG

    def doubt(self) -> str:
        """What is to be said of T where the posteriors do not tell it; empty where they do."""
        if self.identified:
            return ""
        first, last = self.plateaus[0], self.plateaus[-1]
        longest = max(x.length for x in self.plateaus)
        text = (
            f"the posteriors do not tell how far apart two components along '{self.label}' may be "
            f"and still be the same: from dispersion T = {first.low:.3g} to {last.high:.3g} there "
            f"are {first.num_atoms} to {last.num_atoms} atoms, and on no stretch longer than a "
            f"factor of {max(longest, 1.0):.2g} in the price of a merge is it one assignment. "
            f"T = {self.estimate:.4g} is a rule of thumb"
        )
        if self.estimate > self.cap:
            text += (
                f", and above {self.cap:.3g}, at which a quarter of the components would be the "
                "same as another one of their own party"
            )
        return f"{text}. Look at `fusion.dispersion_path`, and give `dispersion` if you know better"


def merges_of(problem: Components) -> Merges:
    """The cheapest merges of components, priced by the log-linear pool in every pooling."""
    prices = partial(Exclusive().merge_costs, prior={})
    return Merges.of(problem.sites, problem.sizes, problem.prior, prices)


def follow(
    label: str, problem: Components, merges: Merges, order: Tensor, party: Tensor
) -> DispersionPath:
    """The path of the assignment of components, and the estimate of T.

    :param problem: the components at ``T = 1``, as they were handed over.
    :param merges: theirs.
    :param order: the place of each component in the order of the parties, LongTensor ``[N]``.
    :param party: the party of each component, LongTensor ``[N]``.
    :raises ParameterError: if the posteriors are degenerate.
    """
    limit, pooling = two_prices(merges), problem.pooling
    walk = _Walk.along(problem, merges, limit)
    chosen = walk.longest(LONG) if merges.known_different else None
    if chosen is not None:
        estimate = walk.middle(chosen)
    else:
        if merges.known_different:
            limit = _without_plateau(walk, merges, limit)
        estimate = pooling.dispersion(merges, limit)
    if pooling.tempers:
        estimate = max(estimate, 1.0)  # messages are never made surer than they came
    place = order.argsort()
    assignment = torch.stack([by_appearance(groups[place]) for groups in walk.groups])
    parties, own = party[place].unique_consecutive(return_counts=True)
    return DispersionPath(
        label=label,
        dispersion=torch.tensor(walk.dispersion, dtype=torch.float64),
        assignment=assignment,
        num_atoms=assignment.amax(1) + 1,
        objective=torch.tensor(walk.objective, dtype=torch.float64),
        plateaus=tuple(walk.plateaus),
        chosen=chosen,
        estimate=estimate,
        cap=walk.scale.dispersion(merges.wrong_price(_CAP)),
        parties=parties,
        sizes=tuple(own.tolist()),
    )


def _without_plateau(walk: _Walk, merges: Merges, limit: float) -> float:
    """The price up to which components may be the same, where no plateau in the pooling's own units
    is long enough: from one in those of the log-linear pool, in which distances are less distorted;
    else by the rule of two prices, if that means anything, and if not from the longest plateau."""
    pool = Exclusive()
    if not walk.problem.pooling.log_linear:
        walk = _Walk.along(replace(walk.problem, pooling=pool, prior={}), merges, limit)
        if (chosen := walk.longest(LONG)) is not None:
            return walk.middle(chosen)
    # The rule takes the median of the cheapest merges for right, which here are wrong ones.
    mostly_wrong = merges.right_price() > merges.wrong_price(0.5) / LONG
    if mostly_wrong and (chosen := walk.longest(1.0)) is not None:
        return walk.middle(chosen)
    return limit


@dataclass(frozen=True)
class _Walk:
    """A walk along the path of T.

    :ivar problem: the components at ``T = 1``.
    :ivar scale: T in units of prices.
    :ivar floor, cap: prices between which plateaus count.
    :ivar dispersion: values of T, rising.
    :ivar groups: the assignment at each, LongTensors ``[N]``.
    :ivar objective: F at each.
    :ivar plateaus: the stretches on which it does not change.
    """

    problem: Components
    scale: _Scale
    floor: float
    cap: float
    dispersion: list[float]
    groups: list[Tensor]
    objective: list[float]
    plateaus: list[Plateau]

    @classmethod
    def along(cls, problem: Components, merges: Merges, limit: float) -> _Walk:
        """The walk from face value to the price of a wrong merge, or, where none is known to be
        wrong, to ``limit``."""
        floor, cap = merges.dimensions / 2, merges.wrong_price(_CAP)
        top = max(merges.wrong_price() if merges.known_different else limit, _STEP * floor)
        scale = _Scale.of(problem.pooling.limit(merges), floor, top)
        count = min(_MAX_STEPS, math.ceil(math.log(top / floor) / math.log(_STEP)) + 1)
        follower = _Follower(problem)
        path = follower.run([scale.dispersion(x) for x in np.geomspace(floor, top, count).tolist()])
        plateaus = []
        for groups, low, high in follower.stretches(path):
            first, last = max(scale.price(low), floor), min(scale.price(high), cap)
            num_atoms = int(groups.max()) + 1
            counts = num_atoms < len(groups) or merges.nothing_shared()
            length = max(1.0, last / first)
            plateaus.append(Plateau(low, high, num_atoms, length, counts))
        objective = [follower.objective(t, groups) for t, groups in path]
        dispersions, assignments = zip(*path, strict=True)
        return cls(
            problem, scale, floor, cap, list(dispersions), list(assignments), objective, plateaus
        )

    def longest(self, least: float) -> Plateau | None:
        """The longest plateau that counts, if it is longer than ``least``."""
        long = [x for x in self.plateaus if x.counts and x.length > least]
        return max(long, key=lambda x: x.length, default=None)

    def middle(self, plateau: Plateau) -> float:
        """The geometric middle of the part of a plateau that counts."""
        low = max(plateau.low, self.scale.dispersion(self.floor))
        return math.sqrt(low * min(plateau.high, self.scale.dispersion(self.cap)))


@dataclass(frozen=True)
class _Scale:
    """The price in nats up to which two lone components share an atom, as a rising function of T
    and back: points between which logarithms are interpolated.

    :ivar dispersions, prices: logarithms, rising.
    """

    dispersions: list[float]
    prices: list[float]

    @classmethod
    def of(cls, price: Callable[[float], float], floor: float, top: float) -> _Scale:
        """The scale of a pooling, from at most ``floor`` to at least ``top``."""
        points = [(1.0, price(1.0))]
        while points[-1][1] < top and len(points) < _MAX_STEPS:
            t = points[-1][0] * _STEP
            points.append((t, price(t)))
        while points[0][1] > floor and len(points) < 2 * _MAX_STEPS:
            t = points[0][0] / _STEP
            points.insert(0, (t, price(t)))
        # Only one point at or beyond either end.
        first = max([i for i, p in enumerate(points) if p[1] <= floor], default=0)
        last = min([i for i, p in enumerate(points) if p[1] >= top], default=len(points) - 1)
        points = points[first : last + 1]
        # Prices that grow with the exponential of T, as those of `inclusive`, need more points.
        i = 0
        while i + 1 < len(points) < 4 * _MAX_STEPS:
            (a, x), (b, y) = points[i], points[i + 1]
            if y > 3 * x and b > 1.001 * a:
                t = math.sqrt(a * b)
                points.insert(i + 1, (t, price(t)))
            else:
                i += 1
        dispersions, prices = np.log(points).T
        return cls(dispersions.tolist(), np.maximum.accumulate(prices).tolist())

    def price(self, dispersion: float) -> float:
        """The price at a dispersion."""
        return _interpolated(dispersion, self.dispersions, self.prices)

    def dispersion(self, price: float) -> float:
        """The dispersion at a price."""
        return _interpolated(price, self.prices, self.dispersions)


def _interpolated(x: float, at: list[float], y: list[float]) -> float:
    """A rising curve through points, all in logarithms; beyond its ends it has slope one."""
    if not math.isfinite(x):
        return x
    v = math.log(max(x, 1e-300))
    inside = min(max(v, at[0]), at[-1])
    return math.exp(float(np.interp(inside, at, y)) + v - inside)


class _Follower:
    """Assignments at a rising series of T, each found from the one before."""

    def __init__(self, problem: Components) -> None:
        self.problem = problem
        self.assignment_prior = problem.pooling.default_assignment_prior()
        self._costs: dict[tuple[float, bytes], float] = {}
        self._scored: dict[float, Components] = {}

    def run(self, grid: list[float]) -> list[tuple[float, Tensor]]:
        """The T at which the atoms are proper, and the best assignment found for each.

        :raises ParameterError: if there is none.
        """
        found: list[tuple[float, Tensor]] = []
        groups, error = torch.arange(sum(self.problem.sizes)), None
        for t in grid:
            try:
                result = expectation_maximization(
                    self._at(t), self.assignment_prior, groups, collapsed=False
                )
            except ParameterError as e:  # messages to so high a power may be improper
                error = e
                continue
            groups = by_appearance(result.groups)
            found.append((t, groups))
        if error is not None and not found:
            raise error
        # Several that merge at once pay earlier than two of them: atoms come together late.
        for i in reversed(range(len(found) - 1)):
            t, groups = found[i]
            after = found[i + 1][1]
            if not torch.equal(groups, after):
                now = self.objective(t, groups)
                if self.objective(t, after) < now - 1e-12 * abs(now):
                    found[i] = (t, after)
        return found

    def objective(self, dispersion: float, groups: Tensor) -> float:
        """F of an assignment ``[N]``, numbered by first appearance, at its best atoms."""
        num_atoms, num_parties = int(groups.max()) + 1, self.problem.num_parties
        prior = self.assignment_prior.update(num_atoms, num_parties)
        penalty = prior.penalty(num_parties)[torch.bincount(groups)]
        total = float(penalty.sum()) + float(prior.constant(num_parties))
        if self.problem.pooling.tempers:
            return total + self._cost(dispersion, groups)
        return total + self._cost(1.0, groups) / dispersion

    def _cost(self, dispersion: float, groups: Tensor) -> float:
        key = (dispersion, groups.numpy().tobytes())
        if key not in self._costs:
            every = torch.arange(int(groups.max()) + 1)
            sums = group_costs(self._at(dispersion), groups, len(every))
            self._costs[key] = float(sums.values(every).sum())
        return self._costs[key]

    def _at(self, dispersion: float) -> Components:
        if dispersion not in self._scored:
            self._scored[dispersion] = replace(self.problem, dispersion=dispersion).scored()
        return self._scored[dispersion]

    def stretches(self, found: list[tuple[float, Tensor]]) -> list[tuple[Tensor, float, float]]:
        """Each assignment with the T at which it becomes the best, and ceases to be: where two
        have the same F, which between two values of T is nearly linear in 1/T, and exactly where
        messages are not tempered."""
        result = []
        low = found[0][0]
        for (t, groups), (u, after) in pairwise(found):
            if torch.equal(groups, after):
                continue
            here = self.objective(t, after) - self.objective(t, groups)
            there = self.objective(u, groups) - self.objective(u, after)
            share = here / (here + there) if here > 0 and there > 0 else float(here > 0)
            high = 1 / ((1 - share) / t + share / u)
            result.append((groups, low, high))
            low = high
        return [*result, (found[-1][1], low, found[-1][0])]
