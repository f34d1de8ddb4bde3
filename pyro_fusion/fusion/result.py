# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The result of a fusion: the posterior, who shares which atom, and how the search ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from torch import Tensor

from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.assignment.problem import relative_gap
from pyro_fusion.errors import StructureError
from pyro_fusion.fusion.draws import AssignmentDraws
from pyro_fusion.posterior import Posterior, PosteriorGuide

__all__ = ["FusedLabel", "Fusion", "StopReason"]


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
    draws: AssignmentDraws | None = None

    @property
    def converged(self) -> bool:
        """True if coordinate ascent stopped by itself."""
        return self.stopped not in (StopReason.ITERATION_LIMIT, StopReason.INTERRUPTED)

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
    def converged(self) -> bool:
        """True if the assignment along every label converged."""
        return all(m.converged for m in self.labels.values())

    @property
    def interrupted(self) -> bool:
        """True if an interrupt (Ctrl-C) ended the search: the result is the best so far."""
        return any(m.stopped is StopReason.INTERRUPTED for m in self.labels.values())

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

    def __repr__(self) -> str:
        what = ", ".join(f"{m.num_atoms} atoms along '{m.label}'" for m in self.labels.values())
        return f"Fusion({self._parties()}, {self.pooling}: {what or 'shared sites'})"

    def _parties(self) -> str:
        count = len(self.parties)
        return "1 party" if count == 1 else f"{count} parties"
