# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The reader of NumPyro guides, and of the priors of NumPyro models, and the way back."""

from pyro_fusion.readers.numpyro.guides import from_numpyro
from pyro_fusion.readers.numpyro.priors import prior_from_numpyro
from pyro_fusion.readers.numpyro.writer import NumPyroGuide, to_numpyro

__all__ = ["NumPyroGuide", "from_numpyro", "prior_from_numpyro", "to_numpyro"]
