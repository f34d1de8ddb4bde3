# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The command ``pyro-fusion``, and its demo."""

from pyro_fusion.cli.command import main

__all__ = ["main"]
