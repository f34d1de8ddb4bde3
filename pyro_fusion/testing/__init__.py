# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Contracts: functions that check a family, a pooling, an assignment prior, a solver or a reader of
one's own, and raise an ``AssertionError`` that says what was expected and what came. Ours pass them
too."""

from pyro_fusion.testing.assignment_prior import check_assignment_prior
from pyro_fusion.testing.family import check_family
from pyro_fusion.testing.pooling import check_pooling
from pyro_fusion.testing.reader import check_reader
from pyro_fusion.testing.solver import check_solver

__all__ = [
    "check_assignment_prior",
    "check_family",
    "check_pooling",
    "check_reader",
    "check_solver",
]
