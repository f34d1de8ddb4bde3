# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Labels of axes, found by permuting the components along them and comparing responses.

Shapes and names only propose. A program's response decides, its log-density or its output:
components are exchangeable along a set of axes if no permutation of all of them at once changes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_fusion.errors import StructureError, warn_user

__all__ = ["Axis", "Finder", "FoundAxes", "Probe", "Proposal", "Values"]

Axis = tuple[str, int]  # of a site
Values = Mapping[str, Tensor]

_MOST_SETS = 256  # of axes that are tried for one label
_REPEATS = 4  # components, or pairs of them, at which a site is tried for being outgoing


@dataclass(frozen=True)
class FoundAxes:
    """The labels that were found, as :class:`~pyro_fusion.Posterior` takes them.

    :ivar axes: site -> a label or None for each axis.
    :ivar outgoing: site -> the label whose components act through it by adding up.
    """

    axes: Mapping[str, tuple[str | None, ...]]
    outgoing: Mapping[str, str]


@dataclass(frozen=True)
class Proposal:
    """A label that is proposed.

    :ivar label: its name.
    :ivar source: what proposes it, for messages.
    :ivar axes: the axes that have it, if any has.
    :ivar likely: the other axes that have it, as far as the source can tell.
    :ivar fixed: numbers that are not random but may tell the components apart, for messages.
    :ivar certain: whether to stop, rather than warn, where it is not confirmed.
    """

    label: str
    source: str
    axes: tuple[Axis, ...]
    likely: tuple[Axis, ...] = ()
    fixed: tuple[str, ...] = ()
    certain: bool = False


class Probe:
    """A program at some values of all sites.

    :param values: site -> value.
    :param respond: values -> named numbers. Those called like a site whose value was permuted
        count by their sum, others one by one.
    :param unit: differences are seen relative to numbers of at least this size.
    """

    def __init__(
        self, values: Values, respond: Callable[[Values], Mapping[str, Tensor]], unit: float = 0.0
    ) -> None:
        self.values, self.respond, self._unit = values, respond, unit
        self.before = respond(values)
        precision = max(torch.finfo(v.dtype).eps for v in values.values() if v.is_floating_point())
        # Half of the digits; less where the last digit of a value makes more of a difference.
        self._tolerance = precision**0.5
        rng = torch.Generator().manual_seed(0)
        self._noise = dict.fromkeys(self.before, 0.0)
        for _ in range(2):
            near = {k: v + v * precision * _signs(v, rng) for k, v in values.items()}
            try:
                after = respond(near)
            except (ValueError, RuntimeError):  # over the edge of a support
                continue
            for name, was in self.before.items():
                if was.numel() and was.shape == after[name].shape:
                    difference = float((was.double() - after[name].double()).abs().max())
                    self._noise[name] = max(self._noise[name], 8 * difference)

    def changed(
        self,
        values: Values,
        before: Mapping[str, Tensor] | None = None,
        *,
        summed: Iterable[str] = (),
        ignored: Iterable[str] = (),
    ) -> list[str]:
        """The named numbers that differ from those ``before``."""
        before = self.before if before is None else before
        try:
            after = self.respond(values)
        except (ValueError, RuntimeError) as e:  # values outside the support, say
            return [f"{type(e).__name__}"]
        return [
            name
            for name in before
            if name not in ignored and self._differ(name, before[name], after[name], name in summed)
        ]

    def _differ(self, name: str, a: Tensor, b: Tensor, summed: bool) -> bool:
        if a.shape != b.shape:
            return True
        if not a.numel():
            return False
        a, b = a.double(), b.double()
        difference = (a - b).sum().abs() if summed else (a - b).abs().max()
        scale = a.abs().sum() if summed else a.abs().max()
        allowed = self._tolerance * scale.clamp(min=self._unit) + self._noise[name]
        return not bool(difference <= allowed)  # NaN differs


def _signs(v: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randint(2, v.shape, generator=rng).to(v) * 2 - 1


def _permuted(values: Values, axes: Iterable[Axis], order: Tensor) -> dict[str, Tensor]:
    result = dict(values)
    for site, axis in axes:
        result[site] = result[site].index_select(axis, order.to(result[site].device))
    return result


def _generators(size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A cycle of all components and a swap of two neighbours in it: all permutations are made of
    these."""
    order = torch.randperm(size, generator=rng)
    cycle, swap = torch.empty_like(order), torch.arange(size)
    cycle[order] = order.roll(1)
    swap[order[:2]] = order[:2].flip(0)
    return cycle, swap


class Finder:
    """Finds labels one after the other.

    :param shapes: site -> the shape of its value.
    :param probes: the program at several values.
    :param admits: says if a site may have these labels.
    :param scalable: the sites that may be outgoing.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        probes: Sequence[Probe],
        admits: Callable[[str, tuple[str | None, ...]], bool],
        scalable: Iterable[str],
        seed: int,
    ) -> None:
        self._shapes = shapes
        self._probes = probes
        self._admits = admits
        self._scalable = set(scalable)
        self._rng = torch.Generator().manual_seed(seed)
        self._axes: dict[str, list[str | None]] = {k: [None] * len(v) for k, v in shapes.items()}
        self._outgoing: dict[str, str] = {}

    def run(self, proposals: Sequence[Proposal]) -> FoundAxes:
        """Confirm the proposals, and complete them.

        :raises StructureError: for a certain one that is not confirmed; others are left out, with
            a warning.
        """
        proposed = {axis for p in proposals if not p.certain for axis in p.axes}
        for p in proposals:
            if p.certain and any(axis in proposed for axis in p.axes):
                continue  # a plate has labelled them
            site, axis = p.axes[0]
            if self._shapes[site][axis] == 1:
                self._single(p)
                continue
            found = self._confirmed(p)
            if found is None:
                self._refuse(p)
                continue
            if p.certain and not any(self._changes(found[:1])):
                raise StructureError(
                    f"{p.source}: permuting {_name(found[0])} alone changes nothing either, so "
                    "there is no telling whether its units are exchangeable. Pass arguments at "
                    "which they have an effect, or give axes by hand"
                )
            self._put(p.label, found)
            for name in self._acting(p.label, found):
                self._outgoing[name] = p.label
        return FoundAxes({k: tuple(v) for k, v in self._axes.items()}, dict(self._outgoing))

    def _put(self, label: str, axes: Iterable[Axis]) -> None:
        for site, axis in axes:
            self._axes[site][axis] = label

    # -- which axes ------------------------------------------------------------------------------

    def _optional(self, p: Proposal) -> list[Axis]:
        """Unlabelled axes of the same size, the likely ones first."""
        first, at = p.axes[0]
        found = [
            (site, axis)
            for site, shape in self._shapes.items()
            for axis, size in enumerate(shape)
            if size == self._shapes[first][at]
            and self._axes[site][axis] is None
            and (site, axis) not in p.axes
        ]
        return sorted(found, key=lambda axis: axis not in p.likely)

    def _confirmed(self, p: Proposal) -> tuple[Axis, ...] | None:
        """The axes of a proposal and as few others as make its components exchangeable."""
        for axes in itertools.islice(self._sets(p), _MOST_SETS):
            if not any(self._changes(axes)):
                return axes
        return None

    def _sets(self, p: Proposal) -> Iterator[tuple[Axis, ...]]:
        optional = self._optional(p)
        likely = tuple(axis for axis in optional if axis in p.likely)
        sets = (x for n in range(len(optional) + 1) for x in itertools.combinations(optional, n))
        for more in itertools.chain([likely] if likely else [], sets):
            axes = p.axes + more
            if all(self._admits(site, self._with(p.label, axes, site)) for site, _ in axes):
                yield axes

    def _with(self, label: str, axes: Iterable[Axis], site: str) -> tuple[str | None, ...]:
        here = {axis for other, axis in axes if other == site}
        return tuple(label if i in here else old for i, old in enumerate(self._axes[site]))

    def _changes(self, axes: tuple[Axis, ...]) -> Iterator[str]:
        """The named numbers that change when components along ``axes`` are permuted."""
        site, axis = axes[0]
        for probe in self._probes:
            for order in _generators(self._shapes[site][axis], self._rng):
                values = _permuted(probe.values, axes, order)
                yield from probe.changed(values, summed={name for name, _ in axes})

    # -- where there is no label -----------------------------------------------------------------

    def _single(self, p: Proposal) -> None:
        """Keep the label of a plate of one component, which cannot be permuted, and warn."""
        if not p.certain:
            self._put(p.label, p.axes)
        if p.certain or self._optional(p):
            others = " and ".join(_name(axis) for axis in self._optional(p))
            warn_user(
                f"{p.source} has one component, so there is no telling by permuting it whether "
                f"{others} has its label '{p.label}': no label there. Give axes by hand"
            )

    def _refuse(self, p: Proposal) -> None:
        tried = p.axes + tuple(axis for axis in self._optional(p) if axis in p.likely)
        culprits = list(dict.fromkeys(self._changes(tried)))
        rest = [axis for axis in self._optional(p) if axis not in tried]
        message = (
            f"{p.source}: permuting {' and '.join(_name(axis) for axis in tried)}, of size "
            f"{self._shapes[tried[0][0]][tried[0][1]]}, changes {culprits}"
        )
        if rest:
            message += f"; also together with any of {', '.join(_name(axis) for axis in rest)}"
        if p.fixed:
            message += f"; {list(p.fixed)} are not random and may tell the components apart"
        if p.certain and not p.fixed:
            raise StructureError(
                f"{message}. So these are no exchangeable units (a residual connection ties those "
                "of several layers; buffers tell them apart). Give axes by hand"
            )
        warn_user(f"{message}. No label '{p.label}' there; if that is wrong, give axes by hand")

    # -- outgoing --------------------------------------------------------------------------------

    def _acting(self, label: str, axes: tuple[Axis, ...]) -> tuple[str, ...]:
        """The sites through which components act by adding up: one can pass its values there
        on to another that is like it at the other sites, and has no effect without them. The fewest
        such sites, the last ones first."""
        once = [axis for axis in axes if [site for site, _ in axes].count(axis[0]) == 1]
        adding = [
            (site, axis)
            for site, axis in reversed(once)
            if site in self._scalable and site not in self._outgoing and self._adds(axes, site)
        ]
        for n in range(1, len(adding) + 1):
            for some in itertools.combinations(adding, n):
                if self._carries_all(axes, some):
                    return tuple(site for site, _ in some)
        return ()

    def _adds(self, axes: tuple[Axis, ...], site: str) -> bool:
        """True if two components that are alike at the other sites act through their sum here."""
        at = dict(axes)[site]
        matters = False
        for probe, i, j in self._pairs(axes):
            order = torch.arange(self._shapes[site][at])
            order[j] = i
            alike = _permuted(probe.values, [a for a in axes if a[0] != site], order)
            v = alike[site]
            shift = v.std() * torch.randn(v.select(at, i).shape, generator=self._rng).to(v)
            more, moved = v.clone(), v.clone()
            for to, by in ((more, 3 * shift), (moved, 3 * shift)):
                to.select(at, i).add_(by)
            moved.select(at, j).sub_(3 * shift)
            sites = {name for name, _ in axes}
            try:
                before = probe.respond(alike)
            except (ValueError, RuntimeError):
                return False
            if probe.changed({**alike, site: moved}, before, ignored=sites):
                return False
            matters |= bool(probe.changed({**alike, site: more}, before, ignored=sites))
        return matters

    def _carries_all(self, axes: tuple[Axis, ...], some: tuple[Axis, ...]) -> bool:
        """True if a component whose values are zero at ``some`` has no effect."""
        sites, matters = {name for name, _ in axes}, False
        others = [axis for axis in axes if axis not in some]
        for probe, i, j in self._pairs(axes):
            order = torch.arange(self._shapes[axes[0][0]][axes[0][1]])
            order[i] = j
            zero = dict(probe.values)
            for site, at in some:
                zero[site] = zero[site].clone()
                zero[site].select(at, i).zero_()
            try:
                before = probe.respond(zero)
            except (ValueError, RuntimeError):
                return False
            if probe.changed(_permuted(zero, others, order), before, ignored=sites):
                return False
            other = _permuted(probe.values, others, order)
            matters |= bool(probe.changed(other, ignored=sites))
        return matters

    def _pairs(self, axes: tuple[Axis, ...]) -> Iterator[tuple[Probe, int, int]]:
        size = self._shapes[axes[0][0]][axes[0][1]]
        for probe in self._probes:
            for _ in range(_REPEATS):
                i, j = torch.randperm(size, generator=self._rng)[:2].tolist()
                yield probe, i, j


def _name(axis: Axis) -> str:
    return f"axis {axis[1]} of site '{axis[0]}'"
