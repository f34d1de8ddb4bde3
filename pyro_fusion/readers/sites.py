# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The sites that readers of guides find, with their plates, supports and spreads, and the
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
    """:raises ParameterError: for fewer than two."""
    if num_samples < 2:
        raise ParameterError(f"num_samples must be at least 2, got {num_samples}")


def _untold(values: Mapping[str, Tensor]) -> float | None:
    return None


@dataclass(frozen=True)
class Context:
    """The knowledge that a reader has beside the sites, for the checks of every reading.

    :ivar leave_out: how to leave a site out, with ``{site}`` for its name.
    :ivar data: finds plate -> an observed site in it, by the model, if one is known.
    :ivar likelihood: the log-density of the model's observed sites at values of the sites; None
        where no model is known, or it has other latent sites.
    """

    leave_out: str
    data: Callable[[], Mapping[str, str]] = dict
    likelihood: Callable[[Mapping[str, Tensor]], float | None] = _untold


def posterior_of(
    sites: Mapping[str, Read],
    labels: Labels,
    outgoing: Mapping[str, str] | None = None,
    context: Context | None = None,
) -> Posterior:
    """The posterior of sites that were read; ``labels`` take the place of plates.

    :param context: the reader's knowledge of data. A warning names sites that have the label of a
        plate, if it is a plate of these data or its entries cannot change places.
    """
    # PosteriorGuide and NumPyroGuide give this name to the plate of an axis without a label.
    plates = {
        name: tuple(None if p == f"_{name}_axis{i}" else p for i, p in enumerate(s.plates))
        for name, s in sites.items()
    }
    posterior = Posterior(
        {name: s.factor for name, s in sites.items()},
        # Names that are no sites stay in, so that they are reported.
        {**plates, **labels},
        plates=plates,
        outgoing=outgoing,
    )
    if context is not None:
        named = {k: p for k, p in plates.items() if k not in labels and any(p)}
        data = context.data() if named else {}
        _warn_of_data_plates(named, data, context)
        rest = dict.fromkeys(p for names in named.values() for p in names if p and p not in data)
        for label in rest:
            _warn_of_order(posterior, label, context)
    return posterior


def _warn_of_data_plates(
    plates: Mapping[str, tuple[str | None, ...]], data: Mapping[str, str], context: Context
) -> None:
    """Warn of sites whose label is that of a plate of data: they are of the party alone."""
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


# A log-density that changes by less than this, relatively, may do so by rounding.
_SAME = 1e-3


def _warn_of_order(posterior: Posterior, label: str, context: Context) -> None:
    """Warn of a plate whose entries are in an order that the data know, as regression coefficients
    or the effects of groups: the density of the data is another one when they change places."""
    size, axes = posterior.components(label), posterior.axes
    sites = [site for site in axes if label in axes[site]]
    shapes = {site: f.shape for site, f in posterior.decomposed.items()}
    if size < 2 or any(
        n == size and axis is None
        for site in axes
        for n, axis in zip(shapes[site], axes[site], strict=True)
    ):
        return  # what belongs to the components may lack its label, as the weights of a mixture
    with torch.random.fork_rng():
        torch.manual_seed(0)
        values = posterior.sample()
    moved = dict(values)
    for site in sites:
        for axis, name in enumerate(axes[site]):
            if name == label:
                moved[site] = moved[site].roll(1, axis)
    before = context.likelihood(values)
    after = None if before is None else context.likelihood(moved)
    if before is None or after is None or not abs(after - before) > _SAME * (1 + abs(before)):
        return
    told = ", ".join(
        f"'{site}': {tuple(None if x == label else x for x in axes[site])}" for site in sites
    )
    warn_user(
        f"the plate '{label}' labels {', '.join(map(repr, sites))}, but its entries are no "
        "components without an order: the density of the data changes when they change places. "
        "They will be matched with other parties' in any order. If they mean the same at all "
        f"parties in the order that they have, as coefficients do, take the label away, "
        f"axes={{{told}}}; if they are of this party alone, "
        f"{context.leave_out.format(site=sites[0])}"
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
        """True if there is one for any site."""
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
