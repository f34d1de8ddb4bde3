# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The reader of Pyro guides and the priors of Pyro models; ``guides.py`` says what is exact."""

from pyro_fusion.readers.pyro.guides import check_is_pyro, from_guide
from pyro_fusion.readers.pyro.priors import prior_from_guide, prior_from_model
from pyro_fusion.readers.pyro.sharing import check_not_shared

__all__ = [
    "check_is_pyro",
    "check_not_shared",
    "from_guide",
    "prior_from_guide",
    "prior_from_model",
]
