# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The draws of one site: checked, in the coordinates of its family, and the factor that fits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform
from torch.distributions import transforms as tt

from pyro_fusion.errors import DrawsError, FusionError
from pyro_fusion.families import Factor, Family, family_named
from pyro_fusion.families.projection import fit, normal_from_draws
from pyro_fusion.families.transforms import flatten
from pyro_fusion.readers.joint import Joint, block

__all__ = ["Kind", "SiteDraws", "check_finite", "labels_for", "looks_like_simplex"]

# Draws may be off their support by this much, relatively: they may have been float32 once.
_SLACK = 1e-3


@dataclass(frozen=True)
class Kind:
    """The family and the transforms of the factor that draws of a site are fitted with.

    :ivar family: the family of the factor.
    :ivar transforms: between the family and the value, in place of those of the support.
    """

    family: Family
    transforms: tuple[Transform, ...] = ()

    @classmethod
    def named(cls, name: str) -> Kind:
        """A registered family, or LogNormal or InverseGamma.

        :raises UnsupportedFamilyError: for another name.
        """
        if name == "LogNormal":
            return cls(family_named("Normal"), (tt.ExpTransform(),))
        if name == "InverseGamma":
            return cls(family_named("Gamma"), (tt.PowerTransform(torch.tensor(-1.0)),))
        if name == "LowRankMultivariateNormal":
            return cls(family_named("MultivariateNormal"))
        return cls(family_named(name))

    @property
    def gaussian(self) -> bool:
        """True if it is fitted in the unconstrained space of the support."""
        return self.family.name in ("Normal", "MultivariateNormal") and not self.transforms


@dataclass(frozen=True)
class SiteDraws:
    """The draws of one site.

    :ivar value: ``[n, *shape]``, float64, the chains one after the other.
    :ivar chains: the number of chains.
    :ivar transform: the bijection onto the support; of no matter to a family that knows its own.
    :ivar plates: the plate (or None) of each batch axis.
    :ivar labels: a label or None for each axis of ``shape``.
    :ivar dtype: of the factor.
    """

    name: str
    value: Tensor
    chains: int
    transform: Transform
    kind: Kind
    plates: tuple[str | None, ...]
    labels: tuple[str | None, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.on_simplex:
            total = self.value.sum(-1, keepdim=True)
            outside = (self.value < 0) | ((total - 1).abs() > _SLACK)
            self.refuse(outside, "on the simplex: not negative, and adding up to 1")
            object.__setattr__(self, "value", self.value / total)  # what rounding made of it

    # -- coordinates -----------------------------------------------------------------------------

    @property
    def on_simplex(self) -> bool:
        """True if the last axis is that of a simplex."""
        stick_breaking = any(isinstance(t, tt.StickBreakingTransform) for t in self.transforms)
        return stick_breaking or self.kind.family.name == "Dirichlet"

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """The transforms from the coordinates of the family to the value."""
        return flatten([self.transform]) if self.kind.gaussian else self.kind.transforms

    @property
    def as_dirichlet(self) -> bool:
        """True for a simplex with a label: stick-breaking would treat its components unlike."""
        gaussian = self.on_simplex and self.kind.family.name != "Dirichlet"
        return gaussian and self.labels[-1] is not None

    @property
    def _support(self) -> str:
        gaussian = self.kind.gaussian
        return str(self.transform.codomain) if gaussian else f"that of a {self.kind.family.name}"

    def base(self) -> Tensor:
        """The draws in the coordinates of the family, ``[n, *base_shape]``.

        :raises DrawsError: for values outside the support, or on its border.
        """
        value = self.value
        for t in reversed(self.transforms):
            low, high = _ends(t)
            inside = (value > low) & (value < high)
            self.refuse(~inside, f"between {low:g} and {high:g}, and not at the ends")
            value = t.inv(value)
        finite = torch.isfinite(value)
        if self.on_simplex:
            finite = self.value > 0
        self.refuse(~finite, f"inside the support, {self._support}, not on its border")
        self._check_image(value)
        return value

    def _check_image(self, base: Tensor) -> None:
        """Refuse values that the bijection does not give back: they are outside the support."""
        again = base
        for t in self.transforms:
            again = t(again)
        far = ~((again - self.value).abs() <= _SLACK * (1 + self.value.abs()))
        self.refuse(far, f"in the support, {self._support}")

    def refuse(self, bad: Tensor, expected: str) -> None:
        """:raises DrawsError: if an entry of ``bad``, ``[n, ...]``, is set."""
        rows = bad.reshape(len(bad), -1)
        if not bool(rows.any()):
            return
        place = int(rows.any(1).nonzero()[0])
        chain, draw = divmod(place, len(bad) // self.chains)
        entry = self.value[place].flatten().tolist()
        if bad.shape == self.value.shape:
            entry = self.value[place].flatten()[rows[place]].tolist()
        shown = ", ".join(f"{x:g}" for x in entry[:4]) + (", ..." if len(entry) > 4 else "")
        raise DrawsError(
            f"expected draws {expected}; got {shown} in draw {draw} of chain "
            f"{chain}, one of {int(rows.any(1).sum())} such draws of {len(bad)}. Say what the "
            f"support is, supports={{'{self.name}': ...}}, draw in float64 if this is rounding, or "
            "leave the site out with sites=[...]",
            site=self.name,
        )

    # -- the factor ------------------------------------------------------------------------------

    def factor(self) -> Factor:
        """The maximum likelihood factor.

        :raises DrawsError: if there is none.
        """
        try:
            factor = self._factor().to(dtype=self.dtype)
            factor.check()
        except DrawsError:
            raise
        except (FusionError, ValueError, RuntimeError, NotImplementedError) as e:
            raise DrawsError(
                f"{len(self.value)} draws of shape "
                f"{tuple(self.value.shape[1:])} fit no {self.kind.family.name}: "
                f"{' '.join(str(e).split())[:300]}",
                site=self.name,
            ) from e
        return factor

    def _factor(self) -> Factor:
        if self.as_dirichlet:
            return replace(self, kind=Kind.named("Dirichlet"))._factor()
        base = self.base()
        batch_dim = len(self.plates)
        if not self.kind.gaussian:
            return self._of_family(base)
        if self.kind.family.name == "Normal":
            return normal_from_draws(base, [self.transform], batch_dim)
        size = base[0].numel()
        loc = base.mean(0)
        rows = (base - loc).reshape(len(base), size).T / len(base) ** 0.5
        joint = Joint(loc.flatten(), rows, None, torch.float64)
        index = torch.arange(size, device=base.device).reshape(loc.shape)
        return block(self.name, joint, index, self.transform, self.plates, self.labels)[0]

    def _of_family(self, base: Tensor) -> Factor:
        family = self.kind.family
        rest = base.dim() - 1 - family.event_dim
        if rest < len(self.plates):
            raise DrawsError(
                f"a {family.name} has {family.event_dim} event axes, but of "
                f"the shape {tuple(base.shape[1:])} {len(self.plates)} axes are plates or "
                "labelled batch axes",
                site=self.name,
            )
        bad = ~torch.isfinite(family.statistics(base))
        self.refuse(bad.flatten(1).any(1), f"inside the support of a {family.name}")
        factor = fit(family, base, self.kind.transforms, len(self.plates))
        support = factor.family.build(factor.params, validate_args=False).support
        assert support is not None
        inside = support.check(base.to(next(iter(factor.params.values()))))
        self.refuse(~inside, f"in the support of a {family.name}, {support}")
        return factor


def _ends(t: Transform) -> tuple[float, float]:
    """The numbers between which an elementwise bijection has its values."""
    onto: Any = t.codomain
    low, high = (getattr(onto, x, None) for x in ("lower_bound", "upper_bound"))
    if onto.event_dim:
        low = high = None
    return (
        low if isinstance(low, int | float) else -math.inf,
        high if isinstance(high, int | float) else math.inf,
    )


def check_finite(name: str, draws: Tensor) -> None:
    """:raises DrawsError: for NaN or infinite draws, ``[chain, draw, *shape]``."""
    bad = ~torch.isfinite(draws)
    rows = bad.flatten(2).any(-1) if bad.dim() > 2 else bad
    if bool(rows.any()):
        chain, draw = rows.nonzero()[0].tolist()
        raise DrawsError(
            f"expected finite draws, got {int(rows.sum())} draws of {rows.numel()} "
            f"with NaN or infinite numbers, first in draw {draw} of chain {chain}. The sampler "
            "went astray there: find out why, or leave out those draws, of all sites",
            site=name,
        )


def looks_like_simplex(value: Tensor) -> bool:
    """True if all draws, ``[n, ..., K]``, are on the simplex."""
    if value.dim() < 2 or value.shape[-1] < 2:
        return False
    return bool((value >= 0).all()) and bool(((value.sum(-1) - 1).abs() <= _SLACK).all())


def labels_for(shape: Sequence[int], given: Sequence[str | None]) -> tuple[str | None, ...]:
    """A label or None for each axis."""
    return tuple(itertools.islice(itertools.chain(given, itertools.repeat(None)), len(shape)))
