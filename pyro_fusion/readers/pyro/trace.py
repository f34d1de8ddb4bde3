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
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints

from pyro_fusion.errors import GuideError, ParameterError, UnsupportedFamilyError
from pyro_fusion.families import Factor
from pyro_fusion.families.projection import normal_from_draws
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
        if factor is None:
            transform_of(name, fn.support)  # raises if draws would be of no use
            result[name] = Draws(plates, support=fn.support)
            continue
        like = [_try_factor(name, o) for o in others]
        if name not in dependent and all(_same(factor, o) for o in like):
            result[name] = Read(factor if full else _filled(name, site, factor), plates)
        elif all(o is not None and o.structure() == factor.structure() for o in like):
            result[name] = Draws(plates, like=factor)
        else:
            transform_of(name, fn.support)
            result[name] = Draws(plates, support=fn.support)
        if isinstance(result[name], Draws):
            plates_of(name, site, batch_dim)  # a subsample can be expanded only if it is constant
    return result


def _support(name: str, site: Mapping[str, Any], supports: Mapping[str, Any]) -> Any:
    prior = site["infer"].get("prior")  # effect-based guides leave it here
    if prior is not None:
        return prior.support
    return supports.get(name, site["fn"].support)


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
        except (ParameterError, torch.linalg.LinAlgError) as e:
            raise GuideError(
                f"site '{name}': {num_samples} draws of the {program.what} match no "
                f"{s.like.family.name if s.like else 'Normal'}: {e}"
            ) from e
    _warn_projected(pending, program.what, num_samples)
    return {name: s if isinstance(s, Read) else matched[name] for name, s in sites.items()}


def _statistic(name: str, s: Draws, site: Mapping[str, Any]) -> Tensor:
    if s.like is None:
        plates_of(name, site, len(s.plates))
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
        return normal_from_draws(values, [t], len(s.plates))
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
    warnings.warn(
        f"this {what} is no product of exponential families. Projected by moment matching over "
        f"{num_samples} draws (so to about {error:.1g} standard deviations): "
        + "; and ".join(parts),
        UserWarning,
        stacklevel=5,
    )
