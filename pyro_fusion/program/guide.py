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
from pyro_fusion.errors import ParameterError, StructureError
from pyro_fusion.families import Factor
from pyro_fusion.families.distribution import FactorDistribution
from pyro_fusion.fusion.problem import check_assignment
from pyro_fusion.pooling.components import compact
from pyro_fusion.posterior.guide import unique_name
from pyro_fusion.program.atoms import AtomParams, atoms_at, fit_length
from pyro_fusion.program.model import FusionModel, pairs

__all__ = ["FusionGuide", "check_own"]

# Of a component and its atom in a relaxed assignment to begin with; of others it is zero.
_LOGIT = 3.0


class FusionGuide(PyroModule):
    """The guide of a :class:`FusionModel`.

    Its state is an assignment for each label and, but for ``inclusive``, where they are parameters
    of the model, the atoms: :class:`~pyro.nn.module.PyroParam`, which SVI learns. The assignment is
    moved by :class:`~pyro_fusion.FusionEM`. If relaxed, SVI moves it too: it is then a matrix
    ``[K, N]`` of probabilities, one for each component in all, and at most one for the components
    of a party in an atom, made from logits as in
    :class:`~pyro_fusion.assignment.RelaxedMatching`; :meth:`harden` rounds it. Gradients find a
    local optimum, with no more atoms than there are: take the best of several starts, as with any
    mixture.

    A guide writes nothing into its model, which reads from the assignment itself how many atoms
    there are and whether it is relaxed: several guides of one model work side by side.
    ``Predictive(model, guide=guide)`` runs the model by itself first, to know the shapes of its
    sites: ``harden`` a relaxed guide before, and for ``product`` make the model with as many atoms,
    ``FusionModel(..., assignment=guide.assignment)``. ``Predictive(guide)`` takes any.

    :param model: the model.
    :param assignment: label -> the atom of each component, LongTensor ``[N]``, to begin with; by
        default that of the model.
    :param relaxed: whether the assignment is relaxed.
    :ivar assignment: label -> the atom of each component, LongTensor ``[N]``, on the CPU.
    :ivar num_atoms: label -> K, the atoms that there is room for.
    :raises StructureError: if the assignment does not fit, or is to more atoms than the model has
        (``inclusive``).
    :raises ParameterError: for what is no model.
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
        if not isinstance(model, FusionModel):
            raise ParameterError(f"expected a FusionModel, got {type(model).__name__}")
        problem = model.problem
        if assignment is not None:
            check_assignment(assignment, problem)
        start = model.assignment if assignment is None else assignment
        self.assignment = {label: compact(start[label].cpu())[0] for label in problem.parts}
        self.num_atoms = {label: int(a.max()) + 1 for label, a in self.assignment.items()}
        # For each label, parties of one size and where their components are: [parties, size].
        self._places: dict[str, list[Tensor]] = {}
        for label, part in problem.parts.items():
            device = part.problem.weights.device
            self._places[label] = [p.to(device) for p in _places(part.problem.sizes)]
        self.logits = PyroModule()
        if problem.pooling.draws_from == "atoms":
            self._check_room()
        else:
            self.atoms = AtomParams(problem.atoms(self.assignment)[0])
        self._set_relaxed(relaxed)

    @property
    def model(self) -> FusionModel:
        """The model that this is the guide of."""
        return self._model[0]

    # -- what a program of one's own may override ------------------------------------------------

    def scale(self, label: str | None) -> Tensor:
        """The factor of the log densities, by default that of :meth:`FusionModel.scale`. Where the
        model's draws something, this one must draw it from the guide, and call
        ``FusionModel.scale(self.model, label)``."""
        return self.model.scale(label)

    # -- the program -------------------------------------------------------------------------------

    def factor(self, site: str) -> Factor:
        """The atoms at ``site``, at the present parameters."""
        return self.owner.atoms.factor(site)

    @property
    def owner(self) -> FusionModel | FusionGuide:
        """Whose parameters the atoms are: the model's for ``inclusive``, else the guide's."""
        return self.model if self.model.problem.pooling.draws_from == "atoms" else self

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site; returns site name -> value.

        :raises StructureError: if the model has the atoms of another guide or state, of another
            number.
        """
        problem = self.model.problem
        if problem.pooling.draws_from == "atoms":
            self._check_room()
        result = {}
        assignments: dict[str, Tensor] = {}
        rooms: dict[str, int] = {}
        for label, part in problem.parts.items():
            value = self.soft(label) if self.relaxed else self.assignment[label]
            # All the atoms there is room for, or those in use: the model sees no others.
            rooms[label] = self.num_atoms[label] if self.relaxed else int(value.max()) + 1
            with poutine.scale(scale=part.price):
                assignment = pyro.sample(f"{label}_assignment", Delta(value, event_dim=value.dim()))
            result[f"{label}_assignment"] = assignments[label] = assignment
            own = list(part.problem.local)
            result.update(self._pool(label, own, assignment, rooms[label]))
        for site, link in problem.links.items():
            place = link.places(link.labels, assignments, rooms)
            result.update(self._pool(site, [site], place, link.size(rooms)))
        if problem.shared:
            result.update(self._pool(None, list(problem.shared), self.model.everyone, 1))
        return result

    def _check_room(self) -> None:
        """Check, where the atoms are the model's, that it has as many as the guide knows of."""
        for label, part in self.model.problem.parts.items():
            sites, number = list(part.problem.local), self.num_atoms[label]
            if sites and (there := self.model.atoms.length(sites[0])) != number:
                raise StructureError(
                    f"label '{label}': the guide has {number} atoms, but its model {there}, of "
                    "another guide or state: load the model's too, or make the model with this "
                    "assignment, FusionModel(..., assignment=assignment)"
                )

    def soft(self, label: str) -> Tensor:
        """The relaxed assignment, ``[K, N]``."""
        logits = getattr(self.logits, self._name(label))
        result = torch.empty_like(logits)
        for place in self._places[label]:
            result = result.index_put((place,), relax(logits[place]))
        return result.mT

    def harden(self) -> None:
        """Round a relaxed assignment: each party gets the matching that agrees most with it. Atoms
        that nobody has then stay as mere room, after those in use where they are the guide's, so
        that an optimizer can go on."""
        if not self.relaxed:
            return
        for label, part in self.model.problem.parts.items():
            parties = part.problem.split(self.soft(label).detach().cpu())
            hard = torch.cat([Matching(p.mT).mode for p in parties])
            if self.owner is self:
                used = hard.unique()
                rest = [k for k in range(self.num_atoms[label]) if k not in set(used.tolist())]
                order = torch.cat([used, torch.tensor(rest, dtype=torch.long)])
                for site in part.problem.local:
                    f = self.factor(site)
                    self.atoms.set_factor(site, f.map(torch.detach).index_select(0, order))
                hard = compact(hard)[0]
            self.assignment[label] = hard
        self._set_relaxed(False)

    def _name(self, label: str) -> str:
        # By number: a label may be no name of an attribute.
        return f"label{sorted(self.model.problem.parts).index(label)}"

    def _set_relaxed(self, relaxed: bool) -> None:
        """Make logits, or drop them."""
        if relaxed and self.model.problem.links:
            raise StructureError(
                f"sites {sorted(self.model.problem.links)} have several labels: assignments along "
                "these cannot be relaxed"
            )
        self.relaxed = relaxed
        for label, assignment in self.assignment.items():
            name = self._name(label)
            if relaxed:
                device = self.model.problem.parts[label].problem.weights.device
                logits = _LOGIT * one_hot(assignment, self.num_atoms[label]).double()
                setattr(self.logits, name, PyroParam(logits.to(device)))
            elif hasattr(self.logits, name):
                delattr(self.logits, name)

    # -- moves -------------------------------------------------------------------------------------

    def move(self, assignment: Mapping[str, Tensor], atoms: Mapping[str, Factor]) -> None:
        """Move the assignments ``[N]`` of some labels, to atoms ``0, ..., K-1``, and the atoms at
        some sites, of batch shape ``[K]``; but for ``inclusive``, whose atoms are the model's."""
        for label, a in assignment.items():
            self.num_atoms[label] = int(a.max()) + 1
            self.assignment[label] = a.cpu()
        if self.owner is self:
            for site, f in atoms.items():
                self.atoms.set_factor(site, f)

    def get_extra_state(self) -> dict[str, Any]:
        """The part of the state that ``state_dict`` would leave out: the assignment, and whether it
        is relaxed."""
        return {
            "assignment": dict(self.assignment),
            "num_atoms": dict(self.num_atoms),
            "relaxed": self.relaxed,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """:raises StructureError: if the assignment does not fit."""
        check_assignment(state["assignment"], self.model.problem)
        for label, assignment in state["assignment"].items():
            self.assignment[label] = assignment.cpu()
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

    def _pool(
        self, label: str | None, sites: Sequence[str], assignment: Tensor, room: int
    ) -> dict[str, Tensor]:
        model, draws_from = self.model, self.model.problem.pooling.draws_from
        if draws_from == "atoms":
            with pairs(label, assignment, self.scale(label)) as (_, n):
                return {s: pyro.sample(s, model.local(s, n)) for s in sites}
        # Parameters, outside the plate of components.
        atoms = {s: self.factor(s) for s in sites}
        if draws_from == "prior":
            with model.atom_plate(label, room):
                own = {s: _first(f, room) for s, f in atoms.items()}
                return {s: pyro.sample(s, FactorDistribution(f)) for s, f in own.items()}
        with pairs(label, assignment, self.scale(label)) as (k, _):
            own = {s: atoms_at(f, k) for s, f in atoms.items()}
            return {s: pyro.sample(s, FactorDistribution(f)) for s, f in own.items()}


def _first(f: Factor, count: int) -> Factor:
    """The first atoms of those that there is room for."""
    return f if f.batch_shape[0] == count else f.map(lambda v: v[:count])


def _places(sizes: Sequence[int]) -> list[Tensor]:
    """The places of the components of the parties of each size, ``[parties, size]`` for each."""
    every = torch.tensor(sizes)
    first = every.cumsum(0) - every
    return [first[every == n].unsqueeze(1) + torch.arange(n) for n in sorted(set(sizes))]


def check_own(model: FusionModel, guide: FusionGuide | None = None) -> None:
    """:raises ParameterError: if a method is overridden that has a closed form, or if the guide is
    that of another model, or relaxed."""
    methods: list[tuple[PyroModule, type[PyroModule], str]] = [
        (model, FusionModel, name) for name in ("assignment_prior", "local", "scale")
    ]
    if guide is not None:
        methods.append((guide, FusionGuide, "scale"))
    for owner, base, name in methods:
        if getattr(getattr(owner, name), "__func__", None) is not getattr(base, name):
            raise ParameterError(
                f"{type(owner).__name__} overrides {name}(): there are closed forms for "
                f"{base.__name__}'s own alone; use SVI"
            )
    if guide is not None and guide.model is not model:
        raise ParameterError("the guide is that of another model")
    if guide is not None and guide.relaxed:
        raise ParameterError("the guide is relaxed: harden() it first")
