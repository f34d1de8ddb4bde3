# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Posteriors under a prior other than that which they were fitted under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch.distributions import Distribution

from pyro_fusion.errors import FusionError, ParameterError, StructureError, at
from pyro_fusion.families import Factor, as_factor
from pyro_fusion.families.member import show_structure
from pyro_fusion.posterior import Posterior

__all__ = ["exchange_prior"]

Priors = Posterior | Mapping[str, Distribution]


def exchange_prior(posterior: Posterior, own: Priors, common: Priors) -> Posterior:
    """The posterior that the same data would have given under another prior: exactly
    ``q · common / own``, in natural parameters ``η_q - η_own + η_common``.

    ``product`` needs one prior for all parties. Where each was fitted under its own, this is the
    way to one: ``exchange_prior(q, own=prior_from_sklearn(model), common={"gaussian": ...})``.

    :param posterior: as fitted under ``own``.
    :param own: its prior at the sites where that is to be taken out; other sites stay as they are.
    :param common: the prior that comes in, at these sites at least. Priors are members of the
        posterior's families, behind the same transforms: with all axes of the site, or without
        those that have a label, all of whose components have the same prior then.
    :raises StructureError: for a site that the posterior, or ``common``, lacks, or a prior of
        another family or shape.
    :raises ParameterError: if the quotient is improper, as where a fit is wider than its own prior.
    """
    known = dict(posterior.decomposed)
    factors: dict[str, Factor] = dict(known)
    taken, given = _factors(own), _factors(common)
    for site, prior in taken.items():
        if site not in known:
            raise StructureError(
                f"`own` has site '{site}', the posterior has {sorted(known)}", site=site
            )
        if site not in given:
            raise StructureError(
                f"`common` lacks site '{site}', whose own prior is to be taken out; it has "
                f"{sorted(given)}",
                site=site,
            )
        with at(site=site):
            axes = posterior.axes[site]
            factors[site] = _exchanged(
                known[site],
                _like(prior, known[site], axes, "own"),
                _like(given[site], known[site], axes, "common"),
            )
    return Posterior(factors, posterior.axes, plates=posterior.plates, outgoing=posterior.outgoing)


def _factors(prior: Priors) -> dict[str, Factor]:
    if isinstance(prior, Posterior):
        return dict(prior.decomposed)
    result = {}
    for site, d in prior.items():
        with at(site=site):
            result[site] = as_factor(d)
    return result


def _like(prior: Factor, f: Factor, axes: tuple[str | None, ...], name: str) -> Factor:
    """The prior with the axes of ``f``."""
    if prior.structure() != f.structure():
        raise StructureError(
            f"`{name}` is {show_structure(prior.structure())}, expected "
            f"{show_structure(f.structure())} as the posterior"
        )
    labelled = [i for i, label in enumerate(axes) if label is not None]
    one = tuple(n for i, n in enumerate(f.shape) if i not in labelled)
    shape = tuple(prior.shape)
    prior = prior.to(f.device, f.dtype)
    if shape != tuple(f.shape) and shape == one and all(i < f.separable_axes for i in labelled):
        for i in labelled:
            prior = prior.map(lambda v, i=i: v.unsqueeze(i))  # type: ignore[misc]
        prior = prior.expand(f.base_shape)
    elif shape == () and f.family.event_dim == 0 and not f.transforms:
        prior = prior.expand(f.base_shape)
    elif shape != tuple(f.shape):
        raise StructureError(
            f"`{name}` has shape {shape}, expected {tuple(f.shape)} as the posterior, or that of "
            f"one component, {one}. If the fit dropped components, drop them from its prior too: "
            "prior.select(label, kept)"
        )
    return replace(prior, batch_dim=f.batch_dim)


def _exchanged(f: Factor, own: Factor, common: Factor) -> Factor:
    # Each number about its own location, so that none loses digits far from the origin.
    origin = f.location()
    f64, own, common = (x.shift(origin) for x in (f, own, common))
    improper = ParameterError(
        "the posterior without its own prior, and with the common one, is improper: somewhere it "
        "is as wide as its own prior or wider, so its data said nothing there. Drop components "
        "that few points speak for, or fuse by 'exclusive', which needs no prior"
    )
    try:
        eta = f64.natural - own.natural + common.natural
        result = f64.from_natural(eta).shift(origin, 1.0)
        result.check()
    except (FusionError, RuntimeError, ValueError) as e:
        raise improper from e
    return replace(result.to(dtype=f.dtype), batch_dim=f.batch_dim)
