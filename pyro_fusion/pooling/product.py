# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Bayes' rule for independent data, and its tempered messages."""

from __future__ import annotations

from torch import Tensor

from pyro_fusion.families import Factor, kl, pairwise_kl
from pyro_fusion.pooling.base import Pooling, given

__all__ = ["Product", "temper"]


class Product(Pooling):
    """``min_q KL(q ‖ p0) + Σ_n w_n E_q[log p0 - log q_n]``: Bayes' rule for conditionally
    independent data, ``q ∝ p0 Π (q_n / p0)^w_n``. At the optimum the objective is minus the log
    evidence that the group shares one atom, and zero for a group of one.

    Source: Campbell & How, *Approximate Decentralized Bayesian Inference* (UAI 2014), eq. 4.
    """

    draws_from = "prior"
    name = "product"
    needs_prior = True
    normalised = False
    failure = (
        "is improper: some local posterior is wider than the prior. Give the prior that was "
        "really used as `prior`, or pool inclusively or exclusively"
    )

    def divergence(self, atoms: Factor, local: Factor) -> Tensor:
        return kl(atoms, local)

    def cost(self, atoms: Factor, local: Factor, prior: Factor | None = None) -> Tensor:
        one = given(prior).expand_batch(atoms.batch_shape)
        origin = atoms.location()  # nothing large cancels there
        from_prior = atoms.shift(origin).divergences(one.shift(origin))
        return pairwise_kl(atoms, local) - local.over_entries(from_prior)

    def pair_cost(self, atoms: Factor, local: Factor, prior: Factor | None = None) -> Tensor:
        return kl(atoms, local) - kl(atoms.within(local), given(prior))

    def opening(self, atoms: Factor, prior: Factor | None = None) -> Tensor:
        return kl(atoms, given(prior)).double()

    def coordinates(self, local: Factor) -> Tensor:
        return local.natural

    def from_coordinates(
        self, like: Factor, total: Tensor, weight: Tensor, prior: Factor | None = None
    ) -> Factor:
        return like.from_natural(total + (1 - weight) * given(prior).natural)

    def potential(self, local: Factor, prior: Factor | None = None) -> Tensor:
        return local.log_normalizer_over(given(prior))

    def group_potential(self, atoms: Factor, weight: Tensor, prior: Factor | None = None) -> Tensor:
        return atoms.log_normalizer_over(given(prior))


def temper(local: Factor, prior: Factor, weights: Tensor, dispersion: float) -> Factor:
    """The messages ``q_n / p0`` raised to ``w_n / T``: ``η_0 + (η_n - η_0) w_n / T``.

    :param local: batch shape ``[N]``; ``prior``: ``[1]``; ``weights``: ``[N]``.
    :raises ParameterError: if one is improper.
    """
    origin = local.location()
    shifted_prior = prior.expand_batch((len(weights),)).shift(origin)
    shifted = local.shift(origin)
    message = (shifted.natural - shifted_prior.natural) * (weights / dispersion).unsqueeze(1)
    with Product.telling():
        tempered = local.from_natural(shifted_prior.natural + message)
        tempered.check()
    return tempered.shift(origin, sign=1.0)
