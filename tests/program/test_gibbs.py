# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of the assignment against its posterior, by enumeration of all partitions. Tolerances are
in standard errors, by the effective sample size."""

import functools
import itertools
import math

import pyro.distributions as dist
import pytest
import torch

from pyro_fusion import (
    FixedAtoms,
    FusionGibbs,
    FusionModel,
    GroupNormPrior,
    IndianBuffetPrior,
    NormalWishart,
    ParameterError,
    Posterior,
    StructureError,
)
from pyro_fusion.assignment.indian_buffet import harmonic_number
from pyro_fusion.assignment.markov_kernels import match_anew, slice_sample
from pyro_fusion.fusion.ascent import expectation_maximization
from pyro_fusion.pooling import Pooling, Product
from tests.assignment.partitions import check, log_weights, partitions
from tests.pooling.problems import collapsed

ABOUT_TWO = dist.LogNormal(torch.tensor(2.0).double().log(), 1.0)  # a prior of T
BASE = dist.Normal(torch.zeros(1).double(), 3.0).to_event(1)


def check_assignments(result, sizes, weights):
    """P(same) and the distribution of K, from the weights of all partitions."""
    every, p = partitions(sizes), weights.softmax(0)
    draws = result.only_label()
    a = draws.assignments
    same = (every.unsqueeze(2) == every.unsqueeze(1)).double()
    exact = torch.einsum("p,pij->ij", p, same)
    check(a.unsqueeze(2) == a.unsqueeze(1), exact, "same")
    torch.testing.assert_close(
        result.same(), (a.unsqueeze(2) == a.unsqueeze(1)).double().mean(0), rtol=0, atol=1e-12
    )
    count = every.amax(1) + 1
    pmf = torch.zeros(len(every[0]) + 1).double().index_add(0, count, p)
    check(torch.nn.functional.one_hot(draws.num_atoms, len(pmf)), pmf, "number of atoms")
    assert torch.equal(result.num_atoms_distribution()[-1] > 0, torch.tensor(True))
    assert torch.equal(draws.num_atoms, a.amax(1) + 1)


# -- problems with an evidence by hand -------------------------------------------------------------


def normals(sizes, seed, spread=2.0, scale=0.7):
    torch.manual_seed(seed)
    return [
        Posterior({"x": dist.Normal(spread * torch.randn(n, 1).double(), scale).to_event(1)}, AXES)
        for n in sizes
    ]


def gammas(sizes, seed):
    torch.manual_seed(seed)
    return [
        Posterior({"x": dist.Gamma(2 + 8 * torch.rand(n).double(), 2 + torch.rand(n))}, AXES)
        for n in sizes
    ]


def wisharts(sizes, seed):
    torch.manual_seed(seed)
    return [
        Posterior(
            {
                "x": NormalWishart(
                    torch.randn(n, 2).double(),
                    (5 + torch.rand(n)).double(),
                    (8 + torch.rand(n)).double(),
                    (torch.eye(2) * (0.05 + 0.1 * torch.rand(n, 1, 1))).double(),
                )
            },
            AXES,
        )
        for n in sizes
    ]


AXES = {"x": "component"}
WISHART = NormalWishart(
    torch.zeros(2).double(),
    torch.tensor(0.2).double(),
    torch.tensor(3.0).double(),
    torch.eye(2).double(),
)


def normal_evidence(posteriors, dispersion):
    """Messages as data with known variances: ``y_n ~ N(θ, T / τ_n)``, ``θ ~ N(0, 9)``, together and
    each by itself."""
    q = [p.factors["x"] for p in posteriors]
    loc, scale = (torch.cat([getattr(d.base_dist, k)[:, 0] for d in q]) for k in ("loc", "scale"))
    precision = scale.double() ** -2 - 1 / 9
    y, variance = loc * scale.double() ** -2 / precision, dispersion / precision

    def log_evidence(group):
        i = list(group)
        covariance = 9 + torch.diag(variance[i])
        joint = torch.distributions.MultivariateNormal(torch.zeros(len(i)).double(), covariance)
        alone = torch.distributions.Normal(0.0, (9 + variance[i]).sqrt())
        return float(joint.log_prob(y[i]) - alone.log_prob(y[i]).sum())

    return log_evidence


def gamma_evidence(posteriors, dispersion):
    """Prior Gamma(2, 1): ``θ^c exp(-e θ)`` with counts and exposures over T."""
    q = [p.factors["x"] for p in posteriors]
    c = (torch.cat([d.concentration for d in q]) - 2).double() / dispersion
    e = (torch.cat([d.rate for d in q]) - 1).double() / dispersion

    def integral(c, e):
        return float(torch.lgamma(2 + c) - (2 + c) * torch.log(1 + e))

    def log_evidence(group):
        i = list(group)
        return integral(c[i].sum(), e[i].sum()) - sum(integral(c[n], e[n]) for n in i)

    return log_evidence


def wishart_evidence(posteriors, dispersion):
    """By the library's barycentres and divergences."""
    model = FusionModel(
        posteriors, "product", FixedAtoms(9), prior={"x": WISHART}, dispersion=dispersion
    )
    problem = model.problem.parts["component"].problem

    def log_evidence(group):
        own = problem.in_order(torch.tensor(group), (1,) * len(group))
        return -collapsed(own, FixedAtoms(9), torch.zeros(len(group)).long())

    return log_evidence


FAMILIES = {
    "normal": (normals, BASE, normal_evidence),
    "gamma": (gammas, dist.Gamma(torch.tensor(2.0).double(), 1.0), gamma_evidence),
    "normal_wishart": (wisharts, WISHART, wishart_evidence),
}


def model_of(family, sizes, seed, prior, dispersion=1.0):
    make, base, evidence = FAMILIES[family]
    posteriors = make(sizes, seed)
    model = FusionModel(posteriors, "product", prior, prior={"x": base}, dispersion=dispersion)
    return model, functools.partial(evidence, posteriors)


# -- the posterior ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "sizes", "seed", "prior", "dispersion", "block"),
    [
        ("normal", (3, 3, 3), 0, IndianBuffetPrior(2.0), 1.0, 8),
        ("normal", (2, 3, 1), 1, IndianBuffetPrior(1.0), 2.0, 0),
        ("normal", (2, 2, 2), 2, GroupNormPrior(), 1.0, 8),
        ("normal", (3, 3, 2), 3, FixedAtoms(4), 3.0, 8),
        ("normal", (3, 3, 2), 4, FixedAtoms(4), 2.0, 0),
        ("normal", (2, 2, 2), 5, FixedAtoms(2), 5.0, 0),
        ("gamma", (3, 2, 2), 6, IndianBuffetPrior(0.5), 1.0, 8),
        ("gamma", (1, 3, 2), 7, GroupNormPrior(2.0), 1.0, 0),
        ("normal_wishart", (2, 2, 2), 8, IndianBuffetPrior(1.0), 1.0, 8),
    ],
)
def test_every_partition(family, sizes, seed, prior, dispersion, block):
    model, evidence = model_of(family, sizes, seed, prior, dispersion)
    weights = log_weights(sizes, evidence(dispersion), prior.penalty(3))
    if prior.num_atoms is not None:
        weights[partitions(sizes).amax(1) >= prior.num_atoms] = -torch.inf
    result = FusionGibbs(model, seed=seed, block=block).run(300, 30)
    check_assignments(result, sizes, weights)


@pytest.mark.parametrize("block", [0, 8])
def test_without_evidence_the_prior_is_drawn(block):
    sizes, prior = (3, 2, 1), IndianBuffetPrior(1.5)
    posteriors = [Posterior({"x": BASE.expand((n,))}, AXES) for n in sizes]
    model = FusionModel(posteriors, "product", prior, prior={"x": BASE}, dispersion=1.0)
    result = FusionGibbs(model, block=block).run(300, 30)
    check_assignments(result, sizes, log_weights(sizes, lambda g: 0.0, prior.penalty(3)))


def test_learned_alpha():
    """By quadrature over alpha for each partition."""
    sizes, prior = (2, 3, 2), IndianBuffetPrior(None, 3.0, 2.0)
    model, evidence = model_of("normal", sizes, 10, prior, 2.0)
    result = FusionGibbs(model).run(300, 30)
    alpha = torch.linspace(1e-3, 20, 4000).double()
    log_prior = dist.Gamma(prior.concentration, prior.rate).log_prob(alpha)
    at_one = log_weights(sizes, evidence(2.0), IndianBuffetPrior(1.0).penalty(3)).unsqueeze(1)
    count = (partitions(sizes).amax(1) + 1).unsqueeze(1)
    joint = at_one + count * alpha.log() - harmonic_number(3) * alpha + log_prior
    check_assignments(result, sizes, joint.logsumexp(1))
    marginal = joint.logsumexp(0).softmax(0)
    drawn = result.only_label().alpha
    check(drawn, (marginal * alpha).sum(), "mean of alpha")
    for level in (0.1, 0.5, 0.9):
        at = alpha[marginal.cumsum(0) >= level][0]
        check(drawn <= at, level, f"quantile {level} of alpha")


@pytest.mark.parametrize(
    ("family", "prior_of_t"), [("normal", ABOUT_TWO), ("gamma", dist.Uniform(0.5, 6.0))], ids=str
)
def test_learned_dispersion(family, prior_of_t):
    """By quadrature over log T for each partition."""
    sizes, prior = (2, 2, 2), IndianBuffetPrior(1.0)
    model, evidence = model_of(family, sizes, 11, prior, 2.0)
    result = FusionGibbs(model, learn_dispersion=prior_of_t).run(300, 30)
    given = prior_of_t
    x = torch.linspace(-3.0, 5.0, 161).double()
    x = x[given.support.check(x.exp())]
    rows = [log_weights(sizes, evidence(float(t)), prior.penalty(3)) for t in x.exp()]
    joint = torch.stack(rows, 1) + given.log_prob(x.exp()) + x
    check_assignments(result, sizes, joint.logsumexp(1))
    marginal = joint.logsumexp(0).softmax(0)
    drawn = result.only_label().dispersion.log()
    check(drawn, (marginal * x).sum(), "mean of log T")
    # Halfway between two points of the grid, where sums are integrals.
    for i in (int((marginal.cumsum(0) < level).sum()) for level in (0.2, 0.5, 0.8)):
        check(drawn <= x[i] + 0.025, marginal[: i + 1].sum(), "quantile of log T")


def test_a_party_too_large_for_blocks():
    """Two parties of 16 components without evidence: the number of pairs is known."""
    size, prior = 16, IndianBuffetPrior(4.0)
    posteriors = [Posterior({"x": BASE.expand((size,))}, AXES)] * 2
    with pytest.warns(UserWarning, match="identical"):
        model = FusionModel(posteriors, "product", prior, prior={"x": BASE}, dispersion=1.0)
    result = FusionGibbs(model).run(400, 20)
    phi = prior.penalty(2)
    pairs = torch.arange(size + 1).double()
    ways = 2 * (math.lgamma(size + 1) - torch.lgamma(pairs + 1) - torch.lgamma(size - pairs + 1))
    ways += torch.lgamma(pairs + 1)
    pmf = (ways - pairs * phi[2] - 2 * (size - pairs) * phi[1]).softmax(0)
    drawn = 2 * size - result.only_label().num_atoms
    check(torch.nn.functional.one_hot(drawn, size + 1), pmf, "number of pairs")
    for a in result.only_label().assignments:
        assert all(len(part.unique()) == size for part in a.split(size))


# -- kernels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "num_atoms", "room", "block"),
    [
        (3, 2, 3, 0),
        (3, 2, 2, 0),
        (3, 4, 1, 0),
        (3, 4, 1, 8),
        (3, 3, 0, 0),
        (4, 3, 4, 0),
        (2, 0, 2, 0),
    ],
)
def test_match_anew(size, num_atoms, room, block):
    logits, new = 1.5 * torch.randn(size, num_atoms).double(), 0.4
    every = [
        a
        for a in itertools.product(range(num_atoms + 1), repeat=size)
        if all(a.count(k) <= 1 for k in range(num_atoms)) and a.count(num_atoms) <= room
    ]
    columns = torch.cat([logits, torch.full((size, 1), new).double()], 1)
    exact = torch.stack([columns[range(size), list(a)].sum() for a in every]).softmax(0)
    state, draws = torch.tensor(every[0]), []
    for _ in range(1500):
        state = match_anew(logits, new, state, room, block)
        draws.append(every.index(tuple(state.tolist())))
    check(torch.nn.functional.one_hot(torch.tensor(draws), len(every)), exact, "matchings")


def test_slice_sample():
    """Two modes, one narrow, and a bound."""
    x = torch.linspace(-4, 8, 2401).double()

    def log_density(y):
        y = torch.as_tensor(y)
        value = torch.logaddexp(-0.5 * y**2, -0.5 * ((y - 4) / 0.2) ** 2 + 1)
        return torch.where(y > -1, value, -torch.inf)

    p = log_density(x).softmax(0)
    drawn = [0.0]
    for _ in range(3000):
        drawn.append(slice_sample(lambda y: float(log_density(y)), drawn[-1]))
    drawn = torch.tensor(drawn[1:], dtype=torch.float64)
    assert float(drawn.min()) > -1
    for at in (0.0, 2.0, 4.0):
        check(drawn <= at, p[x <= at].sum(), f"x <= {at}")


# -- the loss, seeds, results ----------------------------------------------------------------------


def shared_model(prior=None, dispersion=2.0, **settings):
    """Two labels, and a site that all share."""
    torch.manual_seed(1)
    base = {
        "x": BASE,
        "y": dist.Gamma(torch.tensor(2.0).double(), 1.0),
        "z": dist.Normal(torch.tensor(0.0).double(), 5.0),
    }
    posteriors = [
        Posterior(
            {
                "x": dist.Normal(torch.randn(n, 1).double(), 0.5).to_event(1),
                "y": dist.Gamma(2 + 8 * torch.rand(2).double(), 2.0),
                "z": dist.Normal(torch.randn(()).double(), 1.0),
            },
            {"x": "component", "y": "rate"},
        )
        for n in (2, 3, 2)
    ]
    return FusionModel(posteriors, "product", prior, prior=base, dispersion=dispersion, **settings)


def objective(model, groups):
    """F of these groups, by coordinate ascent that does not move."""
    result = model.problem.shared_objective
    for label, part in model.problem.parts.items():
        start = expectation_maximization(part.problem, part.assignment_prior, groups[label], 0)
        result += start.objective[0]
    return result


@pytest.mark.parametrize(
    "prior", [IndianBuffetPrior(1.3), GroupNormPrior(), FixedAtoms(4)], ids=str
)
def test_the_loss_is_f(prior):
    model = shared_model(prior, weights=[0.5, 1.0, 1.5])
    gibbs = FusionGibbs(model)
    for _ in range(5):
        loss = gibbs.step()
        assert loss == pytest.approx(objective(model, gibbs.assignment), rel=1e-9)


def test_the_loss_where_alpha_and_dispersion_are_learned():
    prior = IndianBuffetPrior(None, 2.0, 0.5)
    gibbs = FusionGibbs(shared_model(prior), learn_dispersion=ABOUT_TWO)
    for _ in range(3):
        draws = gibbs.run(1, 0).labels
        assert set(draws) == {"component", "rate"}
        for label, d in draws.items():
            alpha, dispersion = float(d.alpha), float(d.dispersion)
            # A model with this T, in which alpha is fixed.
            part = shared_model(IndianBuffetPrior(alpha), dispersion).problem.parts[label]
            groups = gibbs.assignment[label]
            fixed = expectation_maximization(
                part.problem, part.assignment_prior, groups, 0
            ).objective[0]
            fixed += 0.5 * alpha - math.log(alpha)
            fixed -= float(dist.Normal(math.log(2.0), 1.0).log_prob(torch.tensor(dispersion).log()))
            assert -float(d.log_density) == pytest.approx(fixed, rel=1e-6)


def test_seeds():
    model = shared_model()
    before = torch.get_rng_state()

    def draws(seed, noise=False, **settings):
        gibbs = FusionGibbs(model, model.problem.start(), seed=seed, **settings)
        found = []
        for _ in range(10):
            found.append(gibbs.run(1, 1).labels["component"])
            if noise:
                torch.rand(3)
        return torch.cat([torch.cat([d.log_density, d.alpha, d.dispersion]) for d in found])

    first = draws(0, learn_dispersion=ABOUT_TWO)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, draws(0, noise=True, learn_dispersion=ABOUT_TWO))
    assert not torch.equal(first, draws(1, learn_dispersion=ABOUT_TWO))


def test_results():
    model, _ = model_of("normal", (2, 3, 2), 0, IndianBuffetPrior())
    gibbs = FusionGibbs(model, learn_dispersion=ABOUT_TWO)
    result = gibbs.run(50, 5, 2)
    draws = result.only_label()
    assert draws.assignments.shape == (50, 7) and draws.assignments.dtype == torch.long
    for name in ("num_atoms", "alpha", "dispersion", "log_density"):
        assert getattr(draws, name).shape == (50,)
    # Numbered by first appearance.
    for a in draws.assignments:
        highest = a.cummax(0).values
        assert a[0] == 0 and bool((highest.diff() <= 1).all())
    assert torch.equal(draws.assignments[-1], gibbs.assignment["component"])
    assert float(result.num_atoms_distribution().sum()) == pytest.approx(1)
    same = result.same()
    assert torch.equal(same, same.mT) and bool((same.diagonal() == 1).all())
    assert same[0, 1] == 0 and same[2, 3] == 0  # of one party
    assert set(draws.effective_sample_sizes()) == {"atoms", "alpha", "dispersion", "log density"}
    text = result.summary()
    assert "50 draws of the atoms of 7 × component of 3 parties" in text and "alpha" in text
    fixed = (
        FusionGibbs(model_of("normal", (2, 3, 2), 0, GroupNormPrior())[0]).run(2, 0).only_label()
    )
    assert fixed.alpha is None and fixed.dispersion is None
    # A second run goes on.
    assert not torch.equal(gibbs.run(50, 0).only_label().log_density, draws.log_density)


def test_one_party_has_nothing_to_share():
    posterior = normals((3,), 0)
    model = FusionModel(
        posterior, "product", IndianBuffetPrior(), prior={"x": BASE}, dispersion=1.0
    )
    result = FusionGibbs(model).run(3, 0)
    assert torch.equal(result.same(), torch.eye(3).double())
    assert math.isnan(result.only_label().effective_sample_sizes()["atoms"])
    assert "P(3) = 1.000" in result.summary()


def test_without_a_label_there_is_nothing_to_draw():
    posteriors = [Posterior({"x": dist.Normal(m, 1.0)}) for m in (0.0, 1.0)]
    model = FusionModel(posteriors, pooling="product", prior={"x": dist.Normal(0.0, 5.0)})
    gibbs = FusionGibbs(model)
    assert gibbs.step() == pytest.approx(model.problem.shared_objective)
    assert gibbs.run(2, 0).labels == {}
    with pytest.raises(StructureError, match=r"expected one label, got \[\]"):
        gibbs.run(2, 0).same()


# -- errors ----------------------------------------------------------------------------------------


class TestErrors:
    model = staticmethod(lambda prior=None: model_of("normal", (2, 3, 2), 0, prior)[0])

    @pytest.mark.parametrize("pooling", ["exclusive", "inclusive"])
    def test_no_evidence(self, pooling):
        with pytest.raises(ParameterError, match=f"'product', got '{pooling}'.* no evidence"):
            FusionGibbs(FusionModel(normals((2, 2), 0), pooling=pooling))

    @pytest.mark.parametrize("name", ["assignment_prior", "local", "scale"])
    def test_a_model_of_ones_own(self, name):
        own = type("Own", (FusionModel,), {name: lambda self, *args: None})
        model = own(normals((2, 2), 0), pooling="product", prior={"x": BASE})
        with pytest.raises(ParameterError, match=rf"Own overrides {name}\(\).*SVI"):
            FusionGibbs(model)

    def test_ranks(self):
        with pytest.raises(ParameterError, match="without rank weights, got GroupNormPrior"):
            FusionGibbs(self.model(GroupNormPrior(ranked=True)))

    @pytest.mark.parametrize(
        "settings", [{"seed": 1.5}, {"seed": True}, {"block": 15}, {"block": -1}]
    )
    def test_arguments(self, settings):
        with pytest.raises(ParameterError, match=next(iter(settings))):
            FusionGibbs(self.model(), **settings)

    @pytest.mark.parametrize("arguments", [(0, 0), (1, -1), (1, 0, 0)])
    def test_run(self, arguments):
        with pytest.raises(ParameterError, match="num_samples"):
            FusionGibbs(self.model()).run(*arguments)

    @pytest.mark.parametrize(
        "prior",
        [1.0, False, dist.LogNormal(torch.zeros(2), 1.0), dist.Uniform(2.0, 3.0)],
        ids=["number", "False", "batch", "elsewhere"],
    )
    def test_prior_of_dispersion(self, prior):
        with pytest.raises(ParameterError, match=r"learn_dispersion.*density at .* dispersion, 1;"):
            FusionGibbs(self.model(), learn_dispersion=prior)

    def test_no_prior_of_dispersion_is_a_default(self):
        with pytest.raises(ParameterError, match="the prior of T, a distribution: there is no def"):
            FusionGibbs(self.model(), learn_dispersion=True)

    def test_no_sums(self):
        class Sumless(Pooling):
            name, needs_prior, draws_from = "sumless", True, "prior"

            def divergence(self, atoms, local):
                return Product().divergence(atoms, local)

            def barycenter(self, *args):
                return Product().barycenter(*args)

        model = FusionModel(normals((2, 2), 0), Sumless(), prior={"x": BASE}, dispersion=1.0)
        with pytest.raises(ParameterError, match=r"'sumless' has none.*AdditivePooling"):
            FusionGibbs(model)

    @pytest.mark.parametrize(
        "groups, match",
        [
            ([0, 0, 1, 2, 3, 0, 1], r"'component', party 0: .* got \[0, 0"),
            ([0, 1, 2], r"'component': expected a LongTensor of shape \[7\]"),
            ([0, 1, 2, 3, 4, 5, 6], "the assignment prior allows 5 atoms, got 7"),
        ],
    )
    def test_start(self, groups, match):
        with pytest.raises(StructureError, match=match):
            FusionGibbs(self.model(FixedAtoms(5)), {"component": torch.tensor(groups)})
        with pytest.raises(StructureError, match=r"expected an assignment for \['component'\]"):
            FusionGibbs(self.model(), {"topic": torch.tensor(groups)})

    def test_improper(self):
        wide = [Posterior({"x": dist.Normal(torch.zeros(1, 1), 9.0).to_event(1)}, AXES)] * 3
        with pytest.warns(UserWarning, match="identical"):
            model = FusionModel(
                wide,
                "product",
                IndianBuffetPrior(1.0),
                prior={"x": dist.Normal(torch.zeros(1), 7.0).to_event(1)},
                dispersion=1.0,
            )
        gibbs = FusionGibbs(model, {"component": torch.arange(3)})
        with pytest.raises(ParameterError, match=r"site 'x': .* is improper"):
            for _ in range(100):
                gibbs.step()


@pytest.mark.cuda
def test_cuda():
    here, _ = model_of("normal", (2, 3, 2), 0, IndianBuffetPrior())
    posteriors = [p.to("cuda") for p in normals((2, 3, 2), 0)]
    there = FusionModel(
        posteriors, "product", IndianBuffetPrior(), prior={"x": BASE}, dispersion=1.0
    )
    assert there.problem.parts["component"].problem.weights.device.type == "cuda"
    for settings in ({}, {"learn_dispersion": ABOUT_TWO}):
        a, b = (FusionGibbs(m, **settings).run(20, 0).only_label() for m in (here, there))
        assert torch.equal(a.assignments, b.assignments)
        torch.testing.assert_close(a.log_density, b.log_density)
