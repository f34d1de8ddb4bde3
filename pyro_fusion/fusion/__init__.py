# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The whole way from local posteriors to one: read, checked, assigned, pooled."""

from pyro_fusion.fusion.fuse import fuse
from pyro_fusion.fusion.result import FusedLabel, Fusion

__all__ = ["Fusion", "FusedLabel", "fuse"]
