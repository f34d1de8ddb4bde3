# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Merging networks: fusion of the posteriors around their parameters, and modules as results."""

from pyro_fusion.nn.alignment import align
from pyro_fusion.nn.merging import merge_modules
from pyro_fusion.nn.search import WeightSearch, search_weights

__all__ = ["WeightSearch", "align", "merge_modules", "search_weights"]
