# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""``python -m pyro_fusion``: the command, where it is not on the path."""

import sys

from pyro_fusion.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
