# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Random matchings of components to atoms, and their relaxation for gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.utils import lazy_property
from torch.nn.functional import pad

from pyro_fusion.errors import ParameterError, StructureError, broadcast_shapes, warn_user

__all__ = ["MAX_ENUMERATED", "MAX_EXACT", "Matching", "RelaxedMatching", "relax"]

MAX_EXACT = 14  # components up to which sums over matchings are exact, by 2^L subsets for each atom
MAX_ENUMERATED = math.factorial(8)  # matchings up to which `enumerate_support` lists them
_SWEEPS_PER_ATOM = 20  # of the Metropolis chain
_MAX_MESSAGES = 1000  # rounds of belief propagation
_MAX_STEPS = 1000  # of Sinkhorn or Newton, down to the temperature
_TOLERANCE = 1e-6  # of the sums of a relaxed matching
_ALL_FORBIDDEN = "expected a matching that is allowed, but logits of -inf forbid them all"


class _Injections(constraints.Constraint):
    """Different integers from 0 to ``num_atoms - 1`` along the last dimension."""

    is_discrete = True
    event_dim = 1

    def __init__(self, num_atoms: int) -> None:
        self.num_atoms = num_atoms

    def check(self, value: Tensor) -> Tensor:
        atoms = (value % 1 == 0) & (value >= 0) & (value < self.num_atoms)
        return atoms.all(-1) & (value.sort(-1).values.diff(dim=-1) != 0).all(-1)


class _RelaxedInjections(constraints.Constraint):
    """Non-negative matrices whose rows sum to 1 and whose columns to at most 1."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        rows = ((value.sum(-1) - 1).abs() <= _TOLERANCE).all(-1)
        return rows & (value.sum(-2) <= 1 + _TOLERANCE).all(-1) & (value >= 0).all(-1).all(-1)


class _OfPairs(TorchDistribution):
    arg_constraints = {"logits": constraints.independent(constraints.less_than(math.inf), 2)}

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Expand the batch shape, as :meth:`torch.distributions.Distribution.expand` does."""
        new = self._get_checked_instance(type(self), _instance)
        for name in self.arg_constraints:
            value, dim = getattr(self, name), len(self.batch_shape)
            setattr(new, name, value.expand(Size(batch_shape) + value.shape[dim:]))
        super(_OfPairs, new).__init__(Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new


class Matching(_OfPairs):
    """``p(a) ∝ exp Σ_l logits[l, a_l]`` over the matchings of L components to K atoms, L <= K.

    Each component has exactly one atom, each atom at most one component. Value: LongTensor of
    event shape ``(L,)``, the atom of each component. Up to ``MAX_EXACT`` components all is
    exact, in ``O(2^L L K)`` time. Beyond, :attr:`log_normalizer` and :meth:`log_prob` are the Bethe
    approximation and :meth:`sample` runs a Markov chain.

    :param logits: ``[*batch, L, K]``; ``-inf`` forbids a pair.
    :raises StructureError: fewer atoms than components.
    :raises ParameterError: from members that need a matching, when all are forbidden.
    :raises ValueError: under validation, logits of NaN or ``+inf``.
    """

    has_enumerate_support = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        _check_shape(logits)
        self.logits = logits
        super().__init__(logits.shape[:-2], logits.shape[-2:-1], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        return _Injections(self.logits.shape[-1])

    @property
    def is_exact(self) -> bool:
        """True if the normaliser and draws are exact."""
        return self.event_shape[0] <= MAX_EXACT

    @property
    def _distinct(self) -> Tensor:
        """The logits with size 1 along each dimension that is merely expanded (by a plate)."""
        return self.logits[tuple(slice(None if s else 1) for s in self.logits.stride()[:-2])]

    @lazy_property
    def _tables(self) -> list[Tensor]:
        return _subset_tables(self._distinct)

    @lazy_property
    def log_normalizer(self) -> Tensor:
        """``log Σ_a exp Σ_l logits[l, a_l]``, the log permanent of ``exp(logits)``, ``[*batch]``.

        Differentiable. Beyond ``MAX_EXACT`` components it is the Bethe approximation, a lower bound
        that can be differentiated once: its gradient, the beliefs, has none. Source: Vontobel,
        *The Bethe permanent of a nonnegative matrix* (2013); here columns may also stay empty.
        """
        total = self._tables[-1][..., -1] if self.is_exact else _bethe(self._distinct)
        return total.expand(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """``Σ_l logits[l, value_l] - log_normalizer``, shape ``(...)`` for value ``(..., L)``:
        ``-inf`` for a forbidden pair and, if validation is off, for a value that is no matching."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        logits = self.logits.expand(shape + self.logits.shape[-2:])
        atom = value.long().clamp(0, logits.shape[-1] - 1).expand(logits.shape[:-1]).unsqueeze(-1)
        score = logits.gather(-1, atom).squeeze(-1).sum(-1) - self.log_normalizer
        return score.masked_fill(~self.support.check(value), -math.inf)

    @lazy_property
    def mode(self) -> Tensor:
        """A most probable matching, ``[*batch, L]``, by scipy on the CPU."""
        return _best(self._distinct).expand(self.batch_shape + self.event_shape)

    def marginals(self, method: str | None = None) -> Tensor:
        """``P(component l has atom k)``, ``[*batch, L, K]``.

        :param method: ``"exact"`` (differentiable), ``"bp"`` (belief propagation; no gradients), or
            None for exact where :attr:`is_exact`.
        :raises ParameterError: another method, or exact beyond ``MAX_EXACT`` components.
        """
        exact = self.is_exact if method is None else method == "exact"
        if method not in (None, "exact", "bp") or exact > self.is_exact:
            what = f'"bp" or, if L <= {MAX_EXACT}, "exact"'
            raise ParameterError(f"expected {what}, got {method!r} and L = {self.event_shape[0]}")
        if not exact:
            return _beliefs(self._distinct).expand(self.logits.shape)
        logits, keep = self._distinct, torch.is_grad_enabled() and self.logits.requires_grad
        with torch.enable_grad():
            logits = logits if keep else logits.detach().requires_grad_()
            total = _subset_tables(logits)[-1][..., -1].sum()
            (slope,) = torch.autograd.grad(total, logits, create_graph=keep)
        return slope.expand(self.logits.shape)

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw matchings, LongTensor ``sample_shape + batch_shape + (L,)``.

        Exact where :attr:`is_exact`. Beyond, a Metropolis chain for each draw: it starts from the
        best matching for logits with Gumbel noise (scipy, on the CPU); each of ``20 K`` sweeps
        pairs all atoms at random and proposes to swap each pair, which forbidden pairs may hinder.
        """
        shape = Size(sample_shape) + self.batch_shape
        if self.is_exact:
            return _draw(self._distinct, self._tables, shape)
        return _swap_chain(self.logits, shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All ``K! / (K - L)!`` matchings, forbidden ones too, ``[number, *batch, L]``.

        Batch dimensions have size 1 where ``expand`` is False, as Pyro's enumeration wants them.

        :raises ParameterError: more than ``MAX_ENUMERATED`` matchings.
        """
        num_components, num_atoms = self.logits.shape[-2:]
        number = math.perm(num_atoms, num_components)
        if number > MAX_ENUMERATED:
            what = f"{number} (L = {num_components}, K = {num_atoms})"
            raise ParameterError(f"expected at most {MAX_ENUMERATED} matchings, got {what}")
        listed = list(itertools.permutations(range(num_atoms), num_components))
        value = torch.tensor(listed, dtype=torch.long, device=self.logits.device)
        value = value.reshape((number,) + (1,) * len(self.batch_shape) + self.event_shape)
        return value.expand((-1,) + self.batch_shape + self.event_shape) if expand else value


class RelaxedMatching(_OfPairs):
    """Matrices near matchings, reparametrised: Gumbel-Sinkhorn.

    The value ``[*batch, L, K]`` maximises ``Σ P (logits + noise) + temperature · H(P)`` over the
    matrices P whose rows sum to 1 and columns to at most 1, with Gumbel noise and H the entropy
    with that of the unused parts. As the temperature falls to 0 it becomes the 0/1 matrix of the
    best matching for ``logits + noise``, which is near, but not, a draw of :attr:`matching`.
    Computed in double precision. There is no density: in a Pyro program use ``.mask(False)``.

    :param logits: ``[*batch, L, K]``, L <= K; ``-inf`` forbids a pair.
    :param temperature: positive, a number or ``[*batch]``.
    :raises: as :class:`Matching` does, and ValueError for batch shapes that do not broadcast.

    Source: Mena et al., *Learning latent permutations with Gumbel-Sinkhorn networks* (ICLR 2018).
    """

    arg_constraints = _OfPairs.arg_constraints | {"temperature": constraints.positive}
    support = _RelaxedInjections()
    has_rsample = True

    def __init__(
        self, logits: Tensor, temperature: Tensor | float, validate_args: bool | None = None
    ) -> None:
        _check_shape(logits)
        temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
        batch = broadcast_shapes({"logits": logits.shape[:-2], "temperature": temperature.shape})
        self.logits = logits.expand(batch + logits.shape[-2:])
        self.temperature = temperature.expand(batch)
        super().__init__(batch, logits.shape[-2:], validate_args=validate_args)

    @lazy_property
    def matching(self) -> Matching:
        """The :class:`Matching` with the same logits."""
        return Matching(self.logits, validate_args=False)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw ``sample_shape + batch_shape + (L, K)``, with gradients."""
        forbidden = self.logits.isneginf()
        if forbidden.any():
            _ = self.matching.mode  # raises where no matching is left
        allowed = self.logits.masked_fill(forbidden, 0)  # -inf / temperature has NaN gradients
        noisy = allowed + _gumbel(Size(sample_shape) + self.logits.shape, allowed)
        scores = noisy.double() / self.temperature.double()[..., None, None]
        return relax(scores.masked_fill(forbidden, -math.inf)).to(self.logits.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Not available: raises NotImplementedError."""
        raise NotImplementedError("RelaxedMatching has no tractable density: use .mask(False)")


def _check_shape(logits: Tensor) -> None:
    if logits.dim() < 2 or not logits.shape[-2] <= logits.shape[-1] > 0:
        raise StructureError(f"expected logits [*batch, L, K], L <= K, got {list(logits.shape)}")


def _gumbel(shape: Size, like: Tensor) -> Tensor:
    return like.new_empty(shape).exponential_().log().neg()


def _best(logits: Tensor) -> Tensor:
    """The matching of the highest total for each matrix of a batch, on the logits' device."""
    from scipy.optimize import linear_sum_assignment  # slow to import: only when needed

    scores = logits.detach().double().cpu().numpy()
    atoms = np.empty(scores.shape[:-1], dtype=np.int64)
    try:
        for index in np.ndindex(scores.shape[:-2]):
            atoms[index] = linear_sum_assignment(scores[index], maximize=True)[1]
    except ValueError as error:
        raise ParameterError(_ALL_FORBIDDEN) from error
    return torch.from_numpy(atoms).to(logits.device)


def _predecessors(num_components: int, device: torch.device) -> Tensor:
    """The subsets from which each subset of components arises when an atom is added,
    ``[2^L, 1 + L]``: itself, if the atom stays unused; the subset without component l, or ``2^L``,
    which is none, if l is not in it."""
    subsets = torch.arange(2**num_components, device=device).unsqueeze(-1)
    bits = 2 ** torch.arange(num_components, device=device)
    return torch.cat([subsets, torch.where(subsets & bits > 0, subsets - bits, len(subsets))], -1)


def _subset_tables(logits: Tensor) -> list[Tensor]:
    """Entry k: for each subset, the log sum over its matchings to the first k atoms, [*, 2^L]."""
    before = _predecessors(logits.shape[-2], logits.device)
    table = logits.new_full(logits.shape[:-2] + (len(before),), -math.inf)
    table[..., 0] = 0
    tables = [table]
    for weight in pad(logits.mT, (1, 0)).unbind(-2):  # logit 0: the atom stays unused
        terms = pad(table, (0, 1), value=-math.inf)[..., before] + weight.unsqueeze(-2)
        none = terms.isneginf().all(-1)  # of which logsumexp would have NaN gradients
        table = terms.masked_fill(none.unsqueeze(-1), 0).logsumexp(-1).masked_fill(none, -math.inf)
        tables.append(table)
    if table[..., -1].isneginf().any():
        raise ParameterError(_ALL_FORBIDDEN)
    return tables


def _draw(logits: Tensor, tables: list[Tensor], shape: Size) -> Tensor:
    """Exact draws: from the last atom to the first, the component that it takes, if any."""
    before = _predecessors(logits.shape[-2], logits.device)
    subset = torch.full(shape, len(before) - 1, device=logits.device)
    value = subset.new_zeros(shape + before.shape[-1:])  # first of atoms that stay unused
    for atom in reversed(range(logits.shape[-1])):
        options = before[subset]
        table = pad(tables[atom], (0, 1), value=-math.inf).expand(shape + (-1,))
        scores = table.gather(-1, options) + pad(logits[..., atom], (1, 0))
        choice = (scores + _gumbel(scores.shape, scores)).argmax(-1, keepdim=True)
        value = value.scatter(-1, choice, atom)
        subset = options.gather(-1, choice).squeeze(-1)
    return value[..., 1:]


def _swap_chain(logits: Tensor, shape: Size) -> Tensor:
    """The end of a Metropolis chain for each of ``shape``; see :meth:`Matching.sample`."""
    num_components, num_atoms = logits.shape[-2:]
    start = _best(logits + _gumbel(shape + logits.shape[-2:], logits))
    used = torch.zeros(shape + (num_atoms,), device=logits.device).scatter(-1, start, 1.0)
    # Rows of logit 0 hold the unused atoms, so that a swap may also take one up.
    held = torch.cat([start, used.argsort(-1)[..., : num_atoms - num_components]], -1)
    square = pad(logits, (0, 0, 0, num_atoms - num_components)).flatten(-2).expand(shape + (-1,))
    half = num_atoms // 2
    for _ in range(_SWEEPS_PER_ATOM * num_atoms):
        # Pairs are disjoint, so, given the pairing, each swap is a Metropolis step of its own.
        row = torch.rand_like(used).argsort(-1)[..., : 2 * half]
        now, then = held.gather(-1, row), held.gather(-1, row.roll(half, -1))
        gain = square.gather(-1, row * num_atoms + then) - square.gather(-1, row * num_atoms + now)
        gain = gain[..., :half] + gain[..., half:]
        accept = (torch.rand_like(gain).log() < gain).repeat((1,) * len(shape) + (2,))
        held = held.scatter(-1, row, torch.where(accept, then, now))
    return held[..., :num_components]


def _exclusive_logsumexp(x: Tensor, dim: int) -> Tensor:
    """Logsumexp over all entries but the one itself, by sums from both ends, since a difference
    would cancel."""
    x = pad(x.movedim(dim, -1), (1, 1), value=-math.inf)
    before, after = x[..., :-2].logcumsumexp(-1), x[..., 2:].flip(-1).logcumsumexp(-1).flip(-1)
    return torch.logaddexp(before, after).movedim(-1, dim)


@torch.no_grad()
def _beliefs(logits: Tensor) -> Tensor:
    """Marginals by belief propagation between rows (exactly one atom) and columns (at most one).

    Messages are log odds of a pair. :mod:`pyro.contrib.tracking.assignment` has kindred ones, but
    there a row may also be spurious, at logit 0, and logits are clamped to ±40: it cannot say
    "exactly one atom", nor forbid a pair.

    Source: Huang and Jebara, *Approximating the permanent with belief propagation* (2009);
    Williams and Lau, *Approximate evaluation of marginal association probabilities* (2014).
    """
    forbidden = logits.isneginf()
    if forbidden.any():
        _best(logits)  # raises where no matching is left, which messages do not notice
    # Where all atoms are needed no column may stay empty: told so, messages converge much faster.
    spare = (~forbidden).any(-2).sum(-1)[..., None, None] > logits.shape[-2]
    empty = torch.zeros_like(logits).masked_fill(~spare, -math.inf)
    bound = torch.finfo(logits.dtype).max ** 0.5  # only what is forced or excluded gets there
    to_row, beliefs = torch.zeros_like(logits), logits.softmax(-1)
    for _ in range(_MAX_MESSAGES):
        others = _exclusive_logsumexp(logits + to_row, -1).clamp(-bound, bound)
        rivals = torch.logaddexp(_exclusive_logsumexp(logits - others, -2), empty)
        to_row = -rivals.clamp(-bound, bound)
        last, beliefs = beliefs, (logits + to_row).softmax(-1)
        if not ((beliefs - last).abs() > torch.finfo(logits.dtype).eps ** 0.75).any():
            break
    return beliefs


def _bethe(logits: Tensor) -> Tensor:
    """The Bethe approximation of the log normaliser: ``Σ b logits`` plus the Bethe entropy of the
    beliefs b, which are at its maximum."""
    b, entr = _beliefs(logits), torch.special.entr
    pairs = b * logits.masked_fill(logits.isneginf(), 0) + entr(b) - entr(1 - b)
    return pairs.sum((-2, -1)) + entr((1 - b.sum(-2)).clamp(min=0)).sum(-1)


def relax(scores: Tensor) -> Tensor:
    """``softmax(scores + price)`` with prices of the atoms at which columns sum to 1, together with
    a row of zeros that counts K - L times: the value of :class:`RelaxedMatching`."""
    count = scores.new_ones(scores.shape[-2] + 1, 1)
    count[-1] = scores.shape[-1] - scores.shape[-2]
    scores = pad(scores, (0, 0, 0, 1))

    def excess(scores: Tensor, price: Tensor) -> Tensor:
        return (count * (scores + price.unsqueeze(-2)).softmax(-1)).sum(-2) - 1

    def newton(scores: Tensor, price: Tensor) -> Tensor:
        soft = (scores + price.unsqueeze(-2)).softmax(-1).detach()
        hessian = (count * soft).sum(-2).diag_embed() - soft.mT @ (count * soft)
        # A constant is free in the prices, hence the 1; the rest bounds steps at near-ties.
        hessian = hessian + 1 + 1e-12 * torch.ones_like(price).diag_embed()
        # Nearly always solvable; "_ex" does not make a GPU wait to say so.
        step, _ = torch.linalg.solve_ex(hessian, excess(scores, price).unsqueeze(-1))
        return step.squeeze(-1)

    with torch.no_grad():
        price = torch.zeros_like(scores[..., 0, :])
        # At a low temperature Sinkhorn takes very long from afar: halve it step by step.
        size = scores.masked_fill(scores.isneginf(), 0).abs().amax((-2, -1))
        size = size.clamp(1, torch.finfo(size.dtype).max / 4)
        heat = size.log2().ceil().exp2().unsqueeze(-1)
        for _ in range(_MAX_STEPS):
            warm = scores / heat.unsqueeze(-1)
            now = excess(warm, price)
            hot = heat > 1
            # At higher temperatures a rough solution is enough.
            hold = ~(now.abs() > torch.where(hot, 0.1, _TOLERANCE / 10)).any(-1, keepdim=True)
            cool = hold & hot
            # Read at once: a GPU waits meanwhile.
            converged, rough = torch.stack([(hold & ~hot).all(), hold.all()]).tolist()
            if converged:
                break
            if rough:
                price = torch.where(cool, 2 * price, price)
                heat = torch.where(cool, heat / 2, heat)
                continue
            # Sinkhorn's step never raises the sum of deviations; Newton's is fast if not long.
            safe, step = price - now.log1p(), newton(warm, price)
            fast = price - step / step.abs().amax(-1, keepdim=True).clamp(min=1)
            better = excess(warm, fast).abs().sum(-1) < excess(warm, safe).abs().sum(-1)
            moved = torch.where(better.unsqueeze(-1), fast, safe)
            price = torch.where(cool, 2 * moved, torch.where(hold, price, moved))
            heat = torch.where(cool, heat / 2, heat)
        else:
            if bool((excess(scores, price).abs() > _TOLERANCE).any()):
                warn_user("RelaxedMatching did not converge: columns do not sum to at most 1")
    # Gradients of the exact solution, by a Newton step whose value is 0.
    step = newton(scores, price)
    return (scores + (price + step.detach() - step).unsqueeze(-2)).softmax(-1)[..., :-1, :]
