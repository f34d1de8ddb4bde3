# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Finding which axes have a label: hidden units and other components whose order means nothing."""

from pyro_fusion.readers.axes.modules import module_axes

__all__ = ["module_axes"]
