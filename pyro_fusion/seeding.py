# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Assignments for coordinate ascent to start from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_fusion.assignment import NEW, coordinate, match
from pyro_fusion.families import Factor
from pyro_fusion.priors import AssignmentPrior, Parametric
from pyro_fusion.problem import MatchingProblem

__all__ = ["starts"]

# In units of the dispersion: between "only the closest share an atom" and "all that may, do".
_THRESHOLDS = (0.5, 1.5, 0.15, 5.0, 0.05)

# A start with more atoms than so many times the components of the largest party raises its
# threshold: costs are atoms by components, so too low a one would be quadratic in the parties.
_MAX_ATOMS_PER_COMPONENT = 20


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
    result = coordinate(problem.split(torch.stack(cost)), Parametric(len(cost)))
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
        if num_atoms > _MAX_ATOMS_PER_COMPONENT * max(problem.sizes):
            threshold *= 2
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
            index = new.nonzero().squeeze(-1)
            atoms = {
                site: Factor.cat([atoms[site], f.index_select(0, index)])
                for site, f in party.local.items()
            }
    return groups
