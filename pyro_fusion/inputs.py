# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What users give for parties, in a list or by name: posteriors, or guides, which are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pyro_fusion.errors import FusionError, StructureError
from pyro_fusion.posterior import Axes, Posterior

__all__ = ["Inputs", "by_name", "read_parties"]

Inputs = Sequence[Posterior | Callable[..., Any]] | Mapping[str, Posterior | Callable[..., Any]]

# What to do about what is no party, by the name of its type.
_REMEDIES = {
    "Fusion": ": take its posterior, fusion.posterior",
    "MCMC": ": read the draws, Posterior.from_draws(mcmc)",
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
                f"party {s}: expected a Posterior or a Pyro guide, got {kind}{remedy}"
            )
    if axes is not None and not guides:
        raise StructureError(
            "axes are for guides, and all parties are posteriors, which have labels of their own: "
            "give axes where they are made, as in Posterior.from_guide(guide, axes=...)"
        )
    if guides:
        from pyro_fusion.readers.pyro import check_not_shared

        check_not_shared(inputs)
    parties = []
    for s, g in enumerate(inputs):
        try:
            parties.append(g if isinstance(g, Posterior) else Posterior.from_guide(g, axes=axes))
        except FusionError as e:
            raise type(e)(f"party {s}: {e}") from e
    return parties, guides
