# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Fusion as a Pyro program: the guide of a model of ``model.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.nn.module import PyroModule, PyroParam
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_fusion.assignment.matching import Matching, relax
from pyro_fusion.errors import StructureError
from pyro_fusion.families import Factor
from pyro_fusion.families.distribution import FactorDistribution
from pyro_fusion.fusion.parties import check_assignment, locating
from pyro_fusion.pooling.components import compact
from pyro_fusion.pooling.kl import Inclusive
from pyro_fusion.posterior.guide import fit_length, unique_name
from pyro_fusion.program.model import FusionModel, atoms_at, atoms_of, pairs

__all__ = ["FusionGuide"]

# Of a component and its atom in a relaxed assignment to begin with; of others it is zero.
_LOGIT = 3.0


class FusionGuide(PyroModule):
    """The guide of a :class:`FusionModel`.

    Its state is an assignment for each label and, but for ``inclusive``, where they belong to the
    model, the atoms: :class:`~pyro.nn.module.PyroParam`, which SVI learns. The assignment is moved
    by :class:`~pyro_fusion.FusionEM`. If relaxed, SVI moves it too: it is then a matrix ``[K, N]``
    of probabilities, one for each component in all, and at most one for the components of a party
    in an atom, made from logits as in :class:`~pyro_fusion.assignment.RelaxedMatching`;
    :meth:`harden` rounds it. Gradients find a local optimum, with no more atoms than there are:
    take the best of several starts, as with any mixture.

    Several guides of one model may be used in turn; but for ``inclusive``, where the last has given
    the model its atoms.

    :param model: the model.
    :param assignment: label -> the atom of each component, LongTensor ``[N]``, to begin with; by
        default that of :meth:`FusionModel.start() <pyro_fusion.FusionModel.start>`.
    :param relaxed: whether the assignment is relaxed.
    :ivar assignment: label -> the atom of each component, LongTensor ``[N]``.
    :ivar num_atoms: label -> K.
    :raises StructureError: if the assignment does not fit.
    """

    def __init__(
        self,
        model: FusionModel,
        assignment: Mapping[str, Tensor] | None = None,
        relaxed: bool = False,
    ) -> None:
        super().__init__(name=unique_name(type(self)))
        # In a list: a model is no part of its guide, and a guide not of its model.
        self._model = [model]
        if assignment is not None:
            check_assignment(assignment, model.parts)
        start = model.start() if assignment is None else assignment
        atoms, self.num_atoms = atoms_of(model, start)
        self.assignment: dict[str, Tensor] = {}
        # Atoms that some component has: of those there are, all but after rounding.
        self._used = dict(self.num_atoms)
        # For each label, parties of one size and where their components are: [parties, size].
        self._places: dict[str, list[Tensor]] = {}
        for label, part in model.parts.items():
            device = part.problem.weights.device
            self.assignment[label] = compact(start[label])[0].to(device)
            self._places[label] = [p.to(device) for p in _places(part.problem.sizes)]
        self.logits = PyroModule()
        self._set_relaxed(relaxed)
        if isinstance(model.pooling, Inclusive):
            model.atoms = atoms
        else:
            self.atoms = atoms
        self._tell()

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
        """Sample every site; returns site name -> value.

        :raises StructureError: if the model has the atoms of another guide or state, of another
            number.
        """
        self._tell()
        result = {}
        assignments: dict[str, Tensor] = {}
        for label, part in self.model.parts.items():
            value = self.soft(label) if self.relaxed else self.assignment[label]
            with poutine.scale(scale=part.price):
                assignment = pyro.sample(f"{label}_assignment", Delta(value, event_dim=value.dim()))
            result[f"{label}_assignment"] = assignments[label] = assignment
            result.update(self._pool(label, list(part.problem.local), assignment))
        for site in self.model.links:
            result.update(self._pool(site, [site], self.model.places(site, assignments)))
        if self.model.shared:
            result.update(self._pool(None, list(self.model.shared), self.model.everyone))
        return result

    def _tell(self) -> None:
        """Tell the model what it is to expect: it is called after its guide."""
        model = self.model
        model.relaxed = self.relaxed
        for label, part in model.parts.items():
            number = self.num_atoms[label]
            sites = list(part.problem.local)
            if isinstance(model.pooling, Inclusive) and sites:
                there = model.atoms.length(sites[0])
                if there != number:
                    raise StructureError(
                        f"label '{label}': the guide has {number} atoms, but its model {there}, of "
                        "another guide or state: load the model's too, or make a new guide"
                    )
            model.num_atoms[label] = number
            used = self._used[label]
            model.set_prior(label, part.assignment_prior.update(used, part.problem.num_parties))

    def soft(self, label: str) -> Tensor:
        """The relaxed assignment, ``[K, N]``."""
        logits = getattr(self.logits, self._name(label))
        result = torch.empty_like(logits)
        for place in self._places[label]:
            result = result.index_put((place,), relax(logits[place]))
        return result.mT

    def harden(self) -> None:
        """Round a relaxed assignment: each party gets the matching that agrees most with it. Atoms
        that nobody has then stay as mere room, so that an optimizer can go on."""
        if not self.relaxed:
            return
        for label, part in self.model.parts.items():
            parties = part.problem.split(self.soft(label).detach().cpu())
            hard = torch.cat([Matching(p.mT).mode for p in parties])
            self.assignment[label] = hard.to(self.assignment[label].device)
            self._used[label] = len(hard.unique())
        self._set_relaxed(False)
        self._tell()

    def _name(self, label: str) -> str:
        # By number: a label may be no name of an attribute.
        return f"label{sorted(self.model.parts).index(label)}"

    def _set_relaxed(self, relaxed: bool) -> None:
        """Make logits, or drop them."""
        if relaxed and self.model.links:
            raise StructureError(
                f"sites {sorted(self.model.links)} have several labels: assignments along these "
                "cannot be relaxed"
            )
        self.relaxed = relaxed
        for label, assignment in self.assignment.items():
            name = self._name(label)
            if relaxed:
                logits = _LOGIT * one_hot(assignment, self.num_atoms[label]).double()
                setattr(self.logits, name, PyroParam(logits))
            elif hasattr(self.logits, name):
                delattr(self.logits, name)

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict`` would leave out: the assignment, and whether it is relaxed."""
        return {
            "assignment": dict(self.assignment),
            "num_atoms": dict(self.num_atoms),
            "relaxed": self.relaxed,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """:raises StructureError: if the assignment does not fit."""
        check_assignment(state["assignment"], self.model.parts)
        for label, assignment in state["assignment"].items():
            self.assignment[label] = assignment.to(self.assignment[label].device)
            self._used[label] = len(assignment.unique())
        self.num_atoms.update(state["num_atoms"])
        if self.relaxed != state["relaxed"]:
            self._set_relaxed(state["relaxed"])

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        # First: it says what parameters there are, and may not fit.
        if f"{prefix}_extra_state" in state:
            self.set_extra_state(state[f"{prefix}_extra_state"])
        for name, logits in self.logits.named_parameters():
            fit_length(logits, state.get(f"{prefix}logits.{name}"), 1)
        super()._load_from_state_dict(state, prefix, *rest)

    def set_shared(self) -> None:
        """Move the sites without a label to their barycentres, and those of several labels."""
        for problem in self.model.shared.values():
            for site, f in problem.barycenter(self.model.everyone, 1).items():
                self._owner.atoms.set_factor(site, f)
        for site, link in self.model.links.items():
            with locating(link.messages):
                f = link.atoms(link.problem, self.assignment, self.num_atoms)
            self._owner.atoms.set_factor(site, f)

    def set_atoms(self, label: str, assignment: Tensor, atoms: Mapping[str, Factor]) -> None:
        """Move the assignment ``[N]`` of a label, and its atoms, of batch shape ``[K]``."""
        self.num_atoms[label] = self._used[label] = int(assignment.max()) + 1
        self.assignment[label] = assignment.to(self.assignment[label].device, non_blocking=True)
        for site, f in atoms.items():
            if site not in self.model.links:
                self._owner.atoms.set_factor(site, f)
        self._tell()

    @property
    def _owner(self) -> FusionModel | FusionGuide:
        return self.model if isinstance(self.model.pooling, Inclusive) else self

    def _pool(
        self, label: str | None, sites: Sequence[str], assignment: Tensor
    ) -> dict[str, Tensor]:
        model = self.model
        if isinstance(model.pooling, Inclusive):
            with pairs(label, assignment, self.scale(label)) as (_, n):
                return {s: pyro.sample(s, model.local(s, n)) for s in sites}
        # Parameters, outside the plate of components.
        atoms = {s: self.factor(s) for s in sites}
        if model.pooling.needs_prior:
            with model.atom_plate(label):
                return {s: pyro.sample(s, FactorDistribution(f)) for s, f in atoms.items()}
        with pairs(label, assignment, self.scale(label)) as (k, _):
            own = {s: atoms_at(f, k) for s, f in atoms.items()}
            return {s: pyro.sample(s, FactorDistribution(f)) for s, f in own.items()}


def _places(sizes: Sequence[int]) -> list[Tensor]:
    """Where the components of the parties of each size are, ``[parties, size]``."""
    every = torch.tensor(sizes)
    first = every.cumsum(0) - every
    return [first[every == n].unsqueeze(1) + torch.arange(n) for n in sorted(set(sizes))]
