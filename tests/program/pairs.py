# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Models and guides of a fusion, and F by its definition, one divergence at a time."""

from collections import Counter

import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import biject_to, constraints, kl_divergence

from pyro_fusion import FusionGuide, FusionModel, Posterior
from pyro_fusion.families import Factor
from pyro_fusion.pooling import Product
from tests.families import members

POOLINGS = ["exclusive", "inclusive", "product"]


NOISELESS = ["exclusive", "inclusive"]


SIZES = (3, 2, 3)


def simplex(seeds):
    return dist.TransformedDistribution(members.mvn(seeds), biject_to(constraints.simplex))


def stacked(seeds):
    return dist.Independent(members.normal(members._pair(seeds)), 1)


# name -> the factors of components from their seeds
FAMILIES = {
    "Normal": stacked,
    "MultivariateNormal": members.mvn,
    "NormalWishart": members.normal_wishart,
    "Gamma": members.gamma,
    "Dirichlet": members.dirichlet,
    "LogNormal": members.log_normal,
    "simplex": simplex,
}


def near(make, truth, seeds):
    """Components that are near those of seeds ``truth``: two thirds of their natural parameters."""
    f, g = Factor.of(make(truth)), Factor.of(make(seeds))
    return f.from_natural((2 * f.natural + g.natural) / 3).distribution()


def wide(make, size):
    """A prior wider than every component, the more so the smaller ``size``."""
    natural = Factor.of(make(torch.arange(30))).natural.mean(0, True)
    return Factor.of(make(torch.arange(1))).from_natural(size * natural)


def posteriors(family="Normal", shared=2, dtype=torch.float64, sizes=SIZES):
    result = []
    for s, n in enumerate(sizes):
        truth = torch.arange(n) + 10
        factors = {"x.y": near(FAMILIES[family], truth, torch.arange(n) + 20 * (s + 2))}
        for i in range(shared):
            factors[f"shared{i}"] = members.gamma(torch.tensor(400 + 10 * s + i))
        cast = {k: Factor.of(d).to(dtype=dtype) for k, d in factors.items()}
        result.append(Posterior(cast, {"x.y": "component"}))
    return result


def base(family="Normal", shared=2, size=0.05):
    gamma = dist.Gamma(torch.tensor(0.1).double(), torch.tensor(0.05).double())
    prior = wide(FAMILIES[family], size).distribution()
    return {"x.y": prior, **{f"shared{i}": gamma for i in range(shared)}}


def pair(
    pooling,
    family="Normal",
    assignment_prior=None,
    shared=2,
    assignment=None,
    relaxed=False,
    **settings,
):
    given = settings.pop("parties", None) or posteriors(family, shared)
    settings.setdefault("prior", base(family, shared))
    model = FusionModel(given, pooling, assignment_prior, assignment=assignment, **settings)
    guide = FusionGuide(model, relaxed=relaxed)
    return model, guide


def one(f, n):
    return f.index_select(0, torch.tensor([n]))


def site_by_hand(model, site, problem, atoms, assignment, dispersion=None):
    """The part of F of one site; ``dispersion`` tempers the messages of ``product`` if given."""
    total, prior, weights = 0.0, problem.prior.get(site), model.problem.parties.weights
    for n, (k, s) in enumerate(zip(assignment, problem.party.tolist(), strict=True)):
        atom, local = one(atoms, k), one(problem.local[site], n)
        scale = float(weights[s]) / (dispersion or 1.0)
        if prior is None:
            ends = (local, atom) if model.problem.pooling.name == "inclusive" else (atom, local)
            total += scale * kl(*ends)
            continue
        if dispersion is not None:
            local, scale = Product().temper(local, prior, weights[s : s + 1], dispersion), 1.0
        total += scale * (kl(atom, local) - kl(atom, prior))
    if prior is not None:
        total += sum(kl(one(atoms, k), prior) for k in set(assignment))
    return total


def by_hand(model, guide):
    """F from its definition, one divergence at a time."""
    total, parties = 0.0, model.problem.parties
    for label, part in model.problem.parts.items():
        assignment = guide.assignment[label].tolist()
        for site in parties.roles.matched[label]:
            rest = (guide.factor(site), assignment, part.dispersion)
            total += site_by_hand(model, site, part.messages, *rest)
        number, popularity = len(parties.posteriors), Counter(assignment)
        prior = part.assignment_prior.update(len(popularity), number)
        phi = prior.penalty(number).tolist()
        total += sum(phi[m] for m in popularity.values()) + prior.constant(number)
    for site, problem in model.problem.shared.items():
        everyone = [0] * len(parties.posteriors)
        total += site_by_hand(model, site, problem, guide.factor(site), everyone)
    return total


def kl(p, q):
    """By torch, of what is behind the bijection; of a NormalWishart by the chain rule."""
    p, q = (
        Factor(f.family, {k: v.detach() for k, v in f.params.items()}, (), f.batch_dim)
        for f in (p, q)
    )
    p, q = p.distribution(), q.distribution()
    between = members.normal_wishart_kl if "NormalWishart" in repr(type(p)) else kl_divergence
    return float(between(p, q).sum())


def perturb(guide, size=0.3):
    """Move every parameter a little, in unconstrained space."""
    owner = guide.model if guide.model.problem.pooling.name == "inclusive" else guide
    with torch.no_grad():
        for value in owner.atoms.parameters():
            value.add_(size * torch.randn_like(value))


def loss(model, guide, elbo=None):
    return (elbo or TraceMeanField_ELBO()).loss(model, guide)


def best_elbo(pooling):
    """At the optimum without noise."""
    return Trace_ELBO() if pooling == "product" else TraceMeanField_ELBO()
