# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Trained torch networks, by Laplace's method."""

from pyro_fusion.readers.module.laplace import from_module, to_module

__all__ = ["from_module", "to_module"]
