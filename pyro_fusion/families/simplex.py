# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The families Dirichlet and Beta, Categorical and Bernoulli."""

import math

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_fusion.families.family import Family, Params, register_family
from pyro_fusion.families.special import (
    dirichlet_concentration,
    excess,
    in_blocks,
    log_minus_digamma,
    log_share,
    stirling_kl,
    stirling_rest,
)


@in_blocks
def _expected_log(alpha: Tensor) -> Tensor:
    """``E[log x_k] = ψ(α_k) - ψ(Σα)`` of a Dirichlet."""
    total = alpha.sum(-1, keepdim=True)
    return log_share(alpha, total) - log_minus_digamma(alpha) + log_minus_digamma(total)


@in_blocks
def _log_beta(alpha: Tensor) -> Tensor:
    """``Σ log Γ(α_k) - log Γ(Σα)``, with the terms in ``α log α`` cancelled analytically."""
    total = alpha.sum(-1, keepdim=True)
    parts = alpha * log_share(alpha, total) - alpha.log() / 2 + stirling_rest(alpha)
    whole = -total.log() / 2 + stirling_rest(total)
    constant = (alpha.shape[-1] - 1) * 0.5 * math.log(2 * math.pi)
    return parts.sum(-1) - whole.squeeze(-1) + constant


@in_blocks
def _kl(alpha: Tensor, beta: Tensor) -> Tensor:
    """``KL(Dirichlet(α) ‖ Dirichlet(β))``: a part for the means, ``Σβ`` times a Categorical KL,
    and one for the concentrations. The terms in ``log Γ``, which cancel, never appear."""
    alpha_sum, beta_sum = alpha.sum(-1), beta.sum(-1)
    weights = beta / beta_sum.unsqueeze(-1)
    means = (weights * excess(alpha / alpha_sum.unsqueeze(-1), weights)).sum(-1)
    spread = stirling_kl(alpha, beta).sum(-1) - stirling_kl(alpha_sum, beta_sum)
    return beta_sum * means + spread


@register_family(torch.distributions.Dirichlet)
class DirichletFamily(Family):
    """Dirichlet: ``T(x) = log x``, ``η = concentration - 1``."""

    distribution = dist.Dirichlet
    event_dim = 1
    parameters = {"concentration": 1}

    def event_shape(self, params: Params) -> torch.Size:
        return params["concentration"].shape[-1:]

    def statistics(self, value: Tensor) -> Tensor:
        return value.log()

    def natural(self, params: Params) -> Tensor:
        return params["concentration"] - 1

    def mean(self, params: Params) -> Tensor:
        return _expected_log(params["concentration"])

    def log_normalizer(self, params: Params) -> Tensor:
        return _log_beta(params["concentration"])

    def from_natural(self, eta: Tensor, event_shape: torch.Size) -> Params:
        return {"concentration": eta + 1}

    def from_mean(self, mu: Tensor, event_shape: torch.Size) -> Params:
        return {"concentration": dirichlet_concentration(mu)}

    def kl(self, p: Params, q: Params) -> Tensor:
        return _kl(p["concentration"], q["concentration"])

    def index_event(self, params: Params, axis: int, index: Tensor) -> Params:
        # The composition of a subset of parts is again Dirichlet (aggregation property).
        return {"concentration": params["concentration"].index_select(-1, index)}

    def pad_event(
        self, params: Params, axis: int, index: Tensor, size: int, fill: Tensor | None
    ) -> Params:
        alpha = params["concentration"]
        if fill is None:
            # One count, as in a uniform prior, but no more than the party's least concentration.
            fill = alpha.amin(-1, keepdim=True).clamp(max=1)
        result = fill.to(alpha).expand((*alpha.shape[:-1], size)).clone()
        result[..., index] = alpha
        return {"concentration": result}


@register_family(torch.distributions.Beta)
class BetaFamily(Family):
    """Beta: ``T(x) = (log x, log(1-x))``, ``η = (concentration1 - 1, concentration0 - 1)``."""

    distribution = dist.Beta
    event_dim = 0
    parameters = {"concentration1": 0, "concentration0": 0}

    def event_shape(self, params: Params) -> torch.Size:
        return torch.Size()

    @staticmethod
    def _alpha(params: Params) -> Tensor:
        return torch.stack([params["concentration1"], params["concentration0"]], -1)

    def statistics(self, value: Tensor) -> Tensor:
        return torch.stack([value.log(), torch.log1p(-value)], -1)

    def natural(self, params: Params) -> Tensor:
        return self._alpha(params) - 1

    def mean(self, params: Params) -> Tensor:
        return _expected_log(self._alpha(params))

    def log_normalizer(self, params: Params) -> Tensor:
        return _log_beta(self._alpha(params))

    def from_natural(self, eta: Tensor, event_shape: torch.Size) -> Params:
        return {"concentration1": eta[..., 0] + 1, "concentration0": eta[..., 1] + 1}

    def from_mean(self, mu: Tensor, event_shape: torch.Size) -> Params:
        c1, c0 = dirichlet_concentration(mu).unbind(-1)
        return {"concentration1": c1, "concentration0": c0}

    def kl(self, p: Params, q: Params) -> Tensor:
        return _kl(self._alpha(p), self._alpha(q))


@register_family(torch.distributions.Categorical)
class CategoricalFamily(Family):
    """Categorical: ``T(x) = onehot(x)``, ``η = logits`` (not minimal: a common shift changes
    nothing)."""

    distribution = dist.Categorical
    event_dim = 0
    parameters = {"logits": 1}

    def event_shape(self, params: Params) -> torch.Size:
        return torch.Size()

    def statistics(self, value: Tensor) -> Tensor:
        raise NotImplementedError("the number of categories cannot be read from a draw")

    def natural(self, params: Params) -> Tensor:
        return params["logits"]

    def mean(self, params: Params) -> Tensor:
        return torch.softmax(params["logits"], -1)

    def log_normalizer(self, params: Params) -> Tensor:
        return torch.logsumexp(params["logits"], -1)

    def from_natural(self, eta: Tensor, event_shape: torch.Size) -> Params:
        return {"logits": eta}

    def from_mean(self, mu: Tensor, event_shape: torch.Size) -> Params:
        return {"logits": mu.log()}


@register_family(torch.distributions.Bernoulli)
class BernoulliFamily(Family):
    """Bernoulli: ``T(x) = x``, ``η = logits``."""

    distribution = dist.Bernoulli
    event_dim = 0
    parameters = {"logits": 0}

    def event_shape(self, params: Params) -> torch.Size:
        return torch.Size()

    def statistics(self, value: Tensor) -> Tensor:
        return value.unsqueeze(-1)

    def natural(self, params: Params) -> Tensor:
        return params["logits"].unsqueeze(-1)

    def mean(self, params: Params) -> Tensor:
        return torch.sigmoid(params["logits"]).unsqueeze(-1)

    def log_normalizer(self, params: Params) -> Tensor:
        return F.softplus(params["logits"])

    def from_natural(self, eta: Tensor, event_shape: torch.Size) -> Params:
        return {"logits": eta[..., 0]}

    def from_mean(self, mu: Tensor, event_shape: torch.Size) -> Params:
        return {"logits": torch.logit(mu[..., 0])}

    def center(self, params: Params) -> Tensor:
        # torch's mode is NaN where both values are equally likely.
        return (params["logits"] >= 0).to(params["logits"])
