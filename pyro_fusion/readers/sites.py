# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What readers of guides have in common: sites, their plates, supports and spreads, and the
posterior that is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to, constraints

from pyro_fusion.errors import GuideError, ParameterError, Site, at, warn_user
from pyro_fusion.families import Factor
from pyro_fusion.posterior import Axes, Posterior

__all__ = [
    "Context",
    "Draws",
    "Labels",
    "Read",
    "Sites",
    "Spread",
    "check_num_samples",
    "labels_of",
    "normal_factor",
    "posterior_of",
    "transform_of",
]

Constraint = constraints.Constraint
Labels = Mapping[str, Sequence[str | None]]


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
    :param support: the support of the values, or the bijection onto it, unless ``like`` is given.
    :param sample: draws ``n`` unconstrained values at once, where the program need not be run.
    :param pooled: axis -> its full size, of the axes whose members have the same distribution:
        their draws are pooled, so that the members come out equal.
    """

    plates: tuple[str | None, ...]
    support: Constraint | Transform | None = None
    like: Factor | None = None
    sample: Callable[[int], Tensor] | None = None
    pooled: Mapping[int, int] = field(default_factory=dict)


Sites = dict[str, Read | Draws]


def labels_of(axes: Axes | None) -> Labels:
    """Labels by site, a lone one as a tuple.

    :raises ParameterError: for axes that are no mapping, or labels that are no sequence.
    """
    if axes is not None and not isinstance(axes, Mapping):
        raise ParameterError(
            f'axes must be a mapping from site to labels, or for guides "auto", got {axes!r}'
        )
    result: dict[str, Sequence[str | None]] = {}
    for site, labels in (axes or {}).items():
        if not isinstance(labels, Sequence):
            raise ParameterError(f"expected a sequence of labels, got {labels!r}", site=site)
        result[site] = (labels,) if isinstance(labels, str) else tuple(labels)
    return result


def check_num_samples(num_samples: int) -> None:
    """:raises ParameterError: for too few."""
    if num_samples < 2:
        raise ParameterError(f"num_samples must be at least 2, got {num_samples}")


@dataclass(frozen=True)
class Context:
    """What a reader knows beside the sites, for the checks that are made of every reading.

    :ivar data: finds plate -> an observed site in it, by the model, if one is known.
    :ivar leave_out: how to leave a site out, with ``{site}`` for its name.
    """

    data: Callable[[], Mapping[str, str]]
    leave_out: str


def posterior_of(
    sites: Mapping[str, Read],
    labels: Labels,
    outgoing: Mapping[str, str] | None = None,
    context: Context | None = None,
) -> Posterior:
    """The posterior of sites that were read; ``labels`` take the place of plates.

    :param context: for what has a party's own data behind it: sites that have the label of a plate
        of these data are warned of.
    """
    # Our guides call a plate so whose axis has no label.
    plates = {
        name: tuple(None if p == f"_{name}_axis{i}" else p for i, p in enumerate(s.plates))
        for name, s in sites.items()
    }
    if context is not None:
        _warn_of_data_plates({k: p for k, p in plates.items() if k not in labels}, context)
    return Posterior(
        {name: s.factor for name, s in sites.items()},
        # Names that are no sites stay in, so that they are reported.
        {**plates, **labels},
        plates=plates,
        outgoing=outgoing,
    )


def _warn_of_data_plates(plates: Mapping[str, tuple[str | None, ...]], context: Context) -> None:
    """Warn of sites whose label is that of a plate of data: they are of the party alone."""
    if not any(plate is not None for names in plates.values() for plate in names):
        return
    data = context.data()
    for site, names in plates.items():
        plate = next((p for p in names if p in data), None)
        if plate is not None:
            warn_user(
                f"site '{site}' is in the plate '{plate}' of the data '{data[plate]}', and has "
                "its label, so its entries will be matched with those of other parties, as if "
                "they were components. If they are of this party alone, "
                f"{context.leave_out.format(site=site)}; if they are components, say so, "
                f"axes={{'{site}': {names}}}"
            )


def transform_of(name: str, support: Any) -> Transform:
    """The bijection from unconstrained space onto ``support``, which may be that bijection.

    :raises GuideError: if there is none, as for discrete values.
    """
    if isinstance(support, Transform):
        return support
    try:
        return biject_to(support)
    except NotImplementedError as e:
        raise GuideError(
            f"support {support} has no bijection to unconstrained space, so its "
            "draws cannot be matched by a Normal. Enumerate the site or block it, or give it a "
            "distribution of a registered family",
            site=name,
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
    with at(site=name):
        return Factor.of(d)


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
                [
                    Site(name),
                    " is a point mass (Delta): it has a value but no spread. Pass spread=0.1, or "
                    f"spread={{'{name}': 0.1}}: a standard deviation in unconstrained space. "
                    "Or fit a guide that has one, as AutoNormal",
                ]
            )
        self._used.add(name)
        scale = torch.as_tensor(spread, dtype=loc.dtype, device=loc.device).detach()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ParameterError(f"spread must be positive and finite, got {spread}", site=name)
        try:
            scale = scale.expand(loc.shape)
        except RuntimeError as e:
            raise ParameterError(
                f"spread of shape {tuple(scale.shape)} does not broadcast to the "
                f"unconstrained shape {tuple(loc.shape)}",
                site=name,
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
