# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A fusion refined by the model that the parties fitted, without them."""

from pyro_fusion.program.refining.refine import Refinement, refine

__all__ = ["Refinement", "refine"]
