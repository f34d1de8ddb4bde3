# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The whole way from local posteriors to one: read, checked, assigned, pooled."""

from pyro_fusion.fusion.fuse import fuse
from pyro_fusion.fusion.problem import FusionProblem
from pyro_fusion.fusion.result import FusedLabel, Fusion, StopReason
from pyro_fusion.fusion.search import search

__all__ = ["FusedLabel", "Fusion", "FusionProblem", "StopReason", "fuse", "search"]
