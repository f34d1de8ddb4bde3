# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Inference in closed form: F never rises, and run() is fuse()."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from pyro_fusion import (
    FixedAtoms,
    FusionEM,
    FusionGuide,
    FusionModel,
    GroupNormPrior,
    IndianBuffetPrior,
    ParameterError,
    Posterior,
    fuse,
)
from pyro_fusion.assignment import NEW, Assignment
from pyro_fusion.fusion.ascent import expectation_maximization
from tests.fusion import networks
from tests.fusion.parties import BASE, HOLDS, parties, same_grouping
from tests.program.pairs import NOISELESS, base, by_hand, loss, pair, perturb, posteriors

POOLINGS = ["exclusive", "inclusive", "product"]
SIZES = [len(h) for h in HOLDS]


def random_assignment(seed, num_atoms=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(num_atoms, generator=generator)[:n] for n in SIZES])


def program(pooling, prior=None, start=None, local=None, **settings):
    start = None if start is None else {"component": start}
    parts = local or parties(1.5)
    model = FusionModel(parts, pooling, prior, prior=BASE, assignment=start, **settings)
    return model, FusionGuide(model)


def grouping(assignment):
    return assignment[:, None] == assignment


@pytest.fixture(params=POOLINGS)
def pooling(request):
    return request.param


class TestStep:
    @pytest.mark.parametrize(
        "prior",
        [IndianBuffetPrior(), IndianBuffetPrior(2.0), GroupNormPrior(), FixedAtoms(7)],
        ids=str,
    )
    def test_never_raises_the_loss(self, pooling, prior):
        model, guide = program(pooling, prior, random_assignment(0))
        em = FusionEM(model, guide)
        losses = [em.step() for _ in range(8)]
        assert all(type(loss) is float for loss in losses)
        assert all(b <= a for a, b in itertools.pairwise(losses))
        assert losses[-1] == losses[-2]

    def test_goes_where_coordinate_ascent_goes(self, pooling):
        start = random_assignment(3)
        model, guide = program(pooling, start=start)
        part = model.problem.parts["component"]
        direct = expectation_maximization(part.ordered, part.assignment_prior, start[part.order])
        em = FusionEM(model, guide)
        shared = model.problem.shared_objective
        losses = [em.step() for _ in range(len(direct.objective))]
        trace = direct.objective[1:] + direct.objective[-1:]
        assert losses == pytest.approx([f + shared for f in trace], rel=1e-12)
        end = guide.assignment["component"]
        assert torch.equal(grouping(end), grouping(part.as_given(direct.groups)))

    def test_finds_what_is_there(self, pooling):
        model, guide = program(pooling, local=parties())
        em = FusionEM(model, guide)
        while em.step() > (now := em.step()):
            pass
        assert now == em.step()
        assert same_grouping(guide.assignment["component"].split(SIZES), HOLDS)
        best = fuse(parties(), pooling, prior=BASE)
        assert now == pytest.approx(best.objective[-1], rel=1e-9)

    @pytest.mark.parametrize("same", [False, True])
    def test_begins_where_the_guide_was_put(self, pooling, same):
        model, guide = program(pooling)
        em = FusionEM(model, guide)
        for _ in range(5):
            em.step()
        groups = random_assignment(5)
        if same:
            groups = guide.assignment["component"]
        groups = torch.unique(groups, return_inverse=True)[1]
        number = int(groups.max()) + 1
        problem = model.problem.parts["component"].problem
        for x in (model, guide):
            x.move({"component": groups}, problem.barycenter(groups, number))
        assert guide.num_atoms["component"] == number
        other_model, other = program(pooling, start=groups)
        assert em.step() == pytest.approx(FusionEM(other_model, other).step(), rel=1e-12)
        assert torch.equal(guide.assignment["component"], other.assignment["component"])

    def test_leaves_the_atoms_of_its_assignment_in_the_guide(self, pooling):
        model, guide = program(pooling, start=random_assignment(2))
        FusionEM(model, guide).step()
        problem, groups = model.problem.parts["component"].problem, guide.assignment["component"]
        atoms = problem.barycenter(groups, guide.num_atoms["component"])
        for site, f in atoms.items():
            for name, value in f.params.items():
                torch.testing.assert_close(guide.factor(site).params[name].detach(), value)

    def test_learns_the_mass_of_the_buffet(self):
        model, guide = program("product", start=random_assignment(2))
        FusionEM(model, guide).step()
        number = guide.num_atoms["component"]
        replayed = poutine.replay(model, poutine.trace(guide).get_trace())
        site = poutine.trace(replayed).get_trace().nodes["component_assignment"]
        prior = site["fn"].prior
        harmonic = sum(1 / (s + 1) for s in range(len(SIZES)))
        assert prior.mass == pytest.approx(number / (1 + harmonic))

    def test_permuted_parties(self, pooling):
        order = [2, 0, 3, 1]
        model, guide = program(pooling)
        moved, other = program(pooling, local=[parties(1.5)[s] for s in order])
        losses = [[FusionEM(*p).step() for _ in range(3)] for p in ((model, guide), (moved, other))]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        here = guide.assignment["component"].split(SIZES)
        there = other.assignment["component"].split([SIZES[s] for s in order])
        moved_here = torch.cat([here[s] for s in order])
        assert torch.equal(grouping(moved_here), grouping(torch.cat(there)))

    def test_one_party(self, pooling):
        (one, *_) = parties()
        model, guide = program(pooling, local=[one])
        loss = FusionEM(model, guide).step()
        matching = fuse([one], pooling, prior=BASE).only_label()
        shared = model.problem.shared_objective
        assert loss - shared == pytest.approx(matching.objective[-1], rel=1e-9)


class TestRun:
    @pytest.mark.parametrize("seed", [0, 3])
    @pytest.mark.parametrize("prior", [None, GroupNormPrior(2.0), FixedAtoms(5)], ids=str)
    def test_is_fuse(self, pooling, prior, seed):
        given = {"weights": [1.0, 2.0, 1.0, 0.5], "dispersion": 4.0}
        model, guide = program(pooling, prior, **given)
        ours = FusionEM(model, guide).run(3, 50, seed=seed)
        given |= {"seed": seed, "restarts": 3, "max_iterations": 50}
        theirs = fuse(parties(1.5), pooling, prior, prior=BASE, **given)
        assert ours.objective == theirs.objective
        assert ours.only_label().restarts == theirs.only_label().restarts
        for a, b in zip(ours.assignment, theirs.assignment, strict=True):
            assert torch.equal(a, b)
        for site, f in theirs.posterior.decomposed.items():
            for name, value in f.params.items():
                assert torch.equal(ours.posterior.decomposed[site].params[name], value)

    @pytest.mark.parametrize("seed", [0, 5])
    def test_is_fuse_where_labels_share_sites(self, pooling, seed):
        local, _ = networks.parties(seed, sizes=((3, 2), (2, 3), (3, 3)), num_units=(4, 3))
        given = {"prior": networks.BASE, "weights": [1.0, 2.0, 0.5]}
        model = FusionModel(local, pooling, **given)
        ours = FusionEM(model, FusionGuide(model)).run(2, seed=seed)
        theirs = fuse(local, pooling, **given, restarts=2, seed=seed)
        assert ours.objective == theirs.objective
        for label, one in theirs.labels.items():
            assert ours.labels[label].restarts == one.restarts
            assert torch.equal(torch.cat(ours.labels[label].assignment), torch.cat(one.assignment))
        for site, f in theirs.posterior.decomposed.items():
            for name, value in f.params.items():
                assert torch.equal(ours.posterior.decomposed[site].params[name], value)

    def test_leaves_the_guide_at_the_best(self, pooling):
        model, guide = program(pooling)
        fusion = FusionEM(model, guide).run(3)
        assert torch.equal(guide.assignment["component"], torch.cat(fusion.assignment))
        assert guide.num_atoms["component"] == fusion.num_atoms
        assert guide.factor("loc").batch_shape == (fusion.num_atoms,)
        if pooling == "product":
            return  # whose atoms are pooled from messages that are not tempered
        mean = guide.factor("loc").distribution().mean.detach()
        torch.testing.assert_close(mean, fusion.posterior.factors["loc"].mean)
        loss = TraceMeanField_ELBO().loss(model, guide)
        assert loss == pytest.approx(fusion.objective[-1], rel=1e-9)

    def test_of_no_restarts_begins_at_the_guide(self, pooling):
        start = random_assignment(4)
        model, guide = program(pooling, start=start)
        fusion = FusionEM(model, guide).run(0)
        em = FusionEM(*program(pooling, start=start))
        ends = [em.step() for _ in range(12)]
        assert len(fusion.only_label().restarts) == 1
        assert fusion.objective[-1] <= ends[0] + 1e-9

    def test_after_steps_is_no_worse(self, pooling):
        model, guide = program(pooling, start=random_assignment(4))
        em = FusionEM(model, guide)
        last = [em.step() for _ in range(3)][-1]
        assert em.run(0).objective[-1] <= last + 1e-9 * abs(last)


class TestSolvers:
    @pytest.mark.parametrize("solver", ["coordinate", "relaxed", "sinkhorn"])
    @pytest.mark.parametrize("pooling", ["exclusive", "inclusive"])
    def test_steps(self, pooling, solver):
        model, guide = program(pooling, local=parties())
        em = FusionEM(model, guide, solver=solver)
        losses = [em.step() for _ in range(4)]
        assert all(b <= a for a, b in itertools.pairwise(losses))
        best = fuse(parties(), pooling, solver=solver)
        assert losses[-1] == pytest.approx(best.objective[-1], rel=1e-9)
        assert same_grouping(guide.assignment["component"].split(SIZES), HOLDS)

    def test_that_do_not_fit(self):
        model, guide = program("exclusive", IndianBuffetPrior(1.0))
        with pytest.raises(ParameterError, match="needs GroupNormPrior or FixedAtoms"):
            FusionEM(model, guide, solver="relaxed")
        model, guide = program("product", GroupNormPrior())
        with pytest.raises(ParameterError, match=r"got GroupNormPrior\(.*\) and 'product'"):
            FusionEM(model, guide, solver="relaxed")
        with pytest.raises(ParameterError, match=r"solver must be one of .*got 'exact'"):
            FusionEM(model, guide, solver="exact")

    def test_of_the_users_own(self):
        seen = []

        def mine(problem, prior, *, start):
            """All assignments of one party at a time, given the others."""
            best = problem.join(start)
            ends = torch.tensor([0, *SIZES]).cumsum(0).tolist()
            for first, last in itertools.pairwise(ends):
                choices = itertools.product(range(NEW, problem.num_atoms), repeat=last - first)
                for choice in choices:
                    taken = [k for k in choice if k != NEW]
                    if len(set(taken)) < len(taken):
                        continue
                    other = best.clone()
                    other[first:last] = torch.tensor(choice)
                    best = min(best, other, key=problem.objective)
            seen.append(problem.objective(best))
            return Assignment(problem.split(best), seen[-1], 1, True)

        fusion = fuse(parties(), solver=mine)
        expected = fuse(parties())
        assert seen
        assert same_grouping(fusion.assignment, HOLDS)
        assert fusion.objective[-1] == pytest.approx(expected.objective[-1], rel=1e-12)

    def test_of_the_users_own_that_is_wrong(self):
        def mine(problem, prior, *, start):
            atoms = [torch.zeros(size, dtype=torch.long) for size in problem.sizes]
            return Assignment(atoms, 0.0, 1, True)

        with pytest.raises(ParameterError, match=r"party \d: expected each atom at most once"):
            fuse(parties(), solver=mine)
        with pytest.raises(ParameterError, match="expected an Assignment from the solver"):
            fuse(parties(), solver=lambda problem, prior, start: None)


class TestSvi:
    """On the same pair."""

    @pytest.mark.parametrize("family", ["Normal", "Dirichlet"])
    @pytest.mark.parametrize("pooling", NOISELESS)
    def test_reaches_the_closed_form(self, pooling, family):
        model, guide = pair(pooling, family)
        best = FusionEM(model, guide).run(2).objective[-1]
        perturb(guide, 0.5)
        assert by_hand(model, guide) > 1.05 * best > 0
        optimiser = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.98})
        svi = SVI(model, guide, optimiser, TraceMeanField_ELBO())
        for _ in range(200):
            svi.step()
        assert by_hand(model, guide) == pytest.approx(best, rel=0.01)

    @pytest.mark.parametrize("family", ["Normal", "Gamma", "MultivariateNormal"])
    def test_of_the_product(self, family):
        # A wide prior: the evidence is then well above the noise of the gradients.
        model, guide = pair("product", family, shared=0, prior=base(family, 0, 1e-3))
        best = FusionEM(model, guide).run(2).objective[-1]
        perturb(guide)
        assert by_hand(model, guide) > 0.95 * best < 0
        svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.985}), Trace_ELBO())
        for _ in range(300):
            svi.step()
        assert by_hand(model, guide) == pytest.approx(best, rel=0.01)


class TestOfOnesOwn:
    """Programs that SVI runs and FusionEM refuses."""

    def test_scale(self):
        class Trusted(FusionModel):
            def scale(self, label):
                return 2 * super().scale(label)

        model = Trusted(posteriors(shared=0), assignment_prior=FixedAtoms(3))
        twice = loss(model, FusionGuide(model))
        model = FusionModel(posteriors(shared=0), assignment_prior=FixedAtoms(3))
        assert twice == pytest.approx(2 * loss(model, FusionGuide(model)))

    def test_prior(self):
        class Costly(FusionModel):
            def assignment_prior(self, label):
                return GroupNormPrior(7.0)

        model = Costly(posteriors(), assignment_prior=GroupNormPrior(1.0))
        guide = FusionGuide(model)
        plain = FusionModel(posteriors(), assignment_prior=GroupNormPrior(1.0))
        m = torch.bincount(guide.assignment["component"])
        extra = 6 * float(m.double().sqrt().sum())
        assert loss(model, guide) - loss(plain, FusionGuide(plain)) == pytest.approx(extra)

    def test_likelihood(self):
        class Tailed(FusionModel):
            def local(self, site, index):
                d = super().local(site, index).base_dist
                return dist.StudentT(3.0, d.mean, d.variance.sqrt()).to_event(1)

        model = Tailed(posteriors(shared=0))
        guide = FusionGuide(model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        assert all(torch.isfinite(torch.tensor(svi.step())) for _ in range(3))


class TestErrors:
    @pytest.mark.parametrize("name", ["assignment_prior", "local", "scale"])
    def test_a_model_of_ones_own(self, name):
        def own(self, *args):
            return getattr(super(FusionModel, self), name)(*args)

        model = type("Mine", (FusionModel,), {name: own})(parties())
        guide = FusionGuide(program("exclusive")[0])
        with pytest.raises(ParameterError, match=rf"Mine overrides {name}\(\).*use SVI"):
            FusionEM(model, guide)

    def test_a_subclass_that_overrides_nothing_else(self):
        class Named(FusionModel):
            """Another name is no other program."""

        model = Named(parties())
        assert isinstance(FusionEM(model, FusionGuide(model)).step(), float)

    @pytest.mark.parametrize(
        "settings, match",
        [
            ({"restarts": -1}, "expected restarts >= 0 and max_iterations >= 1, got -1 and 100"),
            ({"max_iterations": 0}, "got 9 and 0"),
            ({"seed": 1.5}, "seed must be an integer, got 1.5"),
            ({"seed": True}, "seed must be an integer, got True"),
        ],
        ids=str,
    )
    def test_run(self, settings, match):
        em = FusionEM(*program("exclusive"))
        with pytest.raises(ParameterError, match=match):
            em.run(**settings)

    def test_an_improper_product_is_located(self):
        local = [
            Posterior({"x": dist.Normal(torch.tensor([float(s)]), 2.0)}, {"x": "component"})
            for s in range(3)
        ]
        base = {"x": dist.Normal(torch.tensor(0.0), 1.0)}
        with pytest.raises(ParameterError, match=r"site 'x'.*improper"):
            model = FusionModel(local, "product", FixedAtoms(1), prior=base)
            FusionEM(model, FusionGuide(model)).step()

    def test_guide_of_another_model_or_with_a_scale_of_its_own(self):
        model, guide = program("exclusive")
        with pytest.raises(ParameterError, match="the guide is that of another model"):
            FusionEM(program("exclusive")[0], guide)

        class Own(FusionGuide):
            def scale(self, label):
                return 2 * super().scale(label)

        with pytest.raises(ParameterError, match=r"Own overrides scale\(\)"):
            FusionEM(model, Own(model))
        model.local = lambda site, index: None
        with pytest.raises(ParameterError, match=r"FusionModel overrides local\(\)"):
            FusionEM(model, guide)

    def test_relaxed_guide(self):
        model, _ = program("exclusive")
        guide = FusionGuide(model, relaxed=True)
        with pytest.raises(ParameterError, match=r"harden\(\) it first"):
            FusionEM(model, guide)
        guide.harden()
        FusionEM(model, guide).step()
