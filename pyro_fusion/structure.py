# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Do the parties fit together, and what happens to each site: matched, carried along, or shared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_fusion.errors import FusionError, ParameterError, StructureError
from pyro_fusion.families import Factor, as_factor
from pyro_fusion.families.projection import is_stick_breaking, project_onto
from pyro_fusion.posterior import Posterior

__all__ = [
    "Roles",
    "atom_base",
    "base_factors",
    "base_fill",
    "check_parties",
    "check_weights",
    "site_roles",
    "warn_unlabelled_simplex",
]


def check_parties(posteriors: Sequence[Posterior]) -> None:
    """Check that all parties have the same sites, families, supports, shapes (but for the sizes of
    labelled axes), labels, dtypes and devices.

    :raises StructureError: naming the two parties, the site, and what each has.
    """
    first = posteriors[0]
    for s, other in enumerate(posteriors[1:], 1):
        if set(other.axes) != set(first.axes):
            raise StructureError(
                f"party {s} has the sites {sorted(other.axes)}, party 0 has {sorted(first.axes)}"
            )
        for site, f in first.decomposed.items():
            g = other.decomposed[site]
            for what, mine, theirs in (
                ("family and transforms", f.structure(), g.structure()),
                ("labels", first.axes[site], other.axes[site]),
                ("batch axes", f.batch_dim, g.batch_dim),
                ("shape", _fixed(first, site), _fixed(other, site)),
                ("dtype", f.dtype, g.dtype),
                ("device", f.device, g.device),
            ):
                if mine != theirs:
                    if what == "shape":
                        mine, theirs = tuple(f.shape), tuple(g.shape)
                    raise StructureError(
                        f"site '{site}': {what} of party {s} is {_show(theirs)}, "
                        f"of party 0 {_show(mine)}"
                    )


def _fixed(p: Posterior, site: str) -> tuple[int | None, ...]:
    """The shape, labelled axes left open."""
    shape = p.decomposed[site].shape
    return tuple(n if a is None else None for n, a in zip(shape, p.axes[site], strict=True))


def _show(x: object) -> str:
    if isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], tuple) and isinstance(x[0], str):
        name, transforms = x
        return " behind ".join([str(name), *map(str, reversed(transforms))])
    return str(x)


@dataclass(frozen=True)
class Roles:
    """What happens to each site.

    :ivar matched: label -> site -> the axis whose components are assigned by their own divergence.
    :ivar carried: site -> its label: an axis of that label is no batch of independent components
        (mixture weights), or two axes have it (transition matrices); follows the assignment.
    :ivar shared: sites without a label, pooled directly.
    """

    matched: dict[str, dict[str, int]]
    carried: dict[str, str]
    shared: list[str]


def site_roles(posterior: Posterior) -> Roles:
    """Sort the sites by role.

    :raises StructureError: for a site with two different labels (not supported yet), or a label
        none of whose sites can be matched.
    """
    roles = Roles({label: {} for label in posterior.labels}, {}, [])
    for site, axes in posterior.axes.items():
        labels = sorted({a for a in axes if a is not None})
        if not labels:
            roles.shared.append(site)
            continue
        if len(labels) > 1:
            raise StructureError(
                f"site '{site}' has the labels {labels}: sites with more than one label are not "
                "supported yet"
            )
        label = labels[0]
        places = [i for i, a in enumerate(axes) if a == label]
        if len(places) == 1 and places[0] < posterior.decomposed[site].separable_axes:
            roles.matched[label][site] = places[0]
        else:
            roles.carried[site] = label
    for label, sites in roles.matched.items():
        if not sites:
            carried = [site for site, other in roles.carried.items() if other == label]
            raise StructureError(
                f"label '{label}' is only on sites that follow an assignment ({carried}): at least "
                "one site needs it on an axis of independent components, to tell them apart by"
            )
    return roles


def warn_unlabelled_simplex(posterior: Posterior, roles: Roles) -> None:
    """Warn of shared sites that look like the weights of labelled components: pooled as they are,
    they would mix up components."""
    for site in roles.shared:
        f = posterior.decomposed[site]
        simplex = is_stick_breaking(f) or f.family.name == "Dirichlet"
        for label in roles.matched:
            if simplex and f.shape[-1] == posterior.components(label):
                warnings.warn(
                    f"site '{site}' is a simplex with as many entries as there are components "
                    f"along '{label}', but its axis has no label, so it is pooled as it stands. "
                    f"If they are the weights of the components, label it: axes={{'{site}': "
                    f"('{label}',)}} (the last axis of its shape {tuple(f.shape)})",
                    stacklevel=3,
                )


# -- the prior ---------------------------------------------------------------------------------


def base_factors(
    base: Posterior | Mapping[str, Distribution] | Callable[..., Any], sites: Sequence[str]
) -> dict[str, Factor]:
    """The prior of ``sites`` as factors: from a posterior, a mapping, or a Pyro model that needs
    no arguments."""
    if isinstance(base, Posterior):
        return dict(base.decomposed)
    if isinstance(base, Mapping):
        return {site: as_factor(d) for site, d in base.items()}
    from pyro_fusion.readers.pyro import prior_from_model

    return dict(prior_from_model(base, sites=sites).decomposed)


def atom_base(site: str, base: Mapping[str, Factor], like: Factor, axis: int | None) -> Factor:
    """The prior of one atom at ``site``, as a factor of ``like``'s family with batch shape ``[1]``.

    :param base: given priors: of one component, or with the labelled axis, all of whose
        components then have the same prior.
    :param like: a local factor with ``axis`` (or nothing) as its only batch axis, first.
    :param axis: the labelled axis in the original shape; None for a shared site.
    :raises StructureError: if the site is missing, of another shape, or its components differ.
    """
    if site not in base:
        raise StructureError(
            f"pooling 'product' needs the prior of site '{site}'; `base` has {sorted(base)}"
        )
    g = base[site]
    shape = like.shape[1:]
    target = (1, *like.base_shape[1:])
    if axis is not None and len(g.shape) == len(like.shape):
        if axis >= g.separable_axes:
            raise StructureError(f"site '{site}': axis {axis} of its prior is not separable")
        g = g.with_batch(axis)
        if any(bool((v != v[:1]).any()) for v in g.params.values()):
            raise StructureError(
                f"site '{site}': the prior differs between components, so it cannot be the prior "
                "of components whose order means nothing"
            )
        g = g.index_select(0, torch.tensor([0]))
    else:
        g = g.with_batch().map(lambda v: v.unsqueeze(0))
        g = Factor(g.family, g.params, g.transforms, 1)
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


def base_fill(site: str, base: Mapping[str, Factor]) -> Tensor | None:
    """The one value that the prior of a carried site has for every component.

    :raises StructureError: if it has several.
    """
    if site not in base:
        return None
    values = torch.cat([v.flatten() for v in base[site].params.values()])
    if bool((values != values[0]).any()):
        raise StructureError(
            f"site '{site}': the prior is not symmetric, so it has no value for components "
            "that some parties lack"
        )
    return values[0]


def check_weights(weights: Sequence[float] | Tensor | None, num_parties: int) -> Tensor:
    """Weights with mean 1, float64, ``[S]``.

    :raises ParameterError: if they are negative, not finite, all zero, or not one per party.
    """
    if weights is None:
        return torch.ones(num_parties, dtype=torch.float64)
    w = torch.as_tensor(weights, dtype=torch.float64).flatten().cpu()
    if len(w) != num_parties:
        raise ParameterError(f"expected {num_parties} weights, one per party, got {len(w)}")
    bad = (~torch.isfinite(w) | (w < 0)).nonzero().flatten().tolist()
    if bad:
        raise ParameterError(
            f"the weight of party {bad[0]} must be finite and non-negative, got {float(w[bad[0]])}"
        )
    if not bool((w > 0).any()):
        raise ParameterError("all weights are zero")
    return w / w.mean()
