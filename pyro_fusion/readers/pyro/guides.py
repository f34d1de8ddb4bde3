# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Reading Pyro guides, exactly or by projection.

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
parameter store by name, so that fitting the second moves the first: ``sharing.py``
refuses such.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.block_messenger import BlockMessenger
from torch import Tensor

from pyro_fusion.errors import GuideError
from pyro_fusion.posterior import Axes, Posterior, PosteriorGuide
from pyro_fusion.readers.axes.symmetries import FoundAxes
from pyro_fusion.readers.pyro.auto import find_axes
from pyro_fusion.readers.pyro.autoguides import read
from pyro_fusion.readers.pyro.program import KNOW_THEIR_MODEL, Program, isolated, peel, without
from pyro_fusion.readers.pyro.sites import context_of
from pyro_fusion.readers.pyro.trace import resolved
from pyro_fusion.readers.sites import (
    Labels,
    Read,
    Spread,
    check_num_samples,
    labels_of,
    posterior_of,
)

__all__ = ["check_is_pyro", "from_guide"]


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
    The model decides. It is run, with ``args`` (a module without any: with random inputs),
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
        sites = resolved(found, program, num_samples)
    given.check_used(set(sites))
    return sites


def _find_axes(program: Program, spread: Any, num_samples: int, seed: int) -> FoundAxes:
    """The labels of a guide's sites, by its model.

    :raises GuideError: if it knows none.
    """
    inner = peel(program.fn)[1]
    if not isinstance(inner, KNOW_THEIR_MODEL) or inner._model is None:
        lost = "has lost its model" if isinstance(inner, KNOW_THEIR_MODEL) else "knows no model"
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


def check_is_pyro(guide: Any) -> None:
    """:raises GuideError: for a guide of NumPyro; says how to read it."""
    # Its own, or what to_numpyro made.
    if any("numpyro" in base.__module__.split(".") for base in type(guide).__mro__):
        raise GuideError(
            f"this {type(guide).__name__} is a NumPyro guide: read it with its parameters, "
            "from_numpyro(guide, params, *args)"
        )
