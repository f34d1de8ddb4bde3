# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Relaxed assignments by gradient: SVI comes to where coordinate ascent does."""

import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO

from pyro_fusion import FusionGuide, FusionModel, GroupNorm, Posterior, fuse
from pyro_fusion.errors import StructureError


def normal(own, g):
    loc = 5 * torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()[own]
    loc = loc + 0.3 * torch.randn(loc.shape, generator=g).double()
    return dist.Normal(loc, torch.full_like(loc, 0.2)).to_event(1)


def multivariate_normal(own, g):
    covariance = 0.04 * torch.eye(3).double() + 0.02
    return dist.MultivariateNormal(normal(own, g).mean, covariance)


def dirichlet(own, g):
    simplex = torch.eye(6).double()[own] + 0.1
    noise = torch.rand(simplex.shape, generator=g).double()
    return dist.Dirichlet(1 + 50 * simplex + 5 * noise)


def parties(make):
    g = torch.Generator().manual_seed(2)
    result = []
    for s in range(5):
        own = torch.randperm(6, generator=g)[: 4 - s % 2]
        result.append(Posterior({"x": make(own, g)}, {"x": "component"}))
    return result


@pytest.mark.parametrize(
    "make, pooling",
    [(normal, "exclusive"), (multivariate_normal, "exclusive"), (dirichlet, "inclusive")],
    ids=["Normal", "MultivariateNormal", "Dirichlet"],
)
def test_svi_comes_to_where_coordinate_ascent_does(make, pooling):
    local = parties(make)
    truth = fuse(local, pooling, GroupNorm()).objective[-1]
    model = FusionModel(local, GroupNorm(), pooling)
    guide = FusionGuide(model, relaxed=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO())
    first = svi.step()
    assert first > 1.05 * truth
    for _ in range(500):
        svi.step()
    soft = guide.soft("component")
    assert soft.sum(0).sub(1).abs().max() < 1e-5
    for party in soft.split([len(p.factors["x"].mean) for p in local], 1):
        assert party.sum(1).max() < 1 + 1e-5
    guide.harden()
    for _ in range(200):
        loss = svi.step()
    assert loss == pytest.approx(truth, rel=0.01)


def test_a_relaxed_assignment_that_is_hard_has_the_same_loss():
    model = FusionModel(parties(normal))
    guide = FusionGuide(model)
    hard = TraceMeanField_ELBO().loss(model, guide)
    relaxed = FusionGuide(model, guide.assignment, relaxed=True)
    with torch.no_grad():
        relaxed.logits.component.mul_(20)
    assert TraceMeanField_ELBO().loss(model, relaxed) == pytest.approx(hard, rel=1e-6)
    relaxed.harden()
    assert torch.equal(relaxed.assignment["component"], guide.assignment["component"])
    assert TraceMeanField_ELBO().loss(model, relaxed) == pytest.approx(hard, rel=1e-9)


@pytest.mark.parametrize(
    "assignment, match",
    [
        ({"topic": torch.arange(18)}, r"expected an assignment for \['component'\]"),
        ({"component": torch.arange(5)}, r"shape \[18\], got torch.int64 of shape \[5\]"),
        ({"component": torch.rand(18)}, "expected a LongTensor"),
        ({"component": torch.zeros(18).long()}, r"party 0: expected a different atom .* got \[0,"),
    ],
)
def test_bad_assignments(assignment, match):
    with pytest.raises(StructureError, match=match):
        FusionGuide(FusionModel(parties(normal)), assignment)


@pytest.mark.parametrize("name", ["party", "component_assignment", "local_component"])
def test_names_that_the_program_needs(name):
    local = [Posterior({name: p.factors["x"]}, {name: "component"}) for p in parties(normal)]
    with pytest.raises(StructureError, match=f"site '{name}' has a name that the program"):
        FusionModel(local)


def test_the_state_has_the_assignment():
    model = FusionModel(parties(normal))
    first = FusionGuide(model)
    sizes = model.parts["component"].problem.sizes
    other = FusionGuide(model, {"component": torch.cat([torch.arange(n) for n in sizes])})
    assert not torch.equal(other.assignment["component"], first.assignment["component"])
    again = torch.load(_saved(first), weights_only=True)
    other.set_extra_state(again["_extra_state"])
    assert torch.equal(other.assignment["component"], first.assignment["component"])


def _saved(guide):
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    return file
