# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The prior of the local models, which ``product`` divides out: where it comes from, and what it is
for one atom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from pyro_fusion.assignment.problem import party_of
from pyro_fusion.errors import FusionError, ParameterError, StructureError
from pyro_fusion.families import Factor
from pyro_fusion.families.member import show_structure
from pyro_fusion.families.projection import project_onto
from pyro_fusion.fusion.arguments import check_has

__all__ = ["atom_prior", "prior_fill", "located"]


def atom_prior(
    site: str, prior: Mapping[str, Factor], like: Factor, axes: Sequence[int] = ()
) -> Factor:
    """The prior of one atom at ``site``, as a factor of ``like``'s family with batch shape ``[1]``.

    :param prior: given priors: of one component, or with the labelled axes, all of whose
        components then have the same prior.
    :param like: local factors of components, or entries, along one batch axis.
    :param axes: the labelled axes in the original shape; none for a shared site.
    :raises StructureError: if the site is missing, of another shape, or its components differ.
    """
    check_has(prior, site)
    g = prior[site]
    shape = like.shape[1:]
    target = (1, *like.base_shape[1:])
    if axes and len(g.shape) == len(shape) + len(axes):
        if axes[-1] >= g.separable_axes:
            raise StructureError(f"axis {axes[-1]} of its prior is not separable", site=site)
        g = g.with_batch(*axes).map(lambda v: v.flatten(0, len(axes) - 1))
        g = replace(g, batch_dim=1)
        if any(bool((v != v[:1]).any()) for v in g.params.values()):
            raise StructureError(
                "the prior differs between components, so it cannot be the prior "
                "of components whose order means nothing",
                site=site,
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
        raise StructureError(f"the prior does not fit the posterior: {e}", site=site) from e
    return g


def prior_fill(
    site: str, prior: Mapping[str, Factor], like: Factor, places: Sequence[int]
) -> tuple[float, float] | None:
    """The parameter that the prior of a carried site has for every component, the site a factor
    as ``like`` with its label at the axes ``places``: of two such axes off their diagonal and on
    it (a sticky transition matrix), else the same value twice; None if there is no prior.

    :raises StructureError: if it depends on the order of the components, or is of another family.
    """
    if site not in prior:
        return None
    if prior[site].structure() != like.structure():
        raise StructureError(
            f"the prior is {show_structure(prior[site].structure())}, expected "
            f"{show_structure(like.structure())} as the posteriors",
            site=site,
        )
    values = list(prior[site].params.values())
    if len(places) == 2 and [v.dim() for v in values] == [len(like.shape)]:
        diagonal = torch.zeros_like(values[0], dtype=torch.bool)
        diagonal.diagonal(dim1=places[0], dim2=places[1]).fill_(True)
        groups = [values[0][~diagonal], values[0][diagonal]]
    else:
        groups = [torch.cat([v.flatten() for v in values])] * 2
    if any(v.numel() == 0 for v in groups):
        raise StructureError(
            "the prior is of one component, which does not tell what it is between "
            "two; give that of two or more",
            site=site,
        )
    if any(bool((v != v[0]).any()) for v in groups):
        where = " on its diagonal, or off it" if len(places) == 2 else ""
        raise StructureError(
            f"the prior is not symmetric: it has several values{where}, so none for "
            "components that some parties lack",
            site=site,
        )
    return float(groups[0][0]), float(groups[1][0])


def located(
    error: ParameterError,
    local: Mapping[str, Factor],
    prior: Mapping[str, Factor | None],
    sizes: tuple[int, ...],
) -> ParameterError:
    """The error of a barycentre, with its site, and the parties that are wider than the prior."""
    if error.site is not None or error.parties:
        return error
    for site, f in local.items():
        one_prior = prior.get(site)
        party = party_of(sizes).tolist()
        wide = set()
        for n in range(len(party) if one_prior is not None else 0):
            one = f.index_select(0, torch.tensor([n]))
            if one_prior is not None and _wider(one, one_prior):
                wide.add(party[n])
        if wide:
            error.locate(party=sorted(wide)[:10], site=site)
            return error
    if len(local) == 1:
        error.locate(site=next(iter(local)))
        return error
    return ParameterError([f"site {' or '.join(repr(s) for s in local)}: ", *error.pieces])


def _wider(f: Factor, prior: Factor) -> bool:
    """True if ``f / prior`` cannot be made proper by another ``f``."""
    try:
        f.from_natural(2 * f.natural - prior.natural).check()
    except (FusionError, RuntimeError):
        return True
    return False
