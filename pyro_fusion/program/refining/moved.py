# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Factors moved to another centre, as sure as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pyro_fusion.errors import UnsupportedFamilyError
from pyro_fusion.families import Factor
from pyro_fusion.families.family import Params

__all__ = ["moved"]


def moved(factor: Factor, value: Tensor) -> Factor:
    """The factor with ``value`` for its :meth:`~pyro_fusion.families.Factor.center`, and its
    evidence kept: scales, concentrations, shapes and degrees of freedom.

    :param value: of the shape of the factor.
    :raises UnsupportedFamilyError: for a family that has no rule here and no location.
    """
    x = value
    for t in reversed(factor.transforms):
        x = t.inv(x)
    family, params = factor.family, factor.params
    if family.name in _RULES:
        new = _RULES[family.name](params, x)
    elif family.location is not None and params[family.location].shape == x.shape:
        new = {family.location: x}
    else:
        raise UnsupportedFamilyError(
            f"a {family.name} cannot be moved to another centre: project it onto a Normal, or "
            "onto a family that can, which are those with a location and " + ", ".join(_RULES)
        )
    return replace(factor, params={**params, **{k: v.to(params[k]) for k, v in new.items()}})


def _beta(p: Params, x: Tensor) -> Params:
    total = p["concentration1"] + p["concentration0"]
    return {"concentration1": total * x, "concentration0": total * (1 - x)}


def _normal_wishart(p: Params, x: Tensor) -> Params:
    return {"loc": x[..., 0], **_wishart(p, x[..., 1:])}


def _wishart(p: Params, x: Tensor) -> Params:
    scale = x / p["df"][..., None, None]
    return {"scale_tril": torch.linalg.cholesky((scale + scale.mT) / 2)}


_RULES: Mapping[str, Callable[[Params, Tensor], Params]] = {
    "Beta": _beta,
    "Dirichlet": lambda p, x: {"concentration": p["concentration"].sum(-1, keepdim=True) * x},
    "Exponential": lambda p, x: {"rate": 1 / x},
    "Gamma": lambda p, x: {"rate": p["concentration"] / x},
    "NormalGamma": lambda p, x: {"loc": x[..., 0], "rate": p["gamma_shape"] / x[..., 1]},
    "NormalWishart": _normal_wishart,
    "Wishart": _wishart,
}
