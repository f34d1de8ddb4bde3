# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Sites with several labels, as the weights between two layers of hidden units: each party has a
block of entries, one for each pair of its components. For the assignment along one label, given
those along the others, they are columns of its components; for a barycentre, entries by
themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pyro_fusion.families import Factor
from pyro_fusion.families.masked import Masked
from pyro_fusion.pooling.components import Components
from pyro_fusion.posterior import Posterior

__all__ = ["LinkedSite", "averaged", "entries"]


@dataclass(frozen=True)
class LinkedSite:
    """A site with several labels.

    :ivar labels: of its labelled axes, in their order.
    :ivar axes: these axes.
    :ivar index: label -> the component of each entry, among those of all parties in turn:
        LongTensor ``[E]``.
    :ivar messages: the entries of all parties in turn, ``[E]``, as they were handed over.
    :ivar problem: the same as they are scored: for ``product`` tempered by weight and dispersion.
    """

    site: str
    labels: tuple[str, ...]
    axes: tuple[int, ...]
    index: Mapping[str, Tensor]
    messages: Components
    problem: Components

    def places(
        self, labels: Sequence[str], groups: Mapping[str, Tensor], counts: Mapping[str, int]
    ) -> Tensor:
        """The tuple of atoms along ``labels`` of each entry, numbered as the places of an array:
        ``[..., E]``.

        :param groups: label -> the atom of each component, LongTensor ``[..., N]``.
        :param counts: label -> how many atoms there are.
        """
        place = torch.zeros((), dtype=torch.long, device=self.messages.weights.device)
        for label in labels:
            atoms = groups[label].to(place.device, non_blocking=True)
            place = place * counts[label] + atoms[..., self.index[label]]
        return place

    def size(self, counts: Mapping[str, int]) -> int:
        """The number of tuples of atoms."""
        return math.prod(counts[label] for label in self.labels)

    # -- for the assignment along one label ------------------------------------------------------

    def columns(
        self, label: str, length: int, groups: Mapping[str, Tensor], counts: Mapping[str, int]
    ) -> tuple[Masked, Factor | None]:
        """The components along ``label``, ``length`` of them, each with an entry for each tuple of
        atoms along the other labels, and the prior of one atom, if there is one."""
        others = [x for x in self.labels if x != label]
        width = math.prod(counts[x] for x in others)
        place = self.index[label] * width + self.places(others, groups, counts)
        local, prior = self.messages.local[self.site], self.messages.prior.get(self.site)
        # What is missing must be of the family, and to any power.
        some = (prior or local).map(lambda v: v[:1].expand(length * width, *v.shape[1:])).params
        params = {
            name: some[name].index_copy(0, place, v).unflatten(0, (length, width))
            for name, v in local.params.items()
        }
        mass = torch.zeros(length * width, dtype=torch.float64, device=local.device)
        mass = mass.index_fill(0, place, 1.0).unflatten(0, (length, width))
        part = Masked(replace(local, params=params), mass)
        if prior is not None:
            prior = prior.map(lambda v: v.unsqueeze(1).expand(1, width, *v.shape[1:]))
        return part, prior

    # -- for barycentres -------------------------------------------------------------------------

    def atoms(
        self,
        problem: Components,
        groups: Mapping[str, Tensor],
        counts: Mapping[str, int],
        averaged: bool = False,
    ) -> Factor:
        """The barycentres of :attr:`messages` or :attr:`problem`, one for each tuple of atoms:
        batch shape ``[size]``.

        :param averaged: whether their effects will be averaged, so that of an entry that nobody
            has the width alone counts.
        """
        there, place = self.places(self.labels, groups, counts).unique(return_inverse=True)
        found = problem.barycenter(place, len(there))[self.site]
        entries, weights = self.messages.local[self.site], self.messages.weights
        prior = self.messages.prior.get(self.site)
        absent = self.messages.pooling.absent(entries, weights, averaged, prior)
        every = absent.expand_batch((self.size(counts),))
        params = {k: v.index_copy(0, there, found.params[k]) for k, v in every.params.items()}
        return replace(found, params=params)

    def divergence(self, groups: Mapping[str, Tensor], counts: Mapping[str, int]) -> float:
        """The part of the objective that the entries add."""
        there, place = self.places(self.labels, groups, counts).unique(return_inverse=True)
        return self.problem.divergence(place, len(there))

    def pooled(
        self, first: Posterior, groups: Mapping[str, Tensor], counts: Mapping[str, int]
    ) -> Factor:
        """The barycentres with the axes of the site, which those of ``first`` are."""
        like = first.decomposed[self.site]
        averaging = self.site in first.outgoing and self.messages.pooling.averages_outgoing
        atoms = self.atoms(self.messages, groups, counts, averaging)
        if averaging:
            atoms = self._averaged(atoms, first.outgoing[self.site], groups, counts)
        shape = [counts[label] for label in self.labels]
        grid = replace(atoms.map(lambda v: v.unflatten(0, shape)), batch_dim=len(shape))
        return grid.like(like.batch_dim, self.axes)

    def _averaged(
        self,
        atoms: Factor,
        outgoing: str,
        groups: Mapping[str, Tensor],
        counts: Mapping[str, int],
    ) -> Factor:
        """Atoms whose effects are averages over the parties that have what they act on."""
        others = [x for x in self.labels if x != outgoing]
        acts_on = self.places(others, groups, counts)
        there = self.places(self.labels, groups, counts)
        return averaged(self.messages, self.site, atoms, there, acts_on)


def averaged(
    problem: Components, site: str, atoms: Factor, groups: Tensor, acts_on: Tensor
) -> Factor:
    """The mean effects of atoms over the parties, of which those that lack one have nothing there.
    The parties count by what the pooling says, in the mean over the components that they have. What
    nobody has is zero, as unsure as what one party has.

    :param groups: LongTensor ``[N]``, the atom of each component.
    :param acts_on: LongTensor ``[N]``: means are over the parties that have components that act on
        the same.
    """
    local, num_parties = problem.local[site], problem.num_parties
    sure = problem.pooling.outgoing_weights(local)
    party = acts_on * num_parties + problem.party.to(acts_on.device)
    size = num_parties * (int(acts_on.max()) + 1)

    def sums(x: Tensor, index: Tensor, length: int) -> Tensor:
        return x.new_zeros(length, *x.shape[1:]).index_add(0, index, x)

    weights = problem.weights.reshape(-1, *(1,) * (sure.dim() - 1))
    count = sums(torch.ones_like(weights), party, size).clamp(min=1)
    weight = sums(sure, party, size) / count * (sums(weights, party, size) / count)
    have = sums(weight[party], groups, atoms.batch_shape[0])
    every = weight.unflatten(0, (-1, num_parties)).sum(1)[acts_on]
    total = torch.ones_like(have).index_copy(0, groups, every)
    share = have / total.clamp(min=1e-300)
    return atoms.times(share, torch.where(share > 0, share, 1 / num_parties))


def entries(
    posteriors: Sequence[Posterior], site: str
) -> tuple[Factor, tuple[int, ...], dict[str, Tensor], tuple[int, ...]]:
    """The entries of all parties, ``[E]``, how many each party has, the component along each label
    of each entry, and the labelled axes."""
    axes = posteriors[0].axes[site]
    places = tuple(i for i, label in enumerate(axes) if label is not None)
    labels = [label for label in axes if label is not None]
    parts = []
    index: dict[str, list[Tensor]] = {label: [] for label in labels}
    offset = dict.fromkeys(labels, 0)
    for p in posteriors:
        f = p.decomposed[site].with_batch(*places)
        shape = f.batch_shape
        n = len(shape)
        flat = f.map(partial(torch.flatten, start_dim=0, end_dim=n - 1))
        parts.append(replace(flat, batch_dim=1))
        where = torch.cartesian_prod(*[torch.arange(k, device=f.device) for k in shape])
        for label, column in zip(labels, where.unbind(1), strict=True):
            index[label].append(column + offset[label])
            offset[label] += p.components(label)
    sizes = tuple(len(x) for x in index[labels[0]])
    local = Factor.cat(parts).to(dtype=torch.float64)
    return local, sizes, {label: torch.cat(x) for label, x in index.items()}, places
