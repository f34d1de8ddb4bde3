# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Assignments for coordinate ascent to start from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_fusion.assignment import NEW, coordinate, match
from pyro_fusion.assignment.priors import AssignmentPrior, FixedAtoms, GroupNormPrior
from pyro_fusion.assignment.problem import party_of
from pyro_fusion.errors import ParameterError
from pyro_fusion.fusion.ascent import expectation_maximization
from pyro_fusion.pooling.components import Atoms, Components, compact

__all__ = ["starts"]

# In units of the dispersion: between "only the closest share an atom" and "all that may, do".
_THRESHOLDS = (0.5, 1.5, 0.15, 5.0, 0.05)

# A start with more atoms than so many times the components of the largest party raises its
# threshold: costs are atoms by components, so too low a one would be quadratic in the parties.
_MAX_ATOMS_PER_COMPONENT = 20


def starts(
    problem: Components,
    assignment_prior: AssignmentPrior,
    restarts: int,
    seed: int,
    first: Tensor | None = None,
    guess: Tensor | None = None,
) -> Iterator[Tensor]:
    """Assignments to start from, ``restarts + 1`` of them: LongTensors ``[N]``.

    With a free number of atoms: parties join one after the other, in random order, where a new
    atom costs a threshold that differs from start to start, so that both many and few atoms are
    tried; F decides. With a fixed number: k-means++ seeding in the divergence at hand (Arthur &
    Vassilvitskii, 2007), in every other start after the most popular atoms found with a free one,
    since among many atoms k-means++ by itself hardly ever hits each of them.

    :param first: in place of the first of them.
    :param guess: an assignment with a free number of atoms, in place of the parties joining one
        after the other, for the first of them.
    """
    generator = torch.Generator().manual_seed(seed)
    for i in range(restarts + 1):
        if i == 0 and first is not None:
            yield first
            continue
        if assignment_prior.num_atoms is not None and i % 2:
            yield _seeded(problem, assignment_prior.num_atoms, generator)
            continue
        j = i if assignment_prior.num_atoms is None else i // 2
        order = torch.arange(problem.num_parties)
        if j >= len(_THRESHOLDS):
            order = torch.randperm(problem.num_parties, generator=generator)
        groups = guess
        if i > 0 or groups is None:
            groups = _joined(problem, order.tolist(), _THRESHOLDS[j % len(_THRESHOLDS)])
        if i == 0 and guess is not None and len(guess.unique()) == assignment_prior.num_atoms:
            yield guess
            continue
        if assignment_prior.num_atoms is not None:
            free = expectation_maximization(problem, GroupNormPrior(), groups, collapsed=False)
            groups = _seeded(problem, assignment_prior.num_atoms, generator, free.groups)
        yield groups


def _seeded(
    problem: Components,
    num_atoms: int,
    generator: torch.Generator,
    groups: Tensor | None = None,
) -> Tensor:
    """:param groups: assignment ``[N]``, the most popular atoms of which are the first seeds."""
    count = sum(problem.sizes)
    wanted = min(num_atoms, count)
    rows: list[Tensor] = []
    if groups is not None:
        groups, found = compact(groups)
        atoms = problem.m_step(groups, found)
        popular = torch.bincount(groups).argsort(descending=True, stable=True)[:wanted]
        rows = list(_cost_of(problem, {k: f.index_select(0, popular) for k, f in atoms.items()}))
    while len(rows) < wanted:
        # How far each component is from the nearest seed.
        p = torch.stack(rows).amin(0).clamp(min=0).cpu() if rows else torch.ones(count)
        p = p if bool(p.sum() > 0) else torch.ones(count)
        chosen = torch.multinomial(p.double(), 1, generator=generator)
        rows.append(_cost(problem, chosen).squeeze(0))
    result = coordinate(problem.split(torch.stack(rows)), FixedAtoms(wanted))
    return torch.cat(result.atoms)


def _cost(problem: Components, index: Tensor) -> Tensor:
    """The cost of each component in atoms that are the components ``index``:
    ``[len(index), N]``."""
    return _cost_of(problem, {k: f.index_select(0, index) for k, f in problem.sites.items()})


def _cost_of(problem: Components, atoms: Atoms) -> Tensor:
    """The cost of each component in these atoms, with the cost of opening them: ``[K, N]``."""
    cost = problem.cost(atoms) + problem.opening(atoms).unsqueeze(1)
    if bool(cost.isnan().any()):
        raise ParameterError("a divergence is NaN: some posterior is numerically degenerate")
    return cost


def _joined(problem: Components, order: list[int], threshold: float) -> Tensor:
    """The parties join in blocks that double: a block is matched with the atoms of those before,
    then what is new in it among itself, so that there are few costs and barycentres to compute."""
    ends = torch.tensor(problem.sizes).cumsum(0).tolist()
    parties = [torch.arange(ends[s] - problem.sizes[s], ends[s]) for s in order]
    limit = _MAX_ATOMS_PER_COMPONENT * max(problem.sizes)
    groups = torch.full((ends[-1],), NEW)
    groups[parties[0]] = torch.arange(len(parties[0]))
    num_atoms, done = len(parties[0]), 1
    while done < len(parties):
        seen, block = torch.cat(parties[:done]), parties[done : 2 * done]
        atoms = problem.take(seen).m_step(groups[seen], num_atoms)
        # Openings are in the threshold, so that it means the same in every pooling.
        cost = _cost_of(problem.take(torch.cat(block)), atoms)
        fresh: list[Tensor] = []
        found = num_atoms
        cost, sizes, given = cost.cpu(), [len(members) for members in block], threshold
        known = _undisputed(cost, sizes, threshold)
        for members, own, a in zip(block, cost.split(sizes, 1), known, strict=True):
            if found > limit:
                threshold *= 2
            if a is None or threshold != given:
                a = match(own, threshold)
            groups[members] = a
            fresh.append(members[a == NEW])
            found += len(fresh[-1])
            done += 1
            if found > 2 * limit:
                break
        num_atoms = _found(problem, groups, fresh, num_atoms, threshold)
    return groups


def _undisputed(cost: Tensor, sizes: list[int], threshold: float) -> list[Tensor | None]:
    """The matchings of the parties whose components have different cheapest atoms, or none cheaper
    than a new one: what :func:`~pyro_fusion.assignment.match` would find, without a linear
    assignment. None for the others, and where two atoms cost the same.

    :param cost: of all their components in turn, ``[K, N]``.
    """
    best, atom = cost.min(0)
    atom = torch.where(best < threshold, atom, NEW)
    tied = (cost == best).sum(0) > 1
    party = party_of(sizes)
    # New atoms are no one's rivals.
    place = torch.where(atom == NEW, len(cost) + torch.arange(len(atom)), atom)
    key, order = (party * (len(cost) + len(atom)) + place).sort()
    rival = torch.zeros(len(sizes), dtype=torch.bool)
    rival[party[order[1:]][key.diff() == 0]] = True
    rival[party[tied & (atom != NEW)]] = True
    return [
        None if disputed else own
        for disputed, own in zip(rival.tolist(), atom.split(sizes), strict=True)
    ]


def _found(
    problem: Components, groups: Tensor, fresh: list[Tensor], num_atoms: int, threshold: float
) -> int:
    """New atoms for the components ``fresh`` of each party, shared where they are close; the
    number of atoms there are then. Writes to ``groups``."""
    every = torch.cat(fresh)
    if len(every) == 0:
        return num_atoms
    cost = _cost(problem.take(every), torch.arange(len(every))).cpu()
    founders = torch.empty(0, dtype=torch.long)  # places in `every`
    place = 0
    for members in fresh:
        own = torch.arange(place, place + len(members))
        place += len(members)
        a = match(cost[founders][:, own], threshold)
        new = a == NEW
        groups[members] = num_atoms + torch.where(new, len(founders) + new.cumsum(0) - 1, a)
        founders = torch.cat([founders, own[new]])
    return num_atoms + len(founders)
