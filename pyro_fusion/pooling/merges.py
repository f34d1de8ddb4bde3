# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Pairs of components that are near each other, and the price of merging them: what tells how far
apart two components may be and still be the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_fusion.assignment.problem import party_of
from pyro_fusion.families import Factor, pairwise_kl
from pyro_fusion.families.masked import Masked

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["WRONG", "Merges", "PriceScale", "pairwise_spread", "quantile"]

# Quantiles need no more pairs than this. Of large components (topics of many words) there are
# fewer: so many numbers in the atoms of all pairs.
_MAX_PAIRS = 6000
_MAX_NUMBERS = 1 << 24

# The quantile of the prices within a party that the rule of two prices takes: a fit that gave one
# atom two components has a low one.
WRONG = 0.75

# `GroupNormPrior` asks one T of two lone components that share an atom, and up to 1.7 of one that
# joins a popular atom. Prices in other units are translated at the middle of that, a logarithm.
_MIDDLE = -math.log(2 - 2**0.5) / 2


@dataclass(frozen=True)
class Merges:
    """The cheapest merges of each component, with one of its own party and with one of each other
    party, in nats: ``min_q KL(q ‖ first) + KL(q ‖ second)`` over all sites.

    Two components of one party are known to be different, so what their merge costs is the price of
    a wrong one. Quantiles count parties: a component of a party of L counts ``1 / L``.

    :ivar local, prior: the components ``[N]`` and the prior of one atom by site.
    :ivar first, second: the pairs, LongTensors ``[M]``; of each component the nearest in each
        party, or in many parties of a random selection of components.
    :ivar price: of these pairs, float64 ``[M]``.
    :ivar wrong: which of them are of one party, LongTensor.
    :ivar own: of each component the price of the cheapest merge within its party, ``[N]``; infinite
        where it is alone there, and where it was not selected.
    :ivar other: of each component the price of the cheapest merge with another party, ``[N]``.
    :ivar share: what each component counts, ``[N]``.
    :ivar dimensions: D, the mean count of numbers in a component.
    :ivar informed: how many of them the posteriors know something of; of families without a
        location and a scale all.
    :ivar num_parties: S.
    """

    local: Mapping[str, Any]
    prior: Mapping[str, Factor]
    first: Tensor
    second: Tensor
    price: Tensor
    wrong: Tensor
    own: Tensor
    other: Tensor
    share: Tensor
    dimensions: float
    informed: float
    num_parties: int

    @classmethod
    def of(
        cls,
        local: Mapping[str, Any],
        sizes: tuple[int, ...],
        prior: Mapping[str, Factor],
        costs: Callable[[Mapping[str, Any], Tensor, Tensor], Tensor],
    ) -> Merges:
        """The cheapest merges of components, the parties in turn.

        :param costs: the price of the pairs of two LongTensors ``[M]``.
        """
        party, dimensions = party_of(sizes), sum(map(_dimensions, local.values()))
        divergence = _pairwise(local)
        symmetric = (divergence + divergence.mT).fill_diagonal_(torch.inf)
        blocks = [block.min(1) for block in symmetric.split(list(sizes), 1)]
        offsets = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        values = torch.stack([b.values for b in blocks], 1)
        first, with_party = _selection(values.isfinite(), dimensions)
        second = (torch.stack([b.indices for b in blocks], 1) + offsets)[first, with_party]
        price = costs(local, first, second)
        is_own = party[first] == with_party
        infinite = torch.full((len(party),), torch.inf, dtype=torch.float64)
        return cls(
            local=local,
            prior=prior,
            first=first,
            second=second,
            price=price,
            wrong=is_own.nonzero().squeeze(-1),
            own=infinite.scatter_reduce(0, first[is_own], price[is_own], "amin"),
            other=infinite.scatter_reduce(0, first[~is_own], price[~is_own], "amin"),
            share=1 / torch.tensor(sizes, dtype=torch.float64)[party],
            dimensions=dimensions,
            informed=max(1.0, sum(map(_informed, local.values()))),
            num_parties=len(sizes),
        )

    @property
    def face_value(self) -> float:
        """The mean price of merging two posteriors of one truth that admit their errors: half a nat
        for each number of which they know something."""
        return self.informed / 2

    @property
    def known_different(self) -> bool:
        """True if some party has two components."""
        return len(self.wrong) > 0

    def wrong_price(self, q: float = WRONG) -> float:
        """The quantile of the prices of merges within a party; infinite if no party has two
        components."""
        return quantile(self.own, self.share, q)

    def right_price(self, q: float = 0.5) -> float:
        """The quantile of the prices of the cheapest merges with another party."""
        return quantile(self.other, self.share, q)

    @property
    def price_ratio(self) -> float:
        """The price of a wrong merge (upper quartile) over that of the cheapest merge with another
        party (median of the estimated share that has a counterpart there, of all if none has): the
        larger, the better the posteriors tell components apart. Infinite where no party has two
        components."""
        if not self.known_different:
            return math.inf
        right = self.right_price(self.shared / 2 or 0.5)
        return self.wrong_price() / max(right, 1e-300)

    @property
    def shared(self) -> float:
        """The estimated share of components that have a counterpart in another party; NaN where no
        party has two components.

        Cheapest merges with other parties are those of a share of right pairs, and for the others
        as cheap as the least of as many merges within a party: the least share for which there are
        as many cheap ones as are found.
        """
        known = self.own.isfinite() & self.other.isfinite()
        if not bool(known.any()):
            return math.nan
        share = self.share[known] / self.share[known].sum()
        level = self.other[known].sort().values
        cheap = (self.other[known].unsqueeze(1) <= level).double().T @ share
        wrong = (self.own[known].unsqueeze(1) <= level).double().T @ share
        # How many components of other parties there are for each other one of one's own.
        count = 1 / self.share[known]
        rivals = (len(self.share) - count) / (count - 1)
        by_chance = 1 - ((1 - wrong).unsqueeze(1) ** rivals) @ share
        tells = by_chance < 0.6
        # The largest of many differences is too large: each is less one standard error.
        by_chance = by_chance.clamp(0, 1)  # up to rounding it is
        error = (by_chance * (1 - by_chance) / len(share)).sqrt()
        excess = (cheap - by_chance - error) / (1 - by_chance)
        return float(excess[tells].max().clamp(0, 1)) if bool(tells.any()) else 0.0

    @property
    def nearness(self) -> float:
        """How dear the cheapest merges with any of ``S - 1`` other parties are, in the median, over
        the median of the least of ``S - 1`` merges within a party: about one if nothing is
        shared."""
        if not self.known_different:
            return 0.0
        least = self.wrong_price(1 - 2 ** (-1 / (self.num_parties - 1)))
        return self.right_price() / max(least, 1e-300)

    def scale(self, costs: Tensor) -> PriceScale:
        """The prices of the same merges in other units ``[M]``: as many are below a price as are
        below what it is in those."""
        return PriceScale(_levels(costs) - _MIDDLE, _levels(self.price) - _MIDDLE)


@dataclass(frozen=True)
class PriceScale:
    """The price in nats up to which two lone components share an atom, as a rising function of the
    dispersion T, and back: points between which logarithms are interpolated, and beyond which they
    have slope one.

    :ivar dispersions, prices: the logarithms of the points, rising.
    """

    dispersions: NDArray[np.float64]
    prices: NDArray[np.float64]

    def price(self, dispersion: float) -> float:
        """The price at a dispersion."""
        return _interpolated(dispersion, self.dispersions, self.prices)

    def dispersion(self, price: float) -> float:
        """The dispersion at a price."""
        return _interpolated(price, self.prices, self.dispersions)


def _interpolated(x: float, at: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    if not math.isfinite(x):
        return x
    v = math.log(max(x, 1e-300))
    inside = min(max(v, float(at[0])), float(at[-1]))
    return math.exp(float(np.interp(inside, at, y)) + v - inside)


def _levels(prices: Tensor) -> NDArray[np.float64]:
    """The logarithms of prices, sorted; zero is far below all others."""
    positive = prices[prices > 0]
    floor = 1e-12 * float(positive.median()) if len(positive) else 1e-300
    levels: NDArray[np.float64] = prices.clamp(min=floor).sort().values.log().numpy()
    return levels


def quantile(x: Tensor, weights: Tensor, q: float) -> float:
    """The quantile of the finite numbers of ``x``, of which each counts by its weight; that of
    :func:`torch.quantile` where all count alike, infinite if there are none."""
    known = x.isfinite()
    if not bool(known.any()):
        return math.inf
    value, order = x[known].sort()
    w = weights[known][order]
    middle = w.cumsum(0) - w / 2
    place = (middle - middle[0]) / (middle[-1] - middle[0]).clamp(min=1e-300)
    return float(np.interp(q, place.numpy(), value.numpy()))


def pairwise_spread(local: Mapping[str, Any]) -> float:
    """The standard deviation of the divergences between all pairs of different components."""
    divergence = _pairwise(local)
    different = ~torch.eye(len(divergence), dtype=torch.bool)
    return float(divergence[different].std()) if len(divergence) > 1 else 0.0


def _pairwise(local: Mapping[str, Any]) -> Tensor:
    """All divergences, summed over sites: ``[N, N]`` on the CPU."""
    return torch.stack([pairwise_kl(f, f) for f in local.values()]).sum(0).cpu()


def _dimensions(f: Factor | Masked) -> float:
    """The mean count of numbers in a component."""
    return f.dimensions if isinstance(f, Masked) else float(f.event_shape.numel())


def _informed(f: Factor | Masked) -> float:
    """The count of numbers in a component that the posteriors know something of: where they are as
    wide as their prior, components hardly differ in location. By how much more they do than they
    are wide, each number counts as a share."""
    factor, present = (f.factor, f.present) if isinstance(f, Masked) else (f, None)
    location = factor.location()
    if location is None or factor.family.scale is None:
        return _dimensions(f)
    variance = 1 / factor.precision
    w = torch.ones_like(location)
    if present is not None:
        w = w * present.reshape(*present.shape, *[1] * (w.dim() - present.dim()))
    count = w.sum(0).clamp(min=1)
    mean = (w * location).sum(0) / count
    spread = (w * (location - mean).square()).sum(0) / (count - 1).clamp(min=1)
    share = spread / (spread + (w * variance).sum(0) / count)
    if present is None:
        return float(share.sum())
    return _dimensions(f) * float((share * count).sum() / count.sum())


def _selection(mask: Tensor, dimensions: float) -> tuple[Tensor, Tensor]:
    """The places that are set, of a random selection of rows if there are many."""
    count, num_columns = mask.shape
    keep = max(1, min(_MAX_PAIRS, int(_MAX_NUMBERS / dimensions)) // num_columns)
    if count > keep:
        generator = torch.Generator().manual_seed(0)
        selected = torch.zeros(count, dtype=torch.bool)
        selected[torch.randperm(count, generator=generator)[:keep]] = True
        mask = mask & selected.unsqueeze(1)
    first, second = mask.nonzero().unbind(1)
    return first, second
