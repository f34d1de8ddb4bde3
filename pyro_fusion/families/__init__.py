# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Exponential families: natural and mean parameters, log-normaliser, conversions, pairwise KL.

Pure tensor mathematics: knows torch and the distributions, nothing of fusion. One file per group
of families; ``member.py`` takes distributions apart, ``factor.py`` has them in other coordinates,
``pairwise.py`` computes divergences between all of two sets.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_fusion.errors import FusionError, ParameterError
from pyro_fusion.families import gamma, gaussian, simplex, wishart  # noqa: F401  (register)
from pyro_fusion.families.factor import Factor
from pyro_fusion.families.family import (
    Family,
    Params,
    family_named,
    family_names,
    family_of,
    register_family,
)
from pyro_fusion.families.normal_gamma import NormalGamma
from pyro_fusion.families.normal_wishart import NormalWishart
from pyro_fusion.families.pairwise import as_factor, kl, pairwise_kl
from pyro_fusion.families.transforms import register_transform

__all__ = [
    "Factor",
    "Family",
    "NormalGamma",
    "NormalWishart",
    "Params",
    "as_factor",
    "family_named",
    "family_names",
    "family_of",
    "from_mean_params",
    "from_natural_params",
    "kl",
    "log_normalizer",
    "mean_params",
    "natural_params",
    "pairwise_kl",
    "register_family",
    "register_transform",
]


def natural_params(d: Distribution) -> Tensor:
    """Natural parameters of ``d`` as one vector per batch element: ``[*batch_shape, P]``,
    float64. Event axes made by ``Independent`` are flattened into ``P``.

    Parameters far from the origin lose digits; see :func:`from_natural_params`."""
    return as_factor(d).natural


def mean_params(d: Distribution) -> Tensor:
    """Mean parameters ``E[T(x)]`` of ``d``: ``[*batch_shape, P]``, float64.

    Parameters far from the origin lose digits; see :func:`from_mean_params`."""
    return as_factor(d).mean


def log_normalizer(d: Distribution) -> Tensor:
    """Log-normaliser ``A(η)`` of ``d``: ``[*batch_shape]``, float64."""
    return as_factor(d).log_normalizer


def from_natural_params(like: Distribution, eta: Tensor) -> Distribution:
    """The distribution with natural parameters ``eta`` (``[*batch_shape, P]``, any batch shape)
    and the family, transforms, event shape and dtype of ``like``.

    Parameters far from the origin lose digits, because they hold the square of the location beside
    the spread. To avoid this, convert a factor shifted by :meth:`Factor.shift`, and shift back.

    :raises ParameterError: if no member of the family is found to have these parameters.
    """
    return _converted(like, eta, Factor.from_natural)


def from_mean_params(like: Distribution, mu: Tensor) -> Distribution:
    """The distribution with mean parameters ``mu`` (``[*batch_shape, P]``, any batch shape)
    and the family, transforms, event shape and dtype of ``like``.

    Parameters far from the origin lose digits, because they hold the square of the location beside
    the spread. To avoid this, convert a factor shifted by :meth:`Factor.shift`, and shift back.

    :raises ParameterError: if no member of the family is found to have these parameters.
    """
    return _converted(like, mu, Factor.from_mean)


def _converted(
    like: Distribution, flat: Tensor, convert: Callable[[Factor, Tensor], Factor]
) -> Distribution:
    flat = torch.as_tensor(flat)
    try:
        f = convert(as_factor(like), flat)
        if flat.numel():
            f.check()
        return f.distribution()
    except FusionError:
        raise
    except (ValueError, RuntimeError) as e:
        text = " ".join(str(e).split())[:300]
        raise ParameterError(f"no member of the family has these parameters: {text}") from e
