# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Sites with several labels, each assigned in turn given the others: against loops over entries,
all assignments of small cases, Pyro's ELBO, and networks whose units are known."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyro_fusion import (
    FixedAtoms,
    FusionEM,
    FusionGibbs,
    FusionGuide,
    FusionModel,
    GroupNormPrior,
    IndianBuffetPrior,
    ParameterError,
    Posterior,
    StructureError,
    from_guide,
    fuse,
)
from pyro_fusion.assignment.problem import party_of
from pyro_fusion.fusion.parties import Parties
from pyro_fusion.pooling import pooling_named
from tests.fusion.networks import AXES, BASE, OUTGOING, network, parties, settings_of

POOLINGS = ["exclusive", "inclusive", "product"]


@pytest.fixture(params=POOLINGS)
def pooling(request):
    return request.param


def is_right(matching, truth):
    """Whether components are of one atom exactly where they are the same unit."""
    found = torch.cat(matching.assignment)
    units = torch.cat([t[matching.label] for t in truth])
    same = found.unsqueeze(0) == found.unsqueeze(1)
    return torch.equal(same, units.unsqueeze(0) == units.unsqueeze(1))


def by_loops(posteriors, groups, pooling, weights=None):
    """``Σ w D`` over all entries of all sites at their best atoms, one by one."""
    w = [1.0] * len(posteriors) if weights is None else weights
    total = 0.0
    for site in posteriors[0].axes:
        members = {}
        for s, p in enumerate(posteriors):
            d = p.factors[site]
            labels = p.axes[site]
            for place in itertools.product(*map(range, d.batch_shape)):
                atom = tuple(
                    int(groups[label][s][i]) if label else i
                    for label, i in zip(labels, place, strict=True)
                )
                local = dist.Normal(d.loc[place], d.scale[place])
                members.setdefault(atom, []).append((w[s], local))
        for found in members.values():
            share = torch.tensor([x for x, _ in found], dtype=torch.float64)
            loc = torch.stack([d.loc for _, d in found])
            var = torch.stack([d.scale**2 for _, d in found])
            p = share / share.sum()
            if pooling == "exclusive":
                v = 1 / (p / var).sum()
                m = v * (p * loc / var).sum()
                atom = dist.Normal(m, v**0.5)
                total += sum(x * float(kl_divergence(atom, d)) for x, d in found)
            else:
                m = (p * loc).sum()
                v = (p * (var + loc**2)).sum() - m**2
                atom = dist.Normal(m, v**0.5)
                total += sum(x * float(kl_divergence(d, atom)) for x, d in found)
    return total


class TestObjective:
    @pytest.mark.parametrize("pooling", ["exclusive", "inclusive"])
    def test_counts_each_factor_once(self, pooling):
        posteriors, _ = parties()
        weights = [1.5, 0.5, 1.0, 1.0]
        prior = GroupNormPrior(2.0)
        fusion = fuse(posteriors, pooling, prior, weights=weights)
        groups = {k: m.assignment for k, m in fusion.labels.items()}
        scales = {k: m.dispersion for k, m in fusion.labels.items()}
        unit = (scales["h1"] * scales["h2"]) ** 0.5
        linked = [p for p in posteriors]
        only = [
            Posterior(
                {k: v for k, v in p.factors.items() if k != "b3"},
                {k: v for k, v in AXES.items()},
            )
            for p in linked
        ]
        expected = by_loops(only, groups, pooling, weights) / unit
        for label, m in fusion.labels.items():
            norm = float((2.0 * m.popularity.double().sqrt()).sum())
            expected += scales[label] / unit * norm
        assert fusion.objective[-1] == pytest.approx(expected + fusion.shared_objective)

    def test_is_the_elbo(self, pooling):
        """At any assignment, with the best atoms."""
        posteriors, _ = parties(sizes=((3, 2), (2, 3)), num_units=(4, 3))
        model = FusionModel(
            posteriors, assignment_prior=GroupNormPrior(1.0), **settings_of(pooling)
        )
        g = torch.Generator().manual_seed(0)
        for _ in range(3):
            start = {
                label: torch.cat([torch.randperm(4, generator=g)[:n] for n in part.problem.sizes])
                for label, part in model.problem.parts.items()
            }
            model = FusionModel(model.problem, assignment=start)
            guide = FusionGuide(model)
            expected = model.problem.linked_objective(("h1", "h2"), start)
            expected += model.problem.shared_objective
            if pooling == "product":
                # At the best atoms each draw is the evidence.
                draws = [Trace_ELBO().loss(model, guide) for _ in range(10)]
                assert draws == pytest.approx([expected] * 10)
            else:
                assert TraceMeanField_ELBO().loss(model, guide) == pytest.approx(expected)

    def test_svi_reaches_it(self):
        posteriors, _ = parties(sizes=((3, 2), (2, 3)), num_units=(4, 3))
        model = FusionModel(posteriors, assignment_prior=GroupNormPrior(1.0))
        guide = FusionGuide(model)
        best = TraceMeanField_ELBO().loss(model, guide)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        assert TraceMeanField_ELBO().loss(model, guide) > best + 0.1
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), TraceMeanField_ELBO())
        for _ in range(400):
            svi.step()
        assert TraceMeanField_ELBO().loss(model, guide) == pytest.approx(best, rel=1e-3)

    @pytest.mark.parametrize("prior", [GroupNormPrior(), IndianBuffetPrior(), FixedAtoms(6)])
    def test_never_rises(self, pooling, prior):
        posteriors, _ = parties(seed=3, noise=0.4, scale=0.2)
        fusion = fuse(posteriors, assignment_prior=prior, **settings_of(pooling))
        trace = torch.tensor(fusion.objective, dtype=torch.float64)
        assert (trace.diff() <= 1e-9 * trace[:-1].abs()).all()
        model = FusionModel(posteriors, assignment_prior=prior, **settings_of(pooling))
        em = FusionEM(model, FusionGuide(model))
        losses = [em.step() for _ in range(6)]
        assert all(b <= a + 1e-9 * abs(a) for a, b in itertools.pairwise(losses))

    @settings(max_examples=6, deadline=None)
    @given(st.integers(0, 10_000), st.floats(0.05, 1.5), st.sampled_from(POOLINGS))
    def test_never_rises_anywhere(self, seed, noise, pooling):
        posteriors, _ = parties(seed, ((3, 2), (2, 2), (3, 3)), noise, 0.3, num_units=(4, 3))
        model = FusionModel(posteriors, **settings_of(pooling))
        em = FusionEM(model, FusionGuide(model))
        losses = [em.step() for _ in range(4)]
        assert all(b <= a + 1e-9 * abs(a) for a, b in itertools.pairwise(losses))
        found = em.run(restarts=1).objective
        assert found[-1] <= losses[-1] + 1e-9 * abs(losses[-1])


class TestRecovery:
    @pytest.mark.parametrize("seed", range(3))
    def test_units_of_both_layers(self, pooling, seed):
        posteriors, truth = parties(seed)
        fusion = fuse(posteriors, **settings_of(pooling))
        assert all(is_right(m, truth) for m in fusion.labels.values())
        counts = {k: m.num_atoms for k, m in fusion.labels.items()}
        assert fusion.posterior.factors["W2"].batch_shape == (counts["h2"], counts["h1"])
        # Right entries too: those of the network that all units are from.
        every = network(seed)
        where = {}
        for label, m in fusion.labels.items():
            unit = torch.empty(m.num_atoms, dtype=torch.long)
            for a, t in zip(m.assignment, truth, strict=True):
                unit[a] = t[label]
            where[label] = unit
        has = torch.zeros(counts["h2"], counts["h1"], dtype=torch.bool)
        for a, b in zip(*(fusion.labels[x].assignment for x in ("h2", "h1")), strict=True):
            has[a.unsqueeze(1), b] = True
        expected = every["W2"][where["h2"]][:, where["h1"]]
        found = fusion.posterior.factors["W2"].mean
        shrunk = 9.0 / (9.0 + 0.01) if pooling == "product" else 1.0
        assert float((found - shrunk * expected)[has].abs().max()) < 0.25

    def test_no_assignment_is_better(self):
        """Of two parties with two units in each layer: all pairs of assignments."""
        posteriors, _ = parties(5, ((2, 2), (2, 2)), 0.6, 0.4, num_units=(3, 3))
        model = FusionModel(posteriors, assignment_prior=GroupNormPrior(), dispersion=4.0)
        ways = [[0, 1, *x] for x in itertools.permutations(range(4), 2)]
        best = min(
            model.problem.linked_objective(
                ("h1", "h2"), {"h1": torch.tensor(a), "h2": torch.tensor(b)}
            )
            for a in ways
            for b in ways
        )
        fusion = fuse(posteriors, dispersion=4.0)
        found = fusion.objective[-1] - fusion.shared_objective
        assert found == pytest.approx(best)

    def test_order_does_not_matter(self, pooling):
        posteriors, _ = parties(1, noise=0.3, scale=0.2)
        g = torch.Generator().manual_seed(4)
        first = fuse(posteriors, **settings_of(pooling))
        shuffled = []
        for s in (2, 0, 3, 1):
            p = posteriors[s]
            for label in ("h1", "h2"):
                p = p.permute(label, torch.randperm(p.components(label), generator=g))
            shuffled.append(p)
        second = fuse(shuffled, **settings_of(pooling))
        assert second.objective[-1] == pytest.approx(first.objective[-1])

    def test_second_layer_helps_the_first(self):
        """Units that have the same incoming weights are told apart by what they act on."""
        posteriors, truth = parties(2, ((4, 5), (4, 5), (4, 5)), num_units=(4, 5))
        alike = []
        for p, t in zip(posteriors, truth, strict=True):
            f = p.factors
            w = f["W1"].mean.clone()
            same = (t["h1"] == 0) | (t["h1"] == 1)
            w[same] = network(2, num_units=(4, 5))["W1"][0]
            b = torch.where(same, 0.0, f["b1"].mean)
            f = {**f, "W1": dist.Normal(w, f["W1"].scale), "b1": dist.Normal(b, f["b1"].scale)}
            alike.append(Posterior(f, AXES))
        fusion = fuse(alike, dispersion=10.0)
        assert is_right(fusion.labels["h1"], truth)

    def test_three_layers_without_biases(self):
        """The middle layers have no site of their own."""
        g = torch.Generator().manual_seed(0)
        w = [torch.randn(4, 4, generator=g, dtype=torch.float64) for _ in range(4)]
        posteriors, orders = [], []
        for _ in range(3):
            a, b, c = (torch.randperm(4, generator=g) for _ in range(3))
            own = {
                "A": w[0][a],
                "B": w[1][b][:, a],
                "C": w[2][c][:, b],
                "D": w[3][:, c],
            }
            axes = {"A": ("x", None), "B": ("y", "x"), "C": ("z", "y"), "D": (None, "z")}
            factors = {k: dist.Normal(v, torch.full_like(v, 0.1)) for k, v in own.items()}
            posteriors.append(Posterior(factors, axes))
            orders.append({"x": a, "y": b, "z": c})
        for prior in (GroupNormPrior(), FixedAtoms(4)):
            fusion = fuse(posteriors, assignment_prior=prior)
            for label, m in fusion.labels.items():
                found = torch.cat(m.assignment)
                units = torch.cat([o[label] for o in orders])
                same = units.unsqueeze(0) == units.unsqueeze(1)
                assert torch.equal(found.unsqueeze(0) == found.unsqueeze(1), same)
        for pooling in ("exclusive", "inclusive"):  # the program too
            model = FusionModel(posteriors, pooling=pooling)
            guide = FusionGuide(model)
            expected = model.problem.linked_objective(
                model.problem.parties.roles.groups[0], guide.assignment
            )
            assert TraceMeanField_ELBO().loss(model, guide) == pytest.approx(expected)

    @pytest.mark.parametrize("seed", range(3))
    def test_labels_without_sites_of_their_own(self, pooling, seed):
        """The guide knows how many atoms there are: its ELBO is -F."""
        g = torch.Generator().manual_seed(seed)
        w = [torch.randn(5, 5, generator=g, dtype=torch.float64) for _ in range(4)]
        axes = {"A": ("x", None), "B": ("y", "x"), "C": ("z", "y"), "D": (None, "z")}
        posteriors = []
        for sizes in ((4, 3, 3), (3, 4, 5), (4, 4, 3), (5, 3, 4)):
            a, b, c = (torch.randperm(5, generator=g)[:n] for n in sizes)
            own = {"A": w[0][a], "B": w[1][b][:, a], "C": w[2][c][:, b], "D": w[3][:, c]}
            noisy = {
                k: v + 0.3 * torch.randn(v.shape, generator=g, dtype=v.dtype)
                for k, v in own.items()
            }
            factors = {k: dist.Normal(v, torch.full_like(v, 0.1)) for k, v in noisy.items()}
            posteriors.append(Posterior(factors, axes))
        one = dist.Normal(torch.zeros((), dtype=torch.float64), 3.0)
        base = {"prior": dict.fromkeys(axes, one)} if pooling == "product" else {}
        model = FusionModel(posteriors, pooling=pooling, **base)
        guide = FusionGuide(model)
        fusion = FusionEM(model, guide).run(restarts=1)
        assert guide.num_atoms == {k: m.num_atoms for k, m in fusion.labels.items()}
        elbo = Trace_ELBO() if pooling == "product" else TraceMeanField_ELBO()
        assert elbo.loss(model, guide) == pytest.approx(fusion.objective[-1])

    def test_filters_of_convolutions(self):
        g = torch.Generator().manual_seed(0)
        w1 = torch.randn(3, 2, 3, 3, generator=g, dtype=torch.float64)
        w2 = torch.randn(4, 3, 3, 3, generator=g, dtype=torch.float64)
        b2 = torch.randn(4, generator=g, dtype=torch.float64)
        posteriors, orders = [], []
        for _ in range(3):
            i, j = torch.randperm(3, generator=g), torch.randperm(4, generator=g)
            own = {"w1": w1[i], "w2": w2[j][:, i], "b2": b2[j]}
            factors = {k: dist.Normal(v, torch.full_like(v, 0.1)) for k, v in own.items()}
            axes = {"w1": ("c1",), "w2": ("c2", "c1"), "b2": ("c2",)}
            posteriors.append(Posterior(factors, axes))
            orders.append({"c1": i, "c2": j})
        fusion = fuse(posteriors)
        for label, m in fusion.labels.items():
            found, units = torch.cat(m.assignment), torch.cat([o[label] for o in orders])
            same = units.unsqueeze(0) == units.unsqueeze(1)
            assert torch.equal(found.unsqueeze(0) == found.unsqueeze(1), same)
        assert fusion.posterior.factors["w2"].batch_shape == (4, 3, 3, 3)


class TestOutgoing:
    def test_one_layer_is_the_mean_of_the_functions(self):
        """Where units are the same to the bit, the fused network's output is the mean of the
        parties' outputs."""
        g = torch.Generator().manual_seed(0)
        w, b = torch.randn(5, 3, generator=g).double(), torch.randn(5, generator=g).double()
        v = torch.randn(2, 5, generator=g).double()
        posteriors = []
        for own in ([0, 1, 2], [3, 1], [4, 0, 1]):
            factors = {
                "w": dist.Normal(w[own], torch.full((len(own), 3), 0.01).double()),
                "b": dist.Normal(b[own], torch.full((len(own),), 0.01).double()),
                "v": dist.Normal(v[:, own], torch.full((2, len(own)), 0.01).double()),
            }
            axes = {"w": ("unit", None), "b": ("unit",), "v": (None, "unit")}
            posteriors.append(Posterior(factors, axes, outgoing={"v": "unit"}))
        x = torch.randn(7, 3, generator=g).double()

        def output(p):
            f = {k: d.mean for k, d in p.factors.items()}
            return torch.tanh(x @ f["w"].mT + f["b"]) @ f["v"].mT

        weights = torch.tensor([1.0, 2.0, 0.5])
        for given_weights in (None, weights):
            w_s = torch.ones(3) if given_weights is None else weights
            expected = sum(c * output(p) for c, p in zip(w_s, posteriors, strict=True)) / w_s.sum()
            for pooling in ("exclusive", "inclusive"):
                fusion = fuse(posteriors, pooling, weights=given_weights)
                assert fusion.num_atoms == 5
                torch.testing.assert_close(output(fusion.posterior), expected)
        assert fusion.posterior.outgoing == {"v": "unit"}

    def test_exclusive_counts_parties_by_how_sure_they_are(self):
        g = torch.Generator().manual_seed(0)
        w, v = torch.randn(5, 3, generator=g).double(), torch.randn(5, 2, generator=g).double()
        holds = ([0, 1, 2], [3, 1], [4, 0, 1])
        # Each party as sure of all its effects on an output, but more or less of either.
        sd = torch.tensor([[0.1, 1.0], [0.2, 0.1], [0.5, 0.3]]).double()
        posteriors = [
            Posterior(
                {
                    "w": dist.Normal(w[own], torch.full((len(own), 3), 0.01).double()),
                    "v": dist.Normal(v[own], sd[s].expand(len(own), 2)),
                },
                {"w": ("unit", None), "v": ("unit", None)},
                outgoing={"v": "unit"},
            )
            for s, own in enumerate(holds)
        ]
        x = torch.randn(7, 3, generator=g).double()
        weights = torch.tensor([1.0, 2.0, 0.5]).double()
        output = [torch.tanh(x @ w[own].mT) @ v[own] for own in holds]
        say = weights.unsqueeze(1) / sd
        expected = sum(a * b for a, b in zip(say, output, strict=True)) / say.sum(0)
        for multivariate in (False, True):
            if multivariate:
                posteriors = [
                    Posterior(
                        {
                            "w": p.factors["w"],
                            "v": dist.MultivariateNormal(
                                p.factors["v"].mean, p.factors["v"].variance.diag_embed()
                            ),
                        },
                        {"w": ("unit", None), "v": ("unit", None)},
                        outgoing={"v": "unit"},
                    )
                    for p in posteriors
                ]
            fusion = fuse(posteriors, weights=weights)
            f = {k: d.mean for k, d in fusion.posterior.factors.items()}
            torch.testing.assert_close(torch.tanh(x @ f["w"].mT) @ f["v"], expected)

    def test_between_layers(self):
        """What acts on a unit is a mean over the parties that have this unit."""
        posteriors, _ = parties(0)
        given = [Posterior(p.factors, p.axes, outgoing=OUTGOING) for p in posteriors]
        plain, fusion = fuse(posteriors), fuse(given)
        assert plain.objective == pytest.approx(fusion.objective)
        before, after = plain.posterior.factors, fusion.posterior.factors
        matchings = fusion.labels
        own = [
            (set(a.tolist()), set(b.tolist()))
            for a, b in zip(*(matchings[x].assignment for x in ("h2", "h1")), strict=True)
        ]
        missing = 0
        for j in range(matchings["h2"].num_atoms):
            share = len([1 for two, _ in own if j in two]) / 4
            torch.testing.assert_close(after["W3"].mean[:, j], before["W3"].mean[:, j] * share)
            torch.testing.assert_close(after["W3"].stddev[:, j], before["W3"].stddev[:, j] * share)
            for k in range(matchings["h1"].num_atoms):
                among = [k in one for two, one in own if j in two]
                expected = before["W2"].mean[j, k] * sum(among) / len(among)
                torch.testing.assert_close(after["W2"].mean[j, k], expected)
                missing += not any(among)
        assert missing  # which are zero, and no surer or less sure than of one party
        zero = after["W2"].mean == 0
        assert int(zero.sum()) == missing
        torch.testing.assert_close(
            after["W2"].stddev[zero], torch.full((missing,), 0.1 / 4).double()
        )
        torch.testing.assert_close(after["W1"].mean, before["W1"].mean)

    def test_is_kept(self, tmp_path):
        posteriors, _ = parties()
        p = Posterior(posteriors[0].factors, AXES, outgoing=OUTGOING)
        p.save(tmp_path / "p.safetensors")
        for other in (
            Posterior.load(tmp_path / "p.safetensors"),
            p.permute("h1", [3, 2, 1, 0]),
            p.select("h2", [0]),
            p.to(dtype=torch.float32),
        ):
            assert other.outgoing == OUTGOING
        with pytest.raises(
            StructureError, match=r"'W2': expected .*outgoing label.* None for party 1"
        ):
            fuse([p, posteriors[1]])

    def test_from_a_guide(self):
        def guide():
            with pyro.plate("unit", 3):
                pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("v", dist.Normal(torch.zeros(4), 1.0).to_event(1))

        assert from_guide(guide, outgoing={"v": "unit"}).outgoing == {"v": "unit"}

    @pytest.mark.parametrize(
        "outgoing", [{"W2": "other"}, {"W1": None}, {"b3": "h1"}, {"rate": "h1"}]
    )
    def test_bad(self, outgoing):
        posteriors, _ = parties()
        factors = {**posteriors[0].factors, "rate": dist.Gamma(torch.ones(4), 1.0)}
        axes = {**AXES, "rate": ("h1",)}
        with pytest.raises(StructureError, match=f"site '{next(iter(outgoing))}': expected"):
            Posterior(factors, axes, outgoing=outgoing)
        with pytest.raises(StructureError, match="outgoing names sites"):
            Posterior(factors, axes, outgoing={"nowhere": "h1"})


class TestStructure:
    def roles(self, axes, factors=None):
        x = torch.zeros(3, 4)
        own = {site: dist.Normal(x, 1.0) for site in axes}
        return Parties.of(
            [Posterior(factors or own, axes)], pooling_named("exclusive"), None, None, None
        ).roles

    def test_groups(self):
        axes = {"a": ("x", None), "b": ("x", "y"), "c": (None, "y"), "d": ("z",)}
        roles = self.roles(axes)
        assert roles.linked == {"b": ("x", "y")}
        assert sorted(map(sorted, roles.groups)) == [["x", "y"], ["z"]]

    def test_no_site_of_its_own(self):
        with pytest.raises(StructureError, match="is only on sites that have other labels too"):
            self.roles({"b": ("x", "y"), "d": ("z", None)})

    def test_simplex(self):
        p = dist.Dirichlet(torch.ones(3, 4))
        with pytest.raises(StructureError, match="'t' has the labels"):
            self.roles({"t": ("x", "y")}, {"t": p})

    def test_label_twice(self):
        f = {"t": dist.Normal(torch.zeros(3, 3, 4), 1.0), "u": dist.Normal(torch.zeros(3, 4), 1.0)}
        with pytest.raises(StructureError, match="'t' has the labels"):
            self.roles({"t": ("x", "x", "y"), "u": ("x", "y")}, f)

    def test_names_that_clash(self):
        def normal(*shape):
            return dist.Normal(torch.randn(shape), 1.0)

        axes = {"a": ("x", None), "b": ("y", None), "x": ("x", "y")}
        p, q = (
            Posterior({"a": normal(3, 2), "b": normal(2, 2), "x": normal(3, 2)}, axes)
            for _ in range(2)
        )
        with pytest.raises(StructureError, match="label 'x' has the name of a site"):
            FusionModel([p, q])()

    def test_a_wide_entry_of_a_party_without_weight(self):
        """What stands where entries are missing is wide of no party."""
        posteriors, _ = parties(sizes=((4, 3), (5, 4), (3, 4)))
        found = []
        for place in ((0, 0), (1, 1)):
            f = dict(posteriors[0].factors)
            scale = f["W2"].scale.clone()
            scale[place] = 50.0  # the prior's is 3
            wide = Posterior({**f, "W2": dist.Normal(f["W2"].loc, scale)}, AXES)
            local = [wide, *posteriors[1:]]
            fusion = fuse(local, "product", prior=BASE, weights=[0, 1, 1], dispersion=1.0)
            found.append(fusion.objective[-1])
            with pytest.raises(ParameterError, match=r"party 0, site 'W2': "):
                fuse(local, "product", prior=BASE, dispersion=0.9)
        assert found[0] == pytest.approx(found[1])

    def test_wrong_prior(self):
        posteriors, _ = parties()
        g = torch.Generator().manual_seed(0)
        bad = dist.Normal(torch.randn(3, 4, generator=g).double(), 3.0)
        with pytest.raises(StructureError, match="'W2': the prior differs between components"):
            fuse(posteriors, "product", prior={**BASE, "W2": bad})

    def test_prior_with_the_axes(self):
        posteriors, _ = parties()
        whole = dist.Normal(torch.zeros(3, 4).double(), 3.0)
        one = fuse(posteriors, "product", prior=BASE)
        two = fuse(posteriors, "product", prior={**BASE, "W2": whole})
        assert one.objective == two.objective
        # What no party has is the prior.
        has = torch.zeros_like(one.posterior.factors["W2"].mean, dtype=torch.bool)
        for a, b in zip(*(one.labels[x].assignment for x in ("h2", "h1")), strict=True):
            has[a.unsqueeze(1), b] = True
        assert not bool(has.all())
        assert (one.posterior.factors["W2"].stddev[~has] == 3.0).all()
        assert (one.posterior.factors["W2"].stddev[has] < 0.2).all()

    def test_no_relaxed_assignment_and_no_gibbs(self):
        posteriors, _ = parties()
        model = FusionModel(posteriors, **settings_of("product"))
        with pytest.raises(StructureError, match=r"\['W2'\] have several labels"):
            FusionGuide(model, relaxed=True)
        with pytest.raises(ParameterError, match=r"\['W2'\] have several labels"):
            FusionGibbs(model)

    def test_state_of_another_size(self):
        posteriors, _ = parties()
        model = FusionModel(posteriors)
        guide = FusionGuide(model)
        em = FusionEM(model, guide)
        em.run(restarts=0)
        state = guide.state_dict()
        start = {x: torch.arange(sum(p.problem.sizes)) for x, p in model.problem.parts.items()}
        other = FusionGuide(model, start)
        assert TraceMeanField_ELBO().loss(model, other) != pytest.approx(em.step())
        other.load_state_dict(state)
        assert TraceMeanField_ELBO().loss(model, other) == pytest.approx(em.step())

    def test_links_know_their_parties(self):
        posteriors, _ = parties()
        (link,) = Parties.of(posteriors, pooling_named("exclusive"), None, None, None).links
        sizes = [p.factors["W2"].mean.numel() for p in posteriors]
        assert torch.equal(link.messages.party, party_of(sizes))
        for label in ("h1", "h2"):
            own = party_of([p.components(label) for p in posteriors])
            assert torch.equal(own[link.index[label]], link.messages.party)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("scale", [3e-3, 1e-3, 1e-4])
def test_networks_that_are_very_sure_are_fused(pooling, scale):
    sites = ("W1", "W2", "W3")
    local = [
        Posterior(
            {
                k: dist.Normal(v.float(), scale).to_event(2)
                for k, v in network(s).items()
                if k in sites
            },
            {k: AXES[k] for k in sites},
        )
        for s in range(2)
    ]
    base = {"prior": {k: BASE[k] for k in sites}} if pooling == "product" else {}
    fusion = fuse(local, pooling, restarts=0, **base)
    trace = fusion.objective
    assert all(b <= a + 1e-6 * abs(a) for a, b in itertools.pairwise(trace))
    assert set(fusion.labels) == {"h1", "h2"}
