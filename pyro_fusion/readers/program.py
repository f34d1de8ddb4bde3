# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Reading the factors of any program from its runs, the same for Pyro and NumPyro.

A site is read in one of four ways: as it is, when its distribution depends on no other site; as
the average of its conditional distributions (moment matching, Rao-Blackwellised), when it does;
from draws, when its distribution is no exponential family; with a spread of the caller's, when it
is a point mass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_fusion.errors import GuideError, Site
from pyro_fusion.families import Factor
from pyro_fusion.readers.projection import same_factors
from pyro_fusion.readers.sites import Draws, Read, Sites, Spread, transform_of

__all__ = ["COMPARED", "Frame", "Message", "plates_of", "read_runs"]

COMPARED = 3
"""How many runs are compared: enough to see that a distribution changes from run to run."""


@dataclass(frozen=True)
class Frame:
    """A plate around a site.

    :ivar axis: the site's batch axis that is the plate's, from the left.
    :ivar size: the number of entries that the site has.
    :ivar full_size: the number of entries of the whole plate.
    """

    name: str
    axis: int
    size: int
    full_size: int


class Message(ABC):
    """A latent site in one run of a program, as Pyro's and NumPyro's layers tell it.

    :ivar name: of the site.
    :ivar dependent: True if its distribution is known to depend on another site's value.
    """

    name: str
    dependent: bool = False

    @property
    @abstractmethod
    def batch_dim(self) -> int:
        """The number of batch axes."""

    @property
    @abstractmethod
    def frames(self) -> tuple[Frame, ...]:
        """The plates of the batch axes."""

    @abstractmethod
    def check(self) -> None:
        """:raises GuideError: for a site that cannot be read at all; called before all else."""

    @abstractmethod
    def is_point(self) -> bool:
        """True if the distribution is a point mass."""

    @abstractmethod
    def factor(self) -> Factor | None:
        """The distribution, or None if it is of no registered family.

        :raises GuideError: for a masked site.
        """

    @abstractmethod
    def value(self) -> Tensor:
        """The value in this run."""

    @abstractmethod
    def support(self) -> Any:
        """The support of the value, or the bijection onto it.

        :raises GuideError: if it has none, where that is known.
        """

    @abstractmethod
    def constant_axes(self) -> set[int]:
        """The batch axes along which all members have the same distribution."""

    def behind_point(self, others: Sequence[Any], support: Any) -> Factor | None:
        """The factor that these runs show behind a point mass of changing value, if they do."""
        return None


def plates_of(
    name: str, frames: Sequence[Frame], batch_dim: int, full: bool = True
) -> tuple[str | None, ...]:
    """The plate (or None) of each of ``batch_dim`` batch axes.

    :param full: refuse a plate of which only a subsample is there.
    :raises GuideError: for a subsampled plate.
    """
    plates: list[str | None] = [None] * batch_dim
    for frame in frames:
        if full and frame.full_size != frame.size:
            raise GuideError(
                f"plate '{frame.name}' is subsampled ({frame.size} of "
                f"{frame.full_size}), so the other components are not there to be read. Read the "
                "guide without subsampling: pass the full data, or a subsample_size of "
                f"{frame.full_size}",
                site=name,
            )
        plates[frame.axis] = frame.name
    return tuple(plates)


def read_runs(
    runs: Sequence[Mapping[str, Message]], spread: Spread, what: str, full: bool = True
) -> Sites:
    """Read the sites of a program, as the head of this file says.

    :param runs: the sites of each of :data:`COMPARED` runs.
    :param spread: of point masses.
    :param what: the program, in messages.
    :param full: refuse subsampled plates; otherwise expand what does not vary along them.
    :raises GuideError: for a subsampled plate, a point mass without spread, a masked site, or one
        that is not there in every run.
    """
    result: Sites = {}
    for name, site in runs[0].items():
        others = [r[name] for r in runs[1:] if name in r]
        if len(others) < len(runs) - 1:
            raise GuideError(
                [
                    Site(name),
                    f" is not there in every run of the {what}, so the posterior has no fixed set "
                    "of sites. Block it",
                ]
            )
        site.check()
        plates = plates_of(name, site.frames, site.batch_dim, full)
        if site.is_point():
            result[name] = _read_point(site, others, plates, spread)
            continue
        factor, *like = (s.factor() for s in (site, *others))
        if factor is None:
            result[name] = _draws([site, *others], plates)
        elif not site.dependent and all(same_factors(factor, o) for o in like):
            result[name] = Read(factor if full else _filled(site, factor), plates)
        elif all(o is not None and o.structure() == factor.structure() for o in like):
            plates_of(name, site.frames, site.batch_dim)  # its members may differ
            result[name] = Draws(plates, like=factor)
        else:
            result[name] = _draws([site, *others], plates)
    return result


def _draws(sites: Sequence[Message], plates: tuple[str | None, ...]) -> Draws:
    """A site to be matched by a Normal, one for members with one distribution in all runs."""
    site = sites[0]
    support = site.support()
    transform_of(site.name, support)  # raises if draws would be of no use
    constant = set.intersection(*(s.constant_axes() for s in sites))
    shape = site.value().shape
    pooled = {axis: shape[axis] for axis in constant}
    for frame in site.frames:
        if frame.axis in pooled:
            pooled[frame.axis] = frame.full_size
        else:
            plates_of(site.name, [frame], site.batch_dim)
    return Draws(plates, support=support, pooled=pooled)


def _read_point(
    site: Message, others: Sequence[Message], plates: tuple[str | None, ...], spread: Spread
) -> Read | Draws:
    value, support = site.value(), site.support()
    if not site.dependent and all(torch.equal(value, o.value()) for o in others):
        t = transform_of(site.name, support)
        return Read(spread.around(site.name, t.inv(value), support, site.batch_dim), plates)
    factor = site.behind_point(others, support)
    return Draws(plates, support=support) if factor is None else Read(factor, plates)


def _filled(site: Message, factor: Factor) -> Factor:
    """Expand along subsampled plates what is the same for every member."""
    shape = list(factor.base_shape)
    for frame in site.frames:
        if frame.full_size == frame.size:
            continue
        axis = frame.axis
        if any(bool((v != v.narrow(axis, 0, 1)).any()) for v in factor.params.values()):
            plates_of(site.name, site.frames, site.batch_dim)  # raises
        factor = factor.map(lambda v, axis=axis: v.narrow(axis, 0, 1))  # type: ignore[misc]
        shape[axis] = frame.full_size
    return factor.expand(shape).map(torch.clone)
