# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A fusion refined by the parties' model: against scikit-learn, sums over all states, and known
truth."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture

from pyro_fusion import (
    FixedAtoms,
    NormalGamma,
    NormalWishart,
    ParameterError,
    Posterior,
    StructureError,
    UnsupportedFamilyError,
    from_sklearn,
    fuse,
    refine,
)
from pyro_fusion.families import Factor
from pyro_fusion.families.wishart import Wishart
from pyro_fusion.fusion.roles import site_roles
from pyro_fusion.program.refining.evidence import draws_behind
from pyro_fusion.program.refining.fitting import fit
from pyro_fusion.program.refining.handlers import EvenDraws
from pyro_fusion.program.refining.likelihood import Likelihood, Model
from pyro_fusion.program.refining.moved import moved
from pyro_fusion.program.refining.refine import _present

EYE = torch.eye(2, dtype=torch.float64)
EXAMPLE = torch.zeros(256, 2, dtype=torch.float64)


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


def mixture(data, size):
    weights = pyro.sample("weights", dist.Dirichlet(ones(size)))
    with pyro.plate("component", size):
        prior = NormalWishart(0 * ones(2), 1.0, 2.0, precision_matrix=4 * EYE)
        gaussian = pyro.sample("gaussian", prior)
    with pyro.plate("data", len(data)):
        own = gaussian[pyro.sample("z", dist.Categorical(weights))]
        x = dist.MultivariateNormal(own[..., 0], precision_matrix=own[..., 1:])
        pyro.sample("x", x, obs=data)


def topics(documents, size):
    """Each document with shares of its own of all topics."""
    with pyro.plate("topic", size):
        topic = pyro.sample("topics", dist.Dirichlet(ones(4)))
    with pyro.plate("document", documents.shape[0], dim=-2):
        shares = pyro.sample("shares", dist.Dirichlet(0.5 * ones(size)))
        with pyro.plate("word", documents.shape[1], dim=-1):
            z = pyro.sample("z", dist.Categorical(shares))
            pyro.sample("w", dist.Categorical(topic[z]), obs=documents)


def single_topic(documents, size):
    """Each document of one topic."""
    weights = pyro.sample("weights", dist.Dirichlet(ones(size)))
    with pyro.plate("topic", size):
        topic = pyro.sample("topics", dist.Dirichlet(ones(6)))
    with pyro.plate("document", documents.shape[0], dim=-2):
        z = pyro.sample("z", dist.Categorical(weights))
        with pyro.plate("word", documents.shape[1], dim=-1):
            pyro.sample("w", dist.Categorical(topic[z]), obs=documents)


def hmm(sequences, size):
    transition = pyro.sample("transition", dist.Dirichlet(ones(size, size)).to_event(1))
    with pyro.plate("state", size):
        level = pyro.sample("level", dist.Normal(0 * ones(1), 10.0).to_event(1))
    state = torch.zeros((), dtype=torch.long)
    with pyro.plate("sequence", sequences.shape[0]):
        for t in pyro.markov(range(sequences.shape[1])):
            rows = transition if t else torch.full_like(transition, 1 / size)
            state = pyro.sample(f"s_{t}", dist.Categorical(rows[state]))
            pyro.sample(f"x_{t}", dist.Normal(level[state, 0], 0.5), obs=sequences[:, t])


def gaussians(loc, covariance, count=100.0):
    """The posterior of a mixture that puts its Gaussians there."""
    loc = torch.as_tensor(loc, dtype=torch.float64)
    covariance = torch.as_tensor(covariance, dtype=torch.float64).expand(len(loc), 2, 2)
    n = torch.full((len(loc),), count, dtype=torch.float64)
    gaussian = NormalWishart(
        loc, 1 + n, 2 + n, covariance_matrix=covariance.inverse() / (2 + count)
    )
    return Posterior(
        {"gaussian": gaussian, "weights": dist.Dirichlet(1 + n)},
        {"gaussian": ("component",), "weights": ("component",)},
    )


TRUTH = np.array([[-1.5, 0.0], [0.0, 1.2], [1.5, 0.0]])


def problem(seed):
    """All data, and the fusion of scikit-learn's fits to them, of six parties that have two or
    three of three Gaussians that overlap."""
    rng = np.random.default_rng(seed)
    data, fits = [], []
    for _ in range(6):
        own = rng.permutation(3)[: rng.integers(2, 4)]
        data.append(TRUTH[rng.choice(own, size=300)] + 0.8 * rng.normal(size=(300, 2)))
        model = BayesianGaussianMixture(
            n_components=len(own),
            random_state=0,
            max_iter=500,
            weight_concentration_prior_type="dirichlet_distribution",
        )
        fits.append(from_sklearn(model.fit(data[-1])))
    return np.concatenate(data), fuse(fits, assignment_prior=FixedAtoms(3))


@pytest.fixture(scope="module")
def overlapping():
    return problem(5)


def transport(x, truth):
    distance = np.linalg.norm(np.asarray(x)[:, None] - np.asarray(truth), axis=-1)
    return distance[linear_sum_assignment(distance)].mean()


def locations(fusion):
    return fusion.posterior.decomposed["gaussian"].params["loc"]


# -- the likelihood --------------------------------------------------------------------------------


def test_the_fit_ends_where_scikit_learn_does():
    rng = np.random.default_rng(0)
    centres = np.array([[-2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    x = centres[rng.integers(0, 3, 200)] + rng.normal(size=(200, 2)) @ np.diag([0.9, 0.5])
    start = {
        "weights": ones(3) / 3,
        "gaussian": torch.cat([torch.tensor(centres)[..., None], EYE.expand(3, 2, 2)], -1),
    }
    other = GaussianMixture(
        3,
        means_init=centres,
        weights_init=np.full(3, 1 / 3),
        precisions_init=np.tile(np.eye(2), (3, 1, 1)),
        reg_covar=0,
        tol=1e-10,
        max_iter=5000,
    ).fit(x)
    data = torch.tensor(x)
    likelihood = Likelihood(Model(mixture, data, (), {}), 3, start)
    # So many copies of the data that the prior says nothing.
    found = fit(
        likelihood,
        [{"x": data}],
        [1e7],
        {"gaussian": start["gaussian"]},
        {"weights": start["weights"]},
        max_iterations=300,
    )
    values = {**found.shared, **found.own[0]}
    density = float(likelihood.log_density({"x": data}, values)[0]) / len(x)
    assert density == pytest.approx(other.lower_bound_, abs=1e-4)
    np.testing.assert_allclose(values["gaussian"][..., 0], other.means_, atol=0.03)
    np.testing.assert_allclose(values["gaussian"][..., 1:], other.precisions_, rtol=0.05, atol=0.05)
    np.testing.assert_allclose(values["weights"], other.weights_, atol=0.01)
    usage = likelihood.usage({"x": data}, values)
    expected = other.predict_proba(x).sum(0)
    np.testing.assert_allclose(usage, expected, atol=2)


def test_all_paths_of_states_are_summed_and_counted():
    transition = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
    level = torch.tensor([[-0.4], [0.5]], dtype=torch.float64)
    x = torch.randn(2, 4, dtype=torch.float64)
    values = {"transition": transition, "level": level}
    likelihood = Likelihood(Model(hmm, x, (), {}), 2, values)
    points = {f"x_{t}": x[:, t] for t in range(4)}
    total, counts = 0.0, torch.zeros(2, dtype=torch.float64)
    for row in x:
        density, used = [], []
        for path in itertools.product(range(2), repeat=4):
            moves = [math.log(float(transition[a, b])) for a, b in itertools.pairwise(path)]
            frames = dist.Normal(level[list(path), 0], 0.5).log_prob(row).sum()
            density.append(math.log(0.5) + sum(moves) + float(frames))
            used.append([path.count(k) for k in range(2)])
        d = torch.tensor(density, dtype=torch.float64)
        total += float(d.logsumexp(0))
        counts += d.softmax(0) @ torch.tensor(used, dtype=torch.float64)
    found, prior = likelihood.log_density(points, values)
    assert float(found) == pytest.approx(total, rel=1e-9)
    torch.testing.assert_close(likelihood.usage(points, values), counts)
    expected = dist.Normal(0.0, 10.0).log_prob(level).sum()
    torch.testing.assert_close(prior["level"], expected)


def test_shares_of_documents_are_integrated_over():
    topic = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6]], dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 0, 0, 1], [3, 3, 3, 3, 3, 2]]).repeat(50, 1)
    likelihood = Likelihood(Model(topics, documents, (), {}), 2, {"topics": topic})
    found, _ = likelihood.log_density({"w": documents}, {"topics": topic})
    # Beta(1/2, 1/2) by Gauss and Chebyshev, exact for polynomials.
    share = (1 - np.cos((2 * np.arange(1, 9) - 1) * np.pi / 16)) / 2
    words = share[:, None, None] * topic[0].numpy()[documents]
    words = words + (1 - share[:, None, None]) * topic[1].numpy()[documents]
    each = words.prod(-1)
    exact = np.log(each.mean(0)).sum()
    # Of means over 128 draws for each document: four standard errors, and the bias of logarithms.
    variance = ((each.std(0) / each.mean(0)) ** 2 / 128).sum()
    assert float(found) == pytest.approx(exact, abs=4 * math.sqrt(variance) + variance)


def test_points_are_spread_more_evenly_than_chance():
    def normal():
        with pyro.plate("data", 256):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            x = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 0.6], [0.6, 1.0]]))
            return (
                z,
                pyro.sample("x", x),
                pyro.sample("y", dist.Normal(3 * ones(2), 2.0).to_event(1)),
            )

    with EvenDraws(-1, 256, 0, 0) as counted:
        normal()
    assert counted.needed == 5
    with EvenDraws(-1, 256, 5, 0):
        z, x, y = normal()
    # A tenth of the standard errors of independent draws would be .003, .009, .006, .013.
    assert float(z.float().mean()) == pytest.approx(0.7, abs=0.005)
    torch.testing.assert_close(x.mean(0), torch.zeros(2), atol=0.02, rtol=0)
    torch.testing.assert_close(x.mT.cov(), torch.tensor([[2.0, 0.6], [0.6, 1.0]]), atol=0.1, rtol=0)
    torch.testing.assert_close(y.mean(0), 3 * ones(2), atol=0.02, rtol=0)


# -- moving, counting ------------------------------------------------------------------------------


FACTORS = [
    (dist.Normal(ones(3), 0.5), torch.tensor([0.1, -2.0, 4.0])),
    (dist.LogNormal(ones(3), 0.5), torch.tensor([0.1, 2.0, 4.0])),
    (dist.MultivariateNormal(ones(3, 2), EYE), torch.randn(3, 2)),
    (dist.Gamma(3 * ones(2), 2.0), torch.tensor([0.3, 7.0])),
    (dist.Exponential(3 * ones(2)), torch.tensor([0.3, 7.0])),
    (dist.Beta(3 * ones(2), 2.0), torch.tensor([0.3, 0.9])),
    (dist.Dirichlet(3 * ones(2, 3)), torch.tensor([[0.3, 0.5, 0.2], [0.1, 0.1, 0.8]])),
    (NormalGamma(ones(2), 3.0, 2.0, 1.0), torch.tensor([[0.3, 0.5], [-2.0, 4.0]])),
    (Wishart(4 * ones(1), EYE), torch.tensor([[[2.0, 0.3], [0.3, 1.0]]])),
    (NormalWishart(ones(2), 3.0, 4.0, EYE), torch.tensor([[5.0, 2.0, 0.3], [-1.0, 0.3, 1.0]])),
]


@pytest.mark.parametrize(("d", "value"), FACTORS, ids=lambda x: type(x).__name__)
def test_a_moved_factor_has_the_centre_and_its_old_evidence(d, value):
    factor = Factor.of(d)
    result = moved(factor, value.double())
    torch.testing.assert_close(result.center(), value.double())
    assert result.structure() == factor.structure()
    for name in {"scale", "scale_tril", "concentration", "df", "gamma_shape"} & set(factor.params):
        before, after = factor.params[name], result.params[name]
        if name == "concentration" and factor.family.name == "Dirichlet":
            before, after = before.sum(-1), after.sum(-1)
        elif name == "scale_tril" and factor.family.name.endswith("Wishart"):
            continue  # that is where it was moved to
        torch.testing.assert_close(after, before)


def test_a_family_that_cannot_be_moved():
    with pytest.raises(UnsupportedFamilyError, match="a Bernoulli cannot be moved"):
        moved(Factor.of(dist.Bernoulli(0.5 * ones(2))), ones(2))


def test_what_a_posterior_counts():
    p = gaussians([[0.0, 0.0], [1.0, 1.0]], EYE, 40.0)
    prior = NormalWishart(0 * ones(2), 1.0, 2.0, precision_matrix=EYE).expand([2])
    roles = site_roles(p)
    assert draws_behind(p, roles, {"gaussian": prior}) == pytest.approx(80)
    with_weights = {"gaussian": dist.Normal(ones(2), 1.0), "weights": dist.Dirichlet(ones(2))}
    assert draws_behind(p, roles, with_weights) == pytest.approx(80)
    normal = Posterior({"x": dist.Normal(ones(2), 0.1)}, {"x": "component"})
    assert draws_behind(normal, site_roles(normal), {"x": dist.Normal(ones(2), 1.0)}) is None


def test_a_party_has_the_atoms_that_most_of_its_points_are_from():
    usage = torch.tensor([[10.0, 30.0, 60.0], [70.0, 2.0, 28.0]], dtype=torch.float64)
    assert [x.tolist() for x in _present(usage, [2, 2])] == [[1, 2], [0, 2]]


def test_every_atom_is_somebodys():
    usage = torch.tensor([[60.0, 30.0, 10.0], [70.0, 28.0, 2.0]], dtype=torch.float64)
    present = [x.tolist() for x in _present(usage, [2, 2])]
    assert present == [[0, 2], [0, 1]]
    present = [x.tolist() for x in _present(usage, [1, 2])]
    assert present == [[2], [0, 1]]


# -- the whole -------------------------------------------------------------------------------------


def test_overlapping_gaussians_are_nearer_to_the_truth():
    rows = []
    for seed in (4, 5):
        data, fusion = problem(seed)
        result = refine(fusion, mixture, EXAMPLE[:128], max_iterations=30)
        assert result.taken and 0.5 < result.overdispersion < 2
        pooled = GaussianMixture(3, random_state=0, n_init=3).fit(data).means_
        means = (locations(fusion), locations(result.fusion), pooled)
        rows.append([transport(x, TRUTH) for x in means])
    before, after, best = np.mean(rows, 0)
    assert after < 0.75 * before
    assert after < best + 0.02


def test_what_a_refined_fusion_has(overlapping):
    _, fusion = overlapping
    result = refine(fusion, mixture, EXAMPLE, max_iterations=5)
    for own, p in zip(result.fusion.assignment, fusion.parties.values(), strict=True):
        assert len(own.unique()) == len(own) == p.components("component")
    counts = torch.bincount(torch.cat(result.fusion.assignment), minlength=3)
    assert torch.equal(result.fusion.popularity, counts)
    # Each party's 300 points, by the model's own prior.
    torch.testing.assert_close(result.usage.sum(1), 300 * ones(6), atol=1e-6, rtol=0)
    df = [f.posterior.decomposed["gaussian"].params["df"] for f in (fusion, result.fusion)]
    assert torch.equal(*df)
    weights = result.fusion.posterior.factors["weights"].mean
    assert float(weights.sum()) == pytest.approx(1)
    # The most probable weights are those of usage, with one count more each.
    torch.testing.assert_close(weights, (result.usage.sum(0) + 6) / 1818, atol=0.02, rtol=0)
    assert "taken" in result.summary() and result.summary().count("\n") == 8
    assert "overdispersion" in repr(result)


def test_the_same_seed_gives_the_same_bits_and_nothing_is_touched(overlapping):
    _, fusion = overlapping
    pyro.param("mine", torch.tensor(1.0))
    rng, store = torch.get_rng_state(), dict(pyro.get_param_store().items())
    first, second = (refine(fusion, mixture, EXAMPLE, max_iterations=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), rng)
    assert dict(pyro.get_param_store().items()) == store
    assert torch.equal(locations(first.fusion), locations(second.fusion))
    assert first.overdispersion == second.overdispersion
    assert torch.is_grad_enabled() and pyro.distributions.Normal(0.0, 1.0)._validate_args
    other = refine(fusion, mixture, EXAMPLE, max_iterations=5, seed=1)
    assert not torch.equal(locations(first.fusion), locations(other.fusion))


class Network(torch.nn.Module):
    """A model with a parameter of its own, in single precision."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, data, size):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(size)))
        with pyro.plate("component", size):
            level = pyro.sample("level", dist.Normal(torch.tensor(0.0), 10.0))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(level[z], self.scale), obs=data)


def test_a_network_gets_no_gradients_and_single_precision_is_kept():
    parties = []
    for x in (-0.1, 0.1):
        level = dist.Normal(torch.tensor([-3.0, 3.0]) + x, 0.1)
        weights = dist.Dirichlet(torch.full((2,), 50.0 + x))
        axes = {"level": "component", "weights": "component"}
        parties.append(Posterior({"level": level, "weights": weights}, axes))
    fusion, network = fuse(parties), Network()
    result = refine(fusion, network, torch.zeros(128))
    assert network.scale.grad is None and network.scale.requires_grad
    level = result.fusion.posterior.factors["level"]
    assert result.taken and level.mean.dtype == torch.float32
    torch.testing.assert_close(
        level.mean.sort().values, torch.tensor([-3.0, 3.0]), atol=0.1, rtol=0
    )
    # The weights count, beyond the model's prior.
    torch.testing.assert_close(result.usage.sum(1), ones(2) * 98, atol=0.3, rtol=0)
    twice = refine(fusion, network, torch.zeros(128), evidence=[50, 100])
    torch.testing.assert_close(twice.usage.sum(1), torch.tensor([50.0, 100.0]).double())


def test_a_fit_that_fails_leaves_the_fusion():
    def broken(data, size):
        Network()(data, size)
        pyro.factor("broken", torch.tensor(math.nan))

    level = dist.Normal(torch.tensor([-3.0, 3.0]), 0.1)
    other = dist.Normal(torch.tensor([-3.1, 3.0]), 0.1)
    weights = dist.Dirichlet(torch.full((2,), 50.0))
    axes = {"level": "component", "weights": "component"}
    fusion = fuse([Posterior({"level": x, "weights": weights}, axes) for x in (level, other)])
    result = refine(fusion, broken, torch.zeros(16))
    assert not result.taken and result.fusion is fusion and "finite" in result.reason


def test_parties_that_differ_are_left_to_the_bit():
    offsets = ([0.0, 0.0], [0.9, 0.0], [0.0, 0.9], [-0.9, -0.9])
    parties = [
        gaussians(torch.tensor([[-4.0, 0.0], [4.0, 0.0]]) + torch.tensor(o), EYE) for o in offsets
    ]
    fusion = fuse(parties, assignment_prior=FixedAtoms(2))
    result = refine(fusion, mixture, EXAMPLE)
    assert not result.taken and result.fusion is fusion
    assert result.overdispersion > 3
    assert "parties differ" in result.reason and "left" in result.summary()


def test_the_overdispersion_of_parties_whose_posteriors_are_right():
    # Each off by what its posterior admits: standard deviation 1 / sqrt(100).
    torch.manual_seed(1)
    c = []
    for _ in range(3):
        centres = torch.tensor([[-4.0, 0.0], [4.0, 0.0]])
        parties = []
        for _ in range(5):
            scatter = dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).sample((2, 100))
            x = centres[:, None] + scatter
            covariance = torch.stack([v.mT.cov(correction=0) for v in x])
            parties.append(gaussians(x.mean(1), covariance))
        fusion = fuse(parties, assignment_prior=FixedAtoms(2))
        c.append(refine(fusion, mixture, EXAMPLE).overdispersion)
    # A mean of three chi squares over their 40 degrees of freedom: 1 with sd .13.
    assert np.mean(c) == pytest.approx(1, abs=0.45)


def refined_from(parties, atoms, model, example):
    """What refining makes of atoms that are far off."""
    fusion = fuse(parties)
    off = Posterior({**fusion.posterior.factors, **atoms}, fusion.posterior.axes)
    return refine(replace(fusion, posterior=off), model, example, max_overdispersion=math.inf)


def test_documents_of_many_topics_bring_atoms_back():
    truth = torch.tensor([[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.05, 0.85]], dtype=torch.float64)
    parties = [
        Posterior({"topics": dist.Dirichlet(n + n * 400 * truth)}, {"topics": "topic"})
        for n in (0.9, 1.0, 1.1)
    ]
    start = dist.Dirichlet(1 + 400 * (0.6 * truth + 0.1))
    result = refined_from(parties, {"topics": start}, topics, torch.zeros(96, 8, dtype=torch.long))
    found = result.fusion.posterior.factors["topics"].mean
    found = found[found[:, 0].argsort(descending=True)]
    before = float((start.mean - truth).abs().sum(-1).max())
    after = float((found - truth).abs().sum(-1).max())
    # 2300 words drawn: a topic of half of them is off by .04 in all.
    assert before > 0.4 and after < 0.12


def test_documents_of_one_topic_bring_atoms_back():
    truth = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.05, 0.05]], dtype=torch.float64)
    truth = torch.cat([truth, truth.flip(-1)])
    parties = [
        Posterior(
            {
                "topics": dist.Dirichlet(n + 200 * truth),
                "weights": dist.Dirichlet(n * 100 * ones(2)),
            },
            {"topics": "topic", "weights": "topic"},
        )
        for n in (0.9, 1.0, 1.1)
    ]
    start = dist.Dirichlet(200 * (0.5 * truth + 0.5 / 6))
    example = torch.zeros(128, 4, dtype=torch.long)
    result = refined_from(parties, {"topics": start}, single_topic, example)
    found = result.fusion.posterior.factors["topics"].mean
    found = found[found[:, 0].argsort(descending=True)]
    assert float((start.mean - truth).abs().sum(-1).max()) > 0.3
    assert float((found - truth).abs().sum(-1).max()) < 0.1
    # Parties that agree, and documents that are independent: no fit is much better than the truth.
    assert -2 < result.overdispersion < 1


def test_sequences_bring_atoms_back():
    transition = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    level = torch.tensor([[-0.6], [0.6]], dtype=torch.float64)
    parties = [
        Posterior(
            {
                "level": dist.Normal(level + shift, 0.05).to_event(1),
                "transition": dist.Dirichlet(1 + 100 * transition).to_event(1),
            },
            {"level": ("state",), "transition": ("state", "state")},
        )
        for shift in (-0.02, 0.0, 0.02)
    ]
    off = {
        "level": dist.Normal(torch.tensor([[-1.2], [1.0]], dtype=torch.float64), 0.05).to_event(1),
        "transition": dist.Dirichlet(50 * ones(2, 2)).to_event(1),
    }
    result = refined_from(parties, off, hmm, torch.zeros(64, 8, dtype=torch.float64))
    factors = result.fusion.posterior.factors
    # 1500 frames drawn, sd .5 each: .02, and half as much again for states that are not seen.
    torch.testing.assert_close(factors["level"].mean, level, atol=0.06, rtol=0)
    torch.testing.assert_close(factors["transition"].mean, transition, atol=0.06, rtol=0)
    torch.testing.assert_close(factors["level"].stddev, torch.full_like(level, 0.05))


# -- errors ----------------------------------------------------------------------------------------


def missing(data, size):
    with pyro.plate("component", size):
        pyro.sample("gaussian", NormalWishart(0 * ones(2), 1.0, 2.0, precision_matrix=EYE))


def without_data(data, size):
    pyro.sample("weights", dist.Dirichlet(ones(size)))
    missing(data, size)


def summed(data, size):
    without_data(data, size)
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(0 * ones(2), 1.0).to_event(1), obs=data)


def unknown(data, size):
    pyro.sample("noise", dist.Gamma(ones(), 1.0))
    mixture(data, size)


def transposed(data, size):
    mixture(data, size + 1)


def other_states(data, size):
    without_data(data, size)
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Categorical(ones(size + 1)))
        loc = torch.stack([z, z], -1).double()
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=data)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (missing, r"sites \['weights'\] that the model does not sample"),
        (without_data, "observes nothing"),
        (summed, "no discrete latent site"),
        (unknown, "site 'noise'.*nobody knows its value"),
        (transposed, "the posterior has shape"),
        (other_states, "none of the discrete sites"),
    ],
)
def test_a_model_that_does_not_fit(overlapping, model, message):
    with pytest.raises(StructureError, match=message):
        refine(overlapping[1], model, EXAMPLE[:5])


def test_arguments_out_of_range(overlapping):
    for settings in ({"evidence": [1.0]}, {"evidence": [1.0] * 5 + [0.0]}):
        with pytest.raises(ParameterError, match="evidence of 6 parties"):
            refine(overlapping[1], mixture, EXAMPLE[:5], **settings)
    with pytest.raises(ParameterError, match="max_overdispersion"):
        refine(overlapping[1], mixture, EXAMPLE[:5], max_overdispersion=0)


def test_nothing_shared_is_left():
    fusion = fuse([gaussians([[-4.0, 0.0], [4.0, 0.0]], EYE)])
    result = refine(fusion, mixture, EXAMPLE[:16], max_iterations=2)
    assert not result.taken and result.fusion is fusion and "share" in result.reason
