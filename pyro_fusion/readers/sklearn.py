# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Reading scikit-learn's variational Bayes, and its priors.

Exact means: given the responsibilities that the fit ended with.

================================================  ==================================================
estimator                                         read as
================================================  ==================================================
LatentDirichletAllocation                         "topics": Dirichlets ``[K, V]``, exactly
BayesianGaussianMixture, of any covariance        "weights": a Dirichlet ``[K]``, exactly but for a
                                                  Dirichlet process
``covariance_type="full"``                        "gaussian": NormalWisharts ``[K]``, exactly
``"diag"``                                        "gaussian": NormalGammas ``[K, D]``, exactly
``"tied"``                                        "precision": one Wishart, shared, exactly;
                                                  "loc": MultivariateNormals ``[K, D]``
``"spherical"``                                   "precision": Gammas ``[K]``, exactly;
                                                  "loc": Normals ``[K, D]``
================================================  ==================================================

Where one precision is that of several means, or of several dimensions, "loc" is at its expectation:
mean field between the two.

There scikit-learn divides the counts that make the precision, by the components that share it or by
the dimensions, as if the prior were so many times surer. Here each number counts once against the
prior as it was given, which thus is the same for parties of different numbers of components.

A Dirichlet process' sticks, ``Beta(a_k, b_k)``, the last of which takes all that is left, become
the Dirichlet with the same ``E[log weights]``. Sticks have an order and components have none, so of
the prior it is the mean over all orders.

Source: Bishop, *Pattern Recognition and Machine Learning* (2006), sec. 10.2; Blei & Jordan,
*Variational Inference for Dirichlet Process Mixtures* (2006); Hoffman, Blei & Bach, *Online
Learning for Latent Dirichlet Allocation* (NeurIPS 2010).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_fusion.errors import FusionError, ParameterError, StructureError
from pyro_fusion.families import NormalGamma, NormalWishart
from pyro_fusion.families.special import dirichlet_concentration
from pyro_fusion.families.wishart import Wishart
from pyro_fusion.posterior import Posterior

__all__ = ["from_sklearn", "prior_from_sklearn"]

_SUPPORTED = "BayesianGaussianMixture and LatentDirichletAllocation"


def from_sklearn(model: Any, *, label: str | None = None) -> Posterior:
    """Read the variational posterior of a fitted scikit-learn estimator. Values are copied.

    :param model: a ``BayesianGaussianMixture`` (sites "weights" ``[K]``, and "gaussian" if
        the covariances are "full" or "diag", else "loc" and "precision") or a
        ``LatentDirichletAllocation`` (site "topics", ``[K, V]``).
    :param label: of the components; by default "component", and "topic" for a
        ``LatentDirichletAllocation``.
    :raises StructureError: for another estimator, one that is not fitted, or a bad label.
    :raises ParameterError: for NaN, infinite or out-of-range parameters.
    :raises ImportError: without scikit-learn.

    For ``product`` all parties need one prior. By default a mixture's is made from its data, so
    give ``mean_prior`` and ``covariance_prior``, and the concentrations where numbers of components
    differ; then pass :func:`prior_from_sklearn` as ``prior``. A Dirichlet process may end with less
    weight on a component than the prior, and then there may be no proper product.
    """
    return _read(model, label, _topics, _mixture)


def prior_from_sklearn(model: Any, *, label: str | None = None) -> Posterior:
    """Read the prior that a fitted estimator used: with the sites, families and shapes of its
    posterior, all components alike. Arguments and errors are those of :func:`from_sklearn`."""
    return _read(model, label, _topics_prior, _mixture_prior)


_Reader = Callable[[Any], dict[str, dist.TorchDistribution]]


def _read(model: Any, label: str | None, topics: _Reader, mixture: _Reader) -> Posterior:
    try:
        from sklearn.decomposition import LatentDirichletAllocation
        from sklearn.exceptions import NotFittedError
        from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
        from sklearn.utils.validation import check_is_fitted
    except ImportError as e:
        raise ImportError(
            "to read its estimators needs scikit-learn: pip install 'pyro-fusion[sklearn]'"
        ) from e
    name = type(model).__name__
    if isinstance(model, GaussianMixture):
        raise StructureError(
            f"a {name} is a point estimate, which has no posterior; use BayesianGaussianMixture"
        )
    if not isinstance(model, LatentDirichletAllocation | BayesianGaussianMixture):
        raise StructureError(f"cannot read a {name}; supported are {_SUPPORTED}")
    is_topics = isinstance(model, LatentDirichletAllocation)
    try:
        check_is_fitted(model)
        factors = (topics if is_topics else mixture)(model)
    except NotFittedError as e:
        raise StructureError(f"the {name} is not fitted: call fit(X) first") from e
    except FusionError:
        raise
    except (ValueError, RuntimeError) as e:
        raise ParameterError(f"{name}: {' '.join(str(e).split())[:300]}") from e
    label = ("topic" if is_topics else "component") if label is None else label
    # A Wishart of its own is the precision of all components.
    labelled = [site for site, d in factors.items() if not isinstance(d, Wishart)]
    return Posterior(factors, {site: (label,) for site in labelled})


def _tensor(model: Any, *names: str) -> list[Tensor]:
    """Attributes as tensors of the dtype of the first, copied.

    :raises ParameterError: if one is not finite.
    """
    result: list[Tensor] = []
    for name in names:
        value = torch.tensor(np.asarray(getattr(model, name)))
        if not bool(value.isfinite().all()):
            raise ParameterError(f"{type(model).__name__}.{name} must be finite, got NaN or inf")
        result.append(value.to(result[0].dtype) if result else value)
    return result


# -- topics ----------------------------------------------------------------------------------------


def _topics(model: Any) -> dict[str, dist.TorchDistribution]:
    (concentration,) = _tensor(model, "components_")
    return {"topics": dist.Dirichlet(concentration)}


def _topics_prior(model: Any) -> dict[str, dist.TorchDistribution]:
    like, prior = _tensor(model, "components_", "topic_word_prior_")
    return {"topics": dist.Dirichlet(prior.expand_as(like))}


# -- mixtures --------------------------------------------------------------------------------------


def _mixture(model: Any) -> dict[str, dist.TorchDistribution]:
    loc, kappa, df, cov = _tensor(
        model, "means_", "mean_precision_", "degrees_of_freedom_", "covariances_"
    )
    size = len(loc)
    # Of one covariance, of one component: what scikit-learn calls W⁻¹.
    scatter = df.reshape(df.shape + (1,) * (cov.dim() - df.dim())) * cov
    if model.covariance_type in ("tied", "spherical"):
        _, prior_df, prior = _tensor(
            model, "means_", "degrees_of_freedom_prior_", "covariance_prior_"
        )
        divisor = size if model.covariance_type == "tied" else loc.shape[-1]
        df, scatter = prior_df + divisor * (df - prior_df), prior + divisor * (scatter - prior)
    weights = {"weights": dist.Dirichlet(_weights(model, size))}
    return weights | _gaussians(model, loc, kappa, df, scatter)


def _mixture_prior(model: Any) -> dict[str, dist.TorchDistribution]:
    like, loc, kappa, df, scatter = _tensor(
        model,
        "means_",
        "mean_prior_",
        "mean_precision_prior_",
        "degrees_of_freedom_prior_",
        "covariance_prior_",
    )
    size = len(like)
    if model.covariance_type != "tied":
        each = scatter.dim() - df.dim()  # axes of one component's
        df, scatter = df.expand(size), scatter.expand(size, *scatter.shape[scatter.dim() - each :])
    weights = {"weights": dist.Dirichlet(_prior_weights(model, size))}
    return weights | _gaussians(model, loc.expand_as(like), kappa.expand(size), df, scatter)


def _gaussians(
    model: Any, loc: Tensor, kappa: Tensor, df: Tensor, scatter: Tensor
) -> dict[str, dist.TorchDistribution]:
    """The conjugate factors of means ``loc``, counts ``kappa`` and ``df``, and ``scatter``, the
    inverse scale of the Wisharts."""
    if model.covariance_type == "full":
        return {"gaussian": NormalWishart(loc, kappa, df, precision_matrix=scatter)}
    if model.covariance_type == "tied":
        covariance = scatter / df / kappa[:, None, None]
        return {
            "loc": dist.MultivariateNormal(loc, covariance),
            "precision": Wishart(df, precision_matrix=scatter),
        }
    if model.covariance_type == "spherical":
        scale = (scatter / df / kappa).sqrt().unsqueeze(-1)
        return {
            "loc": dist.Normal(loc, scale).to_event(1),
            "precision": dist.Gamma(df / 2, scatter / 2),
        }
    kappa, shape = kappa.unsqueeze(-1), df.unsqueeze(-1) / 2
    return {"gaussian": NormalGamma(loc, kappa, shape, scatter / 2).to_event(1)}


def _is_process(model: Any) -> bool:
    return bool(model.weight_concentration_prior_type == "dirichlet_process")


def _weights(model: Any, size: int) -> Tensor:
    (concentration,) = _tensor(model, "weight_concentration_")
    if not _is_process(model):
        return concentration
    take, leave = concentration
    # One weight is 1, whatever its concentration: the count of its points, as of any other.
    return take if size == 1 else dirichlet_concentration(_expected_log(take, leave))


def _prior_weights(model: Any, size: int) -> Tensor:
    like, prior = _tensor(model, "means_", "weight_concentration_prior_")
    if not _is_process(model):
        return prior.expand(size)
    one = torch.ones(size, dtype=like.dtype)
    if size == 1:
        return one
    return dirichlet_concentration(_expected_log(one, prior * one).mean() * one)


def _expected_log(take: Tensor, leave: Tensor) -> Tensor:
    """``E[log π_k]`` of ``π_k = v_k Π_{j<k} (1 - v_j)``, ``v_k ~ Beta(take_k, leave_k)``, the last
    ``v`` being 1."""
    total = torch.digamma(take + leave)
    taken, left = torch.digamma(take) - total, torch.digamma(leave) - total
    zero = taken.new_zeros(1)
    return torch.cat([taken[:-1], zero]) + torch.cat([zero, left[:-1].cumsum(0)])
