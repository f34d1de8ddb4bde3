# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""KL divergences between exponential-family members, all pairs at once.

.. math:: KL(q_a \\| q_b) = A(\\eta_b) - A(\\eta_a) - \\langle \\eta_b - \\eta_a, \\mu_a \\rangle

The matrix product costs digits where two distributions are close and far from the origin. Its
rounding error is bounded entry by entry, and the entries that it may have spoiled are computed
again one by one, by the family's own formula, each centred at its own first argument.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_fusion.errors import StructureError
from pyro_fusion.families.factor import Factor
from pyro_fusion.families.masked import Masked

__all__ = ["as_factor", "kl", "pairwise_kl"]

# Entries whose bound on the relative error exceeds this are computed again.
_TOLERANCE = 1e-7
# Numbers in a block of pairs that are computed again: bounds the memory.
_PAIRS = 1 << 22
# Entries of the matrix that are checked at a time.
_BLOCK = 1 << 16


def as_factor(d: Distribution | Factor) -> Factor:
    """``d`` taken apart, or as it is when it already was."""
    return d if isinstance(d, Factor) else Factor.of(d)


def _check_pair(a: Factor, b: Factor) -> None:
    same = a.family is b.family and a.transforms == b.transforms
    if not (same or a.structure() == b.structure()) or _event_parts(a) != _event_parts(b):
        raise StructureError(f"no common exponential family: {_describe(a)} against {_describe(b)}")


def _event_parts(f: Factor) -> list[torch.Size]:
    """The shapes of the parameters of one event, which also tell the number of categories."""
    return [f.params[name].shape[f.batch_dim :] for name in f.family.parameters]


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


def _direct(p: Any, q: Any) -> Tensor:
    # In coordinates where p sits at the origin nothing large cancels.
    origin = p.location()
    p, q = p.shift(origin), q.shift(origin)
    divergence: Tensor = p.divergence(q)
    return divergence.clamp(min=0)


def pairwise_kl(
    a: Distribution | Factor | Masked | Mapping[str, Distribution],
    b: Distribution | Factor | Masked | Mapping[str, Distribution],
) -> Tensor:
    """``KL(a_k ‖ b_n)`` for all pairs: ``[K]`` and ``[N]`` -> ``[K, N]``, by one matrix product.

    Computed in float64, returned in the dtype of the inputs. Mappings of distributions are
    products of independent factors: their divergences add up. Of components with missing entries it
    is that of the entries that both have.

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
    if isinstance(a, Masked) or isinstance(b, Masked):
        if not (isinstance(a, Masked) and isinstance(b, Masked)):
            raise StructureError("entries are missing from one of the two alone")
        _check_pair(a.factor, b.factor)
        return _all_pairs(a, b, a.apart(b))
    a, b = as_factor(a), as_factor(b)
    _check_pair(a, b)
    if a.batch_dim != 1 or b.batch_dim != 1:
        raise StructureError(
            f"expected one batch axis each, got {tuple(a.batch_shape)} and {tuple(b.batch_shape)}"
        )
    return _all_pairs(a, b)


def _all_pairs(a: Any, b: Any, apart: Tensor | None = None) -> Tensor:
    """The divergences of two factors, or of two :class:`Masked`.

    :param apart: pairs that have nothing in common, ``[K, N]``.
    """
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype=torch.float64), b.to(dtype=torch.float64)
    # The longer side often stays from call to call, and has its coordinates in its cache.
    if a.batch_shape > b.batch_shape:
        p, q = a.centred.first, b.shift(a.origin).second
        size_p, scale = p.bound
        size_q = q.values.abs() @ scale
    else:
        p, q = a.shift(b.origin).first, b.centred.second
        size_q, scale = q.bound
        size_p = p.values.abs() @ scale
    result = torch.addmm(q.offset, p.values, q.values.mT, alpha=-1)
    result += p.offset.unsqueeze(1)
    index = _spoiled(result, torch.stack([size_p, p.size]), torch.stack([size_q, q.size]))
    if apart is not None:  # rounding is all there is, and would be done again for nothing
        result.masked_fill_(apart, 0)
        index = index[~apart[index[:, 0], index[:, 1]]]
    if len(index):
        for rows in index.split(max(1, _PAIRS // p.values.shape[1])):
            i, j = rows.unbind(1)
            result[i, j] = _direct(a.index_select(0, i), b.index_select(0, j))
    return result.to(dtype)


def _spoiled(result: Tensor, size_p: Tensor, size_q: Tensor) -> Tensor:
    """The entries of ``result`` that rounding may have spoiled, ``[M, 2]``.

    :param size_p, size_q: ``[2, K]`` and ``[2, N]``; what was added up to an entry is at most the
        product of their first rows plus the sum of their second.
    """
    # In units of the error that is allowed, and so of the least safe entry. Generous: the
    # log-normalisers are themselves sums in which larger terms may have cancelled.
    unit = 64 * torch.finfo(torch.float64).eps / _TOLERANCE
    (product_p, sum_p), (product_q, sum_q) = unit * size_p.unsqueeze(-1), size_q
    sum_q = unit * sum_q
    # Blocks that stay in the processor's cache: the matrix is read once. A GPU stops at each.
    block = _BLOCK // max(1, result.shape[1]) if result.device.type == "cpu" else len(result)
    block = max(1, block)
    found = []
    for start in range(0, len(result), block):
        rows = slice(start, start + block)
        least = torch.addcmul(sum_q, product_p[rows], product_q).add_(sum_p[rows])
        # Not "less": NaN is spoiled, and so is all that is negative.
        index = (result[rows] > least).logical_not_().nonzero()
        index[:, 0] += start
        found.append(index)
    return torch.cat(found)
