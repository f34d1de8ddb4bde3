# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The assignment problem, its objective and its result, which all solvers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.errors import ParameterError, Party, StructureError

__all__ = [
    "NEW",
    "Assignment",
    "AssignmentProblem",
    "assignment_objective",
    "check_least",
    "party_of",
    "relative_gap",
]

NEW = -1
"""Marks a component that opens an atom of its own."""


def relative_gap(objective: float, bound: float, scale: float = 1e-300) -> float:
    """The gap of an objective above a bound, relative to its absolute value, or to ``scale`` if
    this is larger."""
    return max(0.0, objective - bound) / max(abs(objective), scale)


def party_of(sizes: Sequence[int]) -> Tensor:
    """The party of each component, given the parties' sizes: LongTensor ``[N]`` on the CPU."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def check_least(least: float, **settings: float) -> None:
    """Check that settings are not below their least values, nor NaN.

    :raises ParameterError: names the setting.
    """
    for name, value in settings.items():
        if not value >= least:
            raise ParameterError(f"{name} must be at least {least}, got {value}")


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
        """The gap of F above the bound, relative to F: 0.03 means "within 3 % of optimal"."""
        return relative_gap(self.objective, self.bound)


@dataclass(frozen=True)
class AssignmentProblem:
    """A checked assignment problem.

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
        assignment_prior: AssignmentPrior,
        opening: Tensor | None = None,
    ) -> AssignmentProblem:
        """Check what a solver was given; a checked problem is taken as it is.

        Costs are taken in their floating dtype, integers in the default one. An atom that costs
        ``inf`` to open is forbidden.

        :raises StructureError: if shapes do not fit, or a party has more components than there are
            atoms while their number is fixed.
        :raises ParameterError: if costs are no real tensors, NaN, ``-inf``, or so large that F
            might overflow, opening costs NaN or ``-inf``, or a component may have no atom; or if a
            checked problem comes with opening costs, or with a prior other than its own.
        """
        if isinstance(cost, AssignmentProblem):
            cost._check_same(assignment_prior, opening)
            return cost
        new_atoms = assignment_prior.num_atoms is None
        parties = list(cost)
        _check_shapes(parties, new_atoms)
        num_atoms = len(parties[0])
        sizes = tuple(c.shape[1] for c in parties)
        joint = torch.cat(parties, 1).detach()
        if not joint.is_floating_point():
            joint = joint.to(torch.get_default_dtype())
        opening = _checked_opening(opening, num_atoms)
        never = opening == torch.inf
        if bool(never.any()):
            joint = joint.masked_fill(never.to(joint.device)[:, None], torch.inf)
            opening = opening.masked_fill(never, 0.0)
        _check_values(joint, sizes, new_atoms)
        if num_atoms == 0:  # like one that nobody may have, so no case of its own
            joint = joint.new_full((1, joint.shape[1]), torch.inf)
            opening = torch.zeros(1, dtype=torch.float64)
        penalty, weights = _of_prior(assignment_prior, sizes, len(joint))
        return cls(joint, sizes, penalty, weights, opening, new_atoms)

    def _check_same(self, assignment_prior: AssignmentPrior, opening: Tensor | None) -> None:
        if opening is not None:
            raise ParameterError("a checked problem has its own opening costs: give none with it")
        penalty, weights = _of_prior(assignment_prior, self.sizes, self.num_atoms)
        same = torch.equal(penalty, self.penalty) and torch.equal(weights, self.weights)
        if not same or (assignment_prior.num_atoms is None) != self.new_atoms:
            raise ParameterError(
                f"the problem was checked with another assignment prior than {assignment_prior}"
            )

    @property
    def num_parties(self) -> int:
        """``S``, the number of parties."""
        return len(self.sizes)

    @property
    def num_atoms(self) -> int:
        """``K``, the number of atoms."""
        return self.cost.shape[0]

    @cached_property
    def host_cost(self) -> Tensor:
        """The costs on the CPU, where assignments are computed."""
        return self.cost.cpu()

    def split(self, x: Tensor) -> list[Tensor]:
        """Split by party: ``[..., N]`` -> one ``[..., L_s]`` for each."""
        return list(x.split(self.sizes, dim=-1))

    def join(self, atoms: Sequence[Tensor]) -> Tensor:
        """Check a feasible assignment, per party ``[L_s]`` integers, and put the parties side by
        side: LongTensor ``[N]`` on the CPU. Pairs may be forbidden.

        :raises StructureError: if the number of parties or of components is another.
        :raises ParameterError: for a number of no atom, a new atom while their number is fixed, or
            two components of a party with one atom.
        """
        parties = [torch.as_tensor(a) for a in atoms]
        if len(parties) != self.num_parties:
            raise StructureError(
                f"expected an assignment of {self.num_parties} parties, got {len(parties)}"
            )
        for s, (a, size) in enumerate(zip(parties, self.sizes, strict=True)):
            if a.shape != (size,):
                raise StructureError(
                    f"expected an assignment of shape [{size}], got {list(a.shape)}", party=s
                )
            if size and (a.dtype == torch.bool or a.is_floating_point() or a.is_complex()):
                raise ParameterError(f"expected atoms as integers, got {a.dtype}", party=s)
        every = torch.cat(parties).cpu().long()
        least = NEW if self.new_atoms else 0
        bad = (every < least) | (every >= self.num_atoms)
        if bool(bad.any()):
            s, n = _place(bad, self.sizes)
            raise ParameterError(
                f"expected atoms from {least} to {self.num_atoms - 1}, got "
                f"{int(parties[s][n])} for component {n}",
                party=s,
            )
        standing = every != NEW
        pair = (party_of(self.sizes) * self.num_atoms + every)[standing]
        taken = torch.zeros(self.num_parties * self.num_atoms, dtype=torch.bool)
        taken[pair] = True
        if int(taken.count_nonzero()) < len(pair):
            s, k = divmod(int(torch.bincount(pair).argmax()), self.num_atoms)
            raise ParameterError(
                f"expected each atom at most once, got atom {k} for several components", party=s
            )
        return every

    def popularity(self, atoms: Tensor) -> Tensor:
        """``m_k`` of an assignment ``[N]``: ``[K]``."""
        return torch.bincount(atoms[atoms != NEW], minlength=self.num_atoms)

    def objective(self, atoms: Tensor) -> float:
        """F of an assignment, LongTensor ``[N]`` on the CPU."""
        standing = (atoms != NEW).nonzero().squeeze(-1)
        total = self.host_cost[atoms[standing], standing].double().sum()
        m = self.popularity(atoms)
        lone = torch.ones(len(atoms) - len(standing), dtype=m.dtype)
        every = torch.cat([m, lone]).sort(descending=True).values
        total = total + (self.weights[: len(every)] * self.penalty[every]).sum()
        return float(total + self.opening[m > 0].sum())


def assignment_objective(
    cost: Sequence[Tensor],
    assignment_prior: AssignmentPrior,
    atoms: Sequence[Tensor],
    opening: Tensor | None = None,
) -> float:
    """F of an assignment ``atoms``; arguments and errors as for the solvers."""
    problem = AssignmentProblem.of(cost, assignment_prior, opening)
    return problem.objective(problem.join(atoms))


def _of_prior(
    assignment_prior: AssignmentPrior, sizes: tuple[int, ...], num_atoms: int
) -> tuple[Tensor, Tensor]:
    """The penalty of a prior, and its weights of all ranks that there can be and one more."""
    ranks = num_atoms + sum(sizes) + 1
    return assignment_prior.penalty(len(sizes)), assignment_prior.rank_weights(ranks, max(sizes))


def _check_shapes(cost: list[Tensor], new_atoms: bool) -> None:
    if len(cost) == 0:
        raise StructureError("expected at least one party, got none")
    num_atoms = 0
    for s, c in enumerate(cost):
        if not isinstance(c, Tensor):
            raise ParameterError(f"expected costs as a tensor, got {type(c).__name__}", party=s)
        if c.dtype == torch.bool or c.is_complex():
            raise ParameterError(f"expected costs as real numbers, got {c.dtype}", party=s)
        if s == 0 and c.dim():
            num_atoms = len(c)
        if c.dim() != 2 or c.shape[0] != num_atoms:
            raise StructureError(
                f"expected costs of shape [{num_atoms}, L], got {list(c.shape)}", party=s
            )
        if not new_atoms and c.shape[1] > num_atoms:
            raise StructureError(
                [
                    Party(s),
                    f" has {c.shape[1]} components, but there are only {num_atoms} atoms",
                ]
            )


def _checked_opening(opening: Tensor | None, num_atoms: int) -> Tensor:
    """The opening costs, checked: float64 ``[K]`` on the CPU."""
    if opening is None:
        return torch.zeros(num_atoms, dtype=torch.float64)
    if opening.shape != (num_atoms,):
        raise StructureError(
            f"expected opening costs of shape [{num_atoms}], got {list(opening.shape)}"
        )
    opening = opening.detach().cpu().double()
    if not bool((opening > -torch.inf).all()):
        raise ParameterError("opening costs must not be NaN or -inf")
    return opening


def _check_values(cost: Tensor, sizes: tuple[int, ...], new_atoms: bool) -> None:
    if cost.numel() == 0:
        return
    # min and max see NaN and infinities in one pass each.
    low, high = torch.stack([cost.amin(0), cost.amax(0)]).cpu()
    bad = ~(low > -torch.inf) | high.isnan()
    if bool(bad.any()):
        s, _ = _place(bad, sizes)
        raise ParameterError("costs must not be NaN or -inf", party=s)
    forbidden = low == torch.inf
    if not new_atoms and bool(forbidden.any()):
        s, component = _place(forbidden, sizes)
        raise ParameterError(
            f"every assignment has infinite cost: component {component} has no atom", party=s
        )
    if bool((high == torch.inf).any()):
        high = cost.masked_fill(cost == torch.inf, 0.0).amax(0).cpu()
    # Solvers add and subtract a few of them; F, a float64, adds one for each component.
    largest = torch.finfo(torch.float64).max / cost.shape[1]
    most = min(torch.finfo(cost.dtype).max, largest) / 8
    bad = (high > most) | (low < -most) & ~forbidden
    if bool(bad.any()):
        s, _ = _place(bad, sizes)
        raise ParameterError(
            f"finite costs must be between {-most:.3g} and {most:.3g}, for sums of "
            f"them not to overflow in {cost.dtype}; inf forbids a pair",
            party=s,
        )


def _place(mask: Tensor, sizes: tuple[int, ...]) -> tuple[int, int]:
    """Party and component of the first entry that is set."""
    n = int(mask.nonzero()[0])
    for s, size in enumerate(sizes):
        if n < size:
            return s, n
        n -= size
    raise AssertionError
