# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""``fuse()``: local posteriors in, one posterior out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch

from pyro_fusion.assignment import Assignment
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.errors import naming
from pyro_fusion.fusion.arguments import Inputs, Prior
from pyro_fusion.fusion.checks import Weights
from pyro_fusion.fusion.parties import Parties
from pyro_fusion.fusion.result import FusedLabel, Fusion
from pyro_fusion.pooling.base import Pooling
from pyro_fusion.pooling.dispersion import pairwise_spread
from pyro_fusion.pooling.named import pooling_named
from pyro_fusion.posterior import Axes
from pyro_fusion.program.em import FusionEM, check_run
from pyro_fusion.program.guide import FusionGuide
from pyro_fusion.program.model import FusionModel

__all__ = ["fuse"]


def fuse(
    posteriors: Inputs,
    pooling: str | Pooling = "exclusive",
    assignment_prior: AssignmentPrior | Mapping[str, AssignmentPrior] | None = None,
    *,
    weights: Weights = None,
    prior: Prior | None = None,
    axes: Axes | Literal["auto"] | None = None,
    dispersion: float | None = None,
    seed: int = 0,
    restarts: int = 9,
    max_iterations: int = 100,
    solver: Literal["coordinate", "relaxed", "sinkhorn"] | Callable[..., Assignment] = "coordinate",
    progress: bool = False,
) -> Fusion:
    r"""Fuse local posteriors into one, without the data.

    Components along each label are assigned to atoms of a global model, and each atom is the
    barycentre of its components, so that

    .. math:: F = \sum_s \sum_l w_s D(k_{sl}; s, l) / T + \sum_k \varphi(m_k)

    is as small as coordinate ascent from several starts can make it. Sites without a label are
    pooled directly; mixture weights and transition matrices follow the assignment. Labels that
    share sites, as the weights between two layers, are assigned in turn, each given the others;
    there F has the sites in units of one dispersion, and the prior of each label times its own over
    that. Effects of components (``outgoing`` of a posterior) are averaged over the parties.

    :param posteriors: one per party: a :class:`~pyro_fusion.Posterior`, or whatever
        :func:`~pyro_fusion.read` takes without arguments, as a Pyro guide, an ``MCMC`` or the path
        of a file. A list, or a mapping from the names of the parties, which tables, plots and
        errors then use.
    :param pooling: ``"exclusive"`` (D = KL(atom ‖ local), the log-linear pool: the paper's
        barycentre), ``"inclusive"`` (D = KL(local ‖ atom), moment matching: keeps all the spread)
        or ``"product"`` (Bayes' rule for independent data; needs the prior).
    :param assignment_prior: :class:`~pyro_fusion.IndianBuffetPrior` (default for ``product``, whose
        evidence it belongs to), :class:`~pyro_fusion.GroupNormPrior` (default for the others) or
        :class:`~pyro_fusion.FixedAtoms`; one for all labels, or a mapping from label to prior.
    :param weights: one non-negative weight per party, used relative to their mean; a list, or by
        name.
    :param prior: the prior of the local models, for ``product``: a mapping of sites to
        distributions (of one component, or with the labelled axis), a posterior, or a Pyro model
        that needs no arguments. By default that of the first guide's own model.
    :param axes: labels for guides, in place of those of their plates, as in
        ``from_guide``, or ``"auto"`` to find them; posteriors have their own, and if
        there is no guide among them ``axes`` is an error.
    :param dispersion: T, positive; by default estimated from the posteriors. ``product`` finds
        the assignment with messages tempered by 1/T and then pools the messages as they are.
    :param seed: of the random starts; the same seed gives the same result.
    :param restarts: starts beyond the first, at most. When three have come to one end, and none to
        a better, there are no more. The best three ends are refined, and the best of them kept.
    :param max_iterations: of coordinate ascent, per start.
    :param solver: of the E-steps. ``"coordinate"``: one party at a time, exactly. ``"relaxed"``:
        the paper's convex programme, rounded; ``fusion.only_label().gap`` then says within how
        much of optimal the assignment to these atoms is (``GroupNormPrior`` or ``FixedAtoms``, not
        ``product``). ``"sinkhorn"``: starts from soft E- and M-steps at falling temperatures. Or a
        function like those of :mod:`pyro_fusion.assignment`, called as ``solver(problem, prior,
        start=...)`` with an :class:`~pyro_fusion.assignment.AssignmentProblem`.
    :param progress: show a progress bar over the starts.
    :raises StructureError: if parties do not fit together; names both, the site and what differs.
    :raises ParameterError: for weights, prior or other arguments out of range, and where
        ``product`` is improper.

    Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), alg. 1,
    with one direction of the divergence in both steps.
    """
    check_run(restarts, max_iterations, seed)
    parties = Parties.of(posteriors, pooling_named(pooling), weights, prior, axes)
    with naming(parties.names):
        priors = parties.priors(assignment_prior)
        if len(parties.posteriors) == 1:
            return _alone(parties, priors)
        model = FusionModel(parties, parties.pooling, priors, dispersion=dispersion)
        em = FusionEM(model, FusionGuide(model), solver=solver)
        return em.run(restarts, max_iterations, seed=seed, progress=progress)


def _alone(parties: Parties, priors: Mapping[str, AssignmentPrior]) -> Fusion:
    """One party: every component is an atom."""
    (posterior,) = parties.posteriors
    matchings = {}
    for label in parties.roles.matched:
        size = posterior.components(label)
        every = torch.arange(size)
        components = parties.components(label)
        own = priors[label].calibrated(lambda: pairwise_spread(*components)).update(size, 1)  # noqa: B023
        objective = own.constant(1) + size * float(own.penalty(1)[1])
        popularity = torch.ones_like(every)
        matchings[label] = FusedLabel(
            label, [every], size, popularity, [objective], 1.0, own, True, [objective]
        )
    total = sum(m.objective[0] for m in matchings.values())
    return Fusion(posterior, parties.pooling.name, matchings, [total], 0.0, parties.names)
