# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""Fusion as a Pyro program: the model, for any of Pyro's inference; its guide is in
``fusion_guide.py``.

With an assignment ``a`` of the components ``n`` of all parties to atoms ``k``, and all sites of a
component scaled by ``w_n / T``:

- ``exclusive``: the model draws each component from its local posterior, the guide from the atom it
  is assigned to: one copy of the atom for each of its components. ELBO: ``-Σ KL(atom ‖ local)``.
- ``inclusive``: the other way round. The model is the global one, with the atoms as its parameters,
  and the local posteriors are its guide. ELBO: ``-Σ KL(local ‖ atom)``.
- ``product``: the model draws each atom once, from the prior of the local models, and has a factor
  ``local / prior`` for each component; the guide draws each atom from its fused posterior.

In each the model also draws the assignment from its prior, so that the ELBO is ``-F``, with the
objective of :func:`~pyro_fusion.fuse`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn.module import PyroModule
from pyro.poutine.util import is_validation_enabled
from torch import Tensor

from pyro_fusion.assignment import AssignmentProblem
from pyro_fusion.assignment.joint_matching import JointMatching
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.errors import ParameterError, StructureError
from pyro_fusion.families import Factor
from pyro_fusion.families.distribution import FactorDistribution
from pyro_fusion.fusion.arguments import Inputs, Prior
from pyro_fusion.fusion.ascent import expectation_maximization
from pyro_fusion.fusion.checks import Weights, check_dispersion, warn_identical
from pyro_fusion.fusion.links import LinkedSite
from pyro_fusion.fusion.parties import LabelProblem, Parties, locating
from pyro_fusion.fusion.seeding import starts
from pyro_fusion.pooling.base import Pooling
from pyro_fusion.pooling.components import Components, compact
from pyro_fusion.pooling.kl import Inclusive
from pyro_fusion.pooling.named import pooling_named
from pyro_fusion.posterior import Axes
from pyro_fusion.posterior.guide import AtomParams, unique_name
from pyro_fusion.program.names import check_names

__all__ = ["FusionModel", "atoms_at", "atoms_of", "pairs"]

_TINY = 1e-30  # Pyro wants scales that are positive


class FusionModel(PyroModule):
    """The model of a fusion; see the top of this file for what it draws.

    Sites: for each label, ``"{label}_assignment"``, the atom of each component of all parties in
    turn, LongTensor ``[N]``; and each labelled site under its own name, in a plate
    ``"local_{label}"`` of the ``N`` components (``product``: in a plate ``"{label}"`` of the ``K``
    atoms). A site with several labels is in a plate ``"local_{site}"`` of the entries of all
    parties (``product``: of all tuples of atoms, ``"{site}_atoms"``), and the priors of its labels
    are scaled by their dispersion. Sites without a label are in a plate ``"party"`` (``product``:
    drawn once). Sites that merely follow an assignment (mixture weights) have no part in it.

    To change the program, override :meth:`assignment_prior`, :meth:`local` or :meth:`scale`; each
    may contain Pyro statements. Whatever sites they draw the guide must draw too: for ``scale`` in
    its own, which ``product`` does not call, else before ``super().forward()``. ``scale`` and
    ``assignment_prior`` are called once for each label, ``scale`` also for each site with several
    labels, under its name, and once more if there are sites without one.

    :param posteriors: one per party: posteriors or Pyro guides, as for :func:`~pyro_fusion.fuse`.
    :param pooling: ``"exclusive"``, ``"inclusive"`` or ``"product"``.
    :param assignment_prior: :class:`~pyro_fusion.GroupNormPrior` by default, for ``product``
        :class:`~pyro_fusion.IndianBuffetPrior`. One for all labels, or a mapping from label to one.
    :param weights, prior, axes, dispersion: as for :func:`~pyro_fusion.fuse`.
    :raises StructureError: if parties do not fit together.
    :raises ParameterError: for weights, prior or dispersion out of range.

    Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), sec. 3.
    """

    def __init__(
        self,
        posteriors: Inputs | Parties,
        pooling: str | Pooling = "exclusive",
        assignment_prior: AssignmentPrior | Mapping[str, AssignmentPrior] | None = None,
        *,
        weights: Weights = None,
        prior: Prior | None = None,
        axes: Axes | None = None,
        dispersion: float | None = None,
    ) -> None:
        super().__init__(name=unique_name(type(self)))
        dispersion = check_dispersion(dispersion)
        how = pooling_named(pooling)
        if not isinstance(posteriors, Parties):
            if how.draws_from is None:
                raise ParameterError(
                    f"pooling {how.name!r} has no Pyro program (its `draws_from` is None): `fuse` "
                    "works with it"
                )
            posteriors = Parties.of(posteriors, how, weights, prior, axes)
        priors = posteriors.priors(assignment_prior)
        warn_identical(posteriors.posteriors, posteriors.names)
        self.parties, self.pooling = posteriors, how
        self.parts: dict[str, LabelProblem] = {}
        self.links: dict[str, LinkedSite] = {}
        for group in posteriors.roles.groups:
            parts, links = _parts(posteriors, group, priors, dispersion)
            self.parts.update(parts)
            self.links.update(links)
        self.shared = {site: posteriors.shared(site) for site in posteriors.roles.shared}
        # Until a guide says how many there are, whenever it is called: room for all.
        self.num_atoms: dict[str, int] = {
            label: part.assignment_prior.num_atoms or sum(part.problem.sizes)
            for label, part in self.parts.items()
        }
        self.relaxed = False  # or whether assignments are matrices of probabilities
        if isinstance(how, Inclusive):
            self.atoms, self.num_atoms = atoms_of(self, self.start())

    # -- what a program of one's own may override ------------------------------------------------

    def assignment_prior(self, label: str) -> AssignmentPrior:
        """The prior of the assignment."""
        return self.parts[label].assignment_prior

    def local(self, site: str, index: Tensor) -> pyro.distributions.TorchDistribution:
        """The local posteriors of a labelled site, of the components ``index``, or of the parties
        ``index`` if it has no label: batch shape ``[len(index)]``; for ``product`` tempered. It is
        called in their plate: draw what they share in ``forward``."""
        return FactorDistribution(self._problem(site).local[site].index_select(0, index))

    def scale(self, label: str | None) -> Tensor:
        """By which the log densities of each component's sites are multiplied, ``w / T``: ``[N]``;
        of sites without a label, those of each party: ``[S]``; under the name of a site with
        several labels, those of its entries: ``[E]``."""
        if label is None:
            return next(iter(self.shared.values())).weights
        problem = (self.links if label in self.links else self.parts)[label].problem
        return problem.weights / problem.dispersion

    # -- the program -------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site; returns site name -> value.

        :raises StructureError: if a site or label has a name that the program needs itself.
        """
        roles, sites = self.parties.roles, self.parties.posteriors[0].axes
        check_names(roles, sites, self.pooling.needs_prior)
        result = {}
        assignments: dict[str, Tensor] = {}
        for label, part in self.parts.items():
            assignment_prior, problem = self.assignment_prior(label), part.problem
            room, device = self._room(label), problem.weights.device
            distribution = JointMatching(
                assignment_prior, problem.sizes, room, self.relaxed, device
            )
            with poutine.scale(scale=part.price):
                assignment = pyro.sample(f"{label}_assignment", distribution)
            _check_value(label, assignment, room)
            result[f"{label}_assignment"] = assignments[label] = assignment
            result.update(self._pool(label, list(problem.local), assignment))
        for site in self.links:
            result.update(self._pool(site, [site], self.places(site, assignments)))
        if self.shared:
            result.update(self._pool(None, list(self.shared), self.everyone))
        return result

    def _pool(
        self, label: str | None, sites: Sequence[str], assignment: Tensor
    ) -> dict[str, Tensor]:
        if self.pooling.needs_prior:
            return self._product(label, sites, assignment)
        # Parameters of atoms, outside the plate of components.
        atoms = {}
        if isinstance(self.pooling, Inclusive):
            atoms = {site: self.atoms.factor(site) for site in sites}
        result = {}
        with pairs(label, assignment, self.scale(label)) as (k, n):
            for site in sites:
                d = self.local(site, n)
                if site in atoms:
                    d = FactorDistribution(atoms_at(atoms[site], k))
                result[site] = pyro.sample(site, d)
        return result

    def _product(
        self, label: str | None, sites: Sequence[str], assignment: Tensor
    ) -> dict[str, Tensor]:
        prior = {site: self._problem(site).prior[site] for site in sites}
        result = {}
        plate = self.atom_plate(label)
        with plate:
            for site, one in prior.items():
                result[site] = pyro.sample(
                    site, FactorDistribution(one.expand_batch((plate.size,)))
                )
        with pairs(label, assignment, self.scale(label)) as (k, n):
            for site, one in prior.items():
                density = FactorDistribution(one)
                value = _gather(result[site], k, density.event_dim)
                message = self.local(site, n).log_prob(value)
                pyro.factor(f"{site}_message", message - density.log_prob(value))
        return result

    def atom_plate(self, label: str | None) -> pyro.plate:
        """The plate of the atoms; of one for a site without a label, and of all tuples of atoms for
        a site with several."""
        if label is None:
            return pyro.plate("shared", 1)
        name = f"{label}_atoms" if label in self.links else label
        return pyro.plate(name, self._room(label))

    def _room(self, label: str) -> int:
        """How many atoms there may be, or tuples of them for a site with several labels."""
        if label in self.links:
            return self.links[label].size({x: self._room(x) for x in self.links[label].labels})
        sites = self.parts[label].problem.local
        if isinstance(self.pooling, Inclusive) and sites:
            return self.atoms.length(next(iter(sites)))
        return self.num_atoms[label]

    def places(self, site: str, assignments: Mapping[str, Tensor]) -> Tensor:
        """The assignment of the entries of a site with several labels to tuples of atoms."""
        link = self.links[site]
        return link.places(link.labels, assignments, {x: self._room(x) for x in link.labels})

    def party(self, label: str) -> Tensor:
        """The party of each component along a label: LongTensor ``[N]``."""
        problem = self.parts[label].problem
        return problem.party.to(problem.weights.device, non_blocking=True)

    @property
    def everyone(self) -> Tensor:
        """The assignment of all parties to the one atom of a site without a label, ``[S]``."""
        return torch.zeros_like(next(iter(self.shared.values())).weights, dtype=torch.long)

    def _problem(self, site: str) -> Components:
        if site in self.shared:
            return self.shared[site]
        if site in self.links:
            return self.links[site].problem
        return next(p.problem for p in self.parts.values() if site in p.problem.local)

    def set_prior(self, label: str, assignment_prior: AssignmentPrior) -> None:
        """Put the prior of an assignment in the place of the present one."""
        self.parts[label] = replace(self.parts[label], assignment_prior=assignment_prior)

    def given(self, label: str, assignment: Mapping[str, Tensor]) -> LabelProblem:
        """The components along a label, in the light of what is given of the assignments ``[N]``
        along those that it shares sites with."""
        part = self.parts[label]
        if not any(label in link.labels for link in self.links.values()):
            return part
        return self.parties.labelled(label, part.assignment_prior, part.dispersion, assignment)

    def linked_objective(self, group: Sequence[str], assignment: Mapping[str, Tensor]) -> float:
        """The part of F of labels that are linked, at the best atoms for their assignments ``[N]``:
        sites in units of one dispersion, and the prior of each label in proportion to its own."""
        groups, counts = {}, {}
        for label in group:
            groups[label], counts[label] = compact(assignment[label].cpu())
        total = 0.0
        for label in group:
            part, num_parties = self.parts[label], self.parts[label].problem.num_parties
            assignment_prior = part.assignment_prior.update(counts[label], num_parties)
            none = torch.zeros(counts[label], len(groups[label]), dtype=torch.float64)
            value = AssignmentProblem.of(part.problem.split(none), assignment_prior).objective(
                groups[label]
            )
            total += part.price * (assignment_prior.constant(num_parties) + value)
            total += part.problem.divergence(groups[label], counts[label])
        for link in self.links.values():
            if link.labels[0] in group:
                total += link.divergence(groups, counts)
        return total

    def start(self, seed: int = 0) -> dict[str, Tensor]:
        """An assignment to begin with, for each label: the parties join one after the other."""
        result: dict[str, Tensor] = {}
        for label in self.parts:
            result[label] = _start(self.given(label, result), seed)
        return result


@contextmanager
def pairs(label: str | None, assignment: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The plate of the pairs ``(k, n)`` of atoms and components in an assignment, with the scales
    of their components. Of an assignment ``[N]`` there are as many as components; of a relaxed one,
    ``[K, N]``, all that there can be, each scaled by its probability too. Of a batch of assignments
    there is a ``k`` for each, ``[*batch, N]``."""
    size, soft = scale.shape[-1], assignment.is_floating_point()
    if assignment.shape[-1:] != (size,) or assignment.dim() <= soft:
        raise StructureError(
            f"label '{label}': expected an assignment, integers of shape [{size}], or a relaxed "
            f"one of shape [K, {size}]; got {assignment.dtype} of shape {list(assignment.shape)}"
        )
    k = _without_plate(assignment, 1 + soft).to(scale.device, non_blocking=True)
    scale = _without_plate(scale, 1)
    n = torch.arange(size, device=scale.device)
    if soft:
        probability, num_atoms = k.flatten(-2), k.shape[-2]
        k, n = torch.cartesian_prod(torch.arange(num_atoms, device=n.device), n).unbind(1)
        scale = scale[..., n] * probability
    name = "party" if label is None else f"local_{label}"
    with pyro.plate(name, len(n)), poutine.scale(scale=scale.clamp(min=_TINY)):
        yield k, n


def _without_plate(value: Tensor, event_dim: int) -> Tensor:
    """What is drawn outside the program's own plates, an assignment or a scale, without the axes of
    size one that plates around the program, and ``Predictive``, leave at the place of these."""
    event, batch = value.shape[-event_dim:], value.shape[:-event_dim]
    if math.prod(batch) == 1:
        return value.reshape(event)
    if batch[-1] != 1:
        raise StructureError(
            "plates around the program must leave dim -1 to its own, got values of batch shape "
            f"{list(batch)}"
        )
    return value.squeeze(-event_dim - 1)


def _check_value(label: str, assignment: Tensor, num_atoms: int) -> None:
    """Where Pyro validates: an assignment may be observed, or replayed from anywhere."""
    if assignment.is_floating_point() or not is_validation_enabled():
        return
    bad = (assignment < 0) | (assignment >= num_atoms)
    if bool(bad.any()):
        raise StructureError(
            f"label '{label}': expected atoms from 0 to {num_atoms - 1}, got "
            f"{int(assignment[bad][0])}"
        )


def atoms_at(atoms: Factor, k: Tensor) -> Factor:
    """The atoms ``k``, of batch shape that of ``k``."""
    result = atoms.index_select(0, k.flatten())
    result = result.map(lambda v: v.reshape(k.shape + v.shape[1:]))
    return replace(result, batch_dim=k.dim())


def _gather(value: Tensor, k: Tensor, event_dim: int) -> Tensor:
    """``value[k]`` along the plate of atoms of ``[*batch, K, *event]``."""
    if k.dim() == 1:
        return value.index_select(-1 - event_dim, k)
    axis = value.dim() - event_dim - 1
    batch = torch.broadcast_shapes(value.shape[:axis], k.shape[:-1])
    value = value.expand(batch + value.shape[axis:])
    k = k.expand(batch + k.shape[-1:])
    event = value.shape[value.dim() - event_dim :]
    index = k.reshape(k.shape + (1,) * event_dim).expand(k.shape + event)
    return value.gather(len(batch), index)


def _start(part: LabelProblem, seed: int) -> Tensor:
    with locating(part.messages):
        return part.as_given(next(starts(part.ordered, part.assignment_prior, 0, seed)))


def _parts(
    parties: Parties,
    group: tuple[str, ...],
    priors: Mapping[str, AssignmentPrior],
    dispersion: float | None,
) -> tuple[dict[str, LabelProblem], dict[str, LinkedSite]]:
    """The components along labels that are linked, and the sites that link them."""
    if len(group) == 1:
        return {group[0]: parties.labelled(group[0], priors[group[0]], dispersion)}, {}
    # How far apart components are depends on the assignments of the others, and so does T.
    found: dict[str, Tensor] = {}
    for label in group:
        part = parties.labelled(label, priors[label], dispersion, found)
        start = _start(part, seed=0)[part.order]
        with locating(part.messages):
            end = expectation_maximization(
                part.ordered, part.assignment_prior, start, collapsed=False
            )
        found[label] = part.as_given(end.groups)
    parts = {x: parties.labelled(x, priors[x], dispersion, found) for x in group}
    if parties.pooling.tempers and dispersion is None:
        # The entries that labels have in common are tempered once.
        scale = statistics.geometric_mean(part.dispersion for part in parts.values())
        parts = {x: parties.labelled(x, priors[x], scale, found) for x in group}
    return parties.in_one_unit(parts)


def atoms_of(
    model: FusionModel, assignment: Mapping[str, Tensor]
) -> tuple[AtomParams, dict[str, int]]:
    """The best atoms for an assignment, and the shared sites, as parameters; and how many atoms
    each label has."""
    factors, groups, numbers = {}, {}, {}
    for label, part in model.parts.items():
        groups[label], numbers[label] = compact(assignment[label])
        with locating(part.messages):
            factors.update(part.problem.barycenter(groups[label], numbers[label]))
    for site, link in model.links.items():
        with locating(link.messages):
            factors[site] = link.atoms(link.problem, groups, numbers)
    for problem in model.shared.values():
        with locating(problem):
            factors.update(problem.barycenter(model.everyone, 1))
    return AtomParams(factors), numbers
