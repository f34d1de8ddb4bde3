# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Reading draws: the sites, the checks, label switching, the projection and its loss.

==============================================  ====================================================
site                                            read as
==============================================  ====================================================
by default                                      Normals in the unconstrained space of its support,
                                                as an AutoNormal has them
a simplex whose axis is labelled                a Dirichlet
with a family of yours                          that, by maximum likelihood; a MultivariateNormal is
                                                over what of the event has no label
observed, deterministic                         left out, unless named in ``sites``
discrete                                        an error
==============================================  ====================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_fusion.errors import DrawsError, GuideError, ParameterError, Site, UnsupportedFamilyError
from pyro_fusion.posterior import Axes, Posterior
from pyro_fusion.readers.draws.checks import (
    check_converged,
    check_enough,
    check_number,
    check_varies,
    columns,
    extreme,
)
from pyro_fusion.readers.draws.diagnostics import effective_sample_size, split_r_hat
from pyro_fusion.readers.draws.projection_loss import losses
from pyro_fusion.readers.draws.relabel import Relabelling, permuted, relabel
from pyro_fusion.readers.draws.result import DrawsReading, warn_of
from pyro_fusion.readers.draws.site_draws import (
    Kind,
    SiteDraws,
    check_finite,
    labels_for,
    looks_like_simplex,
)
from pyro_fusion.readers.draws.sources import (
    Known,
    Source,
    known_model,
    read_source,
    to_tensor,
    transform_onto,
)
from pyro_fusion.readers.sites import Context, Read, labels_of, posterior_of

__all__ = ["DrawsReading", "from_draws", "read_draws"]

_LEAVE_OUT = "leave the site out, naming the others in sites=[...]"

Families = type | str | Mapping[str, type | str]


def from_draws(
    draws: Any, model: Callable[..., Any] | None = None, *args: Any, **kwargs: Any
) -> Posterior:
    """The posterior of :func:`read_draws`, with its arguments."""
    return read_draws(draws, model, *args, **kwargs).posterior


def read_draws(
    draws: Any,
    model: Callable[..., Any] | None = None,
    *args: Any,
    axes: Axes | None = None,
    families: Families | None = None,
    supports: Mapping[str, Any] | None = None,
    sites: Sequence[str] | None = None,
    group_by_chain: bool = False,
    outgoing: Mapping[str, str] | None = None,
    relabel: bool = True,
    max_rhat: float | None = 1.1,
    min_ess: float | None = 50,
    seed: int = 0,
    **kwargs: Any,
) -> DrawsReading:
    r"""Read draws from a posterior: the member of each site's family of maximum likelihood,
    :math:`q_{site} = \arg\min KL(draws \| q)`, with the mean of the sufficient statistics.

    Neither the draws, nor Pyro's parameter store, nor any random state is changed.

    :param draws: a mapping from site to a tensor or an array, ``[draw, *shape]``; an ``MCMC`` of
        Pyro or of NumPyro that was run; an ``InferenceData`` of ArviZ, or a ``DataTree`` or
        ``Dataset`` of xarray with the dimensions "chain" and "draw".
    :param model: of Pyro or NumPyro: it knows supports and plates. An ``MCMC`` brings its own.
        Without one all supports are taken to be real, unless ``supports`` says otherwise, and the
        leading labelled axes to be plates.
    :param args: arguments of the model, as for inference.
    :param axes: site name -> a label or None for each axis of the site's shape. By default each
        plate labels its axis with its name; an entry here replaces the labels of its site, and
        labels event axes.
    :param families: a distribution's class, or its name, for all sites, or site name -> that:
        ``Normal`` (by default) or ``MultivariateNormal`` in unconstrained space, or any registered
        family in that of the values, such as ``Gamma``, ``Beta``, ``Dirichlet``, ``InverseGamma``,
        whatever the support of the site.
        A simplex whose axis is labelled is a Dirichlet, as its components have no order.
    :param supports: site name -> a constraint, of Pyro or NumPyro, or a bijection onto the support;
        before the model's.
    :param sites: the sites to read; by default those that are latent in the model, or all.
    :param group_by_chain: True if a mapping has ``[chain, draw, *shape]``. Else all draws are
        taken for one chain, whose halves are compared.
    :param outgoing: site name -> the label whose components act through it by adding up; see
        :class:`~pyro_fusion.Posterior`.
    :param relabel: look for label switching, within and between chains, and undo it: for
        each label, the draws' components are matched to one another, if that pays; see
        ``relabel.py``. Values are the same to the bit where nothing switched.
    :param max_rhat: refuse chains that have not converged: rank-normalised split R-hat above this,
        after relabelling. None to take them all the same.
    :param min_ess: refuse fewer effective draws than this, of any number. None to take them.
    :param seed: seed of relabelling and of runs of the model.
    :param kwargs: keyword arguments of the model.
    :raises DrawsError: for draws that no posterior can be read from; the message says what is wrong
        with which site, and what to do.
    :raises GuideError: if the model cannot be run with these arguments.
    :raises StructureError: for labels that do not fit; see :class:`~pyro_fusion.Posterior`.
    :raises UnsupportedFamilyError: for a family that is not registered.

    One warning tells of divergent transitions, of sites that lost more than 0.1 nats for each
    number by their projection, of as much correlation between sites, and of components so close
    that the order in a tenth of the draws is a toss-up.

    Example::

        reading = read_draws(mcmc, axes={"weights": ("component",)})
        print(reading)
        reading.posterior
    """
    _check_settings(max_rhat, min_ess, seed)
    source = read_source(draws, group_by_chain)
    if model is not None:
        source = replace(source, model=model, args=args, kwargs=kwargs, library=None)
    elif args or kwargs:
        raise ParameterError(
            f"arguments of a model came without a model: {[*map(_shown, args), *kwargs]}"
        )
    labels = labels_of(axes)
    told = None if source.model is None else known_model(source, seed)
    known = None if told is None else told.sites
    names = _names(source, known, sites)
    for what, mapping in (("families", families), ("supports", supports), ("axes", labels)):
        if isinstance(mapping, Mapping):
            _check_known(what, mapping, names)
    arrays = _arrays(source, names)
    chains, num_draws = next(iter(arrays.values())).shape[:2]
    check_number(chains, num_draws, min_ess)
    found = {
        name: _site(name, x, source, known, labels.get(name), families, supports)
        for name, x in arrays.items()
    }
    for s in found.values():
        check_varies(s)
    orders = _relabel(found, seed) if relabel else {}
    for label, done in orders.items():
        found = {
            k: replace(s, value=permuted(s.value, s.labels, label, done.order))
            for k, s in found.items()
        }
    rhat = {k: extreme(split_r_hat(x), math.inf) for k, x in columns(found)}
    check_converged(rhat, max_rhat, relabel and bool(orders))
    sizes = {k: effective_sample_size(x) for k, x in columns(found)}
    ess = {k: -extreme(-x, 0.0) for k, x in sizes.items()}
    check_enough(ess, min_ess, chains * num_draws)
    factors = {k: Read(s.factor(), s.plates) for k, s in found.items()}
    context = None
    if told is not None:
        context = Context(_LEAVE_OUT, lambda: told.data, told.likelihood)
    given = {k: s.labels for k, s in found.items() if k in labels}
    posterior = posterior_of(factors, given, outgoing, context)
    lost, between = losses(posterior, found, {k: float(x.median()) for k, x in sizes.items()})
    named = {label: orders.get(label) for label in posterior.labels}
    reading = DrawsReading(
        posterior=posterior,
        num_chains=chains,
        num_draws=num_draws,
        ess=ess,
        rhat=rhat,
        lost=lost,
        lost_between=between,
        relabelled={label: done.share if done else 0.0 for label, done in named.items()},
        ambiguous={label: done.ambiguous if done else 0.0 for label, done in named.items()},
        divergences=source.divergences,
    )
    warn_of(reading)
    return reading


# -- what to read ----------------------------------------------------------------------------------


def _check_settings(max_rhat: float | None, min_ess: float | None, seed: int) -> None:
    for name, value, least in (("max_rhat", max_rhat, 1), ("min_ess", min_ess, 0)):
        if value is not None and not value >= least:
            raise ParameterError(f"{name} must be None or at least {least}, got {value}")
    if min_ess == math.inf:
        raise ParameterError("min_ess must be finite, got inf")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ParameterError(f"seed must be a number from 0, got {seed!r}")


def _shown(x: object) -> str:
    return type(x).__name__


def _check_known(what: str, named: Collection[str], there: Collection[str]) -> None:
    unknown = sorted(set(named) - set(there), key=str)
    if unknown:
        raise DrawsError(f"{what} names {unknown}, but the sites to read are {sorted(there)}")


def _names(
    source: Source, known: Mapping[str, Known] | None, sites: Sequence[str] | None
) -> list[str]:
    there = list(source.values)
    if not there:
        raise DrawsError("there are no draws: the mapping is empty")
    for name in there:
        if not isinstance(name, str):
            raise DrawsError(f"expected names of sites, got {name!r}")
    if sites is not None:
        if isinstance(sites, str):
            raise DrawsError(f"sites must be a sequence of names, got {sites!r}")
        missing = sorted(set(sites) - set(there))
        if missing or not sites:
            raise DrawsError(f"sites names {missing}, but there are draws of {sorted(there)}")
        return list(dict.fromkeys(sites))
    if known is None:
        return there
    latent = [name for name in known if name in source.values]
    if not latent:
        raise DrawsError(
            f"there are draws of {sorted(there)}, but the latent sites of the model are "
            f"{sorted(known)}"
        )
    return latent


def _arrays(source: Source, names: Sequence[str]) -> dict[str, Tensor]:
    """The draws by site, ``[chain, draw, *shape]``.

    :raises DrawsError: if sites differ in their number of draws.
    """
    result: dict[str, Tensor] = {}
    expected = "[chain, draw, *shape]" if source.chains else "[draw, *shape]"
    for name in names:
        x = to_tensor(name, source.values[name])
        if x.dim() < 1 + source.chains or x.numel() == 0:
            raise DrawsError(f"expected draws of shape {expected}, got {tuple(x.shape)}", site=name)
        result[name] = x if source.chains else x.unsqueeze(0)
        first = names[0]
        mine, others = result[name].shape[:2], result[first].shape[:2]
        if mine != others:
            raise DrawsError(
                [
                    Site(name),
                    f" has {mine[0]} chains of {mine[1]} draws, site '{first}' "
                    f"{others[0]} of {others[1]}: expected as many of each, of shape {expected}",
                ]
            )
    for name, x in result.items():
        check_finite(name, x)
    return result


def _without_ones(shape: torch.Size, like: torch.Size) -> torch.Size:
    """Drop the axes of size one that Pyro's ``Predictive`` puts in front, where the model has
    plates to the left of a site."""
    extra = max(0, len(shape) - len(like))
    return shape[extra:] if all(n == 1 for n in shape[:extra]) else shape


def _site(
    name: str,
    draws: Tensor,
    source: Source,
    known: Mapping[str, Known] | None,
    labels: Sequence[str | None] | None,
    families: Families | None,
    supports: Mapping[str, Any] | None,
) -> SiteDraws:
    kind = _kind(name, families)
    info = (known or {}).get(name)
    if info is not None and _without_ones(draws.shape[2:], info.shape) == info.shape:
        draws = draws.reshape(draws.shape[:2] + info.shape)
    shape = draws.shape[2:]
    value = draws.double().flatten(0, 1)
    if info is not None and info.shape != shape:
        raise DrawsError(
            [
                Site(name),
                f" has draws of shape {tuple(shape)}, but in the model, with these "
                f"arguments, it is of shape {tuple(info.shape)}. Pass the arguments that the draws "
                "were made with, and group_by_chain=True if the draws are [chain, draw, *shape]",
            ]
        )
    transform = transform_onto(name, constraints.real)
    if kind.gaussian:  # any other family knows its support
        transform = _bijection(name, value, source, info, supports)
    if labels is None:
        labels = info.plates if info is not None else ()
    full = labels_for(shape, labels)
    if len(labels) > len(shape):
        full = tuple(labels)  # refused by Posterior, with both
    if info is not None:
        plates = info.plates
    else:
        free = len(shape) - max(
            transform.codomain.event_dim, kind.family.event_dim * (not kind.gaussian)
        )
        leading = 0
        while leading < free and full[leading] is not None:
            leading += 1
        plates = full[:leading]
    chains = draws.shape[0]
    return SiteDraws(name, value, chains, transform, kind, tuple(plates), full, draws.dtype)


def _bijection(
    name: str,
    value: Tensor,
    source: Source,
    info: Known | None,
    supports: Mapping[str, Any] | None,
) -> Transform:
    try:
        if supports is not None and name in supports:
            return transform_onto(name, supports[name])
        if info is not None:
            return info.transform()
    except (GuideError, UnsupportedFamilyError) as e:
        reason = e.message.split(". ")[0]
        raise DrawsError(
            f"no bijection onto its support is known: {reason}. Pass one, "
            f"supports={{'{name}': ...}}, or a family that has this support, "
            f"families={{'{name}': ...}}, or leave the site out with sites=[...]",
            site=name,
        ) from e
    if name in source.transforms:
        return source.transforms[name]
    if looks_like_simplex(value):
        raise DrawsError(
            f"all draws are on the simplex, but its support is not known. Pass "
            f"supports={{'{name}': constraints.simplex}}, or the model; or, if it is no "
            f"simplex, supports={{'{name}': constraints.real}}",
            site=name,
        )
    return transform_onto(name, constraints.real)


def _kind(name: str, families: Families | None) -> Kind:
    family = families.get(name, "Normal") if isinstance(families, Mapping) else families or "Normal"
    if isinstance(family, str):
        return Kind.named(family)
    if isinstance(family, type):
        return Kind.named(family.__name__)
    raise DrawsError(
        f"expected a family as the class of a distribution or its name, got {_shown(family)}",
        site=name,
    )


# -- label switching -------------------------------------------------------------------------------


def _relabel(found: Mapping[str, SiteDraws], seed: int) -> dict[str, Relabelling]:
    sizes = {
        (x, n)
        for s in found.values()
        for x, n in zip(s.labels, s.value.shape[1:], strict=False)
        if x
    }
    if len(sizes) > len({x for x, _ in sizes}):
        return {}  # refused by Posterior, with both
    return relabel(
        {k: s.value for k, s in found.items()},
        {k: s.labels for k, s in found.items()},
        lambda name, value: replace(found[name], value=value).factor(),
        seed,
    )
