# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The two KL barycentres: the mixture of a group, projected, and its log-linear pool."""

from __future__ import annotations

from torch import Tensor

from pyro_fusion.families import Factor, kl, pairwise_kl
from pyro_fusion.pooling.base import Pooling

__all__ = ["Exclusive", "Inclusive"]


class Inclusive(Pooling):
    """``min_q Σ_n w_n KL(q_n ‖ q)``: the mean of the mean parameters, that is moment matching;
    the mixture of the group, projected."""

    draws_from = "atoms"
    name = "inclusive"

    def divergence(self, atoms: Factor, local: Factor) -> Tensor:
        return kl(local, atoms)

    def cost(self, atoms: Factor, local: Factor, prior: Factor | None = None) -> Tensor:
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
        return atoms.weighted_dual(weight)


class Exclusive(Pooling):
    """``min_q Σ_n w_n KL(q ‖ q_n)``: the mean of the natural parameters, the log-linear pool.

    Source: Claici et al. (ICML 2020), prop. 1.
    """

    draws_from = "local"
    name = "exclusive"

    def divergence(self, atoms: Factor, local: Factor) -> Tensor:
        return kl(atoms, local)

    def cost(self, atoms: Factor, local: Factor, prior: Factor | None = None) -> Tensor:
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
        return atoms.weighted_log_normalizer(weight)
