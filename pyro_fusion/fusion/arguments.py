# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What users give for parties, in a list or by name: posteriors, or guides, which are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.distributions import Distribution

from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.errors import FusionError, ParameterError, Site, StructureError, at
from pyro_fusion.families import Factor, as_factor
from pyro_fusion.posterior import Axes, Posterior
from pyro_fusion.readers.pyro import (
    check_not_shared,
    from_guide,
    prior_from_guide,
    prior_from_model,
)

__all__ = [
    "Inputs",
    "Prior",
    "by_name",
    "check_has",
    "check_prior",
    "read_parties",
    "resolve_prior",
]

Inputs = Sequence[Posterior | Callable[..., Any]] | Mapping[str, Posterior | Callable[..., Any]]

# What to do about what is no party, by the name of its type.
_REMEDIES = {
    "Fusion": ": take its posterior, fusion.posterior",
    "MCMC": ": read the draws, from_draws(mcmc)",
}


def by_name(inputs: Inputs) -> dict[str, Any]:
    """Name -> posterior or guide; of a list, numbers.

    :raises StructureError: for a single one, or names that are alike.
    """
    if isinstance(inputs, Posterior) or callable(inputs):
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
    """All posteriors, and those of the inputs that are guides.

    :raises StructureError: for no parties, what is no party, or axes where there is no guide.
    :raises GuideError: for guides that cannot be read, or share parameters.
    """
    if not inputs:
        raise StructureError("expected at least one posterior or guide, got an empty list")
    guides = [g for g in inputs if not isinstance(g, Posterior)]
    for s, g in enumerate(inputs):
        if not isinstance(g, Posterior) and not callable(g):
            kind = type(g).__name__
            remedy = _REMEDIES.get(kind, "")
            if isinstance(g, str | os.PathLike):
                remedy = ": read the file, Posterior.load(path)"
            raise StructureError(
                f"expected a Posterior or a Pyro guide, got {kind}{remedy}", party=s
            )
    if axes is not None and not guides:
        raise StructureError(
            "axes are for guides, and all parties are posteriors, which have labels of their own: "
            "give axes where they are made, as in from_guide(guide, axes=...)"
        )
    if guides:
        check_not_shared(inputs)
    parties = []
    for s, g in enumerate(inputs):
        with at(party=s):
            parties.append(g if isinstance(g, Posterior) else from_guide(g, axes=axes))
    return parties, guides


Prior = Posterior | Mapping[str, Distribution] | Callable[..., Any]


def resolve_prior(
    prior: Prior | None, guides: Sequence[Any], sites: Sequence[str]
) -> dict[str, Factor]:
    """The prior that ``product`` divides out: as given, else that of the guides' own models.

    :raises StructureError: if the guides' models have different priors.
    :raises ParameterError: if there is none.
    """
    if prior is not None:
        return _as_factors(prior, sites)
    if guides:
        priors = [prior_from_guide(g) for g in guides]
        for s, p in enumerate(priors[1:], 1):
            _check_same_prior(priors[0], p, s)
        return dict(priors[0].decomposed)
    raise ParameterError(
        "pooling 'product' divides out the prior of the local models: give it as `prior` "
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
    prior: Posterior | Mapping[str, Distribution] | Callable[..., Any], sites: Sequence[str]
) -> dict[str, Factor]:
    """The prior of ``sites`` as factors: from a posterior, a mapping, or a Pyro model that needs
    no arguments."""
    if isinstance(prior, Posterior | Mapping):
        given = prior.decomposed if isinstance(prior, Posterior) else prior
        for site in sites:
            check_has(given, site)
        return {site: _prior_factor(site, given[site]) for site in sites}
    if not callable(prior):
        raise ParameterError(
            "`prior` must be a mapping of sites to distributions, a Posterior or a Pyro model, got "
            f"{type(prior).__name__}"
        )
    return dict(prior_from_model(prior, sites=sites).decomposed)


def check_has(prior: Mapping[str, Any], site: str) -> None:
    if site not in prior:
        raise StructureError(
            [
                "pooling 'product' needs the prior of ",
                Site(site),
                f"; `prior` has {sorted(map(str, prior))}",
            ]
        )


def _prior_factor(site: str, d: Distribution | Factor) -> Factor:
    try:
        return as_factor(d)
    except FusionError as e:
        raise type(e)([Site(site), " of `prior`: ", *e.pieces]) from e
