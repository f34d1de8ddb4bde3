# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""All partitions of the components of a few parties, at most one of each in a group, and a check of
draws against what is exact, with tolerances in standard errors by the effective sample size."""

import functools
import itertools

import torch
from pyro.ops.stats import effective_sample_size

SIGMAS = 4


def check(draws, exact, what):
    """The mean of ``[num_draws, ...]`` against what is exact, as probabilities or with the sd that
    the draws have."""
    n = len(draws)
    x, exact = draws.double().reshape(n, -1), torch.as_tensor(exact).double().flatten()
    varies = (x != x[0]).any(0)
    ess = torch.full_like(x[0], n / 10)  # as far as can be told
    if bool(varies.any()):  # a constant would make NaNs of all
        ess[varies] = effective_sample_size(x[None, :, varies]).reshape(-1).clamp(max=n)
    probabilities = bool(((x == 0) | (x == 1)).all())
    variance = (exact * (1 - exact)).clamp(min=0) if probabilities else x.var(0)
    error, limit = (x.mean(0) - exact).abs(), SIGMAS * (variance / ess).sqrt() + 2 / n
    assert bool((error <= limit).all()), (what, float((error / limit).max()), float(error.max()))


def choices(num_atoms, size):
    """Atoms for a party's components, where there are ``num_atoms`` already."""
    for a in itertools.product(range(num_atoms + 1), repeat=size):
        old = [k for k in a if k < num_atoms]
        if len(set(old)) == len(old):
            new = itertools.count(num_atoms)
            yield tuple(k if k < num_atoms else next(new) for k in a)


@functools.cache
def partitions(sizes):
    """All, atoms numbered by first appearance: LongTensor ``[number, N]``."""
    found = [()]
    for size in sizes:
        found = [a + b for a in found for b in choices(max(a, default=-1) + 1, size)]
    return torch.tensor(found)


def log_weights(sizes, log_evidence, penalty):
    """``-F`` of each partition, from the evidence of a set of components and ``φ``."""
    log_evidence = functools.cache(log_evidence)
    result = []
    for a in partitions(sizes).tolist():
        groups = [tuple(n for n, k in enumerate(a) if k == j) for j in range(max(a) + 1)]
        result.append(sum(log_evidence(g) - float(penalty[len(g)]) for g in groups))
    return torch.tensor(result, dtype=torch.float64)
