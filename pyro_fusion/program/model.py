# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""Fusion as a Pyro program: the model, for any of Pyro's inference; its guide is in
``guide.py``.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.nn.module import PyroModule
from pyro.poutine.util import is_validation_enabled
from torch import Tensor

from pyro_fusion.assignment import AssignmentPrior, JointMatching
from pyro_fusion.errors import ParameterError, StructureError
from pyro_fusion.families import Factor
from pyro_fusion.families.distribution import FactorDistribution
from pyro_fusion.fusion.arguments import Inputs, Prior
from pyro_fusion.fusion.checks import Weights
from pyro_fusion.fusion.parties import LabelProblem
from pyro_fusion.fusion.problem import FusionProblem, check_assignment
from pyro_fusion.pooling import Pooling
from pyro_fusion.pooling.components import Components, compact
from pyro_fusion.posterior import Axes
from pyro_fusion.posterior.guide import unique_name
from pyro_fusion.program.atoms import AtomParams, atoms_at
from pyro_fusion.program.names import check_names

__all__ = ["FusionModel", "pairs"]

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
    :param assignment: label -> the atom of each component, LongTensor ``[N]``, to begin with: of
        the guides of this model, unless they are given another, and of the atoms that are its own
        parameters (``inclusive``). It also says how many atoms there are where no guide does. By
        default that of :meth:`~pyro_fusion.FusionProblem.start`.
    :ivar problem: the :class:`~pyro_fusion.FusionProblem`; of several models it may be one,
        given in the place of ``posteriors`` and what follows it.
    :ivar assignment: label -> the assignment to begin with, numbered without gaps; where
        :class:`~pyro_fusion.FusionEM` is, once that has moved it.
    :raises StructureError: if parties do not fit together.
    :raises ParameterError: for weights, prior or dispersion out of range.

    Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), sec. 3.
    """

    def __init__(
        self,
        posteriors: Inputs | FusionProblem,
        pooling: str | Pooling = "exclusive",
        assignment_prior: AssignmentPrior | Mapping[str, AssignmentPrior] | None = None,
        *,
        weights: Weights = None,
        prior: Prior | None = None,
        axes: Axes | Literal["auto"] | None = None,
        dispersion: float | None = None,
        assignment: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(name=unique_name(type(self)))
        if isinstance(posteriors, FusionProblem):
            given = (assignment_prior, weights, prior, axes, dispersion)
            if pooling != "exclusive" or any(x is not None for x in given):
                raise ParameterError(
                    "a FusionProblem has its pooling, assignment prior, weights, prior, axes and "
                    "dispersion: give them to FusionProblem.of"
                )
            self.problem = posteriors
        else:
            self.problem = FusionProblem.of(
                posteriors,
                pooling,
                assignment_prior,
                weights=weights,
                prior=prior,
                axes=axes,
                dispersion=dispersion,
            )
        how = self.problem.pooling
        if how.draws_from is None:
            raise ParameterError(
                f"pooling {how.name!r} has no Pyro program (its `draws_from` is None): `fuse` "
                "works with it"
            )
        if how.needs_prior and not self.problem.parties.prior:
            raise ParameterError(
                f"the program of pooling '{how.name}' draws atoms from the prior of the local "
                "models: give it as `prior`, also for one party"
            )
        if assignment is None:
            assignment = self.problem.start()
        else:
            check_assignment(assignment, self.problem)
        self.assignment = {label: compact(a.cpu())[0] for label, a in assignment.items()}
        if how.draws_from == "atoms":
            self.atoms = AtomParams(self.problem.atoms(self.assignment)[0])

    # -- what a program of one's own may override ------------------------------------------------

    def assignment_prior(self, label: str) -> AssignmentPrior:
        """The prior of the assignment."""
        return self.problem.parts[label].assignment_prior

    def local(self, site: str, index: Tensor) -> pyro.distributions.TorchDistribution:
        """The local posteriors of a labelled site, of the components ``index``, or of the parties
        ``index`` if it has no label: batch shape ``[len(index)]``; for ``product`` tempered. It is
        called in their plate: draw what they share in ``forward``."""
        return FactorDistribution(self._components(site).local[site].index_select(0, index))

    def scale(self, label: str | None) -> Tensor:
        """The factor of the log densities of each component's sites, ``w / T``: ``[N]``. For None,
        of the sites without a label, that of each party: ``[S]``; for the name of a site with
        several labels, that of its entries: ``[E]``."""
        problem = self.problem
        if label is None:
            return next(iter(problem.shared.values())).weights
        scored = (problem.links if label in problem.links else problem.parts)[label].problem
        return scored.weights / scored.dispersion

    # -- the program -------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site; returns site name -> value.

        :raises StructureError: if a site or label has a name that the program needs itself.
        """
        problem = self.problem
        roles, sites = problem.parties.roles, problem.parties.posteriors[0].axes
        check_names(roles, sites, self._draws_atoms)
        result = {}
        assignments: dict[str, Tensor] = {}
        rooms: dict[str, int] = {}
        for label, part in problem.parts.items():
            assignment, rooms[label] = self._assignment(label, part)
            result[f"{label}_assignment"] = assignments[label] = assignment
            own = list(part.problem.local)
            result.update(self._pool(label, own, assignment, rooms[label]))
        for site, link in problem.links.items():
            place = link.places(link.labels, assignments, rooms)
            result.update(self._pool(site, [site], place, link.size(rooms)))
        if problem.shared:
            result.update(self._pool(None, list(problem.shared), self.everyone, 1))
        return result

    @property
    def _draws_atoms(self) -> bool:
        """True if the model draws each atom once, and has the local posteriors as factors."""
        return self.problem.pooling.draws_from == "prior"

    def _assignment(self, label: str, part: LabelProblem) -> tuple[Tensor, int]:
        """The assignment along a label, and how many atoms there are. Both it and its form are the
        guide's, of a trace that is replayed, or else drawn from the prior."""
        prior, sites = self.assignment_prior(label), list(part.problem.local)
        limit = int(self.assignment[label].max()) + 1  # where no guide says
        standing = self.problem.pooling.draws_from == "atoms" and bool(sites)
        if standing:
            limit = self.atoms.length(sites[0])
        distribution = JointMatching(prior, part.problem.sizes, limit)
        with poutine.scale(scale=part.price):
            assignment = pyro.sample(f"{label}_assignment", distribution)
        most = limit if standing else part.assignment_prior.num_atoms or sum(part.problem.sizes)
        _check_value(label, assignment, sum(part.problem.sizes), most)
        room = distribution.take_form_of(assignment)
        return assignment, limit if standing else room

    def _pool(
        self, label: str | None, sites: Sequence[str], assignment: Tensor, room: int
    ) -> dict[str, Tensor]:
        if self._draws_atoms:
            return self._product(label, sites, assignment, room)
        # Parameters of atoms, outside the plate of components.
        atoms = {}
        if self.problem.pooling.draws_from == "atoms":
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
        self, label: str | None, sites: Sequence[str], assignment: Tensor, room: int
    ) -> dict[str, Tensor]:
        prior = {site: self._components(site).prior[site] for site in sites}
        result = {}
        with self.atom_plate(label, room):
            for site, one in prior.items():
                result[site] = pyro.sample(site, FactorDistribution(one.expand_batch((room,))))
        with pairs(label, assignment, self.scale(label)) as (k, n):
            for site, one in prior.items():
                density = FactorDistribution(one)
                value = _gather(result[site], k, density.event_dim)
                message = self.local(site, n).log_prob(value)
                pyro.factor(f"{site}_message", message - density.log_prob(value))
        return result

    def move(self, assignment: Mapping[str, Tensor], atoms: Mapping[str, Factor]) -> None:
        """Move the assignments ``[N]`` of some labels, to atoms ``0, ..., K-1``, and for
        ``inclusive`` the atoms at some sites, of batch shape ``[K]``."""
        self.assignment.update({label: a.cpu() for label, a in assignment.items()})
        if self.problem.pooling.draws_from == "atoms":
            for site, f in atoms.items():
                self.atoms.set_factor(site, f)

    def atom_plate(self, label: str | None, room: int) -> pyro.plate:
        """The plate of ``room`` atoms; for a site without a label, of one, and for a site with
        several, of all tuples of atoms."""
        if label is None:
            return pyro.plate("shared", room)
        return pyro.plate(f"{label}_atoms" if label in self.problem.links else label, room)

    def party(self, label: str) -> Tensor:
        """The party of each component along a label: LongTensor ``[N]``."""
        problem = self.problem.parts[label].problem
        return problem.party.to(problem.weights.device, non_blocking=True)

    @property
    def everyone(self) -> Tensor:
        """The assignment of all parties to the one atom of a site without a label, ``[S]``."""
        shared = next(iter(self.problem.shared.values()))
        return torch.zeros_like(shared.weights, dtype=torch.long)

    def _components(self, site: str) -> Components:
        problem = self.problem
        if site in problem.shared:
            return problem.shared[site]
        if site in problem.links:
            return problem.links[site].problem
        return next(p.problem for p in problem.parts.values() if site in p.problem.local)


@contextmanager
def pairs(label: str | None, assignment: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The plate of the pairs ``(k, n)`` of atoms and components in an assignment, with the scales
    of their components. Of an assignment ``[N]`` there are as many as components; of a relaxed one,
    ``[K, N]``, all that there can be, each scaled by its probability too. Of a batch of assignments
    there is a ``k`` for each, ``[*batch, N]``."""
    size, soft = scale.shape[-1], assignment.is_floating_point()
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
    """An assignment or a scale, drawn outside the program's own plates, without the axes of
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


def _check_value(label: str, assignment: Tensor, size: int, num_atoms: int) -> None:
    """An assignment may be observed, or replayed from anywhere: is it of ``size`` components, and,
    where Pyro validates, of the atoms that there are?"""
    if assignment.shape[-1:] != (size,) or assignment.dim() <= assignment.is_floating_point():
        raise StructureError(
            f"label '{label}': expected an assignment, integers of shape [{size}], or a relaxed "
            f"one of shape [K, {size}]; got {assignment.dtype} of shape {list(assignment.shape)}"
        )
    if assignment.is_floating_point() or not is_validation_enabled():
        return
    bad = (assignment < 0) | (assignment >= num_atoms)
    if bool(bad.any()):
        raise StructureError(
            f"label '{label}': expected atoms from 0 to {num_atoms - 1}, got "
            f"{int(assignment[bad][0])}"
        )


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
