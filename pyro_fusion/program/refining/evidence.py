# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""How many data a party's posterior stands for."""

from __future__ import annotations

from collections.abc import Mapping

from torch.distributions import Distribution

from pyro_fusion.errors import FusionError
from pyro_fusion.families import Factor
from pyro_fusion.fusion.roles import Roles
from pyro_fusion.posterior import Posterior

__all__ = ["draws_behind"]

# Families that count data, and the parameter that does.
_COUNTS = {
    "NormalWishart": "concentration",
    "NormalGamma": "concentration",
    "Dirichlet": "concentration",
}


def draws_behind(
    posterior: Posterior, roles: Roles, priors: Mapping[str, Distribution]
) -> float | None:
    """How many draws of components a posterior counts beyond its prior, at least one; None if it
    has no family that counts.

    :param priors: site -> its distribution in the model.
    """
    matched = [site for sites in roles.matched.values() for site in sites]
    for site in [*matched, *roles.carried]:
        f = posterior.decomposed[site]
        name = _COUNTS.get(f.family.name)
        if name is None or f.transforms:
            continue
        try:
            prior = Factor.of(priors[site])
        except FusionError:
            continue
        if prior.family is not f.family:
            continue
        after, before = f.params[name], prior.params[name]
        if f.family.name == "NormalGamma":  # one count for each number of a component
            after, before = after[..., 0], before[..., 0]
        return max(1.0, float((after - before).sum()))
    return None
