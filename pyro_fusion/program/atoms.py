# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The atoms of a fusion as parameters, and which of them an assignment asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_fusion.families import Factor
from pyro_fusion.posterior.guide import FactorParams

__all__ = ["AtomParams", "atoms_at", "fit_length"]


class AtomParams(FactorParams):
    """Atoms, of batch shape ``[K]``; ``load_state_dict`` takes those of another number."""

    def length(self, site: str) -> int:
        """K."""
        return len(next(getattr(self, self._holders[site]).parameters()))

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for holder in self._holders.values():
            for name, value in getattr(self, holder).named_parameters():
                fit_length(value, state.get(f"{prefix}{holder}.{name}"), 0)
        super()._load_from_state_dict(state, prefix, *rest)


def fit_length(parameter: torch.nn.Parameter, state: Tensor | None, dim: int) -> None:
    """Make room in a parameter for a state that is longer or shorter along ``dim``."""
    if state is None or state.dim() != parameter.dim():
        return
    shape = list(parameter.shape)
    shape[dim] = state.shape[dim]
    parameter.data, parameter.grad = parameter.data.new_empty(shape), None


def atoms_at(atoms: Factor, k: Tensor) -> Factor:
    """The atoms ``k``, of batch shape that of ``k``."""
    result = atoms.index_select(0, k.flatten())
    result = result.map(lambda v: v.reshape(k.shape + v.shape[1:]))
    return replace(result, batch_dim=k.dim())
