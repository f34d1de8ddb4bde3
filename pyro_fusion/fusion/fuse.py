# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""``fuse()``: local posteriors in, one posterior out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.fusion.arguments import Inputs, Prior
from pyro_fusion.fusion.chain import check_evidence
from pyro_fusion.fusion.checks import Weights
from pyro_fusion.fusion.problem import FusionProblem
from pyro_fusion.fusion.result import Fusion
from pyro_fusion.fusion.search import check_run, search
from pyro_fusion.fusion.solvers import Solver
from pyro_fusion.pooling import Pooling, pooling_named
from pyro_fusion.posterior import Axes

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
    solver: Literal["coordinate", "relaxed", "sinkhorn"] | Solver = "coordinate",
    num_draws: int = 0,
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
    :param dispersion: T, positive: how many nats apart two components may be and still be the same.
        By default from the longest stretch of T on which the assignment does not change
        (:func:`~pyro_fusion.dispersion_path`); where there is none by a rule of thumb, with a
        warning. ``product`` finds the assignment with messages tempered by 1/T and then pools the
        messages as they are.
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
    :param num_draws: so many draws of the assignment from its posterior, for ``product``, begun at
        the fused one: ``fusion.only_label().draws`` has how probable each number of atoms is
        (``num_atoms_distribution()``) and any two components to be the same (``same()``), at the
        estimated T.
    :param progress: show a progress bar over the starts, and one over the draws.
    :raises StructureError: if parties do not fit together; names both, the site and what differs.
    :raises ParameterError: for weights, prior or other arguments out of range, draws where the
        assignment has no posterior, and where ``product`` is improper.

    Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), alg. 1,
    with one direction of the divergence in both steps.
    """
    check_run(restarts, max_iterations, seed, num_draws)  # before what takes long
    how = pooling_named(pooling)
    if num_draws:
        check_evidence(how)
    problem = FusionProblem.of(
        posteriors,
        how,
        assignment_prior,
        weights=weights,
        prior=prior,
        axes=axes,
        dispersion=dispersion,
    )
    return search(
        problem,
        restarts=restarts,
        max_iterations=max_iterations,
        seed=seed,
        solver=solver,
        num_draws=num_draws,
        progress=progress,
    )
