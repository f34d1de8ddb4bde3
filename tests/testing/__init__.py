# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

