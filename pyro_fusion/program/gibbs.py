# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""Draws of the assignment: how many atoms there are, and who shares what.

The posterior of the assignment ``a``, with the atoms integrated out, is ``exp(-F)``:

.. math:: p(a) \propto \prod_k e^{-\varphi(m_k)}
    \exp\Bigl[A\bigl(\eta_0 + \textstyle\sum_{n \in k} \delta_n / T\bigr) - A(\eta_0)
    - \sum_{n \in k} \bigl(A(\eta_0 + \delta_n / T) - A(\eta_0)\bigr)\Bigr],
    \quad \delta_n = w_n (\eta_n - \eta_0)

over the partitions of the components of all parties, at most one of each party in an atom. Given
all other parties, that of one party is a :class:`~pyro_fusion.assignment.Matching`.

**What is assumed of T.** A tempered message is a likelihood but for a factor that depends on T. It
is taken to be such that a component by itself is as probable under every T, so that the product
above is the likelihood of T too: T is learned from how well those agree that share an atom, and
from nothing else. For Normals under a wide prior that is how any variance is learned from
residuals; where the prior is hardly wider than a component, its scatter about the prior's mean
would tell of T as well. For large T, and where nothing is shared, the likelihood is flat: the prior
of T must be proper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.ops.stats import effective_sample_size
from torch import Tensor
from torch.distributions import Distribution, Gamma, LogNormal

from pyro_fusion.assignment.indian_buffet import harmonic_number
from pyro_fusion.assignment.markov_kernels import match_anew, slice_sample
from pyro_fusion.assignment.matching import MAX_EXACT
from pyro_fusion.assignment.priors import IndianBuffetPrior
from pyro_fusion.errors import ParameterError, StructureError, naming
from pyro_fusion.fusion.parties import LabelProblem, locating
from pyro_fusion.fusion.problem import check_assignment
from pyro_fusion.pooling.collapsed import Sums, log_evidence, log_evidence_of_joining
from pyro_fusion.pooling.components import Components, compact
from pyro_fusion.program.guide import check_own
from pyro_fusion.program.model import FusionModel

__all__ = ["AssignmentDraws", "FusionGibbs", "GibbsResult"]


@dataclass(frozen=True)
class AssignmentDraws:
    """Draws of the assignment along one label.

    :ivar label: the label.
    :ivar sizes: ``L_s`` of each party; they add up to ``N``.
    :ivar assignments: the atom of each component, the parties in turn, atoms numbered by first
        appearance: LongTensor ``[num_samples, N]``.
    :ivar num_atoms: K, LongTensor ``[num_samples]``.
    :ivar log_density: of assignment, alpha and ``log T``, ``-F`` but for a constant:
        ``[num_samples]``.
    :ivar alpha: of a learned :class:`~pyro_fusion.IndianBuffetPrior`, ``[num_samples]``, else None.
    :ivar dispersion: T if it is learned, ``[num_samples]``, else None.
    """

    label: str
    sizes: tuple[int, ...]
    assignments: Tensor
    num_atoms: Tensor
    log_density: Tensor
    alpha: Tensor | None
    dispersion: Tensor | None

    def num_atoms_distribution(self) -> Tensor:
        """``P(K = 0), P(K = 1), ...`` up to the largest K drawn."""
        return torch.bincount(self.num_atoms).double() / len(self.num_atoms)

    def same(self) -> Tensor:
        """``P(components i and j are the same atom)``, ``[N, N]``."""
        total = torch.zeros(self.assignments.shape[1:] * 2, dtype=torch.float64)
        for a in self.assignments:
            total += a.unsqueeze(1) == a
        return total / len(self.assignments)

    def _traces(self) -> dict[str, Tensor]:
        traces = {"atoms": self.num_atoms, "alpha": self.alpha, "dispersion": self.dispersion}
        traces["log density"] = self.log_density
        return {name: x.double() for name, x in traces.items() if x is not None}

    def effective_sample_sizes(self) -> dict[str, float]:
        """The effective sample size of each quantity, by
        :func:`pyro.ops.stats.effective_sample_size`; NaN of a constant."""
        return {
            name: float(effective_sample_size(x.unsqueeze(0))) if bool(x.diff().any()) else math.nan
            for name, x in self._traces().items()
        }

    def summary(self) -> str:
        """A table to print: how many atoms, and a row for each quantity."""
        same = self.same()
        pairs = same[torch.ones_like(same, dtype=torch.bool).triu(1)]
        pmf = enumerate(self.num_atoms_distribution().tolist())
        sure, doubtful = int((pairs >= 0.95).sum()), int(((pairs > 0.05) & (pairs < 0.95)).sum())
        what = f"{sum(self.sizes)} × {self.label} of {len(self.sizes)} parties"
        lines = [
            f"{len(self.assignments)} draws of the atoms of {what}",
            "atoms: " + ", ".join(f"P({k}) = {p:.3f}" for k, p in pmf if p > 0),
            f"pairs of components: {sure} the same with P ≥ 0.95, {doubtful} in doubt",
            "                    mean        sd  effective draws",
        ]
        sizes = self.effective_sample_sizes()
        for name, x in self._traces().items():
            row = f"{float(x.mean()):10.4g}{float(x.std(correction=0)):10.4g}{sizes[name]:17.0f}"
            lines.append(f"  {name:12s}{row}")
        return "\n".join(lines)


@dataclass(frozen=True)
class GibbsResult:
    """The draws of a :meth:`FusionGibbs.run`, by label."""

    labels: Mapping[str, AssignmentDraws]

    def only_label(self) -> AssignmentDraws:
        """The draws, if there is one label.

        :raises StructureError: if there is none, or several.
        """
        if len(self.labels) != 1:
            have = sorted(self.labels)
            raise StructureError(f"expected one label, got {have}: use result.labels[label]")
        return next(iter(self.labels.values()))

    def num_atoms_distribution(self) -> Tensor:
        """:meth:`AssignmentDraws.num_atoms_distribution` of the only label."""
        return self.only_label().num_atoms_distribution()

    def same(self) -> Tensor:
        """:meth:`AssignmentDraws.same` of the only label."""
        return self.only_label().same()

    def summary(self) -> str:
        """A table for each label."""
        return "\n\n".join(draws.summary() for draws in self.labels.values())


class FusionGibbs:
    """Gibbs sampling of the assignment of a ``product`` model, in place of ``SVI``: each
    :meth:`step` matches every party anew, given all others, then draws alpha (of a learned
    :class:`~pyro_fusion.IndianBuffetPrior`, from ``Gamma(concentration + K, rate + H_S)``) and T
    (by slice sampling). The top of this file says what is drawn from.

    :param model: of pooling ``product``, with its own ``assignment_prior``, ``local`` and
        ``scale``.
    :param assignment: label -> the atom of each component, LongTensor ``[N]``, to begin with, as
        the ``assignment`` of a guide; by default that of
        :meth:`FusionProblem.start() <pyro_fusion.FusionProblem.start>`.
    :param seed: of the draws. torch's global generator is left alone.
    :param learn_dispersion: whether to draw T, or its prior, a scalar distribution over positive
        numbers; ``True`` is ``LogNormal(log T, 1)`` about the model's T.
    :param block: a party of at most so many components is matched as a block, exactly; larger ones
        go on from where they are, by ``markov_kernels.match_anew``.
    :raises ParameterError: for another model, a prior that weighs atoms by their rank, or arguments
        out of range.
    :raises StructureError: if the assignment does not fit.
    """

    def __init__(
        self,
        model: FusionModel,
        assignment: Mapping[str, Tensor] | None = None,
        *,
        seed: int = 0,
        learn_dispersion: bool | Distribution = False,
        block: int = 8,
    ) -> None:
        _check_model(model)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ParameterError(f"seed must be an integer, got {seed!r}")
        if not 0 <= block <= MAX_EXACT:
            raise ParameterError(f"block must be from 0 to {MAX_EXACT}, got {block}")
        self.model = model
        self._state = torch.Generator().manual_seed(seed).get_state()
        if assignment is not None:
            check_assignment(assignment, model.problem)
        start = model.problem.start(seed) if assignment is None else assignment
        self._chains = {
            label: _Chain(part, start[label], learn_dispersion, block)
            for label, part in model.problem.parts.items()
        }
        self._shared = model.problem.shared_objective

    @property
    def assignment(self) -> dict[str, Tensor]:
        """Label -> the present atom of each component, LongTensor ``[N]``."""
        return {label: chain.groups for label, chain in self._chains.items()}

    def step(self) -> float:
        """One sweep. Returns the loss, minus the log joint density but for a constant: ``F`` at the
        present alpha and T, minus the log density of ``log T`` if that is learned.

        :raises ParameterError: where a product is improper.
        """
        with self._own_generator(), naming(self.model.problem.parties.names):
            for chain in self._chains.values():
                with locating(chain.part.messages):
                    chain.sweep()
        return self._shared + sum(chain.loss for chain in self._chains.values())

    def run(
        self, num_samples: int = 1000, warmup: int = 200, thinning: int = 1, progress: bool = False
    ) -> GibbsResult:
        """``warmup`` steps from where the chain is, then ``num_samples`` draws, ``thinning`` steps
        for each.

        :param progress: show a progress bar.
        :raises ParameterError: for arguments out of range, and where a product is improper.
        """
        from tqdm import tqdm

        if num_samples < 1 or warmup < 0 or thinning < 1:
            raise ParameterError("expected num_samples >= 1, warmup >= 0 and thinning >= 1")
        for chain in self._chains.values():
            chain.trace = []
        steps = range(1 - warmup, num_samples * thinning + 1)
        for i in tqdm(steps, desc="sampling", disable=not progress):
            self.step()
            if i > 0 and i % thinning == 0:
                for chain in self._chains.values():
                    chain.keep()
        return GibbsResult({label: chain.draws() for label, chain in self._chains.items()})

    @contextmanager
    def _own_generator(self) -> Iterator[None]:
        """torch's generator on the CPU goes on from the last step, and is put back after it."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._state)
            yield
            self._state = torch.get_rng_state()


class _Chain:
    """The chain along one label. All but the evidence is on the CPU.

    :ivar groups: the atom of each component, numbered by first appearance, LongTensor ``[N]``.
    :ivar assignment_prior: with alpha as it is now; ``learned`` has that of alpha, if there is one.
    :ivar problem, dispersion: with T as it is now; ``prior_of_dispersion`` if that is learned.
    :ivar loss: after the last sweep.
    :ivar trace: the draws that were kept.
    """

    def __init__(
        self, part: LabelProblem, start: Tensor, learn_dispersion: bool | Distribution, block: int
    ) -> None:
        self.part, self.block, self.assignment_prior = part, block, part.assignment_prior
        self.learned: IndianBuffetPrior | None = None
        self.alpha = self.loss = math.nan
        if (
            isinstance(part.assignment_prior, IndianBuffetPrior)
            and part.assignment_prior.alpha is None
        ):
            self.learned, self.alpha = part.assignment_prior, part.assignment_prior.mass
        self.problem, self.dispersion = part.problem, part.dispersion
        self.prior_of_dispersion = _prior_of_dispersion(learn_dispersion, part.dispersion)
        self.groups = _by_appearance(start.cpu())
        self.trace: list[tuple[Tensor, float, float, float]] = []

    def keep(self) -> None:
        self.trace.append((self.groups, -self.loss, self.alpha, self.dispersion))

    def draws(self) -> AssignmentDraws:
        groups = torch.stack([t[0] for t in self.trace])
        values = torch.tensor([t[1:] for t in self.trace], dtype=torch.float64)
        log_density, alpha, dispersion = values.unbind(1)
        return AssignmentDraws(
            self.part.label,
            self.problem.sizes,
            groups,
            groups.amax(1) + 1,
            log_density,
            None if self.learned is None else alpha,
            None if self.prior_of_dispersion is None else dispersion,
        )

    def sweep(self) -> None:
        """Draw the assignment, party by party, then alpha, then T."""
        self._match_all()
        num_parties, loss = self.problem.num_parties, 0.0
        if self.learned is not None:  # the Gamma prior is conjugate
            c, r = self.learned.concentration, self.learned.rate
            shape = c + self.groups.max().double() + 1
            self.alpha = float(Gamma(shape, r + harmonic_number(num_parties)).sample())
            self.assignment_prior = replace(self.learned, alpha=self.alpha)
            loss += r * self.alpha - (c - 1) * math.log(self.alpha)
        if self.prior_of_dispersion is not None:
            x = slice_sample(self._log_density_of, math.log(self.dispersion))
            self.dispersion, self.problem = math.exp(x), self._tempered(x)
            loss -= _log_density(self.prior_of_dispersion, x)
        penalty = self.assignment_prior.penalty(num_parties)[torch.bincount(self.groups)]
        loss += float(penalty.sum()) + self.assignment_prior.constant(num_parties)
        self.loss = loss - log_evidence(self.problem, self.groups)

    def _match_all(self) -> None:
        groups, num_atoms = self.groups.clone(), int(self.groups.max()) + 1
        sums = Sums.of(self.problem, groups, num_atoms)
        popularity = torch.bincount(groups, minlength=num_atoms)
        step = self.assignment_prior.penalty(self.problem.num_parties).diff()
        for members in self.problem.split(torch.arange(len(groups))):
            sums.add(members, groups[members], -1.0)
            popularity[groups[members]] -= 1
            standing = popularity.nonzero().squeeze(-1)
            count, room = len(standing), len(members)
            if self.assignment_prior.num_atoms is not None:
                room = min(room, self.assignment_prior.num_atoms - count)
            evidence = log_evidence_of_joining(self.problem, sums, members, standing)
            logits = evidence - step[popularity[standing]]
            place = torch.full_like(popularity, count)  # a new one, unless others have it
            place[standing] = torch.arange(count)
            choice = match_anew(logits, -float(step[0]), place[groups[members]], room, self.block)
            fresh = choice == count
            added = int(fresh.sum())
            numbers = torch.cat([standing, standing.new_zeros(1)])[choice]
            groups[members] = torch.where(fresh, len(popularity) + fresh.cumsum(0) - 1, numbers)
            popularity = torch.cat([popularity, popularity.new_zeros(added)])
            popularity[groups[members]] += 1
            sums.grow(added)
            sums.add(members, groups[members], 1.0)
        self.groups = _by_appearance(groups)

    def _log_density_of(self, log_dispersion: float) -> float:
        """The log density of ``log T`` given the assignment, but for a constant."""
        assert self.prior_of_dispersion is not None
        assignment_prior = _log_density(self.prior_of_dispersion, log_dispersion)
        try:
            return assignment_prior + log_evidence(self._tempered(log_dispersion), self.groups)
        except ParameterError:  # messages to so high a power are improper
            return -math.inf

    def _tempered(self, log_dispersion: float) -> Components:
        return replace(self.part.messages, dispersion=math.exp(log_dispersion)).scored()


def _check_model(model: FusionModel) -> None:
    check_own(model)
    problem = model.problem
    if problem.pooling.draws_from != "prior":
        raise ParameterError(
            f"FusionGibbs needs pooling 'product', got {problem.pooling.name!r}: a divergence from "
            "the local posteriors is no evidence that components are the same"
        )
    if problem.links:
        raise ParameterError(
            f"sites {sorted(problem.links)} have several labels: FusionGibbs has no kernel for "
            "assignments along these"
        )
    for x in problem.parts.values():
        weights = x.assignment_prior.rank_weights(sum(x.problem.sizes), max(x.problem.sizes))
        if bool((weights != 1).any()):
            raise ParameterError(
                f"FusionGibbs needs an assignment prior without rank weights, got "
                f"{x.assignment_prior!r}"
            )


def _by_appearance(groups: Tensor) -> Tensor:
    """Number the groups 0, 1, ... as they first appear: LongTensor ``[N]``."""
    groups, num_atoms = compact(groups)
    first = torch.full((num_atoms,), len(groups))
    first = first.scatter_reduce(0, groups, torch.arange(len(groups)), "amin")
    return first.argsort().argsort()[groups]


def _prior_of_dispersion(learn: bool | Distribution, dispersion: float) -> Distribution | None:
    if learn is False:
        return None
    x = math.log(dispersion)
    if learn is True:
        return LogNormal(torch.tensor(x, dtype=torch.float64), 1.0)
    scalar = isinstance(learn, Distribution) and not learn.batch_shape + learn.event_shape
    if not scalar or _log_density(learn, x) == -math.inf:
        raise ParameterError(
            "learn_dispersion must be a bool, or a scalar distribution with a density at the "
            f"model's dispersion, {dispersion:.4g}; got {learn!r}"
        )
    return learn


def _log_density(assignment_prior: Distribution, log_dispersion: float) -> float:
    """The log density of ``log T`` where T has the prior."""
    value = torch.tensor(log_dispersion, dtype=torch.float64).exp()
    support: Any = assignment_prior.support
    if not bool(support.check(value)):
        return -math.inf
    return float(assignment_prior.log_prob(value)) + log_dispersion
