# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The reader of draws: dictionaries, MCMC of Pyro and NumPyro, ArviZ."""

from pyro_fusion.readers.draws.reading import DrawsReading, from_draws, read_draws

__all__ = ["DrawsReading", "from_draws", "read_draws"]
