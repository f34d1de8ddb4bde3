# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Two poolings of a user's own, one additive and one not: fused, against closed forms and all
partitions of small cases."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from scipy.linalg import sqrtm

from pyro_fusion import (
    FixedAtoms,
    FusionModel,
    GroupNormPrior,
    ParameterError,
    Posterior,
    StructureError,
    fuse,
)
from pyro_fusion.families import Factor
from pyro_fusion.fusion.ascent import expectation_maximization
from pyro_fusion.fusion.moves import regroup
from pyro_fusion.pooling import pooling_named
from pyro_fusion.pooling.collapsed import group_costs
from pyro_fusion.pooling.components import Components, compact
from pyro_fusion.pooling.kl import Exclusive
from tests.pooling.own import BuresWasserstein, Wasserstein

AXES = {"x": ("component", None)}
TRUTH = torch.tensor([[-6.0, 0.0], [0.0, 5.0], [6.0, -1.0]], dtype=torch.float64)


def covariances(count, generator):
    a = torch.randn(count, 2, 2, generator=generator, dtype=torch.float64)
    return 0.3 * a @ a.mT + 0.2 * torch.eye(2, dtype=torch.float64)


def parties(pooling, members, spread=0.4, seed=0):
    """Local posteriors of which each component is near the atom of that number."""
    g = torch.Generator().manual_seed(seed)
    posteriors = []
    for own in members:
        loc = TRUTH[list(own)]
        loc = loc + spread * torch.randn(loc.shape, generator=g, dtype=torch.float64)
        if isinstance(pooling, Wasserstein):
            scale = 0.5 + torch.rand(loc.shape, generator=g, dtype=torch.float64)
            factor = dist.Normal(loc, scale)
        else:
            factor = dist.MultivariateNormal(loc, covariances(len(own), g))
        posteriors.append(Posterior({"x": factor}, AXES))
    return posteriors


def moments(posteriors):
    """Means and covariances of all components in turn, as numbers."""
    found = []
    for p in posteriors:
        d = p.factors["x"]
        for i in range(d.batch_shape[0]):
            if isinstance(d, dist.MultivariateNormal):
                found.append((d.loc[i], d.covariance_matrix[i]))
            else:
                found.append((d.loc[i], d.scale[i].square().diag()))
    return found


def distance(a, b):
    """Half the squared 2-Wasserstein distance, by scipy."""
    half = sqrtm(a[1].numpy())
    cross = sqrtm(half @ b[1].numpy() @ half).real
    return 0.5 * float((a[0] - b[0]).square().sum() + (a[1] + b[1]).trace() - 2 * cross.trace())


def barycentre(members):
    """By gradient descent in a root of the covariance, from their mean."""
    loc = torch.stack([m[0] for m in members]).mean(0)
    c = torch.stack([m[1] for m in members]).mean(0).numpy()
    for _ in range(60):
        half = sqrtm(c).real
        cross = sum(sqrtm(half @ m[1].numpy() @ half).real for m in members) / len(members)
        inverse = torch.linalg.inv(torch.as_tensor(half)).numpy()
        c = inverse @ cross @ cross @ inverse
    return loc, torch.as_tensor(c)


def partitions(sizes, num_atoms=None):
    """All assignments ``[N]`` in which no party has an atom twice, atoms by first appearance."""
    party = [s for s, n in enumerate(sizes) for _ in range(n)]

    def extend(groups):
        n = len(groups)
        if n == len(party):
            yield groups
            return
        taken = {groups[m] for m in range(n) if party[m] == party[n]}
        top = max(groups, default=-1) + 2
        for k in range(top if num_atoms is None else min(top, num_atoms)):
            if k not in taken:
                yield from extend([*groups, k])

    yield from extend([])


def least(posteriors, dispersion, penalty):
    """The least F over all partitions, by scipy and brute force."""
    found = moments(posteriors)
    sizes = [p.components("component") for p in posteriors]
    known = {}

    def value(members):
        if members not in known:
            own = [found[n] for n in members]
            atom = barycentre(own)
            known[members] = sum(distance(atom, m) for m in own) / dispersion
        return known[members]

    best = math.inf
    for groups in partitions(sizes):
        sets = [tuple(n for n, k in enumerate(groups) if k == j) for j in range(max(groups) + 1)]
        best = min(best, sum(value(s) + penalty(len(s)) for s in sets))
    return best


@pytest.fixture(params=[Wasserstein, BuresWasserstein], ids=lambda x: x.name)
def pooling(request):
    return request.param()


MEMBERS = [(0, 1, 2), (2, 0), (1, 2), (0, 1, 2), (1,)]


class TestFuse:
    def test_finds_the_atoms(self, pooling):
        """Also where the dispersion is read off the posteriors."""
        posteriors = parties(pooling, MEMBERS)
        fusion = fuse(posteriors, pooling)
        assert fusion.pooling == pooling.name
        assert fusion.num_atoms == 3
        found, truth = torch.cat(fusion.assignment), torch.tensor([k for m in MEMBERS for k in m])
        assert torch.equal(found == found[:, None], truth == truth[:, None])
        every = moments(posteriors)
        for k in range(3):
            own = [every[int(n)] for n in (found == k).nonzero()]
            loc, covariance = barycentre(own)
            atom = moments([fusion.posterior])[k]
            torch.testing.assert_close(atom[0], loc)
            torch.testing.assert_close(atom[1], covariance, rtol=1e-7, atol=1e-8)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("scale", [0.5, 3.0])
    def test_f_is_the_least_over_all_partitions(self, pooling, seed, scale):
        members = [(0, 1), (1, 2), (2, 0), (1, 0)]
        posteriors = parties(pooling, members, 2.5, seed)
        fusion = fuse(posteriors, pooling, GroupNormPrior(scale), dispersion=2.0)
        expected = least(posteriors, 2.0, lambda m: scale * m**0.5)
        assert fusion.objective[-1] == pytest.approx(expected, rel=1e-7)

    def test_with_the_other_solvers(self, pooling):
        posteriors = parties(pooling, MEMBERS)
        prior = FixedAtoms(3)
        relaxed = fuse(posteriors, pooling, prior, solver="relaxed", dispersion=2.0)
        annealed = fuse(posteriors, pooling, prior, solver="sinkhorn", dispersion=2.0)
        assert relaxed.objective[-1] == pytest.approx(annealed.objective[-1])
        assert relaxed.only_label().bound <= relaxed.objective[-1] * (1 + 1e-9)

    def test_parties_without_weight(self, pooling):
        """They change nothing, and atoms that these alone have are barycentres of them alike."""
        posteriors = parties(pooling, [(0, 1), (0, 1), (0, 1, 2), (1, 2, 0)])
        weights = [1.0, 1.0, 0.0, 0.0]
        fusion = fuse(posteriors, pooling, weights=weights, dispersion=2.0)
        found, every = torch.cat(fusion.assignment), moments(posteriors)
        for k in range(fusion.num_atoms):
            own = (found == k).nonzero().flatten().tolist()
            voting = [n for n in own if n < 4]
            loc, _ = barycentre([every[n] for n in voting or own])
            torch.testing.assert_close(fusion.posterior.factors["x"].loc[k], loc)

    def test_the_program_refuses_it(self, pooling):
        posteriors = parties(pooling, MEMBERS)
        with pytest.raises(ParameterError, match=f"{pooling.name}.*no Pyro program.*`fuse` works"):
            FusionModel(posteriors, pooling)


class TestLinkedLabels:
    """Sites with two labels: what a party lacks is missing, entry by entry."""

    axes = {"W1": ("h1", None), "b2": ("h2", None), "W2": ("h2", "h1", None)}

    def parties(self, pooling):
        g = torch.Generator().manual_seed(3)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        every = {"W1": 3 * normal(4, 2), "b2": 3 * normal(3, 2), "W2": 3 * normal(3, 4, 2)}
        posteriors, units = [], []
        for sizes in ((3, 2), (3, 2), (2, 2), (2, 2)):
            h1, h2 = (
                torch.randperm(n, generator=g)[:m] for n, m in zip((4, 3), sizes, strict=True)
            )
            own = {"W1": every["W1"][h1], "b2": every["b2"][h2], "W2": every["W2"][h2][:, h1]}
            factors = {}
            for site, loc in own.items():
                loc = loc + 0.1 * normal(*loc.shape)
                if isinstance(pooling, Wasserstein):
                    factors[site] = dist.Normal(loc, 0.3 + normal(*loc.shape).abs())
                else:
                    covariance = covariances(loc[..., 0].numel(), g).reshape(*loc.shape, 2)
                    factors[site] = dist.MultivariateNormal(loc, covariance)
            posteriors.append(Posterior(factors, self.axes))
            units.append({"h1": h1, "h2": h2})
        return posteriors, units

    def test_are_found(self, pooling):
        posteriors, units = self.parties(pooling)
        fusion = fuse(posteriors, pooling, dispersion=3.0, restarts=2)
        entries = {}
        for label, m in fusion.labels.items():
            found, truth = torch.cat(m.assignment), torch.cat([u[label] for u in units])
            assert torch.equal(found == found[:, None], truth == truth[:, None])
        # The barycentre of each entry is that of the parties that have it.
        for s, p in enumerate(posteriors):
            h1, h2 = (fusion.labels[x].assignment[s].tolist() for x in ("h1", "h2"))
            loc = p.factors["W2"].loc
            for (i, a), (j, b) in itertools.product(enumerate(h2), enumerate(h1)):
                entries.setdefault((a, b), []).append(loc[i, j])
        pooled = fusion.posterior.factors["W2"].loc
        places = set(itertools.product(range(3), range(4)))
        assert pooled.shape == (3, 4, 2) and set(entries) < places
        for place, members in entries.items():
            torch.testing.assert_close(pooled[place], torch.stack(members).mean(0))
        # That which nobody has is the barycentre of all.
        for place in places - set(entries):
            every = torch.stack([x for members in entries.values() for x in members])
            torch.testing.assert_close(pooled[place], every.mean(0))


class TestMoves:
    """Of a pooling that is not additive."""

    def problem(self, loc, sizes):
        loc = torch.as_tensor(loc, dtype=torch.float64).reshape(-1, 1)
        eye = torch.eye(1, dtype=torch.float64)
        local = Factor.of(dist.MultivariateNormal(loc, eye.expand(len(loc), 1, 1)))
        weights = torch.ones(len(loc), dtype=torch.float64)
        return Components({"x": local}, sizes, weights, BuresWasserstein(), {}, 1.0)

    @pytest.mark.parametrize(
        ("loc", "groups", "expected"),
        [
            (
                [0, 50, 0, 90, 0.3, 50, 0.3, 90],
                [0, 1, 0, 2, 3, 1, 3, 2],
                [0, 1, 0, 2, 0, 1, 0, 2],
            ),
            (
                [0, 50, 0, 90, 9, 50, 9, 90],
                [0, 1, 0, 2, 0, 1, 0, 2],
                [0, 1, 0, 2, 3, 1, 3, 2],
            ),
        ],
        ids=["merge", "split"],
    )
    def test_merges_and_splits(self, loc, groups, expected):
        problem, groups = self.problem(loc, (2, 2, 2, 2)), torch.tensor(groups)
        groups, num_atoms = compact(groups)
        cost = problem.cost(problem.barycenter(groups, num_atoms))
        after = regroup(problem, GroupNormPrior(1.0), groups, num_atoms, cost)
        expected = torch.tensor(expected)
        assert torch.equal(after == after[:, None], expected == expected[:, None])

    @pytest.mark.parametrize("block", [1, 20, 1 << 20])
    def test_costs_of_groups_one_at_a_time_and_together(self, block, monkeypatch):
        """Against distances from means, in closed form for equal covariances."""
        monkeypatch.setattr("pyro_fusion.pooling.collapsed._NUMBERS_EXPLICIT", block)
        loc = [0.0, 7, 2, 5, 1, 3, 8, 4]
        groups = torch.tensor([0, 1, 0, 2, 1, 2, 2, 0])
        costs = group_costs(self.problem(loc, (2, 2, 2, 2)), groups, 3)

        def closed(members):
            x = torch.tensor(loc)[members]
            return float((x - x.mean()).square().sum()) / 2

        is_of = [groups == k for k in range(3)]
        expected = [closed(is_of[k]) for k in range(3)]
        assert costs.values(torch.arange(3)).tolist() == pytest.approx(expected)
        first, second = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
        expected = [closed(is_of[a] | is_of[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
        assert costs.values(first, second).tolist() == pytest.approx(expected)
        part = torch.tensor([1, 1, 0, 0, 0, 1, 1, 0]).bool()
        here, there = costs.parted(groups, part)
        expected = [closed(is_of[k] & ~part) for k in (2, 0)]
        assert here.values(torch.tensor([2, 0])).tolist() == pytest.approx(expected)
        assert there.values(torch.tensor([2])).tolist() == pytest.approx([closed(is_of[2] & part)])

    def test_f_never_rises(self):
        g = torch.Generator().manual_seed(0)
        loc = 4 * torch.randn(12, 1, generator=g)
        problem = self.problem(loc, (3,) * 4)
        start = torch.cat([torch.randperm(6, generator=g)[:3] for _ in range(4)])
        result = expectation_maximization(problem, GroupNormPrior(), start)
        trace = torch.tensor(result.objective, dtype=torch.float64)
        assert len(trace) > 1
        assert (trace.diff() < 0).all()


class TestBuresWasserstein:
    def test_solves_the_equation_of_its_barycentre(self):
        g = torch.Generator().manual_seed(1)
        c = covariances(5, g)
        local = Factor.of(dist.MultivariateNormal(torch.zeros(5, 2, dtype=torch.float64), c))
        groups = torch.tensor([0, 1, 0, 0, 1])
        w = torch.tensor([1.0, 0.5, 2.0, 0.3, 1.0], dtype=torch.float64)
        atoms = BuresWasserstein().barycenter(local, groups, 2, w)
        for k in range(2):
            tril = atoms.params["scale_tril"][k]
            own = (tril @ tril.mT).numpy()
            half = sqrtm(own).real
            members = (groups == k).nonzero().flatten().tolist()
            terms = [float(w[n]) * sqrtm(half @ c[n].numpy() @ half).real for n in members]
            right = sum(terms) / float(w[members].sum())
            torch.testing.assert_close(
                torch.as_tensor(own), torch.as_tensor(right), rtol=1e-10, atol=1e-10
            )

    def test_in_one_dimension_standard_deviations_are_averaged(self):
        loc = torch.tensor([[1.0], [4.0], [-2.0]], dtype=torch.float64)
        scale = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
        local = Factor.of(dist.MultivariateNormal(loc, scale.square().reshape(3, 1, 1)))
        w = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
        atom = BuresWasserstein().barycenter(local, torch.zeros(3, dtype=torch.long), 1, w)
        p = w / w.sum()
        torch.testing.assert_close(atom.params["loc"][0, 0], p @ loc[:, 0])
        torch.testing.assert_close(atom.params["scale_tril"][0, 0, 0], p @ scale)


class TestPrograms:
    """A pooling has the program of its own objective or none."""

    def test_that_of_the_base_class_is_not_inherited_by_another_divergence(self):
        class Half(Exclusive):
            def divergence(self, atoms, local):
                return super().divergence(atoms, local) / 2

            def cost(self, atoms, local, prior=None):
                return super().cost(atoms, local) / 2

        class Renamed(Exclusive):
            name = "renamed"

        posteriors = parties(Wasserstein(), MEMBERS)
        with pytest.raises(ParameterError, match="no Pyro program"):
            FusionModel(posteriors, Half())
        assert FusionModel(posteriors, Renamed()).problem.pooling.draws_from == "local"

    @pytest.mark.parametrize(("name", "value"), [("draws_from", "prior"), ("tempers", True)])
    def test_what_needs_the_prior_must_say_so(self, name, value):
        odd = type("Odd", (BuresWasserstein,), {name: value})()
        with pytest.raises(ParameterError, match=f"bures-wasserstein.*`{name}`.*set `needs_prior`"):
            fuse(parties(odd, MEMBERS), odd)

    def test_errors_of_the_prior_name_the_pooling(self):
        odd = type("Odd", (BuresWasserstein,), {"needs_prior": True, "name": "odd"})()
        posteriors = parties(odd, MEMBERS)
        with pytest.raises(ParameterError, match="pooling 'odd' divides out the prior"):
            fuse(posteriors, odd)
        with pytest.raises(StructureError, match="pooling 'odd' needs the prior of site 'x'"):
            fuse(posteriors, odd, prior={"y": dist.Normal(0.0, 1.0)})


def test_a_pooling_is_named_by_itself(pooling):
    assert pooling_named(pooling) is pooling
