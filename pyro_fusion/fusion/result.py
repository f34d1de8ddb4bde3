# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The result of a fusion: the posterior, who shares which atom, and how the search ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.assignment.problem import relative_gap
from pyro_fusion.errors import StructureError
from pyro_fusion.fusion.draws import AssignmentDraws
from pyro_fusion.fusion.margins import margins
from pyro_fusion.fusion.parties import LabelProblem
from pyro_fusion.fusion.persistence import DispersionPath
from pyro_fusion.fusion.rounds import PartyPrior, party_priors
from pyro_fusion.pooling.components import by_appearance
from pyro_fusion.pooling.merges import Merges
from pyro_fusion.posterior import Posterior, PosteriorGuide

__all__ = ["FusedLabel", "Fusion", "StopReason"]

# A component of which the margin in F is smaller is called doubtful in the summary.
DOUBTFUL = 0.5


class StopReason(Enum):
    """Why a search ended; the value says what to do about it."""

    AGREED = "three starts came to the same end, and none to a better one"
    EXHAUSTED = "all starts were used before three came to the best end: more `restarts` may help"
    ITERATION_LIMIT = "F was still falling: raise `max_iterations`"
    INTERRUPTED = "interrupted: this is the best so far, run it again to go on"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class FusedLabel:
    """The assignment of the components along one label to atoms, and how it was found.

    :ivar label: the label.
    :ivar assignment: per party a LongTensor ``[L_s]``: the atom of each component.
    :ivar num_atoms: K. Atoms are numbered by falling popularity.
    :ivar popularity: how many parties have each atom, LongTensor ``[K]``.
    :ivar objective: F after the start and after each iteration; never rises. Of a label that shares
        sites with others: its part, given their assignments, in the last round.
    :ivar dispersion: T.
    :ivar assignment_prior: the prior of the assignment, with its parameters as estimated.
    :ivar stopped: why the search ended, with what to do about it as its text.
    :ivar restarts: the objective that each start ended in.
    :ivar bound: no assignment to the same atoms has a lower F; ``-inf`` unless the solver finds it.
    :ivar dispersion_path: what T was estimated from; None if it was given.
    :ivar problem: the components that were assigned, in the light of the other labels.
    :ivar draws: of the assignment at this T: how probable each number of atoms is, and each pair to
        be the same. None unless ``num_draws`` asked for them; after an interrupt fewer.
    """

    label: str
    assignment: list[Tensor]
    num_atoms: int
    popularity: Tensor
    objective: list[float]
    dispersion: float
    assignment_prior: AssignmentPrior
    stopped: StopReason
    restarts: list[float]
    bound: float = -math.inf
    dispersion_path: DispersionPath | None = field(default=None, repr=False)
    problem: LabelProblem | None = field(default=None, repr=False, compare=False)
    draws: AssignmentDraws | None = None

    @property
    def converged(self) -> bool:
        """True if coordinate ascent stopped by itself."""
        return self.stopped not in (StopReason.ITERATION_LIMIT, StopReason.INTERRUPTED)

    @property
    def price_ratio(self) -> float:
        """How well the posteriors tell components apart: what it costs to merge two components of
        one party (upper quartile), over what it costs to merge a component with its counterpart in
        another party (median of the estimated share that has one). Below 20 they hardly do; NaN for
        one party, infinite where no party has two components."""
        return math.nan if self._merges is None else self._merges.price_ratio

    @property
    def shared(self) -> float:
        """The estimated share of components that have a counterpart in another party, read off the
        prices of merges and not off the assignment; NaN for one party, or where no party has two
        components."""
        return math.nan if self._merges is None else self._merges.shared

    @cached_property
    def _merges(self) -> Merges | None:
        if self.problem is None or len(self.assignment) == 1:
            return None
        return self.problem.merges

    @cached_property
    def margins(self) -> list[Tensor]:
        """Per party by how much F would rise if a component went to its next best place, ``[L_s]``
        float64 (see :func:`~pyro_fusion.fusion.margins.margins`): where it is small, the component
        is doubtful. A difference of ``log 20`` is odds of 20 to 1 where F is minus a log
        probability, as for ``product``."""
        sizes = [len(a) for a in self.assignment]
        if self.problem is None or len(sizes) == 1:
            return [torch.full((n,), math.inf, dtype=torch.float64) for n in sizes]
        groups = torch.cat(self.assignment)
        own = margins(self.problem.problem, self.assignment_prior, groups)
        return list(own.split(sizes))

    @property
    def gap(self) -> float:
        """The distance of F from the bound, relative to F: 0.03 reads "within 3 % of optimal"."""
        return relative_gap(self.objective[-1], self.bound)


@dataclass(frozen=True)
class Fusion:
    """The result of :func:`fuse`.

    :ivar posterior: the fused posterior.
    :ivar pooling: name of the pooling.
    :ivar labels: label -> :class:`FusedLabel`; empty if no site has a label.
    :ivar objective: F after the start and after each iteration; never rises. Labels are done in
        turn: those that share sites are one, and their iterations rounds. It is that of the
        barycentres, before effects are averaged (``outgoing``) and with messages tempered.
    :ivar shared_objective: the divergence of the sites without a label, a constant.
    :ivar parties: names of the parties -> the posteriors that were fused, in order.
    """

    posterior: Posterior
    pooling: str
    labels: Mapping[str, FusedLabel]
    objective: list[float]
    shared_objective: float
    parties: Mapping[str, Posterior]

    @property
    def party_names(self) -> tuple[str, ...]:
        """Names of the parties, in order; of a list, their numbers."""
        return tuple(self.parties)

    @cached_property
    def guide(self) -> PosteriorGuide:
        """A Pyro guide at the fused posterior, for ``Predictive`` or as a warm start of ``SVI``,
        which moves it: it is the same object each time, and ``PosteriorGuide(fusion.posterior)`` a
        new one."""
        return PosteriorGuide(self.posterior)

    def only_label(self) -> FusedLabel:
        """The result of the label, if there is one.

        :raises StructureError: if there is none, or several.
        """
        if not self.labels:
            raise StructureError(
                "no site has a label, so nothing was assigned: give axes where the posteriors are "
                "made, or put the components into a plate of the model"
            )
        if len(self.labels) != 1:
            raise StructureError(
                f"expected one label, this fusion has {sorted(self.labels)}: "
                "use fusion.labels[label]"
            )
        return next(iter(self.labels.values()))

    @property
    def assignment(self) -> list[Tensor]:
        """Per party a LongTensor ``[L_s]``: which atom each component became."""
        return self.only_label().assignment

    @property
    def num_atoms(self) -> int:
        """K, the number of atoms."""
        return self.only_label().num_atoms

    @property
    def popularity(self) -> Tensor:
        """The number of parties that have each atom, LongTensor ``[K]``."""
        return self.only_label().popularity

    @property
    def dispersion(self) -> float:
        """T, as given or estimated."""
        return self.only_label().dispersion

    @property
    def dispersion_path(self) -> DispersionPath | None:
        """The assignment as the dispersion T grows, from which T was estimated; None if T was
        given."""
        return self.only_label().dispersion_path

    @property
    def margins(self) -> list[Tensor]:
        """Per party by how much F would rise if a component went to its next best place,
        ``[L_s]``."""
        return self.only_label().margins

    @property
    def converged(self) -> bool:
        """True if the assignment along every label converged."""
        return all(m.converged for m in self.labels.values())

    @property
    def interrupted(self) -> bool:
        """True if an interrupt (Ctrl-C) ended the search: the result is the best so far."""
        return any(m.stopped is StopReason.INTERRUPTED for m in self.labels.values())

    def as_prior(
        self,
        strength: float = 10.0,
        *,
        atoms: Literal["own", "all"] = "own",
        sites: Sequence[str] | None = None,
    ) -> dict[str, PartyPrior]:
        """The atoms as priors for a second round, in which each party fits its data once more and
        all are fused again: name of the party -> its prior.

        Its evidence is bounded, since the atoms have seen the party's data already, and since
        parties may differ. Families with counts keep ``strength`` points' worth, three times as
        many for a covariance, and never more than the atom has; a Dirichlet of ``V`` categories
        ``strength · √V``. Normals and MultivariateNormals (also behind transforms) have no counts:
        they are never narrower than ``T`` times the mean variance of the atom's members, which is
        how far apart two of these may be and mean the same; ``strength`` does not touch them.

        Only sites with one label, along which components are told apart, get a prior. Shared sites
        and weights of components are a party's own business and keep the prior of its model, as do
        sites with several labels and ``outgoing`` ones.

        :param strength: in points.
        :param atoms: "own": each party gets those that its components became, in the order of its
            components. "all": each gets all, in their order, for a fit with as many components as
            there are atoms, of which it then drops those that few of its points speak for; so a
            wrong assignment is mended too.
        :param sites: those to take; by default all that can be.
        :raises ParameterError: if the strength is not positive.
        :raises StructureError: if a site has no label to tell components apart by, or none has.
        :raises UnsupportedFamilyError: for a family whose evidence cannot be bounded.
        """
        return party_priors(
            self.posterior,
            self.parties,
            {label: m.assignment for label, m in self.labels.items()},
            {label: m.dispersion for label, m in self.labels.items()},
            strength,
            atoms,
            sites,
        )

    def summary(self) -> str:
        """A table to print: one block per label, one row per atom."""
        shared = [s for s, axes in self.posterior.axes.items() if not any(axes)]
        lines = [f"Fusion of {self._parties()}, {self.pooling} pooling"]
        if shared:
            lines.append(f"shared sites: {', '.join(shared)}")
        for m in self.labels.values():
            state = "converged" if m.converged else "NOT converged"
            steps = len(m.objective) - 1
            after = f"after {steps} iterations" if steps else "at once"
            known = "" if math.isinf(m.bound) else f", within {100 * m.gap:.2g} % for these atoms"
            if m.stopped is not StopReason.AGREED:
                known += f"\n{m.stopped}"
            if m.draws is not None:
                known += f"\n{len(m.draws.num_atoms)} draws: {m.draws.num_atoms_summary()}"
            lines += [
                "",
                f"{sum(len(a) for a in m.assignment)} × {m.label} → {m.num_atoms} atoms "
                f"({m.assignment_prior}, dispersion {m.dispersion:.4g})",
                f"objective {m.objective[-1]:.6g}, {state} {after}, best of {len(m.restarts)} "
                f"starts{known}",
                *self._certainty(m),
                "",
                "  atom  parties  from (party:component)",
            ]
            for k in range(m.num_atoms):
                members = [
                    f"{name}:{int(i)}"
                    for name, a in zip(self.party_names, m.assignment, strict=True)
                    for i in (a == k).nonzero()
                ]
                shown = " ".join(members[:12]) + (" …" if len(members) > 12 else "")
                lines.append(f"  {k:4d}  {int(m.popularity[k]):7d}  {shown}")
        return "\n".join(lines)

    def _certainty(self, m: FusedLabel) -> list[str]:
        """Lines that say how sure the assignment is."""
        if m.problem is None or len(self.parties) == 1:
            return []
        lines = []
        path = m.dispersion_path
        if path is not None and path.plateau is not None and path.identified:
            on, atoms = path.plateau, torch.cat(m.assignment)[path.components]
            if torch.equal(by_appearance(atoms), path.at_estimate):  # other priors have others
                lines.append(
                    f"the assignment is the same from T = {on.low:.3g} to {on.high:.3g}, a factor "
                    f"of {on.length:.3g} in the price of a merge"
                )
        elif m.problem.doubt:
            lines.append(f"NOT SURE: {m.problem.doubt}")
        if math.isfinite(m.price_ratio) and math.isfinite(m.shared):
            times = f"{m.price_ratio:.3g}" if m.price_ratio < 1e6 else "more than a million"
            lines.append(
                f"roughly {100 * m.shared:.0f} % of components have a counterpart elsewhere; "
                f"a merge within a party costs {times} times as much as one with it"
                + ("" if m.price_ratio >= 20 else ": the posteriors hardly tell them apart")
            )
        doubtful = [
            (float(x), f"{name}:{i}")
            for name, own in zip(self.party_names, m.margins, strict=True)
            for i, x in enumerate(own)
            if x < DOUBTFUL
        ]
        if doubtful:
            shown = " ".join(who for _, who in sorted(doubtful)[:8])
            lines.append(
                f"in doubt, with another place for less than {DOUBTFUL:g} of F: {shown}"
                + (" …" if len(doubtful) > 8 else "")
            )
        return lines

    def __repr__(self) -> str:
        what = ", ".join(f"{m.num_atoms} atoms along '{m.label}'" for m in self.labels.values())
        return f"Fusion({self._parties()}, {self.pooling}: {what or 'shared sites'})"

    def _parties(self) -> str:
        count = len(self.parties)
        return "1 party" if count == 1 else f"{count} parties"
