# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Bayes' rule for independent data, and its tempered messages."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyro_fusion.assignment.priors import AssignmentPrior, IndianBuffetPrior
from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor, kl, pairwise_kl
from pyro_fusion.families.masked import Masked, entries_of
from pyro_fusion.pooling.additive import AdditivePooling
from pyro_fusion.pooling.merges import WRONG, Merges, PriceScale

__all__ = ["Product"]

# Pairs, of the cheapest and of one party, that tell what evidence there is for a merge.
_MAX_EVIDENCE = 200
_BISECTIONS = 12

# Values of T in its scale of prices, how many above 1, and below, where messages are made surer.
_STEP, _MAX_ABOVE, _MAX_BELOW = 3.0, 40, 4


class Product(AdditivePooling):
    """``min_q KL(q ‖ p0) + Σ_n w_n E_q[log p0 - log q_n]``: Bayes' rule for conditionally
    independent data, ``q ∝ p0 Π (q_n / p0)^w_n``. At the optimum the objective is minus the log
    evidence that the group shares one atom, and zero for a group of one.

    Source: Campbell & How, *Approximate Decentralized Bayesian Inference* (UAI 2014), eq. 4.
    """

    name = "product"
    needs_prior = True
    draws_from = "prior"
    normalised = False
    convex = False
    averages_outgoing = False
    tempers = True
    failure = (
        "is improper: some local posterior is wider than the prior. Give the prior that was "
        "really used as `prior`, or pool inclusively or exclusively"
    )

    def divergence(self, atoms: Factor, local: Factor) -> Tensor:
        return kl(atoms, local)

    def cost(self, atoms: Factor, local: Factor, prior: Factor | None = None) -> Tensor:
        one = self.given(prior).expand_batch(atoms.batch_shape)
        return pairwise_kl(atoms, local) - _from_prior(atoms, one).unsqueeze(1)

    def cost_over_entries(
        self, atoms: Masked, local: Masked, prior: Factor | None = None
    ) -> Tensor:
        one = entries_of(self.given(prior), len(atoms.mass))
        from_prior = _from_prior(atoms.entries, one).reshape(atoms.mass.shape)
        return pairwise_kl(atoms, local) - (atoms.present * from_prior) @ local.present.mT

    def pair_cost(self, atoms: Factor, local: Factor, prior: Factor | None = None) -> Tensor:
        return kl(atoms, local) - kl(atoms, self.given(prior))

    def opening(self, atoms: Factor, prior: Factor | None = None) -> Tensor:
        return kl(atoms, self.given(prior)).double()

    def coordinates(self, local: Factor) -> Tensor:
        return local.natural

    def from_coordinates(
        self, like: Factor, total: Tensor, weight: Tensor, prior: Factor | None = None
    ) -> Factor:
        return like.from_natural(total + (1 - weight) * self.given(prior).natural)

    def potential(self, local: Factor, prior: Factor | None = None) -> Tensor:
        return local.log_normalizer - self.given(prior).log_normalizer

    def group_potential(self, atoms: Factor, weight: Tensor, prior: Factor | None = None) -> Tensor:
        return atoms.log_normalizer - self.given(prior).log_normalizer

    def default_assignment_prior(self) -> AssignmentPrior:
        """The buffet: it is at home where there is evidence that components agree."""
        return IndianBuffetPrior()

    def temper(self, local: Factor, prior: Factor, weights: Tensor, dispersion: float) -> Factor:
        """The messages ``q_n / p0`` raised to ``w_n / T``: ``η_0 + (η_n - η_0) w_n / T``, for which
        the evidence is exact.

        :param local: batch shape ``[N]``; ``prior``: ``[1]``; ``weights``: ``[N]``.
        :raises ParameterError: if one is improper.
        """
        origin = local.location()
        shifted_prior = prior.expand_batch((len(weights),)).shift(origin)
        shifted = local.shift(origin)
        message = (shifted.natural - shifted_prior.natural) * (weights / dispersion).unsqueeze(1)
        with self.telling():
            tempered = local.from_natural(shifted_prior.natural + message)
            tempered.check()
        return tempered.shift(origin, sign=1.0)

    def dispersion(self, merges: Merges, limit: float) -> float:
        """The T at which tempered messages at the limit are as well merged as not, or, if it is
        less, that at which those of pairs of one party are, by bisection; at least 1."""
        price = self._price(merges)
        wrong = merges.wrong[:: math.ceil(len(merges.wrong) / _MAX_EVIDENCE) or 1]

        def too_low(dispersion: float) -> bool:
            """True if a merge at the limit, and wrong ones, do not pay yet."""
            if price(dispersion) >= limit:
                return False
            own = self._disbelief(merges, wrong, dispersion)
            return not len(own) or float(own.quantile(WRONG)) > _new_atom(merges)

        low, high = 1.0, max(limit, 1.0)
        try:
            if not too_low(low):
                return low
            for _ in range(_BISECTIONS):
                middle = (low * high) ** 0.5
                low, high = (middle, high) if too_low(middle) else (low, middle)
        except ParameterError:  # improper: fusion itself will say which and why
            return 1.0
        return low

    def scale(self, merges: Merges, low: float, high: float) -> PriceScale:
        """The price at which tempered messages are as well merged as not, for T in steps."""
        price = self._price(merges)
        points = [(1.0, price(1.0))]
        while points[-1][1] < high and len(points) < _MAX_ABOVE:
            t = _STEP * points[-1][0]
            points.append((t, price(t)))
        try:
            for i in range(_MAX_BELOW):
                if points[0][1] > low:
                    t = _STEP ** -(i + 1)
                    points.insert(0, (t, price(t)))
        except ParameterError:  # messages to so high a power are improper
            pass
        dispersions, prices = np.log(points).T
        return PriceScale(dispersions, np.maximum.accumulate(prices))

    def _price(self, merges: Merges) -> Callable[[float], float]:
        """A function of T: the price at which tempered messages are as well merged as not. For what
        a merge costs beyond its price over T, the sign is that of the evidence for it."""
        cheapest = merges.price.argsort(stable=True)[:_MAX_EVIDENCE]

        def at(dispersion: float) -> float:
            beyond = self._disbelief(merges, cheapest, dispersion)
            beyond = beyond - merges.price[cheapest] / dispersion
            return dispersion * max(_new_atom(merges) - float(beyond.median()), 1e-300)

        return at

    def _disbelief(self, merges: Merges, pairs: Tensor, dispersion: float) -> Tensor:
        """Minus the log evidence that each of some pairs shares an atom, tempered: ``[len(pairs)]``
        on the CPU.

        :raises ParameterError: where a message is improper.
        """
        both = torch.cat([merges.first[pairs], merges.second[pairs]])
        groups = torch.arange(len(pairs)).repeat(2)
        cost = torch.zeros(len(pairs), dtype=torch.float64)
        for site, f in merges.local.items():
            part = f.index_select(0, both)
            index, one = groups.to(part.device), merges.prior[site]
            weights = torch.ones(len(both), dtype=torch.float64, device=part.device)
            how = self.suited(part)
            part = how.temper(part, one, weights, dispersion)
            atoms = how.barycenter(part, index, len(pairs), weights, one)
            value = how.pair_cost(atoms.index_select(0, index), part, one)
            cost += (value.reshape(2, -1).sum(0) + how.opening(atoms, one)).double().cpu()
        return cost


def _new_atom(merges: Merges) -> float:
    """The price that the assignment prior puts on one more atom: halfway between that of two lone
    components (nothing) and that of one that joins half of all parties."""
    return math.log(merges.num_parties) / 2


def _from_prior(atoms: Factor, prior: Factor) -> Tensor:
    """``KL(atom ‖ prior)``, one by one, not clamped."""
    origin = atoms.location()  # nothing large cancels there
    return atoms.shift(origin).divergence(prior.shift(origin))
