# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The sites of Pyro's traces and their plates."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pyro import poutine
from pyro.distributions import Unit
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_fusion.errors import FusionError
from pyro_fusion.readers import program
from pyro_fusion.readers.program import Frame
from pyro_fusion.readers.pyro.program import Program, isolated, without
from pyro_fusion.readers.sites import Context

__all__ = [
    "context_of",
    "data_plates",
    "frames_of",
    "latent_sites",
    "log_likelihood",
    "plates_of",
]


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
    return program.plates_of(name, frames_of(site, batch_dim), batch_dim, full)


def frames_of(site: Mapping[str, Any], batch_dim: int) -> tuple[Frame, ...]:
    """The plates that are batch axes of a site."""
    return tuple(
        Frame(f.name, batch_dim + f.dim, f.size, f.size if f.full_size is None else f.full_size)
        for f in site["cond_indep_stack"]
        if f.vectorized and -f.dim <= batch_dim
    )


def data_plates(trace: Trace) -> dict[str, str]:
    """Plate -> an observed site in it."""
    nodes: Mapping[str, Any] = trace.nodes
    return {
        frame.name: name
        for name, site in nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not site_is_subsample(site)
        and not isinstance(site["fn"], Unit)  # a factor
        for frame in site["cond_indep_stack"]
    }


def log_likelihood(program: Program, values: Mapping[str, Tensor]) -> float | None:
    """The log-density of the observed sites of a model at these values of its latent sites; None if
    it has others, or cannot be run."""
    program = replace(program, fn=poutine.condition(program.fn, dict(values)))
    with isolated(program.fn, 0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trace = program.trace()
            trace.compute_log_prob()
        except Exception:  # no density at these values, say
            return None
    nodes: Mapping[str, Any] = trace.nodes
    sites = {k: s for k, s in nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}
    if not set(values) <= set(sites) or not all(s["is_observed"] for s in sites.values()):
        return None
    return sum(float(s["log_prob"].sum()) for k, s in sites.items() if k not in values)


def context_of(guide: Any) -> Context:
    """The plates of data and the likelihood of an autoguide's model, run with the arguments of its
    first call; none where that cannot be done."""
    hide = "hide the site, poutine.block(guide, hide=['{site}'])"
    prototype = getattr(guide, "prototype_trace", None)
    called = {} if prototype is None else prototype.nodes.get("_INPUT", {})
    if "args" not in called or getattr(guide, "_model", None) is None:
        return Context(hide)
    model = without(guide.model, InitMessenger, BlockMessenger)
    program = Program(model, called["args"], called["kwargs"], "model")

    def data() -> dict[str, str]:
        with isolated(model, 0), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return data_plates(program.trace())
            except FusionError:
                return {}

    return Context(hide, data, lambda values: log_likelihood(program, values))
