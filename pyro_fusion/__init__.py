# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Fuse posteriors: several parties' Pyro guides into one, without their data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyro_fusion.assignment.priors import FixedAtoms, GroupNormPrior, IndianBuffetPrior
from pyro_fusion.errors import (
    DrawsError,
    FileFormatError,
    FusionError,
    GuideError,
    ParameterError,
    StructureError,
    UnsupportedFamilyError,
)
from pyro_fusion.families import NormalGamma, NormalWishart, pairwise_kl, register_family
from pyro_fusion.fusion.fuse import fuse
from pyro_fusion.fusion.persistence import DispersionPath, Plateau
from pyro_fusion.fusion.problem import FusionProblem, dispersion_path
from pyro_fusion.fusion.result import FusedLabel, Fusion, StopReason
from pyro_fusion.nn import WeightSearch, merge_modules, search_weights
from pyro_fusion.posterior import Posterior, PosteriorGuide
from pyro_fusion.program.em import FusionEM
from pyro_fusion.program.gibbs import FusionGibbs
from pyro_fusion.program.guide import FusionGuide
from pyro_fusion.program.model import FusionModel
from pyro_fusion.program.refining import Refinement, refine
from pyro_fusion.readers.axes.modules import module_axes

if TYPE_CHECKING:
    from pyro_fusion.readers.draws import from_draws
    from pyro_fusion.readers.module import from_module, to_module
    from pyro_fusion.readers.numpyro import from_numpyro, to_numpyro
    from pyro_fusion.readers.pyro import from_guide
    from pyro_fusion.readers.registry import read, register_reader
    from pyro_fusion.readers.sklearn import from_sklearn

__version__ = "0.1.0"

__all__ = [
    "DispersionPath",
    "DrawsError",
    "FileFormatError",
    "FixedAtoms",
    "FusedLabel",
    "Fusion",
    "FusionEM",
    "FusionError",
    "FusionGibbs",
    "FusionGuide",
    "FusionModel",
    "FusionProblem",
    "GroupNormPrior",
    "GuideError",
    "IndianBuffetPrior",
    "NormalGamma",
    "NormalWishart",
    "ParameterError",
    "Plateau",
    "Posterior",
    "PosteriorGuide",
    "Refinement",
    "StopReason",
    "StructureError",
    "UnsupportedFamilyError",
    "WeightSearch",
    "__version__",
    "dispersion_path",
    "from_draws",
    "from_guide",
    "from_module",
    "from_numpyro",
    "from_sklearn",
    "fuse",
    "merge_modules",
    "module_axes",
    "pairwise_kl",
    "read",
    "refine",
    "register_family",
    "register_reader",
    "search_weights",
    "to_module",
    "to_numpyro",
]

# Readers and writers, each imported when it is first used: with it comes the library it reads.
_LAZY = {
    "from_draws": "draws",
    "from_guide": "pyro",
    "from_module": "module",
    "from_numpyro": "numpyro",
    "from_sklearn": "sklearn",
    "read": "registry",
    "register_reader": "registry",
    "to_module": "module",
    "to_numpyro": "numpyro",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(import_module(f"pyro_fusion.readers.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pyro_fusion' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
