# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Estimators with a prior for each component: against scikit-learn where all have one prior,
against conjugate updates by hand where they differ, and exact evidence where there is one."""

import itertools
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import digamma, gammaln, logsumexp
from sklearn.base import clone
from sklearn.decomposition import LatentDirichletAllocation
from sklearn.mixture import BayesianGaussianMixture

from pyro_fusion import (
    NormalGamma,
    NormalWishart,
    ParameterError,
    Posterior,
    StructureError,
    from_sklearn,
    fuse,
)
from pyro_fusion.readers.sklearn import prior_from_sklearn
from pyro_fusion.readers.sklearn_estimators import (
    ComponentPriorMixture,
    ComponentPriorTopics,
    estimator_under,
)

Array = NDArray[Any]
CENTRES = np.array([[-3.0, 0.0], [0.0, 3.0], [3.0, -1.0]])
SPREAD = np.array([[2.0, 0.3], [0.3, 1.0]])


def points(seen: list[int], n: int = 60, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return CENTRES[np.repeat(seen, n)] + rng.normal(size=(n * len(seen), 2))


def priors(covariance: str = "full") -> dict[str, Any]:
    """Of three components, each its own."""
    spread = np.stack([30 * SPREAD, 12 * SPREAD, 20 * np.eye(2)])
    if covariance == "diag":
        spread = spread.diagonal(axis1=1, axis2=2)
    return {
        "n_components": 3,
        "covariance_type": covariance,
        "mean_prior": CENTRES + 0.5,
        "mean_precision_prior": np.array([10.0, 4.0, 7.0]),
        "degrees_of_freedom_prior": np.array([30.0, 12.0, 20.0]),
        "covariance_prior": spread,
        "weight_concentration_prior_type": "dirichlet_distribution",
        "weight_concentration_prior": 1.5,
        "reg_covar": 0.0,
        "tol": 1e-10,
        "max_iter": 2000,
    }


# -- mixtures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_with_one_prior_its_steps_are_those_of_sklearn(covariance: str) -> None:
    one = {
        "mean_prior": np.array([0.5, -1.0]),
        "mean_precision_prior": 3.0,
        "degrees_of_freedom_prior": 5.0,
        "covariance_prior": SPREAD if covariance == "full" else SPREAD.diagonal().copy(),
    }
    each = {k: np.stack([v] * 3) for k, v in one.items()}
    x = points([0, 1, 2])
    resp = np.random.default_rng(1).dirichlet(np.ones(3), len(x))
    settings: dict[str, Any] = {"n_components": 3, "covariance_type": covariance}
    theirs = BayesianGaussianMixture(**settings, **one)
    ours = ComponentPriorMixture(**settings, **each)
    bounds = []
    for model in (theirs, ours):
        model._check_parameters(x)
        model._m_step(x, np.log(resp))
        bounds.append(model._compute_lower_bound(*model._e_step(x)[::-1]))
    for name in ("means_", "mean_precision_", "degrees_of_freedom_", "covariances_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-12)
    np.testing.assert_allclose(ours._e_step(x)[1], theirs._e_step(x)[1], rtol=1e-10)
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-12)


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_it_ends_where_conjugate_updates_by_hand_change_nothing(covariance: str) -> None:
    x, given = points([0, 1, 2]), priors(covariance)
    model = ComponentPriorMixture(**given).fit(x)
    dim = x.shape[1]
    # E-step: E[log π] + E[log|Λ|] / 2 - E[(x - μ)ᵀ Λ (x - μ)] / 2.
    df, kappa, alpha = (
        model.degrees_of_freedom_,
        model.mean_precision_,
        model.weight_concentration_,
    )
    scatter = model.covariances_ * df.reshape(3, *[1] * (model.covariances_.ndim - 1))
    offset = x[:, None] - model.means_
    if covariance == "full":
        inverse = np.linalg.inv(scatter)
        log_det = digamma((df[:, None] - np.arange(dim)) / 2).sum(1) + dim * np.log(2)
        log_det = log_det - np.linalg.slogdet(scatter)[1]
        square = df * np.einsum("nki,kij,nkj->nk", offset, inverse, offset)
    else:
        # A Gamma for each dimension.
        log_det = (digamma(df / 2)[:, None] - np.log(scatter / 2)).sum(1)
        square = (df[:, None] * offset**2 / scatter).sum(2)
    log = digamma(alpha) - digamma(alpha.sum()) + (log_det - square - dim / kappa) / 2
    if covariance == "diag":
        # Scikit-learn takes the digammas of a Wishart there; these differ, by component.
        log = (
            log
            + (digamma((df[:, None] - np.arange(dim)) / 2) - digamma(df / 2)[:, None]).sum(1) / 2
        )
    resp = np.exp(log - logsumexp(log, 1, keepdims=True))
    # M-step.
    n, prior = resp.sum(0), given["mean_precision_prior"]
    mean = resp.T @ x / n[:, None]
    within = np.einsum("nk,nki,nkj->kij", resp, x[:, None] - mean, x[:, None] - mean)
    between = mean - given["mean_prior"]
    outer = (n * prior / (n + prior))[:, None, None] * between[:, :, None] * between[:, None]
    update = within + outer
    if covariance == "diag":
        update = update.diagonal(axis1=1, axis2=2)
    np.testing.assert_allclose(kappa, prior + n, rtol=1e-5)
    np.testing.assert_allclose(df, given["degrees_of_freedom_prior"] + n, rtol=1e-5)
    np.testing.assert_allclose(alpha, 1.5 + n, rtol=1e-5)
    loc = (prior[:, None] * given["mean_prior"] + n[:, None] * mean) / (prior + n)[:, None]
    np.testing.assert_allclose(model.means_, loc, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scatter, given["covariance_prior"] + update, rtol=1e-4, atol=1e-3)


def test_its_bound_never_falls_and_its_components_keep_their_order() -> None:
    model = ComponentPriorMixture(**priors()).fit(points([2, 0, 1]))
    assert (np.diff(model.lower_bounds_) > -1e-9).all()
    assert np.abs(model.means_ - CENTRES).max() < 0.5
    again = ComponentPriorMixture(**priors()).fit(points([2, 0, 1]))
    assert np.array_equal(model.means_, again.means_)  # nothing is random


def test_a_component_without_points_keeps_its_prior() -> None:
    given = priors()
    given["mean_prior"] = given["mean_prior"] + np.array([[0, 0], [0, 0], [500.0, 0]])
    model = ComponentPriorMixture(**given).fit(points([0, 1]))
    np.testing.assert_allclose(model.means_[2], given["mean_prior"][2], rtol=1e-9)
    assert model.mean_precision_[2] == pytest.approx(7.0)


def test_it_is_an_estimator_like_any_other() -> None:
    model = ComponentPriorMixture(**priors())
    fitted = clone(model).fit(points([0, 1, 2]))
    assert set(model.get_params()) == set(BayesianGaussianMixture().get_params())
    assert fitted.predict(CENTRES).tolist() == [0, 1, 2]
    assert fitted.converged_


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"covariance_type": "tied"}, StructureError, "'full' or 'diag', got 'tied'"),
        ({"mean_prior": CENTRES[:2]}, StructureError, r"expected shape \(3, 2\), got \(2, 2\)"),
        ({"mean_prior": CENTRES * np.nan}, ParameterError, "mean_prior must be finite"),
        ({"mean_precision_prior": -np.ones(3)}, ParameterError, "must be positive"),
        ({"degrees_of_freedom_prior": np.ones(3)}, ParameterError, "must be above 1"),
        ({"covariance_prior": np.zeros((3, 2, 2))}, ParameterError, "must be positive definite"),
    ],
)
def test_what_is_no_prior_of_a_mixture(
    change: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        ComponentPriorMixture(**(priors() | change)).fit(points([0, 1, 2]))


# -- topics ----------------------------------------------------------------------------------------


def documents(words: int = 6) -> Array:
    rng = np.random.default_rng(0)
    topics = np.array([[8, 8, 1, 1, 1, 1], [1, 1, 1, 1, 8, 8.0]])[:, :words]
    shares = rng.dirichlet([0.3, 0.3], 30)
    return rng.poisson(3 * shares @ topics)


def test_topics_with_one_prior_have_the_bound_of_sklearn() -> None:
    x = documents()
    theirs = LatentDirichletAllocation(2, topic_word_prior=0.4, random_state=0).fit(x)
    ours = ComponentPriorTopics(2, topic_word_prior=np.full((2, 6), 0.4), random_state=0).fit(x)
    ours.components_, ours.exp_dirichlet_component_ = (
        theirs.components_,
        theirs.exp_dirichlet_component_,
    )
    assert ours.score(x) == pytest.approx(theirs.score(x), rel=1e-12)


def test_one_topic_is_exact() -> None:
    x, prior = documents(), np.array([[5.0, 1.0, 0.5, 2.0, 3.0, 0.7]])
    model = ComponentPriorTopics(1, topic_word_prior=prior, random_state=0).fit(x)
    total = prior[0] + x.sum(0)
    np.testing.assert_allclose(model.components_[0], total)
    evidence = gammaln(total).sum() - gammaln(prior).sum()
    evidence += gammaln(prior.sum()) - gammaln(total.sum())
    assert model.score(x) == pytest.approx(evidence, rel=1e-9)


def test_topics_keep_the_order_of_their_priors() -> None:
    x = documents()
    prior = np.array([[1, 1, 1, 1, 9, 9.0], [9, 9, 1, 1, 1, 1.0]])
    settings = {"learning_offset": 1e9, "total_samples": len(x)}  # a step of no size
    start = ComponentPriorTopics(2, topic_word_prior=prior, **settings)
    np.testing.assert_allclose(start.partial_fit(x).components_, prior, rtol=1e-3)
    for order in ([0, 1], [1, 0]):
        model = ComponentPriorTopics(2, topic_word_prior=prior[order], random_state=0).fit(x)
        assert (model.components_[order[0], 4:] > 100).all()
        read = prior_from_sklearn(model).factors["topics"].concentration
        np.testing.assert_array_equal(read.numpy(), prior[order])


@pytest.mark.parametrize(
    ("prior", "error", "text"),
    [
        (np.ones((3, 6)), StructureError, r"expected shape \(2, 6\), got \(3, 6\)"),
        (np.zeros((2, 6)), ParameterError, "positive and finite"),
    ],
)
def test_what_is_no_prior_of_topics(prior: Array, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ComponentPriorTopics(2, topic_word_prior=prior).fit(documents())


# -- from posteriors, and back ---------------------------------------------------------------------


def normal_wishart() -> NormalWishart:
    g = {k: v for k, v in priors().items() if isinstance(v, np.ndarray)}
    return NormalWishart(
        torch.tensor(g["mean_prior"]),
        torch.tensor(g["mean_precision_prior"]),
        torch.tensor(g["degrees_of_freedom_prior"]),
        precision_matrix=torch.tensor(g["covariance_prior"]),
    )


def normal_gamma() -> NormalGamma:
    g = {k: v for k, v in priors("diag").items() if isinstance(v, np.ndarray)}
    kappa, shape = (
        torch.tensor(g[k])[:, None].expand(3, 2)
        for k in ("mean_precision_prior", "degrees_of_freedom_prior")
    )
    spread = torch.tensor(g["covariance_prior"])
    return NormalGamma(torch.tensor(g["mean_prior"]), kappa, shape / 2, spread / 2)


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_a_mixture_is_made_of_its_prior_and_read_back(covariance: str) -> None:
    d = normal_wishart() if covariance == "full" else normal_gamma().to_event(1)
    prior = Posterior({"gaussian": d}, {"gaussian": "component"})
    model = estimator_under(prior, weight_concentration_prior=2.5, max_iter=7)
    assert (model.weight_concentration_prior, model.max_iter) == (2.5, 7)
    for name, value in priors(covariance).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(getattr(model, name), value, rtol=1e-12)
    model.set_params(max_iter=500).fit(points([0, 1, 2]))
    read = prior_from_sklearn(model).decomposed["gaussian"]
    for name, value in prior.decomposed["gaussian"].params.items():
        torch.testing.assert_close(read.params[name], value)


def test_other_sites_are_no_estimator() -> None:
    prior = Posterior({"loc": dist.Normal(torch.zeros(3), 1.0)}, {"loc": "component"})
    with pytest.raises(StructureError, match=r"got \{'loc': 'Normal'\}"):
        estimator_under(prior)


def test_one_component_without_its_prior_is_bayes_rule() -> None:
    # A mixture of one is exact: fitted under one prior, and that exchanged, as under the other.
    from pyro_fusion.fusion.prior_exchange import exchange_prior

    x = points([0]) + 100
    own, common = (
        {k: v[i : i + 1] if isinstance(v, np.ndarray) else v for k, v in priors().items()}
        | {"n_components": 1}
        for i in (0, 1)
    )
    one, other = (ComponentPriorMixture(**p).fit(x) for p in (own, common))
    found = exchange_prior(from_sklearn(one), prior_from_sklearn(one), prior_from_sklearn(other))
    exact = from_sklearn(other)
    for site, f in exact.decomposed.items():
        for name, value in f.params.items():
            torch.testing.assert_close(found.decomposed[site].params[name], value)


def test_parties_fit_fuse_refit_and_fuse_again_by_product() -> None:
    seen = [[0, 1], [2, 0], [1, 2]]
    data = [points(own, seed=s) for s, own in enumerate(seen)]
    base = {"gaussian": NormalWishart(torch.zeros(2).double(), 0.1, 3.0, torch.eye(2).double())}
    fits = [
        BayesianGaussianMixture(
            n_components=2,
            random_state=0,
            mean_prior=np.zeros(2),
            mean_precision_prior=0.1,
            degrees_of_freedom_prior=3.0,
            covariance_prior=np.eye(2),
            weight_concentration_prior_type="dirichlet_distribution",
        ).fit(x)
        for x in data
    ]
    flat = {"weights": dist.Dirichlet(torch.full((2,), 0.5).double())}
    first = fuse([from_sklearn(m) for m in fits], "product", prior=base | flat)
    assert first.num_atoms == 3
    again = []
    for x, prior in zip(data, first.as_prior(sites=["gaussian"]).values(), strict=True):
        posterior = from_sklearn(prior.to_sklearn(weight_concentration_prior=0.5).fit(x))
        again.append(prior.divided_out(posterior, base))
    second = fuse(again, "product", prior=base | flat)
    assert second.num_atoms == 3
    assert all(torch.equal(a, b) for a, b in zip(first.assignment, second.assignment, strict=True))
    loc = second.posterior.decomposed["gaussian"].location()
    assert loc is not None
    best = min(
        float((loc[list(p)] - torch.tensor(CENTRES)).abs().max())
        for p in itertools.permutations(range(3))
    )
    assert best < 0.3
    # All of 120 points for each centre, and one prior: no more evidence, and no less.
    counts = second.posterior.decomposed["gaussian"].params["concentration"]
    torch.testing.assert_close(counts, torch.full((3,), 120.1).double(), rtol=0.03, atol=0.0)
