# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What the solvers have in common: the problem, its objective, and the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_fusion.errors import ParameterError, StructureError
from pyro_fusion.priors import AssignmentPrior

__all__ = ["NEW", "Assignment", "AssignmentProblem", "assignment_objective", "relative_gap"]

NEW = -1
"""Marks a component that opens an atom of its own."""


def relative_gap(objective: float, bound: float) -> float:
    """How far an objective is above a bound, relative to itself."""
    return max(0.0, objective - bound) / max(abs(objective), 1e-300)


@dataclass(frozen=True)
class Assignment:
    """The result of an E-step.

    :ivar atoms: per party a LongTensor ``[L_s]`` on the CPU: the atom of each component, or
        :data:`NEW`.
    :ivar objective: F of this assignment.
    :ivar iterations: of the solver.
    :ivar converged: whether it stopped because it was done.
    :ivar bound: no assignment has a lower F; ``-inf`` where the solver knows none.
    :ivar soft: per party the relaxed assignment ``[K, L_s]`` where the solver makes one, on the
        device and in the dtype of the costs; what a column lacks to 1 is a new atom's.
    """

    atoms: list[Tensor]
    objective: float
    iterations: int
    converged: bool
    bound: float = -math.inf
    soft: list[Tensor] | None = None

    @property
    def gap(self) -> float:
        """How far F is above the bound, relative to F: 0.03 reads "within 3 % of optimal"."""
        return relative_gap(self.objective, self.bound)


@dataclass(frozen=True)
class AssignmentProblem:
    """A checked problem.

    :ivar cost: ``[K, N]``, the parties side by side, on their device and in their dtype.
    :ivar sizes: ``L_s`` of each party; they add up to ``N``.
    :ivar penalty: ``φ(0), ..., φ(S)``, float64 ``[S + 1]`` on the CPU.
    :ivar weights: of the ranks ``0, 1, ...`` by falling popularity, one more than there can be:
        float64 ``[K + N + 1]`` on the CPU.
    :ivar opening: float64 ``[K]`` on the CPU.
    :ivar new_atoms: whether components may open atoms of their own.
    """

    cost: Tensor
    sizes: tuple[int, ...]
    penalty: Tensor
    weights: Tensor
    opening: Tensor
    new_atoms: bool

    @classmethod
    def of(
        cls,
        cost: Sequence[Tensor] | AssignmentProblem,
        prior: AssignmentPrior,
        opening: Tensor | None = None,
    ) -> AssignmentProblem:
        """Check what a solver was given; a checked problem is taken as it is.

        :raises StructureError: if shapes do not fit, or a party has more components than there are
            atoms while their number is fixed.
        :raises ParameterError: if costs are NaN or ``-inf``, or a component may have no atom.
        """
        if isinstance(cost, AssignmentProblem):
            return cost
        if len(cost) == 0:
            raise StructureError("expected at least one party, got none")
        num_atoms = len(cost[0]) if cost[0].dim() else 0
        new_atoms = prior.num_atoms is None
        for s, c in enumerate(cost):
            if c.dim() != 2 or c.shape[0] != num_atoms:
                raise StructureError(
                    f"party {s}: expected costs of shape [{num_atoms}, L], got {list(c.shape)}"
                )
            if not new_atoms and c.shape[1] > num_atoms:
                raise StructureError(
                    f"party {s} has {c.shape[1]} components, but there are only {num_atoms} atoms"
                )
        sizes = tuple(c.shape[1] for c in cost)
        joint = torch.cat(tuple(cost), 1).detach()
        _check_values(joint, sizes, new_atoms)
        if opening is None:
            opening = torch.zeros(num_atoms, dtype=torch.float64)
        elif opening.shape != (num_atoms,):
            raise StructureError(
                f"expected opening costs of shape [{num_atoms}], got {list(opening.shape)}"
            )
        if num_atoms == 0:  # as good as one that nobody may have, and no case of its own
            joint = joint.new_full((1, joint.shape[1]), torch.inf)
            opening = torch.zeros(1, dtype=torch.float64)
        return cls(
            joint,
            sizes,
            prior.penalty(len(cost)),
            prior.rank_weights(len(joint) + joint.shape[1] + 1, max(sizes)),
            opening.detach().cpu().double(),
            new_atoms,
        )

    @property
    def num_parties(self) -> int:
        """S."""
        return len(self.sizes)

    @property
    def num_atoms(self) -> int:
        """K."""
        return self.cost.shape[0]

    def split(self, x: Tensor) -> list[Tensor]:
        """``[..., N]`` -> one ``[..., L_s]`` per party."""
        return list(x.split(self.sizes, dim=-1))

    def popularity(self, atoms: Tensor) -> Tensor:
        """``m_k`` of an assignment ``[N]``: ``[K]``."""
        return torch.bincount(atoms[atoms != NEW], minlength=self.num_atoms)

    def objective(self, atoms: Tensor) -> float:
        """F of an assignment, LongTensor ``[N]`` on the CPU."""
        standing = (atoms != NEW).nonzero().squeeze(-1)
        k = atoms[standing].to(self.cost.device)
        total = self.cost[k, standing.to(k.device)].double().sum().cpu()
        m = self.popularity(atoms)
        lone = torch.ones(len(atoms) - len(standing), dtype=m.dtype)
        every = torch.cat([m, lone]).sort(descending=True).values
        total = total + (self.weights[: len(every)] * self.penalty[every]).sum()
        return float(total + self.opening[m > 0].sum())


def assignment_objective(
    cost: Sequence[Tensor],
    prior: AssignmentPrior,
    atoms: Sequence[Tensor],
    opening: Tensor | None = None,
) -> float:
    """F of an assignment ``atoms``; arguments as for the solvers."""
    every = torch.cat([torch.as_tensor(a) for a in atoms])
    return AssignmentProblem.of(cost, prior, opening).objective(every)


def _check_values(cost: Tensor, sizes: tuple[int, ...], new_atoms: bool) -> None:
    if cost.numel() == 0:
        return
    # min and max see NaN and infinities in one pass each.
    low, high = cost.amin(0), cost.amax(0)
    bad = ~(low > -torch.inf) | high.isnan()
    if bool(bad.any()):
        s, _ = _place(bad, sizes)
        raise ParameterError(f"party {s}: costs must not be NaN or -inf")
    forbidden = low == torch.inf
    if not new_atoms and bool(forbidden.any()):
        s, component = _place(forbidden, sizes)
        raise ParameterError(
            f"party {s}: every assignment has infinite cost: component {component} has no atom"
        )


def _place(mask: Tensor, sizes: tuple[int, ...]) -> tuple[int, int]:
    """Party and component of the first entry that is set."""
    n = int(mask.nonzero()[0])
    for s, size in enumerate(sizes):
        if n < size:
            return s, n
        n -= size
    raise AssertionError
