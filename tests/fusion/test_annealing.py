# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Soft E- and M-steps."""

import pyro.distributions as dist
import pytest
import torch

from pyro_fusion import FixedAtoms, GroupNormPrior, IndianBuffetPrior
from pyro_fusion.families import Factor
from pyro_fusion.fusion.annealing import annealed, soft_barycenter
from pyro_fusion.fusion.ascent import expectation_maximization
from pyro_fusion.pooling import pooling_named
from pyro_fusion.pooling.components import Components


def problem_of(pooling):
    generator = torch.Generator().manual_seed(0)
    loc = 9 * torch.arange(3.0).repeat(4).unsqueeze(-1).double()
    loc = loc + 0.3 * torch.randn(12, 2, generator=generator, dtype=torch.float64)
    local = Factor.of(dist.Normal(loc, torch.ones_like(loc)).to_event(1))
    how = pooling_named(pooling)
    base = Factor.of(dist.Normal(torch.zeros(1, 2).double(), 20.0).to_event(1))
    weights = torch.ones(12).double()
    return Components(
        {"x": local}, (3,) * 4, weights, how, {"x": base} if how.needs_prior else {}, 2.0
    )


@pytest.mark.parametrize("pooling", ["inclusive", "exclusive", "product"])
def test_a_hard_assignment_has_the_hard_barycentre(pooling):
    problem = problem_of(pooling)
    groups = torch.arange(3).repeat(4)
    soft = torch.nn.functional.one_hot(groups).T.double()
    for name, atom in soft_barycenter(problem, soft).items():
        expected = problem.barycenter(groups, 3)[name]
        assert torch.allclose(atom.natural, expected.natural)


def test_inclusive_is_the_weighted_mixture_projected():
    problem = problem_of("inclusive")
    soft = torch.rand(2, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    atom = soft_barycenter(problem, soft)["x"]
    weights = soft / soft.sum(1, keepdim=True)
    assert torch.allclose(atom.mean, weights @ problem.local["x"].mean)


@pytest.mark.parametrize("pooling", ["inclusive", "exclusive", "product"])
@pytest.mark.parametrize("prior", [GroupNormPrior(), IndianBuffetPrior(), FixedAtoms(3)], ids=str)
def test_finds_three_well_separated_atoms(pooling, prior):
    problem = problem_of(pooling)
    # From far too many atoms, or from a poor assignment where their number is fixed.
    start = torch.arange(12) if prior.num_atoms is None else torch.tensor([0, 1, 2, 1, 2, 0] * 2)
    groups = annealed(problem, prior, start)
    result = expectation_maximization(problem, prior, groups)
    assert result.num_atoms == 3
    assert torch.equal(result.groups, result.groups[:3].repeat(4))
