# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Fusions to draw."""

import numpy as np
import pyro.distributions as dist
import torch

from pyro_fusion import FusedLabel, Fusion, Posterior, StopReason
from pyro_fusion.assignment.priors import FixedAtoms
from pyro_fusion.fusion.draws import AssignmentDraws


def fusion(
    assignment: list[list[int]],
    names: list[str] | None = None,
    posterior: Posterior | None = None,
    parties: list[Posterior] | None = None,
) -> Fusion:
    """A fusion with this assignment, of :func:`normals` to atoms at 0, 1, ... unless others are
    given."""
    num_atoms = 1 + max(map(max, assignment))
    atoms = torch.arange(float(num_atoms))
    tensors = [torch.tensor(a) for a in assignment]
    one = FusedLabel(
        label="component",
        assignment=tensors,
        num_atoms=num_atoms,
        popularity=torch.bincount(torch.cat(tensors), minlength=num_atoms),
        objective=[5.0, 3.0, 2.5],
        dispersion=1.0,
        assignment_prior=FixedAtoms(num_atoms),
        stopped=StopReason.AGREED,
        restarts=[2.5],
    )
    if posterior is None:
        posterior = Posterior({"loc": dist.Normal(atoms, 1.0)}, {"loc": "component"})
    return Fusion(
        posterior=posterior,
        pooling="inclusive",
        labels={"component": one},
        objective=one.objective,
        shared_objective=0.0,
        parties=dict(
            zip(
                names or map(str, range(len(assignment))),
                parties or normals(assignment),
                strict=True,
            )
        ),
    )


def many(num_parties: int, num_atoms: int, size: int) -> Fusion:
    rng = np.random.default_rng(0)
    return fusion([rng.permutation(num_atoms)[:size].tolist() for _ in range(num_parties)])


THREE = [[0, 1], [2, 0], [1]]


def draws(num_atoms: list[int], label: str = "component") -> AssignmentDraws:
    """Draws that have these numbers of atoms."""
    n = len(num_atoms)
    return AssignmentDraws(
        label=label,
        sizes=(2, 2, 1),
        assignments=torch.zeros(n, 5, dtype=torch.long),
        num_atoms=torch.tensor(num_atoms),
        log_density=torch.zeros(n),
        alpha=None,
        dispersion=None,
    )


def images(counts: list[int]) -> list[np.ndarray]:
    """Constant images, 3 by 2 pixels: of party s (the fused one is -1), component l, 10 s + l."""
    return [
        np.ones((n, 3, 2)) * (10 * s + np.arange(n))[:, None, None]
        for s, n in enumerate(counts, start=-1)
    ]


def normals(
    assignment: list[list[int]], offset: float = 0.5, scale: float = 2.0
) -> list[Posterior]:
    """Posteriors for :func:`fusion`: of party s, each component ``offset * s`` above its atom."""
    return [
        Posterior(
            {"loc": dist.Normal(torch.tensor(a).double() + offset * s, scale)}, {"loc": "component"}
        )
        for s, a in enumerate(assignment)
    ]
