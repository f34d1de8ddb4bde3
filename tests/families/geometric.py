# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A family of a user's own, as the pages say to write one: the geometric distribution."""

import pyro.distributions as dist
import torch
import torch.nn.functional as F

from pyro_fusion.families import Family

__all__ = ["GeometricFamily"]


class GeometricFamily(Family):
    """T(x) = x, η = log(1 - p), A(η) = -log p, E[x] = (1 - p) / p."""

    distribution = dist.Geometric
    event_dim = 0
    parameters = {"logits": 0}

    def event_shape(self, params):
        return torch.Size()

    def statistics(self, value):
        return value.unsqueeze(-1)

    def natural(self, params):
        return F.logsigmoid(-params["logits"]).unsqueeze(-1)

    def mean(self, params):
        return torch.exp(-params["logits"]).unsqueeze(-1)

    def log_normalizer(self, params):
        return -F.logsigmoid(params["logits"])

    def from_natural(self, eta, event_shape):
        return {"logits": torch.log(-torch.expm1(eta[..., 0])) - eta[..., 0]}

    def from_mean(self, mu, event_shape):
        return {"logits": -mu[..., 0].log()}
