# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Reading Pyro's own guides from their parameters, which is exact: nothing is sampled.

A joint Gaussian (AutoMultivariateNormal, AutoLowRankMultivariateNormal, a Laplace approximation,
AutoGaussian, AutoStructured with linear dependencies) is read as its exact block marginals.
"""

# Pyro offers no public way to these numbers. The readers rely on the following private attributes,
# checked with Pyro 1.9.2; `test_private_attributes_of_pyro` fails when one of them goes.
#   AutoGuide         _model, prototype_trace
#   AutoNormal        _event_dims, _get_loc_and_scale
#   AutoContinuous    _unconstrained_shapes, _unpack_latent
#   laplace_approximation()  "loc" in _buffers: the mark of its AutoMultivariateNormal
#   AutoGaussian      _factors, _unconstrained_event_shapes; _dense_get_mvn, _dense_shapes
#   AutoStructured    _sorted_sites, _batch_shapes, _unconstrained_event_shapes
#   AutoCallable      _guide
#   EasyGuide groups  _site_sizes
#   PyroModule        _pyro_name, _pyro_context.used

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import pyro.distributions as dist
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import (
    AutoCallable,
    AutoContinuous,
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuide,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.infer.autoguide.effect import AutoMessenger, AutoNormalMessenger
from pyro.infer.autoguide.gaussian import AutoGaussian
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.infer_config_messenger import InferConfigMessenger
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor
from torch.distributions import Distribution

from pyro_fusion.errors import GuideError, Site, warn_user
from pyro_fusion.readers.joint import Joint, Piece, marginals
from pyro_fusion.readers.pyro.joint import gaussian_joint, structured_joint
from pyro_fusion.readers.pyro.program import Program, modules_of, peel
from pyro_fusion.readers.pyro.sites import latent_sites, plates_of
from pyro_fusion.readers.pyro.trace import read_trace
from pyro_fusion.readers.sites import (
    Draws,
    Labels,
    Read,
    Sites,
    Spread,
    normal_factor,
    transform_of,
)

__all__ = ["prototype_sites", "read", "require_called"]

# Handlers that change nothing about the distribution of a guide's sites, but may hide some.
_TRANSPARENT = (BlockMessenger, InferConfigMessenger, MaskMessenger, ScaleMessenger)


def read(program: Program, spread: Spread, labels: Labels) -> Sites:
    """Read any guide: Pyro's own from their parameters, others from their traces.

    :raises GuideError: as :func:`~pyro_fusion.readers.pyro.from_guide` says.
    """
    guide, args, kwargs = program.fn, program.args, program.kwargs
    handlers, inner = peel(guide)
    if handlers:
        known = isinstance(inner, AutoGuide | AutoMessenger | EasyGuide)
        if known and all(isinstance(h, _TRANSPARENT) for h in handlers):
            sites = read(Program(inner, args, kwargs), spread, labels)
            visible = latent_sites(program.trace())
            return {name: s for name, s in sites.items() if name in visible}
        return _read_callable(program, spread)
    if isinstance(guide, functools.partial):
        bound = Program(guide.func, guide.args + args, {**guide.keywords, **kwargs})
        return read(bound, spread, labels)
    if isinstance(guide, AutoCallable):
        return read(Program(guide._guide, args, kwargs), spread, labels)
    if isinstance(guide, AutoGuide | AutoMessenger | EasyGuide):
        require_called(guide)
    if isinstance(guide, AutoGuideList):
        return _read_list(guide, program, spread, labels)
    if isinstance(guide, AutoDiscreteParallel):
        return {}
    if isinstance(guide, AutoDelta):
        return _read_delta(guide, spread)
    if isinstance(guide, AutoNormal):
        return _read_normal(guide)
    if isinstance(guide, AutoContinuous):
        return _read_continuous(guide, program, spread, labels)
    if isinstance(guide, AutoGaussian) and hasattr(guide, "_dense_get_mvn"):
        return _blocks(guide, gaussian_joint(guide), labels)
    if isinstance(guide, AutoStructured):
        joint = structured_joint(guide)
        if joint is not None:
            return _blocks(guide, joint, labels, structured=True)
    if isinstance(guide, EasyGuide):
        return _read_easy(guide, program, spread, labels)
    return _read_callable(program, spread)


def _read_callable(program: Program, spread: Spread) -> Sites:
    """Read any other program from its traces. Pyro's guides inside it know the supports of their
    point masses."""
    supports: dict[str, Any] = {}
    for root in modules_of(program.fn):
        for m in root.modules():
            if isinstance(m, AutoGuide | EasyGuide | AutoNormalMessenger) and not isinstance(
                m, AutoCallable
            ):
                require_called(m)
            if isinstance(m, AutoGuide | EasyGuide) and m.prototype_trace is not None:
                sites = () if isinstance(m, AutoDiscreteParallel) else prototype_sites(m)
                supports |= {name: site["fn"].support for name, site in sites}
    return read_trace(program, spread, supports)


def require_called(guide: Any) -> None:
    """Refuse a guide that makes its parameters when it is first called, and was not.

    :raises GuideError: saying what to do.
    """
    kind = type(guide).__name__
    if isinstance(guide, AutoNormalMessenger):
        if "locs" in guide._modules:
            return
    elif isinstance(guide, AutoMessenger) or guide.prototype_trace is not None:
        return
    if isinstance(guide, AutoGuide) and guide._model is None:
        raise GuideError(
            f"this {kind} was saved before it was ever called, and saving a guide loses its "
            f"model: nothing is left to read. Make it anew, guide = {kind}(model), load the "
            "parameter store it was fitted in, call guide(*args) once, then read it"
        )
    raise GuideError(
        f"this {kind} was never called, so it has no parameters yet. Fit it, or load the "
        "parameter store it was fitted in, and call guide(*args) once with the arguments of the "
        "model; then read it"
    )


def prototype_sites(guide: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and site, with ``fn`` and ``cond_indep_stack``, of a guide's latent variables."""
    if isinstance(guide, AutoGaussian):
        for name, site in guide._factors.items():
            if not site["is_observed"]:
                yield name, site
    elif isinstance(guide, AutoStructured):
        yield from guide._sorted_sites
    else:
        yield from guide.prototype_trace.iter_stochastic_nodes()


# -- one guide at a time ---------------------------------------------------------------------------


def _read_list(guide: AutoGuideList, program: Program, spread: Spread, labels: Labels) -> Sites:
    result: Sites = {}
    for i, part in enumerate(guide):
        sites = read(Program(part, program.args, program.kwargs), spread, labels)
        for name in set(sites) & set(result):
            raise GuideError(
                [
                    Site(name),
                    f" is in part {i} of the AutoGuideList and in an earlier one; block "
                    "it in one of them",
                ]
            )
        result.update(sites)
    return result


def _full_shape(site: Mapping[str, Any], batch_dim: int) -> list[int]:
    """The batch shape with every plate at its full size."""
    shape = list(site["fn"].batch_shape)
    for frame in site["cond_indep_stack"]:
        if frame.vectorized and -frame.dim <= batch_dim and frame.full_size is not None:
            shape[frame.dim] = frame.full_size
    return shape


def _read_normal(guide: AutoNormal) -> Sites:
    result: Sites = {}
    for name, site in prototype_sites(guide):
        loc, scale = guide._get_loc_and_scale(name)
        batch_dim = len(site["fn"].batch_shape)
        event = loc.shape[loc.dim() - guide._event_dims[name] :]
        shape = _full_shape(site, batch_dim) + list(event)
        factor = normal_factor(
            name, loc.expand(shape), scale.expand(shape), site["fn"].support, batch_dim
        )
        result[name] = Read(factor, plates_of(name, site, batch_dim, full=False))
    return result


def _read_delta(guide: AutoDelta, spread: Spread) -> Sites:
    result: Sites = {}
    for name, site in prototype_sites(guide):
        support, batch_dim = site["fn"].support, len(site["fn"].batch_shape)
        loc = transform_of(name, support).inv(attrgetter(name)(guide))
        factor = spread.around(name, loc, support, batch_dim)
        result[name] = Read(factor, plates_of(name, site, batch_dim, full=False))
    return result


def _read_continuous(
    guide: AutoContinuous, program: Program, spread: Spread, labels: Labels
) -> Sites:
    posterior = guide.get_posterior(*program.args, **program.kwargs)
    base = posterior.base_dist if isinstance(posterior, dist.Independent) else posterior
    if isinstance(base, dist.Delta):
        return _read_laplace(guide, base.v, spread)
    if isinstance(guide, AutoMultivariateNormal) and "loc" in guide._buffers:
        _warn_hidden_discrete(guide, program)
    joint = Joint.of(base)
    if joint is not None:
        return _blocks(guide, joint, labels)

    @functools.cache  # one set of draws for all sites
    def draws(n: int) -> dict[str, Tensor]:
        latent = posterior.sample(torch.Size([n])).detach()
        sizes = [math.prod(guide._unconstrained_shapes[k]) for k, _ in prototype_sites(guide)]
        pieces = zip(prototype_sites(guide), latent.split(sizes, -1), strict=True)
        return {k: v.reshape(n, *guide._unconstrained_shapes[k]) for (k, _), v in pieces}

    def of_site(name: str) -> Callable[[int], Tensor]:
        return lambda n: draws(n)[name]

    return {
        name: Draws(
            plates_of(name, site, len(site["fn"].batch_shape)),
            support=site["fn"].support,
            sample=of_site(name),
        )
        for name, site in prototype_sites(guide)
    }


def _read_laplace(guide: AutoContinuous, loc: Tensor, spread: Spread) -> Sites:
    if not spread.given and isinstance(guide, AutoLaplaceApproximation):
        lost = " on a guide that still has its model" if guide._model is None else ""
        raise GuideError(
            "AutoLaplaceApproximation is a point mass until its curvature is computed: read "
            f"guide.laplace_approximation(*args){lost}, or pass spread=0.1, a standard deviation "
            "in unconstrained space"
        )
    result: Sites = {}
    for site, value in guide._unpack_latent(loc):
        name, fn = site["name"], site["fn"]
        factor = spread.around(name, value, fn.support, len(fn.batch_shape))
        result[name] = Read(factor, plates_of(name, site, len(fn.batch_shape)))
    return result


def _warn_hidden_discrete(guide: AutoMultivariateNormal, program: Program) -> None:
    """Warn of discrete sites that are blocked from the model of a Laplace approximation: it samples
    them, where SVI had enumerated them, so its Hessian is that of one random configuration."""
    if guide._model is None:
        return
    _, model = peel(guide.model)
    try:
        trace = Program(model, program.args, program.kwargs, "model").trace()
    except GuideError:
        return  # without arguments there is no telling
    read = {name for name, _ in prototype_sites(guide)}
    hidden = sorted(
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and name not in read
        and getattr(site["fn"], "has_enumerate_support", False)
    )
    if hidden:
        warn_user(
            f"the model of this Laplace approximation has discrete sites {hidden} hidden from the "
            "guide. laplace_approximation() samples such sites instead of enumerating them, so "
            "its curvature, and the spread that is read, is that of one random draw of them. Sum "
            "them out in the model, or fit AutoMultivariateNormal with TraceEnum_ELBO",
        )


def _read_easy(guide: EasyGuide, program: Program, spread: Spread, labels: Labels) -> Sites:
    supports = {name: site["fn"].support for name, site in prototype_sites(guide)}
    first, second = program.trace(), program.trace()
    exact: Sites = {}
    for group in guide.groups.values():
        exact.update(_read_group(group, first, second, labels))
    return {**exact, **read_trace(program, spread, supports, skip=frozenset(exact))}


def _read_group(group: Any, first: Any, second: Any, labels: Labels) -> Sites:
    """The sites of ``group.sample()``, from the one auxiliary site that they are cut out of; empty
    if that is not found, is no Gaussian, or depends on other sites."""
    for name, site in first.nodes.items():
        if (
            site["type"] != "sample"
            or not site["infer"].get("is_auxiliary")
            or site["fn"].event_shape != group.event_shape
            or name not in second.nodes
        ):
            continue
        joint, again = (Joint.of(_unwrapped(t.nodes[name]["fn"])) for t in (first, second))
        if joint is None or again is None or not joint.equals(again):
            continue
        pieces, batch = [], site["fn"].batch_shape
        at = 0
        for model_site in group.prototype_sites:
            n, size = model_site["name"], group._site_sizes[model_site["name"]]
            if n not in first.nodes:
                break
            fn, shape = model_site["fn"], first.nodes[n]["value"].shape
            value = site["value"][..., at : at + size]
            at += size
            if math.prod(shape) != value.numel():
                break
            image = transform_of(n, fn.support)(value.reshape(shape))
            if not torch.allclose(image, first.nodes[n]["value"]):
                break
            index = torch.arange(at - size, at)
            plates = plates_of(n, first.nodes[n], len(shape) - fn.event_dim)
            pieces.append((n, index, shape, fn.support, plates))
        else:
            if not batch:
                flat = [(n, i.reshape(shape), sup, p) for n, i, shape, sup, p in pieces]
                return marginals(joint, flat, labels, type(group.guide).__name__)
            return {
                n: Read(
                    normal_factor(
                        n,
                        joint.loc[..., i].reshape(shape).to(joint.dtype),
                        joint.scale()[..., i].reshape(shape).to(joint.dtype),
                        sup,
                        len(p),
                    ),
                    p,
                )
                for n, i, shape, sup, p in pieces
            }
    return {}


def _unwrapped(d: Distribution) -> Distribution:
    if isinstance(d, torch.distributions.Independent) and d.reinterpreted_batch_ndims == 1:
        return d.base_dist
    return d


# -- joint Gaussians -------------------------------------------------------------------------------


def _blocks(guide: AutoGuide, joint: Joint, labels: Labels, structured: bool = False) -> Sites:
    """The exact block marginals of a guide with one joint Gaussian over its sites in order."""
    pieces: list[Piece] = []
    at = 0
    for name, site in prototype_sites(guide):
        fn = site["fn"]
        if isinstance(guide, AutoContinuous):
            shape = guide._unconstrained_shapes[name]
        elif isinstance(guide, AutoStructured):
            shape = guide._batch_shapes[name] + guide._unconstrained_event_shapes[name]
        else:
            shape = fn.batch_shape + guide._unconstrained_event_shapes[name]
        batch_dim = len(shape) - _unconstrained_event_dim(fn)
        end = at + math.prod(shape)
        index = torch.arange(at, end).reshape(shape)
        pieces.append((name, index, fn.support, plates_of(name, site, batch_dim)))
        at = end
    return marginals(joint, pieces, labels, type(guide).__name__, structured)


def _unconstrained_event_dim(fn: Any) -> int:
    t = transform_of("", fn.support)
    return int(fn.event_dim - t.codomain.event_dim + t.domain.event_dim)
