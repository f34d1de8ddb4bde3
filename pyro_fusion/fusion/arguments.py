# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The parties as users give them, in a list or by name: posteriors, and what readers take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.distributions import Distribution

from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.errors import FusionError, ParameterError, Site, StructureError, at
from pyro_fusion.families import Factor, as_factor
from pyro_fusion.posterior import Axes, Posterior
from pyro_fusion.readers.pyro import check_not_shared, prior_from_guide, prior_from_model
from pyro_fusion.readers.registry import GUIDES, is_single, reader_of

__all__ = [
    "Inputs",
    "Prior",
    "by_name",
    "check_has",
    "check_prior",
    "read_parties",
    "resolve_prior",
]

Inputs = Sequence[Any] | Mapping[str, Any]


def by_name(inputs: Inputs) -> dict[str, Any]:
    """Name -> posterior, or what a reader takes; of a list, numbers.

    :raises StructureError: for a single one, or names that are alike.
    """
    if is_single(inputs) or not isinstance(inputs, Iterable):
        raise StructureError("expected a list of posteriors or guides, got a single one")
    if isinstance(inputs, Mapping):
        named = {str(name): x for name, x in inputs.items()}
        if len(named) < len(inputs):
            raise StructureError(f"names of parties must differ as text, got {list(inputs)}")
        return named
    return {str(s): x for s, x in enumerate(inputs)}


def read_parties(
    inputs: Sequence[Any], axes: Axes | Literal["auto"] | None
) -> tuple[list[Posterior], list[Any]]:
    """All posteriors, and those of the inputs that are Pyro guides, whose labels ``axes`` gives.

    :raises StructureError: for no parties, what no reader takes, or axes where there is no guide.
    :raises GuideError: for guides that cannot be read, or share parameters.
    """
    if not inputs:
        raise StructureError("expected at least one party, got none")
    readers = []
    for s, x in enumerate(inputs):
        with at(party=s):
            readers.append(None if isinstance(x, Posterior) else reader_of(x))
    is_guide = [r is not None and r.entry is GUIDES for r in readers]
    guides = [x for x, yes in zip(inputs, is_guide, strict=True) if yes]
    if axes is not None and not guides:
        raise StructureError(
            "axes are for guides, and there is none: all parties are posteriors, which have labels "
            "of their own, or read as such. Give axes where they are made, as in "
            "from_guide(guide, axes=...)"
        )
    if guides:
        check_not_shared([x if yes else None for x, yes in zip(inputs, is_guide, strict=True)])
    parties = []
    for s, (x, reader) in enumerate(zip(inputs, readers, strict=True)):
        with at(party=s):
            if reader is None:
                parties.append(x)
            else:
                parties.append(reader(x, axes=axes) if is_guide[s] else reader(x))
    return parties, guides


Prior = Posterior | Mapping[str, Distribution] | Callable[..., Any]


def resolve_prior(
    prior: Prior | None, guides: Sequence[Any], sites: Sequence[str], pooling: str = "product"
) -> dict[str, Factor]:
    """The prior that ``product`` divides out: as given, else that of the guides' own models.

    :param pooling: the name of the pooling that needs it.

    :raises StructureError: if the guides' models have different priors.
    :raises ParameterError: if there is none.
    """
    if prior is not None:
        return _as_factors(prior, sites, pooling)
    if guides:
        priors = [prior_from_guide(g) for g in guides]
        for s, p in enumerate(priors[1:], 1):
            _check_same_prior(priors[0], p, s)
        return dict(priors[0].decomposed)
    raise ParameterError(
        f"pooling '{pooling}' divides out the prior of the local models: give it as `prior` "
        "(site -> distribution, or the Pyro model)"
    )


def check_prior(prior: Prior | None) -> None:
    """:raises ParameterError: for an assignment prior in the place of the local models' prior."""
    given = prior.values() if isinstance(prior, Mapping) else (prior,)
    for one in given:
        if isinstance(one, AssignmentPrior):
            raise ParameterError(
                f"`prior` is that of the local models' sites, got {one!r}: give a prior of the "
                "assignment as `assignment_prior`"
            )


def _check_same_prior(first: Posterior, other: Posterior, s: int) -> None:
    for site, f in first.decomposed.items():
        g = other.decomposed.get(site)
        if g is None or not _same_prior(f, g):
            raise StructureError(
                f"the model of guide {s} has another prior than that of guide 0; "
                "fit them with one prior, or say as `prior` which one to divide out",
                site=site,
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


def _as_factors(
    prior: Posterior | Mapping[str, Distribution] | Callable[..., Any],
    sites: Sequence[str],
    pooling: str,
) -> dict[str, Factor]:
    """The prior of ``sites`` as factors: from a posterior, a mapping, or a Pyro model that needs
    no arguments."""
    if isinstance(prior, Posterior | Mapping):
        given = prior.decomposed if isinstance(prior, Posterior) else prior
        for site in sites:
            check_has(given, site, pooling)
        return {site: _prior_factor(site, given[site]) for site in sites}
    if not callable(prior):
        raise ParameterError(
            "`prior` must be a mapping of sites to distributions, a Posterior or a Pyro model, got "
            f"{type(prior).__name__}"
        )
    return dict(prior_from_model(prior, sites=sites).decomposed)


def check_has(prior: Mapping[str, Any], site: str, pooling: str = "product") -> None:
    if site not in prior:
        raise StructureError(
            [
                f"pooling '{pooling}' needs the prior of ",
                Site(site),
                f"; `prior` has {sorted(map(str, prior))}",
            ]
        )


def _prior_factor(site: str, d: Distribution | Factor) -> Factor:
    try:
        return as_factor(d)
    except FusionError as e:
        raise type(e)([Site(site), " of `prior`: ", *e.pieces]) from e
