# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The checks of factors that take the place of a model's priors, for Pyro and NumPyro alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pyro_fusion.errors import StructureError
from pyro_fusion.families import Factor

__all__ = ["check_all_met", "shaped"]


def shaped(f: Factor, batch: Sequence[int], event: Sequence[int], party: str, site: str) -> Factor:
    """The factor with the batch and event shape that a model gives the site.

    :raises StructureError: if it has other axes, or those of a plate are not independent in it.
    """
    wanted = (*batch, *event)
    if tuple(f.shape) != wanted or len(batch) > f.separable_axes:
        raise StructureError(
            f"the prior of '{site}' has shape {tuple(f.shape)}, the model samples it with batch "
            f"shape {tuple(batch)} and event shape {tuple(event)}: run the model with as many "
            "components as the prior has, or choose from these by prior.select(label, index)",
            party=party,
            site=site,
        )
    return replace(f, batch_dim=len(batch))


def check_all_met(factors: Mapping[str, Factor], met: Iterable[str], party: str) -> None:
    """:raises StructureError: if the model has sampled none of some name."""
    there = sorted(met)
    for site in sorted(set(factors) - set(there)):
        raise StructureError(
            f"the model has no site '{site}', of which there is a prior; its sites are {there}",
            party=party,
            site=site,
        )
