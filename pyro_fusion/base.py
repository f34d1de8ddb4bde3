# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The prior of the local models, which ``product`` divides out: where it comes from, and what it is
for one atom."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributions import Distribution

from pyro_fusion.assignment.base import party_of
from pyro_fusion.errors import FusionError, ParameterError, StructureError
from pyro_fusion.families import Factor, as_factor
from pyro_fusion.families.projection import project_onto
from pyro_fusion.posterior import Posterior
from pyro_fusion.structure import show_structure

__all__ = ["Base", "atom_base", "base_fill", "located", "resolve_base"]

Base = Posterior | Mapping[str, Distribution] | Callable[..., Any]


def resolve_base(
    base: Base | None, guides: Sequence[Any], sites: Sequence[str]
) -> dict[str, Factor]:
    """The prior that ``product`` divides out: as given, else that of the guides' own models.

    :raises StructureError: if the guides' models have different priors.
    :raises ParameterError: if there is none.
    """
    if base is not None:
        return _base_factors(base, sites)
    if guides:
        from pyro_fusion.readers.pyro import prior_from_guide

        priors = [prior_from_guide(g) for g in guides]
        for s, p in enumerate(priors[1:], 1):
            _check_same_prior(priors[0], p, s)
        return dict(priors[0].decomposed)
    raise ParameterError(
        "pooling 'product' divides out the prior of the local models: give it as `base` "
        "(site -> distribution, or the Pyro model)"
    )


def _check_same_prior(first: Posterior, other: Posterior, s: int) -> None:
    for site, f in first.decomposed.items():
        g = other.decomposed.get(site)
        if g is None or not _same_prior(f, g):
            raise StructureError(
                f"site '{site}': the model of guide {s} has another prior than that of guide 0; "
                "fit them with one prior, or say as `base` which one to divide out"
            )


def _same_prior(f: Factor, g: Factor) -> bool:
    """Equal but for the number of components, which are all alike where a prior is of use."""
    if f.structure() != g.structure() or len(f.shape) != len(g.shape):
        return False
    for name, v in f.params.items():
        w = g.params[name]
        for axis, (n, m) in enumerate(zip(v.shape, w.shape, strict=True)):
            v, w = v.narrow(axis, 0, min(n, m)), w.narrow(axis, 0, min(n, m))
        if not torch.allclose(v.double(), w.double(), rtol=1e-5, atol=1e-8):
            return False
    return True


def _base_factors(
    base: Posterior | Mapping[str, Distribution] | Callable[..., Any], sites: Sequence[str]
) -> dict[str, Factor]:
    """The prior of ``sites`` as factors: from a posterior, a mapping, or a Pyro model that needs
    no arguments."""
    if isinstance(base, Posterior | Mapping):
        given = base.decomposed if isinstance(base, Posterior) else base
        for site in sites:
            _check_has(given, site)
        return {site: _prior_factor(site, given[site]) for site in sites}
    if not callable(base):
        raise ParameterError(
            "`base` must be a mapping of sites to distributions, a Posterior or a Pyro model, got "
            f"{type(base).__name__}"
        )
    from pyro_fusion.readers.pyro import prior_from_model

    return dict(prior_from_model(base, sites=sites).decomposed)


def _check_has(base: Mapping[str, Any], site: str) -> None:
    if site not in base:
        raise StructureError(
            f"pooling 'product' needs the prior of site '{site}'; `base` has "
            f"{sorted(map(str, base))}"
        )


def atom_base(
    site: str, base: Mapping[str, Factor], like: Factor, axes: Sequence[int] = ()
) -> Factor:
    """The prior of one atom at ``site``, as a factor of ``like``'s family with batch shape ``[1]``.

    :param base: given priors: of one component, or with the labelled axes, all of whose
        components then have the same prior.
    :param like: local factors of components, or entries, along one batch axis.
    :param axes: the labelled axes in the original shape; none for a shared site.
    :raises StructureError: if the site is missing, of another shape, or its components differ.
    """
    _check_has(base, site)
    g = base[site]
    shape = like.shape[1:]
    target = (1, *like.base_shape[1:])
    if axes and len(g.shape) == len(shape) + len(axes):
        if axes[-1] >= g.separable_axes:
            raise StructureError(f"site '{site}': axis {axes[-1]} of its prior is not separable")
        g = g.with_batch(*axes).map(lambda v: v.flatten(0, len(axes) - 1))
        g = replace(g, batch_dim=1)
        if any(bool((v != v[:1]).any()) for v in g.params.values()):
            raise StructureError(
                f"site '{site}': the prior differs between components, so it cannot be the prior "
                "of components whose order means nothing"
            )
        g = g.index_select(0, torch.tensor([0]))
    else:
        g = g.with_batch().map(lambda v: v.unsqueeze(0))
        g = replace(g, batch_dim=1)
    try:
        if g.shape[1:] != shape and len(g.shape) > 1:
            raise StructureError(
                f"the prior has shape {tuple(g.shape[1:])}, expected {tuple(shape)}"
            )
        if g.shape[1:] != shape:
            g = g.expand(target) if g.family.event_dim == 0 else g
        one = like.index_select(0, torch.tensor([0], device=like.device))
        g = project_onto(g.to(like.device, like.dtype), one)
    except (FusionError, RuntimeError) as e:
        raise StructureError(f"site '{site}': the prior does not fit the posterior: {e}") from e
    return g


def _prior_factor(site: str, d: Distribution | Factor) -> Factor:
    try:
        return as_factor(d)
    except FusionError as e:
        raise type(e)(f"site '{site}' of `base`: {e}") from e


def base_fill(
    site: str, base: Mapping[str, Factor], like: Factor, places: Sequence[int]
) -> tuple[float, float] | None:
    """What the prior of a carried site, a factor as ``like`` with its label at the axes
    ``places``, has for every component: of two such axes off their diagonal and on it (a sticky
    transition matrix), else the same value twice; None if there is no prior.

    :raises StructureError: if it depends on the order of the components, or is of another family.
    """
    if site not in base:
        return None
    if base[site].structure() != like.structure():
        raise StructureError(
            f"site '{site}': the prior is {show_structure(base[site].structure())}, expected "
            f"{show_structure(like.structure())} as the posteriors"
        )
    values = list(base[site].params.values())
    if len(places) == 2 and [v.dim() for v in values] == [len(like.shape)]:
        diagonal = torch.zeros_like(values[0], dtype=torch.bool)
        diagonal.diagonal(dim1=places[0], dim2=places[1]).fill_(True)
        groups = [values[0][~diagonal], values[0][diagonal]]
    else:
        groups = [torch.cat([v.flatten() for v in values])] * 2
    if any(v.numel() == 0 for v in groups):
        raise StructureError(
            f"site '{site}': the prior is of one component, which does not tell what it is between "
            "two; give that of two or more"
        )
    if any(bool((v != v[0]).any()) for v in groups):
        where = " on its diagonal, or off it" if len(places) == 2 else ""
        raise StructureError(
            f"site '{site}': the prior is not symmetric: it has several values{where}, so none for "
            "components that some parties lack"
        )
    return float(groups[0][0]), float(groups[1][0])


def located(
    error: ParameterError,
    local: Mapping[str, Factor],
    base: Mapping[str, Factor | None],
    sizes: tuple[int, ...],
) -> ParameterError:
    """The error of a barycentre, with its site, and the parties that are wider than the prior."""
    for site, f in local.items():
        prior = base.get(site)
        party = party_of(sizes).tolist()
        wide = set()
        for n in range(len(party) if prior is not None else 0):
            one = f.index_select(0, torch.tensor([n]))
            if prior is not None and _wider(one, prior):
                wide.add(party[n])
        if wide:
            parties = ", ".join(f"party {s}" for s in sorted(wide)[:10])
            return ParameterError(f"site '{site}', {parties}: {error}")
    return ParameterError(f"site {' or '.join(repr(s) for s in local)}: {error}")


def _wider(f: Factor, prior: Factor) -> bool:
    """Whether ``f / prior`` cannot be made proper by another ``f``."""
    try:
        f.from_natural(2 * f.natural - prior.natural).check()
    except (FusionError, RuntimeError):
        return True
    return False
