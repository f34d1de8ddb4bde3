# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The exceptions and warnings of the package. Every message names the party, the site, what was
expected and what came."""

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Size

__all__ = [
    "DrawsError",
    "FileFormatError",
    "FusionError",
    "GuideError",
    "ParameterError",
    "StructureError",
    "UnsupportedFamilyError",
    "broadcast_shapes",
    "naming",
    "warn_user",
]


class FusionError(Exception):
    """Base class of every error that ``pyro_fusion`` raises on purpose."""


class ParameterError(FusionError, ValueError):
    """A value is not one that the argument or the parameter admits (NaN, negative scale, ...)."""


class StructureError(FusionError, ValueError):
    """Names, shapes, labels or supports do not fit together."""


class UnsupportedFamilyError(FusionError, TypeError):
    """A distribution (or transform) that no exponential family is registered for."""


class GuideError(FusionError, ValueError):
    """A guide that no posterior can be read from."""


class DrawsError(FusionError, ValueError):
    """Draws that no posterior can be read from."""


class FileFormatError(FusionError, ValueError):
    """A file that is not a posterior, is damaged, or is not to be trusted."""


@contextmanager
def naming(names: Sequence[str]) -> Iterator[None]:
    """Errors number the parties: let those from here also have their names."""

    def named(found: re.Match[str]) -> str:
        s = int(found[1])
        return f"party {s} ({names[s]})" if s < len(names) and names[s] != str(s) else found[0]

    try:
        yield
    except FusionError as e:
        text = re.sub(r"\bparty (\d+)\b(?! \()", named, str(e))
        if text == str(e):
            raise
        raise type(e)(text) from e


def warn_user(message: str) -> None:
    """Warn at the line of the user's own code that led here, however deep inside the package."""
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and _is_library(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    warnings.warn(message, UserWarning, stacklevel=level)


def _is_library(module: str) -> bool:
    return module.split(".")[0] in ("pyro_fusion", "pyro", "torch", "contextlib")


def broadcast_shapes(shapes: dict[str, Size]) -> Size:
    """The common batch shape of parameters by name.

    :raises ValueError: names each parameter and its shape.
    """
    try:
        return torch.broadcast_shapes(*shapes.values())
    except RuntimeError as error:
        got = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(f"expected batch shapes that broadcast, got {got}") from error
