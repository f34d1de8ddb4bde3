# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What problems of pooling are made of, and their objective by its definition."""

import torch

from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.families import Factor
from pyro_fusion.pooling.components import Components, compact


def prior_of(name: str, local: Factor) -> Factor:
    """A prior that is wider than every local factor: natural parameters between them, shrunk."""
    eta = local.natural
    if name in ("Categorical", "Bernoulli", "Poisson"):
        return local.from_natural(0.1 * eta[:1])
    params = {k: v[:1].clone() for k, v in local.params.items()}
    wide = {
        "scale": 20.0,
        "scale_tril": 20.0,
        "rate": 1e-3,
        "concentration": 1e-2,
        "gamma_shape": 1e-2,
        "concentration0": 1e-2,
        "concentration1": 1e-2,
    }
    for key, factor in wide.items():
        if key in params:
            params[key] = params[key] * factor
    if "df" in params:
        params["df"] = params["df"] * 0 + local.shape[1] - 1 + 1e-3
    return Factor(local.family, params, local.transforms, 1)


def collapsed(problem: Components, prior: AssignmentPrior, groups: torch.Tensor) -> float:
    """F of these groups with their best atoms."""
    groups, num_atoms = compact(groups)
    atoms = problem.barycenter(groups, num_atoms)
    total = problem.opening(atoms).sum() + problem.cost(atoms)[groups, range(len(groups))].sum()
    popularity = torch.bincount(groups)
    return float(total + prior.penalty(problem.num_parties)[popularity].sum())
