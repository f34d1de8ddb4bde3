# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Components with missing entries against loops over the entries that are there."""

from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_fusion import GroupNormPrior
from pyro_fusion.families import Factor, kl, pairwise_kl
from pyro_fusion.families.masked import Masked
from pyro_fusion.pooling import Pooling, pooling_named
from pyro_fusion.pooling.collapsed import Sums
from pyro_fusion.pooling.components import Components
from pyro_fusion.pooling.pooling import Entrywise

POOLINGS = ["exclusive", "inclusive", "product"]
J = 5


def draw(family, shape, seed):
    """Distributions of one batch shape."""
    g = torch.Generator().manual_seed(seed)

    def normal(*more):
        return torch.randn(*shape, *more, generator=g, dtype=torch.float64)

    if family == "Normal":
        return dist.Normal(3 * normal(), 0.3 + torch.rand(shape, generator=g).double())
    if family == "MultivariateNormal":
        a = normal(2, 2)
        eye = torch.eye(2, dtype=torch.float64)
        return dist.MultivariateNormal(normal(2), a @ a.mT + eye)
    return dist.Gamma(1 + normal() ** 2, 1 + normal() ** 2)


def partial(family, count, seed):
    """``count`` components, each of whose entries is there or not, but for one in any case."""
    g = torch.Generator().manual_seed(seed + 100)
    d = draw(family, (count, J), seed)
    mass = (torch.rand(count, J, generator=g) < 0.6).double()
    mass[:, 0] = 1
    return Masked(replace(Factor.of(d), batch_dim=1), mass), d


@pytest.fixture(params=["Normal", "MultivariateNormal", "Gamma"])
def family(request):
    return request.param


def order(pooling, atom, local, m):
    """The arguments of the divergence, component ``m`` in the one atom."""
    pair = [atom.distribution(), local.index_select(0, torch.tensor([m])).distribution()]
    return pair[::-1] if pooling == "inclusive" else pair


def entry(d, i, j):
    """The distribution of one entry."""
    f = Factor.of(d)
    return replace(f.map(lambda v: v[i, j]), batch_dim=0).distribution()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_barycentres_of_components_of_which_some_are_very_sure(pooling):
    """Those far from the rest, in units of their scale, are pooled about means of their own."""
    (f, _) = partial("Normal", 6, 0)
    scale = f.params["scale"].clone()
    scale[:2] *= 1e-7
    f = replace(f, factor=replace(f.factor, params={**f.params, "scale": scale}))
    how = pooling_named(pooling).suited(f)
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    base = Factor.of(dist.Normal(torch.zeros(1, J, dtype=torch.float64), 10.0))
    base = replace(base, batch_dim=1)
    atoms = how.barycenter(f, groups, 3, None, base)
    assert atoms.mass.shape == (3, J)
    for k in range(3):
        one = f.index_select(0, torch.tensor([2 * k, 2 * k + 1]))
        zero = torch.zeros(2, dtype=torch.long)
        alone = how.barycenter(one, zero, 1, None, base)
        there = alone.mass[0] > 0
        assert torch.equal(atoms.mass[k], alone.mass[0])
        for name, value in alone.params.items():
            torch.testing.assert_close(
                atoms.params[name][k][there], value[0][there], rtol=1e-6, atol=0
            )


class TestDivergence:
    def test_is_zero_without_common_entries(self, family):
        """And not computed again, as what rounding has spoiled is."""
        (a, _), (b, _) = partial(family, 3, 0), partial(family, 4, 1)
        half = torch.arange(J) < 2
        a, b = replace(a, mass=half.expand(3, J).double()), replace(b, mass=b.mass * ~half)
        b = replace(b, mass=b.mass.index_fill(1, torch.tensor([J - 1]), 1.0))
        assert bool(a.apart(b).all()) and not a.apart(a).any()
        assert torch.equal(pairwise_kl(a, b), torch.zeros(3, 4, dtype=torch.float64))

    def test_is_summed_over_common_entries(self, family):
        (a, da), (b, db) = partial(family, 3, 0), partial(family, 4, 1)
        expected = torch.tensor(
            [
                [
                    sum(
                        float(kl_divergence(entry(da, i, j), entry(db, n, j)))
                        for j in range(J)
                        if a.mass[i, j] * b.mass[n, j]
                    )
                    for n in range(4)
                ]
                for i in range(3)
            ],
            dtype=torch.float64,
        )
        torch.testing.assert_close(pairwise_kl(a, b), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(pairwise_kl(b, a).shape, torch.Size([4, 3]))
        some, others = torch.tensor([2, 0]), torch.tensor([1, 3])
        pairs = a.index_select(0, some).divergence(b.index_select(0, others))
        torch.testing.assert_close(pairs, expected[[2, 0], [1, 3]], rtol=1e-9, atol=1e-9)

    def test_what_is_missing_does_not_matter(self, family):
        (a, _), (b, _) = partial(family, 3, 0), partial(family, 4, 1)
        other = Factor.of(draw(family, (3, J), 7))

        def swapped(name, v):
            missing = (a.mass == 0).reshape(a.mass.shape + (1,) * (v.dim() - 2))
            return torch.where(missing, other.params[name], v)

        swapped_params = {k: swapped(k, v) for k, v in a.params.items()}
        c = replace(a, factor=replace(a.factor, params=swapped_params))
        torch.testing.assert_close(pairwise_kl(a, b), pairwise_kl(c, b))
        for pooling in POOLINGS[:2]:
            how = pooling_named(pooling).suited(a)
            torch.testing.assert_close(how.potential(a), how.potential(c))
        torch.testing.assert_close(a.features, c.features)


@pytest.mark.parametrize("pooling", POOLINGS)
class TestGroups:
    def problem(self, family, pooling):
        local, d = partial(family, 6, 2)
        how = pooling_named(pooling)
        base = {}
        if how.needs_prior:
            # Wider than all components.
            wide = {
                "Normal": dist.Normal(torch.zeros(1, J).double(), 5.0),
                "MultivariateNormal": dist.MultivariateNormal(
                    torch.zeros(1, J, 2).double(), 50 * torch.eye(2).double()
                ),
                "Gamma": dist.Gamma(torch.full((1, J), 0.9).double(), 0.9),
            }[family]
            f = Factor.of(wide)
            base = {"x": replace(f, batch_dim=1)}
        weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0, 0.5], dtype=torch.float64)
        return Components({}, (2, 2, 2), weights, how, base, 1.5, {"x": local}), d

    def test_barycentres_are_those_of_each_entry(self, family, pooling):
        problem, d = self.problem(family, pooling)
        groups = torch.tensor([0, 1, 1, 0, 1, 0])
        atoms = problem.m_step(groups, 2)["x"]
        local = problem.masked["x"]
        total = 0.0
        for k in range(2):
            for j in range(J):
                members = [n for n in range(6) if groups[n] == k and local.mass[n, j] > 0]
                assert float(atoms.mass[k, j]) == float(problem.weights[members].sum())
                if not members:
                    continue
                f = Factor.of(d)
                own = replace(f.map(lambda v, m=members, j=j: v[m, j]), batch_dim=1)
                zero = torch.zeros(len(members), dtype=torch.long)
                one = None
                if problem.prior:
                    one = replace(problem.prior["x"].map(lambda v: v[:, 0]), batch_dim=1)
                w = problem.weights[members]
                expected = problem.pooling.barycenter(own, zero, 1, w, one)
                for name, value in expected.params.items():
                    torch.testing.assert_close(atoms.params[name][k, j], value[0])
                pairs = [kl_divergence(*order(pooling, expected, own, m)) for m in range(len(w))]
                total += float(sum(a * b for a, b in zip(w, pairs, strict=True)))
                if one is not None:
                    total += float((1 - w.sum()) * kl(expected, one))
        # F in each of the ways in which the library computes it.
        assert problem.divergence(groups, 2) == pytest.approx(total / 1.5)
        sums = Sums.of(problem, groups, 2)
        assert float(sums.values(torch.arange(2)).sum()) == pytest.approx(total / 1.5)
        e_step = problem.e_step({"x": atoms}, GroupNormPrior(1.0))
        prior = 2 * 3**0.5
        assert e_step.objective(groups) == pytest.approx(total / 1.5 + prior)

    def test_one_entry_at_a_time(self, family, pooling):
        """By the way of a pooling that neither adds up nor takes all pairs at once."""
        problem, _ = self.problem(family, pooling)
        how, local, prior = problem.pooling, problem.masked["x"], problem.prior.get("x")
        groups = torch.tensor([0, 1, 1, 0, 1, 0])
        own = Entrywise(how).barycenter(local, groups, 2, problem.weights, prior)
        atoms = how.suited(local).barycenter(local, groups, 2, problem.weights, prior)
        assert torch.equal(own.mass, atoms.mass)
        for name, value in own.params.items():
            there = atoms.mass > 0
            torch.testing.assert_close(value[there], atoms.params[name][there])
        together = how.suited(local).cost(atoms, local, prior)
        apart = Pooling.cost_over_entries(how, atoms, local, prior)
        torch.testing.assert_close(apart, together, rtol=1e-9, atol=1e-9)

    def test_increments_are_differences(self, family, pooling):
        problem, _ = self.problem(family, pooling)
        groups = torch.tensor([0, 1, 1, 0, 1, 0])
        sums = Sums.of(problem, groups, 2)
        members, to = torch.tensor([0, 3]), torch.tensor([1, 1])
        grown = sums.increments(members, to)
        for n, k, by in zip(members.tolist(), to.tolist(), grown.tolist(), strict=True):
            sums = Sums.of(problem, groups, 2)
            before = float(sums.values(torch.tensor([k])))
            sums.add(torch.tensor([n]), torch.tensor([k]), 1.0)
            assert float(sums.values(torch.tensor([k]))) - before == pytest.approx(by)
        assert len(sums.increments(members[:0], to[:0])) == 0
        # Taken out again, nothing is left where nothing was.
        sums.add(torch.tensor([0]), torch.tensor([1]), 1.0)
        sums.add(torch.tensor([0]), torch.tensor([1]), -1.0)
        fresh = Sums.of(problem, groups, 2)
        sums = Sums.of(problem, groups, 2)
        sums.add(torch.tensor([0]), torch.tensor([1]), 1.0)
        sums.add(torch.tensor([0]), torch.tensor([1]), -1.0)
        torch.testing.assert_close(sums.values(torch.arange(2)), fresh.values(torch.arange(2)))
