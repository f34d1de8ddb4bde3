# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Factors that take the place of a model's priors: what is the same for Pyro and for NumPyro."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pyro_fusion.errors import StructureError
from pyro_fusion.families import Factor

__all__ = ["Replacing", "shaped"]


class Replacing:
    """The part of a handler that is the same in Pyro and in NumPyro: which sites the model has
    sampled since it was entered, and that none of those with a prior is missing at the end."""

    def __init__(self, *args: Any, factors: Mapping[str, Factor], party: str) -> None:
        super().__init__(*args)
        self._factors = dict(factors)
        self._party = party
        self._met: set[str] = set()

    def __enter__(self) -> Any:
        self._met = set()
        return super().__enter__()  # type: ignore[misc]

    def __exit__(self, *args: Any) -> Any:
        result = super().__exit__(*args)  # type: ignore[misc]
        if args[0] is None:
            _check_all_met(self._factors, self._met, self._party)
        return result


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


def _check_all_met(factors: Mapping[str, Factor], met: Iterable[str], party: str) -> None:
    """:raises StructureError: if the model has sampled none of some name."""
    there = sorted(met)
    for site in sorted(set(factors) - set(there)):
        raise StructureError(
            f"the model has no site '{site}', of which there is a prior; its sites are {there}",
            party=party,
            site=site,
        )
