# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Broadcasting with an error that names the parameters."""

import torch
from torch import Size

__all__ = ["broadcast_shapes"]


def broadcast_shapes(shapes: dict[str, Size]) -> Size:
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError as error:
        got = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"expected batch shapes that broadcast, got {got}") from error
