# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What the parties hand over, as problems: in two orders, tempered, and with errors located."""

import pyro.distributions as dist
import pytest
import torch

from pyro_fusion import (
    FixedAtoms,
    FusionProblem,
    GroupNormPrior,
    IndianBuffetPrior,
    ParameterError,
    Posterior,
    StructureError,
)
from pyro_fusion.families import kl
from pyro_fusion.fusion.parties import Parties, locating
from pyro_fusion.pooling import pooling_named
from tests.fusion.parties import BASE, HOLDS, parties

POOLINGS = ["exclusive", "inclusive", "product"]
SIZES = tuple(len(h) for h in HOLDS)


def read(pooling="exclusive", local=None, weights=None, prior=BASE):
    return Parties.of(local or parties(), pooling_named(pooling), weights, prior, None)


def labelled(pooling="exclusive", prior=None, dispersion=2.0, **settings):
    return read(pooling, **settings).labelled("component", prior or GroupNormPrior(), dispersion)


@pytest.fixture(params=POOLINGS)
def pooling(request):
    return request.param


class TestLabelled:
    def test_as_given_inverts_ordered(self, pooling):
        part = labelled(pooling)
        n = sum(SIZES)
        assert sorted(part.order.tolist()) == list(range(n))
        assert torch.equal(part.as_given(part.order), torch.arange(n))
        groups = torch.randint(5, (n,))
        assert torch.equal(part.as_given(groups)[part.order], groups)
        assert torch.equal(part.as_given(groups[part.order]), groups)
        for site, f in part.problem.local.items():
            for name, value in f.params.items():
                ordered = part.ordered.local[site].params[name]
                assert torch.equal(ordered, value[part.order])
        assert torch.equal(part.ordered.weights, part.problem.weights[part.order])

    def test_ordered_keeps_parties_together(self):
        part = labelled()
        of = part.problem.party[part.order]
        for members in of.split(part.ordered.sizes):
            assert len(members.unique()) == 1 and len(members) == SIZES[int(members[0])]

    def test_ordered_is_that_of_permuted_parties(self, pooling):
        order, local = [2, 0, 3, 1], parties()
        weights = [1.0, 3.0, 2.0, 0.5]
        here = labelled(pooling, weights=weights)
        there = labelled(
            pooling, local=[local[s] for s in order], weights=[weights[s] for s in order]
        )
        shuffled = [local[0].permute("component", [2, 0, 1]), *local[1:]]
        inside = labelled(pooling, local=shuffled, weights=weights)
        for other in (there, inside):
            assert other.ordered.sizes == here.ordered.sizes
            for site, f in here.ordered.local.items():
                for name, value in f.params.items():
                    assert torch.equal(other.ordered.local[site].params[name], value)

    def test_components_are_in_the_order_of_the_parties(self):
        part = labelled()
        assert part.problem is part.messages and part.problem.sizes == SIZES
        assert set(part.problem.local) == {"loc", "scale"}  # weights merely follow, noise is shared
        loc = torch.cat([p.factors["loc"].mean for p in parties()])
        torch.testing.assert_close(part.problem.local["loc"].distribution().mean, loc)

    def test_messages_of_the_product_are_tempered(self):
        weights = [1.0, 3.0, 2.0, 0.0]
        part = labelled("product", weights=weights, dispersion=4.0)
        w = torch.tensor(weights, dtype=torch.float64) / 1.5
        torch.testing.assert_close(part.messages.weights, w[part.messages.party])
        assert part.problem.dispersion == 1.0 and bool((part.problem.weights == 1).all())
        for site, f in part.problem.local.items():
            plain, prior = part.messages.local[site], part.messages.prior[site]
            share = (part.messages.weights / 4.0).unsqueeze(1)
            truth = prior.natural + share * (plain.natural - prior.natural)
            torch.testing.assert_close(f.natural, truth)
        lost = part.problem.take((part.problem.party == 3).nonzero().squeeze(1))
        prior = part.messages.prior["loc"].expand_batch((3,))
        assert float(kl(lost.local["loc"], prior).max()) < 1e-12

    def test_prior_is_calibrated(self):
        part = labelled(prior=GroupNormPrior("auto"), dispersion=3.0)
        assert isinstance(part.assignment_prior.scale, float) and part.dispersion == 3.0
        twice = labelled(prior=GroupNormPrior("auto"), dispersion=6.0)
        assert twice.assignment_prior.scale == pytest.approx(part.assignment_prior.scale / 2)

    def test_dispersion_is_estimated_or_given(self, pooling):
        assert labelled(pooling, dispersion=2.5).dispersion == 2.5
        estimate = labelled(pooling, dispersion=None).dispersion
        assert 0 < estimate < float("inf")
        # A party of weight zero has no say in it.
        weights = [1.0, 1.0, 1.0, 0.0]
        mute = labelled(pooling, dispersion=None, weights=weights).dispersion
        fewer = labelled(pooling, dispersion=None, local=parties()[:3]).dispersion
        assert mute == pytest.approx(fewer, rel=1e-9)

    def test_pool_takes_the_messages(self):
        given = read("product")
        part = given.labelled("component", IndianBuffetPrior(), 4.0)
        groups = torch.tensor([k for h in HOLDS for k in h])
        atoms = given.pool(part, groups, 4)
        for site, f in atoms.items():
            prior, local = part.messages.prior[site], part.messages.local[site]
            for k in range(4):
                members = local.natural[groups == k]
                truth = prior.natural[0] + (members - prior.natural).sum(0)
                torch.testing.assert_close(f.natural[k], truth, rtol=1e-8, atol=1e-8)


def share(given, site):
    """The fused factor of a shared site, and its divergence."""
    problem = FusionProblem(parties=given, parts={}, links={}, shared={site: given.shared(site)})
    return given.unbatched(site, problem.shared_atoms[site]), problem.shared_objective


class TestShared:
    def test_divergence(self, pooling):
        given = read(pooling, weights=[1.0, 3.0, 2.0, 0.5])
        atom, divergence = share(given, "noise")
        assert atom.batch_shape == ()
        prior = given.shared("noise").prior.get("noise")
        total = float(kl(atom.expand_batch((1,)), prior)) if prior is not None else 0.0
        for p, w in zip(given.posteriors, given.weights.tolist(), strict=True):
            local = p.decomposed["noise"]
            ends = (local, atom) if pooling == "inclusive" else (atom, local)
            total += w * float(kl(*ends))
            if prior is not None:
                total -= w * float(kl(atom.expand_batch((1,)), prior))
        assert divergence == pytest.approx(total, rel=1e-9)

    def test_of_a_site_with_axes(self):
        local = [
            Posterior(
                {
                    "x": dist.Normal(torch.arange(2.0) + s, 1.0),
                    "grid": dist.Gamma(torch.rand(2, 3) + 1, torch.rand(2, 3) + 1),
                },
                {"x": "component"},
            )
            for s in range(2)
        ]
        given = read(local=local)
        atom, _ = share(given, "grid")
        assert atom.batch_shape == (2, 3)
        rates = torch.stack([p.factors["grid"].rate for p in local])
        torch.testing.assert_close(atom.distribution().rate, rates.double().mean(0))


class TestErrors:
    def test_too_few_atoms(self):
        given = read()
        given.priors(FixedAtoms(3))
        given.priors({"component": GroupNormPrior()})
        match = "party 0 has 3 components along 'component', but the assignment prior allows only 2"
        with pytest.raises(StructureError, match=match):
            given.priors({"component": FixedAtoms(2)})

    @pytest.mark.parametrize(
        "inputs, match",
        [
            ([], "at least one party, got none"),
            (parties()[0], "a list of posteriors or guides, got a single one"),
            ([parties()[0], 3], "party 1: expected a Posterior or a Pyro guide, got int"),
        ],
        ids=["empty", "single", "number"],
    )
    def test_inputs(self, inputs, match):
        with pytest.raises(StructureError, match=match):
            Parties.of(inputs, pooling_named("exclusive"), None, None, None)

    def test_an_unreadable_guide_is_numbered(self):
        def guide():
            return dist.Normal(0.0, 1.0).sample()

        with pytest.raises(Exception, match="party 1: "):
            read(local=[parties()[0], guide])

    def test_no_base(self):
        with pytest.raises(ParameterError, match="give it as `prior`"):
            read("product", prior=None)
        assert read("product", prior=None, local=parties()[:1]).prior == {}

    def test_location(self):
        wide = dist.Normal(torch.zeros(2).double(), 0.01).to_event(1)
        given = read("product", prior={**BASE, "loc": wide})
        with pytest.raises(ParameterError, match=r"site 'loc'.*is improper") as error:
            part = given.labelled("component", IndianBuffetPrior(), 1.0)
            with locating(part.messages):
                part.problem.barycenter(torch.zeros(sum(SIZES), dtype=torch.long), 1)
        assert "party 0, party 1, party 2, party 3" in str(error.value)

    def test_location_of_a_shared_site(self):
        narrow = dist.Gamma(torch.tensor(100.0).double(), torch.tensor(50.0).double())
        given = read("product", prior={**BASE, "noise": narrow})
        with pytest.raises(
            ParameterError, match="party 0, party 1, party 2, party 3, site 'noise': "
        ):
            share(given, "noise")

    def test_other_errors_pass(self):
        with pytest.raises(KeyError, match="own"), locating(labelled().problem):
            raise KeyError("own")
