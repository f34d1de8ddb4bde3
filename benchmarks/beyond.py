# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What goes on from the fusion of a default in the first simulation: a second round of the parties,
and a refinement without them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from measures import Found
from mixtures import Fits
from problems import Problem, locations, predicted, true_matches
from refined import as_atoms, fused, refined
from second_round import second_round

from pyro_fusion import Fusion, NormalWishart


def again(problem: Problem, first: Fusion) -> Found:
    """All parties fit their points once more, with the atoms as priors, and are fused again."""
    second = second_round(problem.drawn.data, first, problem.base)
    return _found(problem, second.fusion, second.fits, second.fits["points"])


def as_its_atoms(problem: Problem, first: Fusion) -> Found:
    """The fusion as it is, but a party has the atoms of its components in place of these: what
    there is without a refinement, judged as one."""
    fits = problem.fits
    points = fits["concentration"] - np.repeat(fits["prior_concentration"], fits["sizes"])
    return _found(problem, first, as_atoms(first, fits), points)


def without_parties(problem: Problem, first: Fusion) -> Found:
    """The fusion is refined by the parties' model; a party has the atoms of its components."""
    weighted = fused(problem.parties, problem.fits, first.pooling)
    assert isinstance(problem.base, NormalWishart)
    refinement = refined(weighted, problem.base)
    usage = refinement.usage.numpy()
    groups = refinement.fusion.assignment
    points = [usage[s, own] for s, own in enumerate(groups)]
    fits = as_atoms(refinement.fusion, problem.fits)
    return _found(problem, refinement.fusion, fits, np.concatenate(points))


def _found(problem: Problem, fusion: Fusion, fits: Fits, points: np.ndarray) -> Found:
    """:param fits: of the components that were assigned, and the points of each."""
    return Found(
        atoms=locations(fusion.posterior.decomposed["atom"]),
        assignment=torch.cat(list(fusion.assignment)).numpy(),
        matches=true_matches(fits, problem.drawn),
        members=predicted(fits, points, problem.drawn.data),
    )


# Row -> the default that it begins with, what is done with the problem and that fusion.
BEYOND: dict[str, tuple[str, Callable[[Problem, Fusion], Found]]] = {
    **{f"{p}, second round": (p, again) for p in ("inclusive", "exclusive", "product")},
    "exclusive, its atoms": ("exclusive", as_its_atoms),
    "exclusive, refined": ("exclusive", without_parties),
}
