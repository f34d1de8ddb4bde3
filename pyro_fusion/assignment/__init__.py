# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""The E-step: costs and a prior in, an assignment out. Pure tensor code.

Minimised over assignments in which each component has one atom and no two components of a party
share one:

.. math:: F = \sum_s \sum_l C_s[k_{sl}, l] + \sum_k w_k \varphi(m_k) + \sum_{k: m_k > 0} o_k

``C_s`` are the divergences over the dispersion, ``m_k`` is the number of parties that have atom
``k``, ``w_k`` the prior's weight of its rank by falling popularity (1 but for the rank weights of
``GroupNormPrior``), ``o_k`` an opening cost. A component may also have a new atom of its own, at
the cost ``w φ(1)`` alone, unless the prior fixes the number of atoms.

Every solver takes ``cost`` (per party ``[K, L_s]``; ``inf`` forbids a pair), a prior, and by
keyword ``opening`` (``[K]``), ``start`` (an assignment) and its own settings.
"""

from pyro_fusion.assignment.coordinate import coordinate, match
from pyro_fusion.assignment.indian_buffet import FiniteIndianBuffet, IndianBuffetProcess
from pyro_fusion.assignment.joint_matching import JointMatching
from pyro_fusion.assignment.matching import Matching, RelaxedMatching
from pyro_fusion.assignment.priors import (
    AssignmentPrior,
    FixedAtoms,
    GroupNormPrior,
    IndianBuffetPrior,
)
from pyro_fusion.assignment.problem import NEW, Assignment, AssignmentProblem, assignment_objective
from pyro_fusion.assignment.relaxed import RelaxedAssignment, relaxed
from pyro_fusion.assignment.sinkhorn import SoftAssignment, sinkhorn, soft_assignment

__all__ = [
    "NEW",
    "Assignment",
    "AssignmentPrior",
    "AssignmentProblem",
    "FiniteIndianBuffet",
    "GroupNormPrior",
    "IndianBuffetPrior",
    "IndianBuffetProcess",
    "JointMatching",
    "Matching",
    "FixedAtoms",
    "RelaxedAssignment",
    "RelaxedMatching",
    "SoftAssignment",
    "assignment_objective",
    "coordinate",
    "match",
    "relaxed",
    "sinkhorn",
    "soft_assignment",
]
