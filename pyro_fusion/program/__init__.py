# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Fusion as a Pyro program: model, guide, and inference on them."""

from pyro_fusion.program.em import FusionEM
from pyro_fusion.program.gibbs import FusionGibbs
from pyro_fusion.program.guide import FusionGuide
from pyro_fusion.program.model import FusionModel

__all__ = ["FusionEM", "FusionGibbs", "FusionGuide", "FusionModel"]
