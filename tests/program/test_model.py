# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Fusion as a Pyro program: its ELBO against F by hand, at the optimum and anywhere else."""

import copy
import pickle
import statistics
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import biject_to, constraints, kl_divergence

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
from pyro_fusion.families import Factor
from pyro_fusion.pooling import Product
from tests.families import members

POOLINGS = ["exclusive", "inclusive", "product"]
NOISELESS = ["exclusive", "inclusive"]
SIZES = (3, 2, 3)


def simplex(seeds):
    return dist.TransformedDistribution(members.mvn(seeds), biject_to(constraints.simplex))


def stacked(seeds):
    return dist.Independent(members.normal(members._pair(seeds)), 1)


# name -> the factors of components from their seeds
FAMILIES = {
    "Normal": stacked,
    "MultivariateNormal": members.mvn,
    "NormalWishart": members.normal_wishart,
    "Gamma": members.gamma,
    "Dirichlet": members.dirichlet,
    "LogNormal": members.log_normal,
    "simplex": simplex,
}


def near(make, truth, seeds):
    """Components that are near those of seeds ``truth``: two thirds of their natural parameters."""
    f, g = Factor.of(make(truth)), Factor.of(make(seeds))
    return f.from_natural((2 * f.natural + g.natural) / 3).distribution()


def wide(make, size):
    """A prior wider than every component, the more so the smaller ``size``."""
    natural = Factor.of(make(torch.arange(30))).natural.mean(0, True)
    return Factor.of(make(torch.arange(1))).from_natural(size * natural)


def posteriors(family="Normal", shared=2, dtype=torch.float64, sizes=SIZES):
    result = []
    for s, n in enumerate(sizes):
        truth = torch.arange(n) + 10
        factors = {"x.y": near(FAMILIES[family], truth, torch.arange(n) + 20 * (s + 2))}
        for i in range(shared):
            factors[f"shared{i}"] = members.gamma(torch.tensor(400 + 10 * s + i))
        cast = {k: Factor.of(d).to(dtype=dtype) for k, d in factors.items()}
        result.append(Posterior(cast, {"x.y": "component"}))
    return result


def base(family="Normal", shared=2, size=0.05):
    gamma = dist.Gamma(torch.tensor(0.1).double(), torch.tensor(0.05).double())
    prior = wide(FAMILIES[family], size).distribution()
    return {"x.y": prior, **{f"shared{i}": gamma for i in range(shared)}}


def pair(
    pooling,
    family="Normal",
    assignment_prior=None,
    shared=2,
    assignment=None,
    relaxed=False,
    **settings,
):
    given = settings.pop("parties", None) or posteriors(family, shared)
    settings.setdefault("prior", base(family, shared))
    model = FusionModel(given, pooling, assignment_prior, assignment=assignment, **settings)
    guide = FusionGuide(model, relaxed=relaxed)
    return model, guide


def one(f, n):
    return f.index_select(0, torch.tensor([n]))


def site_by_hand(model, site, problem, atoms, assignment, dispersion=None):
    """The part of F of one site; ``dispersion`` tempers the messages of ``product`` if given."""
    total, prior, weights = 0.0, problem.prior.get(site), model.problem.parties.weights
    for n, (k, s) in enumerate(zip(assignment, problem.party.tolist(), strict=True)):
        atom, local = one(atoms, k), one(problem.local[site], n)
        scale = float(weights[s]) / (dispersion or 1.0)
        if prior is None:
            ends = (local, atom) if model.problem.pooling.name == "inclusive" else (atom, local)
            total += scale * kl(*ends)
            continue
        if dispersion is not None:
            local, scale = Product().temper(local, prior, weights[s : s + 1], dispersion), 1.0
        total += scale * (kl(atom, local) - kl(atom, prior))
    if prior is not None:
        total += sum(kl(one(atoms, k), prior) for k in set(assignment))
    return total


def by_hand(model, guide):
    """F from its definition, one divergence at a time."""
    total, parties = 0.0, model.problem.parties
    for label, part in model.problem.parts.items():
        assignment = guide.assignment[label].tolist()
        for site in parties.roles.matched[label]:
            rest = (guide.factor(site), assignment, part.dispersion)
            total += site_by_hand(model, site, part.messages, *rest)
        number, popularity = len(parties.posteriors), Counter(assignment)
        prior = part.assignment_prior.update(len(popularity), number)
        phi = prior.penalty(number).tolist()
        total += sum(phi[m] for m in popularity.values()) + prior.constant(number)
    for site, problem in model.problem.shared.items():
        everyone = [0] * len(parties.posteriors)
        total += site_by_hand(model, site, problem, guide.factor(site), everyone)
    return total


def kl(p, q):
    """By torch, of what is behind the bijection; of a NormalWishart by the chain rule."""
    p, q = (
        Factor(f.family, {k: v.detach() for k, v in f.params.items()}, (), f.batch_dim)
        for f in (p, q)
    )
    p, q = p.distribution(), q.distribution()
    between = members.normal_wishart_kl if "NormalWishart" in repr(type(p)) else kl_divergence
    return float(between(p, q).sum())


def perturb(guide, size=0.3):
    """Move every parameter a little, in unconstrained space."""
    owner = guide.model if guide.model.problem.pooling.name == "inclusive" else guide
    with torch.no_grad():
        for value in owner.atoms.parameters():
            value.add_(size * torch.randn_like(value))


def random_assignment(model, num_atoms=5):
    return {
        label: torch.cat([torch.randperm(num_atoms)[:n] for n in part.problem.sizes])
        for label, part in model.problem.parts.items()
    }


def loss(model, guide, elbo=None):
    return (elbo or TraceMeanField_ELBO()).loss(model, guide)


def best_elbo(pooling):
    """At the optimum without noise."""
    return Trace_ELBO() if pooling == "product" else TraceMeanField_ELBO()


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
