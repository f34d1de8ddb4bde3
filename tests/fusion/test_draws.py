# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of the assignment beside a fusion: against all partitions, from opposite starts, and what
has none."""

import functools

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from pyro_fusion import (
    FusionProblem,
    GroupNormPrior,
    IndianBuffetPrior,
    ParameterError,
    Posterior,
    fuse,
)
from pyro_fusion.fusion import chain, search
from pyro_fusion.pooling import Exclusive, Pooling
from tests.assignment.partitions import check, log_weights, partitions

AXES = {"x": "component"}
BASE = {"x": dist.Normal(torch.zeros(1).double(), 3.0).to_event(1)}


def normals(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    locs = [2 * torch.randn(n, 1, generator=generator).double() for n in sizes]
    return [Posterior({"x": dist.Normal(x, 0.7).to_event(1)}, AXES) for x in locs]


def log_evidence_of(loc, scale, width):
    """Messages as data: ``y_n ~ N(θ, v)`` and ``θ ~ N(0, width²)``, together and each by itself."""
    precision = scale**-2 - width**-2
    y, v = loc * scale**-2 / precision, 1 / precision

    def log_evidence(group):
        i = list(group)
        joint = MultivariateNormal(
            torch.zeros(len(i)).double(), width**2 + v * torch.eye(len(i)).double()
        )
        alone = Normal(0.0, (width**2 + v) ** 0.5)
        return float(joint.log_prob(y[i].T).sum() - alone.log_prob(y[i]).sum())

    return log_evidence


# -- against all partitions ------------------------------------------------------------------------


def test_the_posterior_of_the_number():
    sizes, prior = (2, 3, 2), IndianBuffetPrior(1.0)
    parties = normals(sizes)
    fusion = fuse(parties, "product", prior, prior=BASE, dispersion=1.0, num_draws=120)
    draws = fusion.only_label().draws
    loc = torch.cat([p.factors["x"].base_dist.loc for p in parties])
    p = log_weights(sizes, log_evidence_of(loc, 0.7, 3.0), prior.penalty(3)).softmax(0)
    every = partitions(sizes)
    numbers = torch.nn.functional.one_hot(every.amax(1) + 1).double()
    drawn = torch.nn.functional.one_hot(draws.num_atoms, numbers.shape[1])
    check(drawn, p @ numbers, "number of atoms")
    same = (every.unsqueeze(2) == every.unsqueeze(1)).double()
    a = draws.assignments
    check(a.unsqueeze(2) == a.unsqueeze(1), torch.einsum("p,pij->ij", p, same), "same")
    assert len(a) == 120 and draws.sizes == sizes


@functools.cache
def two_or_one():
    """Eight parties in eight dimensions, of one component each, near one of two places: to give one
    party alone the other place costs far more than to call all the same. Also P(K)."""
    dim, scale, width = 8, 0.3, 10.0
    generator = torch.Generator().manual_seed(0)
    loc = 0.05 * torch.randn(8, dim, generator=generator).double()
    loc[:, 0] += torch.tensor([1.0, -1.0]).repeat(4) * 0.96
    parties = [Posterior({"x": dist.Normal(x.unsqueeze(0), scale).to_event(1)}, AXES) for x in loc]
    prior = {"x": dist.Normal(torch.zeros(dim).double(), width).to_event(1)}
    belief = IndianBuffetPrior(1.0)
    problem = FusionProblem.of(parties, "product", belief, prior=prior, dispersion=1.0)
    sizes = (1,) * 8
    p = log_weights(sizes, log_evidence_of(loc, scale, width), belief.penalty(8)).softmax(0)
    return problem, p @ torch.nn.functional.one_hot(partitions(sizes).amax(1)).double()


STARTS = {"same": torch.zeros(8), "apart": torch.arange(8), "two": torch.arange(8) % 2}


def numbers(problem, start, count):
    chains = chain.AssignmentChains(problem, {"component": STARTS[start].long()}, seed=0)
    chains.run(count, warmup=5)
    return chains.draws()["component"].num_atoms


@pytest.mark.parametrize("start", ["same", "apart"])
def test_opposite_starts_agree(start):
    problem, exact = two_or_one()
    assert 0.2 < exact[0] < 0.8
    drawn = numbers(problem, start, 100)
    check(torch.nn.functional.one_hot(drawn - 1, len(exact)), exact, "number of atoms")


def test_without_split_and_merge_they_do_not(monkeypatch):
    problem, _ = two_or_one()
    monkeypatch.setattr(chain, "split_merge", lambda singles, groups, *rest: groups)
    assert set(numbers(problem, "same", 40).tolist()) == {1}
    assert set(numbers(problem, "two", 40).tolist()) == {2}


# -- what fuse gives -------------------------------------------------------------------------------


def test_draws_change_nothing_else():
    parties, given = normals((2, 3, 2)), {"prior": BASE, "dispersion": 1.0, "seed": 3}
    before = torch.get_rng_state()
    plain, drawn, again = (
        fuse(parties, "product", **given, num_draws=n, restarts=2) for n in (0, 7, 7)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert plain.only_label().draws is None and "draws" not in plain.summary()
    assert plain.objective == drawn.objective
    draws = drawn.only_label().draws
    assert torch.equal(draws.assignments, again.only_label().draws.assignments)
    assert draws.alpha is not None and draws.dispersion is None
    for k, p in enumerate(draws.num_atoms_distribution().tolist()):
        assert (f"P({k}) = {p:.3f}" in drawn.summary()) == (p > 0)
    assert "7 draws: " in drawn.summary()


def test_draws_begin_at_the_fused_assignment(monkeypatch):
    monkeypatch.setattr(chain, "WARMUP", 0)
    monkeypatch.setattr(chain._Chain, "sweep", lambda self: None)
    fusion = fuse(normals((2, 3, 2)), "product", prior=BASE, num_draws=2)
    fused, (draw, _) = torch.cat(fusion.assignment), fusion.only_label().draws.assignments
    assert torch.equal(fused[:, None] == fused, draw[:, None] == draw)


def test_an_interrupt_keeps_what_was_drawn(monkeypatch):
    step, count = chain.AssignmentChains.step, iter(range(1000))

    def stop(self):
        if next(count) == chain.WARMUP + 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(chain.AssignmentChains, "step", stop)
    fusion = fuse(normals((2, 2)), "product", prior=BASE, num_draws=10)
    assert fusion.interrupted and len(fusion.only_label().draws.assignments) == 3


def test_a_lone_party_has_its_own_atoms():
    fusion = fuse(normals((3,)), "product", num_draws=4)
    draws = fusion.only_label().draws
    assert draws.num_atoms_distribution().tolist() == [0, 0, 0, 1]
    assert torch.equal(draws.same(), torch.eye(3).double())


def test_smallest_sets():
    draws = chain.AssignmentDraws.of_one_party("component", 1, 10)
    numbers = torch.tensor([3] * 5 + [4] * 3 + [2] * 2)
    draws = chain.replace(draws, num_atoms=numbers)
    expected = {0.5: [3], 0.51: [3, 4], 0.8: [3, 4], 0.81: [3, 4, 2], 1.0: [3, 4, 2]}
    assert {level: draws.num_atoms_set(level) for level in expected} == expected


# -- errors, before the search ---------------------------------------------------------------------


def no_search(*args, **settings):
    raise AssertionError("the search has begun")


class Sumless(Pooling):
    """A product that knows no sums."""

    name, needs_prior, draws_from = "sumless", True, "prior"
    divergence, barycenter = Exclusive.divergence, Exclusive.barycenter


class TestErrors:
    fuse = staticmethod(
        lambda pooling="product", prior=None, **settings: fuse(
            normals((2, 2)), pooling, prior, prior=BASE, solver=no_search, **settings
        )
    )

    @pytest.mark.parametrize("pooling", ["exclusive", "inclusive"])
    def test_no_evidence(self, pooling):
        with pytest.raises(ParameterError, match=f"got '{pooling}'.*no evidence.*Fuse by"):
            self.fuse(pooling, num_draws=1)

    def test_no_sums(self):
        with pytest.raises(ParameterError, match=r"'sumless' has none.*AdditivePooling"):
            self.fuse(Sumless(), num_draws=1)

    def test_ranks(self):
        prior = GroupNormPrior(ranked=True)
        with pytest.raises(ParameterError, match=r"'component': .* rank weights.*ranked=False"):
            self.fuse(prior=prior, num_draws=1)

    @pytest.mark.parametrize("num_draws", [-1, 1.5, True, None])
    def test_number(self, num_draws):
        with pytest.raises(ParameterError, match=f"num_draws.*got {num_draws}"):
            self.fuse(num_draws=num_draws)

    def test_search(self):
        problem = FusionProblem.of(normals((2, 2)), "exclusive")
        with pytest.raises(ParameterError, match=r"got 'exclusive'.*no evidence"):
            search(problem, num_draws=1, solver=no_search)
