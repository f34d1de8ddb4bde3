# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Finding the axes of hidden units and other components whose order means nothing: their labels."""

from pyro_fusion.readers.axes.modules import module_axes

__all__ = ["module_axes"]
