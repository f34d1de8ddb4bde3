# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The messages of Pyro's traces, from which ``readers/program.py`` reads any Pyro program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

from pyro_fusion.families import Factor
from pyro_fusion.families.transforms import flatten
from pyro_fusion.readers.program import COMPARED, Frame, Message, read_runs
from pyro_fusion.readers.projection import (
    bare,
    constant_axes,
    factor_of,
    resolve,
    same_factors,
)
from pyro_fusion.readers.pyro.program import Program
from pyro_fusion.readers.pyro.sites import frames_of, latent_sites
from pyro_fusion.readers.sites import Read, Sites, Spread, normal_factor, transform_of

__all__ = ["read_trace", "resolved"]


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
    """Read the sites of a program; :func:`~pyro_fusion.readers.program.read_runs` says how.

    :param supports: the supports of the model's sites, for point masses, which do not know
        theirs.
    :param skip: sites to leave out.
    :param full: refuse subsampled plates; otherwise expand what does not vary along them.
    :raises GuideError: for a subsampled plate, a point mass without spread, a masked site, or a
        program that fails.
    """
    traces = [program.trace() for _ in range(COMPARED)]
    dependent = _dependent(program)
    runs = [
        {
            name: _PyroMessage(name, site, t, supports or {}, name in dependent)
            for name, site in latent_sites(t).items()
            if name not in skip
        }
        for t in traces
    ]
    return read_runs(runs, spread, program.what, full)


def resolved(found: Sites, program: Program, num_samples: int) -> dict[str, Read]:
    """Sites with a factor each: those still to be matched to draws get it from runs of the program.

    :raises GuideError: if no member of the family matches the draws.
    """
    return resolve(found, lambda: latent_sites(program.trace()), program.what, num_samples)


@dataclass(frozen=True)
class _PyroMessage(Message):
    name: str
    site: Mapping[str, Any]
    trace: Trace
    supports: Mapping[str, Any]
    dependent: bool

    @property
    def batch_dim(self) -> int:
        return len(self.site["fn"].batch_shape)

    @property
    def frames(self) -> tuple[Frame, ...]:
        return frames_of(self.site, self.batch_dim)

    def check(self) -> None:
        """Refuse nothing: masks are checked with the factor."""

    def is_point(self) -> bool:
        return isinstance(bare(self.site["fn"]), dist.Delta)

    def factor(self) -> Factor | None:
        factor = factor_of(self.name, self.site)
        if factor is None or _has_learned_map(self.site, factor, self.support):
            return None
        return factor

    def value(self) -> Tensor:
        value: Tensor = self.site["value"]
        return value

    def support(self) -> Any:
        return _support(self.name, self.site, self.supports)

    def constant_axes(self) -> set[int]:
        return _constant_axes(self.site["fn"])

    def behind_point(self, others: Sequence[Any], support: Any) -> Factor | None:
        """The Normal of an AutoNormal that another guide calls: it shows an auxiliary site beside
        the point mass."""
        runs = [self, *others]
        auxiliary: list[Any] = [r.trace.nodes.get(f"{self.name}_unconstrained") for r in runs]
        factors = [factor_of(self.name, a) for a in auxiliary if a is not None]
        if len(factors) < len(runs) or not all(same_factors(factors[0], f) for f in factors):
            return None
        first = factors[0]
        if first is None or first.family.name != "Normal" or first.transforms:
            return None
        for candidate in (support, *_CANDIDATES):
            pairs = zip(auxiliary, runs, strict=True)
            if all(_is_image(candidate, a["value"], r.value()) for a, r in pairs):
                loc, scale = first.params["loc"], first.params["scale"]
                return normal_factor(self.name, loc, scale, candidate, self.batch_dim)
        return None


def _constant_axes(fn: Distribution) -> set[int]:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    if isinstance(bare(fn), dist.Delta):
        return set()  # whose densities say nothing
    return constant_axes(fn.batch_shape, lambda n: fn.sample(torch.Size([n])), fn.log_prob)


def _has_learned_map(site: Mapping[str, Any], factor: Factor, support: Callable[[], Any]) -> bool:
    """True if an effect-based guide put a map of its own, other than that onto the support,
    between the family and the value: no two guides have the same."""
    if site["infer"].get("prior") is None:
        return False
    known = [t for t in flatten([transform_of(site["name"], support())]) if _is_affine(t)]
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
    """The support, also behind an affine map, of which torch always says "real"."""
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
    """The image of an interval, a half-line or the line under an affine map."""
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


# Supports whose bijection may be the map from an auxiliary value to the site's value.
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
