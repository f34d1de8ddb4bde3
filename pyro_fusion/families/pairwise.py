# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""KL divergences between exponential-family members, all pairs at once.

.. math:: KL(q_a \\| q_b) = A(\\eta_b) - A(\\eta_a) - \\langle \\eta_b - \\eta_a, \\mu_a \\rangle

The matrix product costs digits where two distributions are close and far from the origin. Its
rounding error is bounded entry by entry, and the entries that it may have spoiled are computed
again one by one, by the family's own formula, each centred at its own first argument.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_fusion.errors import StructureError
from pyro_fusion.families.factor import Factor

__all__ = ["as_factor", "kl", "pairwise_kl"]

# Entries whose bound on the relative error exceeds this are computed again.
_TOLERANCE = 1e-7
# Below this a divergence is zero for every purpose, and is not worth refining.
_ABSOLUTE = 1e-14
# Elements per block of refined pairs: bounds the memory of the fall-back.
_BLOCK = 1 << 22


def as_factor(d: Distribution | Factor) -> Factor:
    """``d`` taken apart, or as it is when it already was."""
    return d if isinstance(d, Factor) else Factor.of(d)


def _check_pair(a: Factor, b: Factor) -> None:
    if (
        a.structure() != b.structure()
        or a.event_shape != b.event_shape
        or _event_parts(a) != _event_parts(b)
    ):
        raise StructureError(f"no common exponential family: {_describe(a)} against {_describe(b)}")


def _event_parts(f: Factor) -> list[torch.Size]:
    """Of each parameter: they tell apart what event shapes do not, the numbers of categories."""
    return [f.params[name].shape[-n:] for name, n in f.family.parameters.items() if n]


def _describe(f: Factor) -> str:
    names = "".join(f" behind {type(t).__name__}" for t in f.transforms)
    return f"{f.family.name}{names} with event shape {tuple(f.event_shape)}"


def kl(p: Distribution | Factor, q: Distribution | Factor) -> Tensor:
    """``KL(p ‖ q)`` elementwise over the (broadcast) batch shapes, in float64 inside.

    :raises StructureError: if the two are not in one family with one event shape.
    """
    p, q = as_factor(p), as_factor(q)
    _check_pair(p, q)
    # Not torch's broadcast_shapes, whose first call imports sympy for a second.
    shape = torch.Size(np.broadcast_shapes(p.batch_shape, q.batch_shape))
    return _direct(p.expand_batch(shape), q.expand_batch(shape)).to(
        torch.promote_types(p.dtype, q.dtype)
    )


def _direct(p: Factor, q: Factor) -> Tensor:
    # In coordinates where p sits at the origin nothing large cancels.
    origin = p.location()
    p, q = p.shift(origin), q.shift(origin)
    return p.divergence(q).clamp(min=0)


def pairwise_kl(
    a: Distribution | Factor | Mapping[str, Distribution],
    b: Distribution | Factor | Mapping[str, Distribution],
) -> Tensor:
    """``KL(a_k ‖ b_n)`` for all pairs: ``[K]`` and ``[N]`` -> ``[K, N]``, by one matrix product.

    Computed in float64, returned in the dtype of the inputs. Mappings of distributions are
    products of independent factors: their divergences add up. Divergences below about 1e-14 are
    not refined: of them only the smallness is to be believed.

    :param a: batch shape ``[K]``.
    :param b: batch shape ``[N]``, the same family, transforms and event shape.
    :raises StructureError: if the two do not match, or a batch shape is not one axis.

    Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), eq. 5, in
    Bregman form (Banerjee et al., *Clustering with Bregman Divergences*, 2005).
    """
    if isinstance(a, Mapping) or isinstance(b, Mapping):
        if not (isinstance(a, Mapping) and isinstance(b, Mapping)) or set(a) != set(b) or not a:
            raise StructureError("products of factors need the same, non-empty set of names")
        return torch.stack([pairwise_kl(a[name], b[name]) for name in a]).sum(0)
    a, b = as_factor(a), as_factor(b)
    _check_pair(a, b)
    if a.batch_dim != 1 or b.batch_dim != 1:
        raise StructureError(
            f"expected one batch axis each, got {tuple(a.batch_shape)} and {tuple(b.batch_shape)}"
        )
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype=torch.float64), b.to(dtype=torch.float64)
    location = b.location()
    origin = None if location is None else location.mean(0)
    ca, cb = a.shift(origin), b.shift(origin)
    result, bound = _by_matrix_product(ca, cb)
    spoiled = bound > _TOLERANCE * result.clamp(min=0) + _ABSOLUTE
    spoiled |= ~torch.isfinite(result)
    index = spoiled.nonzero()
    if len(index):
        block = max(1, _BLOCK // max(1, a.natural.shape[-1]))
        for rows in index.split(block):
            i, j = rows.unbind(1)
            result[i, j] = _direct(a.index_select(0, i), b.index_select(0, j))
    return result.clamp_(min=0).to(dtype)


def _by_matrix_product(a: Factor, b: Factor) -> tuple[Tensor, Tensor]:
    """The divergences and a bound on their rounding errors, each ``[K, N]``."""
    product = a.mean @ b.natural.mT
    own = (a.mean * a.natural).sum(-1) - a.log_normalizer
    result = own.unsqueeze(1) + b.log_normalizer - product
    # Cauchy-Schwarz in coordinates scaled to balance the two sides: |<η, μ>| <= ‖sη‖ ‖μ/s‖.
    size_b, size_a = b.natural.abs().mean(0), a.mean.abs().mean(0)
    s = ((size_a + 1e-300) / (size_b + 1e-300)).sqrt()
    norm_b = torch.linalg.vector_norm(b.natural * s, dim=-1)
    norm_a = torch.linalg.vector_norm(a.mean / s, dim=-1)
    own_size = (a.mean * a.natural).abs().sum(-1) + a.log_normalizer.abs()
    magnitude = norm_a.unsqueeze(1) * norm_b
    magnitude += own_size.unsqueeze(1) + b.log_normalizer.abs()
    # Generous: the log-normalisers are themselves sums in which larger terms may have cancelled.
    return result, magnitude.mul_(64 * torch.finfo(torch.float64).eps)
