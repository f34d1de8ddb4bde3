# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Fuse posteriors: several parties' Pyro guides into one, without their data."""

from pyro_fusion._version import __version__
from pyro_fusion.distributions import NormalGamma, NormalWishart
from pyro_fusion.em import FusionEM
from pyro_fusion.errors import (
    DrawsError,
    FileFormatError,
    FusionError,
    GuideError,
    ParameterError,
    StructureError,
    UnsupportedFamilyError,
)
from pyro_fusion.families import pairwise_kl, register_family
from pyro_fusion.fuse import fuse
from pyro_fusion.fusion_guide import FusionGuide
from pyro_fusion.gibbs import FusionGibbs
from pyro_fusion.guide import PosteriorGuide
from pyro_fusion.model import FusionModel
from pyro_fusion.nn import WeightSearch, merge_modules, search_weights
from pyro_fusion.posterior import Posterior
from pyro_fusion.priors import GroupNorm, IndianBuffet, Parametric
from pyro_fusion.readers.modules import module_axes
from pyro_fusion.result import Fusion, Matching

__all__ = [
    "DrawsError",
    "FileFormatError",
    "Fusion",
    "FusionEM",
    "FusionError",
    "FusionGibbs",
    "FusionGuide",
    "FusionModel",
    "GroupNorm",
    "GuideError",
    "IndianBuffet",
    "Matching",
    "NormalGamma",
    "NormalWishart",
    "ParameterError",
    "Parametric",
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
