# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The guide: relaxed assignments by gradient, its state, batches of particles."""

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch.nn.functional import one_hot

from pyro_fusion import (
    FixedAtoms,
    FusionEM,
    FusionGuide,
    FusionModel,
    GroupNormPrior,
    IndianBuffetPrior,
    Posterior,
    fuse,
)
from pyro_fusion.errors import ParameterError, StructureError
from pyro_fusion.families import Factor
from tests.program.pairs import (
    POOLINGS,
    base,
    best_elbo,
    by_hand,
    loss,
    pair,
    perturb,
    posteriors,
    stacked,
)


def normal(own, g):
    loc = 5 * torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()[own]
    loc = loc + 0.3 * torch.randn(loc.shape, generator=g).double()
    return dist.Normal(loc, torch.full_like(loc, 0.2)).to_event(1)


def gamma(own, g):
    shape = torch.tensor([2.0, 5.0, 20.0, 60.0, 5.0, 100.0]).double()[own]
    rate = torch.tensor([1.0, 1.0, 2.0, 2.0, 10.0, 1.0]).double()[own]
    return dist.Gamma(shape * (1 + 0.1 * torch.rand(shape.shape, generator=g).double()), rate)


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


def svi(local, pooling, assignment, steps):
    """The loss of SVI from an assignment, relaxed and then hard."""
    pyro.clear_param_store()
    model = FusionModel(local, pooling, GroupNormPrior(), assignment={"component": assignment})
    guide = FusionGuide(model, relaxed=True)
    infer = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO())
    for _ in range(steps):
        infer.step()
    soft = guide.soft("component")
    assert soft.sum(0).sub(1).abs().max() < 1e-5
    for party in model.problem.parts["component"].problem.split(soft):
        assert party.sum(1).max() < 1 + 1e-5
    guide.harden()
    for _ in range(steps // 2):
        infer.step()
    return infer.evaluate_loss()


def test_a_guide_of_no_model():
    with pytest.raises(ParameterError, match="expected a FusionModel, got list"):
        FusionGuide([])


@pytest.mark.parametrize(
    "make, pooling, steps",
    [(normal, "exclusive", 200), (gamma, "exclusive", 400), (dirichlet, "inclusive", 200)],
    ids=["Normal", "Gamma", "Dirichlet"],
)
def test_svi_comes_to_where_coordinate_ascent_does(make, pooling, steps):
    """From assignments at random, to too many atoms: one of three does, as of any mixture."""
    local = parties(make)
    truth = fuse(local, pooling, GroupNormPrior()).objective[-1]
    g = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(3):
        start = torch.cat(
            [torch.randperm(8, generator=g)[: len(p.factors["x"].mean)] for p in local]
        )
        begin = {"component": start}
        model = FusionModel(local, pooling, GroupNormPrior(), assignment=begin)
        assert loss(model, FusionGuide(model)) > 1.5 * truth
        losses.append(svi(local, pooling, start, steps))
        if losses[-1] < 1.01 * truth:
            break
    assert min(losses) == pytest.approx(truth, rel=0.01)


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
    assert fuse(local, "product", prior=base).num_atoms == 6
    with pytest.raises(StructureError, match="site 'party' has a name that the program"):
        FusionModel(local, pooling="product", prior=base)()


@pytest.mark.parametrize("label", ["a.b", "train", "parameters"])
def test_labels_that_are_no_attributes(label):
    local = [Posterior({"x": p.factors["x"]}, {"x": label}) for p in parties(normal)]
    guide = FusionGuide(FusionModel(local), relaxed=True)
    assert guide.soft(label).shape[1] == 18
    guide.harden()


def test_no_more_atoms_than_the_prior_allows():
    model = FusionModel(parties(normal), assignment_prior=FixedAtoms(6))
    with pytest.raises(StructureError, match="the assignment prior allows 6 atoms, got 18"):
        FusionGuide(model, {"component": torch.arange(18)})


def test_svi_mends_a_party_that_is_matched_wrongly():
    local = parties(normal)
    fusion = fuse(local)
    wrong = [a.clone() for a in fusion.assignment]
    wrong[0] = wrong[0].roll(1)
    assert svi(local, "exclusive", torch.cat(wrong), 200) == pytest.approx(
        fusion.objective[-1], rel=0.01
    )


def svi_step(model, guide, elbo=None):
    return SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo or Trace_ELBO()).step()


@pytest.mark.parametrize("pooling", POOLINGS)
class TestState:
    def test_state(self, pooling):
        model, guide = pair(pooling)
        owner = model if pooling == "inclusive" else guide
        file = io.BytesIO()
        torch.save(owner.state_dict(), file)
        file.seek(0)
        before = guide.factor("x.y").distribution().mean.detach().clone()
        perturb(guide)
        owner.load_state_dict(torch.load(file))
        torch.testing.assert_close(guide.factor("x.y").distribution().mean, before)

    @pytest.mark.parametrize("relaxed", [False, True])
    def test_state_of_another_number_of_atoms(self, pooling, relaxed):
        one = {"component": torch.tensor([0, 1, 2, 1, 0, 2, 3, 1])}
        model, guide = pair(
            pooling, assignment_prior=IndianBuffetPrior(), assignment=one, relaxed=relaxed
        )
        perturb(guide)
        torch.manual_seed(0)
        expected = loss(model, guide, best_elbo(pooling))
        file = io.BytesIO()
        torch.save((model.state_dict(), guide.state_dict()), file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
        for other in ({"component": torch.arange(8)}, None):
            model, guide = pair(
                pooling, assignment_prior=IndianBuffetPrior(), assignment=other, relaxed=relaxed
            )
            model.load_state_dict(states[0])
            guide.load_state_dict(states[1])
            assert torch.equal(guide.assignment["component"], one["component"])
            assert guide.factor("x.y").batch_shape == (4,)
            torch.manual_seed(0)
            assert loss(model, guide, best_elbo(pooling)) == pytest.approx(expected, rel=1e-9)
            assert svi_step(model, guide) < float("inf")

    def test_state_that_does_not_fit(self, pooling):
        model, guide = pair(pooling)
        owner = model if pooling == "inclusive" else guide
        state = owner.state_dict()
        name = next(k for k in state if k.endswith("loc_unconstrained"))
        state[name] = torch.zeros(4, 3)  # of another event shape
        with pytest.raises(RuntimeError, match="size mismatch"):
            owner.load_state_dict(state)

    def test_guides_side_by_side(self, pooling):
        model, guide = pair(pooling, assignment={"component": torch.arange(8)})
        start, held = dict(model.assignment), dict(vars(model))
        before = loss(model, guide, best_elbo(pooling))
        mixed = {"component": torch.tensor([0, 1, 2, 0, 1, 0, 1, 2])}
        if pooling == "inclusive":  # whose atoms are the model's: eight of them
            with pytest.raises(StructureError, match="has 3 atoms, but its model 8, of another"):
                FusionGuide(model, mixed)
            mixed = {"component": torch.tensor([3, 1, 2, 4, 5, 6, 7, 0])}
        state = {name: value.clone() for name, value in model.state_dict().items()}
        other = FusionGuide(model, mixed)
        assert other.factor("x.y").batch_shape == (len(mixed["component"].unique()),)
        assert loss(model, other, best_elbo(pooling)) == pytest.approx(
            by_hand(model, other), rel=1e-7
        )
        assert loss(model, guide, best_elbo(pooling)) == pytest.approx(before, rel=1e-9)
        relaxed = FusionGuide(model, relaxed=True)
        assert loss(model, relaxed) < float("inf")
        assert loss(model, guide, best_elbo(pooling)) == pytest.approx(before, rel=1e-9)
        relaxed.harden()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert vars(model).keys() == held.keys()
        assert all(vars(model)[name] is value for name, value in held.items())
        assert model.assignment.keys() == start.keys()
        assert all(model.assignment[label] is value for label, value in start.items())


@pytest.mark.parametrize("pooling", POOLINGS)
class TestBatches:
    @pytest.mark.parametrize("relaxed", [False, True])
    def test_vectorized_particles(self, pooling, relaxed):
        model, guide = pair(pooling, relaxed=relaxed)
        for elbo in (Trace_ELBO, TraceMeanField_ELBO):
            draws = torch.tensor([loss(model, guide, elbo()) for _ in range(100)])
            many = {"num_particles": 400, "max_plate_nesting": 1}
            together = loss(model, guide, elbo(vectorize_particles=True, **many))
            error = float(draws.std()) * (1 / 100 + 1 / 400) ** 0.5
            expected = float(draws.double().mean())
            assert together == pytest.approx(expected, rel=1e-6, abs=5 * error)
        elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
        assert svi_step(model, guide, elbo) < float("inf")

    def test_parallel_predictive(self, pooling):
        model, guide = pair(pooling)
        number = guide.num_atoms["component"] if pooling == "product" else 8
        alone = Predictive(model, num_samples=4, parallel=True)()
        assert alone["x.y"].shape == (4, number, 2)
        assert len(alone["component_assignment"].flatten(1).unique(dim=0)) > 1
        one, many = (
            Predictive(model, guide=guide, num_samples=100, parallel=parallel)()
            for parallel in (False, True)
        )
        assert many["x.y"].shape == one["x.y"].shape == (100, number, 2)
        error = one["x.y"].std(0) / 10
        assert bool(((one["x.y"].mean(0) - many["x.y"].mean(0)).abs() < 6 * error).all())

    @pytest.mark.parametrize("parallel", [False, True])
    def test_predictive_of_other_forms_than_the_models(self, pooling, parallel):
        model, guide = pair(pooling, relaxed=True)
        draws = Predictive(guide, num_samples=3, parallel=parallel)()
        assert draws["component_assignment"].shape == (3, 1, guide.num_atoms["component"], 8)
        guide.harden()
        draws = Predictive(model, guide=guide, num_samples=3, parallel=parallel)()
        assert draws["component_assignment"].shape == (3, 1, 8)
        if pooling == "product":
            other = {"component": torch.arange(8)}
            guide = FusionGuide(model, other)
            model = FusionModel(model.problem, assignment=guide.assignment)
            draws = Predictive(model, guide=guide, num_samples=3, parallel=parallel)()
            assert draws["x.y"].shape == (3, 8, 2)

    def test_plates_around_the_program(self, pooling):
        _, guide = pair(pooling)
        # Of a parameter in a plate Pyro itself says so.
        match = "leave dim -1|Inside pyro.plate"
        with pyro.plate("outer", 4, dim=-1), pytest.raises(ValueError, match=match):
            guide()


@pytest.mark.parametrize("pooling", POOLINGS)
class TestTurns:
    """SVI, coordinate ascent and loading in any order."""

    def test_svi_after_the_number_of_atoms_has_changed(self, pooling):
        model, guide = pair(pooling, assignment={"component": torch.arange(8)})
        svi_step(model, guide)
        before = FusionEM(model, guide).step()
        assert guide.num_atoms["component"] < 8
        assert svi_step(model, guide) < float("inf")  # with a new optimizer
        model = FusionModel(model.problem, assignment={"component": torch.arange(8)})
        many = FusionGuide(model)
        state = copy.deepcopy((model.state_dict(), many.state_dict()))
        FusionEM(model, many).run()
        svi_step(model, many)
        model.load_state_dict(state[0])
        many.load_state_dict(state[1])
        assert svi_step(model, many) > before

    def test_coordinate_ascent_moves_all_that_svi_does(self, pooling):
        model, guide = pair(pooling)
        for _ in range(5):
            SVI(model, guide, pyro.optim.Adam({"lr": 0.5}), Trace_ELBO()).step()
        for infer in (FusionEM(model, guide).step, FusionEM(model, guide).run):
            perturb(guide)
            end = infer()
            end = end if isinstance(end, float) else end.objective[-1]
            assert loss(model, guide, best_elbo(pooling)) == pytest.approx(end, rel=1e-9)

    def test_atoms_that_nobody_has_after_rounding_count_for_nothing(self, pooling):
        model, guide = pair(pooling, assignment_prior=IndianBuffetPrior())
        truth = FusionEM(model, guide).run()
        model = FusionModel(model.problem, assignment={"component": torch.arange(8)})
        guide = FusionGuide(model, relaxed=True)
        with torch.no_grad():
            wanted = one_hot(torch.cat(truth.assignment), 8).double()
            guide.logits.label0_unconstrained.copy_(50 * wanted)
        guide.harden()
        assert guide.num_atoms["component"] == 8 > truth.num_atoms
        assert loss(model, guide) < float("inf")
        expected = truth.labels["component"].assignment_prior.mass
        replayed = pyro.poutine.replay(model, pyro.poutine.trace(guide).get_trace())
        site = pyro.poutine.trace(replayed).get_trace().nodes["component_assignment"]
        assert site["fn"].prior.mass == pytest.approx(expected)

    def test_the_atoms_of_a_model_that_was_loaded(self, pooling):
        small, _ = pair(pooling, assignment={"component": torch.tensor([0, 1, 2, 0, 1, 1, 0, 3])})
        large, _ = pair(pooling, assignment={"component": torch.arange(8)})
        large.load_state_dict(small.state_dict())
        number = 4 if pooling == "inclusive" else 8
        assert large()["component_assignment"].max() < number

    def test_states_that_do_not_fit_change_nothing(self, pooling):
        _, guide = pair(pooling, assignment={"component": torch.arange(8)})
        state = copy.deepcopy(guide.state_dict())
        for bad, match in [
            ({"topic": torch.arange(8)}, r"expected an assignment for \['component'\]"),
            ({"component": torch.arange(7)}, r"expected a LongTensor of shape \[8\]"),
            ({"component": torch.tensor([0, 1, 0, 2, 3, 0, 1, 2])}, "party 0: expected a differ"),
        ]:
            state["_extra_state"] = {"assignment": bad, "num_atoms": {}, "relaxed": False}
            with pytest.raises(StructureError, match=match):
                guide.load_state_dict(state)
            assert torch.equal(guide.assignment["component"], torch.arange(8))
            assert guide.factor("x.y").batch_shape == (8,)

    def test_relaxed_states_into_others(self, pooling):
        assignment = {"component": torch.tensor([0, 1, 2, 1, 0, 2, 0, 1])}
        for before, after in ((True, False), (False, True)):
            model, guide = pair(pooling, assignment=assignment, relaxed=before)
            state = copy.deepcopy(guide.state_dict())
            other = FusionGuide(model, assignment, relaxed=after)
            other.load_state_dict(state)
            assert other.relaxed == before
            torch.manual_seed(0)
            expected = loss(model, guide)
            torch.manual_seed(0)
            assert loss(model, other) == pytest.approx(expected)
            guide.harden()
            FusionGuide(model, assignment).load_state_dict(guide.state_dict())


def test_states_go_by_label():
    first = torch.arange(3)
    local = [
        {"a": Factor.of(stacked(torch.arange(3) + 9 * s)), "b": Factor.of(stacked(first + 5 * s))}
        for s in range(2)
    ]
    axes = {"a": "first", "b": "second"}
    turned = [{"b": f["b"], "a": f["a"]} for f in local]
    one, two = (FusionModel([Posterior(f, axes) for f in fs]) for fs in (local, turned))
    assignment = {
        "first": torch.tensor([0, 1, 2, 0, 1, 2]),
        "second": torch.tensor([0, 1, 2, 2, 1, 0]),
    }
    assert list(one.problem.parts) != list(two.problem.parts)
    guide, other = FusionGuide(one, assignment, relaxed=True), FusionGuide(two, relaxed=True)
    other.load_state_dict(guide.state_dict())
    other.harden()
    assert {k: v.tolist() for k, v in other.assignment.items()} == {
        k: v.tolist() for k, v in assignment.items()
    }


class TestOwnPrograms:
    """With what a tutorial has them draw, in batches."""

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_vectorized(self, pooling):
        class Model(FusionModel):
            def assignment_prior(self, label):
                return IndianBuffetPrior(alpha=pyro.sample("alpha", dist.Gamma(5.0, 5.0)))

            def scale(self, label):
                if label is None or pooling == "product":
                    return super().scale(label)
                trust = pyro.sample("trust", dist.Gamma(torch.full((3,), 9.0), 9.0).to_event(1))
                return super().scale(label) * trust[..., self.party(label)]

        class Guide(FusionGuide):
            def forward(self):
                pyro.sample("alpha", dist.Gamma(6.0, 6.0))
                return super().forward()

            def scale(self, label):
                if label is None or pooling == "product":
                    return FusionModel.scale(self.model, label)
                trust = pyro.sample("trust", dist.Gamma(torch.full((3,), 7.0), 9.0).to_event(1))
                return FusionModel.scale(self.model, label) * trust[..., self.model.party(label)]

        model = Model(posteriors(), pooling, prior=base())
        guide = Guide(model)
        draws = torch.tensor([loss(model, guide, Trace_ELBO()) for _ in range(200)])
        many = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
        error = float(draws.std()) * (1 / 200 + 1 / 1000) ** 0.5
        assert loss(model, guide, many) == pytest.approx(float(draws.mean()), abs=5 * error)
        draws = Predictive(model, guide=guide, num_samples=5, parallel=True)()
        assert draws["alpha"].shape[0] == 5 and draws["x.y"].shape[0] == 5

    def test_conditions_that_do_not_fit(self):
        model, _ = pair("exclusive")
        for value, match in [
            (
                torch.arange(5) % 3,
                r"label 'component': expected an assignment, integers of shape \[8\]",
            ),
            (torch.rand(8), "got torch.float32 of shape"),
            (torch.tensor([0, 1, 99, 0, 1, 0, 1, 2]), "expected atoms from 0 to .*, got 99"),
        ]:
            with pytest.raises(StructureError, match=match):
                pyro.poutine.condition(model, {"component_assignment": value})()

    def test_in_single_precision(self):
        model, guide = pair("exclusive", relaxed=True)
        assert svi_step(model, guide.float()) < float("inf")

    def test_with_local_parameters(self):
        with pyro.settings.context(module_local_params=True):
            model, guide = pair("exclusive", relaxed=True)
            assert svi_step(model, guide) < float("inf")
