# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Reading Pyro guides, and the priors of Pyro models.

What is exact and what is projected:

=====================================================  ==========================================
guide                                                  read as
=====================================================  ==========================================
AutoNormal, AutoDiagonalNormal, AutoNormalMessenger    the Normals, behind the supports' bijections
AutoMultivariateNormal, AutoLowRankMultivariateNormal  exact block marginals
``laplace_approximation()``, AutoGaussian (dense)      exact block marginals
AutoStructured (linear, Normal)                        exact block marginals, with a warning
EasyGuide                                              groups: exact block marginals
AutoDelta, AutoLaplaceApproximation, ``Delta`` sites   Normals of the ``spread`` that is given
functions, PyroModules                                 their factors, from a trace
sites that depend on other sites                       their family, by moment matching; a warning
flows and other families                               Normals, by moment matching; a warning
enumerated and auxiliary sites                         left out
=====================================================  ==========================================

Two limits of Pyro itself. ``AutoLaplaceApproximation.laplace_approximation()`` samples a discrete
site that is hidden from it, so its curvature is wrong where that site was meant to be enumerated;
the reader warns if it can run the model. And guides that are fitted in one process share Pyro's
parameter store by name, so that fitting the second moves the first; see :func:`check_not_shared`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyro
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuide, AutoGuideList
from pyro.infer.autoguide.effect import AutoMessenger
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.guide import GuideMessenger
from torch import Tensor, nn

from pyro_fusion.errors import FusionError, GuideError, Party, at, warn_user
from pyro_fusion.posterior import Axes, Posterior, PosteriorGuide
from pyro_fusion.readers.axes.symmetries import FoundAxes
from pyro_fusion.readers.projection import resolve
from pyro_fusion.readers.pyro.auto import find_axes
from pyro_fusion.readers.pyro.autoguides import prototype_sites, read, require_called
from pyro_fusion.readers.pyro.program import Program, isolated, peel, without
from pyro_fusion.readers.pyro.sites import context_of, latent_sites, plates_of
from pyro_fusion.readers.pyro.trace import read_trace
from pyro_fusion.readers.sites import (
    Labels,
    Read,
    Sites,
    Spread,
    check_num_samples,
    labels_of,
    posterior_of,
)

__all__ = [
    "check_is_pyro",
    "check_not_shared",
    "from_guide",
    "prior_from_guide",
    "prior_from_model",
]

_KNOWS_MODEL = (AutoGuide, EasyGuide, GuideMessenger)


def from_guide(
    guide: Callable[..., Any],
    *args: Any,
    axes: Axes | Literal["auto"] | None = None,
    outgoing: Mapping[str, str] | None = None,
    spread: float | Tensor | Mapping[str, float | Tensor] | None = None,
    num_samples: int = 1000,
    seed: int = 0,
    **kwargs: Any,
) -> Posterior:
    """Read the posterior that a fitted Pyro guide stands for: ``q(z) = Π_site q_site(z_site)``.

    Values are copied. Neither the guide, nor Pyro's parameter store, nor any random state is
    changed, and effect handlers outside see nothing.

    :param guide: an autoguide, an ``EasyGuide``, an effect-based guide, or any callable with Pyro
        statements; perhaps inside ``poutine.block``. It must have been called: fitted, or called
        once after its parameters were loaded.
    :param args: arguments of the guide, for guides that have to be run (all but Pyro's own).
    :param axes: site name -> a label or None for each axis of ``batch_shape + event_shape``. By
        default each plate labels its axis with its name; an entry here replaces the labels of its
        site, and labels event axes. ``"auto"`` finds the labels; see below.
    :param outgoing: site name -> the label whose components act through it by adding up; see
        :class:`~pyro_fusion.Posterior`.
    :param spread: the standard deviation, in unconstrained space, of sites that are point masses
        (AutoDelta, ``map_estimate``, ``Delta``): one number, or a mapping from site name to a
        number or a tensor that broadcasts to the unconstrained shape.
    :param num_samples: how many times to run a guide whose sites depend on each other or belong
        to no exponential family, to project it by moment matching.
    :param seed: the seed of those runs.
    :param kwargs: keyword arguments of the guide.
    :raises GuideError: if the guide was never called, was saved before that, has lost its
        parameters, has a point mass without ``spread`` or a plate that is subsampled, fails when
        run with these arguments, has no site to read, or one of no registered family whose
        support has no bijection to unconstrained space.
    :raises ParameterError: for a ``spread`` or ``num_samples`` out of range, or NaN parameters.
    :raises StructureError: for labels that do not fit; see :class:`~pyro_fusion.Posterior`.
    :raises UnsupportedFamilyError: for a transform whose arguments differ between components, as
        the bounds of ``Uniform(low, high)`` with a tensor of them.

    A site of a joint Gaussian is read as its exact marginal. Batch axes and labelled axes become
    independent components; the rest of the event stays one MultivariateNormal (a Normal if there
    is no rest, if it lies to the left of a labelled axis, or if it has more than 512 numbers). A
    warning says so if that loses more than 0.1 nats per dimension.

    Local latent variables, one for each row of a party's own data, get the label of the data plate
    like any other, and would be matched across parties as if they were exchangeable components.
    They belong to the party alone: hide them, ``poutine.block(guide, hide=["z"])``, or give them
    other labels in ``axes``, as ``{"z": (None,)}``. A warning says so, and of plates whose entries
    have an order in the data, as coefficients, for guides that know their model.

    ``axes="auto"`` takes plates, and the units between the linear layers of a module, one of which
    takes what another makes (``hidden1``, ``hidden2``, ...), for proposals, and looks for the other
    axes that belong to them: mixture weights, both axes of a transition matrix, outgoing weights.
    What decides is the model. It is run, with ``args`` (a module without any: with random inputs),
    at draws from the guide: its log-density must stay the same when components are permuted along
    all axes of a label at once. Of several sets of axes that do, the smallest is taken. In the same
    way it finds ``outgoing``. Components of a plate that are not exchangeable keep no label, and a
    warning says so; hidden units that are not are a StructureError.

    Example::

        posterior = from_guide(guide, axes={"loc": ("component", None)})
    """
    check_num_samples(num_samples)
    check_is_pyro(guide)
    program = Program(guide, args, kwargs)
    inner = peel(guide)[1]
    if isinstance(inner, PosteriorGuide):  # has the labels of the posterior that it was made from
        given = labels_of(None if axes == "auto" else axes)
        sites = _sites(program, spread, {**inner.axes, **given}, num_samples, seed)
        kept = {k: v for k, v in inner.axes.items() if k in sites}
        own = {k: v for k, v in inner.outgoing.items() if k in sites}
        return posterior_of(sites, {**kept, **given}, own if outgoing is None else outgoing)
    if axes == "auto":
        found = _find_axes(program, spread, num_samples, seed)
        axes, outgoing = found.axes, {**found.outgoing, **(outgoing or {})}
    labels = labels_of(axes)
    sites = _sites(program, spread, labels, num_samples, seed)
    return posterior_of(sites, labels, outgoing, context_of(inner))


def _sites(
    program: Program, spread: Any, labels: Labels, num_samples: int, seed: int
) -> dict[str, Read]:
    given = Spread(spread)
    with isolated(program.fn, seed):
        found = read(program, given, labels)
        if not found:
            raise GuideError(
                "the guide has no site to read: all of its sites are observed, enumerated, "
                "auxiliary or hidden"
            )
        sites = _resolve(found, program, num_samples)
    given.check_used(set(sites))
    return sites


def _resolve(found: Sites, program: Program, num_samples: int) -> dict[str, Read]:
    return resolve(found, lambda: latent_sites(program.trace()), program.what, num_samples)


def _find_axes(program: Program, spread: Any, num_samples: int, seed: int) -> FoundAxes:
    """The labels of a guide's sites, by its model.

    :raises GuideError: if it knows none.
    """
    inner = peel(program.fn)[1]
    if not isinstance(inner, _KNOWS_MODEL) or inner._model is None:
        lost = "has lost its model" if isinstance(inner, _KNOWS_MODEL) else "knows no model"
        raise GuideError(
            f'axes="auto" finds labels with the model, but this {type(inner).__name__} {lost}: '
            "give axes as a mapping, {'site': ('label', None)}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again when the guide is read with its labels
        whole = _sites(program, spread, {}, num_samples, seed)
        # With a label on each axis no Gaussian is joint over one.
        apart = {name: ("",) * len(s.factor.shape) for name, s in whole.items()}
        sites = _sites(program, spread, apart, num_samples, seed)
    model = without(inner.model, InitMessenger, BlockMessenger)
    return find_axes(sites, model, program.args, program.kwargs, seed)


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
    if not isinstance(inner, _KNOWS_MODEL):
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


def check_not_shared(
    guides: Sequence[Callable[..., Any] | Posterior | None], *args: Any, **kwargs: Any
) -> None:
    """Refuse guides that have a parameter in common: fitting one has moved the other.

    Two AutoNormals fitted one after the other in one process do, because Pyro's parameter store
    knows parameters by name. What decides is whether the tensors are the same, not their names.
    A function that cannot be run with ``args`` and ``kwargs`` is not checked.

    :param guides: one guide a party; a :class:`~pyro_fusion.Posterior` among them holds copies,
        and is passed over, as None is, for a party that handed over something else.
    :raises GuideError: naming the two parties, the parameter and what to do.
    """
    owners: dict[tuple[Any, ...], tuple[int, str]] = {}
    for party, guide in enumerate(guides):
        if guide is None or isinstance(guide, Posterior):
            continue
        with at(party=party):
            check_is_pyro(guide)
        for earlier in range(party):
            if guides[earlier] is guide:
                raise GuideError(
                    [
                        Party(earlier),
                        " and ",
                        Party(party),
                        " are the same guide. If it was fitted twice, read its posterior after "
                        "each fit: from_guide(guide)",
                    ]
                )
        for key, name in _parameters(guide, args, kwargs).items():
            owner, _ = owners.setdefault(key, (party, name))
            if owner != party:
                raise GuideError(
                    [
                        Party(owner),
                        " and ",
                        Party(party),
                        f" share the parameter '{name}': their guides were fitted in one parameter "
                        "store, so fitting the second moved the first. Read each posterior right "
                        "after its fit, from_guide(guide), and call pyro.clear_param_store() "
                        "before the next; or fit each under `with "
                        "pyro.get_param_store().scope():`, or set "
                        "pyro.settings.set(module_local_params=True) before making the guides",
                    ]
                )


def check_is_pyro(guide: Any) -> None:
    """:raises GuideError: for a guide of NumPyro."""
    # Its own, or what to_numpyro made.
    if any("numpyro" in base.__module__.split(".") for base in type(guide).__mro__):
        raise GuideError(
            f"this {type(guide).__name__} is a NumPyro guide: read it with its parameters, "
            "from_numpyro(guide, params, *args)"
        )


# -- pieces ----------------------------------------------------------------------------------------


def _parameters(
    guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[tuple[Any, ...], str]:
    """Where each parameter of a guide lies in memory -> its name."""
    result: dict[tuple[Any, ...], str] = {}

    def add(name: str, value: Tensor) -> None:
        if value.numel():
            storage = value.untyped_storage().data_ptr()
            result.setdefault((value.device, storage, value.storage_offset()), name)

    inner = peel(guide)[1]
    if isinstance(inner, nn.Module):
        prefix = getattr(inner, "_pyro_name", "") or type(inner).__name__
        for name, value in inner.named_parameters():
            if value.requires_grad:  # nobody moved the others
                add(f"{prefix}.{name.removesuffix('_unconstrained')}", value)
        return result
    with isolated(guide, 0):
        try:
            trace = Program(guide, args, kwargs).trace()
        except FusionError:
            return result
        for name in trace.param_nodes:
            node: Any = trace.nodes[name]
            add(name, node["value"].unconstrained())
    return result


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
        return posterior_of(_resolve(found, program, num_samples), labels)


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
        read = _resolve(found, program, num_samples)
    return {
        name: Read(s.factor, plates_of(name, wanted[name], len(s.plates)))
        for name, s in read.items()
    }
