# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Poolings, against closed forms, conjugate updates on pooled data, and their own optimality."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_fusion import ParameterError
from pyro_fusion.families import Factor, kl
from pyro_fusion.pooling import pooling_named
from pyro_fusion.pooling.additive import FAR
from tests.families.members import BARE, mvn, normal, normal_gamma, normal_wishart
from tests.pooling.problems import prior_of

POOLINGS = ["inclusive", "exclusive", "product"]
GROUPS = torch.tensor([0, 1, 1, 0, 2, 1, 0])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.5, 1.0, 0.25], dtype=torch.float64)


@pytest.fixture(params=sorted(set(BARE) - {"Beta"}) + ["Beta"])
def family(request):
    name = request.param
    local = Factor.of(BARE[name][0](torch.arange(7)))
    return name, local


@pytest.mark.parametrize("pooling", POOLINGS)
class TestContract:
    """What every pooling satisfies, in every family."""

    def objective(self, how, atoms, local, base):
        cost = how.cost(atoms, local, base)[GROUPS, torch.arange(7)]
        total = how.opening(atoms, base).index_add(0, GROUPS, cost * WEIGHTS)
        return total

    def test_is_a_minimum(self, pooling, family):
        name, local = family
        how = pooling_named(pooling)
        base = prior_of(name, local) if how.needs_prior else None
        atoms = how.barycenter(local, GROUPS, 3, WEIGHTS, base)
        best = self.objective(how, atoms, local, base)
        assert torch.isfinite(best).all()
        for seed in range(8):
            noise = torch.randn(
                atoms.natural.shape,
                generator=torch.Generator().manual_seed(seed),
                dtype=torch.float64,
            )
            eta = atoms.natural * (1 + 1e-3 * noise)
            other = self.objective(how, atoms.from_natural(eta), local, base)
            assert (other >= best - 1e-9 * (1 + best.abs())).all()

    def test_objective_is_a_difference_of_potentials(self, pooling, family):
        name, local = family
        how = pooling_named(pooling)
        base = prior_of(name, local) if how.needs_prior else None
        atoms = how.barycenter(local, GROUPS, 3, WEIGHTS, base)
        weight = torch.zeros(3, dtype=torch.float64).index_add(0, GROUPS, WEIGHTS)
        potential = how.potential(local, base) * WEIGHTS
        total = torch.zeros(3, dtype=torch.float64).index_add(0, GROUPS, potential)
        total = total - how.group_potential(atoms, weight, base)
        scale = how.potential(local, base).abs().max()
        expected = self.objective(how, atoms, local, base)
        torch.testing.assert_close(total, expected, rtol=1e-7, atol=1e-9 * float(1 + scale))

    def test_a_group_of_one_is_itself(self, pooling, family):
        name, local = family
        how = pooling_named(pooling)
        base = prior_of(name, local) if how.needs_prior else None
        atoms = how.barycenter(local, torch.arange(7), 7, None, base)
        assert (kl(local, atoms) < 1e-9).all()
        total = how.opening(atoms, base) + how.cost(atoms, local, base).diagonal()
        torch.testing.assert_close(total, torch.zeros(7).double(), rtol=0, atol=1e-7)

    def test_order_does_not_matter(self, pooling, family):
        name, local = family
        how = pooling_named(pooling)
        base = prior_of(name, local) if how.needs_prior else None
        atoms = how.barycenter(local, GROUPS, 3, WEIGHTS, base)
        order = torch.tensor([6, 2, 4, 0, 1, 5, 3])
        again = how.barycenter(local.index_select(0, order), GROUPS[order], 3, WEIGHTS[order], base)
        assert (kl(atoms, again) < 1e-9).all()


class TestClosedForms:
    """Gaussians with known assignment."""

    loc = torch.tensor([[0.3, -1.0], [1.2, 4.0], [-0.7, 2.0]], dtype=torch.float64)
    scale = torch.tensor([[0.5, 1.0], [1.5, 0.3], [0.8, 2.0]], dtype=torch.float64)
    w = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)

    def pooled(self, pooling, base=None):
        local = Factor.of(dist.Normal(self.loc, self.scale).to_event(1))
        groups = torch.zeros(3, dtype=torch.long)
        atoms = pooling_named(pooling).barycenter(local, groups, 1, self.w, base)
        return atoms.params["loc"][0], atoms.params["scale"][0]

    def test_inclusive(self):
        p = (self.w / self.w.sum())[:, None]
        mean = (p * self.loc).sum(0)
        variance = (p * (self.scale**2 + self.loc**2)).sum(0) - mean**2
        loc, scale = self.pooled("inclusive")
        torch.testing.assert_close(loc, mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(scale, variance.sqrt(), rtol=1e-10, atol=1e-10)

    def test_exclusive(self):
        p = (self.w / self.w.sum())[:, None]
        precision = (p / self.scale**2).sum(0)
        loc, scale = self.pooled("exclusive")
        expected = (p * self.loc / self.scale**2).sum(0) / precision
        torch.testing.assert_close(loc, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(scale, precision**-0.5, rtol=1e-10, atol=1e-10)

    def test_product(self):
        m0, s0 = torch.tensor([0.5, -2.0]).double(), torch.tensor([5.0, 7.0]).double()
        base = Factor.of(dist.Normal(m0[None], s0[None]).to_event(1))
        w = self.w[:, None]
        precision = (w / self.scale**2).sum(0) - (w.sum() - 1) / s0**2
        shift = (w * self.loc / self.scale**2).sum(0) - (w.sum() - 1) * m0 / s0**2
        loc, scale = self.pooled("product", base)
        torch.testing.assert_close(loc, shift / precision, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(scale, precision**-0.5, rtol=1e-10, atol=1e-10)

    def test_multivariate(self):
        a = torch.randn(3, 2, 2, dtype=torch.float64)
        covariance = a @ a.mT + torch.eye(2).double()
        local = Factor.of(dist.MultivariateNormal(self.loc, covariance))
        groups = torch.zeros(3, dtype=torch.long)
        p = self.w / self.w.sum()
        precision = covariance.inverse()
        pooled = torch.einsum("s,sij->ij", p, precision)
        shift = torch.einsum("s,sij,sj->i", p, precision, self.loc)
        atoms = pooling_named("exclusive").barycenter(local, groups, 1, self.w).distribution()
        torch.testing.assert_close(atoms.loc[0], pooled.inverse() @ shift, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            atoms.covariance_matrix[0], pooled.inverse(), rtol=1e-10, atol=1e-10
        )
        atoms = pooling_named("inclusive").barycenter(local, groups, 1, self.w).distribution()
        mean = torch.einsum("s,si->i", p, self.loc)
        centred = self.loc - mean
        expected = torch.einsum("s,sij->ij", p, covariance)
        expected += torch.einsum("s,si,sj->ij", p, centred, centred)
        torch.testing.assert_close(atoms.loc[0], mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(atoms.covariance_matrix[0], expected, rtol=1e-10, atol=1e-10)

        wide = 100 * torch.eye(2).double()
        base = Factor.of(dist.MultivariateNormal(torch.zeros(1, 2).double(), wide[None]))
        atoms = pooling_named("product").barycenter(local, groups, 1, self.w, base).distribution()
        total = torch.einsum("s,sij->ij", self.w, precision) - (self.w.sum() - 1) * wide.inverse()
        shift = torch.einsum("s,sij,sj->i", self.w, precision, self.loc)
        torch.testing.assert_close(atoms.loc[0], total.inverse() @ shift, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            atoms.covariance_matrix[0], total.inverse(), rtol=1e-10, atol=1e-10
        )

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_far_from_the_origin_and_narrow(self, pooling):
        # The same, moved by 1e4 and shrunk to 1e-4, must be the same moved and shrunk.
        groups = torch.tensor([0, 0, 1])
        unit, origin = 1e-4, 1e4
        base = dist.Normal(torch.zeros(1, 2).double(), 50.0).to_event(1)
        far_base = dist.Normal(torch.full((1, 2), origin).double(), 50.0 * unit).to_event(1)
        how = pooling_named(pooling)
        near = how.barycenter(
            Factor.of(dist.Normal(self.loc, self.scale).to_event(1)),
            groups,
            2,
            prior=Factor.of(base),
        )
        far = how.barycenter(
            Factor.of(dist.Normal(origin + unit * self.loc, unit * self.scale).to_event(1)),
            groups,
            2,
            prior=Factor.of(far_base),
        )
        # A double at 1e4 is known to 2e-12, so the positions to 2e-8 of the unit.
        error = (far.params["loc"] - origin) / unit - near.params["loc"]
        assert error.abs().max() < 1e-6
        torch.testing.assert_close(
            far.params["scale"] / unit, near.params["scale"], rtol=1e-6, atol=0
        )


class TestCoordinates:
    """Sums are about one origin for all, and where that costs digits about the atom's own."""

    @pytest.mark.parametrize("pooling", ["inclusive", "exclusive"])
    @pytest.mark.parametrize("make", [normal, mvn, normal_gamma, normal_wishart])
    def test_near_and_far_atoms_at_once(self, pooling, make):
        how = pooling_named(pooling)
        near = Factor.of(make(torch.arange(6))).index_select(0, torch.arange(300) % 6)
        groups = torch.arange(300) % 6 // 2
        groups[-2:] = 3
        expected = how.barycenter(near, groups, 4)
        move = torch.tensor([0.0, 0.0, 0.0, 2.0**15], dtype=torch.float64)
        move = move.reshape(-1, *[1] * (near.location().dim() - 1))
        local = near.shift(move[groups], 1.0)
        atoms = how.barycenter(local, groups, 4)
        size = atoms.shift(local.origin).first.size / local.origin.numel()
        assert size.max() > FAR > size.min()
        assert (kl(expected, atoms.shift(move)) < 1e-12).all()

    @pytest.mark.parametrize("pooling", ["inclusive", "exclusive"])
    def test_costs_do_not_depend_on_what_is_cached(self, pooling):
        how, local = pooling_named(pooling), Factor.of(normal_wishart(torch.arange(7)))
        atoms = how.barycenter(local, GROUPS, 3, WEIGHTS)
        plain = Factor.of(atoms.distribution())
        expected = how.cost(plain, Factor.of(local.distribution()))
        torch.testing.assert_close(how.cost(atoms, local), expected, rtol=1e-9, atol=1e-12)
        assert how.cost(atoms, local).equal(how.cost(atoms, local))


class TestProductIsBayesRule:
    """Data split over parties, each with its own conjugate posterior, against all data at once."""

    def check(self, prior, locals_, pooled):
        batch = [d.expand((1,)) for d in locals_]
        local = Factor.cat([Factor.of(d) for d in batch])
        base = Factor.of(prior.expand((1,)))
        groups = torch.zeros(len(batch), dtype=torch.long)
        atom = pooling_named("product").barycenter(local, groups, 1, prior=base).distribution()
        assert float(kl_divergence(atom, pooled.expand((1,)))) < 1e-10

    def test_gamma_poisson(self):
        prior = dist.Gamma(torch.tensor(2.0).double(), torch.tensor(0.5).double())
        x = torch.poisson(torch.full((30,), 4.0)).double()

        def posterior(data):
            return dist.Gamma(prior.concentration + data.sum(), prior.rate + len(data))

        self.check(prior, [posterior(c) for c in x.split(10)], posterior(x))

    def test_dirichlet_categorical(self):
        prior = dist.Dirichlet(torch.tensor([0.5, 1.0, 2.0]).double())
        counts = torch.tensor([[3.0, 0.0, 7.0], [1.0, 1.0, 1.0]]).double()

        def posterior(c):
            return dist.Dirichlet(prior.concentration + c)

        self.check(prior, [posterior(c) for c in counts], posterior(counts.sum(0)))

    def test_pyro_conjugate_update(self):
        prior = dist.Beta(torch.tensor(1.5).double(), torch.tensor(2.5).double())
        parts = [
            dist.Beta(torch.tensor(a).double(), torch.tensor(b).double())
            for a, b in [(3.0, 1.0), (1.0, 4.0)]
        ]
        # conjugate_update multiplies densities: prior times two likelihoods.
        both, _ = prior.conjugate_update(parts[0])
        both, _ = both.conjugate_update(parts[1])
        self.check(prior, [prior.conjugate_update(p)[0] for p in parts], both)


class TestBadInput:
    def test_unknown_pooling(self):
        with pytest.raises(ParameterError, match="pooling must be one of"):
            pooling_named("geometric")

    def test_empty_atom(self):
        local = Factor.of(dist.Normal(torch.zeros(2), torch.ones(2)))
        with pytest.raises(ParameterError, match=r"atoms \[1\] have no component"):
            pooling_named("inclusive").barycenter(local, torch.tensor([0, 0]), 2)

    def test_product_without_prior(self):
        local = Factor.of(dist.Normal(torch.zeros(2), torch.ones(2)))
        with pytest.raises(ParameterError, match="needs the prior"):
            pooling_named("product").barycenter(local, torch.tensor([0, 0]), 1)

    @pytest.mark.parametrize(
        "make",
        [
            lambda s: dist.Normal(torch.zeros(2), s * torch.ones(2)),
            lambda s: dist.MultivariateNormal(torch.zeros(2, 2), s * torch.eye(2).expand(2, 2, 2)),
        ],
    )
    def test_improper_product(self, make):
        local, base = Factor.of(make(3.0)), Factor.of(make(1.0)).index_select(0, torch.tensor([0]))
        with pytest.raises(ParameterError, match="wider than the prior"):
            pooling_named("product").barycenter(local, torch.tensor([0, 0]), 1, prior=base)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_float32_stays_float32(pooling):
    local = Factor.of(dist.Normal(torch.randn(4, 3), torch.rand(4, 3) + 0.1).to_event(1))
    base = Factor.of(dist.Normal(torch.zeros(1, 3), 10.0).to_event(1))
    atoms = pooling_named(pooling).barycenter(local, torch.tensor([0, 1, 1, 0]), 2, prior=base)
    assert atoms.dtype == torch.float32
