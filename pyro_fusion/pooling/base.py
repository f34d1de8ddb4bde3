# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What a pooling is: a divergence and its barycentre, from which both steps of fusion are taken, so
that they always lower the same objective; and all that is otherwise asked of it. Pure tensor code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pyro_fusion.assignment.priors import AssignmentPrior, GroupNormPrior
from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor
from pyro_fusion.pooling.groups import group_sizes
from pyro_fusion.pooling.merges import Merges

__all__ = ["Pooling"]

# Numbers in the pairs whose divergences are computed at a time, one by one.
_NUMBERS = 1 << 22


class Pooling(ABC):
    """How the components of a group become one atom. To make one, write :meth:`divergence` and
    :meth:`barycenter`; where the best atom of a group is a function of sums over it, subclass
    :class:`~pyro_fusion.pooling.AdditivePooling`, and moves of the search are cheaper and more.

    ``local`` has batch shape ``[N]`` (components of all parties), ``atoms`` ``[K]``, ``prior``
    ``[1]`` (the prior of one atom, None unless the pooling needs it).

    :cvar name: its name, in results and messages.
    :cvar needs_prior: whether the prior of the local models must be read and is passed on.
    :cvar draws_from: whose draws the sites of its Pyro model are: those of the ``"local"``
        posteriors, with the atoms in the guide; of the ``"atoms"``, with the local posteriors in
        the guide; or of the ``"prior"``, with the local posteriors as factors. None where there is
        no such program: :func:`~pyro_fusion.fuse` works, and ``FusionModel`` says that it does not.
    :cvar normalised: whether only the ratios of weights in a group matter.
    :cvar convex: whether the cost of an assignment to given atoms is a sum over its pairs alone,
        without :meth:`opening`, as the relaxed solver needs it.
    :cvar averages_outgoing: whether effects of what some parties lack (``Posterior.outgoing``) are
        averages over all parties, by :meth:`say`.
    :cvar tempers: whether weights and dispersion are moved into the components, by :meth:`temper`,
        before an assignment is scored.
    :cvar failure: what is wrong where sums of members of the family are no member.
    """

    name: ClassVar[str]
    needs_prior: ClassVar[bool] = False
    draws_from: ClassVar[Literal["local", "atoms", "prior"] | None] = None
    normalised: ClassVar[bool] = True
    convex: ClassVar[bool] = True
    averages_outgoing: ClassVar[bool] = True
    tempers: ClassVar[bool] = False
    failure: ClassVar[str] = "is singular"

    # -- the divergence and its barycentre -------------------------------------------------------

    @abstractmethod
    def divergence(self, atoms: Factor, local: Factor) -> Tensor:
        """The divergence of each component from an atom of its own, ``[N]``, not negative."""

    @abstractmethod
    def barycenter(
        self,
        local: Factor,
        groups: Tensor,
        num_atoms: int,
        weights: Tensor | None = None,
        prior: Factor | None = None,
    ) -> Factor:
        """The atoms that minimise ``Σ_n w_n D(groups[n]; n)`` plus their opening costs; of the
        family and dtype of ``local``. :meth:`~pyro_fusion.pooling.Pooling.group_weights` checks
        groups and weights.

        :param local: batch shape ``[N]``.
        :param groups: the atom of each component, LongTensor ``[N]``; every atom has at least one.
        :param num_atoms: K.
        :param weights: ``[N]``, non-negative; ones by default.
        :param prior: batch shape ``[1]``.
        :raises ParameterError: if an atom is empty, or no member of the family.
        """

    def cost(self, atoms: Factor, local: Factor, prior: Factor | None = None) -> Tensor:
        """``D(k; n)``, what component ``n`` adds to the objective in atom ``k``: ``[K, N]``. By
        default pair by pair."""
        shape = (*atoms.batch_shape, *local.batch_shape)
        pairs = torch.cartesian_prod(*(torch.arange(n, device=local.device) for n in shape))
        step = max(1, _NUMBERS // max(1, local.base_shape[1:].numel()))
        parts = [
            self.pair_cost(atoms.index_select(0, k), local.index_select(0, n), prior)
            for k, n in (rows.unbind(1) for rows in pairs.split(step))
        ]
        return torch.cat(parts).reshape(shape)

    def pair_cost(self, atoms: Factor, local: Factor, prior: Factor | None = None) -> Tensor:
        """What each component adds to the objective in an atom of its own: ``[N]``."""
        return self.divergence(atoms, local)

    def opening(self, atoms: Factor, prior: Factor | None = None) -> Tensor:
        """What an atom adds to the objective by itself: ``[K]``."""
        return torch.zeros(atoms.batch_shape, dtype=torch.float64, device=atoms.device)

    def group_weights(
        self, groups: Tensor, num_atoms: int, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The weights of components ``[N]`` and of groups ``[K]``, positive and in float64, as
        :meth:`barycenter` is given them: where only parties of weight zero have an atom, they count
        alike.

        :raises ParameterError: if an atom is empty.
        """
        w = torch.ones_like(groups, dtype=torch.float64) if weights is None else weights.double()
        count, weight = group_sizes(groups, w, num_atoms)
        # Read at once: a GPU waits meanwhile.
        filled, weighed = torch.stack([count.all(), weight.all()]).tolist()
        if not filled:
            empty = (count == 0).nonzero().flatten().tolist()
            raise ParameterError(f"atoms {empty} have no component")
        if self.normalised and not weighed:
            w = torch.where(weight[groups] > 0, w, 1.0)
            _, weight = group_sizes(groups, w, num_atoms)
        return w, weight

    def given(self, prior: Factor | None) -> Factor:
        """The prior, of a pooling that needs it.

        :raises ParameterError: if there is none.
        """
        if prior is None:
            raise ParameterError(f"pooling {self.name!r} needs the prior of one atom as `prior`")
        return prior

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Where sums of statistics may be no member of the family: a ParameterError says so."""
        try:
            yield
        except (torch.linalg.LinAlgError, ValueError) as e:
            raise ParameterError(f"the {self.name} barycentre {self.failure}") from e

    # -- what else fusion asks of it --------------------------------------------------------------

    def default_assignment_prior(self) -> AssignmentPrior:
        """The belief of how components share atoms where none is given."""
        return GroupNormPrior()

    def temper(self, local: Factor, prior: Factor, weights: Tensor, dispersion: float) -> Factor:
        """The components ``[N]`` with weights ``[N]`` and dispersion moved into them; called where
        ``tempers`` is set.

        :raises ParameterError: if one is improper then.
        """
        raise NotImplementedError(f"pooling {self.name!r} does not temper its components")

    def say(self, local: Factor) -> Tensor:
        """By how much each number of each component counts where effects are averaged over the
        parties, of the shape of its location: alike by default."""
        return torch.ones_like(local.precision)

    def absent(
        self, local: Factor, weights: Tensor, averaged: bool, prior: Factor | None = None
    ) -> Factor:
        """An entry that no party has, of batch shape ``[1]``: the prior where it is known, else the
        barycentre of all entries ``[E]``.

        :param averaged: whether effects are averaged; of what is returned the width alone counts
            then, and should be that of one entry, not of them all.
        """
        if prior is not None:
            return prior
        return self.barycenter(local, torch.zeros_like(weights, dtype=torch.long), 1, weights)

    def dispersion(self, merges: Merges) -> float:
        """T, given the price up to which two components may be the same. By default what a merge at
        that price costs in this pooling."""
        costs = self.merge_costs(merges.local, merges.first, merges.second, merges.prior)
        return merges.translated(costs)

    def merge_costs(
        self,
        local: Mapping[str, Factor],
        first: Tensor,
        second: Tensor,
        prior: Mapping[str, Factor],
    ) -> Tensor:
        """The objective of each pair of components in its best atom, summed over sites: ``[M]`` on
        the CPU, never negative."""
        total = torch.zeros(len(first), dtype=torch.float64)
        for site, f in local.items():
            total += self.pair_objective(f, first, second, prior.get(site)).clamp(min=0)
        # What is too far apart to tell how far costs as much as the dearest of the others.
        known = total.isfinite()
        if not bool(known.any()):
            return total
        return torch.where(known, total, total[known].max())

    def pair_objective(
        self, local: Factor, first: Tensor, second: Tensor, prior: Factor | None = None
    ) -> Tensor:
        """The objective of each pair of components of ``local`` in its best atom: ``[M]`` on the
        CPU; NaN where that is singular."""
        pair = local.index_select(0, torch.cat([first, second]))
        groups = torch.arange(len(first), device=local.device).repeat(2)
        try:
            atoms = self.barycenter(pair, groups, len(first), None, prior)
            cost = self.pair_cost(atoms.index_select(0, groups), pair, prior)
            return (cost.double().reshape(2, -1).sum(0) + self.opening(atoms, prior)).cpu()
        except (ParameterError, torch.linalg.LinAlgError):
            if len(first) == 1:
                return torch.full((1,), torch.nan, dtype=torch.float64)
            half = len(first) // 2
            sides = (slice(half), slice(half, None))
            parts = [self.pair_objective(local, first[i], second[i], prior) for i in sides]
            return torch.cat(parts)
