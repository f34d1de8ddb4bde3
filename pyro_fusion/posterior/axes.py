# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The labels of a site's axes: checked, shown, and the factor made separable along them."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_fusion.errors import StructureError, at, warn_user
from pyro_fusion.families import Factor, as_factor
from pyro_fusion.families.projection import (
    dirichlet_from_stick_breaking,
    is_stick_breaking,
    to_marginals,
)

__all__ = ["as_index", "describe", "describe_axes", "labelled", "names_of"]

# Replacing a joint Normal by its marginals is reported when it loses more than this per dimension.
_NATS_PER_DIMENSION = 0.1


def as_index(index: Sequence[int] | Tensor) -> Tensor:
    """The numbers of components as a LongTensor of one axis.

    :raises StructureError: unless all are integers.
    """
    try:
        result = torch.as_tensor(index).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as e:
        raise StructureError(f"expected the numbers of components, got {index!r}") from e
    if result.numel() and (result.is_floating_point() or result.dtype == torch.bool):
        raise StructureError(f"expected the numbers of components, got {result.dtype}")
    return result.long()


def describe(f: Factor) -> str:
    """A factor's family and transforms, for tables and messages."""
    d: Distribution = f.distribution(validate_args=False)
    while isinstance(d, torch.distributions.Independent):
        d = d.base_dist
    if type(d) is not dist.TransformedDistribution:
        return type(d).__name__
    return f"{f.family.name} → " + " → ".join(
        type(t).__name__.removesuffix("Transform") for t in f.transforms
    )


def describe_axes(axes: tuple[str | None, ...]) -> str:
    """The labels of a site's axes, for tables and messages."""
    return "(" + ", ".join(a or "·" for a in axes) + ")" if any(axes) else "shared"


def names_of(site: str, names: Sequence[str | None] | str) -> tuple[str | None, ...]:
    """Labels or plates as a tuple; a single name becomes a tuple of one.

    :raises StructureError: for entries that are neither names nor None.
    """
    if not isinstance(names, Sequence):
        raise StructureError(f"expected a sequence of labels, got {names!r}", site=site)
    names = (names,) if isinstance(names, str) else tuple(names)
    if any(not (name is None or (isinstance(name, str) and name)) for name in names):
        raise StructureError(f"labels must be names or None, got {names}", site=site)
    return names


def labelled(
    site: str, d: Distribution | Factor, labels: Sequence[str | None] | str
) -> tuple[Factor, tuple[str | None, ...]]:
    """Take one site apart, check it, and make its labelled axes separable."""
    labels = names_of(site, labels)
    with at(site=site):
        f = d.map(torch.clone) if isinstance(d, Factor) else as_factor(d)
        if len(labels) > len(f.shape):
            raise StructureError(
                f"{len(labels)} labels {labels} for shape {tuple(f.shape)} "
                "(batch_shape + event_shape)"
            )
        axes = labels + (None,) * (len(f.shape) - len(labels))
        f.check()
        joint = [i for i in range(f.separable_axes, len(axes)) if axes[i] is not None]
        if joint:
            f = _separated(site, f, joint)
            f.check()
    return f, axes


def _separated(site: str, f: Factor, joint: list[int]) -> Factor:
    if is_stick_breaking(f):
        return dirichlet_from_stick_breaking(f)
    elementwise = f.separable_axes == len(f.base_shape)
    if f.family.name == "MultivariateNormal" and elementwise:
        marginal, lost = to_marginals(f)
        if lost > _NATS_PER_DIMENSION * f.shape[-1]:
            warn_user(
                f"site '{site}': labelling the event axis of a MultivariateNormal keeps only its "
                f"marginals, which loses {lost:.1f} nats of correlation"
            )
        return marginal
    # Raises if the family has no separable event axes, or a transform is in the way.
    for axis in joint:
        f.index_select(axis, torch.arange(f.shape[axis]))
    return f
