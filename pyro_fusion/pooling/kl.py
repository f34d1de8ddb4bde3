# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The two KL barycentres: the mixture of a group, projected, and its log-linear pool."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from pyro_fusion.families import Factor, kl, pairwise_kl
from pyro_fusion.families.masked import Masked
from pyro_fusion.pooling.additive import AdditivePooling
from pyro_fusion.pooling.merges import Merges, PriceScale

__all__ = ["Exclusive", "Inclusive"]


class _KL(AdditivePooling):
    """The parts that both directions of the KL divergence have in common."""

    def cost_over_entries(
        self, atoms: Masked, local: Masked, prior: Factor | None = None
    ) -> Tensor:
        return self.pairs(atoms, local)

    def cost(self, atoms: Factor, local: Factor, prior: Factor | None = None) -> Tensor:
        return self.pairs(atoms, local)

    @abstractmethod
    def pairs(self, atoms: Factor | Masked, local: Factor | Masked) -> Tensor:
        """All divergences, by one matrix product: ``[K, N]``."""

    def absent(
        self, local: Factor, weights: Tensor, averaged: bool, prior: Factor | None = None
    ) -> Factor:
        if prior is not None:
            return prior
        # The width of the one is that of an entry, of the other that of all entries.
        how: AdditivePooling = Exclusive() if averaged else Inclusive()
        return how.barycenter(local, torch.zeros_like(weights, dtype=torch.long), 1, weights)


class Inclusive(_KL):
    """``min_q Σ_n w_n KL(q_n ‖ q)``: the mean of the mean parameters, that is moment matching;
    the mixture of the group, projected."""

    name = "inclusive"
    draws_from = "atoms"

    def divergence(self, atoms: Factor, local: Factor) -> Tensor:
        return kl(local, atoms)

    def pairs(self, atoms: Factor | Masked, local: Factor | Masked) -> Tensor:
        return pairwise_kl(local, atoms).mT

    def coordinates(self, local: Factor) -> Tensor:
        return local.mean

    def from_coordinates(
        self, like: Factor, total: Tensor, weight: Tensor, prior: Factor | None = None
    ) -> Factor:
        return like.from_mean(total / weight)

    def potential(self, local: Factor, prior: Factor | None = None) -> Tensor:
        return local.dual

    def group_potential(self, atoms: Factor, weight: Tensor, prior: Factor | None = None) -> Tensor:
        return weight * atoms.dual


class Exclusive(_KL):
    """``min_q Σ_n w_n KL(q ‖ q_n)``: the mean of the natural parameters, the log-linear pool.

    Source: Claici et al. (ICML 2020), prop. 1.
    """

    name = "exclusive"
    draws_from = "local"
    log_linear = True

    def divergence(self, atoms: Factor, local: Factor) -> Tensor:
        return kl(atoms, local)

    def pairs(self, atoms: Factor | Masked, local: Factor | Masked) -> Tensor:
        return pairwise_kl(atoms, local)

    def coordinates(self, local: Factor) -> Tensor:
        return local.natural

    def from_coordinates(
        self, like: Factor, total: Tensor, weight: Tensor, prior: Factor | None = None
    ) -> Factor:
        return like.from_natural(total / weight)

    def potential(self, local: Factor, prior: Factor | None = None) -> Tensor:
        return local.log_normalizer

    def group_potential(self, atoms: Factor, weight: Tensor, prior: Factor | None = None) -> Tensor:
        return weight * atoms.log_normalizer

    def outgoing_weights(self, local: Factor) -> Tensor:
        """One over the standard deviation: half-way, in logarithms, between counting alike and by
        precision, as barycentres do, which a party that is overconfident would rule."""
        return local.precision.sqrt()

    def scale(self, merges: Merges, low: float, high: float) -> PriceScale:
        return PriceScale(np.zeros(1), np.zeros(1))  # prices are in its units
