# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""Label switching, found and undone: components that changed places between draws or chains.

This is fusion with each draw as a party, a fixed number of atoms and inclusive pooling: one order
:math:`\sigma_n` of the components of each draw, and atoms :math:`q_k`, that minimise

.. math:: F = -\sum_n \sum_k \log q_k(x_{n, \sigma_n(k)}),

by linear assignments given the atoms, and maximum likelihood given the orders. Source: Stephens,
*Dealing with label switching in mixture models* (JRSS B 2000), algorithm 2, with the families of
the posterior for ``q``.

Orders can always be chosen such that F falls, even where labels mean something, as those of
schools, and components merely overlap. So they must pay: to F is added the length of a code for
them, :math:`-\log p(\sigma_1, \ldots, \sigma_n)`, either uniform over all ``L!`` orders each time,
or under a Dirichlet process with that base (Blackwell & MacQueen 1973), in which it is cheap to
stay. That makes of F the likelihood of a model of labelled draws, and on average none beats the
right one: draws whose labels did not switch are left alone, as long as the family is right. Lest a
few draws far out decide where it is not, orders must pay for Normals of the ranks, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_fusion.assignment import coordinate
from pyro_fusion.assignment.priors import FixedAtoms
from pyro_fusion.errors import FusionError
from pyro_fusion.families import Factor, family_named
from pyro_fusion.families.projection import moves_with_location
from pyro_fusion.readers.draws.diagnostics import normal_scores

__all__ = ["Relabelling", "permuted", "relabel"]

Values = Mapping[str, Tensor]
Labels = Mapping[str, tuple[str | None, ...]]

# Labels of more components are left alone: they are hardly of components, and it takes long.
_MOST_COMPONENTS = 200
# Draws among which starts are compared, fewer where components are many, and how many starts there
# are besides the order as given.
_FEW, _LEAST_FEW, _FEW_NUMBERS = 400, 50, 1 << 19
_PIVOTS = 4
# E- and M-steps for all draws, for a few, and for all where nothing pays among a few. Then draws
# may yet switch rarely, unless most of the few would have another order: those just overlap.
_ITERATIONS, _FEW_ITERATIONS, _LAST_ITERATIONS = 30, 10, 4
_MOST_MOVED = 0.5
_ROUNDS = 5  # through labels that are linked
_BLOCK = 1 << 22  # costs that are held at a time
# A draw is ambiguous if two components can change places in it at this loss of log-density.
_AMBIGUOUS = math.log(10)


@dataclass(frozen=True)
class Relabelling:
    """The orders of the draws' components along one label.

    :ivar order: component ``k`` now was component ``order[n, k]`` of draw ``n``: LongTensor
        ``[n, L]``.
    :ivar share: share of the draws whose components are in another order than in most draws.
    :ivar ambiguous: share of the draws in which two components could change places at a tenth of
        the density, or more.
    """

    order: Tensor
    share: float
    ambiguous: float


def permuted(value: Tensor, labels: Sequence[str | None], label: str, order: Tensor) -> Tensor:
    """``[n, *shape]`` with the components of each draw in its order, on all axes of the label."""
    order = order.to(value.device)
    rows = torch.arange(len(value), device=value.device).unsqueeze(1)
    for axis, other in enumerate(labels, 1):
        if other == label:
            value = value.movedim(axis, 1)[rows, order].movedim(1, axis)
    return value.contiguous()


def relabel(
    values: Values, labels: Labels, fit: Callable[[str, Tensor], Factor], seed: int
) -> dict[str, Relabelling]:
    """Find the labels along which components switched, and their orders.

    :param values: site -> ``[n, *shape]``.
    :param labels: site -> a label or None for each axis of its shape.
    :param fit: the factor of a site with these draws.
    :param seed: of the draws to which others are matched at first.
    :return: label -> its orders; labels along which nothing switched are left out.

    Orders along a label are found from the sites that have it once, on an axis of independent
    components; its other sites follow. First come labels with a site that has no other label, or
    only such as are in order; then, given the rest as it is, time and again the label along which
    it pays most.
    """
    now = dict(values)
    names = dict.fromkeys(x for site in values for x in labels[site] if x is not None)
    orders: dict[str, Tensor] = {}
    ambiguous: dict[str, float] = {}
    known: dict[tuple[str, ...], _Found | None] = {}

    def find(label: str, sites: list[str]) -> _Found | None:
        key = (label, *sites)
        if key not in known:
            points = [
                p for s in sites if (p := _points(fit(s, now[s]), now[s], labels[s].index(label)))
            ]
            known[key] = _orders(points, seed) if points else None
        return known[key]

    def apply(label: str, found: _Found) -> None:
        changed = {s for s, axes in labels.items() if label in axes}
        for s in changed:
            now[s] = permuted(now[s], labels[s], label, found.order)
        before = orders.get(label)
        orders[label] = found.order if before is None else before.gather(1, found.order)
        ambiguous[label] = found.ambiguous
        for key in [key for key in known if not changed.isdisjoint(key[1:])]:
            del known[key]

    settled: set[str] = set()
    for label in sorted(names, key=lambda x: len(_others(labels, x))):
        found = find(label, _telling(labels, label, settled | {label}))
        if found is not None:
            apply(label, found)
            settled.add(label)
    for _ in range(_ROUNDS * len(names) if len(names) > 1 else 0):
        every = [(label, find(label, _telling(labels, label, None))) for label in names]
        pays = [(label, found) for label, found in every if found is not None]
        if not pays:
            break
        apply(*max(pays, key=lambda x: x[1].gain))
    result = {}
    for label, order in orders.items():
        order = _as_most(order)
        share = float((order != torch.arange(order.shape[1])).any(1).double().mean())
        if share:
            result[label] = Relabelling(order, share, ambiguous[label])
    return result


def _others(labels: Labels, label: str) -> set[str | None]:
    """The fewest labels that a site with this one has beside it."""
    sets = [set(axes) - {None, label} for axes in labels.values() if label in axes]
    return min(sets, key=len, default=set())


def _telling(labels: Labels, label: str, settled: set[str] | None) -> list[str]:
    """The sites that have the label once, and no other label that is not settled."""
    return [
        site
        for site, axes in labels.items()
        if axes.count(label) == 1 and (settled is None or set(axes) - {None} <= settled)
    ]


# -- one label -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """Orders along one label that pay, by ``gain`` nats."""

    order: Tensor
    ambiguous: float
    gain: float


@dataclass(frozen=True)
class _Points:
    """The components of a site in all draws.

    :ivar statistics: sufficient statistics, ``[n, L, P]``.
    :ivar coordinates: numbers by which draws are compared with one another, ``[n, L, Q]``.
    :ivar like: a factor of the family and batch shape, ``[L]``, of the atoms.
    """

    statistics: Tensor
    coordinates: Tensor
    like: Factor

    def take(self, index: Tensor) -> _Points:
        return _Points(self.statistics[index], self.coordinates[index], self.like)


def _points(factor: Factor, draws: Tensor, axis: int) -> _Points | None:
    """The components of a site; None if the axis is not one of independent components."""
    if axis >= factor.separable_axes:
        return None
    value = draws.double()
    for t in reversed(factor.transforms):
        value = t.inv(value)
    moves = moves_with_location(factor.family)
    if moves:  # far from the origin statistics lose digits
        value = value - value.mean((0, axis + 1), keepdim=True)
    statistics = factor.family.statistics(value)
    coordinates = value.unsqueeze(-1) if moves else statistics
    statistics, coordinates = (x.movedim(axis + 1, 1).flatten(2) for x in (statistics, coordinates))
    spread = coordinates.std((0, 1), keepdim=True).clamp(min=torch.finfo(torch.double).tiny)
    return _Points(statistics, coordinates / spread, factor.with_batch(axis))


def _by_rank(points: _Points) -> _Points:
    """The normal scores of each coordinate among all components, for Normal atoms: orders that pay
    there too do not hang on a few draws far out, which the family does not have."""
    x = points.coordinates
    scores = normal_scores(x.flatten(0, 1)).reshape(x.shape)
    like = Factor(family_named("Normal"), {k: scores[0] for k in ("loc", "scale")}, (), 1)
    statistics = like.family.statistics(scores).flatten(2)
    return _Points(statistics, scores, like)


def _orders(points: list[_Points], seed: int) -> _Found | None:
    """The orders along one label; None if none but that of most draws pays."""
    n, size = points[0].statistics.shape[:2]
    if not 1 < size <= _MOST_COMPONENTS:
        return None
    limit = min(_FEW, max(_LEAST_FEW, _FEW_NUMBERS // size**2))
    few = torch.arange(0, n, -(-n // limit))
    sample = [p.take(few) for p in points]
    generator = torch.Generator().manual_seed(seed)
    pivots = torch.randperm(len(few), generator=generator)[:_PIVOTS].tolist()
    starts = [start for pivot in pivots if (start := _start(sample, pivot)) is not None]
    found = []
    if starts:
        best = min(starts, key=lambda order: _total(sample, order))
        if _total(sample, best) < _total(sample, _given(sample)):
            found.append(_descend(points, _cheapest(points, _atoms(sample, best)), _ITERATIONS))
    if not found and _moved(sample) > _MOST_MOVED:
        return None
    found.append(_descend(points, _given(points), _ITERATIONS if found else _LAST_ITERATIONS))
    order = min(found, key=lambda x: _total(points, x))
    if torch.equal(order, _given(points)) or not _pays(points, order):
        return None
    gain = _total(points, _given(points)) - _total(points, order)
    return _Found(order, _ambiguous(points, order), gain)


def _given(points: list[_Points]) -> Tensor:
    n, size = points[0].statistics.shape[:2]
    return torch.arange(size).expand(n, size)


def _moved(points: list[_Points]) -> float:
    """The share of draws that would have another order."""
    given = _given(points)
    return float((_cheapest(points, _atoms(points, given)) != given).any(1).double().mean())


def _total(points: list[_Points], order: Tensor) -> float:
    """F plus the length of the code."""
    return _loss(points, order) + _code_length(order)


def _pays(points: list[_Points], order: Tensor) -> bool:
    """True if the orders pay, both for the families and for Normals of the ranks."""
    return all(
        _total(how, order) < _total(how, _given(how))
        for how in (points, [_by_rank(p) for p in points])
    )


def _start(sample: list[_Points], pivot: int) -> Tensor | None:
    """The orders from a pivot; None where so few draws fit no member of the family."""
    try:
        order = _descend(sample, _matched(sample, pivot), _FEW_ITERATIONS)
        loss = _loss(sample, order)
    except (FusionError, RuntimeError):
        return None
    return order if math.isfinite(loss) else None


def _descend(points: list[_Points], order: Tensor, iterations: int) -> Tensor:
    """E- and M-steps in turn; the order of most draws stays theirs."""
    for _ in range(iterations):
        best = _cheapest(points, _atoms(points, order))
        if torch.equal(best, order):
            break
        order = best
    return _as_most(order)


def _atoms(points: list[_Points], order: Tensor) -> list[Factor]:
    """M-step: the maximum likelihood factors of the components in this order."""
    rows = torch.arange(len(order)).unsqueeze(1)
    return [p.like.from_mean(p.statistics[rows, order].mean(0)) for p in points]


def _loss(points: list[_Points], order: Tensor) -> float:
    """F at its best atoms, but for the carrier, which no order changes: at maximum likelihood the
    mean of ``log q`` is the dual of the log-normaliser."""
    return -len(order) * sum(float(f.dual.sum()) for f in _atoms(points, order))


def _cheapest(points: list[_Points], atoms: list[Factor]) -> Tensor:
    """E-step: the best order of each draw."""
    result = []
    for cost in _costs(points, atoms):
        atom = cost.argmin(1)
        # Where each component has an atom that no other wants, there is nothing to settle.
        clash = (atom.sort(1).values != torch.arange(atom.shape[1])).any(1)
        if bool(clash.any()):
            solved = coordinate(list(cost[clash]), FixedAtoms(cost.shape[1]))
            atom[clash] = torch.stack(solved.atoms)
        result.append(atom.argsort(1))
    return torch.cat(result)


def _costs(points: list[_Points], atoms: list[Factor]) -> Iterator[Tensor]:
    """``-log q_k(x_nl)`` but for the carrier, ``[n, K, L]``, in blocks of draws."""
    n, size = points[0].statistics.shape[:2]
    for rows in torch.arange(n).split(max(1, _BLOCK // size**2)):
        terms = [
            f.log_normalizer.unsqueeze(1) - f.natural @ p.statistics[rows].mT
            for p, f in zip(points, atoms, strict=True)
        ]
        yield torch.stack(terms).sum(0).cpu()


def _matched(points: list[_Points], pivot: int) -> Tensor:
    """The order of each draw in which it is nearest to the pivot."""
    cost = torch.stack(
        [torch.cdist(p.coordinates[pivot], p.coordinates).square() for p in points]
    ).sum(0)
    solved = coordinate(list(cost.cpu()), FixedAtoms(cost.shape[1]))
    return torch.stack(solved.atoms).argsort(1)


def _as_most(order: Tensor) -> Tensor:
    """The orders after a permutation common to all, such that most draws stay as they are."""
    distinct, counts = order.unique(dim=0, return_counts=True)
    result = torch.empty_like(order)
    result[:, distinct[counts.argmax()]] = order
    return result


def _code_length(order: Tensor) -> float:
    """The length of the code of all orders, in nats."""
    n, size = order.shape
    _, counts = order.unique(dim=0, return_counts=True)
    if len(counts) == 1:
        return 0.0
    each = math.lgamma(size + 1)
    again = float(torch.lgamma(counts.double()).sum())
    process = len(counts) * each - again + math.lgamma(n + 1)
    return math.log(2) + min(process, n * each)


def _ambiguous(points: list[_Points], order: Tensor) -> float:
    count, start = 0, 0
    for cost in _costs(points, _atoms(points, order)):
        own = order[start : start + len(cost)]
        start += len(cost)
        cost = cost.gather(2, own.unsqueeze(1).expand_as(cost))
        here = cost.diagonal(dim1=1, dim2=2)
        loss = cost + cost.mT - here.unsqueeze(1) - here.unsqueeze(2)
        loss.diagonal(dim1=1, dim2=2).fill_(math.inf)
        count += int((loss.flatten(1).amin(1) < _AMBIGUOUS).sum())
    return count / len(order)
