# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The problem of a fusion: the components along each label, the sites that link labels, and the
sites that all parties share. ``search`` solves it; the Pyro program is built on it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pyro_fusion.assignment import AssignmentPrior, AssignmentProblem
from pyro_fusion.errors import ParameterError, Party, StructureError, naming, warn_user
from pyro_fusion.families import Factor
from pyro_fusion.fusion.arguments import Inputs, Prior
from pyro_fusion.fusion.ascent import expectation_maximization
from pyro_fusion.fusion.checks import Weights, check_dispersion, warn_identical
from pyro_fusion.fusion.links import LinkedSite
from pyro_fusion.fusion.parties import LabelProblem, Parties, locating, searching
from pyro_fusion.fusion.persistence import STEP, DispersionPath
from pyro_fusion.fusion.seeding import starts
from pyro_fusion.pooling import Pooling, pooling_named
from pyro_fusion.pooling.components import Components, compact
from pyro_fusion.posterior import Axes, Posterior

__all__ = ["FusionProblem", "check_assignment", "dispersion_path"]


@dataclass(frozen=True)
class FusionProblem:
    """The local posteriors of all parties, checked and taken apart into what is assigned and what
    is pooled directly.

    :ivar parties: the posteriors, their weights and names, the pooling, and the roles of the sites.
    :ivar parts: label -> the components along it; of a label that is linked to others, those of its
        own sites alone.
    :ivar links: site -> a site with several labels.
    :ivar shared: site -> a site without a label, of which each party has one component.
    """

    parties: Parties
    parts: Mapping[str, LabelProblem]
    links: Mapping[str, LinkedSite]
    shared: Mapping[str, Components]

    @classmethod
    def of(
        cls,
        posteriors: Inputs,
        pooling: str | Pooling = "exclusive",
        assignment_prior: AssignmentPrior | Mapping[str, AssignmentPrior] | None = None,
        *,
        weights: Weights = None,
        prior: Prior | None = None,
        axes: Axes | Literal["auto"] | None = None,
        dispersion: float | None = None,
    ) -> FusionProblem:
        """Read and check what was given, and estimate the dispersion of each label; arguments and
        errors as for :func:`~pyro_fusion.fuse`."""
        how = pooling_named(pooling)
        given = check_dispersion(dispersion)
        parties = Parties.of(posteriors, how, weights, prior, axes)
        with naming(parties.names):
            priors = parties.priors(assignment_prior)
            warn_identical(parties.posteriors, parties.names)
            parts: dict[str, LabelProblem] = {}
            links: dict[str, LinkedSite] = {}
            for group in parties.roles.groups:
                own, between = _parts(parties, group, priors, given)
                parts.update(own)
                links.update(between)
            for part in parts.values():
                if part.doubt:
                    warn_user(part.doubt)
            shared = {site: parties.shared(site) for site in parties.roles.shared}
        return cls(parties=parties, parts=parts, links=links, shared=shared)

    @property
    def num_parties(self) -> int:
        """S, the number of parties."""
        return len(self.parties.posteriors)

    @property
    def pooling(self) -> Pooling:
        """The pooling: it says how components become one atom."""
        return self.parties.pooling

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Labels that are linked by sites, in the order in which they are first assigned; a label
        that is linked to no other is a group of its own."""
        return self.parties.roles.groups

    @property
    def everyone(self) -> Tensor:
        """The assignment of all parties to the one atom of a shared site: zeros ``[S]``."""
        return torch.zeros_like(self.parties.weights, dtype=torch.long)

    # -- assignments -----------------------------------------------------------------------------

    def given(self, label: str, assignment: Mapping[str, Tensor]) -> LabelProblem:
        """The components along ``label``, in the light of what is given of the assignments ``[N]``
        along the labels that it shares sites with."""
        part = self.parts[label]
        if not any(label in link.labels for link in self.links.values()):
            return part
        return self.parties.labelled(label, part.assignment_prior, part.dispersion, assignment)

    def start(self, seed: int = 0) -> dict[str, Tensor]:
        """An assignment to begin with, label -> LongTensor ``[N]``: the parties join one after the
        other."""
        result: dict[str, Tensor] = {}
        with naming(self.parties.names):
            for label in self.parts:
                result[label] = _start(self.given(label, result), seed)
        return result

    def linked_objective(self, group: Sequence[str], assignment: Mapping[str, Tensor]) -> float:
        """The part of F of labels that are linked, at the best atoms for their assignments ``[N]``:
        sites in units of one dispersion, and the assignment prior of each label in proportion to
        its own."""
        groups, counts = {}, {}
        for label in group:
            groups[label], counts[label] = compact(assignment[label].cpu())
        total = 0.0
        for label in group:
            part, num_parties = self.parts[label], self.parts[label].problem.num_parties
            belief = part.assignment_prior.update(counts[label], num_parties)
            none = torch.zeros(counts[label], len(groups[label]), dtype=torch.float64)
            value = AssignmentProblem.of(part.problem.split(none), belief).objective(groups[label])
            total += part.price * (belief.constant(num_parties) + value)
            total += part.problem.divergence(groups[label], counts[label])
        for link in self.links.values():
            if link.labels[0] in group:
                total += link.divergence(groups, counts)
        return total

    # -- atoms -----------------------------------------------------------------------------------

    @cached_property
    def shared_atoms(self) -> dict[str, Factor]:
        """Site -> the barycentre of a shared site over all parties, batch shape ``[1]``.

        :raises ParameterError: where ``product`` is improper.
        """
        result: dict[str, Factor] = {}
        for problem in self.shared.values():
            with naming(self.parties.names), locating(problem):
                result.update(problem.barycenter(self.everyone, 1))
        return result

    @cached_property
    def shared_objective(self) -> float:
        """The divergence of the shared sites from their atoms, summed: a constant part of F."""
        return sum(
            (
                problem.divergence(self.everyone, 1, {site: self.shared_atoms[site]})
                for site, problem in self.shared.items()
            ),
            0.0,
        )

    def atoms(self, assignment: Mapping[str, Tensor]) -> tuple[dict[str, Factor], dict[str, int]]:
        """The best atoms for an assignment, as F scores them (for ``product`` tempered), and how
        many each label has: site -> factor of batch shape ``[K]``, of a site with several labels
        ``[K K' ...]``, of a shared one ``[1]``."""
        factors: dict[str, Factor] = {}
        groups, counts = {}, {}
        for label, part in self.parts.items():
            groups[label], counts[label] = compact(assignment[label])
            with naming(self.parties.names), locating(part.messages):
                factors.update(part.problem.barycenter(groups[label], counts[label]))
        factors.update(self.linked_atoms(groups, counts))
        return factors | self.shared_atoms, counts

    def linked_atoms(
        self, groups: Mapping[str, Tensor], counts: Mapping[str, int]
    ) -> dict[str, Factor]:
        """The best atoms of the sites with several labels, as F scores them; of compact assignments
        ``[N]`` to ``counts`` atoms."""
        result = {}
        for site, link in self.links.items():
            with naming(self.parties.names), locating(link.messages):
                result[site] = link.atoms(link.problem, groups, counts)
        return result

    def fused(self, groups: Mapping[str, Tensor], counts: Mapping[str, int]) -> Posterior:
        """The fused posterior of an assignment: messages pooled as they were handed over, and what
        follows the assignment carried along.

        :param groups: label -> the atom of each component, LongTensor ``[N]``, all atoms in use.
        :param counts: label -> K.
        """
        parties, first = self.parties, self.parties.posteriors[0]
        with naming(parties.names):
            factors = {
                site: parties.unbatched(site, atom) for site, atom in self.shared_atoms.items()
            }
            for label, part in self.parts.items():
                factors.update(parties.pool(part, groups[label], counts[label]))
            for site, link in self.links.items():
                with locating(link.messages):
                    factors[site] = link.pooled(first, groups, counts)
            for site, label in parties.roles.carried.items():
                own = groups[label].split(self.parts[label].problem.sizes)
                factors[site] = parties.carry(site, own, counts[label])
            ordered = {k: factors[k].to(dtype=f.dtype) for k, f in first.decomposed.items()}
            return Posterior(ordered, first.axes, plates=first.plates, outgoing=first.outgoing)


def dispersion_path(
    posteriors: Inputs,
    pooling: str | Pooling = "exclusive",
    *,
    label: str | None = None,
    weights: Weights = None,
    prior: Prior | None = None,
    axes: Axes | Literal["auto"] | None = None,
    step: float = 1.25,
) -> DispersionPath:
    """Follow the assignment along one label as the dispersion T grows: how many atoms there are at
    each T, which components they have, and over which stretches of T nothing changes. Draw it with
    :func:`~pyro_fusion.plotting.plot_dispersion_path`.

    :func:`fuse` takes T from the longest stretch of such a path, with wider steps.

    :param posteriors, pooling, weights, prior, axes: as for :func:`~pyro_fusion.fuse`.
    :param label: which label; may be left out if there is one.
    :param step: by how much the price of a merge grows from one value of T to the next.
    :raises StructureError: for an unknown label, none where there are several, or one party.
    :raises ParameterError: unless ``step`` is above 1.
    """
    if not 1 < step < math.inf:
        raise ParameterError(f"step must be above 1, got {step}")
    parties = Parties.of(posteriors, pooling_named(pooling), weights, prior, axes)
    labels = sorted(parties.roles.matched)
    if len(parties.posteriors) < 2 or not labels:
        raise StructureError(
            "a path of the dispersion needs two parties at least, and a site with a label, got "
            f"{len(parties.posteriors)} and labels {labels}"
        )
    if label is None and len(labels) == 1:
        label = labels[0]
    if label not in labels:
        raise StructureError(f"expected `label` to be one of {labels}, got {label!r}")
    with naming(parties.names):
        (group,) = (x for x in parties.roles.groups if label in x)
        path = _parts(parties, group, parties.priors(None), None, step)[0][label].path
    assert path is not None
    return path


def check_assignment(assignment: Mapping[str, Tensor], problem: FusionProblem) -> None:
    """Check that each label has an atom for each component, no two of a party the same, and no
    more than its assignment prior allows.

    :raises StructureError: naming the label, and the party where it can.
    """
    with naming(problem.parties.names):
        _check_assignment(assignment, problem.parts)


def _check_assignment(assignment: Mapping[str, Tensor], parts: Mapping[str, LabelProblem]) -> None:
    if set(assignment) != set(parts):
        raise StructureError(
            f"expected an assignment for {sorted(parts)}, got one for {sorted(assignment)}"
        )
    for label, a in assignment.items():
        sizes, limit = parts[label].problem.sizes, parts[label].assignment_prior.num_atoms
        if a.shape != (sum(sizes),) or a.is_floating_point():
            raise StructureError(
                f"assignment of '{label}': expected a LongTensor of shape [{sum(sizes)}], got "
                f"{a.dtype} of shape {list(a.shape)}"
            )
        for s, own in enumerate(a.split(sizes)):
            if len(own.unique()) < len(own):
                raise StructureError(
                    [
                        f"assignment of '{label}', ",
                        Party(s),
                        f": expected a different atom for each component, got {own.tolist()}",
                    ]
                )
        count = len(a.unique())
        if limit is not None and count > limit:
            raise StructureError(
                f"assignment of '{label}': the assignment prior allows {limit} atoms, got {count}"
            )


def _start(part: LabelProblem, seed: int) -> Tensor:
    with searching(part):
        begin = starts(part.ordered, part.assignment_prior, 0, seed, guess=part.guess)
        return part.as_given(next(begin))


def _parts(
    parties: Parties,
    group: tuple[str, ...],
    priors: Mapping[str, AssignmentPrior],
    dispersion: float | None,
    step: float = STEP,
) -> tuple[dict[str, LabelProblem], dict[str, LinkedSite]]:
    """The components along labels that are linked, and the sites that link them."""
    if len(group) == 1:
        part = parties.labelled(group[0], priors[group[0]], dispersion, step=step)
        return {group[0]: part}, {}
    # How far apart components are depends on the assignments of the others, and so does T.
    found: dict[str, Tensor] = {}
    for label in group:
        part = parties.labelled(label, priors[label], dispersion, found)
        start = _start(part, seed=0)[part.order]
        with searching(part):
            end = expectation_maximization(
                part.ordered, part.assignment_prior, start, collapsed=False
            )
        found[label] = part.as_given(end.groups)
    parts = {x: parties.labelled(x, priors[x], dispersion, found, step) for x in group}
    if parties.pooling.tempers and dispersion is None:
        # The entries that labels have in common are tempered once.
        scale = statistics.geometric_mean(part.dispersion for part in parts.values())
        again = {x: parties.labelled(x, priors[x], scale, found) for x in group}
        parts = {x: again[x].with_path_of(parts[x]) for x in group}
    return parties.in_one_unit(parts)
