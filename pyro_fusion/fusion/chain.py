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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Gamma

from pyro_fusion.assignment.indian_buffet import harmonic_number
from pyro_fusion.assignment.markov_kernels import match_anew, slice_sample
from pyro_fusion.assignment.priors import IndianBuffetPrior
from pyro_fusion.assignment.split_merge import split_merge
from pyro_fusion.errors import ParameterError, naming
from pyro_fusion.fusion.draws import AssignmentDraws
from pyro_fusion.fusion.parties import LabelProblem, locating
from pyro_fusion.fusion.problem import FusionProblem, check_assignment
from pyro_fusion.fusion.result import Fusion, StopReason
from pyro_fusion.pooling import AdditivePooling, Pooling
from pyro_fusion.pooling.collapsed import Sums, log_evidence, log_evidence_of_joining
from pyro_fusion.pooling.components import Components, by_appearance

__all__ = ["AssignmentChains", "check_evidence", "check_has_posterior", "with_draws"]

# Sweeps from the end of a search, where the chain is near its mode, to the first draw.
WARMUP = 30

# Split-merge moves of pairs of atoms in each sweep: they take a third of the time of the rest.
_ROUNDS = 2


def check_evidence(pooling: Pooling) -> None:
    """:raises ParameterError: for a pooling in which the assignment has no posterior."""
    if pooling.draws_from != "prior":
        raise ParameterError(
            f"draws of the assignment need pooling 'product', got {pooling.name!r}: a divergence "
            "from the local posteriors is no evidence that components are the same. Fuse by "
            "'product', with the prior of the local models as `prior`, or without draws"
        )
    if not isinstance(pooling, AdditivePooling):
        raise ParameterError(
            f"draws of the assignment need the evidence of a group from sums over it, and pooling "
            f"{pooling.name!r} has none: make it an AdditivePooling, or fuse by 'product'"
        )


def check_has_posterior(problem: FusionProblem) -> None:
    """:raises ParameterError: for a problem whose assignment has no posterior, or none that there
    is a chain for."""
    check_evidence(problem.pooling)
    if problem.links:
        raise ParameterError(
            f"sites {sorted(problem.links)} have several labels: there is no chain of assignments "
            "along these. Fuse without draws, or without these sites"
        )
    for x in problem.parts.values():
        weights = x.assignment_prior.rank_weights(sum(x.problem.sizes), max(x.problem.sizes))
        if bool((weights != 1).any()):
            raise ParameterError(
                f"label '{x.label}': draws of the assignment need an assignment prior without rank "
                f"weights, got {x.assignment_prior!r}; give ranked=False, or IndianBuffetPrior()"
            )


def with_draws(
    problem: FusionProblem, fusion: Fusion, num_draws: int, seed: int, progress: bool
) -> Fusion:
    """The result of a search with draws of the assignment, begun where it ended. An interrupt ends
    them: those that there are by then are kept."""
    if any(m.stopped is StopReason.INTERRUPTED for m in fusion.labels.values()):
        return fusion
    start = {label: torch.cat(m.assignment) for label, m in fusion.labels.items()}
    chains = AssignmentChains(problem, start, seed=seed)
    ended: dict[str, StopReason] = {}
    try:
        chains.run(num_draws, WARMUP, progress=progress)
    except KeyboardInterrupt:
        ended = dict.fromkeys(fusion.labels, StopReason.INTERRUPTED)
    draws = chains.draws()
    labels = {
        label: replace(m, draws=draws.get(label), stopped=ended.get(label, m.stopped))
        for label, m in fusion.labels.items()
    }
    return replace(fusion, labels=labels)


class AssignmentChains:
    """Markov chains of the assignment, one for each label of a problem.

    :param problem: of pooling ``product``.
    :param start: label -> the atom of each component, LongTensor ``[N]``.
    :param seed: of the draws. torch's global generator is left alone.
    :param learn_dispersion: the prior of T, if that is to be drawn, too.
    :param block: see :class:`~pyro_fusion.FusionGibbs`.
    :raises ParameterError: for a problem whose assignment has no posterior, or arguments out of
        range.
    :raises StructureError: if the start does not fit.
    """

    def __init__(
        self,
        problem: FusionProblem,
        start: Mapping[str, Tensor],
        *,
        seed: int = 0,
        learn_dispersion: Distribution | None = None,
        block: int = 8,
    ) -> None:
        check_has_posterior(problem)
        check_assignment(start, problem)
        self.problem = problem
        self._state = torch.Generator().manual_seed(seed).get_state()
        self.chains = {
            label: _Chain(part, start[label], learn_dispersion, block)
            for label, part in problem.parts.items()
        }
        self._shared = problem.shared_objective

    def step(self) -> float:
        """One sweep of each chain. Returns minus the log joint density but for a constant."""
        with self._own_generator(), naming(self.problem.parties.names):
            for chain in self.chains.values():
                with locating(chain.part.messages):
                    chain.sweep()
        return self._shared + sum(chain.loss for chain in self.chains.values())

    def run(self, num_draws: int, warmup: int, thinning: int = 1, progress: bool = False) -> None:
        """``warmup`` sweeps from where the chains are, then ``num_draws`` that are kept, of each
        ``thinning`` the last; :meth:`draws` has them, also if this is interrupted."""
        from tqdm import tqdm

        for chain in self.chains.values():
            chain.trace = []
        steps = range(1 - warmup, num_draws * thinning + 1)
        for i in tqdm(steps, desc="sampling", disable=not progress):
            self.step()
            if i > 0 and i % thinning == 0:
                for chain in self.chains.values():
                    chain.keep()

    def draws(self) -> dict[str, AssignmentDraws]:
        """The draws that were kept in the last run, by label; of a label without any, nothing."""
        return {label: chain.draws() for label, chain in self.chains.items() if chain.trace}

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
        self, part: LabelProblem, start: Tensor, learn_dispersion: Distribution | None, block: int
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
        _check_prior_of_dispersion(learn_dispersion, part.dispersion)
        self.prior_of_dispersion = learn_dispersion
        self.groups = by_appearance(start.cpu())
        self.singles = self._singles()
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
        """Draw the assignment, by pairs of atoms and party by party, then alpha, then T."""
        for _ in range(_ROUNDS):
            self._split_merge()
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
            self.singles = self._singles()
            loss -= _log_density(self.prior_of_dispersion, x)
        penalty = self.assignment_prior.penalty(num_parties)[torch.bincount(self.groups)]
        loss += float(penalty.sum()) + self.assignment_prior.constant(num_parties)
        self.loss = loss - log_evidence(self.problem, self.groups)

    def _split_merge(self) -> None:
        penalty = self.assignment_prior.penalty(self.problem.num_parties)
        limit = self.assignment_prior.num_atoms
        try:
            with self.problem.pooling.telling():
                self.groups = split_merge(
                    self.singles, self.groups, self.problem.party, penalty, limit
                )
        except ParameterError:
            # Two atoms in one would be improper: they stay apart, and so would they the way back,
            # on which the same union is looked at.
            pass

    def _match_all(self) -> None:
        groups, num_atoms = self.groups.clone(), int(self.groups.max()) + 1
        sums = self.singles.empty(num_atoms)
        sums.add(torch.arange(len(groups)), groups, 1.0)
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
        self.groups = by_appearance(groups)

    def _log_density_of(self, log_dispersion: float) -> float:
        """The log density of ``log T`` given the assignment, but for a constant."""
        assert self.prior_of_dispersion is not None
        assignment_prior = _log_density(self.prior_of_dispersion, log_dispersion)
        try:
            return assignment_prior + log_evidence(self._tempered(log_dispersion), self.groups)
        except ParameterError:  # messages to so high a power are improper
            return -math.inf

    def _singles(self) -> Sums:
        """Each component in a group of its own."""
        every = torch.arange(sum(self.problem.sizes))
        return Sums.of(self.problem, every, len(every))

    def _tempered(self, log_dispersion: float) -> Components:
        return replace(self.part.messages, dispersion=math.exp(log_dispersion)).scored()


def _check_prior_of_dispersion(prior: object, dispersion: float) -> None:
    if prior is None:
        return
    if prior is True:
        raise ParameterError(
            "learn_dispersion must be the prior of T, a distribution: there is no default, since "
            "none was calibrated. Leave it out to draw at the estimated T"
        )
    scalar = isinstance(prior, Distribution) and not prior.batch_shape + prior.event_shape
    if scalar and _log_density(prior, math.log(dispersion)) > -math.inf:
        return
    raise ParameterError(
        "learn_dispersion must be a scalar distribution with a density at the model's "
        f"dispersion, {dispersion:.4g}; got {prior!r}"
    )


def _log_density(assignment_prior: Any, log_dispersion: float) -> float:
    """The log density of ``log T`` where T has the prior."""
    value = torch.tensor(log_dispersion, dtype=torch.float64).exp()
    support: Any = assignment_prior.support
    if not bool(support.check(value)):
        return -math.inf
    return float(assignment_prior.log_prob(value)) + log_dispersion
