# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Do the parties fit together? Checks and warnings before anything is fused."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_fusion.errors import ParameterError, Party, StructureError, warn_user
from pyro_fusion.families.member import show_structure
from pyro_fusion.families.projection import is_stick_breaking
from pyro_fusion.fusion.roles import Roles
from pyro_fusion.posterior import Posterior

if TYPE_CHECKING:
    pass

__all__ = [
    "Weights",
    "check_dispersion",
    "check_parties",
    "check_weights",
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
                [
                    Party(s),
                    f" has the sites {sorted(other.axes)}, ",
                    Party(0),
                    f" has {sorted(first.axes)}",
                ]
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
                        [
                            f"expected the same {what} at all parties, got "
                            f"{show_structure(theirs)} for ",
                            Party(s),
                            f" and {show_structure(mine)} for ",
                            Party(0),
                            remedy,
                        ],
                        site=site,
                    )


def _remedy(what: str, first: Posterior, other: Posterior, site: str) -> str:
    """The remedy where two parties differ in ``what``, or "" if none is clear."""
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
            [
                "the weight of ",
                Party(bad[0]),
                f" must be finite and non-negative, got {float(w[bad[0]])}",
            ]
        )
    if not bool((w > 0).any()):
        raise ParameterError("all weights are zero")
    return w / w.mean()
