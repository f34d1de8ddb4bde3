# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Sums over groups, in the same order each time. On a GPU by a matrix, no larger than the costs: to
count, or to sort a sparse matrix, the host would have to wait for it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["group_mean", "group_sizes", "group_sum"]


def _members(groups: Tensor, num_groups: int) -> Tensor:
    """A mask of the members of each group, ``[K, N]``."""
    return groups == torch.arange(num_groups, device=groups.device).unsqueeze(1)


def group_sizes(groups: Tensor, w: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The number of members of each group and the sum of their weights, ``[K]`` each."""
    if w.device.type != "cpu":
        members = _members(groups, num_groups)
        return members.sum(1), members.to(w.dtype) @ w
    count = torch.bincount(groups, minlength=num_groups)
    return count, w.new_zeros(num_groups).index_add(0, groups, w)


def group_sum(x: Tensor, groups: Tensor, w: Tensor, num_groups: int) -> Tensor:
    """``Σ_n w_n x_n`` over each group, ``[N, P] -> [K, P]``; on the CPU without a temporary."""
    if x.device.type != "cpu":
        return (_members(groups, num_groups) * w) @ x
    index = torch.stack([groups, torch.arange(len(groups))])
    shape = (num_groups, len(groups))
    return torch.sparse_coo_tensor(index, w, shape, check_invariants=False) @ x


def group_mean(loc: Tensor | None, groups: Tensor, w: Tensor, weight: Tensor) -> Tensor | None:
    """Weighted mean location of each group, ``[K, ...]``: statistics are taken about it."""
    if loc is None:
        return None
    total = group_sum(loc.reshape(len(loc), -1), groups, w, len(weight))
    mean = total / weight.clamp(min=1e-300).unsqueeze(1)
    return mean.reshape(len(weight), *loc.shape[1:])
