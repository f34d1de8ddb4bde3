# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Reading NumPyro guides, exactly or by projection.

=========================================================  ======================================
guide                                                      read as
=========================================================  ======================================
AutoNormal, AutoDiagonalNormal                             the Normals, behind the supports'
                                                           bijections
AutoMultivariateNormal, AutoLowRankMultivariateNormal,     exact block marginals
AutoBatched..., AutoLaplaceApproximation
AutoDelta, ``Delta`` sites                                 Normals of the ``spread`` that is given
functions                                                  their factors, from a trace
sites that depend on other sites                           their family, by moment matching
flows and other families                                   Normals, by moment matching
observed, enumerated and auxiliary sites                   left out
=========================================================  ======================================

NumPyro has the same bijections onto supports as Pyro, so that parties of both can be fused.
"""

# NumPyro offers no public way to some of these numbers. The readers rely on the following private
# attributes, checked with NumPyro 0.22.
#   AutoGuide       _init_locs, _prototype_frame_full_sizes
#   AutoNormal      _event_dims
#   AutoContinuous  _unpack_latent
#   AutoBatched...  _get_batched_posterior
#   AutoGuideList   _guides
#   MaskedDistribution  _mask; ReshapeTransform  _forward_shape, _inverse_shape

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import torch
from numpyro import handlers
from numpyro.infer import autoguide as auto
from numpyro.primitives import Messenger
from torch import Tensor
from torch.distributions import Transform

from pyro_fusion.errors import GuideError, ParameterError
from pyro_fusion.posterior import Axes, Posterior
from pyro_fusion.readers.joint import Joint, Piece, marginals
from pyro_fusion.readers.numpyro.convert import to_pyro_distribution, to_tensor
from pyro_fusion.readers.numpyro.program import (
    Program,
    arrays_of,
    bijection,
    data_plates,
    fit,
    latent_sites,
    log_likelihood,
    plates_of,
    read_program,
    require,
    set_up_in_jit,
)
from pyro_fusion.readers.projection import resolve
from pyro_fusion.readers.sites import (
    Context,
    Draws,
    Labels,
    Read,
    Sites,
    Spread,
    check_num_samples,
    labels_of,
    normal_factor,
    posterior_of,
)

__all__ = ["from_numpyro"]


def from_numpyro(
    guide: Callable[..., Any],
    params: Mapping[str, Any],
    *args: Any,
    axes: Axes | None = None,
    outgoing: Mapping[str, str] | None = None,
    spread: float | Tensor | Mapping[str, float | Tensor] | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    **kwargs: Any,
) -> Posterior:
    """Read the posterior that a fitted NumPyro guide stands for: ``q(z) = Π_site q_site(z_site)``.

    Values are copied, on the device and in the dtype that they have in JAX.

    :param guide: an autoguide, or any callable with NumPyro statements. An autoguide that was
        never called, as one whose parameters were loaded, is set up with ``args``. If it was
        fitted inside of ``jax.jit``, give that very guide: there NumPyro puts the sites of a joint
        Normal in another order than in a new one.
    :param params: parameters of the guide: ``svi.get_params(state)``, or ``params`` of the result
        of ``svi.run``.
    :param args: arguments of the guide.
    :param axes: site name -> a label or None for each axis of ``batch_shape + event_shape``. By
        default each plate labels its axis with its name; an entry here replaces the labels of its
        site, and labels event axes.
    :param outgoing: site name -> the label whose components act through it by adding up; see
        :class:`~pyro_fusion.Posterior`.
    :param spread: the standard deviation, in unconstrained space, of sites that are point masses
        (AutoDelta, ``Delta``): one number, or a mapping from site name to a number or a tensor that
        broadcasts to the unconstrained shape.
    :param num_samples: how many times to run a guide whose sites depend on each other or belong
        to no exponential family, to project it by moment matching.
    :param seed: the seed of those runs.
    :param kwargs: keyword arguments of the guide.
    :raises GuideError: if a parameter is missing, a point mass has no ``spread``, a plate is
        subsampled, the guide fails with these arguments or has no site to read, or a site has a
        support without a bijection that Pyro has too.
    :raises ParameterError: for a ``spread`` or ``num_samples`` out of range, or NaN parameters.
    :warns UserWarning: for NumPy's or torch's float64 among ``params`` without ``jax_enable_x64``.
    :raises StructureError: for labels that do not fit; see :class:`~pyro_fusion.Posterior`.
    :raises ImportError: without NumPyro.

    A joint Gaussian is read as its block marginals, as :func:`pyro_fusion.readers.pyro.from_guide`
    does.

    Example::

        result = svi.run(jax.random.key(0), 1000, data)
        posterior = from_numpyro(guide, result.params, data)
    """
    check_num_samples(num_samples)
    _check_is_numpyro(guide)
    params = arrays_of(params)
    if isinstance(axes, str):
        raise ParameterError(f"axes={axes!r} is for Pyro's guides: give a mapping, site -> labels")
    labels = labels_of(axes)
    program = Program(guide, args, kwargs, params, "guide", seed)
    given = Spread(spread)
    with handlers.block():  # nothing of this is for the handlers outside
        found = _read(program, given, labels)
        if not found:
            raise GuideError(
                "the guide has no site to read: all of its sites are observed, enumerated or "
                "auxiliary. A guide of Pyro is read with from_guide(guide, *args)"
            )
        sites = resolve(found, program.run, program.what, num_samples)
    given.check_used(set(sites))
    return posterior_of(sites, labels, outgoing, _context(program))


def _context(program: Program) -> Context:
    """The plates of data and the likelihood of an autoguide's model, at the guide's arguments."""
    guide = program.fn
    while isinstance(guide, Messenger):
        guide = guide.fn
    model = getattr(guide, "model", None)

    def likelihood(values: Mapping[str, Tensor]) -> float | None:
        if not isinstance(guide, auto.AutoGuide) or model is None:
            return None
        with handlers.block():
            return log_likelihood(replace(program, fn=model, what="model"), values)

    hide = "hide the site, handlers.block(guide, hide=['{site}'])"
    return Context(hide, lambda: _data_plates(program), likelihood)


def _data_plates(program: Program) -> dict[str, str]:
    """Plate -> an observed site in it, by the model of an autoguide; none for others."""
    guide = program.fn
    while isinstance(guide, Messenger):
        guide = guide.fn
    if isinstance(guide, auto.AutoGuideList):
        parts = [_data_plates(replace(program, fn=part)) for part in guide._guides]
        return {plate: site for part in parts for plate, site in part.items()}
    if not isinstance(guide, auto.AutoGuide):
        return {}
    with handlers.block():
        return data_plates(_set_up(guide, program).prototype_trace)


def _check_is_numpyro(guide: Any) -> None:
    if isinstance(guide, torch.nn.Module):
        raise GuideError(
            f"this {type(guide).__name__} is a guide of Pyro: read it with from_guide(guide, *args)"
        )
    if not callable(guide):
        raise GuideError(f"expected a NumPyro guide, got {type(guide).__name__}")


# -- one guide at a time ---------------------------------------------------------------------------


def _read(program: Program, spread: Spread, labels: Labels) -> Sites:
    guide = program.fn
    if not isinstance(guide, auto.AutoGuide):
        return read_program(program, spread)
    if isinstance(guide, auto.AutoGuideList):
        result: Sites = {}
        for part in guide._guides:
            result.update(_read(replace(program, fn=part), spread, labels))
        return result
    guide = _set_up(guide, program)
    program = replace(program, fn=guide)
    if isinstance(guide, auto.AutoNormal):
        return _read_normal(guide, program)
    if isinstance(guide, auto.AutoDelta):
        return _read_delta(guide, program, spread)
    if isinstance(guide, auto.AutoContinuous):
        return _read_continuous(guide, program, labels)
    return _from_posterior(guide, program)


def _set_up(guide: Any, program: Program) -> Any:
    """The guide, or a copy that was called once, where it never was."""
    if guide.prototype_trace is not None:
        return guide
    guide = copy.copy(guide)
    replace(program, fn=guide, params={}, what="guide to be set up").trace()
    return guide


def _prototypes(guide: Any) -> dict[str, Any]:
    return {k: s for k, s in latent_sites(guide.prototype_trace).items() if k in guide._init_locs}


def _param(program: Program, name: str, init: Any) -> Tensor:
    """A parameter, of the shape of what it started with."""
    require(program, [name])
    return to_tensor(fit(name, program.params[name], jnp.shape(init)))


def _read_normal(guide: Any, program: Program) -> Sites:
    result: Sites = {}
    for name, site in _prototypes(guide).items():
        init, prefix = guide._init_locs[name], f"{name}_{guide.prefix}"
        loc, scale = (_param(program, f"{prefix}_{x}", init) for x in ("loc", "scale"))
        t = bijection(name, site["fn"])
        batch_dim = loc.dim() - guide._event_dims[name]
        factor = normal_factor(name, loc, scale, t, batch_dim)
        plates = plates_of(name, site, batch_dim)
        result[name] = Read(factor, plates)
    return result


def _read_delta(guide: Any, program: Program, spread: Spread) -> Sites:
    result: Sites = {}
    for name, site in _prototypes(guide).items():
        value = _param(program, f"{name}_{guide.prefix}_loc", guide._init_locs[name])
        t = bijection(name, site["fn"])
        batch_dim = value.dim() - guide._event_dims[name]
        factor = spread.around(name, t.inv(value), t, batch_dim)
        result[name] = Read(factor, plates_of(name, site, batch_dim))
    return result


def _read_continuous(guide: Any, program: Program, labels: Labels) -> Sites:
    joint = _joint(guide, program)
    if joint is None:
        return _from_posterior(guide, program)
    where = guide._unpack_latent(jnp.arange(guide.latent_dim))
    pieces: list[Piece] = []
    for name, site in _prototypes(guide).items():
        index = to_tensor(where[name]).long().cpu()
        t = bijection(name, site["fn"])
        batch_dim = len(site["fn"].batch_shape)
        plates = plates_of(name, site, batch_dim)
        pieces.append((name, index, t, plates))
    return marginals(joint, pieces, labels, type(guide).__name__)


def _joint(guide: Any, program: Program) -> Joint | None:
    """The Gaussian of an AutoContinuous; None if it has another distribution."""
    params = program.checked_params()
    if isinstance(
        guide, auto.AutoBatchedMultivariateNormal | auto.AutoBatchedLowRankMultivariateNormal
    ):
        d = handlers.substitute(guide._get_batched_posterior, data=params)()
        loc = to_tensor(d.loc).reshape(-1)
        blocks = to_tensor(d.scale_tril).flatten(0, -3)
        rows = torch.block_diag(*blocks.double())
        return Joint(loc.double(), rows, None, loc.dtype)
    kinds = (
        auto.AutoDiagonalNormal
        | auto.AutoMultivariateNormal
        | auto.AutoLowRankMultivariateNormal
        | auto.AutoLaplaceApproximation
    )
    if not isinstance(guide, kinds):
        return None
    try:
        # Compiled, since a Laplace approximation runs the model many times.
        d = jax.jit(guide.get_posterior)(params)
    except jax.errors.UnexpectedTracerError as e:
        raise set_up_in_jit(type(guide).__name__) from e
    joint = Joint.of(to_pyro_distribution(d))
    if joint is not None and not bool((joint.scale() > 0).all()):
        raise GuideError(
            f"the {type(guide).__name__} has no spread: the curvature at its mode is singular. Fit "
            "it for longer, or fit a guide that has one, as AutoNormal"
        )
    return joint


def _from_posterior(guide: Any, program: Program) -> Sites:
    """Read any other autoguide from its draws."""
    cache: dict[int, Any] = {}

    def draws(n: int) -> Any:
        if n not in cache:
            try:
                cache[n] = guide.sample_posterior(
                    program.next_key(),
                    program.params,
                    *program.args,
                    sample_shape=(n,),
                    **program.kwargs,
                )
            except Exception as e:
                raise GuideError(
                    f"the {type(guide).__name__} cannot be sampled with these arguments: "
                    f"{type(e).__name__}: {e}"
                ) from e
        return cache[n]

    result: Sites = {}
    for name, site in _prototypes(guide).items():
        t = bijection(name, site["fn"])

        def unconstrained(n: int, name: str = name, t: Transform = t) -> Tensor:
            value: Tensor = t.inv(to_tensor(draws(n)[name]))
            return value

        plates = plates_of(name, site, len(site["fn"].batch_shape))
        result[name] = Draws(plates, support=t, sample=unconstrained)
    return result
