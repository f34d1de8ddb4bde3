# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The dispersion ``T`` by persistence: the assignment is followed along a path of T, and T is taken
from the middle of the longest stretch on which it does not change."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pyro_fusion.errors import ParameterError
from pyro_fusion.fusion.ascent import expectation_maximization
from pyro_fusion.pooling.components import Components, by_appearance, compact
from pyro_fusion.pooling.dispersion import two_prices
from pyro_fusion.pooling.kl import Exclusive
from pyro_fusion.pooling.merges import Merges, PriceScale

__all__ = ["DispersionPath", "Plateau", "follow", "told_apart"]

# T is taken from a plateau on which the price up to which components merge grows so many times.
LONG = 5.0

# T is below this quantile of what merges within a party cost, and a plateau counts up to the other.
_CAP, _END = 0.25, 0.75

# A plateau on which nothing merges counts if other parties' components are about as far as those of
# one's own; or not quite, but so far that posteriors of the same would be very much too sure.
_UNSHARED, _FAR, _OVERCONFIDENT = 0.75, 0.2, 25.0

# Prices on a path are so many times those before, which finds all long plateaus, and so many at
# most.
STEP, _MAX_STEPS = 2.2, 64


@dataclass(frozen=True)
class Plateau:
    """A stretch of T on which the assignment does not change.

    :ivar low, high: the T at which it begins and ends.
    :ivar num_atoms: K on it.
    :ivar length: how many times the price up to which two lone components share an atom grows on
        it, from face value (half a nat per dimension, what two posteriors of one truth that admit
        their errors are apart in the mean) to what three quarters of the cheapest merges within a
        party cost; 1 if it lies outside of these.
    :ivar counts: whether T may be taken from it: not if it begins above what a quarter of the
        cheapest merges within a party cost, nor if every component is alone on it although other
        parties' components are far nearer than those of the same party.
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
    :ivar components: which components it was followed on, counted over the parties in turn:
        LongTensor ``[N]``. Those that their own party does not tell apart are left out, and of many
        parties there is a random selection.
    :ivar parties: the party of each, LongTensor ``[N]``.
    :ivar sure: whether the chosen plateau is beyond doubt: not if nothing merges on it, although
        other parties' components are nearer than those of the same party.

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
    components: Tensor
    parties: Tensor
    sure: bool = True

    @property
    def plateau(self) -> Plateau | None:
        """The plateau that the estimate lies on; None if it is below or above the path."""
        on = [x for x in self.plateaus if x.low <= self.estimate <= x.high]
        return on[0] if on else None

    @property
    def at_estimate(self) -> Tensor:
        """The assignment on the path that is nearest to the estimate, LongTensor ``[N]``."""
        low, high = (
            (0.0, math.inf) if self.plateau is None else (self.plateau.low, self.plateau.high)
        )
        distance = (self.dispersion / self.estimate).log().abs()
        outside = (self.dispersion < low) | (self.dispersion > high)
        return self.assignment[int((distance + 1e3 * outside).argmin())]

    @property
    def identified(self) -> bool:
        """True if the posteriors tell T: it lies on a long plateau that counts and is not above the
        cap, and no longer one says otherwise."""
        on = self.plateau
        if on is None or not on.counts or math.isinf(self.cap):
            return False
        rivals = [x.length for x in self.plateaus if x != on and x.low < self.cap]
        longest = max(rivals, default=1.0)
        below = self.estimate <= self.cap * (1 + 1e-9)
        return below and self.sure and on.length >= max(LONG, longest)

    def doubt(self) -> str:
        """A sentence that says that the posteriors do not tell T, and how; empty where they do."""
        if self.identified:
            return ""
        start = (
            f"the posteriors do not tell how far apart two components along '{self.label}' may be "
            "and still be the same: "
        )
        first, last = self.plateaus[0], self.plateaus[-1]
        long = [x for x in self.plateaus if x.length >= LONG]
        if math.isinf(self.cap):
            text = f"no party has two of them, which would differ. T = {self.estimate:.4g}"
        elif self.chosen is None and not long:
            text = (
                f"from dispersion T = {first.low:.3g} to {last.high:.3g} there are "
                f"{first.num_atoms} to {last.num_atoms} atoms, and the price of a merge grows "
                f"nowhere more than {max(x.length for x in self.plateaus):.2g} times without a "
                f"change. T = {self.estimate:.4g}"
            )
        else:
            which = ", ".join(
                f"{x.num_atoms} atoms from T = {x.low:.3g} to {x.high:.3g}" for x in long
            )
            text = f"there are {which}, and T = {self.estimate:.4g} is one of several answers; it"
        text += " is a rule of thumb"
        if self.estimate > self.cap:
            text += (
                f", and above {self.cap:.3g}, at which a quarter of the components would be the "
                "same as another one of their own party"
            )
        return (
            f"{start}{text}. Look at `fusion.dispersion_path`, and give `dispersion` if you know "
            "better"
        )


def told_apart(problem: Components) -> tuple[Components, Merges, Tensor]:
    """The components that a party itself tells apart, what their merges cost, and which these are,
    LongTensor ``[n]``: hidden units that a fit has switched off, or two components for one cluster,
    have no say in how far apart the same may be. All, if parties or pairs within them would be
    left without any.
    """
    merges = _merges_of(problem)
    every = torch.arange(len(merges.own))
    told = (merges.own >= merges.face_value).nonzero().squeeze(-1)
    sizes = torch.bincount(problem.party[told], minlength=problem.num_parties)
    if len(told) == len(every) or int((sizes > 0).sum()) < 2 or int(sizes.max()) < 2:
        return problem, merges, every
    some = problem.in_order(told, tuple(sizes[sizes > 0].tolist()))
    return some, _merges_of(some), told


def _merges_of(problem: Components) -> Merges:
    """The cheapest merges of components, priced by the log-linear pool in every pooling."""
    prices = partial(Exclusive().merge_costs, prior={})
    return Merges.of(problem.sites, problem.sizes, problem.prior, prices)


def follow(
    label: str,
    problem: Components,
    merges: Merges,
    order: Tensor,
    party: Tensor,
    step: float = STEP,
) -> DispersionPath:
    """The path of the assignment of components, and the estimate of T.

    :param problem: the components at ``T = 1``, as they were handed over.
    :param merges: theirs.
    :param order: the place of each component in the order of the parties, LongTensor ``[N]``.
    :param party: the party of each component, LongTensor ``[N]``.
    :param step: by how much the price of a merge grows from one value of T to the next.
    :raises ParameterError: if the posteriors are degenerate.
    """
    limit, pooling = two_prices(merges), problem.pooling
    walk = _Walk.along(problem, merges, limit, step)
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
    assignment = torch.stack([by_appearance(x.groups[place]) for x in walk.points])
    return DispersionPath(
        label=label,
        dispersion=torch.tensor([x.dispersion for x in walk.points], dtype=torch.float64),
        assignment=assignment,
        num_atoms=assignment.amax(1) + 1,
        objective=torch.tensor([x.objective for x in walk.points], dtype=torch.float64),
        plateaus=tuple(walk.plateaus),
        chosen=chosen,
        estimate=estimate,
        cap=walk.scale.dispersion(merges.wrong_price(_CAP)),
        components=order[place],
        parties=party[place],
        sure=chosen is None or chosen.num_atoms < len(order) or merges.nearness >= _UNSHARED,
    )


def _without_plateau(walk: _Walk, merges: Merges, limit: float) -> float:
    """The price up to which components may be the same, where no plateau in the pooling's own units
    is long enough: from one in those of the log-linear pool, in which distances are less distorted;
    else by the rule of two prices, if that means anything, and if not from the longest plateau."""
    pool = Exclusive()
    if not walk.problem.pooling.log_linear:
        walk = _Walk.along(replace(walk.problem, pooling=pool, prior={}), merges, limit, STEP)
        if (chosen := walk.longest(LONG)) is not None:
            return walk.middle(chosen)
    # The rule takes the median of the cheapest merges for right, which here are wrong ones.
    mostly_wrong = merges.right_price() > merges.wrong_price(0.5) / LONG
    if mostly_wrong and (chosen := walk.longest(1.0)) is not None:
        return walk.middle(chosen)
    return limit


@dataclass(frozen=True)
class _Point:
    """The best assignment that was found at a T.

    :ivar groups: LongTensor ``[N]``, numbered by first appearance.
    :ivar objective: F.
    """

    dispersion: float
    groups: Tensor
    objective: float


@dataclass(frozen=True)
class _Walk:
    """A walk along the path of T.

    :ivar problem: the components at ``T = 1``.
    :ivar scale: T in units of prices.
    :ivar floor, cap: prices between which T may be.
    :ivar points: the assignments at rising T.
    :ivar plateaus: the stretches on which it does not change.
    """

    problem: Components
    scale: PriceScale
    floor: float
    cap: float
    points: list[_Point]
    plateaus: list[Plateau]

    @classmethod
    def along(cls, problem: Components, merges: Merges, limit: float, step: float) -> _Walk:
        """The walk from face value to the price of a wrong merge, or, where none is known to be
        wrong, to far beyond ``limit``."""
        floor, cap = merges.face_value, merges.wrong_price(_CAP)
        end = merges.wrong_price(_END)
        top = max(end if merges.known_different else LONG * limit, 2 * floor)
        scale = problem.pooling.scale(merges, floor, top)
        count = min(_MAX_STEPS, math.ceil(math.log(top / floor) / math.log(step)) + 1)
        follower = _Follower(problem)
        grid = [scale.dispersion(x) for x in np.geomspace(floor, top, count).tolist()]
        if problem.pooling.tempers:  # only so sure as the scale was followed
            grid = sorted({max(t, math.exp(scale.dispersions[0])) for t in grid})
        path = follower.run(grid)
        plateaus, near = [], merges.nearness
        for groups, low, high in follower.stretches(path):
            first, last = max(scale.price(low), floor), min(scale.price(high), end)
            num_atoms = int(groups.max()) + 1
            length = max(1.0, last / first)
            alone = num_atoms == len(groups)
            far = near >= _FAR and length * near >= _OVERCONFIDENT
            counts = first < cap and (not alone or near >= _UNSHARED or far)
            plateaus.append(Plateau(low, high, num_atoms, length, counts))
        return cls(problem, scale, floor, cap, path, plateaus)

    def longest(self, least: float) -> Plateau | None:
        """The longest plateau that counts, if it is longer than ``least``."""
        long = [x for x in self.plateaus if x.counts and x.length > least]
        return max(long, key=lambda x: x.length, default=None)

    def middle(self, plateau: Plateau) -> float:
        """The geometric middle of the part of a plateau on which T may be."""
        low = max(plateau.low, self.scale.dispersion(self.floor))
        return math.sqrt(low * min(plateau.high, self.scale.dispersion(self.cap)))


class _Follower:
    """Assignments at a rising series of T, each found from the one before."""

    def __init__(self, problem: Components) -> None:
        self.problem = problem
        self.assignment_prior = problem.pooling.default_assignment_prior()
        self._costs: dict[tuple[float, bytes, bytes], float] = {}
        self._scored: dict[float, Components] = {}

    def run(self, grid: list[float]) -> list[_Point]:
        """The T at which the atoms are proper, and the best assignment found for each.

        :raises ParameterError: if there is none.
        """
        found: list[_Point] = []
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
            found.append(_Point(t, groups, result.objective[-1]))
        if error is not None and not found:
            raise error
        # Several that merge at once pay earlier than two of them: atoms come together late.
        for i in reversed(range(len(found) - 1)):
            here, after = found[i], found[i + 1].groups
            if (rise := self.rise(here.dispersion, here.groups, after)) < 0:
                found[i] = _Point(here.dispersion, after, here.objective + rise)
        return found

    def rise(self, dispersion: float, groups: Tensor, other: Tensor) -> float:
        """By how much F is higher at another assignment, from the groups alone in which they
        differ, so that nothing large cancels; zero where that is rounding."""
        place = groups * len(groups) + other
        size, own = (torch.bincount(x)[x] for x in (groups, other))
        _, index, both = place.unique(return_inverse=True, return_counts=True)
        differ = (both[index] < size) | (both[index] < own)
        if not bool(differ.any()):
            return 0.0
        cost = self._cost(dispersion, other, differ) - self._cost(dispersion, groups, differ)
        rise = cost + self._penalty(other) - self._penalty(groups)
        return rise if abs(rise) > 1e-12 * (1 + abs(cost)) else 0.0

    def _penalty(self, groups: Tensor) -> float:
        num_atoms, num_parties = int(groups.max()) + 1, self.problem.num_parties
        prior = self.assignment_prior.update(num_atoms, num_parties)
        penalty = prior.penalty(num_parties)[torch.bincount(groups)]
        return float(penalty.sum()) + float(prior.constant(num_parties))

    def _cost(self, dispersion: float, groups: Tensor, mask: Tensor) -> float:
        """The costs of the groups that are in the mask, summed."""
        tempered = self.problem.pooling.tempers
        t = dispersion if tempered else 1.0
        own, key = groups[mask], (t, groups.numpy().tobytes(), mask.numpy().tobytes())
        if key not in self._costs:
            part = self._at(t).take(mask.nonzero().squeeze(-1))
            own, num_atoms = compact(own)
            self._costs[key] = float(part.values(own, num_atoms).sum())
        return self._costs[key] if tempered else self._costs[key] / dispersion

    def _at(self, dispersion: float) -> Components:
        if dispersion not in self._scored:
            self._scored[dispersion] = replace(self.problem, dispersion=dispersion).scored()
        return self._scored[dispersion]

    def stretches(self, found: list[_Point]) -> list[tuple[Tensor, float, float]]:
        """Each assignment with the T at which it becomes the best, and ceases to be: where two
        have the same F, which between two values of T is nearly linear in 1/T, and exactly where
        messages are not tempered."""
        result = []
        low = found[0].dispersion
        for a, b in pairwise(found):
            if torch.equal(a.groups, b.groups):
                continue
            here = self.rise(a.dispersion, a.groups, b.groups)
            there = self.rise(b.dispersion, b.groups, a.groups)
            share = here / (here + there) if here > 0 and there > 0 else float(here > 0)
            high = 1 / ((1 - share) / a.dispersion + share / b.dispersion)
            result.append((a.groups, low, high))
            low = high
        return [*result, (found[-1].groups, low, found[-1].dispersion)]
