# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""fuse(), from posteriors and guides to one posterior."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy.optimize import linear_sum_assignment

from pyro_fusion import (
    FixedAtoms,
    FusionError,
    GroupNormPrior,
    GuideError,
    IndianBuffetPrior,
    NormalWishart,
    ParameterError,
    Posterior,
    PosteriorGuide,
    StructureError,
    from_guide,
    fuse,
    pairwise_kl,
)
from pyro_fusion.pooling import Exclusive
from tests.fusion.parties import AXES, BASE, HOLDS, TRUTH, parties, party, same_grouping

POOLINGS = ["inclusive", "exclusive", "product"]


@pytest.fixture(params=POOLINGS)
def pooling(request):
    return request.param


class TestRecovery:
    def test_shuffled_and_missing_components(self, pooling):
        fusion = fuse(parties(), pooling, prior=BASE)
        assert fusion.num_atoms == 4
        assert same_grouping(fusion.assignment, HOLDS)
        assert sorted(fusion.popularity.tolist()) == [2, 3, 3, 3]
        assert fusion.popularity.tolist() == sorted(fusion.popularity.tolist(), reverse=True)
        mean = fusion.posterior.factors["loc"].mean
        distance = torch.cdist(mean, TRUTH)
        rows, columns = linear_sum_assignment(distance)
        assert distance[rows, columns].max() < 0.3
        assert fusion.posterior.axes["loc"] == ("component", None)
        assert fusion.converged

    @pytest.mark.parametrize("prior", [GroupNormPrior(), FixedAtoms(4)], ids=str)
    def test_every_prior(self, pooling, prior):
        fusion = fuse(parties(), pooling, prior, prior=BASE)
        assert same_grouping(fusion.assignment, HOLDS)

    @pytest.mark.parametrize("solver", ["relaxed", "sinkhorn"])
    @pytest.mark.parametrize("prior", [GroupNormPrior(), FixedAtoms(4)], ids=str)
    def test_every_solver(self, pooling, prior, solver):
        if (pooling, solver) == ("product", "relaxed"):
            with pytest.raises(ParameterError, match="solver 'relaxed' needs GroupNormPrior"):
                fuse(parties(), pooling, prior, prior=BASE, solver=solver)
            return
        fusion = fuse(parties(), pooling, prior, prior=BASE, solver=solver)
        assert same_grouping(fusion.assignment, HOLDS)
        matching = fusion.only_label()
        assert matching.bound <= matching.objective[-1] + 1e-9
        assert (matching.gap < 0.5) == (solver == "relaxed")
        assert ("% for these atoms" in fusion.summary()) == (solver == "relaxed")

    @pytest.mark.parametrize("ranked", [False, True])
    def test_the_papers_own_regulariser(self, ranked):
        fusion = fuse(parties(), assignment_prior=GroupNormPrior("auto", ranked=ranked))
        expected = fusion.only_label().assignment_prior
        assert expected.scale > 0
        # λ = std / 2 in nats: in units of the dispersion it changes with it, F does not.
        again = fuse(
            parties(),
            assignment_prior=GroupNormPrior("auto", ranked=ranked),
            dispersion=2 * fusion.dispersion,
        )
        assert again.only_label().assignment_prior.scale == pytest.approx(expected.scale / 2)
        for a, b in zip(fusion.assignment, again.assignment, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("alpha", [None, 0.1, 1.0, 3.0])
    def test_indian_buffet(self, alpha):
        fusion = fuse(parties(), "product", IndianBuffetPrior(alpha), prior=BASE)
        assert same_grouping(fusion.assignment, HOLDS)
        if alpha is None:  # Gamma(1, 1) prior, four atoms, four parties
            expected = 4 / (1 + 1 + 1 / 2 + 1 / 3 + 1 / 4)
            assert fusion.labels["component"].assignment_prior.mass == pytest.approx(expected)

    def test_objective_is_a_trace_that_never_rises(self, pooling):
        objective = torch.tensor(fuse(parties(1.0), pooling, prior=BASE).objective)
        assert torch.isfinite(objective).all()
        assert (objective.diff() <= 0).all()

    def test_objective_is_the_sum_that_it_claims(self):
        fusion = fuse(parties(), "exclusive", GroupNormPrior(0.7))
        total = fusion.shared_objective + float((0.7 * fusion.popularity.double().sqrt()).sum())
        for p, a in zip(parties(), fusion.assignment, strict=True):
            for site in ("loc", "scale"):
                atoms = fusion.posterior.factors[site]
                cost = pairwise_kl(atoms, p.factors[site]) / fusion.dispersion
                total += float(cost[a, torch.arange(len(a))].sum())
        assert fusion.objective[-1] == pytest.approx(total, rel=1e-9)

    def test_normal_wishart_components(self):
        def one(holds, seed):
            g = torch.Generator().manual_seed(seed)
            loc = TRUTH[holds] + 0.1 * torch.randn(len(holds), 2, generator=g).double()
            eye = torch.eye(2).double().expand(len(holds), 2, 2)
            d = NormalWishart(
                loc,
                torch.tensor(50.0).double(),
                torch.tensor(52.0).double(),
                covariance_matrix=eye / 52,
            )
            return Posterior({"z": d}, {"z": "component"})

        fusion = fuse([one(h, s) for s, h in enumerate(HOLDS)])
        assert same_grouping(fusion.assignment, HOLDS)
        assert isinstance(fusion.posterior.factors["z"], NormalWishart)


class TestInvariance:
    def test_order_of_components(self, pooling):
        first = fuse(parties(0.7), pooling, prior=BASE)
        orders = [torch.tensor(o) for o in ([2, 0, 1], [1, 0], [1, 2, 0], [2, 1, 0])]
        moved = [p.permute("component", o) for p, o in zip(parties(0.7), orders, strict=True)]
        second = fuse(moved, pooling, prior=BASE)
        assert second.objective[-1] == pytest.approx(first.objective[-1], rel=1e-8, abs=1e-8)
        a = torch.cat([x[o] for x, o in zip(first.assignment, orders, strict=True)])
        b = torch.cat(second.assignment)
        assert torch.equal(a[:, None] == a, b[:, None] == b)

    def test_order_of_parties(self, pooling):
        first = fuse(parties(0.7), pooling, prior=BASE, weights=[1, 2, 3, 4])
        order = [2, 0, 3, 1]
        moved = [parties(0.7)[s] for s in order]
        second = fuse(moved, pooling, prior=BASE, weights=[3, 1, 4, 2])
        assert second.objective[-1] == pytest.approx(first.objective[-1], rel=1e-8, abs=1e-8)
        a = torch.cat([first.assignment[s] for s in order])
        b = torch.cat(second.assignment)
        assert torch.equal(a[:, None] == a, b[:, None] == b)

    def test_same_seed_same_bits(self):
        first, second = (fuse(parties(1.0), seed=5) for _ in "ab")
        assert first.objective == second.objective
        values = first.posterior.sample()
        assert torch.equal(first.posterior.log_prob(values), second.posterior.log_prob(values))

    def test_scale_of_weights_does_not_matter(self, pooling):
        first = fuse(parties(), pooling, prior=BASE, weights=[1, 2, 1, 1])
        second = fuse(parties(), pooling, prior=BASE, weights=[10, 20, 10, 10])
        torch.testing.assert_close(
            first.posterior.factors["loc"].mean, second.posterior.factors["loc"].mean
        )

    def test_global_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        fuse(parties())
        assert torch.equal(before, torch.get_rng_state())


class TestSites:
    def test_shared_sites_are_pooled_in_closed_form(self):
        local = [p.factors["noise"] for p in parties()]
        concentration = torch.stack([d.concentration for d in local])
        rate = torch.stack([d.rate for d in local])
        d = fuse(parties(), "exclusive").posterior.factors["noise"]
        assert float(d.concentration) == pytest.approx(float(concentration.mean()))
        assert float(d.rate) == pytest.approx(float(rate.mean()))
        d = fuse(parties(), "product", prior=BASE).posterior.factors["noise"]
        assert float(d.concentration) == pytest.approx(float(concentration.sum()) - 3 * 1.0)
        assert float(d.rate) == pytest.approx(float(rate.sum()) - 3 * 0.1)
        d = fuse(parties(), "inclusive").posterior.factors["noise"]
        assert float(d.mean) == pytest.approx(float((concentration / rate).mean()))

    def test_only_shared_sites(self, pooling):
        local = [Posterior({"noise": p.factors["noise"]}) for p in parties()]
        fusion = fuse(local, pooling, prior=BASE)
        assert fusion.labels == {}
        assert len(fusion.objective) == 1
        with pytest.raises(StructureError, match="no site has a label, so nothing was assigned"):
            fusion.assignment  # noqa: B018
        assert "shared sites: noise" in fusion.summary()

    def test_weights_follow_the_assignment(self):
        fusion = fuse(parties(), "product", prior=BASE)
        concentration = fusion.posterior.factors["weights"].concentration
        expected = torch.ones(4).double()
        for p, a in zip(parties(), fusion.assignment, strict=True):
            expected[a] += p.factors["weights"].concentration - 1
        torch.testing.assert_close(concentration, expected)

    def test_weights_of_missing_components(self):
        fusion = fuse(parties(), "exclusive")
        concentration = torch.zeros(4).double()
        for p, a in zip(parties(), fusion.assignment, strict=True):
            own = torch.ones(4).double()  # a component that was not seen counts once
            own[a] = p.factors["weights"].concentration
            concentration += own / 4
        torch.testing.assert_close(fusion.posterior.factors["weights"].concentration, concentration)

    def test_transition_matrix_is_carried_along_both_axes(self):
        def hmm(holds, seed):
            p = party(holds, seed)
            counts = 1.0 + 10 * torch.tensor(holds)[:, None] + torch.tensor(holds)
            return Posterior(
                {"loc": p.factors["loc"], "transition": dist.Dirichlet(counts.double())},
                {"loc": ("state", None), "transition": ("state", "state")},
            )

        fusion = fuse([hmm(h, s) for s, h in enumerate(HOLDS)], "exclusive")
        concentration = fusion.posterior.factors["transition"].concentration
        assert concentration.shape == (4, 4)
        truth = torch.empty(4, dtype=torch.long)
        for h, a in zip(HOLDS, fusion.assignment, strict=True):
            truth[a] = torch.tensor(h)
        for i in range(4):
            having = [h for h in HOLDS if int(truth[i]) in h]
            for j in range(4):
                expected = sum(
                    1.0 + 10 * int(truth[i]) + int(truth[j]) if int(truth[j]) in h else 1.0
                    for h in having
                )
                assert float(concentration[i, j]) == pytest.approx(expected / len(having))

    def test_labelled_event_axis(self):
        def one(p):
            d = p.factors["loc"].base_dist
            return Posterior({"loc": d.to_event(2)}, {"loc": ("component", None)})

        fusion = fuse([one(p) for p in parties()])
        assert same_grouping(fusion.assignment, HOLDS)
        d = fusion.posterior.factors["loc"]
        assert (d.batch_shape, d.event_shape) == ((), (4, 2))

    def test_labelled_axis_that_is_not_the_first(self):
        def one(p):
            d = p.factors["loc"].base_dist
            moved = dist.Normal(d.loc.mT, d.scale.mT).to_event(2)
            return Posterior({"loc": moved}, {"loc": (None, "component")})

        fusion = fuse([one(p) for p in parties()])
        assert same_grouping(fusion.assignment, HOLDS)
        assert fusion.posterior.factors["loc"].event_shape == (2, 4)

    def test_two_labels_on_different_sites(self):
        local = [
            Posterior(
                {"a": p.factors["loc"], "b": q.factors["loc"]},
                {"a": ("row", None), "b": ("column", None)},
            )
            for p, q in zip(parties(), reversed(parties()), strict=True)
        ]
        fusion = fuse(local)
        assert same_grouping(fusion.labels["row"].assignment, HOLDS)
        assert same_grouping(fusion.labels["column"].assignment, HOLDS[::-1])
        assert torch.tensor(fusion.objective).diff().le(0).all()

    def test_constrained_sites_keep_their_transform(self):
        assert isinstance(fuse(parties()).posterior.factors["scale"].base_dist, dist.LogNormal)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype(self, pooling, dtype):
        local = [p.to(dtype=dtype) for p in parties()]
        fusion = fuse(local, pooling, prior=BASE)
        assert fusion.posterior.dtype == dtype
        assert same_grouping(fusion.assignment, HOLDS)


class TestOneParty:
    def test_comes_back_as_it_is(self, pooling):
        p = party([0, 1, 2], 0)
        fusion = fuse([p], pooling)
        assert fusion.posterior is p
        assert fusion.assignment[0].tolist() == [0, 1, 2]
        assert fusion.num_atoms == 3
        assert "3 atoms" in fusion.summary()

    @pytest.mark.parametrize("ranked", [True, False])
    def test_scale_of_the_prior_is_found(self, pooling, ranked):
        fusion = fuse([party([0, 1, 2], 0)], pooling, GroupNormPrior("auto", ranked=ranked))
        assert fusion.only_label().assignment_prior.scale > 0

    def test_parametric_must_still_fit(self):
        with pytest.raises(StructureError, match="party 0 has 3 components"):
            fuse([party([0, 1, 2], 0)], assignment_prior=FixedAtoms(2))


class TestWeights:
    def test_zero_weight_has_no_say(self):
        far = party([0, 1, 2], 9)
        loc = far.factors["loc"].base_dist
        moved = Posterior(
            dict(far.factors) | {"loc": dist.Normal(loc.loc + 0.5, loc.scale).to_event(1)}, AXES
        )
        three = parties()[:3]
        with_it = fuse([*three, moved], "exclusive", FixedAtoms(4), weights=[1, 1, 1, 0])
        without = fuse(three, "exclusive", FixedAtoms(4))
        index = torch.cdist(
            without.posterior.factors["loc"].mean, with_it.posterior.factors["loc"].mean
        ).argmin(1)
        torch.testing.assert_close(
            with_it.posterior.factors["loc"].mean[index], without.posterior.factors["loc"].mean
        )


class TestGuides:
    @staticmethod
    def model(x=None, size=2):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(size)))
        with pyro.plate("component", size):
            loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 20 if x is None else len(x)):
            mixture = dist.MixtureSameFamily(
                dist.Categorical(weights), dist.Normal(loc, noise).to_event(1)
            )
            pyro.sample("x", mixture, obs=x)

    def fitted(self, centres, seed):
        pyro.set_rng_seed(seed)
        x = torch.tensor(centres).repeat(30, 1) + 0.3 * torch.randn(60, 2)
        model = functools.partial(self.model, size=2)
        guide = AutoNormal(
            model,
            init_loc_fn=pyro.infer.autoguide.init_to_value(
                values={"loc": torch.tensor(centres), "noise": torch.tensor(0.3)}
            ),
        )
        with pyro.get_param_store().scope():
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
            for _ in range(200):
                svi.step(x)
        return guide

    def guides(self):
        return [
            self.fitted([[0.0, 0.0], [5.0, 5.0]], 1),
            self.fitted([[5.0, 5.0], [-5.0, 0.0]], 2),
        ]

    def test_from_guides_to_guide(self):
        local = [from_guide(g, axes={"weights": "component"}) for g in self.guides()]
        fusion = fuse(local)
        assert fusion.num_atoms == 3
        model = functools.partial(self.model, size=3)
        draws = Predictive(model, guide=fusion.guide, num_samples=50)()
        assert draws["x"].shape == (50, 20, 2)
        assert draws["loc"].shape == (50, 3, 2)
        x = torch.tensor([[0.0, 0.0], [5.0, 5.0], [-5.0, 0.0]]).repeat(20, 1)
        x = x + 0.3 * torch.randn(60, 2)
        svi = SVI(model, fusion.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        losses = torch.tensor([svi.step(x) for _ in range(150)])
        assert losses[-30:].mean() < losses[:30].mean()
        # A warm start: far below a guide that starts from nothing.
        cold = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        assert losses[0] < cold.step(x)

    def test_product_takes_the_prior_from_the_guide(self):
        local = [poutine_hide(g) for g in self.guides()]
        fusion = fuse(local, "product")
        given = fuse(
            [from_guide(g) for g in local],
            "product",
            prior={
                "loc": dist.Normal(torch.zeros(2), 10.0).to_event(1),
                "noise": dist.LogNormal(0.0, 1.0),
            },
        )
        torch.testing.assert_close(
            fusion.posterior.factors["loc"].mean, given.posterior.factors["loc"].mean
        )

    def test_unlabelled_weights_are_noticed(self):
        guides = self.guides()
        with pytest.warns(UserWarning, match=r"site 'weights'.*axes=\{'weights': \('component',\)"):
            fuse(guides)
        fusion = fuse(guides, axes={"weights": "component"})
        assert fusion.posterior.factors["weights"].event_shape == (3,)

    def test_product_with_a_model_as_base(self):
        # The model has no data, so its observed site is no exponential family: not read.
        local = [from_guide(g, axes={"weights": "component"}) for g in self.guides()]
        fusion = fuse(local, "product", prior=self.model)
        assert fusion.num_atoms == 3

    def test_guides_of_different_priors(self):
        def model(scale):
            pyro.sample("z", dist.Normal(0.0, scale))

        guides = []
        for scale in (1.0, 100.0):
            pyro.clear_param_store()
            guides.append(AutoNormal(functools.partial(model, scale)))
            guides[-1]()
        pyro.clear_param_store()
        with torch.no_grad():
            guides[1].locs.z_unconstrained.add_(0.5)
        with pytest.raises(StructureError, match="site 'z': the model of guide 1 has another"):
            fuse(guides, "product")

    def test_plates_that_are_not_the_last(self):
        def model():
            with pyro.plate("g", 4, dim=-2):
                theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
                with pyro.plate("h", 3, dim=-1):
                    pyro.sample("x", dist.Normal(theta, 1.0), obs=torch.zeros(4, 3))

        local = []
        for seed in range(2):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            guide = AutoNormal(model, init_loc_fn=pyro.infer.autoguide.init_to_sample)
            guide()
            local.append(from_guide(guide, axes={"theta": (None, None)}))
        fusion = fuse(local)
        SVI(model, fusion.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()

    def test_shared_parameters_are_refused(self):
        first = AutoNormal(self.model)
        first(torch.zeros(4, 2))
        second = AutoNormal(self.model)
        second(torch.zeros(4, 2))
        with pytest.raises(GuideError, match="party 0 and party 1"):
            fuse([first, second])


def poutine_hide(guide):
    """The same autoguide without the weights, whose event axis nothing would label."""
    hidden = AutoNormal(pyro.poutine.block(guide.model, hide=["weights"]))
    hidden(torch.zeros(4, 2))
    with torch.no_grad():
        for name in ("loc", "noise"):
            loc, scale = guide._get_loc_and_scale(name)
            setattr(hidden.locs, name, loc.detach().clone())
            setattr(hidden.scales, name, scale.detach().clone())
    pyro.clear_param_store()
    return hidden


def normal_party(**changes):
    arguments = {"loc": torch.zeros(2, 3), "scale": torch.ones(2, 3)} | changes
    return Posterior({"z": dist.Normal(**arguments).to_event(1)}, {"z": ("component", None)})


def two_parties():
    return [normal_party(), normal_party(loc=torch.ones(2, 3))]


class TestBadInput:
    @pytest.mark.parametrize("family", ["Normal", "MultivariateNormal"])
    def test_messages_that_temper_to_something_improper(self, family):
        # Wider than the prior, and more so the less they are tempered.
        parties = []
        for s in range(3):
            loc = torch.tensor([[0.0, 0.0], [5.0, 5.0]]).double() + 0.1 * s
            if family == "Normal":
                local = dist.Normal(loc, 1.1).to_event(1)
                base = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
            else:
                eye = torch.eye(2).double()
                local = dist.MultivariateNormal(loc, 1.2 * eye)
                base = dist.MultivariateNormal(torch.zeros(2).double(), eye)
            parties.append(Posterior({"x": local}, {"x": "component"}))
        with pytest.raises(ParameterError, match=r"site 'x'.*improper"):
            fuse(parties, "product", prior={"x": base}, dispersion=0.1)

    def test_solver(self):
        with pytest.raises(ParameterError, match=r"solver must be one of .*'relaxed'.* got 'lp'"):
            fuse(parties(), solver="lp")
        with pytest.raises(ParameterError, match="solver 'relaxed' needs GroupNormPrior"):
            fuse(parties(), assignment_prior=IndianBuffetPrior(), solver="relaxed")

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (
                lambda: Posterior({"y": dist.Normal(0.0, 1.0)}),
                r"party 1 has the sites \['y'\], party 0 has \['z'\]",
            ),
            (
                lambda: normal_party(loc=torch.zeros(2, 4), scale=torch.ones(2, 4)),
                r"'z': expected the same shape .* \(2, 4\) for party 1 and \(2, 3\) for party 0",
            ),
            (
                lambda: Posterior(
                    {"z": dist.LogNormal(torch.zeros(2, 3), 1.0).to_event(1)},
                    {"z": ("component", None)},
                ),
                "'z': expected the same family and transforms .* Normal behind .*Exp.* for party 1",
            ),
            (
                lambda: Posterior({"z": dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)}),
                "site 'z': expected the same labels .* for party 1",
            ),
            (
                lambda: normal_party().to(dtype=torch.float64),
                "dtype .*float64 for party 1 and .*float32 for party 0: cast one .*posterior.to",
            ),
        ],
    )
    def test_parties_that_do_not_fit(self, other, message):
        with pytest.raises(StructureError, match=message):
            fuse([normal_party(), other()])

    def test_empty(self):
        with pytest.raises(StructureError, match="at least one party"):
            fuse([])

    def test_single_posterior_without_list(self):
        with pytest.raises(StructureError, match="expected a list"):
            fuse(normal_party())

    def test_not_a_posterior(self):
        with pytest.raises(StructureError, match="party 1: expected a Posterior or a Pyro guide"):
            fuse([normal_party(), 3])

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([1.0], "expected 2 weights, one per party, got 1"),
            ([1.0, -1.0], "the weight of party 1 must be finite and non-negative"),
            ([1.0, float("nan")], "the weight of party 1"),
            ([0.0, 0.0], "all weights are zero"),
            ("ab", "weights must be numbers"),
        ],
    )
    def test_weights(self, weights, message):
        with pytest.raises(ParameterError, match=message):
            fuse([normal_party(), normal_party()], weights=weights)

    def test_too_few_atoms(self):
        with pytest.raises(StructureError, match="party 1 has 2 components along 'component'"):
            fuse(
                [normal_party().select("component", [0]), normal_party()],
                assignment_prior=FixedAtoms(1),
            )

    def test_product_without_prior(self):
        with pytest.raises(ParameterError, match="give it as `prior`"):
            fuse([normal_party(), normal_party()], "product")

    def test_prior_of_a_missing_site(self):
        with pytest.raises(StructureError, match="needs the prior of site 'z'"):
            fuse(two_parties(), "product", prior={"y": dist.Normal(0.0, 1.0)})

    def test_prior_of_another_shape(self):
        base = {"z": dist.Normal(torch.zeros(5), 1.0).to_event(1)}
        with pytest.raises(StructureError, match=r"site 'z'.*shape \(5,\), expected \(3,\)"):
            fuse(two_parties(), "product", prior=base)

    def test_prior_that_tells_components_apart(self):
        base = {"z": dist.Normal(torch.arange(6.0).reshape(2, 3), 1.0).to_event(1)}
        with pytest.raises(StructureError, match="site 'z': the prior differs between"):
            fuse(two_parties(), "product", prior=base)

    def test_prior_narrower_than_the_posteriors(self):
        base = {"z": dist.Normal(torch.zeros(3), 0.5).to_event(1)}
        narrow = normal_party(scale=torch.full((2, 3), 0.1))
        wide = normal_party(scale=torch.full((2, 3), 9.0))
        with pytest.raises(ParameterError, match=r"party 1, party 2, site 'z': .*wider than the"):
            fuse([narrow, normal_party(), wide], "product", prior=base)
        shared = [Posterior({"z": dist.Normal(float(i), 1.0)}) for i in range(2)]
        with pytest.raises(ParameterError, match=r"party 0, party 1, site 'z': .*wider than the"):
            fuse(shared, "product", prior={"z": dist.Normal(0.0, 0.5)})

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
    def test_dispersion(self, value):
        with pytest.raises(ParameterError, match="dispersion must be positive"):
            fuse([normal_party(), normal_party()], dispersion=value)

    @pytest.mark.parametrize(
        ("base", "message"),
        [
            ("x", "`prior` must be a mapping"),
            ({"z": dist.StudentT(3.0)}, "site 'z' of `prior`: no exponential family"),
        ],
    )
    def test_base(self, base, message):
        with pytest.raises(FusionError, match=message):
            fuse(two_parties(), "product", prior=base)

    def test_prior_of_another_family_for_a_carried_site(self):
        base = {**BASE, "weights": dist.Gamma(1.0, 1.0)}
        with pytest.raises(StructureError, match="site 'weights': the prior is Gamma, expected"):
            fuse(parties(), "product", prior=base)

    @pytest.mark.parametrize("seed", [None, 1.5, True])
    def test_seed(self, seed):
        with pytest.raises(ParameterError, match="seed must be an integer"):
            fuse([normal_party(), normal_party()], seed=seed)

    def test_identical_parties_are_noticed(self):
        with pytest.warns(UserWarning, match="party 0 and party 2 have identical parameters"):
            fuse([normal_party(), normal_party(loc=torch.ones(2, 3)), normal_party()])

    def test_prior_that_is_none(self):
        with pytest.raises(ParameterError, match="prior must be"):
            fuse([normal_party(), normal_party()], assignment_prior="indian-buffet")

    def test_label_that_cannot_be_matched(self):
        p = Posterior({"weights": dist.Dirichlet(torch.ones(3))}, {"weights": "component"})
        with pytest.raises(StructureError, match="at least one site needs it"):
            fuse([p, p])

    def test_two_labels_on_one_site(self):
        p = Posterior({"w": dist.Normal(torch.zeros(2, 3), 1.0)}, {"w": ("row", "column")})
        with pytest.raises(StructureError, match="'row' is only on sites that have other labels"):
            fuse([p, p])

    def test_nothing_is_lost(self):
        local = [normal_party(), normal_party(loc=torch.ones(2, 3))]
        before = [p.sample() for p in local]
        values = [p.log_prob(v) for p, v in zip(local, before, strict=True)]
        with pytest.raises(FusionError):  # found out in the middle of the work
            fuse(local, "product", prior={"z": dist.Normal(torch.zeros(3), 0.5).to_event(1)})
        after = [p.log_prob(v) for p, v in zip(local, before, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(values, after, strict=True))


def test_one_component_per_party():
    # Nothing says how far apart different components are: two nats per dimension.
    far = [normal_party(loc=torch.full((1, 3), 1e3 * s), scale=torch.ones(1, 3)) for s in range(4)]
    assert fuse(far).num_atoms == 4
    near = [normal_party(loc=torch.full((1, 3), 0.1 * s), scale=torch.ones(1, 3)) for s in range(4)]
    assert fuse(near).num_atoms == 1


def test_summary_and_repr():
    fusion = fuse(parties())
    text = fusion.summary()
    assert "Fusion of 4 parties, exclusive pooling" in text
    assert "11 × component → 4 atoms" in text
    assert "dispersion" in text
    assert repr(fusion) == "Fusion(4 parties, exclusive: 4 atoms along 'component')"


@pytest.mark.cuda
@pytest.mark.parametrize("pooling", POOLINGS)
def test_cuda(pooling):
    here = fuse(parties(), pooling, prior=BASE)
    there = fuse([p.to("cuda") for p in parties()], pooling, prior=BASE)
    assert there.posterior.device.type == "cuda"
    assert there.objective[-1] == pytest.approx(here.objective[-1], rel=1e-9)


def test_axes_are_for_guides_alone():
    p = Posterior({"loc": dist.Normal(torch.randn(3), 1.0)}, {"loc": "component"})
    for axes in ({"loc": (None,)}, "auto"):
        with pytest.raises(StructureError, match="all parties are posteriors"):
            fuse([p, p], axes=axes)


class TestNames:
    """A mapping from names."""

    NAMES = ("north", "east", "south", "west", "centre")

    def named(self):
        return dict(zip(self.NAMES, parties(), strict=False))

    def test_same_result(self):
        fusion, plain = fuse(self.named()), fuse(list(self.named().values()))
        assert fusion.party_names == tuple(self.named())
        assert plain.party_names == tuple(map(str, range(len(self.named()))))
        for a, b in zip(fusion.assignment, plain.assignment, strict=True):
            assert torch.equal(a, b)
        assert "north:" in fusion.summary()

    def test_one_party(self):
        (name, posterior), *_ = self.named().items()
        alone = fuse({name: posterior})
        assert alone.party_names == (name,)
        assert alone.parties[name] is posterior

    def test_the_result_holds_what_was_fused(self):
        named = self.named()
        assert list(fuse(named).parties.items()) == list(named.items())
        listed = fuse(list(named.values())).parties
        assert list(listed) == [str(s) for s in range(len(named))]
        assert list(listed.values()) == list(named.values())

    def test_guides_are_held_as_they_were_read(self):
        posterior = self.named()["north"]
        read = fuse({"a": posterior, "b": PosteriorGuide(posterior)}).parties["b"]
        assert isinstance(read, Posterior)
        assert read.axes == posterior.axes

    def test_errors_name_the_parties(self):
        named = self.named() | {"east": Posterior({"z": dist.Normal(torch.zeros(2), 1.0)})}
        with pytest.raises(StructureError, match=r"party 1 \(east\) .*, party 0 \(north\)"):
            fuse(named)
        with pytest.raises(StructureError, match=r"party 0 \(north\) has 3 "):
            fuse(
                {"north": Posterior({"z": dist.Normal(torch.zeros(3), 1.0)}, {"z": "k"})}
                | {"east": Posterior({"z": dist.Normal(torch.zeros(2), 1.0)}, {"z": "k"})},
                assignment_prior=FixedAtoms(2),
            )
        with pytest.raises(StructureError, match="party 1: expected a Posterior") as error:
            fuse([*parties()[:1], 3])
        assert " is " not in str(error.value)

    def test_names_that_are_alike(self):
        a, b, *_ = parties()
        with pytest.raises(StructureError, match="names of parties must differ as text"):
            fuse({1: a, "1": b})
        weighed = fuse({2019: a, 2020: b}, weights={2019: 1.0, 2020: 2.0})
        assert weighed.objective == fuse([a, b], weights=[1.0, 2.0]).objective

    def test_warnings_too(self):
        a = parties()[0]
        with pytest.warns(UserWarning, match="party north and party east have identical"):
            fuse({"north": a, "east": a})

    def test_weights_by_name(self):
        named = self.named()
        weights = [float(s + 1) for s in range(len(named))]
        by_name = dict(reversed(list(zip(named, weights, strict=True))))
        assert fuse(named, weights=by_name).objective == fuse(named, weights=weights).objective
        with pytest.raises(ParameterError, match=r"a weight for each of .*'north'.*, got \['x'\]"):
            fuse(named, weights={"x": 1.0})


class TestWhatNewcomersDo:
    """Mistakes, each with what to do about it."""

    @staticmethod
    def mixture(*means, axes=None):
        factors = {
            "w": dist.Dirichlet(torch.full((len(means),), 9.0)),
            "mu": dist.Normal(torch.tensor(means), 1.0),
        }
        return Posterior(factors, {"mu": "c"} if axes is None else axes)

    def test_weights_without_a_label_and_different_numbers_of_components(self):
        parties = [self.mixture(-5.0, 5.0), self.mixture(5.0, -5.0, 0.0)]
        with pytest.raises(StructureError, match=r"of 'c', label it: axes={'w': \('c',\)}"):
            fuse(parties)

    def test_no_label_at_all(self):
        parties = [self.mixture(-5.0, 5.0, axes={}), self.mixture(5.0, -5.0, axes={})]
        with pytest.warns(UserWarning, match="no site has a label, so nothing is assigned"):
            fuse(parties)

    def test_a_transition_matrix_that_is_labelled_once(self):
        def chain(seed):
            torch.manual_seed(seed)
            factors = {
                "move": dist.Dirichlet(1 + torch.rand(3, 3)),
                "loc": dist.Normal(torch.tensor([-9.0, 0.0, 9.0])[torch.randperm(3)], 1.0),
            }
            return Posterior(factors, {"move": ("state",), "loc": "state"})

        said = r"moving to the components, label it: axes={'move': \('state', 'state'\)}"
        with pytest.warns(UserWarning, match=said):
            fuse([chain(0), chain(1)])

    @pytest.mark.parametrize("order", [1, -1])
    def test_emissions_are_no_moves(self, order):
        """As many symbols as states, at all parties or at one."""

        def chain(size, seed):
            torch.manual_seed(seed)
            factors = {
                "move": dist.Dirichlet(1 + torch.rand(size, size)),
                "emit": dist.Dirichlet(1 + torch.rand(size, 3)),
                "loc": dist.Normal(9.0 * torch.randperm(size), 1.0),
            }
            axes = {"move": ("state", "state"), "emit": ("state", None), "loc": "state"}
            return Posterior(factors, axes)

        fuse([chain(3, 0), chain(3, 1)])  # a warning would be an error
        fuse([chain(3, 0), chain(4, 1)][::order])

    def test_the_remedy_is_not_what_is_there(self):
        def square(size, axes):
            return Posterior({"loc": dist.Normal(torch.zeros(size, size), 1.0)}, {"loc": axes})

        with pytest.raises(StructureError, match="expected the same shape") as error:
            fuse([square(3, ("component",)), square(4, ("component",))])
        assert "('component', 'component')" in str(error.value)

    @pytest.mark.parametrize(
        ("party", "remedy"),
        [
            (torch.zeros(9), r"party 1: .* got Tensor: .*from_draws\({'site': draws}\)"),
            (3, r"party 1: .* got int. None of the readers from_guide, from_numpyro, .* takes it"),
        ],
    )
    def test_what_is_no_party(self, party, remedy):
        with pytest.raises(StructureError, match=remedy):
            fuse([*parties()[:1], party])

    def test_a_fusion_is_no_party(self):
        with pytest.raises(StructureError, match=r"got Fusion: take its posterior"):
            fuse([fuse(parties()), *parties()])

    def test_parties_that_are_in_no_list(self):
        with pytest.raises(ParameterError, match=r"got the class Exclusive: give Exclusive\(\)"):
            fuse(parties(), Exclusive)
        with pytest.raises(ParameterError, match="got Posterior: are the parties in a list"):
            fuse(parties(), parties()[0])

    def test_a_base_for_other_sites(self):
        with pytest.raises(StructureError, match=r"prior of site 'mu'; `prior` has \['loc'\]"):
            fuse(
                [self.mixture(-5.0, 5.0, axes={"w": "c", "mu": "c"}) for _ in range(2)],
                "product",
                prior={"loc": dist.Normal(0.0, 9.0)},
            )

    def test_features_that_are_labelled_as_components_are(self):
        loc = dist.Normal(torch.zeros(2, 3), 1.0)
        party = Posterior({"mu": loc}, {"mu": ("group", "feature")})
        with pytest.raises(StructureError, match=r"take its label away: axes={'mu': \("):
            fuse([party, party])

    def test_what_is_printed_of_one_party(self):
        assert repr(fuse(parties()[:1])).startswith("Fusion(1 party, exclusive: ")
