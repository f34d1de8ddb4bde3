# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Reading the factors of any Pyro program from its traces.

A site is read in one of four ways: as it is, when its distribution depends on no other site; as
the average of its conditional distributions (moment matching, Rao-Blackwellised), when it does;
from draws, when its distribution is no exponential family; with a spread of the caller's, when it
is a point mass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to, constraints
from torch.distributions import transforms as tt

from pyro_fusion.errors import GuideError, Site
from pyro_fusion.families import Factor
from pyro_fusion.families.transforms import flatten
from pyro_fusion.readers.projection import bare, constant_axes, factor_of, same_factors
from pyro_fusion.readers.pyro.program import Program
from pyro_fusion.readers.pyro.sites import latent_sites, plates_of
from pyro_fusion.readers.sites import Draws, Read, Sites, Spread, normal_factor, transform_of

__all__ = ["read_trace"]

# Enough to see that a distribution changes from run to run, where provenance cannot tell.
_COMPARED = 3


def _dependent(program: Program) -> set[str]:
    """The sites whose distribution is computed from the value of another latent site."""
    try:
        with pyro.validation_enabled(False), TrackProvenance():
            trace = poutine.trace(program.fn).get_trace(*program.args, **program.kwargs)
        latent = {
            name
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        }
        result = set()
        for name, site in latent_sites(trace).items():
            with pyro.validation_enabled(False):
                density = site["fn"].log_prob(detach_provenance(site["value"]))
            if get_provenance(density) & (latent - {name}):
                result.add(name)
        return result
    except Exception:  # an operation without provenance; comparing runs is the other means
        return set()


def read_trace(
    program: Program,
    spread: Spread,
    supports: Mapping[str, Any] | None = None,
    skip: frozenset[str] = frozenset(),
    full: bool = True,
) -> Sites:
    """Read the sites of a program, as the head of this file says.

    :param supports: the supports of the model's sites, for point masses, which do not know
        theirs.
    :param skip: sites to leave out.
    :param full: refuse subsampled plates; otherwise expand what does not vary along them.
    :raises GuideError: for a subsampled plate, a point mass without spread, a masked site, or a
        program that fails.
    """
    traces = [program.trace() for _ in range(_COMPARED)]
    dependent = _dependent(program)
    runs = [latent_sites(t) for t in traces]
    result: Sites = {}
    for name, site in runs[0].items():
        if name in skip:
            continue
        others = [r[name] for r in runs[1:] if name in r]
        if len(others) < _COMPARED - 1:
            raise GuideError(
                [
                    Site(name),
                    f" is not there in every run of the {program.what}, so the posterior "
                    "has no fixed set of sites. Block it",
                ]
            )
        fn = site["fn"]
        batch_dim = len(fn.batch_shape)
        plates = plates_of(name, site, batch_dim, full)
        support = _support(name, site, supports or {})
        if isinstance(bare(fn), dist.Delta):
            result[name] = _read_delta(
                name, site, others, traces, plates, support, name in dependent, spread
            )
            continue
        factor = factor_of(name, site)
        like = [factor_of(name, o) for o in others]
        if factor is None or _has_learned_map(site, factor, support):
            result[name] = _draws(name, [site, *others], plates, support)
        elif name not in dependent and all(same_factors(factor, o) for o in like):
            result[name] = Read(factor if full else _filled(name, site, factor), plates)
        elif all(o is not None and o.structure() == factor.structure() for o in like):
            plates_of(name, site, batch_dim)  # its members may differ
            result[name] = Draws(plates, like=factor)
        else:
            result[name] = _draws(name, [site, *others], plates, support)
    return result


def _draws(
    name: str, sites: Sequence[Mapping[str, Any]], plates: tuple[str | None, ...], support: Any
) -> Draws:
    """To be matched by a Normal, the same for members of the same distribution in all runs."""
    transform_of(name, support)  # raises if draws would be of no use
    constant = set.intersection(*(_constant_axes(s["fn"]) for s in sites))
    shape = sites[0]["value"].shape
    pooled = {axis: shape[axis] for axis in constant}
    for frame in sites[0]["cond_indep_stack"]:
        axis = len(plates) + frame.dim if frame.vectorized else -1
        if axis in pooled and frame.full_size is not None:
            pooled[axis] = frame.full_size
        elif axis >= 0:
            plates_of(name, {**sites[0], "cond_indep_stack": [frame]}, len(plates))
    return Draws(plates, support=support, pooled=pooled)


def _constant_axes(fn: Distribution) -> set[int]:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    if isinstance(bare(fn), dist.Delta):
        return set()  # whose densities say nothing
    return constant_axes(fn.batch_shape, lambda n: fn.sample(torch.Size([n])), fn.log_prob)


def _has_learned_map(site: Mapping[str, Any], factor: Factor, support: Any) -> bool:
    """Whether an effect-based guide put a map of its own, other than that onto the support,
    between the family and the value: no two guides have the same."""
    if site["infer"].get("prior") is None:
        return False
    known = [t for t in flatten([transform_of(site["name"], support)]) if _is_affine(t)]
    return any(_is_affine(t) and not any(_agree(t, k) for k in known) for t in factor.transforms)


def _agree(a: Transform, b: Transform) -> bool:
    at = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return all(bool(((a(x) - b(x)).abs() <= 1e-5 * (1 + b(x).abs())).all()) for x in at)


def _support(name: str, site: Mapping[str, Any], supports: Mapping[str, Any]) -> Any:
    prior = site["infer"].get("prior")  # effect-based guides leave it here
    if prior is not None:
        return prior.support
    return supports[name] if name in supports else _support_of(site["fn"])


def _support_of(d: Distribution) -> Any:
    """The support, where torch says "real" of whatever ends in an affine map."""
    if isinstance(d, torch.distributions.Independent):
        return _independent(_support_of(d.base_dist), d.reinterpreted_batch_ndims)
    if isinstance(d, ExpandedDistribution | MaskedDistribution):
        return _support_of(d.base_dist)
    generic = torch.distributions.TransformedDistribution
    if not isinstance(d, generic) or type(d).support is not generic.support:
        return d.support
    support = _support_of(d.base_dist)
    for t in flatten(d.transforms):
        support = _affine_image(t, support) if _is_affine(t) else t.codomain
    return _independent(support, len(d.event_shape) - support.event_dim)


def _independent(support: Any, n: int) -> Any:
    return constraints.independent(support, n) if n > 0 else support


def _is_affine(t: Transform) -> bool:
    return isinstance(t.inv if isinstance(t, tt._InverseTransform) else t, tt.AffineTransform)


def _affine_image(t: Transform, support: Any) -> Any:
    """What an affine map makes of an interval, a half-line or the line."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    lower, upper = (getattr(support, f"{side}_bound", None) for side in ("lower", "upper"))
    if lower is None and upper is None:
        return t.codomain
    steps = t(torch.ones(())) - t(torch.zeros(()))
    ends = [None if b is None else _image_of(t, b) for b in (lower, upper)]
    if bool((steps < 0).all()):
        ends.reverse()
    elif not bool((steps > 0).all()):
        return t.codomain  # up for some, down for others
    low, high = ends
    if low is None:
        return constraints.less_than(high)
    return constraints.greater_than(low) if high is None else constraints.interval(low, high)


def _image_of(t: Transform, bound: Any) -> Any:
    image = t(torch.as_tensor(bound, dtype=torch.float64)).detach()
    first = image.flatten()[0]
    return first.item() if bool((image == first).all()) else image


def _read_delta(
    name: str,
    site: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]],
    traces: Sequence[Trace],
    plates: tuple[str | None, ...],
    support: Any,
    dependent: bool,
    spread: Spread,
) -> Read | Draws:
    if not dependent and all(torch.equal(site["value"], o["value"]) for o in others):
        t = transform_of(name, support)
        return Read(spread.around(name, t.inv(site["value"]), support, len(plates)), plates)
    # AutoNormal, called by another guide, shows an auxiliary site beside the point mass.
    auxiliary: list[Any] = [t.nodes.get(f"{name}_unconstrained") for t in traces]
    values: list[Any] = [t.nodes[name]["value"] for t in traces]
    factors = [factor_of(name, a) for a in auxiliary if a is not None]
    if len(factors) == len(traces) and all(same_factors(factors[0], f) for f in factors):
        first = factors[0]
        if first is not None and first.family.name == "Normal" and not first.transforms:
            for candidate in (support, *_CANDIDATES):
                pairs = zip(auxiliary, values, strict=True)
                if all(_is_image(candidate, a["value"], v) for a, v in pairs):
                    loc, scale = first.params["loc"], first.params["scale"]
                    return Read(normal_factor(name, loc, scale, candidate, len(plates)), plates)
    return Draws(plates, support=support)


# The supports that a value may be told to have by what maps its auxiliary value to it.
_CANDIDATES: tuple[Any, ...] = (
    constraints.real,
    constraints.positive,
    constraints.unit_interval,
    constraints.simplex,
    constraints.corr_cholesky,
    dist.constraints.softplus_positive,
    dist.constraints.ordered_vector,
)


def _is_image(support: Any, unconstrained: Tensor, value: Tensor) -> bool:
    t = biject_to(support)
    if unconstrained.dim() < t.domain.event_dim:
        return False
    try:
        image = t(unconstrained)
    except (ValueError, RuntimeError):
        return False
    return image.shape == value.shape and torch.allclose(image, value, rtol=1e-5, atol=0)


def _filled(name: str, site: Mapping[str, Any], factor: Factor) -> Factor:
    """Expand along subsampled plates what is the same for every member."""
    shape = list(factor.base_shape)
    for frame in site["cond_indep_stack"]:
        if not frame.vectorized or frame.full_size in (None, frame.size):
            continue
        axis = factor.batch_dim + frame.dim
        if any(bool((v != v.narrow(axis, 0, 1)).any()) for v in factor.params.values()):
            plates_of(name, site, factor.batch_dim)  # raises
        factor = factor.map(lambda v, axis=axis: v.narrow(axis, 0, 1))  # type: ignore[misc]
        shape[axis] = frame.full_size
    return factor.expand(shape).map(torch.clone)
