# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""M-step: components and their groups in, atoms out, in each of the three poolings. Pure tensor
code. A pooling is a divergence and its barycentre; both steps of fusion take both from it, so
they always lower the same objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from pyro_fusion.errors import FusionError, ParameterError
from pyro_fusion.families import Factor, kl, pairwise_kl

__all__ = ["Exclusive", "Inclusive", "Pooling", "Product", "group_mean", "pooling_named"]


class Pooling(ABC):
    """How the members of a group become one atom.

    :cvar needs_base: whether the prior is needed.
    :cvar normalised: whether only the ratios of weights in a group matter.

    ``local`` has batch shape ``[N]`` (components of all parties), ``atoms`` ``[K]``, ``base``
    ``[1]`` (the prior of one atom; only ``product`` reads it).
    """

    name: ClassVar[str]
    needs_base: ClassVar[bool] = False
    normalised: ClassVar[bool] = True
    failure: ClassVar[str] = "is singular"

    @abstractmethod
    def divergence(self, atoms: Factor, local: Factor) -> Tensor:
        """The KL divergence of the pooling, in its direction, elementwise."""

    @abstractmethod
    def cost(self, atoms: Factor, local: Factor, base: Factor | None = None) -> Tensor:
        """``D(k; n)``, what component ``n`` adds to the objective in atom ``k``: ``[K, N]``."""

    def opening(self, atoms: Factor, base: Factor | None = None) -> Tensor:
        """What an atom adds to the objective by itself: ``[K]``."""
        return torch.zeros(atoms.batch_shape, dtype=torch.float64, device=atoms.device)

    @abstractmethod
    def statistics(self, local: Factor, base: Factor | None = None) -> Tensor:
        """The coordinates that this pooling adds up over a group: ``[N, P]``."""

    @abstractmethod
    def from_statistics(
        self, like: Factor, total: Tensor, weight: Tensor, base: Factor | None = None
    ) -> Factor:
        """Atoms from the weighted sums of statistics, ``[K, P]`` and ``[K]``."""

    @abstractmethod
    def potential(self, local: Factor, base: Factor | None = None) -> Tensor:
        """What a component adds to its group's objective whatever the group: ``[N]``."""

    @abstractmethod
    def group_potential(self, atoms: Factor, weight: Tensor, base: Factor | None = None) -> Tensor:
        """What the group's optimal atom takes off: ``[K]``. The objective of a group is
        ``Σ_n w_n potential_n - group_potential``, with no sum over pairs."""

    def barycenter(
        self,
        local: Factor,
        groups: Tensor,
        num_atoms: int,
        weights: Tensor | None = None,
        base: Factor | None = None,
    ) -> Factor:
        """The atoms that minimise ``Σ_n w_n D(groups[n]; n)`` plus their opening costs.

        :param local: batch shape ``[N]``.
        :param groups: the atom of each component, LongTensor ``[N]``; every atom has at least one.
        :param num_atoms: K.
        :param weights: ``[N]``, non-negative, with a positive sum in each group; ones by default.
        :param base: batch shape ``[1]``.
        :raises ParameterError: if an atom is empty, or ``product`` is improper.
        """
        w = local.natural.new_ones(len(groups)) if weights is None else weights.double()
        empty = (torch.bincount(groups, minlength=num_atoms) == 0).nonzero().flatten().tolist()
        if empty:
            raise ParameterError(f"atoms {empty} have no component")
        weight = w.new_zeros(num_atoms).index_add(0, groups, w)
        # Where only parties of weight zero have an atom, they count alike.
        w = torch.where(weight[groups] > 0, w, 1.0) if self.normalised else w
        weight = w.new_zeros(num_atoms).index_add(0, groups, w)
        origin = group_mean(local.location(), groups, w, weight)
        shifted = local if origin is None else local.shift(origin[groups])
        own_base = None  # the prior in the coordinates of each component's group
        if base is not None:
            base = base.expand_batch((num_atoms,)).shift(origin)
            own_base = base.index_select(0, groups)
        statistics = self.statistics(shifted, own_base)
        total = statistics.new_zeros(num_atoms, statistics.shape[1])
        total = total.index_add(0, groups, statistics * w.unsqueeze(1))
        try:
            atoms = self.from_statistics(local, total, weight, base)
            atoms.check()
        except (torch.linalg.LinAlgError, FusionError) as e:
            raise ParameterError(f"the {self.name} barycentre {self.failure}") from e
        return atoms.shift(origin, sign=1.0).to(dtype=local.dtype)


class Inclusive(Pooling):
    """``min_q Σ_n w_n KL(q_n ‖ q)``: the mean of the mean parameters, that is moment matching;
    the mixture of the group, projected."""

    name = "inclusive"

    def divergence(self, atoms: Factor, local: Factor) -> Tensor:
        return kl(local, atoms)

    def cost(self, atoms: Factor, local: Factor, base: Factor | None = None) -> Tensor:
        return pairwise_kl(local, atoms).mT

    def statistics(self, local: Factor, base: Factor | None = None) -> Tensor:
        return local.mean

    def from_statistics(
        self, like: Factor, total: Tensor, weight: Tensor, base: Factor | None = None
    ) -> Factor:
        return like.to(dtype=torch.float64).from_mean(total / weight.unsqueeze(1))

    def potential(self, local: Factor, base: Factor | None = None) -> Tensor:
        return _negative_entropy(local)

    def group_potential(self, atoms: Factor, weight: Tensor, base: Factor | None = None) -> Tensor:
        return weight * _negative_entropy(atoms)


class Exclusive(Pooling):
    """``min_q Σ_n w_n KL(q ‖ q_n)``: the mean of the natural parameters, the log-linear pool.

    Source: Claici et al. (ICML 2020), prop. 1.
    """

    name = "exclusive"

    def divergence(self, atoms: Factor, local: Factor) -> Tensor:
        return kl(atoms, local)

    def cost(self, atoms: Factor, local: Factor, base: Factor | None = None) -> Tensor:
        return pairwise_kl(atoms, local)

    def statistics(self, local: Factor, base: Factor | None = None) -> Tensor:
        return local.natural

    def from_statistics(
        self, like: Factor, total: Tensor, weight: Tensor, base: Factor | None = None
    ) -> Factor:
        return like.to(dtype=torch.float64).from_natural(total / weight.unsqueeze(1))

    def potential(self, local: Factor, base: Factor | None = None) -> Tensor:
        return local.log_normalizer

    def group_potential(self, atoms: Factor, weight: Tensor, base: Factor | None = None) -> Tensor:
        return weight * atoms.log_normalizer


class Product(Pooling):
    """``min_q KL(q ‖ p0) + Σ_n w_n E_q[log p0 - log q_n]``: Bayes' rule for conditionally
    independent data, ``q ∝ p0 Π (q_n / p0)^w_n``. At the optimum the objective is minus the log
    evidence that the group shares one atom, and zero for a group of one.

    Source: Campbell & How, *Approximate Decentralized Bayesian Inference* (UAI 2014), eq. 4.
    """

    name = "product"
    needs_base = True
    normalised = False
    failure = (
        "is improper: some local posterior is wider than the prior. Give the prior that was "
        "really used as `base`, or pool inclusively or exclusively"
    )

    def divergence(self, atoms: Factor, local: Factor) -> Tensor:
        return kl(atoms, local)

    def cost(self, atoms: Factor, local: Factor, base: Factor | None = None) -> Tensor:
        return pairwise_kl(atoms, local) - self.opening(atoms, base).unsqueeze(1)

    def opening(self, atoms: Factor, base: Factor | None = None) -> Tensor:
        return kl(atoms, _given(base)).double()

    def statistics(self, local: Factor, base: Factor | None = None) -> Tensor:
        return local.natural - _given(base).natural

    def from_statistics(
        self, like: Factor, total: Tensor, weight: Tensor, base: Factor | None = None
    ) -> Factor:
        return like.to(dtype=torch.float64).from_natural(total + _given(base).natural)

    def potential(self, local: Factor, base: Factor | None = None) -> Tensor:
        return local.log_normalizer - _given(base).log_normalizer

    def group_potential(self, atoms: Factor, weight: Tensor, base: Factor | None = None) -> Tensor:
        return atoms.log_normalizer - _given(base).log_normalizer


def _given(base: Factor | None) -> Factor:
    if base is None:
        raise ParameterError("pooling 'product' needs the prior of one atom as `base`")
    return base


def _negative_entropy(f: Factor) -> Tensor:
    """``A*(μ) = <η, μ> - A(η)``, the negative entropy relative to the carrier measure."""
    return (f.natural * f.mean).sum(-1) - f.log_normalizer


def group_mean(loc: Tensor | None, groups: Tensor, w: Tensor, weight: Tensor) -> Tensor | None:
    """Weighted mean location of each group, ``[K, ...]``: statistics are taken about it."""
    if loc is None:
        return None
    trailing = (1,) * (loc.dim() - 1)
    total = loc.new_zeros((len(weight), *loc.shape[1:]))
    total = total.index_add(0, groups, loc * w.reshape(-1, *trailing))
    return total / weight.clamp(min=1e-300).reshape(-1, *trailing)


_POOLINGS: dict[str, Pooling] = {p.name: p for p in (Inclusive(), Exclusive(), Product())}


def pooling_named(pooling: str | Pooling) -> Pooling:
    """Look up a pooling by name.

    :raises ParameterError: for an unknown name.
    """
    if isinstance(pooling, Pooling):
        return pooling
    if not isinstance(pooling, str) or pooling not in _POOLINGS:
        raise ParameterError(f"pooling must be one of {sorted(_POOLINGS)}, got {pooling!r}")
    return _POOLINGS[pooling]
