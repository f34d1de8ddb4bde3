# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""Fusion as a Pyro program: a model and a guide, for any of Pyro's inference.

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

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.nn.module import PyroModule
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_fusion.barycenter import Inclusive, Pooling, pooling_named
from pyro_fusion.base import Base
from pyro_fusion.distributions.matching import Matching, relax
from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor
from pyro_fusion.families.distribution import FactorDistribution
from pyro_fusion.guide import FactorParams
from pyro_fusion.matchings import JointMatching
from pyro_fusion.parties import Labelled, Parties, locating
from pyro_fusion.posterior import Axes, Posterior
from pyro_fusion.priors import AssignmentPrior, assignment_prior
from pyro_fusion.problem import MatchingProblem, compact
from pyro_fusion.seeding import starts
from pyro_fusion.structure import check_assignment, check_names, warn_identical

__all__ = ["FusionGuide", "FusionModel"]

# Modules of one name share their parameters in Pyro's global store, so each gets its own.
_COUNT = itertools.count()

# Of a component and its atom in a relaxed assignment to begin with; of others it is zero.
_LOGIT = 3.0

# Pyro wants scales that are positive.
_TINY = 1e-30


class FusionModel(PyroModule):
    """The model of a fusion; see the top of this file for what it draws.

    Sites: for each label, ``"{label}_assignment"``, the atom of each component of all parties in
    turn, LongTensor ``[N]``; and each labelled site under its own name, in a plate
    ``"local_{label}"`` of the ``N`` components (``product``: in a plate ``"{label}"`` of the ``K``
    atoms). Sites without a label are in a plate ``"party"`` (``product``: drawn once). Sites that
    merely follow an assignment (mixture weights) have no part in it.

    To change the program, override :meth:`assignment_prior`, :meth:`local` or :meth:`scale`; each
    may contain Pyro statements. Whatever sites they draw the guide must draw too: for ``scale`` in
    its own, which ``product`` does not call, else before ``super().forward()``. ``scale`` and
    ``assignment_prior`` are called once for each label, ``scale`` once more if there are sites
    without one.

    :param posteriors: one per party: posteriors or Pyro guides, as for :func:`~pyro_fusion.fuse`.
    :param prior: of the assignment; :class:`~pyro_fusion.GroupNorm` by default, for ``product``
        :class:`~pyro_fusion.IndianBuffet`.
    :param pooling: ``"exclusive"``, ``"inclusive"`` or ``"product"``.
    :param weights, base, axes, dispersion: as for :func:`~pyro_fusion.fuse`.
    :raises StructureError: if parties do not fit together.
    :raises ParameterError: for weights, base or dispersion out of range.

    Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), sec. 3.
    """

    def __init__(
        self,
        posteriors: Sequence[Posterior | Callable[..., Any]] | Parties,
        prior: AssignmentPrior | None = None,
        pooling: str | Pooling = "exclusive",
        *,
        weights: Sequence[float] | Tensor | None = None,
        base: Base | None = None,
        axes: Axes | None = None,
        dispersion: float | None = None,
    ) -> None:
        super().__init__(name=f"{type(self).__name__}{next(_COUNT)}")
        if dispersion is not None and not 0 < dispersion < float("inf"):
            raise ParameterError(f"dispersion must be positive and finite, got {dispersion}")
        how = pooling_named(pooling)
        prior = assignment_prior(prior, how.needs_base)
        if not isinstance(posteriors, Parties):
            posteriors = Parties.of(posteriors, how, weights, base, axes)
        posteriors.check_num_atoms(prior)
        warn_identical(posteriors.posteriors)
        self.parties, self.pooling = posteriors, how
        self.parts: dict[str, Labelled] = {
            label: posteriors.labelled(label, prior, dispersion)
            for label in posteriors.roles.matched
        }
        self.shared = {site: posteriors.shared(site) for site in posteriors.roles.shared}
        # Until a guide says how many there are: room for all.
        self.num_atoms: dict[str, int] = {
            label: part.prior.num_atoms or sum(part.problem.sizes)
            for label, part in self.parts.items()
        }
        self.relaxed = False  # or whether assignments are matrices of probabilities
        if isinstance(how, Inclusive):
            self.atoms = atoms_of(self, self.start())

    # -- what a program of one's own may override ------------------------------------------------

    def assignment_prior(self, label: str) -> AssignmentPrior:
        """The prior of the assignment."""
        return self.parts[label].prior

    def local(self, site: str, index: Tensor) -> pyro.distributions.TorchDistribution:
        """The local posteriors of a labelled site, of the components ``index``: batch shape
        ``[len(index)]``. For ``product`` they are tempered by weight and dispersion."""
        return FactorDistribution(self._problem(site).local[site].index_select(0, index))

    def scale(self, label: str | None) -> Tensor:
        """By which the log densities of each component's sites are multiplied, ``w / T``: ``[N]``;
        of sites without a label, those of each party: ``[S]``."""
        if label is None:
            return next(iter(self.shared.values())).weights
        problem = self.parts[label].problem
        return problem.weights / problem.dispersion

    # -- the program -------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site; returns site name -> value.

        :raises StructureError: if a site or label has a name that the program needs itself.
        """
        roles, sites = self.parties.roles, self.parties.posteriors[0].axes
        check_names(roles, sites, self.pooling.needs_base)
        result = {}
        for label, part in self.parts.items():
            prior, problem = self.assignment_prior(label), part.problem
            room = self.num_atoms[label]
            distribution = JointMatching(prior, problem.sizes, room, self.relaxed)
            assignment = _event(pyro.sample(f"{label}_assignment", distribution))
            result[f"{label}_assignment"] = assignment
            result.update(self._pool(label, list(problem.local), assignment))
        if self.shared:
            everyone = torch.zeros(len(self.parties.weights), dtype=torch.long)
            result.update(self._pool(None, list(self.shared), everyone))
        return result

    def _pool(
        self, label: str | None, sites: Sequence[str], assignment: Tensor
    ) -> dict[str, Tensor]:
        if self.pooling.needs_base:
            return self._product(label, sites, assignment)
        # Parameters of atoms, outside the plate of components.
        atoms = {}
        if isinstance(self.pooling, Inclusive):
            atoms = {site: self.atoms.factor(site) for site in sites}
        result = {}
        with _pairs(label, assignment, self.scale(label)) as (k, n):
            for site in sites:
                d = self.local(site, n)
                if site in atoms:
                    d = FactorDistribution(atoms[site].index_select(0, k))
                result[site] = pyro.sample(site, d)
        return result

    def _product(
        self, label: str | None, sites: Sequence[str], assignment: Tensor
    ) -> dict[str, Tensor]:
        base = {site: self._problem(site).base[site] for site in sites}
        result = {}
        plate = self.atom_plate(label)
        with plate:
            for site, one in base.items():
                prior = FactorDistribution(one.expand_batch((plate.size,)))
                result[site] = pyro.sample(site, prior)
        with _pairs(label, assignment, self.scale(label)) as (k, n):
            for site, one in base.items():
                value = result[site].index_select(0, k)
                message = self.local(site, n).log_prob(value)
                pyro.factor(f"{site}_message", message - FactorDistribution(one).log_prob(value))
        return result

    def atom_plate(self, label: str | None) -> pyro.plate:
        """The plate of the atoms; of one for a site without a label."""
        if label is None:
            return pyro.plate("shared", 1)
        return pyro.plate(label, self.num_atoms[label])

    def _problem(self, site: str) -> MatchingProblem:
        if site in self.shared:
            return self.shared[site]
        return next(p.problem for p in self.parts.values() if site in p.problem.local)

    def set_prior(self, label: str, prior: AssignmentPrior) -> None:
        """Put the prior of an assignment in the place of the present one."""
        self.parts[label] = replace(self.parts[label], prior=prior)

    def start(self, seed: int = 0) -> dict[str, Tensor]:
        """An assignment to begin with, for each label: the parties join one after the other."""
        result = {}
        for label, part in self.parts.items():
            with locating(part.messages):
                first = next(starts(part.ordered, part.prior, 0, seed))
            result[label] = part.as_given(first)
        return result


@contextmanager
def _pairs(label: str | None, assignment: Tensor, scale: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The plate of the pairs ``(k, n)`` of atoms and components in an assignment, with the scales
    of their components. Of an assignment ``[N]`` there are as many as components; of a relaxed one,
    ``[K, N]``, all that there can be, each scaled by its probability too."""
    k, n = assignment, torch.arange(len(scale))
    if assignment.is_floating_point():
        k, n = torch.cartesian_prod(torch.arange(len(assignment)), n).unbind(1)
        scale = scale[n] * assignment.flatten()
    name = "party" if label is None else f"local_{label}"
    with pyro.plate(name, len(n)), poutine.scale(scale=scale.clamp(min=_TINY)):
        yield k.to(scale.device), n.to(scale.device)


def _event(assignment: Tensor) -> Tensor:
    """Without the batch axes, of size one, that ``Predictive`` puts in front."""
    return assignment.reshape(assignment.shape[-2 if assignment.is_floating_point() else -1 :])


def atoms_of(model: FusionModel, assignment: Mapping[str, Tensor]) -> FactorParams:
    """The best atoms for an assignment, and the shared sites, as parameters; tells the model how
    many there are."""
    factors = {}
    for label, part in model.parts.items():
        groups, model.num_atoms[label] = compact(assignment[label])
        with locating(part.messages):
            factors.update(part.problem.barycenter(groups, model.num_atoms[label]))
    for problem in model.shared.values():
        with locating(problem):
            factors.update(
                problem.barycenter(torch.zeros(problem.num_parties, dtype=torch.long), 1)
            )
    return FactorParams(factors)


class FusionGuide(PyroModule):
    """The guide of a :class:`FusionModel`.

    Its state is an assignment for each label and, but for ``inclusive``, where they belong to the
    model, the atoms: :class:`~pyro.nn.module.PyroParam`, which SVI learns. The assignment is moved
    by :class:`~pyro_fusion.FusionEM`. If relaxed, SVI moves it too: it is then a matrix ``[K, N]``
    of probabilities, one for each component in all, and at most one for the components of a party
    in an atom, made from logits as in :class:`~pyro_fusion.distributions.RelaxedMatching`;
    :meth:`harden` rounds it. Gradients find a local optimum, with no more atoms than there are.

    A model has one guide at a time: a new one tells it how many atoms there are, and for
    ``inclusive`` gives it new ones.

    :param model: the model.
    :param assignment: label -> the atom of each component, LongTensor ``[N]``, to begin with; by
        default that of :meth:`FusionModel.start`.
    :param relaxed: whether the assignment is relaxed.
    :raises StructureError: if the assignment does not fit.
    """

    def __init__(
        self,
        model: FusionModel,
        assignment: Mapping[str, Tensor] | None = None,
        relaxed: bool = False,
    ) -> None:
        super().__init__(name=f"{type(self).__name__}{next(_COUNT)}")
        # In a list: a model is no part of its guide, and a guide not of its model.
        self._model = [model]
        self.assignment: dict[str, Tensor] = {}
        start = model.start() if assignment is None else assignment
        if assignment is not None:
            check_assignment(assignment, model.parts)
        atoms = atoms_of(model, start)
        model.relaxed = relaxed
        self.logits = PyroModule()
        for label, part in model.parts.items():
            self.assignment[label] = compact(start[label])[0]
            if relaxed:
                logits = _LOGIT * one_hot(self.assignment[label]).double()
                device = part.problem.weights.device
                # By number: a label may be no name of an attribute.
                name = f"label{len(self.assignment) - 1}"
                setattr(self.logits, name, torch.nn.Parameter(logits.to(device)))
        if isinstance(model.pooling, Inclusive):
            model.atoms = atoms
        else:
            self.atoms = atoms

    @property
    def model(self) -> FusionModel:
        """The model that this is the guide of."""
        return self._model[0]

    # -- what a program of one's own may override ------------------------------------------------

    def scale(self, label: str | None) -> Tensor:
        """As :meth:`FusionModel.scale`, and by default that. Where the model's draws something,
        this one must draw it from the guide, and call ``FusionModel.scale(self.model, label)``."""
        return self.model.scale(label)

    # -- the program -------------------------------------------------------------------------------

    def factor(self, site: str) -> Factor:
        """The atoms at ``site``, at the present parameters."""
        return self._owner.atoms.factor(site)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site; returns site name -> value."""
        result = {}
        for label, part in self.model.parts.items():
            value = self.soft(label) if self.model.relaxed else self.assignment[label]
            assignment = pyro.sample(f"{label}_assignment", Delta(value, event_dim=value.dim()))
            result[f"{label}_assignment"] = assignment
            result.update(self._pool(label, list(part.problem.local), assignment))
        if self.model.shared:
            everyone = torch.zeros(len(self.model.parties.weights), dtype=torch.long)
            result.update(self._pool(None, list(self.model.shared), everyone))
        return result

    def soft(self, label: str) -> Tensor:
        """The relaxed assignment, ``[K, N]``."""
        sizes = torch.tensor(self.model.parts[label].problem.sizes)
        name = f"label{list(self.model.parts).index(label)}"
        logits, ends = getattr(self.logits, name), sizes.cumsum(0)
        result = torch.empty_like(logits)
        # Parties of one size at once.
        for size in sizes.unique().tolist():
            first = (ends - size)[sizes == size]
            index = (first.unsqueeze(1) + torch.arange(size)).to(logits.device)
            result = result.index_put((index,), relax(logits[index]))
        return result.mT

    def harden(self) -> None:
        """Round a relaxed assignment: each party gets the matching that agrees most with it."""
        if not self.model.relaxed:
            return
        for label, part in self.model.parts.items():
            parties = part.problem.split(self.soft(label).detach())
            self.assignment[label] = torch.cat([Matching(p.mT).mode.cpu() for p in parties])
        self.model.relaxed = False

    def get_extra_state(self) -> dict[str, Tensor]:
        """The assignment, which ``state_dict`` would leave out."""
        return dict(self.assignment)

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self.assignment.update(state)

    def set_atoms(self, label: str, assignment: Tensor, atoms: Mapping[str, Factor]) -> None:
        """Move the assignment ``[N]`` of a label, and its atoms, of batch shape ``[K]``."""
        self.assignment[label] = assignment
        for site, f in atoms.items():
            self.model.num_atoms[label] = f.batch_shape[0]
            self._owner.atoms.set_factor(site, f)

    @property
    def _owner(self) -> FusionModel | FusionGuide:
        return self.model if isinstance(self.model.pooling, Inclusive) else self

    def _pool(
        self, label: str | None, sites: Sequence[str], assignment: Tensor
    ) -> dict[str, Tensor]:
        model = self.model
        if isinstance(model.pooling, Inclusive):
            with _pairs(label, assignment, self.scale(label)) as (_, n):
                return {s: pyro.sample(s, model.local(s, n)) for s in sites}
        # Parameters, outside the plate of components.
        atoms = {s: self.factor(s) for s in sites}
        if model.pooling.needs_base:
            with model.atom_plate(label):
                return {s: pyro.sample(s, FactorDistribution(f)) for s, f in atoms.items()}
        with _pairs(label, assignment, self.scale(label)) as (k, _):
            own = {s: f.index_select(0, k) for s, f in atoms.items()}
            return {s: pyro.sample(s, FactorDistribution(f)) for s, f in own.items()}
