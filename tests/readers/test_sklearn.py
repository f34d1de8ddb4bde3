# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Reading scikit-learn: each factor against the conjugate update by hand, against the estimator's
own numbers, or against draws; what is refused; and parties fused end to end."""

import itertools
import sys
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.special import digamma
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF, LatentDirichletAllocation
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from torch import Tensor

from pyro_fusion import NormalWishart, ParameterError, Posterior, StructureError, fuse
from pyro_fusion.readers.sklearn import from_sklearn, prior_from_sklearn

COVARIANCES = ["full", "tied", "diag", "spherical"]
DIM = 3
CENTRES = np.array([[-40.0, 0.0, 5.0], [0.0, 40.0, -5.0], [40.0, 0.0, 10.0], [0.0, -40.0, 0.0]])
# Of one prior for all parties, as `product` needs it.
SCALAR = {"mean_precision_prior": 0.3, "degrees_of_freedom_prior": 4.5}
COVARIANCE: dict[str, Any] = {
    "full": np.diag([2.0, 1.0, 3.0]) + 0.2,
    "tied": np.diag([2.0, 1.0, 3.0]) + 0.2,
    "diag": np.array([2.0, 1.0, 3.0]),
    "spherical": 2.0,
}


def draw(seen: list[int], points: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points about some of the centres, ``[N, D]``, and which centre each is about."""
    rng = np.random.default_rng(seed)
    root = np.array([[1.0, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.3, 0.2, 1.2]])
    which = np.repeat(seen, points)
    return CENTRES[which] + rng.normal(size=(len(which), DIM)) @ root.T, which


def mixture(
    data: np.ndarray, size: int, covariance: str = "full", process: bool = False, **settings: Any
) -> BayesianGaussianMixture:
    kind = "dirichlet_process" if process else "dirichlet_distribution"
    common: dict[str, Any] = dict(
        covariance_type=covariance,
        weight_concentration_prior_type=kind,
        weight_concentration_prior=0.7,
        mean_prior=np.array([1.0, -2.0, 0.5]),
        covariance_prior=COVARIANCE[covariance],
        reg_covar=0.0,
        tol=1e-8,
        max_iter=500,
        random_state=0,
        **SCALAR,
    )
    return BayesianGaussianMixture(n_components=size, **{**common, **settings}).fit(data)


def matched(model: BayesianGaussianMixture, which: np.ndarray, data: np.ndarray) -> list[int]:
    """The cluster that each component is of, where responsibilities are hard."""
    r = model.predict_proba(data)
    assert np.abs(r - r.round()).max() < 1e-12
    return [int(which[r[:, k] > 0.5][0]) for k in range(r.shape[1])]


def update(x: np.ndarray, prior: NormalWishart) -> NormalWishart:
    """The posterior given points ``[N, D]``, by adding natural parameters point by point: each
    counts one, at its own place."""
    loc, kappa, df = prior.loc.numpy(), float(prior.concentration), float(prior.df)
    scatter = prior.precision_matrix.numpy()
    second = scatter + kappa * np.outer(loc, loc) + sum(np.outer(p, p) for p in x)
    first = kappa * loc + x.sum(0)
    kappa, df = kappa + len(x), df + len(x)
    scatter = second - np.outer(first, first) / kappa
    return NormalWishart(
        torch.tensor(first / kappa), kappa, df, precision_matrix=torch.tensor(scatter)
    )


def close(x: Tensor, y: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(x, torch.as_tensor(y, dtype=x.dtype), rtol=rtol, atol=1e-9)


# -- mixtures --------------------------------------------------------------------------------------


class TestMixture:
    data, which = draw([0, 1, 2])

    def prior(self) -> NormalWishart:
        return NormalWishart(
            torch.tensor([1.0, -2.0, 0.5]).double(), 0.3, 4.5,
            precision_matrix=torch.tensor(COVARIANCE["full"]),
        )  # fmt: skip

    def test_full_is_the_conjugate_update(self) -> None:
        model = mixture(self.data, 3)
        posterior = from_sklearn(model)
        assert posterior.axes == {
            "weights": ("component",),
            "gaussian": ("component", None, None),
        }
        found = posterior.factors["gaussian"]
        for k, cluster in enumerate(matched(model, self.which, self.data)):
            expected = update(self.data[self.which == cluster], self.prior())
            close(found.loc[k], expected.loc)
            close(found.concentration[k], expected.concentration)
            close(found.df[k], expected.df)
            close(found.precision_matrix[k], expected.precision_matrix)
        close(found.mean[..., 1:], model.precisions_)

    def test_each_dimension_of_a_diagonal_is_one_dimensional(self) -> None:
        model = mixture(self.data, 3, "diag")
        found = from_sklearn(model).factors["gaussian"].base_dist
        for k, cluster in enumerate(matched(model, self.which, self.data)):
            own = self.data[self.which == cluster]
            each = [
                update(
                    own[:, [d]],
                    NormalWishart(
                        torch.tensor([[1.0, -2.0, 0.5][d]]).double(), 0.3, 4.5,
                        precision_matrix=torch.tensor([[COVARIANCE["diag"][d]]]),
                    ),
                )
                for d in range(DIM)
            ]  # fmt: skip
            close(found.loc[k], [float(e.loc) for e in each])
            close(found.concentration[k], [float(e.concentration) for e in each])
            close(found.gamma_shape[k], [float(e.df) / 2 for e in each])
            close(found.rate[k], [float(e.precision_matrix) / 2 for e in each])

    def test_spherical_counts_each_number_once(self) -> None:
        model = mixture(self.data, 3, "spherical")
        found = from_sklearn(model).factors
        prior_mean, prior = np.array([1.0, -2.0, 0.5]), (4.5 / 2, 2.0 / 2)
        for k, cluster in enumerate(matched(model, self.which, self.data)):
            own = self.data[self.which == cluster]
            mean = (0.3 * prior_mean + own.sum(0)) / (0.3 + len(own))
            # One Gamma, of all the numbers, the mean integrated out.
            squares = (own**2).sum() + 0.3 * (prior_mean**2).sum()
            squares -= (0.3 + len(own)) * (mean**2).sum()
            one = dist.Gamma(torch.tensor(prior[0] + own.size / 2).double(), prior[1] + squares / 2)
            close(found["precision"].concentration[k], one.concentration)
            close(found["precision"].rate[k], one.rate)
            close(found["loc"].mean[k], mean)
            close(1 / found["loc"].variance[k], ((0.3 + len(own)) * one.mean).expand(DIM))

    def test_tied_counts_each_point_once(self) -> None:
        model = mixture(self.data, 3, "tied")
        posterior = from_sklearn(model)
        assert posterior.axes["loc"] == ("component", None)
        assert posterior.axes["precision"] == (None, None)
        precision, loc = posterior.factors["precision"], posterior.factors["loc"]
        prior = self.prior()
        clusters = matched(model, self.which, self.data)
        each = [update(self.data[self.which == c], prior) for c in clusters]
        # What each cluster adds to the one prior.
        scatter = prior.precision_matrix + sum(
            e.precision_matrix - prior.precision_matrix for e in each
        )
        close(precision.df, 4.5 + len(self.data))
        close(precision.precision_matrix, scatter)
        close(loc.loc, torch.stack([e.loc for e in each]))
        count = torch.stack([e.concentration for e in each])
        close(loc.precision_matrix, count[:, None, None] * precision.mean)
        # Scikit-learn's, of whose counts it has a third: near, as there are 180 points.
        assert (precision.mean / torch.as_tensor(model.precisions_) - 1).abs().max() < 0.05

    @pytest.mark.parametrize("covariance", COVARIANCES)
    def test_what_is_added_to_the_prior_are_the_points(self, covariance: str) -> None:
        model = mixture(self.data, 3, covariance)
        prior, posterior = prior_from_sklearn(model), from_sklearn(model)
        assert prior.axes == posterior.axes
        assert repr(prior) == repr(posterior)
        x, y = prior.factors, posterior.factors
        close((y["weights"].concentration - x["weights"].concentration).sum(), 180.0)
        given, mean = COVARIANCE[covariance], [1.0, -2.0, 0.5]
        if covariance == "full":
            a, b = x["gaussian"], y["gaussian"]
            close((b.df - a.df).sum(), 180.0)
            close((b.concentration - a.concentration).sum(), 180.0)
            close(a.precision_matrix, np.tile(given, (3, 1, 1)))
            close(a.loc, [mean] * 3)
        elif covariance == "diag":
            a, b = x["gaussian"].base_dist, y["gaussian"].base_dist
            close(2 * (b.gamma_shape - a.gamma_shape).sum(0), [180.0] * DIM)
            close((b.concentration - a.concentration).sum(0), [180.0] * DIM)
            close(2 * a.rate, [given.tolist()] * 3)
            close(a.loc, [mean] * 3)
        elif covariance == "tied":
            close(y["precision"].df - x["precision"].df, 180.0)
            close(x["precision"].precision_matrix, given)
            close(x["loc"].precision_matrix[1], np.linalg.inv(given) * 0.3 * 4.5)
            close(x["loc"].mean, [mean] * 3)
        else:
            a, b = x["precision"], y["precision"]
            close(2 * (b.concentration - a.concentration).sum(), 180.0 * DIM)
            close(2 * a.rate, [given] * 3)
            close(x["loc"].variance, np.full((3, DIM), given / 4.5 / 0.3))
            close(x["loc"].mean, [mean] * 3)

    @pytest.mark.parametrize("covariance", COVARIANCES)
    def test_draws_have_the_estimators_own_moments(self, covariance: str) -> None:
        model = mixture(self.data, 3, covariance)
        draws = from_sklearn(model).sample([4000])
        deviations = 5 / np.sqrt(4000)  # five standard deviations of the mean
        expected = torch.as_tensor(model.weights_)
        spread = draws["weights"].std(0)
        assert ((draws["weights"].mean(0) - expected).abs() < deviations * spread).all()
        if covariance in ("full", "diag"):
            mean = draws["gaussian"][..., 0]
            precision = draws["gaussian"][..., 1:].squeeze(-1)
            truth = torch.as_tensor(model.precisions_)
        else:  # of whose counts scikit-learn has a third
            mean, precision = draws["loc"], draws["precision"]
            truth = from_sklearn(model).factors["precision"].mean
        for value, expected in ((mean, torch.as_tensor(model.means_)), (precision, truth)):
            assert ((value.mean(0) - expected).abs() < deviations * value.std(0)).all()

    def test_dirichlet_weights_are_exact(self) -> None:
        model = mixture(self.data, 3)
        found = from_sklearn(model).factors["weights"]
        close(found.concentration, model.weight_concentration_)
        close(found.concentration, [60.7] * 3)
        close(prior_from_sklearn(model).factors["weights"].concentration, [0.7] * 3)

    def test_sticks_keep_their_expected_logarithms(self) -> None:
        data, _ = draw([0, 1, 2, 3])
        model = mixture(data[:170], 5, process=True)  # three centres, so some sticks are idle
        found = from_sklearn(model).factors["weights"].concentration.numpy()
        take, leave = model.weight_concentration_
        rng = np.random.default_rng(0)
        v = rng.beta(take, leave, (200_000, 5))
        v[:, -1] = 1
        sticks = np.log(v) + np.cumsum(np.log1p(-np.pad(v, ((0, 0), (1, 0)))[:, :-1]), 1)
        error = sticks.std(0) / np.sqrt(len(sticks))
        expected = digamma(found) - digamma(found.sum())
        assert (np.abs(sticks.mean(0) - expected) < 5 * error).all()
        np.testing.assert_allclose(found / found.sum(), model.weights_, atol=0.01)

    def test_the_prior_of_sticks_is_the_mean_over_orders(self) -> None:
        model = mixture(self.data, 4, process=True)
        found = prior_from_sklearn(model).factors["weights"].concentration
        assert (found == found[0]).all()
        take, leave = np.ones(3), np.full(3, 0.7)
        log_take = np.append(digamma(take) - digamma(1.7), 0)
        log_left = np.append(0, np.cumsum(digamma(leave) - digamma(1.7)))
        each = log_take + log_left
        orders = np.mean([each[list(p)] for p in itertools.permutations(range(4))], 0)
        close(torch.digamma(found) - torch.digamma(found.sum()), orders)

    @pytest.mark.parametrize("process", [False, True])
    @pytest.mark.parametrize("covariance", COVARIANCES)
    def test_one_component(self, covariance: str, process: bool) -> None:
        data, _ = draw([1])
        model = mixture(data, 1, covariance, process)
        posterior, prior = from_sklearn(model), prior_from_sklearn(model)
        close(posterior.factors["weights"].mean, [1.0])
        assert prior.components("component") == posterior.components("component") == 1
        added = posterior.factors["weights"].concentration - prior.factors["weights"].concentration
        close(added, [60.0])

    def test_defaults_of_scikit_learn_are_read(self) -> None:
        for covariance in COVARIANCES:
            model = BayesianGaussianMixture(
                n_components=3, covariance_type=covariance, random_state=0
            )
            posterior = from_sklearn(model.fit(self.data), label="cluster")
            assert posterior.labels == ("cluster",)
            assert posterior.components("cluster") == 3
            assert prior_from_sklearn(model, label="cluster").axes == posterior.axes

    def test_values_are_copied(self) -> None:
        model = mixture(self.data, 3)
        posterior = from_sklearn(model)
        before = posterior.factors["gaussian"].loc
        model.means_ += 1
        close(posterior.factors["gaussian"].loc, before)


# -- topics ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def topics() -> LatentDirichletAllocation:
    counts = np.random.default_rng(0).poisson(1.0, (30, 8))
    return LatentDirichletAllocation(3, random_state=0).fit(counts)


class TestTopics:
    def test_topics_are_dirichlets(self, topics: LatentDirichletAllocation) -> None:
        posterior = from_sklearn(topics)
        assert posterior.axes == {"topics": ("topic", None)}
        close(posterior.factors["topics"].concentration, topics.components_, rtol=0)
        # What scikit-learn keeps of the same Dirichlets: exp(E[log β]).
        expected = np.log(topics.exp_dirichlet_component_)
        found = posterior.factors["topics"].concentration
        close(torch.digamma(found) - torch.digamma(found.sum(-1, keepdim=True)), expected)

    def test_what_is_added_to_the_prior_are_the_words(
        self, topics: LatentDirichletAllocation
    ) -> None:
        counts = np.random.default_rng(0).poisson(1.0, (30, 8))
        prior = prior_from_sklearn(topics)
        assert prior.axes == {"topics": ("topic", None)}
        close(prior.factors["topics"].concentration, np.full((3, 8), 1 / 3))
        added = from_sklearn(topics).factors["topics"].concentration
        added = added - prior.factors["topics"].concentration
        close(added.sum(0), counts.sum(0))

    def test_float32_stays(self) -> None:
        counts = np.random.default_rng(0).poisson(1.0, (30, 8)).astype(np.float32)
        model = LatentDirichletAllocation(3, random_state=0).fit(counts)
        assert from_sklearn(model).dtype == prior_from_sklearn(model).dtype == torch.float32

    def test_label(self, topics: LatentDirichletAllocation) -> None:
        assert from_sklearn(topics, label="theme").labels == ("theme",)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [from_sklearn, prior_from_sklearn])
class TestErrors:
    @pytest.mark.parametrize(
        "model", [BayesianGaussianMixture(n_components=2), LatentDirichletAllocation(2)]
    )
    def test_not_fitted(self, read: Any, model: Any) -> None:
        with pytest.raises(StructureError, match=r"is not fitted: call fit\(X\) first"):
            read(model)

    @pytest.mark.parametrize("model", [KMeans(2), NMF(2), "file.pkl", LatentDirichletAllocation])
    def test_another_estimator(self, read: Any, model: Any) -> None:
        supported = "supported are BayesianGaussianMixture and LatentDirichletAllocation"
        with pytest.raises(StructureError, match=supported):
            read(model)

    def test_a_point_estimate(self, read: Any) -> None:
        with pytest.raises(StructureError, match=r"point estimate.*use BayesianGaussianMixture"):
            read(GaussianMixture(2))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_what_is_not_finite_is_named(self, read: Any, bad: float) -> None:
        model = mixture(draw([0, 1])[0], 2)
        model.mean_precision_[0] = model.mean_precision_prior_ = bad
        with pytest.raises(ParameterError, match=r"BayesianGaussianMixture\.mean_precision_"):
            read(model)

    @pytest.mark.parametrize("covariance", COVARIANCES)
    def test_what_is_out_of_range(self, read: Any, covariance: str) -> None:
        model = mixture(draw([0, 1])[0], 2, covariance)
        model.degrees_of_freedom_ = model.degrees_of_freedom_ * 0 - 1
        model.degrees_of_freedom_prior_ = -1.0
        with pytest.raises(ParameterError, match=r"BayesianGaussianMixture|site"):
            read(model)

    def test_negative_counts_of_words(self, read: Any) -> None:
        model = LatentDirichletAllocation(2, random_state=0).fit(np.ones((4, 3)))
        model.components_[0, 0] = model.topic_word_prior_ = -1.0
        with pytest.raises(ParameterError, match=r"LatentDirichletAllocation.*concentration"):
            read(model)

    def test_a_bad_label(self, read: Any) -> None:
        with pytest.raises(StructureError, match="labels must be names"):
            read(mixture(draw([0, 1])[0], 2), label=3)

    def test_without_scikit_learn_the_extra_is_named(
        self, read: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
        with pytest.raises(ImportError, match=r"pip install 'pyro-fusion\[sklearn\]'"):
            read(object())


# -- from parties to one posterior -----------------------------------------------------------------

SEEN = [[0, 1, 2], [3, 1], [2, 3, 0, 1], [3, 0]]


def parties(covariance: str, process: bool = False) -> list[BayesianGaussianMixture]:
    """Their prior says little of the means, which are far from its own."""
    return [
        mixture(
            draw(seen, seed=s)[0], len(seen), covariance, process,
            random_state=s, mean_precision_prior=0.001,
        )
        for s, seen in enumerate(SEEN)
    ]  # fmt: skip


def everybody() -> np.ndarray:
    return np.concatenate([draw(seen, seed=s)[0] for s, seen in enumerate(SEEN)])


def centres(posterior: Posterior) -> Tensor:
    factors = posterior.factors
    if "loc" in factors:
        return factors["loc"].mean
    gaussian = factors["gaussian"]
    return gaussian.base_dist.loc if isinstance(gaussian, dist.Independent) else gaussian.loc


@pytest.mark.parametrize("pooling", ["exclusive", "inclusive", "product"])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_parties_in_any_order_with_missing_components(covariance: str, pooling: str) -> None:
    models = parties(covariance)
    base = prior_from_sklearn(models[0]) if pooling == "product" else None
    fusion = fuse([from_sklearn(m) for m in models], pooling, prior=base)
    assert fusion.num_atoms == len(CENTRES)
    found = centres(fusion.posterior)
    distance = torch.cdist(found, torch.as_tensor(CENTRES))
    nearest = distance.argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]
    # Means of 60 points at least, of variance 1.57 at most in each dimension: five deviations.
    assert distance.min(1).values.max() < 5 * np.sqrt(3 * 1.57 / 60)
    for model, assigned in zip(models, fusion.assignment, strict=True):
        truth = np.linalg.norm(model.means_[:, None] - CENTRES, axis=-1).argmin(1)
        assert nearest[assigned].tolist() == truth.tolist()


@pytest.mark.parametrize("process", [False, True])
def test_product_is_the_posterior_on_everybodys_points(process: bool) -> None:
    models = parties("full", process)
    base = prior_from_sklearn(models[0])
    found = fuse([from_sklearn(m) for m in models], "product", prior=base).posterior.factors
    data = everybody()
    pooled = mixture(data, 4, mean_precision_prior=0.001)
    atoms = found["gaussian"]
    order = torch.cdist(torch.as_tensor(pooled.means_), atoms.loc).argmin(1)
    close(atoms.loc[order], pooled.means_)
    close(atoms.concentration[order], pooled.mean_precision_)
    close(atoms.df[order], pooled.degrees_of_freedom_)
    expected = pooled.covariances_ * pooled.degrees_of_freedom_[:, None, None]
    close(atoms.precision_matrix[order], expected)
    if not process:
        close(found["weights"].concentration[order], pooled.weight_concentration_)


@pytest.mark.parametrize("covariance", ["tied", "diag", "spherical"])
def test_product_counts_everybodys_points(covariance: str) -> None:
    models = parties(covariance)
    base = prior_from_sklearn(models[0])
    found = fuse([from_sklearn(m) for m in models], "product", prior=base).posterior
    data = everybody()
    pooled = from_sklearn(mixture(data, 4, covariance, mean_precision_prior=0.001))
    order = torch.cdist(centres(pooled), centres(found)).argmin(1)
    if covariance == "diag":
        atoms = found.factors["gaussian"].base_dist
        expected = pooled.factors["gaussian"].base_dist
        close(atoms.loc[order], expected.loc)
        close(atoms.concentration[order], expected.concentration)
        close(atoms.gamma_shape[order], expected.gamma_shape)
        close(atoms.rate[order], expected.rate)
        return
    # The counts are exact. Of the scatter, what is between parties is in their means alone.
    atoms, expected = found.factors["precision"], pooled.factors["precision"]
    if covariance == "tied":
        close(atoms.df, expected.df)
        share = (atoms.precision_matrix / expected.precision_matrix).diagonal()
    else:
        close(atoms.concentration[order], expected.concentration)
        share = atoms.rate[order] / expected.rate
    assert (share - 1).abs().max() < 0.05
    assert (centres(found)[order] - centres(pooled)).abs().max() < 0.05


def test_product_of_topics_adds_counts() -> None:
    rng = np.random.default_rng(0)
    truth = np.kron(np.eye(3), np.full(5, 0.2))
    local, counts = [], []
    for _ in range(3):
        theme = rng.integers(3, size=60)
        counts.append(np.stack([rng.multinomial(60, truth[t]) for t in theme]))
        starts = [
            LatentDirichletAllocation(3, topic_word_prior=0.1, random_state=i, max_iter=30)
            for i in range(5)
        ]
        # The perplexity: a start may end with one topic in two, and two in one.
        local.append(min((m.fit(counts[-1]) for m in starts), key=lambda m: m.bound_))
    fusion = fuse([from_sklearn(m) for m in local], "product", prior=prior_from_sklearn(local[0]))
    assert fusion.num_atoms == 3
    found = fusion.posterior.factors["topics"].concentration
    close(found.sum(0), np.concatenate(counts).sum(0) + 3 * 0.1)
    shares = found / found.sum(-1, keepdim=True)
    variation = torch.cdist(shares, torch.as_tensor(truth), p=1) / 2
    assert sorted(variation.argmin(1).tolist()) == [0, 1, 2]
    assert variation.min(1).values.max() < 0.05
