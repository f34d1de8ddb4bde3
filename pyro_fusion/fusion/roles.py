# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The role of each site in a fusion: matched, carried along, linked or shared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from pyro_fusion.errors import Site, StructureError
from pyro_fusion.posterior import Posterior

__all__ = ["Roles", "site_roles", "turns"]


@dataclass(frozen=True)
class Roles:
    """The role of each site.

    :ivar matched: label -> site -> the axis whose components are assigned by their own divergence.
    :ivar carried: site -> its label: an axis of that label is no batch of independent components
        (mixture weights), or two axes have it (transition matrices); follows the assignment.
    :ivar linked: sites with several labels -> these; each is assigned in turn, given the others.
    :ivar shared: sites without a label, pooled directly.
    :ivar groups: labels that are linked by sites, directly or through others, in the order in which
        they are first assigned; one that is linked to none is a group of its own.
    """

    matched: dict[str, dict[str, int]]
    carried: dict[str, str]
    linked: dict[str, tuple[str, ...]]
    shared: list[str]
    groups: list[tuple[str, ...]]


def site_roles(posterior: Posterior) -> Roles:
    """Sort the sites by role.

    :raises StructureError: for a site that has several labels, one of them twice or on an axis of
        no independent components, or for a label none of whose sites can be matched.
    """
    roles = Roles({label: {} for label in posterior.labels}, {}, {}, [], [])
    for site, axes in posterior.axes.items():
        labels = tuple(dict.fromkeys(a for a in axes if a is not None))
        places = [i for i, a in enumerate(axes) if a is not None]
        separable = places and places[-1] < posterior.decomposed[site].separable_axes
        if not labels:
            roles.shared.append(site)
        elif separable and len(places) == 1:
            roles.matched[labels[0]][site] = places[0]
        elif len(labels) == 1:
            roles.carried[site] = labels[0]
        elif separable and len(places) == len(labels):
            roles.linked[site] = labels
        else:
            raise StructureError(
                [
                    Site(site),
                    f" has the labels {axes}: a site with several labels must have each "
                    "once, on axes of independent components. Label it once: "
                    f"axes={{'{site}': {tuple(a if a == labels[0] else None for a in axes)}}}, say",
                ]
            )
    roles.groups.extend(_groups(posterior, roles))
    return roles


def _groups(posterior: Posterior, roles: Roles) -> list[tuple[str, ...]]:
    """:attr:`Roles.groups`: first comes the label whose components have the most numbers."""
    rest, groups = list(roles.matched), []
    while rest:
        label = max(rest, key=partial(_numbers, posterior, roles, ()))
        if not _numbers(posterior, roles, (), label):
            _refuse(posterior, roles, label)
        groups.append(turns(posterior, roles, label))
        rest = [x for x in rest if x not in groups[-1]]
    return groups


def turns(posterior: Posterior, roles: Roles, first: str) -> tuple[str, ...]:
    """An order to assign labels that are linked in: after the first, the one that has the most
    numbers to tell its components apart by, given those before."""
    group: tuple[str, ...] = (first,)
    while True:
        rest = [x for x in roles.matched if x not in group and _are_linked(roles, x, group)]
        if not rest:
            return group
        label = max(rest, key=partial(_numbers, posterior, roles, group))
        if not _numbers(posterior, roles, group, label):
            _refuse(posterior, roles, label)
        group += (label,)


def _are_linked(roles: Roles, label: str, group: tuple[str, ...]) -> bool:
    return any(label in x and set(x) & set(group) for x in roles.linked.values())


def _numbers(posterior: Posterior, roles: Roles, given: tuple[str, ...], label: str) -> int:
    """The count of numbers of a component along ``label``, given the assignments of others."""
    sites = list(roles.matched[label])
    sites += [x for x, linked in roles.linked.items() if {label} <= set(linked) <= {label, *given}]
    size = posterior.components(label)
    return sum(posterior.decomposed[site].shape.numel() // size for site in sites)


def _refuse(posterior: Posterior, roles: Roles, label: str) -> None:
    linked = [site for site, labels in roles.linked.items() if label in labels]
    if linked:
        raise StructureError(
            f"label '{label}' is only on sites that have other labels too ({linked}), and these "
            "labels have no sites of their own either, so there is nothing to begin with. Where an "
            "axis has no components whose order means nothing, as that of features, take its label "
            f"away: axes={{'{linked[0]}': "
            f"{tuple(label if a == label else None for a in posterior.axes[linked[0]])}}}"
        )
    carried = [site for site, other in roles.carried.items() if other == label]
    raise StructureError(
        f"label '{label}' is only on sites that follow an assignment ({carried}): at least "
        "one site needs it on an axis of independent components, to tell them apart by"
    )
