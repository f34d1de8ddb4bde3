# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""``axes="auto"``: the labels of a posterior, found with the model it belongs to.

Plates and the hidden layers of modules propose labels. The log-density of the model confirms them:
at draws from the posterior, and data drawn from the model given those, components are permuted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_fusion.errors import FusionError, GuideError, Site, warn_user
from pyro_fusion.families import Factor
from pyro_fusion.posterior import Posterior
from pyro_fusion.readers.axes.modules import evaluating, hidden_layers, random_input
from pyro_fusion.readers.axes.symmetries import Finder, FoundAxes, Probe, Proposal, Values
from pyro_fusion.readers.pyro.program import Program, isolated, modules_of
from pyro_fusion.readers.sites import Read

__all__ = ["find_axes"]

# In unconstrained space: draws of constrained sites are at least this wide, so that components
# differ in all that they have.
_LEAST_SCALE = 0.5


def find_axes(
    sites: Mapping[str, Read],
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seed: int,
) -> FoundAxes:
    """The labels of a posterior over latent variables of ``model``.

    :param sites: the posterior, with elementwise factors.
    :param args: arguments of the model; if there are none and it needs some, a module gets random
        inputs.
    :raises GuideError: if the model cannot be run with these arguments, or has no data then.
    :raises StructureError: if the hidden units of consecutive layers are not exchangeable.
    """
    with isolated(model, seed), evaluating(modules_of(model)):
        args = _arguments(model, args, kwargs)
        program = Program(model, args, kwargs, "model")
        draws = [
            {name: _wide(s.factor).distribution().sample() for name, s in sites.items()}
            for _ in range(2)
        ]
        _check_shapes(_run(program, model, seed), draws[0])
        # Where a fit is poor, its components are hardly told apart; those of the prior are.
        draws[1] = _from_prior(program, sites, draws[1], seed)
        probes = [_probe(program, values, seed) for values in draws]
        shapes = {name: tuple(v.shape) for name, v in draws[0].items()}
        proposals = _plates(sites)
        taken = {*sites, *(p.label for p in proposals)}
        given = poutine.condition(model, draws[0])
        modules = modules_of(model)
        proposals += hidden_layers(modules, lambda: _run(program, given, seed), shapes, taken)

        def admits(site: str, labels: tuple[str | None, ...]) -> bool:
            return _admits(sites[site].factor, labels)

        scalable = [name for name, s in sites.items() if s.factor.scales]
        found = Finder(shapes, probes, admits, scalable, seed).run(proposals)
    if not proposals:
        warn_user(
            'axes="auto" found nothing to label: no site is in a plate, and no linear layer takes '
            "what another makes. All sites are shared; if that is wrong, give axes by hand"
        )
    return found


def _plates(sites: Mapping[str, Read]) -> list[Proposal]:
    names = dict.fromkeys(name for s in sites.values() for name in s.plates if name is not None)
    return [
        Proposal(
            name,
            f"plate '{name}'",
            tuple((k, i) for k, s in sites.items() for i, x in enumerate(s.plates) if x == name),
        )
        for name in names
    ]


def _wide(f: Factor) -> Factor:
    if f.family.name != "Normal" or not f.transforms:
        return f
    return replace(f, params={**f.params, "scale": f.params["scale"].clamp(min=_LEAST_SCALE)})


def _from_prior(
    program: Program, sites: Mapping[str, Read], values: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Sites on the line drawn from their priors, given the other values."""
    given = {k: v for k, v in values.items() if not _on_the_line(sites[k].factor)}
    try:
        trace = _run(program, poutine.condition(program.fn, given), seed)
    except GuideError:  # a prior of which no draws are to be had
        return values
    drawn: dict[str, Any] = {k: trace.nodes[k]["value"] for k in values if k in trace}
    return {k: x if (x := drawn.get(k, v)).shape == v.shape else v for k, v in values.items()}


def _on_the_line(f: Factor) -> bool:
    return f.family.name in ("Normal", "MultivariateNormal") and not f.transforms


def _admits(f: Factor, labels: tuple[str | None, ...]) -> bool:
    """True if fusion can handle these labels of a site: one label on two axes, or on an axis of no
    independent components, is for the rows and columns of Dirichlets."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            f = Posterior({"site": f}, {"site": labels}).decomposed["site"]
    except FusionError:
        return False
    names = [a for a in labels if a is not None]
    rows = [a for a in labels[: f.separable_axes] if a is not None]
    return len(rows) == len(set(rows)) and (len(rows) == len(names) or len(set(names)) == 1)


# -- running the model -----------------------------------------------------------------------------


def _arguments(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Arguments that the model runs with."""
    try:
        Program(model, args, kwargs, "model").trace()
        return args
    except GuideError as e:
        x = None if args or kwargs else random_input(modules_of(model))
        if x is not None:
            try:
                Program(model, (x,), kwargs, "model").trace()
                return (x,)
            except GuideError:
                pass
        raise GuideError(
            f'axes="auto" runs the model, to see which components are exchangeable, but {e}, '
            'as in from_guide(guide, *args, axes="auto"); or give axes by hand'
        ) from e


def _check_shapes(trace: Trace, values: Values) -> None:
    nodes: Mapping[str, Any] = trace.nodes
    for name, v in values.items():
        if name not in nodes:
            raise GuideError(["the model has no ", Site(name), ", which the guide has"])
        if nodes[name]["value"].shape != v.shape:
            raise GuideError(
                [
                    Site(name),
                    f" has shape {tuple(v.shape)} in the guide and "
                    f"{tuple(nodes[name]['value'].shape)} in the model, as with other data or a "
                    "subsampled plate. Pass the arguments that the guide was fitted with; hide "
                    f"local variables, poutine.block(guide, hide=['{name}']); or give axes by hand",
                ]
            )


def _probe(program: Program, values: dict[str, Tensor], seed: int) -> Probe:
    """The model at these values, and at data and local variables drawn given those."""
    observing = program.fn
    for simulated in (True, False):  # not all that can be scored can be drawn
        fn = poutine.uncondition(observing) if simulated else observing
        try:
            trace = _run(program, poutine.condition(fn, values), seed)
            break
        except GuideError:
            if not simulated:
                raise
    others = _others(trace, values)
    summed = _hidden(program, poutine.condition(fn, values), others)
    recorded: dict[str, Tensor] = {k: v["value"] for k, v in others.items() if k not in summed}
    if not recorded:
        raise GuideError(
            'axes="auto" needs the observed sites of the model, to see which components are '
            "exchangeable, and it has none when it is run with these arguments: pass those it was "
            'fitted with, from_guide(guide, *args, axes="auto")'
        )

    def respond(values: Values) -> Mapping[str, Tensor]:
        conditioned = poutine.condition(fn, {**recorded, **values})
        trace = _run(program, conditioned, seed)
        trace.compute_log_prob()
        nodes: Mapping[str, Any] = trace.nodes
        if not summed:
            return {name: nodes[name]["log_prob"] for name in (*values, *recorded)}
        terms = {name: nodes[name]["log_prob"] for name in values}
        total = -TraceEnum_ELBO().loss(
            config_enumerate(conditioned), lambda *_, **__: None, *program.args, **program.kwargs
        )
        rest = total - sum(float(v.sum()) for v in terms.values())
        return {**terms, " and ".join(recorded): torch.tensor(rest)}

    probe = Probe(values, respond, unit=1.0)
    if infinite := [k for k, v in probe.before.items() if not bool(torch.isfinite(v).all())]:
        raise GuideError(
            f"the log-density of {infinite} is not finite at a draw from the guide, so it cannot "
            'be compared as axes="auto" does: give axes by hand'
        )
    return probe


def _run(program: Program, fn: Callable[..., Any], seed: int) -> Trace:
    pyro.set_rng_seed(seed)
    return replace(program, fn=fn).trace()


def _others(trace: Trace, values: Values) -> dict[str, Any]:
    """The random sites that the posterior is not about."""
    nodes: Mapping[str, Any] = trace.nodes
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample"
        and name not in values
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    }


def _hidden(program: Program, fn: Callable[..., Any], others: Mapping[str, Any]) -> set[str]:
    """The discrete sites to sum out. Without data, observed sites look like them; but no other site
    depends on an observed one."""
    discrete = {
        name
        for name, site in others.items()
        if getattr(site["fn"], "has_enumerate_support", False)
        and not (site["is_observed"] or site["infer"].get("was_observed"))
    }
    if not discrete:
        return discrete
    try:
        with pyro.validation_enabled(False), TrackProvenance():
            trace = poutine.trace(fn).get_trace(*program.args, **program.kwargs)
            upstream: set[str] = set()
            for name in others:
                site: Any = trace.nodes[name]
                density = site["fn"].log_prob(detach_provenance(site["value"]))
                upstream |= get_provenance(density) - {name}
    except Exception:  # an operation without provenance
        return discrete
    return discrete & upstream
