# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Do the parties fit together, and what happens to each site: matched, carried along, or shared."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_fusion.errors import ParameterError, StructureError, warn_user
from pyro_fusion.families.projection import is_stick_breaking
from pyro_fusion.posterior import Posterior

if TYPE_CHECKING:
    from pyro_fusion.parties import Labelled

__all__ = [
    "Roles",
    "Weights",
    "check_assignment",
    "check_names",
    "check_parties",
    "check_weights",
    "show_structure",
    "site_roles",
    "turns",
    "warn_identical",
    "warn_unlabelled_simplex",
]


Weights = Sequence[float] | Mapping[str, float] | Tensor | None


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
                ("outgoing label", first.outgoing.get(site), other.outgoing.get(site)),
                ("batch axes", f.batch_dim, g.batch_dim),
                ("shape", _fixed(first, site), _fixed(other, site)),
                ("dtype", f.dtype, g.dtype),
                ("device", f.device, g.device),
            ):
                if mine != theirs:
                    remedy = _remedy(what, first, other, site)
                    if what == "shape":
                        mine, theirs = tuple(f.shape), tuple(g.shape)
                    raise StructureError(
                        f"site '{site}': expected the same {what} at all parties, got "
                        f"{show_structure(theirs)} for party {s} and {show_structure(mine)} for "
                        f"party 0{remedy}"
                    )


def _remedy(what: str, first: Posterior, other: Posterior, site: str) -> str:
    """What to do where two parties differ in ``what``, if it is clear."""
    f, g = first.decomposed[site], other.decomposed[site]
    if what == "dtype":
        return ": cast one of them, posterior.to(dtype=...)"
    if what == "device":
        return ": move one of them, posterior.to(device=...)"
    names = {f.family.name, g.family.name}
    if what == "family and transforms" and names == {"Normal", "MultivariateNormal"}:
        return ": posterior.mean_field() gives up the correlations of the MultivariateNormal"
    if what == "shape" and len(f.shape) == len(g.shape):
        for axis, sizes in enumerate(zip(f.shape, g.shape, strict=True)):
            for label in first.labels:
                both = first.components(label), other.components(label)
                if first.axes[site][axis] is None and sizes[0] != sizes[1] and sizes == both:
                    axes = tuple(label if i == axis else a for i, a in enumerate(first.axes[site]))
                    return (
                        f". If that axis is of the components of '{label}', label it: "
                        f"axes={{'{site}': {axes}}}"
                    )
    return ""


def _fixed(p: Posterior, site: str) -> tuple[int | None, ...]:
    """The shape, labelled axes left open."""
    shape = p.decomposed[site].shape
    return tuple(n if a is None else None for n, a in zip(shape, p.axes[site], strict=True))


def show_structure(x: object) -> str:
    """What :meth:`Factor.structure` returns, for a message; anything else as it prints."""
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
                f"site '{site}' has the labels {axes}: a site with several labels must have each "
                "once, on axes of independent components. Label it once: "
                f"axes={{'{site}': {tuple(a if a == labels[0] else None for a in axes)}}}, say"
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
    """How many numbers a component along ``label`` has, given the assignments of others."""
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


def check_names(roles: Roles, sites: Iterable[str], product: bool) -> None:
    """:raises StructureError: if the program of a fusion has another use for a name."""
    sites, labels = set(sites), roles.matched
    taken = {name for x in labels for name in (f"{x}_assignment", f"local_{x}")}
    plates = {"party"} if roles.shared else set()
    if product:
        taken |= {f"{site}_message" for site in sites}
        plates |= {"shared"} if roles.shared else set()
        if clash := sorted(plates & set(labels)):
            raise StructureError(
                f"label '{clash[0]}' has a name that the program of a fusion uses itself for sites "
                "without a label: give it another"
            )
        plates |= set(labels)
    taken |= {f"local_{site}" for site in roles.linked}
    own = {name for site in roles.linked for name in (site, f"{site}_atoms")}
    if clash := sorted(own & set(labels)):
        raise StructureError(
            f"label '{clash[0]}' has the name of a site with several labels, or one that the "
            "program of a fusion uses for it: give it another"
        )
    if product:
        plates |= {f"{site}_atoms" for site in roles.linked}
    if clash := sorted(sites & (taken | plates)):
        raise StructureError(
            f"site '{clash[0]}' has a name that the program of a fusion uses itself; those are "
            f"{sorted(taken | plates)}: give the site another"
        )


def check_assignment(assignment: Mapping[str, Tensor], parts: Mapping[str, Labelled]) -> None:
    """Check that each label has an atom for each component, no two of a party the same, and no
    more than its prior allows.

    :raises StructureError: naming the label, and the party where it can.
    """
    if set(assignment) != set(parts):
        raise StructureError(
            f"expected an assignment for {sorted(parts)}, got one for {sorted(assignment)}"
        )
    for label, a in assignment.items():
        sizes, limit = parts[label].problem.sizes, parts[label].prior.num_atoms
        if a.shape != (sum(sizes),) or a.is_floating_point():
            raise StructureError(
                f"assignment of '{label}': expected a LongTensor of shape [{sum(sizes)}], got "
                f"{a.dtype} of shape {list(a.shape)}"
            )
        for s, own in enumerate(a.split(sizes)):
            if len(own.unique()) < len(own):
                raise StructureError(
                    f"assignment of '{label}', party {s}: expected a different atom for each "
                    f"component, got {own.tolist()}"
                )
        count = len(a.unique())
        if limit is not None and count > limit:
            raise StructureError(
                f"assignment of '{label}': the prior allows {limit} atoms, got {count}"
            )


def warn_unlabelled_simplex(posteriors: Sequence[Posterior], roles: Roles) -> None:
    """Warn of simplices without a label that look like the weights of components, or like the rows
    of a transition matrix: pooled as they are, they would mix up components."""
    first = posteriors[0]
    simplices = {
        site: first.axes[site]
        for site, f in first.decomposed.items()
        if is_stick_breaking(f) or f.family.name == "Dirichlet"
    }
    for site, axes in simplices.items():
        shape = tuple(first.decomposed[site].shape)
        if axes[-1] is not None or shape[-1] < 2:
            continue
        for label in roles.matched:
            if any(p.components(label) != shape[-1] for p in posteriors):
                continue
            moves = label in axes and not any(
                label == other[-1] and label in other[:-1] for other in simplices.values()
            )
            if site in roles.shared or moves:
                what = "probabilities of moving to" if moves else "weights of"
                warn_user(
                    f"site '{site}' is a simplex with as many entries as there are components "
                    f"along '{label}', but their axis has no label, so it is pooled as it stands. "
                    f"If they are the {what} the components, label it: axes={{'{site}': "
                    f"{(*axes[:-1], label)}}} (the last axis of its shape {shape})"
                )
        others = [x for x, f in first.decomposed.items() if x != site and f.shape[:1] == shape[-1:]]
        if not first.labels and len(posteriors) > 1 and others:
            warn_user(
                "no site has a label, so nothing is assigned, and entry k of one party is pooled "
                f"with entry k of the others. Site '{site}' looks like the weights of {shape[-1]} "
                f"components, and site '{others[0]}' has as many entries: if they are components, "
                f"label both: axes={{'{site}': {(*axes[:-1], 'component')}, ...}}, or put them "
                "into a plate"
            )


def warn_identical(posteriors: Sequence[Posterior], names: Sequence[str]) -> None:
    """Warn of parties whose parameters are the same to the bit: no two fits are."""
    seen: dict[bytes, int] = {}
    for s, p in enumerate(posteriors):
        digest = hashlib.sha256()
        for f in p.decomposed.values():
            for v in f.params.values():
                digest.update(v.detach().cpu().double().numpy().tobytes())
        first = seen.setdefault(digest.digest(), s)
        if first != s:
            warn_user(
                f"party {names[first]} and party {names[s]} have identical parameters. If they are "
                "two fits, they were read after both, and share Pyro's parameter store: read each "
                "guide right after its fit, or fit it under `with pyro.get_param_store().scope():`"
            )
            return


def check_dispersion(dispersion: float | Tensor | None) -> float | None:
    """T as a number, or None.

    :raises ParameterError: unless it is positive and finite.
    """
    if dispersion is None:
        return None
    try:
        result = float(dispersion)
    except (TypeError, ValueError, RuntimeError):
        result = math.nan
    if isinstance(dispersion, str) or not 0 < result < math.inf:
        raise ParameterError(f"dispersion must be positive and finite, got {dispersion!r}")
    return result


def check_weights(weights: Weights, names: Sequence[str]) -> Tensor:
    """Weights with mean 1, float64, ``[S]``.

    :raises ParameterError: if they are negative, not finite, all zero, or not one per party.
    """
    num_parties = len(names)
    if isinstance(weights, Mapping):
        weights = {str(name): w for name, w in weights.items()}
        if set(weights) != set(names):
            raise ParameterError(
                f"expected a weight for each of the parties {list(names)}, got {list(weights)}"
            )
        weights = [weights[name] for name in names]
    if weights is None:
        return torch.ones(num_parties, dtype=torch.float64)
    try:
        w = torch.as_tensor(weights, dtype=torch.float64).flatten().cpu()
    except (TypeError, ValueError, RuntimeError) as e:
        raise ParameterError(f"weights must be numbers, one per party, got {weights!r}") from e
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
