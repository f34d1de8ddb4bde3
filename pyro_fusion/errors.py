# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The exceptions of the package. Every message names the party, the site, what was expected
and what came."""

__all__ = [
    "FileFormatError",
    "FusionError",
    "GuideError",
    "ParameterError",
    "StructureError",
    "UnsupportedFamilyError",
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


class FileFormatError(FusionError, ValueError):
    """A file that is not a posterior, is damaged, or is not to be trusted."""
