# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Factors whose evidence is limited, so that they can be priors: means are kept, counts are cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pyro_fusion.errors import UnsupportedFamilyError
from pyro_fusion.families.factor import Factor
from pyro_fusion.families.family import Params

__all__ = ["covariances", "has_bound", "limited", "widened"]

# A covariance takes as many points more than a mean.
_COVARIANCE = 3


def has_bound(f: Factor) -> bool:
    """True if the family has counts that can be limited, or a width that can be raised."""
    return f.family.name in _COUNTS or f.family.scale is not None


def limited(f: Factor, points: float) -> Factor:
    """The factor with the evidence of at most ``points`` points, and of no more than it has.

    ==========================  ====================================================================
    family                      at most, with the mean in brackets as it is
    ==========================  ====================================================================
    NormalWishart, NormalGamma  ``concentration`` of ``points``, degrees of freedom of three times
                                as many (``E[Λ]``, ``E[τ]``)
    Wishart                     ``df`` of three times ``points`` (``E[Λ]``)
    Gamma                       ``concentration`` of ``points`` (the mean)
    Dirichlet, Beta             concentrations that add up to ``points`` times the square root of
                                the number of categories (the mean)
    Exponential                 as it is: the evidence of one point
    ==========================  ====================================================================

    Degrees of freedom stay at or above ``D + 2``, below which a covariance has no mean.

    :raises UnsupportedFamilyError: if there are no counts.
    """
    if f.family.name not in _COUNTS:
        raise UnsupportedFamilyError(
            f"{f.family.name} has no counts to limit; {', '.join(sorted(_COUNTS))} have"
        )
    params = _COUNTS[f.family.name]({k: v.double() for k, v in f.params.items()}, points)
    return replace(f, params={k: v.to(f.dtype) for k, v in params.items()})


def widened(f: Factor, covariance: Tensor) -> Factor:
    """The Normal or MultivariateNormal that is nowhere narrower than ``covariance``: in each
    direction in which it is, its variance is raised to that.

    :param covariance: of Normals their variances, ``base_shape``; of MultivariateNormals
        ``[*base_shape, D, D]``. Of MultivariateNormals directions are those of the covariance of f
        against this one.
    """
    name = f.family.scale
    assert name is not None
    scale, least = f.params[name].double(), covariance.double()
    if f.family.parameters[name] < 2:
        wide = torch.maximum(scale, least.sqrt())
    else:
        # In coordinates in which `covariance` is the identity, raise eigenvalues to one.
        root = torch.linalg.cholesky(least)
        half = torch.linalg.solve_triangular(root, scale, upper=False)
        values, vectors = torch.linalg.eigh(half @ half.mT)
        half = root @ vectors * values.clamp(min=1).sqrt().unsqueeze(-2)
        wide = torch.linalg.cholesky(half @ half.mT)
    return replace(f, params={**f.params, name: wide.to(f.dtype)})


def covariances(f: Factor) -> Tensor:
    """Variances of Normals, ``base_shape``, or covariances, ``[*base_shape, D, D]``, in float64."""
    name = f.family.scale
    assert name is not None
    scale = f.params[name].double()
    return scale.square() if f.family.parameters[name] < 2 else scale @ scale.mT


def _normal_wishart(p: Params, points: float) -> Params:
    return {
        "loc": p["loc"],
        "concentration": p["concentration"].clamp(max=points),
        **_wishart({"df": p["df"], "scale_tril": p["scale_tril"]}, points),
    }


def _wishart(p: Params, points: float) -> Params:
    most = max(_COVARIANCE * points, p["scale_tril"].shape[-1] + 2)
    df = p["df"].clamp(max=most)
    return {"df": df, "scale_tril": p["scale_tril"] * (p["df"] / df).sqrt()[..., None, None]}


def _normal_gamma(p: Params, points: float) -> Params:
    shape = p["gamma_shape"].clamp(max=max(_COVARIANCE * points, 3) / 2)
    return {
        "loc": p["loc"],
        "concentration": p["concentration"].clamp(max=points),
        "gamma_shape": shape,
        "rate": p["rate"] * shape / p["gamma_shape"],
    }


def _gamma(p: Params, points: float) -> Params:
    count = p["concentration"].clamp(max=points)
    return {"concentration": count, "rate": p["rate"] * count / p["concentration"]}


def _dirichlet(p: Params, points: float) -> Params:
    # In a simulation of topics of 100 and 1000 words, a total of ten let unseen words vanish, and
    # ten for each word drowned the party's own; best was between .1 and .3 for each of both.
    most = points * p["concentration"].shape[-1] ** 0.5
    total = p["concentration"].sum(-1, keepdim=True)
    return {"concentration": p["concentration"] * (most / total).clamp(max=1)}


def _beta(p: Params, points: float) -> Params:
    factor = (points * 2**0.5 / (p["concentration1"] + p["concentration0"])).clamp(max=1)
    return {k: v * factor for k, v in p.items()}


_COUNTS: dict[str, Callable[[Params, float], Params]] = {
    "Beta": _beta,
    "Dirichlet": _dirichlet,
    "Exponential": lambda p, points: p,
    "Gamma": _gamma,
    "NormalGamma": _normal_gamma,
    "NormalWishart": _normal_wishart,
    "Wishart": _wishart,
}
