# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

__version__ = "0.1.0"
