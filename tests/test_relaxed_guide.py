# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Relaxed assignments by gradient: SVI comes to where coordinate ascent does."""

import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO

from pyro_fusion import FusionGuide, FusionModel, GroupNorm, Parametric, Posterior, fuse
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
        relaxed.logits.label0.mul_(20)
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


@pytest.mark.parametrize("name", ["component_assignment", "local_component"])
def test_names_that_the_program_needs(name):
    local = [Posterior({name: p.factors["x"]}, {name: "component"}) for p in parties(normal)]
    assert fuse(local).num_atoms == 6  # which needs no program
    with pytest.raises(StructureError, match=f"site '{name}' has a name that the program"):
        FusionModel(local)()


def test_names_that_only_some_programs_need():
    local = [Posterior({"party": p.factors["x"]}, {"party": "party"}) for p in parties(normal)]
    assert "party" in FusionModel(local)()
    base = {"party": dist.Normal(torch.zeros(3).double(), 20.0).to_event(1)}
    assert fuse(local, "product", base=base).num_atoms == 6
    with pytest.raises(StructureError, match="site 'party' has a name that the program"):
        FusionModel(local, pooling="product", base=base)()


@pytest.mark.parametrize("label", ["a.b", "train", "parameters"])
def test_labels_that_are_no_attributes(label):
    local = [Posterior({"x": p.factors["x"]}, {"x": label}) for p in parties(normal)]
    guide = FusionGuide(FusionModel(local), relaxed=True)
    assert guide.soft(label).shape[1] == 18
    guide.harden()


def test_no_more_atoms_than_the_prior_allows():
    model = FusionModel(parties(normal), Parametric(6))
    with pytest.raises(StructureError, match="the prior allows 6 atoms, got 18"):
        FusionGuide(model, {"component": torch.arange(18)})


def test_svi_mends_a_party_that_is_matched_wrongly():
    local = parties(normal)
    fusion = fuse(local)
    wrong = [a.clone() for a in fusion.assignment]
    wrong[0] = wrong[0].roll(1)
    model = FusionModel(local)
    guide = FusionGuide(model, {"component": torch.cat(wrong)}, relaxed=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO())
    for _ in range(500):
        svi.step()
    guide.harden()
    for _ in range(200):
        loss = svi.step()
    assert loss == pytest.approx(fusion.objective[-1], rel=0.01)


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


@pytest.mark.cuda
@pytest.mark.parametrize("pooling", ["exclusive", "inclusive"])
def test_the_program_on_the_gpu(pooling):
    local = []
    for s, p in enumerate(parties(normal)):
        noise = dist.Gamma(torch.tensor(3.0 + s).double(), torch.tensor(2.0).double())
        factors = {"x": p.factors["x"], "noise": noise}
        local.append(Posterior(factors, {"x": "component"}).to(device="cuda"))
    model = FusionModel(local, pooling=pooling)
    guide = FusionGuide(model, relaxed=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO())
    losses = [svi.step() for _ in range(20)]
    assert losses[-1] < losses[0]
    guide.harden()
    assert svi.step() == pytest.approx(TraceMeanField_ELBO().loss(model, guide), rel=0.1)
