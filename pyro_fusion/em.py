# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""Closed-form coordinate ascent: E-steps from ``assignment.py`` and M-steps from
``barycenter.py`` in turn, on the one objective

.. math:: F = \sum_s \sum_l w_s D(k_{sl}; s, l) / T + \sum_k \varphi(m_k) + \text{const}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_fusion.assignment import NEW, assignment_objective, coordinate, match
from pyro_fusion.barycenter import Pooling
from pyro_fusion.errors import StructureError
from pyro_fusion.families import Factor
from pyro_fusion.priors import AssignmentPrior

__all__ = ["EMResult", "MatchingProblem", "compact", "expectation_maximization", "starts"]

Factors = Mapping[str, Factor]


@dataclass(frozen=True)
class MatchingProblem:
    """The components of all parties along one label, and how they are scored and pooled.

    :ivar local: site -> factor of batch shape ``[N]``, the components of party 0, of party 1, ...
    :ivar sizes: ``L_s`` of each party; they add up to ``N``.
    :ivar weights: ``[N]``, the weight of each component's party.
    :ivar pooling: the divergence and its barycentre.
    :ivar base: site -> the prior of one atom, batch shape ``[1]``; empty unless the pooling needs
        it.
    :ivar dispersion: T.
    """

    local: Factors
    sizes: tuple[int, ...]
    weights: Tensor
    pooling: Pooling
    base: Factors
    dispersion: float = 1.0

    @property
    def num_parties(self) -> int:
        """S."""
        return len(self.sizes)

    def split(self, x: Tensor) -> list[Tensor]:
        """``[..., N]`` -> one ``[..., L_s]`` per party."""
        return list(x.split(self.sizes, dim=-1))

    def take(self, index: Tensor) -> MatchingProblem:
        """The components ``index``, as if of one party."""
        return replace(
            self,
            local={site: f.index_select(0, index) for site, f in self.local.items()},
            sizes=(len(index),),
            weights=self.weights[index],
        )

    def cost(self, atoms: Factors) -> Tensor:
        """``w D / T`` summed over sites: ``[K, N]``."""
        terms = [
            self.pooling.cost(atoms[site], f, self.base.get(site)) for site, f in self.local.items()
        ]
        return torch.stack(terms).sum(0) * (self.weights / self.dispersion)

    def opening(self, atoms: Factors) -> Tensor:
        """The cost of an atom by itself over T, summed over sites: ``[K]``."""
        terms = [self.pooling.opening(a, self.base.get(site)) for site, a in atoms.items()]
        return torch.stack(terms).sum(0) / self.dispersion

    def barycenter(self, groups: Tensor, num_atoms: int) -> dict[str, Factor]:
        """M-step: the atoms of the groups ``[N]``."""
        return {
            site: self.pooling.barycenter(
                f, groups, num_atoms, self.weights, self.base.get(site)
            )
            for site, f in self.local.items()
        }


@dataclass(frozen=True)
class EMResult:
    """The result of :func:`expectation_maximization`.

    :ivar groups: the atom of each component, LongTensor ``[N]``.
    :ivar num_atoms: K; each atom has at least one component.
    :ivar atoms: site -> factor of batch shape ``[K]``.
    :ivar prior: the prior, its own parameters at their estimates.
    :ivar objective: F after the start and after each iteration; never rises.
    :ivar converged: whether it stopped because nothing changed any more.
    """

    groups: Tensor
    num_atoms: int
    atoms: dict[str, Factor]
    prior: AssignmentPrior
    objective: list[float]
    converged: bool


@dataclass(frozen=True)
class _State:
    groups: Tensor
    num_atoms: int
    atoms: dict[str, Factor]
    cost: Tensor
    opening: Tensor
    prior: AssignmentPrior
    objective: float


def expectation_maximization(
    problem: MatchingProblem,
    prior: AssignmentPrior,
    start: Tensor,
    max_iterations: int = 100,
) -> EMResult:
    """Alternate E- and M-steps from an assignment until F no longer falls.

    :param start: the group of each component, LongTensor ``[N]``, any integers; no two components
        of a party share one.
    """
    state = _maximise(problem, prior, start)
    trace = [state.objective]
    converged = False
    while not converged and len(trace) <= max_iterations:
        result = coordinate(
            problem.split(state.cost),
            state.prior.penalty(problem.num_parties),
            opening=state.opening,
            start=problem.split(state.groups),
            new_atoms=prior.num_atoms is None,
        )
        proposal = _maximise(problem, state.prior, torch.cat(result.atoms))
        # Equality up to rounding is convergence; what stands is kept, so the trace never rises.
        converged = not proposal.objective < state.objective - 1e-12 * abs(state.objective)
        if not converged:
            state = proposal
            trace.append(state.objective)
    return EMResult(
        state.groups, state.num_atoms, state.atoms, state.prior, trace, converged
    )


def _maximise(problem: MatchingProblem, prior: AssignmentPrior, groups: Tensor) -> _State:
    """M-step: atoms and the prior's own parameters given the assignment, and F there."""
    groups, num_atoms = compact(groups)
    atoms = problem.barycenter(groups, num_atoms)
    prior = prior.update(num_atoms, problem.num_parties)
    cost, opening = problem.cost(atoms), problem.opening(atoms)
    objective = prior.constant(problem.num_parties) + assignment_objective(
        problem.split(cost), prior.penalty(problem.num_parties), problem.split(groups), opening
    )
    return _State(groups, num_atoms, atoms, cost, opening, prior, objective)


def compact(groups: Tensor) -> tuple[Tensor, int]:
    """Number the groups in use ``0, ..., K-1``; each :data:`~.assignment.NEW` is one of its own."""
    new = groups == NEW
    fresh = groups.max().clamp(min=0) + 1 + torch.arange(len(groups), device=groups.device)
    _, result = torch.where(new, fresh, groups).unique(return_inverse=True)
    return result, int(result.max()) + 1


def starts(
    problem: MatchingProblem, prior: AssignmentPrior, restarts: int, seed: int
) -> Iterator[Tensor]:
    """Assignments to start from, ``restarts + 1`` of them: LongTensors ``[N]``.

    With a free number of atoms: parties join one after the other, in random order, where a new
    atom costs a threshold that differs from start to start, so that both many and few atoms are
    tried; F decides. With a fixed number: k-means++ seeding in the divergence at hand (Arthur &
    Vassilvitskii, 2007).
    """
    generator = torch.Generator().manual_seed(seed)
    for i in range(restarts + 1):
        if prior.num_atoms is not None:
            yield _seeded(problem, prior.num_atoms, generator)
            continue
        order = torch.arange(problem.num_parties)
        if i >= len(_THRESHOLDS):
            order = torch.randperm(problem.num_parties, generator=generator)
        yield _joined(problem, order, _THRESHOLDS[i % len(_THRESHOLDS)])


# In units of the dispersion: between "only the closest share an atom" and "all that may, do".
_THRESHOLDS = (0.5, 1.5, 0.15, 5.0, 0.05)


def _seeded(problem: MatchingProblem, num_atoms: int, generator: torch.Generator) -> Tensor:
    count = sum(problem.sizes)
    distance: Tensor | None = None
    cost: list[Tensor] = []
    for _ in range(min(num_atoms, count)):
        if distance is None:
            p = torch.ones(count)
        else:
            p = distance.clamp(min=0).cpu()
            p = p if bool(p.sum() > 0) else torch.ones(count)
        chosen = torch.multinomial(p.double(), 1, generator=generator)
        seed = {site: f.index_select(0, chosen) for site, f in problem.local.items()}
        row = problem.cost(seed).squeeze(0) + problem.opening(seed)
        cost.append(row)
        distance = row if distance is None else torch.minimum(distance, row)
    if len(cost) < max(problem.sizes):
        raise StructureError(f"{num_atoms} atoms for a party with {max(problem.sizes)} components")
    penalty = torch.zeros(problem.num_parties + 1, dtype=torch.float64)
    result = coordinate(problem.split(torch.stack(cost)), penalty, new_atoms=False)
    return torch.cat(result.atoms)


def _joined(problem: MatchingProblem, order: Tensor, threshold: float) -> Tensor:
    ends = torch.tensor(problem.sizes).cumsum(0).tolist()
    groups = torch.full((ends[-1],), NEW)
    seen = torch.empty(0, dtype=torch.long)
    num_atoms, since_update = 0, 0
    atoms: dict[str, Factor] = {}
    for s in order.tolist():
        members = torch.arange(ends[s] - problem.sizes[s], ends[s])
        party = problem.take(members)
        a = torch.full((len(members),), NEW)
        if num_atoms:
            # Openings are in the threshold, so that it means the same in every pooling.
            a = match(party.cost(atoms) + party.opening(atoms).unsqueeze(1), threshold)
        new = a == NEW
        a = torch.where(new, num_atoms + new.cumsum(0) - 1, a)
        groups[members] = a
        seen = torch.cat([seen, members])
        num_atoms = max(num_atoms, int(a.max()) + 1)
        since_update += 1
        if 3 * since_update >= len(seen) / len(members) or s == order[0]:
            # All atoms anew, but ever more rarely, so that the whole stays linear in S.
            atoms, since_update = problem.take(seen).barycenter(groups[seen], num_atoms), 0
        else:
            fresh = party.local
            index = new.nonzero().squeeze(-1)
            atoms = {
                site: Factor.cat([atoms[site], f.index_select(0, index)])
                for site, f in fresh.items()
            }
    return groups
