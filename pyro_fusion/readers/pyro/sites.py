# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The sites of Pyro's traces and their plates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample

from pyro_fusion.errors import GuideError

__all__ = ["latent_sites", "plates_of"]


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
