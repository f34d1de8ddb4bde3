# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The base class of poolings: a divergence and its barycentre. Both steps of fusion take these, so
that they always lower the same objective; and all that is otherwise asked of it. Pure tensor code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_fusion.assignment.priors import AssignmentPrior, GroupNormPrior
from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor
from pyro_fusion.families.masked import Masked, entries_of
from pyro_fusion.pooling.groups import group_sizes
from pyro_fusion.pooling.merges import Merges, PriceScale

__all__ = ["Entrywise", "Pooling"]

# Numbers in the pairs whose divergences are computed at a time, one by one.
_NUMBERS = 1 << 22


class Pooling(ABC):
    """The rule by which the components of a group become one atom. To make one, write
    :meth:`divergence` and :meth:`barycenter`; where the best atom of a group is a function of sums
    over it, subclass :class:`~pyro_fusion.pooling.AdditivePooling`: the search then has more moves,
    and cheaper ones.

    ``local`` has batch shape ``[N]`` (components of all parties), ``atoms`` ``[K]``, ``prior``
    ``[1]`` (the prior of one atom, None unless the pooling needs it).

    :ivar name: its name, in results and messages.
    :ivar needs_prior: whether the prior of the local models must be read and is passed on.
    :ivar draws_from: whose draws the sites of its Pyro model are: those of the ``"local"``
        posteriors, with the atoms in the guide; of the ``"atoms"``, with the local posteriors in
        the guide; or of the ``"prior"``, with the local posteriors as factors. None where there is
        no such program: :func:`~pyro_fusion.fuse` works, and ``FusionModel`` says that it does not.
        A subclass with a divergence or costs of its own has none until it says so.
    :ivar normalised: whether only the ratios of weights in a group matter.
    :ivar convex: whether the cost of an assignment to given atoms is a sum over its pairs alone,
        without :meth:`opening`, as the relaxed solver needs it.
    :ivar averages_outgoing: whether effects of what some parties lack (``Posterior.outgoing``) are
        averages over all parties, by :meth:`outgoing_weights`.
    :ivar tempers: whether weights and dispersion are moved into the components, by :meth:`temper`,
        before an assignment is scored.
    :ivar log_linear: whether it is the log-linear pool, in whose units the prices of merges are.
    :ivar failure: what is wrong where sums of members of the family are no member.
    """

    name: str
    needs_prior: bool = False
    draws_from: Literal["local", "atoms", "prior"] | None = None
    normalised: bool = True
    convex: bool = True
    averages_outgoing: bool = True
    tempers: bool = False
    log_linear: bool = False
    failure: str = "is singular"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The program of the base class is that of another objective.
        changed = {"divergence", "cost", "pair_cost", "opening"} & set(cls.__dict__)
        if changed and "draws_from" not in cls.__dict__:
            cls.draws_from = None

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
        """The part of the objective that each component adds in an atom of its own: ``[N]``."""
        return self.divergence(atoms, local)

    def opening(self, atoms: Factor, prior: Factor | None = None) -> Tensor:
        """The part of the objective that an atom adds by itself: ``[K]``."""
        return torch.zeros(atoms.batch_shape, dtype=torch.float64, device=atoms.device)

    def cost_over_entries(
        self, atoms: Masked, local: Masked, prior: Factor | None = None
    ) -> Tensor:
        """:meth:`cost` summed over the entries that both have, ``[K, N]``; by default entry by
        entry.

        :param prior: batch shape ``[1]``, with the entries on its first event axis.
        """
        shape = (len(atoms.mass), len(local.mass))
        total = torch.zeros(shape, dtype=torch.float64, device=local.device)
        for j in range(local.mass.shape[1]):
            one = None if prior is None else _entry(prior, j)
            cost = self.cost(_entry(atoms.factor, j), _entry(local.factor, j), one)
            total += cost * atoms.present[:, j].unsqueeze(1) * local.present[:, j]
        return total

    def suited(self, local: Factor | Masked) -> Pooling:
        """The pooling of these components: where they miss entries, that by entries."""
        return Entrywise(self) if isinstance(local, Masked) else self

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
        """A context in which sums of statistics may be no member of the family: the error is a
        ParameterError that says so."""
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

    def outgoing_weights(self, local: Factor) -> Tensor:
        """The weight of each number of each component where effects are averaged over the parties,
        of the shape of its location: one by default."""
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

    def dispersion(self, merges: Merges, limit: float) -> float:
        """T, given the price up to which two components may be the same, in nats."""
        return self.scale(merges, limit, limit).dispersion(limit)

    def scale(self, merges: Merges, low: float, high: float) -> PriceScale:
        """The price in nats up to which two lone components share an atom at each T, at least from
        ``low`` to ``high``. By default that of merges that cost T in this pooling."""
        return merges.scale(
            self.merge_costs(merges.local, merges.first, merges.second, merges.prior)
        )

    def merge_costs(
        self,
        local: Mapping[str, Any],
        first: Tensor,
        second: Tensor,
        prior: Mapping[str, Factor],
    ) -> Tensor:
        """The objective of each pair of components in its best atom, summed over sites: ``[M]`` on
        the CPU, never negative."""
        total = torch.zeros(len(first), dtype=torch.float64)
        for site, f in local.items():
            one = prior.get(site)
            total += self.suited(f).pair_objective(f, first, second, one).clamp(min=0)
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


class Entrywise(Pooling):
    """The pooling of components of which entries are missing (:class:`Masked`), from that of one
    entry: each is pooled by itself, from the components that have it."""

    def __init__(self, pooling: Pooling) -> None:
        self.pooling = pooling
        self.name, self.failure = pooling.name, pooling.failure
        self.needs_prior, self.normalised = pooling.needs_prior, pooling.normalised

    def divergence(self, atoms: Any, local: Any) -> Tensor:
        return _summed(atoms, local, self.pooling.divergence(atoms.entries, local.entries))

    def cost(self, atoms: Any, local: Any, prior: Factor | None = None) -> Tensor:
        return self.pooling.cost_over_entries(atoms, local, prior)

    def pair_cost(self, atoms: Any, local: Any, prior: Factor | None = None) -> Tensor:
        one = self.priors(prior, len(atoms.mass))
        return _summed(atoms, local, self.pooling.pair_cost(atoms.entries, local.entries, one))

    def opening(self, atoms: Any, prior: Factor | None = None) -> Tensor:
        one = self.priors(prior, len(atoms.mass))
        return _summed(atoms, atoms, self.pooling.opening(atoms.entries, one))

    def temper(self, local: Any, prior: Factor, weights: Tensor, dispersion: float) -> Any:
        count, size = local.mass.shape
        one, w = entries_of(prior, count), weights.repeat_interleave(size)
        return Masked.of_entries(self.pooling.temper(local.entries, one, w, dispersion), local.mass)

    def barycenter(
        self,
        local: Any,
        groups: Tensor,
        num_atoms: int,
        weights: Tensor | None = None,
        prior: Factor | None = None,
    ) -> Any:
        w, _ = self.group_weights(groups, num_atoms, weights)
        size = local.mass.shape[1]
        n, j = local.present.nonzero().unbind(1)
        there, place = (groups[n] * size + j).unique(return_inverse=True)
        one = None if prior is None else prior.map(lambda v: v[:, 0])  # that of any entry
        entries = local.entries.index_select(0, n * size + j)
        found = self.pooling.barycenter(entries, place, len(there), w[n], one)
        # What nobody has is as in the first component: of the family, and not looked at.
        rest = local.factor.map(lambda v: v[:1].expand(num_atoms, *v.shape[1:]).flatten(0, 1))
        mass = torch.zeros(num_atoms * size, dtype=torch.float64, device=local.device)
        mass = mass.index_add(0, there[place], w[n])
        return Masked.of_entries(rest.index_copy(there, found), mass.unflatten(0, (-1, size)))

    def priors(self, prior: Factor | None, count: int) -> Factor | None:
        """The prior of each entry of ``count`` atoms, ``[count * J]``."""
        return None if prior is None else entries_of(prior, count)


def _summed(a: Masked, b: Masked, x: Tensor) -> Tensor:
    """Numbers ``[N * J]`` summed over the entries that both have: ``[N]``."""
    return (a.present * b.present * x.reshape(a.mass.shape)).sum(-1)


def _entry(f: Factor, j: int) -> Factor:
    """The entry ``j`` of each component."""
    return f.map(lambda v: v[:, j])
