# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Fuse posteriors: several parties' Pyro guides into one, without their data."""

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
from pyro_fusion.fusion.result import FusedLabel, Fusion
from pyro_fusion.nn import WeightSearch, merge_modules, search_weights
from pyro_fusion.posterior import Posterior, PosteriorGuide
from pyro_fusion.program.em import FusionEM
from pyro_fusion.program.gibbs import FusionGibbs
from pyro_fusion.program.guide import FusionGuide
from pyro_fusion.program.model import FusionModel
from pyro_fusion.readers.axes.modules import module_axes

__version__ = "0.1.0"

__all__ = [
    "DrawsError",
    "FileFormatError",
    "Fusion",
    "FusionEM",
    "FusionError",
    "FusionGibbs",
    "FusionGuide",
    "FusionModel",
    "GroupNormPrior",
    "GuideError",
    "IndianBuffetPrior",
    "FusedLabel",
    "NormalGamma",
    "NormalWishart",
    "ParameterError",
    "FixedAtoms",
    "Posterior",
    "PosteriorGuide",
    "StructureError",
    "UnsupportedFamilyError",
    "WeightSearch",
    "__version__",
    "fuse",
    "merge_modules",
    "module_axes",
    "pairwise_kl",
    "register_family",
    "search_weights",
]
