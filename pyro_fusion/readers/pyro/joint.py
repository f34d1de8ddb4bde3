# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The joint Gaussians of Pyro's guides that keep theirs in pieces."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from pyro_fusion.readers.joint import Joint

__all__ = ["gaussian_joint", "structured_joint"]


def gaussian_joint(guide: Any) -> Joint:
    """The joint Gaussian of a dense AutoGaussian: its auxiliary values, scaled and shifted."""
    auxiliary = guide._dense_get_mvn()
    names = list(guide._dense_shapes)
    loc = torch.cat([attrgetter(n)(guide.locs).detach().reshape(-1) for n in names])
    scale = torch.cat([attrgetter(n)(guide.scales).detach().reshape(-1) for n in names])
    dtype = loc.dtype
    loc, scale = loc.double(), scale.double()
    rows = scale.unsqueeze(-1) * auxiliary.scale_tril.detach().double()
    return Joint(auxiliary.loc.detach().double() * scale + loc, rows, None, dtype)


def structured_joint(guide: Any) -> Joint | None:
    """The joint Gaussian of an AutoStructured whose conditionals are Normal and whose
    dependencies are linear; None for any other."""
    kinds = set(guide.conditionals.values())
    links = [d for deps in guide.dependencies.values() for d in deps.values()]
    if not all(isinstance(k, str) and k in ("normal", "mvn") for k in kinds):
        return None
    if any(not (isinstance(d, str) and d == "linear") for d in links):
        return None
    locs = {name: attrgetter(name)(guide.locs).detach() for name, _ in guide._sorted_sites}
    size = sum(v.numel() for v in locs.values())
    noise_to_value: dict[str, Tensor] = {}
    at = 0
    for name, loc in locs.items():
        n = loc.numel()
        rows = loc.new_zeros(n, size, dtype=torch.float64)
        scale = attrgetter(name)(guide.scales).detach().double()
        own = torch.eye(n, dtype=scale.dtype, device=scale.device)
        if guide.conditionals[name] == "mvn":
            own = attrgetter(name)(guide.scale_trils).detach().double()
        rows[:, at : at + n] = scale.unsqueeze(-1) * own
        deps = attrgetter(name)(guide.deps)
        for upstream in guide.dependencies.get(name, {}):
            weight = attrgetter(upstream)(deps).weight.detach().double()
            rows = rows + weight @ noise_to_value[upstream]
        noise_to_value[name] = rows
        at += n
    loc = torch.cat(list(locs.values()))
    return Joint(loc.double(), torch.cat(list(noise_to_value.values())), None, loc.dtype)
