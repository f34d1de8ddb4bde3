# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Distributions that torch and Pyro lack, with their KL divergences.

Knows torch and Pyro's ``TorchDistribution``; knows nothing of fusion.
"""

from pyro_fusion.distributions.indian_buffet import FiniteIndianBuffet, IndianBuffetProcess
from pyro_fusion.distributions.matching import Matching, RelaxedMatching
from pyro_fusion.distributions.normal_gamma import NormalGamma
from pyro_fusion.distributions.normal_wishart import NormalWishart

__all__ = [
    "FiniteIndianBuffet",
    "IndianBuffetProcess",
    "Matching",
    "NormalGamma",
    "NormalWishart",
    "RelaxedMatching",
]
