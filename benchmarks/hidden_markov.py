# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A sticky hidden Markov model with Gaussian emissions, fitted by variational Bayes: the local fits
of ``motion_capture.py``.

    initial ~ Dirichlet(1, ...),   row k of transition ~ Dirichlet(move, ..., move + stay, ...),
    emission k ~ NormalWishart

E-steps are forward-backward recursions under expected log-parameters, M-steps conjugate updates.
The number of states is found by merging pairs as long as that raises the ELBO.

Source: Beal, *Variational Algorithms for Approximate Bayesian Inference* (2003), ch. 3; Fox et al.,
*A sticky HDP-HMM* (AOAS 2011) for the extra weight on staying; Hughes, Stephenson & Sudderth,
*Scalable adaptation of state complexity for nonparametric hidden Markov models* (NeurIPS 2015) for
contiguous starts and merges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from pyro.distributions import MultivariateStudentT
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence

from pyro_fusion import NormalWishart

_LOG_2PI = math.log(2 * math.pi)

# So many of the best starts go on to merges.
_MERGED = 3


@dataclass(frozen=True)
class Frames:
    """Sequences of one dimension, padded.

    :ivar x: ``[S, T, D]``, zero where there is no frame.
    :ivar there: where there is one, ``[S, T]``.
    """

    x: Tensor
    there: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Tensor]) -> Frames:
        lengths = torch.tensor([len(x) for x in sequences])
        padded = pad_sequence(list(sequences), batch_first=True)
        return cls(padded, torch.arange(padded.shape[1]) < lengths.unsqueeze(1))

    @property
    def statistics(self) -> Tensor:
        """``(1, x, x xᵀ)`` of each frame, zero where there is none: ``[S T, 1 + D + D²]``."""
        x = self.x.flatten(0, 1)
        squares = (x.unsqueeze(2) * x.unsqueeze(1)).flatten(1)
        return torch.cat([self.there.reshape(-1, 1).to(x), x, squares], 1)


@dataclass(frozen=True)
class Counts:
    """Expected sufficient statistics, of ``R`` fits with ``K`` states each.

    :ivar starts: ``[R, K]``.
    :ivar moves: ``[R, K, K]``.
    :ivar frames: sums of ``Frames.statistics``, ``[R, K, 1 + D + D²]``.
    """

    starts: Tensor
    moves: Tensor
    frames: Tensor

    @classmethod
    def stack(cls, several: Sequence[Counts]) -> Counts:
        """Of several fits, each without the first axis."""
        return cls(
            *(torch.stack(v) for v in zip(*(vars(c).values() for c in several), strict=True))
        )

    def one(self, r: int) -> Counts:
        """Of one of the fits, with the first axis."""
        return Counts(*(v[r : r + 1] for v in vars(self).values()))

    def joined(self, groups: Tensor) -> Counts:
        """With states joined, in ``P`` ways: ``groups`` is the new state of each, ``[P, K]``; of a
        single fit."""
        g = one_hot(groups).to(self.starts)
        starts = (self.starts.unsqueeze(-2) @ g).squeeze(-2)
        return Counts(starts, g.mT @ self.moves @ g, g.mT @ self.frames)


@dataclass(frozen=True)
class HMM:
    """A posterior over the parameters of ``R`` HMMs with ``K`` states.

    :ivar initial: Dirichlet concentration, ``[R, K]``.
    :ivar transition: Dirichlet concentrations of the rows, ``[R, K, K]``.
    :ivar emission: batch shape ``[R, K]``.
    """

    initial: Tensor
    transition: Tensor
    emission: NormalWishart

    @property
    def num_states(self) -> int:
        return self.initial.shape[-1]


@dataclass(frozen=True)
class Prior:
    """The prior of an HMM with any number of states.

    :ivar emission: of one state.
    :ivar initial: concentration of a state.
    :ivar move: concentration of a move to a state.
    :ivar stay: what staying has on top.
    """

    emission: NormalWishart
    initial: float = 1.0
    move: float = 0.1
    stay: float = 10.0

    def transition(self, num_states: int) -> Tensor:
        """``[K, K]``."""
        like = self.emission.loc
        return self.move + self.stay * torch.eye(num_states, dtype=like.dtype)

    def updated(self, counts: Counts) -> HMM:
        """The conjugate posterior."""
        e = self.emission
        dim = e.loc.shape[-1]
        n, total, squares = counts.frames.split([1, dim, dim * dim], -1)
        n, squares = n.squeeze(-1), squares.unflatten(-1, (dim, dim))
        concentration = e.concentration + n
        loc = (e.concentration * e.loc + total) / concentration.unsqueeze(-1)
        scatter = squares + e.precision_matrix + e.concentration * _outer(e.loc)
        scatter = scatter - concentration[..., None, None] * _outer(loc)
        scatter = (scatter + scatter.mT) / 2
        emission = NormalWishart(loc, concentration, e.df + n, precision_matrix=scatter)
        transition = self.transition(n.shape[-1]) + counts.moves
        return HMM(self.initial + counts.starts, transition, emission)

    def divergence(self, hmm: HMM) -> Tensor:
        """``KL(posterior ‖ prior)``, ``[R]``."""
        initial = Dirichlet(torch.full_like(hmm.initial, self.initial))
        rows = Dirichlet(self.transition(hmm.num_states))
        return (
            kl_divergence(Dirichlet(hmm.initial), initial)
            + kl_divergence(Dirichlet(hmm.transition), rows).sum(-1)
            + kl_divergence(hmm.emission, self.emission).sum(-1)
        )


def _outer(x: Tensor) -> Tensor:
    return x.unsqueeze(-1) * x.unsqueeze(-2)


# -- recursions ------------------------------------------------------------------------------------


def forward(initial: Tensor, transition: Tensor, frames: Tensor, there: Tensor) -> Tensor:
    """``log p(x_1..t, state_t)``, held after the last frame: ``[B, T, K]``.

    :param initial: logarithms, ``[B, K]``.
    :param transition: logarithms, ``[B, K, K]``.
    :param frames: the log-density of each frame in each state, ``[B, T, K]``.
    :param there: ``[B, T]``, from the first frame on.
    """
    moves = transition.exp()
    result = [initial + frames[:, 0]]
    for t in range(1, frames.shape[1]):
        ahead = _log_product(result[-1], moves) + frames[:, t]
        result.append(torch.where(there[:, t, None], ahead, result[-1]))
    return torch.stack(result, 1)


def backward(transition: Tensor, frames: Tensor, there: Tensor) -> Tensor:
    """``log p(x_t+1..T | state_t)``, ``[B, T, K]``; arguments as for :func:`forward`."""
    moves = transition.exp().mT
    result = [torch.zeros_like(frames[:, 0])]
    for t in range(frames.shape[1] - 1, 0, -1):
        behind = _log_product(result[-1] + frames[:, t], moves)
        result.append(torch.where(there[:, t, None], behind, result[-1]))
    return torch.stack(result[::-1], 1)


def _log_product(log_vector: Tensor, matrix: Tensor) -> Tensor:
    """The logarithm of ``exp(log_vector) @ matrix``, of positive matrices: ``[B, K]``."""
    top = log_vector.amax(-1, keepdim=True)
    return top + ((log_vector - top).exp().unsqueeze(1) @ matrix).squeeze(1).log()


def viterbi(initial: Tensor, transition: Tensor, frames: Tensor) -> Tensor:
    """The most likely states of one sequence, ``[T]``; arguments as for :func:`forward`, without
    their first axis."""
    best, came = initial + frames[0], []
    for frame in frames[1:]:
        value, index = (best.unsqueeze(1) + transition).max(0)
        came.append(index)
        best = value + frame
    path = [int(best.argmax())]
    for index in reversed(came):
        path.append(int(index[path[-1]]))
    return torch.tensor(path[::-1])


# -- variational Bayes -----------------------------------------------------------------------------


def _expected_log(concentration: Tensor) -> Tensor:
    return concentration.digamma() - concentration.sum(-1, keepdim=True).digamma()


def expected_log_density(emission: NormalWishart, data: Frames) -> Tensor:
    """``E[log N(x; μ, Λ⁻¹)]`` of each frame in each state, ``[R, S, T, K]``."""
    dim = data.x.shape[-1]
    precision = emission.df[..., None, None] * emission.covariance_matrix
    linear = (precision @ emission.loc.unsqueeze(-1)).squeeze(-1)
    half = (emission.df.unsqueeze(-1) - torch.arange(dim)) / 2
    log_det = half.digamma().sum(-1) + dim * math.log(2)
    log_det = log_det + torch.linalg.slogdet(emission.covariance_matrix).logabsdet
    constant = log_det - dim * (_LOG_2PI + 1 / emission.concentration)
    constant = (constant - (linear * emission.loc).sum(-1)) / 2
    natural = torch.cat([constant.unsqueeze(-1), linear, -precision.flatten(-2) / 2], -1)
    return (data.statistics @ natural.mT).unflatten(-2, data.there.shape)


def e_step(hmm: HMM, data: Frames, count: bool = True) -> tuple[Tensor, Counts | None]:
    """The log-normaliser of the states' distribution, ``[R]``, and what they count, if asked."""
    fits, (num, steps) = len(hmm.initial), data.there.shape
    k = hmm.num_states

    def repeat(v: Tensor) -> Tensor:
        return v.unsqueeze(1).expand(fits, num, *v.shape[1:]).flatten(0, 1)

    density = expected_log_density(hmm.emission, data).flatten(0, 1)
    initial, moves = repeat(_expected_log(hmm.initial)), repeat(_expected_log(hmm.transition))
    there = data.there.expand(fits, num, steps).flatten(0, 1)
    ahead = forward(initial, moves, density, there)
    evidence = ahead[:, -1].logsumexp(-1)
    total = evidence.view(fits, num).sum(1)
    if not count:
        return total, None
    behind = backward(moves, density, there)
    weight = (ahead + behind - evidence[:, None, None]).exp() * there.unsqueeze(-1)
    # Moves from t to t + 1, both ends scaled to a largest entry of one.
    left, right = ahead[:, :-1], (density + behind)[:, 1:]
    tops = left.amax(-1, keepdim=True), right.amax(-1, keepdim=True)
    scale = (tops[0] + tops[1] - evidence[:, None, None]).exp() * there[:, 1:].unsqueeze(-1)
    pairs = ((left - tops[0]).exp() * scale).mT @ (right - tops[1]).exp() * moves.exp()
    weight = weight.view(fits, num, steps, k)
    frames = weight.flatten(1, 2).mT @ data.statistics
    return total, Counts(weight[:, :, 0].sum(1), pairs.view(fits, num, k, k).sum(1), frames)


def ascend(
    prior: Prior, data: Frames, counts: Counts, iterations: int, tolerance: float = 1e-3
) -> tuple[HMM, Counts, list[Tensor]]:
    """M- and E-steps in turn until no ELBO rises by more than ``tolerance`` nats: the posteriors,
    what they count, and the ELBO after each M-step, ``[R]``."""
    trace: list[Tensor] = []
    for _ in range(iterations):
        hmm = prior.updated(counts)
        evidence, counted = e_step(hmm, data)
        trace.append(evidence - prior.divergence(hmm))
        if len(trace) > 1 and bool((trace[-1] - trace[-2] < tolerance).all()):
            break
        assert counted is not None
        counts = counted
    return hmm, counts, trace


def blocks(data: Frames, num_states: int, generator: torch.Generator) -> Counts:
    """A start: the sequences end to end, cut at random into one block per state."""
    place = data.there.flatten().nonzero().squeeze(1)
    cuts = torch.randperm(len(place) - 1, generator=generator)[: num_states - 1] + 1
    which = torch.zeros(len(place), dtype=torch.long)
    which[cuts] = 1
    state = torch.zeros(data.there.numel(), dtype=torch.long)
    state[place] = which.cumsum(0)
    weight = one_hot(state, num_states).to(data.x) * data.there.reshape(-1, 1)
    by_frame = weight.view(*data.there.shape, num_states)
    moves = torch.einsum("sti,stj->ij", by_frame[:, :-1], by_frame[:, 1:])
    return Counts(by_frame[:, 0].sum(0), moves, weight.mT @ data.statistics)


@dataclass(frozen=True)
class Fit:
    """A fitted HMM.

    :ivar hmm: one posterior, ``R = 1``.
    :ivar elbo: its ELBO.
    """

    hmm: HMM
    elbo: float


def fit(
    sequences: Sequence[Tensor],
    prior: Prior,
    max_states: int = 20,
    restarts: int = 10,
    seed: int = 0,
    iterations: int = 100,
) -> Fit:
    """The best of several starts, its states merged while that raises the ELBO."""
    data = Frames.of(sequences)
    generator = torch.Generator().manual_seed(seed)
    starts = [blocks(data, max_states, generator) for _ in range(restarts)]
    _, counts, trace = ascend(prior, data, Counts.stack(starts), iterations)
    order = trace[-1].argsort(descending=True)[:_MERGED].tolist()
    merged = [merge(prior, data, counts.one(r), iterations) for r in order]
    return max(merged, key=lambda found: found.elbo)


def merge(prior: Prior, data: Frames, counts: Counts, iterations: int) -> Fit:
    """Of one fit, merge the two states for which the ELBO rises most, until it rises for none."""
    hmm, counts, trace = ascend(prior, data, counts, iterations)
    while hmm.num_states > 1:
        k = hmm.num_states
        groups = []
        for i, j in combinations(range(k), 2):
            group = torch.arange(k)
            group[j] = i
            groups.append(group - (group > j).long())
        joined = prior.updated(counts.joined(torch.stack(groups)))
        elbo = e_step(joined, data, count=False)[0] - prior.divergence(joined)
        top = int(elbo.argmax())
        if elbo[top] <= trace[-1][0]:
            break
        counts = counts.joined(groups[top][None])
        hmm, counts, trace = ascend(prior, data, counts, iterations)
    return Fit(hmm, float(trace[-1][0]))


# -- what a posterior predicts ---------------------------------------------------------------------


def predictive(hmm: HMM, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`viterbi` takes for one sequence ``[T, D]``: logarithms of the mean initial and
    transition probabilities, and of the Student t densities of the frames; of one fit."""
    e = hmm.emission
    df = e.df - x.shape[-1] + 1
    spread = (e.concentration + 1) / (e.concentration * df)
    scale = torch.linalg.cholesky(e.precision_matrix * spread[..., None, None])
    density = MultivariateStudentT(df, e.loc, scale).log_prob(x.unsqueeze(1))
    rows = hmm.transition / hmm.transition.sum(-1, keepdim=True)
    return (hmm.initial / hmm.initial.sum()).log()[0], rows.log()[0], density


def log_predictive(hmm: HMM, x: Tensor) -> float:
    """The log-density of a sequence ``[T, D]`` under :func:`predictive`."""
    initial, moves, density = (v.unsqueeze(0) for v in predictive(hmm, x))
    there = torch.ones(1, len(x), dtype=torch.bool)
    return float(forward(initial, moves, density, there)[0, -1].logsumexp(-1))
