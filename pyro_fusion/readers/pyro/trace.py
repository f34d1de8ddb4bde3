# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Reading the factors of any Pyro program from its traces.

A site is read in one of four ways: as it is, when its distribution depends on no other site; as
the average of its conditional distributions (moment matching, Rao-Blackwellised), when it does;
from draws, when its distribution is no exponential family; with a spread of the caller's, when it
is a point mass.
"""

from __future__ import annotations

import math
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

from pyro_fusion.errors import GuideError, ParameterError, UnsupportedFamilyError, warn_user
from pyro_fusion.families import Factor
from pyro_fusion.families.projection import normal_from_draws
from pyro_fusion.families.transforms import flatten
from pyro_fusion.readers.pyro.program import Program
from pyro_fusion.readers.pyro.sites import (
    Draws,
    Read,
    Sites,
    Spread,
    latent_sites,
    normal_factor,
    plates_of,
    transform_of,
)

__all__ = ["read_trace", "resolve"]

# Enough to see that a distribution changes from run to run, where provenance cannot tell.
_COMPARED = 3
# Draws at which the densities of the members along an axis are compared.
_PROBES = 32


def _bare(d: Distribution) -> Distribution:
    while hasattr(d, "base_dist") and not isinstance(
        d, torch.distributions.TransformedDistribution
    ):
        d = d.base_dist
    return d


def _try_factor(name: str, site: Mapping[str, Any]) -> Factor | None:
    """The site's distribution as a factor, or None if it is of no registered family."""
    mask = site["mask"]
    if isinstance(mask, Tensor) and not bool(mask.all()):
        raise GuideError(
            f"site '{name}' is partly masked out, so there is no posterior over the whole of it. "
            "Remove the mask, or block the site"
        )
    if isinstance(_bare(site["fn"]), dist.Delta):
        return None
    try:
        factor = Factor.of(site["fn"])
        factor.structure()  # raises for a transform that nobody registered, such as a flow
    except UnsupportedFamilyError:
        return None
    return factor


def _same(a: Factor | None, b: Factor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.structure() == b.structure() and all(
        torch.equal(a.params[k], b.params[k]) for k in a.params
    )


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
                f"site '{name}' is not there in every run of the {program.what}, so the posterior "
                "has no fixed set of sites. Block it"
            )
        fn = site["fn"]
        batch_dim = len(fn.batch_shape)
        plates = plates_of(name, site, batch_dim, full)
        support = _support(name, site, supports or {})
        if isinstance(_bare(fn), dist.Delta):
            result[name] = _read_delta(
                name, site, others, traces, plates, support, name in dependent, spread
            )
            continue
        factor = _try_factor(name, site)
        like = [_try_factor(name, o) for o in others]
        if factor is None or _has_learned_map(site, factor, support):
            result[name] = _draws(name, [site, *others], plates, support)
        elif name not in dependent and all(_same(factor, o) for o in like):
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
    """The axes along which all members have the same density, at draws of each of them."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    rank = len(fn.batch_shape)
    if isinstance(_bare(fn), dist.Delta):
        return set()  # whose densities say nothing
    result = set()
    try:
        draws = fn.sample(torch.Size([_PROBES]))
        for axis, size in enumerate(fn.batch_shape):
            member = (torch.arange(_PROBES, device=draws.device) * size) // _PROBES
            index = member.reshape((-1,) + (1,) * (draws.dim() - 1))
            shape = list(draws.shape)
            shape[axis + 1] = 1
            value = draws.gather(axis + 1, index.expand(shape)).expand(draws.shape)
            density = fn.log_prob(value.contiguous())
            first = density.narrow(axis + 1, 0, 1).expand(density.shape)
            if density.dim() == rank + 1 and torch.allclose(density, first, rtol=1e-5):
                result.add(axis)
    except Exception:  # a draw of one is out of the support of another, or there is no density
        return result
    return result


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
    factors = [_try_factor(name, a) for a in auxiliary if a is not None]
    if len(factors) == len(traces) and all(_same(factors[0], f) for f in factors):
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


# -- from draws ------------------------------------------------------------------------------------


def resolve(sites: Sites, program: Program, num_samples: int) -> dict[str, Read]:
    """Match what is still :class:`Draws` to ``num_samples`` runs of ``program``, with one warning
    that names the sites.

    :raises GuideError: if no member of the family matches the draws.
    """
    pending = {name: s for name, s in sites.items() if isinstance(s, Draws)}
    if not pending:
        return {name: s for name, s in sites.items() if isinstance(s, Read)}
    values: dict[str, list[Tensor]] = {name: [] for name in pending}
    dtypes: dict[str, torch.dtype] = {}
    for name, s in pending.items():
        if s.sample is not None:
            draws = s.sample(num_samples)
            values[name], dtypes[name] = [draws.double()], draws.dtype
    run_for = {name: s for name, s in pending.items() if s.sample is None}
    for _ in range(num_samples if run_for else 0):
        run = latent_sites(program.trace())
        for name, s in run_for.items():
            if name not in run:
                raise GuideError(
                    f"site '{name}' is not there in every run of the {program.what}; block it"
                )
            values[name].append(_statistic(name, s, run[name]).unsqueeze(0))
            dtypes[name] = run[name]["value"].dtype
    matched: dict[str, Read] = {}
    for name, s in pending.items():
        try:
            factor = _match(name, s, torch.cat(values[name]))
            dtype = dtypes[name] if s.like is None else s.like.dtype
            matched[name] = Read(factor.to(dtype=dtype), s.plates)
        except UnsupportedFamilyError as e:
            raise UnsupportedFamilyError(f"site '{name}': {e}") from e
        except (ParameterError, torch.linalg.LinAlgError) as e:
            raise GuideError(
                f"site '{name}': {num_samples} draws of the {program.what} match no "
                f"{s.like.family.name if s.like else 'Normal'}: {e}"
            ) from e
    _warn_projected(pending, program.what, num_samples)
    return {name: s if isinstance(s, Read) else matched[name] for name, s in sites.items()}


def _statistic(name: str, s: Draws, site: Mapping[str, Any]) -> Tensor:
    if s.like is None:
        value: Tensor = transform_of(name, s.support).inv(site["value"].double())
        return value
    factor = _try_factor(name, site)
    if factor is None or factor.structure() != s.like.structure():
        raise GuideError(
            f"site '{name}' changes its kind of distribution from run to run, so there is no one "
            "family to project it onto"
        )
    return factor.shift(s.like.location()).mean


def _match(name: str, s: Draws, values: Tensor) -> Factor:
    if not bool(torch.isfinite(values).all()):
        raise ParameterError(
            "some are at or beyond the border of the support, which may depend on other sites"
        )
    if s.like is None:
        t = transform_of(name, s.support)
        inseparable = max((part.domain.event_dim for part in flatten([t])), default=0)
        pooled = {k: n for k, n in s.pooled.items() if k + 1 < values.dim() - inseparable}
        for axis in pooled:
            values = torch.cat(values.split(1, axis + 1))
        factor = normal_from_draws(values, [t], len(s.plates))
        shape = [pooled.get(axis, size) for axis, size in enumerate(factor.base_shape)]
        return factor.expand(shape).map(torch.clone)
    # Centred at the first conditional location: second moments cancel badly far from zero.
    origin = s.like.location()
    centred = s.like.shift(origin).from_mean(values.mean(0))
    factor = centred.shift(origin, 1.0)
    factor.check()
    return factor


def _warn_projected(pending: Mapping[str, Draws], what: str, num_samples: int) -> None:
    parts = []
    mixed = sorted(n for n, s in pending.items() if s.like is not None)
    drawn = sorted(n for n, s in pending.items() if s.like is None)
    if mixed:
        parts.append(f"{mixed}, which depend on other sites, onto the family they have given those")
    if drawn:
        supports = ", ".join(sorted({str(pending[n].support) for n in drawn}))
        parts.append(f"{drawn} onto a Normal in the unconstrained space of {supports}")
    error = 1 / math.sqrt(num_samples)
    warn_user(
        f"this {what} is no product of exponential families. Projected by moment matching over "
        f"{num_samples} draws (so to about {error:.1g} standard deviations): "
        + "; and ".join(parts),
    )
