# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""M-step: components and their groups in, atoms out, in each of the three poolings. Pure tensor
code. A pooling is a divergence and its barycentre; both steps of fusion take both from it, so
they always lower the same objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor

__all__ = ["FAR", "Pooling", "given", "group_mean"]

# An atom that lies less than the root of this from the origin, in units of its width, has ten
# digits or so after sums about that origin; others are summed about their own.
FAR = 1e6


class Pooling(ABC):
    """How the members of a group become one atom.

    :cvar needs_prior: whether the prior is needed.
    :cvar normalised: whether only the ratios of weights in a group matter.

    ``local`` has batch shape ``[N]`` (components of all parties), ``atoms`` ``[K]``, ``prior``
    ``[1]`` (the prior of one atom; only ``product`` reads it).
    """

    name: ClassVar[str]
    needs_prior: ClassVar[bool] = False
    draws_from: ClassVar[str | None] = None
    normalised: ClassVar[bool] = True
    failure: ClassVar[str] = "is singular"

    @abstractmethod
    def divergence(self, atoms: Factor, local: Factor) -> Tensor:
        """The KL divergence of the pooling, in its direction, elementwise."""

    @abstractmethod
    def cost(self, atoms: Factor, local: Factor, prior: Factor | None = None) -> Tensor:
        """``D(k; n)``, what component ``n`` adds to the objective in atom ``k``: ``[K, N]``."""

    def pair_cost(self, atoms: Factor, local: Factor, prior: Factor | None = None) -> Tensor:
        """The same of components in one atom each: ``[N]``."""
        return self.divergence(atoms, local)

    def opening(self, atoms: Factor, prior: Factor | None = None) -> Tensor:
        """What an atom adds to the objective by itself: ``[K]``."""
        return torch.zeros(atoms.batch_shape, dtype=torch.float64, device=atoms.device)

    @abstractmethod
    def coordinates(self, local: Factor) -> Tensor:
        """The coordinates in which this pooling adds up a group: ``[N, P]``."""

    @abstractmethod
    def from_coordinates(
        self, like: Factor, total: Tensor, weight: Tensor, prior: Factor | None = None
    ) -> Factor:
        """Atoms from the weighted sums of coordinates and of weights, ``[K, P]`` and ``[K, 1]``."""

    def statistics(self, local: Factor) -> Tensor:
        """What is added up over a group: ``[N, Q]``."""
        return local.summands(self.coordinates(local))

    def from_statistics(
        self, like: Factor, total: Tensor, weight: Tensor, prior: Factor | None = None
    ) -> Factor:
        """Atoms from the weighted sums of statistics, ``[K, Q]`` and ``[K]``."""
        sums, w, like = like.sums(total, weight, self.coordinates(like))
        return self.from_coordinates(like.to(dtype=torch.float64), sums, w, prior)

    @abstractmethod
    def potential(self, local: Factor, prior: Factor | None = None) -> Tensor:
        """What a component adds to its group's objective whatever the group: ``[N]``."""

    @abstractmethod
    def group_potential(self, atoms: Factor, weight: Tensor, prior: Factor | None = None) -> Tensor:
        """What the group's optimal atom takes off: ``[K]``. The objective of a group is
        ``Σ_n w_n potential_n - group_potential``, with no sum over pairs."""

    @classmethod
    @contextmanager
    def telling(cls) -> Iterator[None]:
        """Where sums of statistics may be no member of the family: a ParameterError says so."""
        try:
            yield
        except (torch.linalg.LinAlgError, ValueError) as e:
            raise ParameterError(f"the {cls.name} barycentre {cls.failure}") from e

    def barycenter(
        self,
        local: Factor,
        groups: Tensor,
        num_atoms: int,
        weights: Tensor | None = None,
        prior: Factor | None = None,
    ) -> Factor:
        """The atoms that minimise ``Σ_n w_n D(groups[n]; n)`` plus their opening costs.

        :param local: batch shape ``[N]``.
        :param groups: the atom of each component, LongTensor ``[N]``; every atom has at least one.
        :param num_atoms: K.
        :param weights: ``[N]``, non-negative, with a positive sum in each group; ones by default.
        :param prior: batch shape ``[1]``.
        :raises ParameterError: if an atom is empty, or ``product`` is improper.
        """
        w = torch.ones_like(groups, dtype=torch.float64) if weights is None else weights.double()
        if self.needs_prior:
            given(prior)
        count, weight = _sizes(groups, w, num_atoms)
        # Read at once: a GPU waits meanwhile.
        filled, weighed = torch.stack([count.all(), weight.all()]).tolist()
        if not filled:
            empty = (count == 0).nonzero().flatten().tolist()
            raise ParameterError(f"atoms {empty} have no component")
        if self.normalised and not weighed:
            # Where only parties of weight zero have an atom, they count alike.
            w = torch.where(weight[groups] > 0, w, 1.0)
            _, weight = _sizes(groups, w, num_atoms)
        # About one origin for all, where the statistics of `local` stay in its cache.
        origin = local.origin
        limit = torch.inf if origin is None else FAR * origin.numel()
        try:
            own = None if prior is None else prior.shift(origin)
            atoms = self._sum(local.centred, groups, w, weight, own)
            far = atoms.first.size > limit
        except (torch.linalg.LinAlgError, ValueError):  # perhaps for want of digits
            far = torch.ones_like(weight, dtype=torch.bool)
        if not bool(far.any()):
            return atoms.shift(origin, sign=1.0).to(dtype=local.dtype)
        members = far[groups].nonzero().squeeze(-1)
        index = (far.cumsum(0) - 1)[groups[members]]
        part = local.index_select(0, members)
        with self.telling():
            exact = self._sum_about_means(part, index, w[members], weight[far], prior)
        if not bool(far.all()):
            exact = atoms.shift(origin, sign=1.0).index_copy(far.nonzero().squeeze(-1), exact)
        return exact.to(dtype=local.dtype)

    def _sum(
        self, local: Factor, groups: Tensor, w: Tensor, weight: Tensor, prior: Factor | None
    ) -> Factor:
        """The atoms, in the coordinates that ``local`` and ``prior`` are in; a LinAlgError or a
        ValueError if one is no member of the family."""
        total = _group_sum(self.statistics(local), groups, w, len(weight))
        atoms = self.from_statistics(local, total, weight, prior)
        if not self.normalised:  # means of members are members, but these are no means
            atoms.family.build(atoms.params, validate_args=True)
        if not bool(atoms.first.size.isfinite().all()):
            raise ParameterError("natural or mean parameters are not finite")
        return atoms

    def _sum_about_means(
        self, local: Factor, groups: Tensor, w: Tensor, weight: Tensor, prior: Factor | None
    ) -> Factor:
        """The atoms, each summed about the mean location of its group: nothing cancels there."""
        origin = group_mean(local.location(), groups, w, weight)
        shifted = local if origin is None else local.shift(origin[groups])
        if prior is not None:
            prior = prior.expand_batch((len(weight),)).shift(origin)
        return self._sum(shifted, groups, w, weight, prior).shift(origin, sign=1.0)


def given(prior: Factor | None) -> Factor:
    if prior is None:
        raise ParameterError("pooling 'product' needs the prior of one atom as `prior`")
    return prior


# Sums over groups, in the same order each time. On a GPU by a matrix, no larger than the costs: to
# count, or to sort a sparse matrix, the host would have to wait for it.


def _members(groups: Tensor, num_groups: int) -> Tensor:
    """Which are of which group, ``[K, N]``."""
    return groups == torch.arange(num_groups, device=groups.device).unsqueeze(1)


def _sizes(groups: Tensor, w: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """How many there are in each group, and ``Σ_n w_n``: ``[K]``."""
    if w.device.type != "cpu":
        members = _members(groups, num_groups)
        return members.sum(1), members.to(w.dtype) @ w
    count = torch.bincount(groups, minlength=num_groups)
    return count, w.new_zeros(num_groups).index_add(0, groups, w)


def _group_sum(x: Tensor, groups: Tensor, w: Tensor, num_groups: int) -> Tensor:
    """``Σ_n w_n x_n`` over each group, ``[N, P] -> [K, P]``; on the CPU without a temporary."""
    if x.device.type != "cpu":
        return (_members(groups, num_groups) * w) @ x
    index = torch.stack([groups, torch.arange(len(groups))])
    shape = (num_groups, len(groups))
    return torch.sparse_coo_tensor(index, w, shape, check_invariants=False) @ x


def group_mean(loc: Tensor | None, groups: Tensor, w: Tensor, weight: Tensor) -> Tensor | None:
    """Weighted mean location of each group, ``[K, ...]``: statistics are taken about it."""
    if loc is None:
        return None
    total = _group_sum(loc.reshape(len(loc), -1), groups, w, len(weight))
    mean = total / weight.clamp(min=1e-300).unsqueeze(1)
    return mean.reshape(len(weight), *loc.shape[1:])
