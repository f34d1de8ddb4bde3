# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Priors for components of any family."""

from pyro_fusion.families import Factor

__all__ = ["prior_of"]


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
