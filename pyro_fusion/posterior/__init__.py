# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Local and fused posteriors: named sites with labelled axes, as Pyro guides, as files."""

from pyro_fusion.posterior.guide import PosteriorGuide
from pyro_fusion.posterior.posterior import Axes, Posterior

__all__ = ["Axes", "Posterior", "PosteriorGuide"]
