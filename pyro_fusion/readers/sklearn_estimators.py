# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Estimators of scikit-learn in which each component has a prior of its own.

Scikit-learn takes one prior for all components. Its updates are conjugate, one component at a time,
so that a prior for each is a matter of shapes. Fits start at the priors, which tell the components
apart, so nothing is random and one start does.

Source: Bishop, *Pattern Recognition and Machine Learning* (2006), sec. 10.2; Hoffman, Blei & Bach,
*Online Learning for Latent Dirichlet Allocation* (NeurIPS 2010).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import digamma, gammaln
from sklearn.decomposition import LatentDirichletAllocation
from sklearn.mixture import BayesianGaussianMixture

from pyro_fusion.errors import ParameterError, StructureError
from pyro_fusion.families import Factor
from pyro_fusion.posterior import Posterior

__all__ = ["ComponentPriorMixture", "ComponentPriorTopics", "estimator_under"]

Array = NDArray[Any]


def estimator_under(prior: Posterior, **options: Any) -> Any:
    """The estimator whose components have a prior each: of NormalWisharts ``[K]`` or NormalGammas
    ``[K, D]`` a mixture, of Dirichlets ``[K]`` topics.

    :param options: further parameters of the estimator.
    :raises StructureError: if the prior has other sites.
    """
    factors = list(prior.decomposed.values())
    f = factors[0]
    given: dict[str, Any] = {}
    if len(factors) == 1 and not f.transforms:
        kind = (f.family.name, len(f.base_shape))
        if kind == ("Dirichlet", 1):
            words = f.params["concentration"].double().cpu().numpy()
            given = {"n_components": len(words), "topic_word_prior": words}
            return ComponentPriorTopics(**(given | options))
        if kind in (("NormalWishart", 1), ("NormalGamma", 2)):
            given = _gaussians(f) | {
                "weight_concentration_prior_type": "dirichlet_distribution",
                "weight_concentration_prior": 1.0,
            }
            return ComponentPriorMixture(**(given | options))
    found = {site: f.family.name for site, f in prior.decomposed.items()}
    raise StructureError(
        "an estimator of scikit-learn has one site of components, NormalWisharts, NormalGammas or "
        f"Dirichlets as from_sklearn reads them; got {found}"
    )


def _gaussians(f: Factor) -> dict[str, Any]:
    """The priors of a mixture's components, as scikit-learn calls them."""
    p = {k: v.double().cpu() for k, v in f.params.items()}
    kappa = p["concentration"]
    if f.family.name == "NormalWishart":
        df, spread, kind = p["df"], torch.cholesky_inverse(p["scale_tril"]), "full"
    else:
        # Scikit-learn has one count for all dimensions: the least.
        shape, kappa, kind = p["gamma_shape"].amin(-1), kappa.amin(-1), "diag"
        df, spread = 2 * shape, 2 * p["rate"] * (shape.unsqueeze(-1) / p["gamma_shape"])
    return {
        "n_components": len(kappa),
        "covariance_type": kind,
        "mean_prior": p["loc"].numpy(),
        "mean_precision_prior": kappa.numpy(),
        "degrees_of_freedom_prior": df.numpy(),
        "covariance_prior": spread.numpy(),
    }


class ComponentPriorMixture(BayesianGaussianMixture):
    """A Bayesian Gaussian mixture in which each component has a prior of its own.

    The parameters are those of ``BayesianGaussianMixture``, with these differences, for ``K``
    components in ``D`` dimensions:

    :param covariance_type: "full" or "diag".
    :param mean_prior: ``[K, D]``.
    :param mean_precision_prior: ``[K]``.
    :param degrees_of_freedom_prior: ``[K]``.
    :param covariance_prior: of "full" ``[K, D, D]``, of "diag" ``[K, D]``: the inverse scale of the
        Wishart, or twice the rate of the Gamma, as scikit-learn has it.
    :raises StructureError: if a prior is missing, of another shape, or of another covariance type.
    :raises ParameterError: for values that are no prior.

    ``n_init`` and ``init_params`` have no effect: the fit starts at the priors.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **BayesianGaussianMixture._parameter_constraints,
        "mean_precision_prior": ["array-like"],
        "degrees_of_freedom_prior": ["array-like"],
        "covariance_prior": ["array-like"],
        "mean_prior": ["array-like"],
    }

    def _check_parameters(self, X: Array, **_: Any) -> None:
        self._check_weights_parameters()
        size, dim = self.n_components, X.shape[1]
        if self.covariance_type not in ("full", "diag"):
            raise StructureError(
                f"a prior for each component needs covariance_type 'full' or 'diag', got "
                f"'{self.covariance_type}'"
            )
        spread = (dim, dim) if self.covariance_type == "full" else (dim,)
        self.mean_prior_ = self._prior("mean_prior", X, (size, dim))
        self.mean_precision_prior_ = self._prior("mean_precision_prior", X, (size,))
        self.degrees_of_freedom_prior_ = self._prior("degrees_of_freedom_prior", X, (size,))
        self.covariance_prior_ = self._prior("covariance_prior", X, (size, *spread))
        least = dim - 1 if self.covariance_type == "full" else 0
        self._require("mean_precision_prior", self.mean_precision_prior_ > 0, "positive")
        df = self.degrees_of_freedom_prior_
        self._require("degrees_of_freedom_prior", df > least, f"above {least}")
        width = self.covariance_prior_
        if self.covariance_type == "full":
            width = np.linalg.eigvalsh(width)
        self._require("covariance_prior", width > 0, "positive definite")

    def _prior(self, name: str, X: Array, shape: tuple[int, ...]) -> Array:
        value = np.asarray(getattr(self, name), dtype=X.dtype)
        if value.shape != shape:
            raise StructureError(
                f"{name} of {self.n_components} components in {X.shape[1]} dimensions: expected "
                f"shape {shape}, got {value.shape}"
            )
        if not np.isfinite(value).all():
            raise ParameterError(f"{name} must be finite, got NaN or inf")
        return value

    def _require(self, name: str, good: Array, what: str) -> None:
        if not good.all():
            raise ParameterError(f"{name} must be {what}, got {getattr(self, name)}")

    def _initialize_parameters(self, X: Array, random_state: Any, **_: Any) -> None:
        # Posteriors of no points: the priors.
        self._initialize(X, np.zeros((len(X), self.n_components), dtype=X.dtype))

    def _estimate_means(self, nk: Array, xk: Array) -> None:
        prior = self.mean_precision_prior_
        self.mean_precision_ = prior + nk
        total = prior[:, None] * self.mean_prior_ + nk[:, None] * xk
        self.means_ = total / self.mean_precision_[:, None]

    def _estimate_wishart_full(self, nk: Array, xk: Array, sk: Array) -> None:
        self.degrees_of_freedom_ = self.degrees_of_freedom_prior_ + nk
        offset = xk - self.mean_prior_
        between = nk * self.mean_precision_prior_ / self.mean_precision_
        scatter = self.covariance_prior_ + nk[:, None, None] * sk
        scatter = scatter + between[:, None, None] * offset[:, :, None] * offset[:, None]
        self.covariances_ = scatter / self.degrees_of_freedom_[:, None, None]

    def _compute_lower_bound(self, log_resp: Array, log_prob_norm: float) -> float:
        # Up to constants of the priors. Scikit-learn reads the dimension off `mean_prior_`.
        prior, self.mean_prior_ = self.mean_prior_, self.mean_prior_[0]
        try:
            return float(super()._compute_lower_bound(log_resp, log_prob_norm))
        finally:
            self.mean_prior_ = prior


class ComponentPriorTopics(LatentDirichletAllocation):
    """Latent Dirichlet allocation in which each topic has a prior of its own.

    The parameters are those of ``LatentDirichletAllocation``, but for

    :param topic_word_prior: ``[K, V]``, positive.
    :raises StructureError: if it is of another shape.
    :raises ParameterError: if it is not positive and finite.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **LatentDirichletAllocation._parameter_constraints,
        "topic_word_prior": ["array-like"],
    }

    def _init_latent_vars(self, n_features: int, dtype: Any = np.float64) -> None:
        prior = np.asarray(self.topic_word_prior, dtype=dtype)
        if prior.shape != (self.n_components, n_features):
            raise StructureError(
                f"topic_word_prior of {self.n_components} topics and {n_features} words: expected "
                f"shape {(self.n_components, n_features)}, got {prior.shape}"
            )
        if not (np.isfinite(prior) & (prior > 0)).all():
            raise ParameterError("topic_word_prior must be positive and finite")
        super()._init_latent_vars(n_features, dtype)
        self.topic_word_prior_: Any = prior
        self.components_ = prior.copy()
        self.exp_dirichlet_component_ = np.exp(_expected_log(prior))

    def _approx_bound(self, X: Any, doc_topic_distr: Array, sub_sampling: bool) -> float:
        # Scikit-learn's is for one number: it is taken at 1, and the rest is put right.
        prior: Any = self.topic_word_prior_
        self.topic_word_prior_ = 1.0
        try:
            bound = float(super()._approx_bound(X, doc_topic_distr, sub_sampling))
        finally:
            self.topic_word_prior_ = prior
        more = ((prior - 1) * _expected_log(self.components_) - gammaln(prior)).sum()
        normalizers = gammaln(prior.sum(1)) - gammaln(prior.shape[1])
        return bound + float(more + normalizers.sum())


def _expected_log(concentration: Array) -> Array:
    """``E[log p]`` of Dirichlets, ``[K, V]``."""
    return np.asarray(digamma(concentration) - digamma(concentration.sum(1, keepdims=True)))
