# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Every exponential family, bare and through every wrapper, as makers of batches.

``make(seeds, dtype)`` gives a distribution whose batch shape is that of ``seeds``; an element
depends on its own seed only, so any batch of pairs can be built without the code under test.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import ExpandedDistribution
from scipy.special import multigammaln
from torch import Tensor
from torch.distributions import Distribution, biject_to, kl_divergence
from torch.distributions import transforms as tt

from pyro_fusion.families import NormalGamma, NormalWishart

Make = Callable[..., Distribution]


@functools.cache
def _row(seed: int, event: tuple[int, ...], stream: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + stream)
    return torch.randn(event, generator=generator, dtype=torch.float64)


def draws(seeds: Tensor, *event: int, stream: int = 0) -> Tensor:
    """Standard normal numbers, ``[*seeds.shape, *event]``, each block from its own seed."""
    rows = [_row(seed, event, stream) for seed in seeds.flatten().tolist()]
    return torch.stack(rows).reshape(tuple(seeds.shape) + event)


def positive(seeds: Tensor, *event: int, stream: int = 0) -> Tensor:
    return (0.5 * draws(seeds, *event, stream=stream)).exp()


def tril(seeds: Tensor, dim: int, stream: int = 0) -> Tensor:
    x = 0.4 * draws(seeds, dim, dim, stream=stream)
    return x.tril(-1) + x.diagonal(dim1=-2, dim2=-1).exp().diag_embed()


def normal(seeds, dtype=torch.float64, event=()):
    loc, scale = draws(seeds, *event), positive(seeds, *event, stream=1)
    return dist.Normal(loc.to(dtype), scale.to(dtype))


def mvn(seeds, dtype=torch.float64):
    loc, scale_tril = draws(seeds, 3), tril(seeds, 3, stream=1)
    return dist.MultivariateNormal(loc.to(dtype), scale_tril=scale_tril.to(dtype))


def low_rank(seeds, dtype=torch.float64):
    loc, factor = draws(seeds, 3).to(dtype), draws(seeds, 3, 2, stream=1).to(dtype)
    return dist.LowRankMultivariateNormal(loc, factor, positive(seeds, 3, stream=2).to(dtype))


def log_normal(seeds, dtype=torch.float64):
    return dist.LogNormal(draws(seeds).to(dtype), positive(seeds, stream=1).to(dtype))


def gamma(seeds, dtype=torch.float64):
    return dist.Gamma(3 * positive(seeds).to(dtype), positive(seeds, stream=1).to(dtype))


def inverse_gamma(seeds, dtype=torch.float64):
    return dist.InverseGamma(3 * positive(seeds).to(dtype), positive(seeds, stream=1).to(dtype))


def torch_inverse_gamma(seeds, dtype=torch.float64):
    c, r = 3 * positive(seeds).to(dtype), positive(seeds, stream=1).to(dtype)
    return torch.distributions.InverseGamma(c, r)


def beta(seeds, dtype=torch.float64):
    return dist.Beta(2 * positive(seeds).to(dtype), 2 * positive(seeds, stream=1).to(dtype))


def dirichlet(seeds, dtype=torch.float64):
    return dist.Dirichlet(2 * positive(seeds, 4).to(dtype))


def wishart(seeds, dtype=torch.float64):
    df = 2 + 3 * positive(seeds).to(dtype)
    # A bare tensor df, and no validation: torch warns of df < D.
    return dist.Wishart(df + 1, scale_tril=tril(seeds, 3, stream=1).to(dtype))


def normal_wishart(seeds, dtype=torch.float64):
    loc, k = draws(seeds, 2).to(dtype), positive(seeds, stream=1).to(dtype)
    df = 2 + 3 * positive(seeds, stream=2).to(dtype)
    return NormalWishart(loc, k, df, scale_tril=tril(seeds, 2, stream=3).to(dtype))


def normal_gamma(seeds, dtype=torch.float64):
    rest = [positive(seeds, stream=i).to(dtype) for i in range(1, 4)]
    return NormalGamma(draws(seeds).to(dtype), rest[0], 2 * rest[1], rest[2])


def categorical(seeds, dtype=torch.float64):
    return dist.Categorical(logits=draws(seeds, 4).to(dtype))


def bernoulli(seeds, dtype=torch.float64):
    return dist.Bernoulli(logits=draws(seeds).to(dtype))


def poisson(seeds, dtype=torch.float64):
    return dist.Poisson(4 * positive(seeds).to(dtype))


def exponential(seeds, dtype=torch.float64):
    return dist.Exponential(positive(seeds).to(dtype))


def wishart_kl(p, q) -> Tensor:
    """The textbook's formula (Penny, *KL divergences of Normal, Gamma, Dirichlet and Wishart
    densities*, 2001), good at moderate df."""
    dim = p.scale_tril.shape[-1]

    def log_partition(d):
        log_det = torch.linalg.slogdet(d.scale_tril @ d.scale_tril.mT).logabsdet
        multigamma = torch.as_tensor(multigammaln(d.df.numpy() / 2, dim))
        return d.df * dim / 2 * torch.tensor(2.0).double().log() + d.df / 2 * log_det + multigamma

    i = torch.arange(dim)
    p_scale = p.scale_tril @ p.scale_tril.mT
    expected = torch.digamma((p.df.unsqueeze(-1) - i) / 2).sum(-1)
    expected = expected + dim * torch.tensor(2.0).double().log() + torch.logdet(p_scale)
    ratio = torch.linalg.solve(q.scale_tril @ q.scale_tril.mT, p_scale)
    trace = ratio.diagonal(dim1=-2, dim2=-1).sum(-1)
    result = (p.df - q.df) / 2 * expected - p.df * dim / 2 + p.df * trace / 2
    return result + log_partition(q) - log_partition(p)


def normal_wishart_kl(p, q) -> Tensor:
    """The chain rule: Wishart KL plus the expected Gaussian KL."""
    dim = p.loc.shape[-1]
    shift = p.loc - q.loc
    precision = p.df[..., None, None] * (p.scale_tril @ p.scale_tril.mT)
    distance = torch.einsum("...i,...ij,...j->...", shift, precision, shift)
    ratio = q.concentration / p.concentration
    return wishart_kl(p, q) + (dim * (ratio - 1 - ratio.log()) + q.concentration * distance) / 2


def normal_gamma_kl(p, q) -> Tensor:
    gammas = [dist.Gamma(d.gamma_shape, d.rate) for d in (p, q)]
    ratio = q.concentration / p.concentration
    distance = q.concentration * p.gamma_shape / p.rate * (p.loc - q.loc) ** 2
    return kl_divergence(*gammas) + (ratio - 1 - ratio.log() + distance) / 2


@dataclass(frozen=True)
class Member:
    """A distribution to put to the test and the independent divergence of two of its like."""

    name: str
    make: Make
    kl: Callable[[Tensor, Tensor], Tensor]

    def __str__(self) -> str:
        return self.name


def _kl_of(make: Make, kl=kl_divergence, sum_axes: int = 0):
    def between(a: Tensor, b: Tensor) -> Tensor:
        result = kl(make(a), make(b))
        return result.flatten(-sum_axes).sum(-1) if sum_axes else result

    return between


# name -> (maker, independent KL, maker of what that KL is of)
BARE: dict[str, tuple[Make, Callable, Make]] = {
    "Normal": (normal, kl_divergence, normal),
    "MultivariateNormal": (mvn, kl_divergence, mvn),
    "LowRankMultivariateNormal": (low_rank, kl_divergence, low_rank),
    "LogNormal": (log_normal, kl_divergence, normal),
    "Gamma": (gamma, kl_divergence, gamma),
    "InverseGamma": (inverse_gamma, kl_divergence, gamma),
    "torch.InverseGamma": (torch_inverse_gamma, kl_divergence, gamma),
    "Beta": (beta, kl_divergence, beta),
    "Dirichlet": (dirichlet, kl_divergence, dirichlet),
    "Wishart": (wishart, wishart_kl, wishart),
    "NormalWishart": (normal_wishart, normal_wishart_kl, normal_wishart),
    "NormalGamma": (normal_gamma, normal_gamma_kl, normal_gamma),
    "Categorical": (categorical, kl_divergence, categorical),
    "Bernoulli": (bernoulli, kl_divergence, bernoulli),
    "Poisson": (poisson, kl_divergence, poisson),
    "Exponential": (exponential, kl_divergence, exponential),
}

# The supports that autoguides meet, with the unconstrained shape of one draw.
SUPPORTS = {
    "positive": (constraints.positive, ()),
    "unit_interval": (constraints.unit_interval, ()),
    "greater_than": (constraints.greater_than(2.0), ()),
    "greater_than_eq": (constraints.greater_than_eq(torch.tensor(-1.5)), ()),
    "less_than": (constraints.less_than(-1.0), ()),
    "interval": (constraints.interval(-1.0, 3.0), ()),
    "softplus_positive": (constraints.softplus_positive, ()),
    "simplex": (constraints.simplex, (3,)),
    "ordered_vector": (constraints.ordered_vector, (3,)),
    "positive_ordered_vector": (constraints.positive_ordered_vector, (3,)),
    "corr_cholesky": (constraints.corr_cholesky, (3,)),
    "real_vector": (constraints.real_vector, (3,)),
    "independent_positive": (constraints.independent(constraints.positive, 1), (3,)),
}


def _pair(seeds: Tensor) -> Tensor:
    return seeds.unsqueeze(-1) * 2 + 100 + torch.arange(2)


def _members() -> list[Member]:
    result = []
    for name, (make, kl, of) in BARE.items():

        def independent(seeds, dtype=torch.float64, make=make):
            return dist.Independent(make(_pair(seeds), dtype), 1)

        def expanded(seeds, dtype=torch.float64, make=make):
            wide = make(seeds.unsqueeze(-1), dtype).expand(tuple(seeds.shape) + (3,))
            return dist.Independent(wide, 1)

        def pyro_expanded(seeds, dtype=torch.float64, make=make):
            inner = make(seeds.unsqueeze(-1), dtype)
            return dist.Independent(ExpandedDistribution(inner, tuple(seeds.shape) + (3,)), 1)

        def masked(seeds, dtype=torch.float64, make=make):
            inner = make(seeds, dtype)
            return dist.MaskedDistribution(inner, torch.ones(seeds.shape, dtype=torch.bool))

        base = _kl_of(of, kl)
        result += [
            Member(name, make, base),
            Member(
                f"Independent-{name}",
                independent,
                lambda a, b, k=base: k(_pair(a), _pair(b)).sum(-1),
            ),
            Member(f"expand-{name}", expanded, lambda a, b, k=base: 3 * k(a, b)),
            Member(f"Expanded-{name}", pyro_expanded, lambda a, b, k=base: 3 * k(a, b)),
            Member(f"Masked-{name}", masked, base),
        ]
    for name, (support, event) in SUPPORTS.items():

        def transformed(seeds, dtype=torch.float64, support=support, event=event):
            base = normal(seeds, dtype, event).to_event(len(event))
            return dist.TransformedDistribution(base, biject_to(support))

        def of_normal(seeds, event=event):
            return normal(seeds, event=event)

        result.append(
            Member(f"biject_to-{name}", transformed, _kl_of(of_normal, sum_axes=len(event)))
        )

    def affine(seeds, dtype=torch.float64):
        # Of a Normal it differs from component to component: a Normal again.
        move = tt.AffineTransform(draws(seeds, stream=7).to(dtype), -positive(seeds).to(dtype))
        return dist.TransformedDistribution(normal(seeds, dtype), [move])

    def affine_truth(seeds):
        d, shift = normal(seeds), draws(seeds, stream=7)
        scale = positive(seeds)
        return dist.Normal(shift - d.loc * scale, d.scale * scale)

    def affine_gamma(seeds, dtype=torch.float64):
        return dist.TransformedDistribution(gamma(seeds, dtype), [tt.AffineTransform(1.0, -2.0)])

    def power_beta(seeds, dtype=torch.float64):
        move = [tt.PowerTransform(torch.tensor(2.0)), tt.AffineTransform(0.0, 3.0)]
        return dist.TransformedDistribution(beta(seeds, dtype), move)

    def simplex_mvn(seeds, dtype=torch.float64):
        return dist.TransformedDistribution(mvn(seeds, dtype), biject_to(constraints.simplex))

    def exp_mvn(seeds, dtype=torch.float64):
        return dist.TransformedDistribution(mvn(seeds, dtype), biject_to(constraints.positive))

    def reshaped(seeds, dtype=torch.float64):
        base = normal(seeds, dtype, (2, 3)).to_event(2)
        return dist.TransformedDistribution(base, [tt.ReshapeTransform((2, 3), (6,))])

    def nested(seeds, dtype=torch.float64):
        # A masked, expanded, independent, transformed factor narrower than its plate.
        base = normal(seeds.unsqueeze(-1).unsqueeze(-1), dtype, ())
        wide = ExpandedDistribution(dist.Independent(base, 1), tuple(seeds.shape) + (3,))
        logs = dist.TransformedDistribution(
            dist.Independent(wide, 1), biject_to(constraints.positive)
        )
        return dist.MaskedDistribution(logs, torch.tensor(True))

    def logarithm(seeds, dtype=torch.float64):
        return dist.TransformedDistribution(gamma(seeds, dtype), [tt.ExpTransform().inv])

    return [
        *result,
        Member("affine-Normal", affine, _kl_of(affine_truth)),
        Member("affine-Gamma", affine_gamma, _kl_of(gamma)),
        Member("power-affine-Beta", power_beta, _kl_of(beta)),
        Member("simplex-MultivariateNormal", simplex_mvn, _kl_of(mvn)),
        Member("exp-MultivariateNormal", exp_mvn, _kl_of(mvn)),
        Member("reshape-Normal", reshaped, _kl_of(lambda s: normal(s, event=(2, 3)), sum_axes=2)),
        Member("nested-Normal", nested, lambda a, b: 3 * _kl_of(normal)(a, b)),
        Member("log-Gamma", logarithm, _kl_of(gamma)),
    ]


MEMBERS = _members()
