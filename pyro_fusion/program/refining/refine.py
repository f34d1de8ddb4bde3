# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""``refine()``: a second round without the parties, where their model is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_fusion.errors import ParameterError, at, naming
from pyro_fusion.families import pairwise_kl
from pyro_fusion.fusion.result import Fusion
from pyro_fusion.fusion.roles import Roles, site_roles
from pyro_fusion.posterior import Posterior
from pyro_fusion.program.refining.evidence import draws_behind
from pyro_fusion.program.refining.fitting import fit
from pyro_fusion.program.refining.likelihood import Likelihood, Model
from pyro_fusion.program.refining.moved import moved
from pyro_fusion.readers.pyro.program import isolated

__all__ = ["Refinement", "refine"]


@dataclass(frozen=True)
class Refinement:
    """The result of :func:`refine`.

    :ivar fusion: the refined fusion, or the one that was given if ``taken`` is False. Its atoms are
        in the old order. Their centres are those of the fitted model, their evidence (standard
        deviations, concentrations, degrees of freedom) that of the pooling: points drawn from
        posteriors are no new data. Sites that follow the assignment have the centre of all parties
        together. The assignment is of each party's own components to the atoms that it has.
        Dispersion, objective and why the search stopped are those of the first round.
    :ivar taken: True if the parties are alike enough for shared atoms.
    :ivar reason: why, in words.
    :ivar overdispersion: how far the parties are from shared atoms, squared, over what their own
        uncertainty explains: about 1 where they mean the same, 4 where they are twice as far
        apart. NaN where nothing is shared, or the fit failed.
    :ivar usage: how many draws each party would have from each atom, float64 ``[S, K]``: its
        evidence, split by the fitted model.
    """

    fusion: Fusion
    taken: bool
    reason: str
    overdispersion: float
    usage: Tensor

    def summary(self) -> str:
        """Lines to print: what was found, and a row for each party."""
        width = max(map(len, self.fusion.party_names), default=0)
        lines = [f"Refinement: atoms {'taken' if self.taken else 'left'}, {self.reason}", ""]
        lines.append(f"  {'party':<{width}}  draws from each atom")
        for name, row in zip(self.fusion.party_names, self.usage.tolist(), strict=True):
            lines.append(f"  {name:<{max(width, 5)}}  " + " ".join(f"{v:7.1f}" for v in row))
        return "\n".join(lines)

    def __repr__(self) -> str:
        state = "taken" if self.taken else "left"
        return f"Refinement({self.fusion!r}, {state}, overdispersion {self.overdispersion:.3g})"


def refine(
    fusion: Fusion,
    model: Callable[..., Any],
    example: Any,
    *args: Any,
    evidence: Sequence[float] | None = None,
    max_overdispersion: float = 3.0,
    max_iterations: int = 100,
    seed: int = 0,
    **kwargs: Any,
) -> Refinement:
    r"""Refine a fusion by the model that the parties fitted, without asking them again.

    Fusion compares components, and a local component that covers two clusters has no right place.
    The density of such a party is well fitted all the same. So points are drawn from the model at
    the centre of each party's posterior, and the global model with K components, which all parties
    share, and weights of each party's own is fitted to all points, from the fused atoms:

    .. math:: \max_{\theta, w} \sum_s c_s \log p(x_s \mid \theta, w_s) + \log p(\theta)
              + \sum_s \log p(w_s)

    Each party then has those atoms that most of its points are from, one for each of its
    components, which are matched to these by the least symmetric KL divergence.

    That is right for parties that are alike: shared atoms cannot be a little different in each
    party. How alike they are, the same points tell:

    .. math:: c = \frac{2}{P (N - K)} \sum_s c_s [\log p(x_s \mid \text{party } s)
              - \log p(x_s \mid \theta, w_s)]

    with P numbers in an atom, N components and K atoms. From ``max_overdispersion`` on the fusion
    is left as it is, to the bit.

    :param fusion: with one label.
    :param model: a Pyro model, called as ``model(example, size, *args, **kwargs)`` with K and with
        each party's number of components for ``size``. It has the sites of the posteriors, data,
        and a discrete latent site of ``size`` values that says which component each datum is from
        (enumerated in parallel, whether it is marked so or not). Continuous latent sites in a plate
        of data, as the topics' shares of a document, are integrated over by draws from their prior.
        All else that it samples must be in the posteriors.
    :param example: data of the shape in which to draw, whose values are not looked at: as of 300
        points, 100 documents, 20 sequences. The more, the smaller is the error of drawing, at no
        more weight.
    :param evidence: how many draws of a component each party's posterior is worth: points of a
        mixture, words of documents, frames of sequences. By default the counts in
        NormalWishart, NormalGamma or Dirichlet factors beyond those of the model's own
        prior; where there are none, as many as the example has.
    :param max_overdispersion: the bound of c.
    :param max_iterations: of the optimizer, L-BFGS.
    :param seed: of what is drawn; the same seed gives the same result.
    :raises StructureError: for a fusion without label, or with several, and where model and
        posteriors do not fit; it says where.
    :raises ParameterError: for evidence or bounds out of range.
    :raises UnsupportedFamilyError: for a family that cannot be moved to another centre.

    Source: Obermeyer et al., *Tensor Variable Elimination for Plated Factor Graphs* (ICML 2019),
    for sums over discrete sites; McCullagh & Nelder, *Generalized Linear Models* (1989), sec. 4.5,
    for the overdispersion.
    """
    fused = fusion.only_label()
    roles = site_roles(fusion.posterior)
    if not max_overdispersion > 0 or max_iterations < 1:
        raise ParameterError(
            "expected a positive max_overdispersion and max_iterations, got "
            f"{max_overdispersion} and {max_iterations}"
        )
    label = fused.label
    whole, parties = Model(model, example, args, kwargs), list(fusion.parties.values())
    with naming(fusion.party_names), isolated(model, seed), pyro.validation_enabled(False):
        start = _centres(fusion.posterior)
        likelihood = Likelihood(whole, fused.num_atoms, start)
        own = {site: start.pop(site) for site in roles.carried}
        local = []
        for s, party in enumerate(parties):
            with at(party=s):
                local.append(_local(party, label, roles, whole, seed + s))
        points, scales = [x.points for x in local], _scales(local, evidence)
        found = fit(likelihood, points, scales, start, own, max_iterations=max_iterations)
        if not found.finite:
            reason = "as the fit of the model did not end at a finite density"
            nothing = torch.full((len(parties), fused.num_atoms), math.nan, dtype=torch.float64)
            return Refinement(fusion, False, reason, math.nan, nothing)
        lost, counts = 0.0, []
        for s, one in enumerate(local):
            values = {**found.shared, **found.own[s]}
            density, _ = likelihood.log_density(one.points, values)
            lost += scales[s] * (one.log_density - float(density))
            counts.append(scales[s] * likelihood.usage(one.points, values).cpu())
    usage = torch.stack(counts)
    extra = sum(p.components(label) for p in parties) - fused.num_atoms
    numbers = sum(likelihood.numbers(site) for site in roles.matched[label]) / fused.num_atoms
    c = 2 * lost / (numbers * extra) if extra else math.nan
    taken, reason = _verdict(c, max_overdispersion)
    if not taken:
        return Refinement(fusion, False, reason, c, usage)
    for site in own:
        found.shared[site] = _average(site, fusion, label, [w[site] for w in found.own], usage)
    given = fusion.posterior
    factors = {site: moved(f, found.shared[site]) for site, f in given.decomposed.items()}
    posterior = Posterior(factors, given.axes, plates=given.plates, outgoing=given.outgoing)
    assignment = _assignment(fusion, posterior, roles, label, usage)
    popularity = torch.bincount(torch.cat(assignment), minlength=fused.num_atoms)
    refined = replace(fused, assignment=assignment, popularity=popularity)
    result = replace(fusion, posterior=posterior, labels={label: refined})
    return Refinement(result, True, reason, c, usage)


@dataclass(frozen=True)
class _Local:
    """A party's own model at the centre of its posterior.

    :ivar points: drawn from it.
    :ivar log_density: of the points.
    :ivar drawn: how many draws of a component they are.
    :ivar behind: how many the posterior counts, or None.
    """

    points: dict[str, Tensor]
    log_density: float
    drawn: float
    behind: float | None


def _local(party: Posterior, label: str, roles: Roles, model: Model, seed: int) -> _Local:
    values = _centres(party)
    likelihood = Likelihood(model, party.components(label), values)
    points = likelihood.draw(values, seed)
    density, _ = likelihood.log_density(points, values)
    drawn = float(likelihood.usage(points, values).sum())
    return _Local(points, float(density), drawn, draws_behind(party, roles, likelihood.priors))


def _scales(local: Sequence[_Local], evidence: Sequence[float] | None) -> list[float]:
    """How many times each party's points count."""
    if evidence is None:
        return [1.0 if x.behind is None else x.behind / x.drawn for x in local]
    given = [float(x) for x in evidence]
    if len(given) != len(local) or not all(0 < x < math.inf for x in given):
        raise ParameterError(
            f"expected evidence of {len(local)} parties, each positive, got {given}"
        )
    return [n / x.drawn for n, x in zip(given, local, strict=True)]


def _verdict(c: float, bound: float) -> tuple[bool, str]:
    if math.isnan(c):
        return False, "as no two parties share an atom"
    if c >= bound:
        return False, (
            f"as the parties differ: overdispersion {c:.3g}, and from {bound:g} on atoms that all "
            "share would be wrong for each of them"
        )
    return True, f"as the parties are alike: overdispersion {c:.3g}, below {bound:g}"


def _centres(posterior: Posterior) -> dict[str, Tensor]:
    return {site: f.center() for site, f in posterior.decomposed.items()}


def _average(site: str, fusion: Fusion, label: str, own: Sequence[Tensor], usage: Tensor) -> Tensor:
    """The centre of a site that follows the assignment, over parties by their evidence: rows of
    transitions by how often the party is in them."""
    axes, f = fusion.posterior.axes[site], fusion.posterior.decomposed[site]
    rows = [i for i, a in enumerate(axes) if a == label and i < f.separable_axes]
    weights = usage if rows else usage.sum(1, keepdim=True)
    weights = (weights + 1e-9) / (weights + 1e-9).sum(0)
    stacked = torch.stack(list(own))
    shape = [len(own)] + [1] * (stacked.dim() - 1)
    if rows:
        shape[1 + rows[0]] = usage.shape[1]
    return (stacked * weights.reshape(shape).to(stacked)).sum(0)


def _present(usage: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The atoms that each party has, as many as it has components: those that most of its points
    are from. An atom that would be nobody's takes the place of one that others have too, where that
    loses the least."""
    share = usage / usage.sum(1, keepdim=True)
    has = torch.zeros_like(usage, dtype=torch.bool)
    for s, size in enumerate(sizes):
        has[s, share[s].topk(size).indices] = True
    for k in (~has.any(0)).nonzero().flatten().tolist():
        spare = has & (has.sum(0) > 1)
        least, which = share.masked_fill(~spare, math.inf).min(1)
        s = int((least - share[:, k]).argmin())
        has[s, which[s]], has[s, k] = False, True
    return [row.nonzero().flatten() for row in has]


def _assignment(
    fusion: Fusion, refined: Posterior, roles: Roles, label: str, usage: Tensor
) -> list[Tensor]:
    """Each party's components matched with the atoms that it has."""
    from scipy.optimize import linear_sum_assignment  # slow to import

    parties = list(fusion.parties.values())
    present = _present(usage, [p.components(label) for p in parties])
    result = []
    for party, atoms in zip(parties, present, strict=True):
        cost = torch.zeros(len(atoms), len(atoms), dtype=torch.float64)
        for site, axis in roles.matched[label].items():
            own = party.decomposed[site].with_batch(axis)
            other = refined.decomposed[site].with_batch(axis).index_select(0, atoms)
            cost += (pairwise_kl(own, other) + pairwise_kl(other, own).mT).cpu()
        result.append(atoms[torch.as_tensor(linear_sum_assignment(cost.numpy())[1])])
    return result
