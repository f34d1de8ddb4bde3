# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Fusion as a Pyro program: its ELBO against F by hand, at the optimum and anywhere else."""

import copy
import pickle
import statistics

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO

from pyro_fusion import (
    FixedAtoms,
    FusionEM,
    FusionGuide,
    FusionModel,
    GroupNormPrior,
    IndianBuffetPrior,
    ParameterError,
    Posterior,
    StructureError,
    fuse,
)
from tests.families import members
from tests.program.pairs import (
    FAMILIES,
    NOISELESS,
    POOLINGS,
    SIZES,
    base,
    best_elbo,
    by_hand,
    loss,
    pair,
    perturb,
    posteriors,
    stacked,
)


def random_assignment(model, num_atoms=5):
    return {
        label: torch.cat([torch.randperm(num_atoms)[:n] for n in part.problem.sizes])
        for label, part in model.problem.parts.items()
    }


def monte_carlo(model, guide, number=60):
    draws = [loss(model, guide, Trace_ELBO()) for _ in range(number)]
    return statistics.fmean(draws), statistics.stdev(draws) / number**0.5


@pytest.fixture(params=POOLINGS)
def pooling(request):
    return request.param


class TestElboIsF:
    @pytest.mark.parametrize("family", sorted(FAMILIES))
    @pytest.mark.parametrize("pooling", NOISELESS)
    def test_without_noise_at_the_optimum(self, pooling, family):
        model, guide = pair(pooling, family)
        em = FusionEM(model, guide)
        for _ in range(2):
            now = em.step()
            assert loss(model, guide) == pytest.approx(now, rel=1e-9)
        end = em.run(2)
        again = fuse(posteriors(family), pooling, restarts=2).objective[-1]
        assert end.objective[-1] == pytest.approx(again, rel=1e-9)
        assert loss(model, guide) == pytest.approx(end.objective[-1], rel=1e-9)
        assert loss(model, guide) == loss(model, guide)
        assert by_hand(model, guide) == pytest.approx(end.objective[-1], rel=1e-9)

    @pytest.mark.parametrize("family", sorted(FAMILIES))
    def test_anywhere(self, pooling, family):
        model, guide = pair(pooling, family)
        model = FusionModel(model.problem, assignment=random_assignment(model))
        guide = FusionGuide(model)
        perturb(guide)
        truth = by_hand(model, guide)
        if pooling != "product":
            assert loss(model, guide) == pytest.approx(truth, rel=1e-9)
            return
        mean, error = monte_carlo(model, guide)
        assert abs(mean - truth) < 4 * error

    @pytest.mark.parametrize("family", ["Normal", "Gamma", "simplex"])
    def test_by_monte_carlo(self, pooling, family):
        model, guide = pair(pooling, family)
        FusionEM(model, guide).step()
        perturb(guide, 0.1)
        mean, error = monte_carlo(model, guide)
        assert abs(mean - by_hand(model, guide)) < 4 * error

    @pytest.mark.parametrize("family", sorted(FAMILIES))
    def test_of_the_product_at_the_optimum(self, family):
        # The atom is the exact posterior: each draw has the evidence, but for rounding.
        model, guide = pair("product", family)
        em = FusionEM(model, guide)
        end = [em.step() for _ in range(4)][-1]
        assert by_hand(model, guide) == pytest.approx(end, rel=1e-9)
        for _ in range(3):
            assert loss(model, guide, Trace_ELBO()) == pytest.approx(end, rel=1e-6)

    @pytest.mark.parametrize(
        "prior",
        [IndianBuffetPrior(), GroupNormPrior("auto"), FixedAtoms(3)],
        ids=str,
    )
    @pytest.mark.parametrize("pooling", NOISELESS)
    def test_of_every_prior(self, pooling, prior):
        model, guide = pair(pooling, assignment_prior=prior)
        end = FusionEM(model, guide).run(2)
        assert loss(model, guide) == pytest.approx(end.objective[-1], rel=1e-9)

    @pytest.mark.parametrize("weights", [[1.0, 2.0, 0.5], [1.0, 0.0, 1.0]], ids=str)
    def test_with_weights_and_dispersion(self, pooling, weights):
        model, guide = pair(pooling, weights=weights, dispersion=3.0)
        end = FusionEM(model, guide).run(2).objective[-1]
        assert by_hand(model, guide) == pytest.approx(end, rel=1e-9)
        assert loss(model, guide, best_elbo(pooling)) == pytest.approx(end, rel=1e-7)

    def test_of_single_precision(self, pooling):
        model, guide = pair(pooling, parties=posteriors(dtype=torch.float32))
        end = FusionEM(model, guide).run(2)
        assert loss(model, guide, best_elbo(pooling)) == pytest.approx(end.objective[-1], rel=1e-6)
        assert all(f.dtype == torch.float32 for f in end.posterior.decomposed.values())

    def test_of_two_labels(self, pooling):
        axes = {"a": "first", "b": "second"}
        parties = [
            Posterior({"a": stacked(seeds), "b": members.gamma(seeds[:2])}, axes)
            for seeds in torch.arange(9).split(3)
        ]
        prior = {"a": base()["x.y"], "b": base()["shared0"]}
        model = FusionModel(parties, pooling, prior=prior)
        guide = FusionGuide(model)
        end = FusionEM(model, guide).run(2).objective[-1]
        assert by_hand(model, guide) == pytest.approx(end, rel=1e-9)
        assert loss(model, guide, best_elbo(pooling)) == pytest.approx(end, rel=1e-7)
        nodes = set(poutine.trace(model).get_trace().nodes)
        assert {"first_assignment", "second_assignment", "local_first", "local_second"} <= nodes


class TestIsAProgram:
    def test_sites_and_plates(self, pooling):
        model, guide = pair(pooling)
        number = guide.num_atoms["component"]
        trace = poutine.trace(model).get_trace()
        shapes = trace.format_shapes()
        for name in ("component_assignment", "local_component", "x.y", "shared0", "party"):
            assert f"{name} dist" in shapes
        assert trace.nodes["component_assignment"]["value"].shape == (sum(SIZES),)
        rows = {"x.y": number, "shared0": 1} if pooling == "product" else {"x.y": 8, "shared0": 3}
        for site, n in rows.items():
            assert trace.nodes[site]["fn"].batch_shape == (n,)
        plates = {f.name for f in trace.nodes["x.y"]["cond_indep_stack"]}
        assert plates == ({"component"} if pooling == "product" else {"local_component"})
        assert ("x.y_message" in trace.nodes) == (pooling == "product")
        other = poutine.trace(guide).get_trace()
        # The guide has what the model has but the messages.
        messages = {"party", "local_component", "x.y_message", "shared0_message", "shared1_message"}
        mine, theirs = (
            {k for k, n in t.nodes.items() if n["type"] == "sample"} for t in (trace, other)
        )
        assert theirs == (mine - messages if pooling == "product" else mine)
        trace.compute_log_prob()
        other.compute_log_prob()

    def test_any_arguments(self, pooling):
        for program in pair(pooling):
            assert set(program("data", 3, size=4)) == set(program())

    def test_without_a_guide(self, pooling):
        model = FusionModel(posteriors(), pooling, prior=base())
        poutine.trace(model).get_trace().compute_log_prob()
        assert loss(model, FusionGuide(model)) < float("inf")

    def test_condition(self, pooling):
        model, _ = pair(pooling, assignment={"component": torch.arange(8)})
        value = torch.tensor([0, 1, 2, 1, 0, 2, 3, 1])
        given = poutine.condition(model, {"component_assignment": value})
        trace = poutine.trace(given).get_trace()
        trace.compute_log_prob()
        site = trace.nodes["component_assignment"]
        assert site["is_observed"] and torch.equal(site["value"], value)
        if pooling == "inclusive":
            d = trace.nodes["x.y"]["fn"]
            atoms = model.atoms.factor("x.y").index_select(0, value).distribution()
            torch.testing.assert_close(d.mean, atoms.mean)

    def test_replay(self, pooling):
        model, guide = pair(pooling)
        traced = poutine.trace(guide).get_trace()
        replayed = poutine.trace(poutine.replay(model, traced)).get_trace()
        for site in ("component_assignment", "x.y", "shared0"):
            assert torch.equal(replayed.nodes[site]["value"], traced.nodes[site]["value"])

    def test_predictive(self, pooling):
        model, guide = pair(pooling)
        alone = Predictive(model, num_samples=3)()
        both = Predictive(model, guide=guide, num_samples=3)()
        own = Predictive(guide, num_samples=3)()
        n = guide.num_atoms["component"] if pooling == "product" else 8
        for draws in (alone, both, own):
            assert draws["component_assignment"].flatten(1).shape == (3, 8)
            assert draws["x.y"].shape == (3, n, 2)
        start = guide.assignment["component"]
        for draws in (both, own):
            assert bool((draws["component_assignment"].flatten(1) == start).all())

    @pytest.mark.parametrize("pooling", NOISELESS)
    def test_two_programs_share_nothing(self, pooling):
        first, second = pair(pooling), pair(pooling)
        before = loss(*second)
        loss(*first)
        perturb(first[1])
        assert loss(*first) != pytest.approx(before)
        assert loss(*second) == before

    def test_party(self, pooling):
        model, _ = pair(pooling)
        assert model.party("component").tolist() == [0] * 3 + [1] * 2 + [2] * 3

    @pytest.mark.parametrize("local", [False, True])
    @pytest.mark.parametrize("pooling", NOISELESS)
    def test_copies(self, pooling, local):
        with pyro.settings.context(module_local_params=local):
            model, guide = pair(pooling)
            FusionEM(model, guide).step()
            value = loss(model, guide)
            for twins in (
                copy.deepcopy((model, guide)),
                pickle.loads(pickle.dumps((model, guide))),
            ):
                assert twins[1].model is twins[0] is not model
                assert loss(*twins) == pytest.approx(value, rel=1e-12)


class TestErrors:
    def test_arguments(self):
        for value in (0.0, -1.0, float("inf"), float("nan"), "one", [1.0, 2.0], torch.ones(2)):
            with pytest.raises(ParameterError, match="dispersion must be positive and finite"):
                FusionModel(posteriors(), dispersion=value)
        with pytest.raises(ParameterError, match="pooling must be one of"):
            FusionModel(posteriors(), pooling="mean")
        with pytest.raises(ParameterError, match="assignment_prior must be IndianBuffetPrior"):
            FusionModel(posteriors(), assignment_prior="product")
        with pytest.raises(StructureError, match="allows only 2 atoms"):
            FusionModel(posteriors(), assignment_prior=FixedAtoms(2))
        with pytest.raises(ParameterError, match="weight of party 1"):
            FusionModel(posteriors(), weights=[1.0, -1.0, 1.0])

    def test_identical_parties(self):
        with pytest.warns(UserWarning, match="party 0 and party 1 have identical parameters"):
            FusionModel([posteriors()[0]] * 2)
