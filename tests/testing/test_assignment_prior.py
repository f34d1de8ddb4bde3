# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a prior of the assignment: one that is wrong in one place does not pass. That
ours pass is in tests/assignment/test_priors.py."""

import pytest
import torch

from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.testing import check_assignment_prior


class Saturating(AssignmentPrior):
    """φ(m) = 1 - 2^-m."""

    def penalty(self, num_parties):
        return 1 - 0.5 ** torch.arange(num_parties + 1, dtype=torch.float64)


class Convex(Saturating):
    def penalty(self, num_parties):
        return torch.arange(num_parties + 1, dtype=torch.float64) ** 2


class NotAtZero(Saturating):
    def penalty(self, num_parties):
        return 1 + super().penalty(num_parties)


class Short(Saturating):
    def penalty(self, num_parties):
        return super().penalty(num_parties)[1:]


class Single(Saturating):
    def penalty(self, num_parties):
        return super().penalty(num_parties).float()


class Infinite(Saturating):
    def penalty(self, num_parties):
        return super().penalty(num_parties) / 0.0


class Random(Saturating):
    def penalty(self, num_parties):
        return float(torch.rand(())) * super().penalty(num_parties)


class Falling(Saturating):
    def rank_weights(self, num_ranks, free):
        return torch.arange(num_ranks, 0, -1).double()


class Negative(Saturating):
    def rank_weights(self, num_ranks, free):
        return torch.full((num_ranks,), -1.0).double()


class Rising(Saturating):
    scale = 1.0

    def penalty(self, num_parties):
        return self.scale * super().penalty(num_parties)

    def update(self, num_atoms, num_parties):
        result = Rising()
        result.scale = self.scale + num_atoms
        return result


class Forgetful(Saturating):
    def update(self, num_atoms, num_parties):
        return None


class NoAtoms(Saturating):
    num_atoms = 0


class Endless(Saturating):
    def constant(self, num_parties):
        return float("inf")


def test_a_right_one():
    check_assignment_prior(Saturating())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Convex, r"penalty\(2\)|penalty\(7\): expected φ concave from one party on, got"),
        (NotAtZero, r"penalty\(1\): expected φ\(0\) = 0, got 1"),
        (Short, r"penalty\(1\): expected float64 \(2,\), got torch.float64 \(1,\)"),
        (Single, r"penalty\(1\): expected float64 \(2,\), got torch.float32 \(2,\)"),
        (Infinite, r"penalty\(1\): expected finite numbers"),
        (Random, r"penalty\(1\): expected the same numbers each time"),
        (Falling, r"rank_weights\(6, 3\): expected weights >= 0 that never fall, got \[6.0, 5.0"),
        (Negative, r"rank_weights\(1, 1\): expected weights >= 0"),
        (Rising, r"update\(1, 6\): expected an objective of at most 0.5, got 1.0"),
        (Forgetful, "update: expected an AssignmentPrior, got None"),
        (NoAtoms, "num_atoms: expected None or a positive integer, got 0"),
        (Endless, r"constant\(1\): expected a finite number, got inf"),
    ],
)
def test_a_wrong_one(wrong, message):
    with pytest.raises(AssertionError, match=message):
        check_assignment_prior(wrong())
