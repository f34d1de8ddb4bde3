# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What the readers of Pyro guides hand to each other: sites, their plates, supports and spreads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints

from pyro_fusion.errors import FusionError, GuideError, ParameterError
from pyro_fusion.families import Factor

__all__ = [
    "Draws",
    "Read",
    "Sites",
    "Spread",
    "latent_sites",
    "normal_factor",
    "plates_of",
    "transform_of",
]

Constraint = constraints.Constraint


@dataclass(frozen=True)
class Read:
    """A site that is read: its factor, and the plate (or None) of each batch axis."""

    factor: Factor
    plates: tuple[str | None, ...]


@dataclass(frozen=True)
class Draws:
    """A site that is still to be matched to draws.

    :param like: the conditional factor in one draw, whose mean parameters are averaged; None to
        match a Normal to the unconstrained values instead.
    :param support: the support of the values, unless ``like`` is given.
    :param sample: draws ``n`` unconstrained values at once, where the program need not be run.
    :param pooled: axis -> its full size, of the axes whose members have the same distribution:
        their draws are pooled, so that the members come out equal.
    """

    plates: tuple[str | None, ...]
    support: Constraint | None = None
    like: Factor | None = None
    sample: Callable[[int], Tensor] | None = None
    pooled: Mapping[int, int] = field(default_factory=dict)


Sites = dict[str, Read | Draws]


def latent_sites(trace: Trace) -> dict[str, Any]:
    """Site name -> message of the sites that a posterior is about: not observed, subsampling,
    auxiliary, deterministic or enumerated."""
    nodes: Mapping[str, Any] = trace.nodes
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("is_auxiliary")
        and not site["infer"].get("enumerate")
    }


def plates_of(
    name: str, site: Mapping[str, Any], batch_dim: int, full: bool = True
) -> tuple[str | None, ...]:
    """The plate (or None) of each of ``batch_dim`` batch axes.

    :param full: refuse a plate of which only a subsample is there.
    :raises GuideError: for a subsampled plate.
    """
    plates: list[str | None] = [None] * batch_dim
    for frame in site["cond_indep_stack"]:
        if not frame.vectorized or -frame.dim > batch_dim:
            continue
        if full and frame.full_size is not None and frame.full_size != frame.size:
            raise GuideError(
                f"site '{name}': plate '{frame.name}' is subsampled ({frame.size} of "
                f"{frame.full_size}), so the other components are not there to be read. Read the "
                "guide without subsampling: pass the full data, or a subsample_size of "
                f"{frame.full_size}"
            )
        plates[batch_dim + frame.dim] = frame.name
    return tuple(plates)


def transform_of(name: str, support: Any) -> torch.distributions.Transform:
    """The bijection from unconstrained space onto ``support``.

    :raises GuideError: if there is none, as for discrete values.
    """
    try:
        return biject_to(support)
    except NotImplementedError as e:
        raise GuideError(
            f"site '{name}': support {support} has no bijection to unconstrained space, so its "
            "draws cannot be matched by a Normal. Enumerate the site or block it, or give it a "
            "distribution of a registered family"
        ) from e


def normal_factor(name: str, loc: Tensor, scale: Tensor, support: Any, batch_dim: int) -> Factor:
    """A diagonal Normal in unconstrained space (``loc`` and ``scale`` in its shape), carried onto
    ``support``.

    :raises UnsupportedFamilyError: if the transform onto the support is no bijection.
    """
    base = dist.Normal(loc, scale, validate_args=False).to_event(loc.dim() - batch_dim)
    t = transform_of(name, support)
    return _factor(name, dist.TransformedDistribution(base, [t], validate_args=False))


def _factor(name: str, d: Distribution) -> Factor:
    try:
        return Factor.of(d)
    except FusionError as e:
        raise type(e)(f"site '{name}': {e}") from e


class Spread:
    """The standard deviations, in unconstrained space, that the caller gives to point masses."""

    def __init__(self, spread: float | Tensor | Mapping[str, float | Tensor] | None) -> None:
        self._spread = spread
        self._used: set[str] = set()

    @property
    def given(self) -> bool:
        """Whether there is one for any site."""
        return self._spread is not None

    def around(self, name: str, loc: Tensor, support: Any, batch_dim: int) -> Factor:
        """A Normal around the unconstrained ``loc``, carried onto ``support``.

        :raises GuideError: if there is no spread for this site.
        :raises ParameterError: if it is not positive and finite, or does not broadcast.
        """
        spread = self._spread.get(name) if isinstance(self._spread, Mapping) else self._spread
        if spread is None:
            raise GuideError(
                f"site '{name}' is a point mass (Delta): it has a value but no spread. Pass "
                f"spread=0.1, or spread={{'{name}': 0.1}}: a standard deviation in unconstrained "
                "space. Or fit a guide that has one, as AutoNormal"
            )
        self._used.add(name)
        scale = torch.as_tensor(spread, dtype=loc.dtype, device=loc.device).detach()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ParameterError(f"site '{name}': spread must be positive and finite, got {spread}")
        try:
            scale = scale.expand(loc.shape)
        except RuntimeError as e:
            raise ParameterError(
                f"site '{name}': spread of shape {tuple(scale.shape)} does not broadcast to the "
                f"unconstrained shape {tuple(loc.shape)}"
            ) from e
        return normal_factor(name, loc.detach(), scale, support, batch_dim)

    def check_used(self, kept: set[str]) -> None:
        """Refuse a spread for a site that is no point mass.

        :raises GuideError: naming the sites.
        """
        unused = set(self._spread) - self._used if isinstance(self._spread, Mapping) else set()
        if unused:
            raise GuideError(
                f"spread names {sorted(unused)}, which are no point masses of this guide; its "
                f"sites are {sorted(kept)}"
            )
