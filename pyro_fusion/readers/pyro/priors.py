# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The priors of the sites of Pyro models, from the model itself or from a guide that knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuide, AutoGuideList
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.guide import GuideMessenger

from pyro_fusion.errors import GuideError, warn_user
from pyro_fusion.posterior import Axes, Posterior
from pyro_fusion.readers.pyro.autoguides import prototype_sites, require_called
from pyro_fusion.readers.pyro.program import KNOW_THEIR_MODEL, Program, isolated, peel, without
from pyro_fusion.readers.pyro.sites import latent_sites, plates_of
from pyro_fusion.readers.pyro.trace import read_trace, resolved
from pyro_fusion.readers.sites import (
    Labels,
    Read,
    Sites,
    Spread,
    check_num_samples,
    labels_of,
    posterior_of,
)

__all__ = ["prior_from_guide", "prior_from_model"]


def prior_from_guide(
    guide: Callable[..., Any],
    *args: Any,
    axes: Axes | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    **kwargs: Any,
) -> Posterior:
    """Read the prior of the sites of an autoguide (or ``EasyGuide``, or effect-based guide), from
    the model that the guide was made for.

    :param args: arguments of the model. If it cannot be run with them, the distributions that
        the guide recorded at its first call are taken, with a warning.
    :raises GuideError: for a guide that was never called, that knows no model, or whose model is
        lost and was not recorded: use :func:`prior_from_model`.

    The other parameters and errors are those of :func:`from_guide` and :func:`prior_from_model`.
    """
    handlers, inner = peel(guide)
    if not isinstance(inner, KNOW_THEIR_MODEL):
        raise GuideError(
            f"a {type(inner).__name__} does not know its model; use prior_from_model(model, *args)"
        )
    labels = labels_of(axes)
    check_num_samples(num_samples)
    if isinstance(inner, AutoGuide | EasyGuide | AutoMessenger):
        require_called(inner)
    wanted = None if isinstance(inner, GuideMessenger) else _prototypes(inner)
    if handlers:
        with isolated(guide, seed):
            visible = latent_sites(Program(guide, args, kwargs).trace())
        wanted = {k: site for k, site in (wanted or visible).items() if k in visible}
    failure = "saving the guide lost its model"
    if inner._model is not None:
        model = without(inner.model, InitMessenger)
        try:
            return _prior(model, args, kwargs, wanted, labels, num_samples, seed)
        except GuideError as e:
            if e.__cause__ is None or wanted is None:
                raise
            failure = f"its model failed: {e.__cause__}"
    if not wanted or any("mask" not in site for site in wanted.values()):
        raise GuideError(
            f"the priors of this {type(inner).__name__} are not to be had ({failure}); use "
            "prior_from_model(model, *args)"
        )
    warn_user(
        f"{failure}. The prior is read as the guide recorded it at its first call: right, unless "
        "a site's prior depends on another site. Pass the arguments of the model, or use "
        "prior_from_model(model, *args)",
    )
    return posterior_of(_recorded(wanted, seed, num_samples), labels)


def prior_from_model(
    model: Callable[..., Any],
    *args: Any,
    axes: Axes | None = None,
    sites: Sequence[str] | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    **kwargs: Any,
) -> Posterior:
    """Read the prior of a Pyro model's latent sites; plates label their axes.

    Observed and enumerated sites are left out. A site whose prior depends on other sites is
    projected onto its own family by moment matching, a prior of no exponential family (HalfCauchy,
    Uniform) onto a Normal in unconstrained space; a warning says so. Components that have the same
    prior keep the same: their draws are pooled.

    :param args: arguments of the model, as for inference: without data its observed sites count
        as latent.
    :param axes: site name -> labels, in place of those of the plates; see :func:`from_guide`.
    :param sites: the sites to read; by default all.
    :raises GuideError: if the model fails with these arguments, or lacks one of ``sites``.
    """
    check_num_samples(num_samples)
    wanted = None if sites is None else dict.fromkeys(sites)
    return _prior(model, args, kwargs, wanted, labels_of(axes), num_samples, seed)


def _prior(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wanted: Mapping[str, Any] | None,
    labels: Labels,
    num_samples: int,
    seed: int,
) -> Posterior:
    program = Program(model, args, kwargs, "model")
    with isolated(model, seed):
        there = set(latent_sites(program.trace()))
        missing = set(wanted or ()) - there
        if missing:
            raise GuideError(
                f"the model has no latent sites {sorted(missing)}; its latent sites are "
                f"{sorted(there)}"
            )
        skip = frozenset() if wanted is None else frozenset(there - set(wanted))
        found = read_trace(program, Spread(None), skip=skip, full=False)
        if not found:
            raise GuideError("the model has no latent site to read")
        return posterior_of(resolved(found, program, num_samples), labels)


def _prototypes(guide: Any) -> dict[str, dict[str, Any]]:
    if isinstance(guide, AutoGuideList):
        return {k: v for part in guide for k, v in _prototypes(part).items()}
    if isinstance(guide, AutoDiscreteParallel):
        return {}
    return dict(prototype_sites(guide))


def _recorded(wanted: Mapping[str, dict[str, Any]], seed: int, num_samples: int) -> dict[str, Read]:
    """The priors as they stand in a guide's prototype trace: a model without dependencies."""

    def model() -> None:
        for name, site in wanted.items():
            pyro.sample(name, site["fn"])

    program = Program(model, (), {}, "model")
    with isolated(model, seed):
        found: Sites = read_trace(program, Spread(None))
        read = resolved(found, program, num_samples)
    return {
        name: Read(s.factor, plates_of(name, wanted[name], len(s.plates)))
        for name, s in read.items()
    }
