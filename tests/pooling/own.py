# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Poolings as a user would write them."""

from dataclasses import replace

import torch

from pyro_fusion.pooling import AdditivePooling, Pooling

__all__ = ["BuresWasserstein", "Wasserstein"]


class Wasserstein(AdditivePooling):
    """Half the squared 2-Wasserstein distance of Normals with independent entries: Euclidean in
    their locations and scales, so the best atom is the mean of both."""

    name = "wasserstein"

    def coordinates(self, local):
        parts = [local.params[name].double() for name in ("loc", "scale")]
        return torch.cat([v.flatten(1) if v.dim() > 1 else v.unsqueeze(1) for v in parts], 1)

    def divergence(self, atoms, local):
        return (self.coordinates(atoms) - self.coordinates(local)).square().sum(-1) / 2

    def cost(self, atoms, local, prior=None):
        return torch.cdist(self.coordinates(atoms), self.coordinates(local)).square() / 2

    def from_coordinates(self, like, total, weight, prior=None):
        loc, scale = (total / weight).chunk(2, -1)
        shape = like.base_shape[like.batch_dim :]
        params = {"loc": loc.reshape(-1, *shape), "scale": scale.reshape(-1, *shape)}
        return replace(like, params=params)

    def potential(self, local, prior=None):
        return self.coordinates(local).square().sum(-1) / 2

    def group_potential(self, atoms, weight, prior=None):
        return weight * self.coordinates(atoms).square().sum(-1) / 2


def root(a):
    """The symmetric square root of positive semi-definite matrices."""
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


class BuresWasserstein(Pooling):
    """Half the squared 2-Wasserstein distance of multivariate Normals. The covariance of the best
    atom solves ``C = Σ w_n (C^½ C_n C^½)^½ / Σ w_n``, found by fixed point: no sum over the group
    tells it.

    Source: Álvarez-Esteban et al., *A fixed-point approach to barycenters in Wasserstein space*
    (J. Math. Anal. Appl. 2016).
    """

    name = "bures-wasserstein"

    def moments(self, f):
        tril = f.params["scale_tril"].double()
        return f.params["loc"].double(), tril @ tril.mT

    def divergence(self, atoms, local):
        (a, c), (b, d) = self.moments(atoms), self.moments(local)
        half = root(c)
        cross = root(half @ d @ half)
        trace = (c + d - 2 * cross).diagonal(dim1=-2, dim2=-1).sum(-1)
        each = ((a - b).square().sum(-1) + trace).clamp(min=0) / 2
        return each.flatten(1).sum(1) if each.dim() > 1 else each

    def barycenter(self, local, groups, num_atoms, weights=None, prior=None):
        w, weight = self.group_weights(groups, num_atoms, weights)
        share = w / weight[groups]

        def mean(x):
            scaled = x * share.reshape(-1, *[1] * (x.dim() - 1))
            return x.new_zeros(num_atoms, *x.shape[1:]).index_add(0, groups, scaled)

        loc, covariance = self.moments(local)
        c = mean(covariance)
        for _ in range(200):
            half = root(c)
            inverse = torch.linalg.inv(half)
            cross = mean(root(half[groups] @ covariance @ half[groups]))
            after = inverse @ cross @ cross @ inverse
            done = bool(((after - c).abs() <= 1e-13 * c.abs().amax((-2, -1), True)).all())
            c = (after + after.mT) / 2
            if done:
                break
        params = {"loc": mean(loc), "scale_tril": torch.linalg.cholesky(c)}
        return replace(local, params={k: v.to(local.dtype) for k, v in params.items()})
