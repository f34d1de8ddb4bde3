# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The estimate of T: between what is the same and what is not, in the units of each pooling."""

import math

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_fusion import GroupNormPrior, Posterior, fuse
from pyro_fusion.families import Factor
from pyro_fusion.pooling import Exclusive, pooling_named
from pyro_fusion.pooling.dispersion import two_prices
from pyro_fusion.pooling.merges import Merges, pairwise_spread, quantile

POOLINGS = ["inclusive", "exclusive", "product"]


def normal(loc, scale=0.1):
    loc = torch.as_tensor(loc, dtype=torch.float64).unsqueeze(-1)
    return Factor.of(dist.Normal(loc, torch.full_like(loc, scale)).to_event(1))


def prior_for(pooling, scale=2000.0):
    one = torch.zeros(1, 1, dtype=torch.float64)
    return {"x": Factor.of(dist.Normal(one, scale).to_event(1))} if pooling == "product" else {}


def merges_of(local, sizes, prior=None):
    def prices(local, first, second):
        return Exclusive().merge_costs(local, first, second, {})

    return Merges.of(local, sizes, prior or {}, prices)


def estimate_dispersion(local, sizes, pooling, prior=None):
    """T by the rule of two prices."""
    merges = merges_of(local, sizes, prior)
    return pooling.dispersion(merges, two_prices(merges))


def merge_price(distance, scale):
    """``min_q KL(q ‖ a) + KL(q ‖ b)`` of two Normals of one scale, by hand."""
    return 2 * 0.5 * (distance / 2 / scale) ** 2


def evidence(m1, m2, dispersion, prior_scale):
    """The log evidence that messages N(m, 0.1²) over a prior N(0, v), to the power 1/T, share an
    atom against that they do not, by integrating Gaussians."""
    p0 = prior_scale**-2
    a = (100 - p0) / dispersion

    def log_normalizer(eta, precision):
        return 0.5 * eta**2 / precision - 0.5 * math.log(precision)

    e1, e2 = (100 * m / dispersion for m in (m1, m2))
    shared = log_normalizer(e1 + e2, p0 + 2 * a) + log_normalizer(0.0, p0)
    return shared - log_normalizer(e1, p0 + a) - log_normalizer(e2, p0 + a)


def test_the_limit_by_hand():
    # Neighbours in a party are 3 apart, in different parties 0.2: prices 225 and 1.
    local = {"x": normal([0.0, 3.0, 6.0, 0.2, 3.2, 6.2])}
    wrong, right = merge_price(3.0, 0.1), merge_price(0.2, 0.1)
    expected = (1.36 + 5.5 * math.sqrt(2)) * math.sqrt(wrong * right)
    assert estimate_dispersion(local, (3, 3), pooling_named("exclusive")) == pytest.approx(expected)
    # A second site that tells nothing apart adds a dimension.
    local["y"] = normal([0.0] * 6)
    expected = 6.86 * math.sqrt(wrong * right)
    assert estimate_dispersion(local, (3, 3), pooling_named("exclusive")) == pytest.approx(expected)


def test_at_the_limit_product_breaks_even():
    # Pairs exactly at the limit: all prices of right and wrong merges are the same multiple.
    local = {"x": normal([0.0, 3.0, 6.0, 0.2, 3.2, 6.2])}
    base = {"x": Factor.of(dist.Normal(torch.zeros(1, 1).double(), 10.0).to_event(1))}
    value = estimate_dispersion(local, (3, 3), pooling_named("product"), base)
    limit = estimate_dispersion(local, (3, 3), pooling_named("exclusive"))
    distance = 0.2 * math.sqrt(limit)  # its merge price is the limit
    assert evidence(3.0, 3.0 + distance, value, 10.0) == pytest.approx(-math.log(2) / 2, abs=0.35)


def test_where_parties_have_little_in_common_a_wrong_merge_breaks_even():
    # Between two of one party lies one of the other: nobody has what another has. The limit would
    # be dearer than a merge of neighbours in a party.
    local = {"x": normal([0.0, 3.0, 6.0, 1.5, 4.5, 7.5])}
    assert estimate_dispersion(local, (3, 3), pooling_named("exclusive")) > merge_price(3.0, 0.1)
    base = {"x": Factor.of(dist.Normal(torch.zeros(1, 1).double(), 100.0).to_event(1))}
    value = estimate_dispersion(local, (3, 3), pooling_named("product"), base)
    assert evidence(0.0, 3.0, value, 100.0) == pytest.approx(-math.log(2) / 2, abs=0.05)


def test_inclusive_is_the_same_limit_in_other_units():
    # Two Normals merged inclusively have variance s² + (d/2)², and cost log(1 + (d/2s)²) together.
    local = {"x": normal([0.0, 3.0, 6.0, 0.2, 3.2, 6.2])}
    value = estimate_dispersion(local, (3, 3), pooling_named("inclusive"))
    low, high = (math.log1p((d / 0.2) ** 2) for d in (0.2, 3.0))
    assert low < value < high
    # Half way between the lone and the popular, where GroupNormPrior asks 1 and 1.7 dispersions.
    middle = math.sqrt(GroupNormPrior().scale)
    limit = (1.36 + 5.5 * math.sqrt(2)) * math.sqrt(merge_price(0.2, 0.1) * merge_price(3.0, 0.1))
    exact = math.log1p(middle * limit) / middle  # exclusive price d² / 4s², inclusive its log1p
    assert value == pytest.approx(exact, rel=0.2)  # interpolated between the pairs that there are


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_bad_fit_or_two_change_little(pooling):
    generator = torch.Generator().manual_seed(0)
    loc = 10 * torch.arange(5.0).repeat(8) + 0.1 * torch.randn(40, generator=generator)
    how, base = pooling_named(pooling), prior_for(pooling)
    clean = estimate_dispersion({"x": normal(loc)}, (5,) * 8, how, base)
    spoiled = loc.clone()
    spoiled[3] = 1000.0  # far from all
    spoiled[11] = loc[10] + 0.05  # one atom, two components
    dirty = estimate_dispersion({"x": normal(spoiled)}, (5,) * 8, how, base)
    assert clean / 2 < dirty < clean * 2


@given(factor=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_units_of_the_data_do_not_matter(factor, seed):
    generator = torch.Generator().manual_seed(seed)
    loc = 3 * torch.randn(12, generator=generator, dtype=torch.float64)
    for name in POOLINGS:
        how = pooling_named(name)
        one = estimate_dispersion({"x": normal(loc)}, (4, 4, 4), how, prior_for(name, 20.0))
        scaled = {"x": normal(factor * loc, factor * 0.1)}
        other = estimate_dispersion(scaled, (4, 4, 4), how, prior_for(name, factor * 20.0))
        assert other == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_one_component_each_and_identical_ones(pooling):
    how = pooling_named(pooling)
    base = prior_for(pooling)
    alone = estimate_dispersion({"x": normal([0.0, 1.0, 2.0])}, (1, 1, 1), how, base)
    same = estimate_dispersion({"x": normal([1.0] * 6)}, (3, 3), how, base)
    assert math.isfinite(alone) and alone > 0
    assert math.isfinite(same) and same > 0


def test_quantiles_count_by_weight():
    x = torch.tensor([3.0, 1.0, math.inf, 7.0, 2.0], dtype=torch.float64)
    finite = x[x.isfinite()]
    for q in (0.0, 0.2, 0.5, 0.75, 1.0):
        alike = quantile(x, torch.full((5,), 0.3, dtype=torch.float64), q)
        assert alike == pytest.approx(float(finite.quantile(q)))
    # A party of one component counts as much as one of twenty.
    many = torch.cat([torch.zeros(20), torch.tensor([10.0])]).double()
    share = torch.cat([torch.full((20,), 0.05), torch.ones(1)]).double()
    assert quantile(many, share, 0.25) == 0.0
    assert quantile(many, share, 0.75) > 2.0 > quantile(many, torch.ones_like(share), 0.75)


def test_spread_is_the_standard_deviation_of_all_pairs():
    p = [dist.Normal(m, s) for m, s in ((0.0, 1.0), (2.0, 0.5), (5.0, 3.0))]
    values = [float(torch.distributions.kl_divergence(a, b)) for a in p for b in p if a is not b]
    local = {"x": Factor.of(dist.Normal(torch.tensor([0.0, 2, 5]), torch.tensor([1.0, 0.5, 3])))}
    expected = float(torch.tensor(values).std())
    assert pairwise_spread(local) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shared", [0.3, 1.0])
@pytest.mark.parametrize("jitter", [0.1, 0.5])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_overconfident_parties_still_agree_on_the_number(pooling, jitter, shared):
    # Posteriors claim 0.05, parties differ by ten times that; some share few atoms.
    generator = torch.Generator().manual_seed(1)
    true = 20 * torch.rand(10, 4, generator=generator, dtype=torch.float64)
    parties, seen = [], set()
    for _ in range(8):
        has = torch.rand(10, generator=generator) < max(shared, 0.3)
        has[:2] = True
        seen |= set(has.nonzero().flatten().tolist())
        loc = true[has]
        noise = torch.randn(loc.shape, generator=generator, dtype=torch.float64)
        d = dist.Normal(loc + jitter * noise, torch.full_like(loc, 0.05)).to_event(1)
        parties.append(Posterior({"x": d}, {"x": ("component",)}))
    zero = torch.zeros(4, dtype=torch.float64)
    base = {"x": dist.Normal(zero, 20.0).to_event(1)} if pooling == "product" else None
    assert fuse(parties, pooling, prior=base).num_atoms == len(seen)


def test_the_order_of_many_parties_does_not_matter():
    # More than are looked at, and every other one far noisier.
    generator = torch.Generator().manual_seed(0)
    true = 6 * torch.randn(5, 2, generator=generator, dtype=torch.float64)
    parties = []
    for s in range(66):
        has = torch.randperm(5, generator=generator)[:2]
        noise = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        loc = true[has] + 0.1 * (1 + s % 2 * 6) * noise
        parties.append(Posterior({"x": dist.Normal(loc, 0.1).to_event(1)}, {"x": ("component",)}))
    for prior in (GroupNormPrior(), GroupNormPrior("auto")):
        one, other = (fuse(p, assignment_prior=prior, restarts=0) for p in (parties, parties[::-1]))
        assert one.dispersion == pytest.approx(other.dispersion, rel=1e-9)
        ends = [f.only_label().objective[-1] for f in (one, other)]
        assert ends[0] == pytest.approx(ends[1], rel=1e-9)


def test_parties_of_weight_zero_have_no_say():
    generator = torch.Generator().manual_seed(0)

    def party(noise):
        loc = torch.tensor([[0.0], [9.0]]) + noise * torch.randn(2, 1, generator=generator)
        return Posterior({"x": dist.Normal(loc, 0.1).to_event(1)}, {"x": ("component",)})

    parties = [party(0.1), party(0.1), party(0.1)]
    spoiled = [*parties, party(50.0)]
    expected = fuse(parties).dispersion
    assert fuse(spoiled, weights=[1, 1, 1, 0]).dispersion == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pooling", ["exclusive", "inclusive"])
@pytest.mark.parametrize("family", ["Normal", "MultivariateNormal"])
def test_one_component_that_went_astray_changes_nothing(family, pooling):
    def party(s, far):
        g = torch.Generator().manual_seed(s)
        loc = torch.tensor([[0.0, 0.0], [5.0, 5.0], [-5.0, 5.0], [far, far]]).double()
        loc = loc[: 4 if s == 0 else 3]
        loc = loc + 0.3 * torch.randn(loc.shape, generator=g, dtype=torch.float64)
        if family == "Normal":
            local = dist.Normal(loc, torch.full_like(loc, 0.3)).to_event(1)
        else:
            local = dist.MultivariateNormal(loc, 0.09 * torch.eye(2).double())
        return Posterior({"x": local}, {"x": "component"})

    near = fuse([party(s, 1e2) for s in range(6)], pooling)
    assert near.num_atoms == 4
    for far in (1e6, 1e8, 3e8, 1e10):
        fusion = fuse([party(s, far) for s in range(6)], pooling)
        assert fusion.dispersion == pytest.approx(near.dispersion, rel=1e-6)
        assert fusion.num_atoms == 4
