# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The Indian buffet process and its finite form: distributions of which party has which atom."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_fusion.errors import ParameterError

__all__ = [
    "FiniteIndianBuffet",
    "IndianBuffetProcess",
    "harmonic_number",
    "popularity_log_weights",
]

_NEGLIGIBLE = 1e-12


def harmonic_number(n: int) -> float:
    """The harmonic number ``H_n = 1 + 1/2 + ... + 1/n``."""
    return float(torch.arange(1, n + 1, dtype=torch.float64).reciprocal().sum())


def popularity_log_weights(num_parties: int) -> Tensor:
    """The log weight ``log[(m-1)! (S-m)! / S!]`` of an atom of popularity ``m = 1, ..., S``:
    float64, shape ``[num_parties]``."""
    m = torch.arange(1, num_parties + 1, dtype=torch.float64)
    return torch.lgamma(m) + torch.lgamma(num_parties - m + 1) - math.lgamma(num_parties + 1)


class _PartiesByAtoms(TorchDistribution):
    """The base of both distributions: a matrix ``[S, K]`` of zeros and ones, and ``alpha``."""

    arg_constraints = {"alpha": constraints.positive}
    support = constraints.independent(constraints.boolean, 2)
    has_rsample = False

    def __init__(
        self,
        alpha: Tensor | float,
        num_parties: int,
        num_atoms: int,
        validate_args: bool | None = None,
    ) -> None:
        _check_positive_integer("num_parties", num_parties)
        _check_positive_integer("num_atoms", num_atoms)
        self.alpha = _as_floating(alpha)
        event_shape = Size((num_parties, num_atoms))
        super().__init__(self.alpha.shape, event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _PartiesByAtoms:
        """Expand the batch shape, as :meth:`torch.distributions.Distribution.expand` does."""
        new = self._get_checked_instance(type(self), _instance)
        new.alpha = self.alpha.expand(Size(batch_shape))
        super(_PartiesByAtoms, new).__init__(new.alpha.shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def num_parties(self) -> int:
        """S, the number of rows."""
        return self.event_shape[0]

    @property
    def num_atoms(self) -> int:
        """K, the number of columns."""
        return self.event_shape[1]


class IndianBuffetProcess(_PartiesByAtoms):
    r"""The distribution of which party has which atom, when the number of atoms is not known.

    .. math:: P([Z]) = \frac{\alpha^{K_+}}{\prod_h K_h!} e^{-\alpha H_S}
        \prod_{k=1}^{K_+} \frac{(m_k - 1)!\,(S - m_k)!}{S!}

    Value: event shape ``(num_parties, num_atoms)``, zeros and ones of the dtype of ``alpha``. A
    column is an atom, and one of zeros is only room: :math:`K_+` columns are not zero,
    :math:`m_k` parties have atom k, :math:`K_h` atoms have the very same parties, and
    :math:`H_S` is the harmonic number. Atoms have no order, so ``log_prob`` is the probability of
    the class :math:`[Z]` of all matrices that differ in the order of the columns or in the room: it
    takes any of them, gives the same for each, and sums to one over classes, not over matrices.

    Each party has Poisson(α) atoms, and there are Poisson(α H_S) in all. Samples come from the
    restaurant: party s takes an atom that m earlier parties have with probability m / s, and
    Poisson(α / s) new ones, so columns are in order of appearance. Given the class, that order has
    nothing to do with α.

    **In fusion** the components of a party are labelled, and an assignment is a partition of them
    all, at most one of each party in an atom. Given :math:`[Z]`, party s can give its :math:`L_s`
    components to its :math:`L_s` atoms in :math:`L_s!` ways, of which :math:`\prod_h K_h!` are the
    same partition. If all are equally likely, a partition has the probability
    :math:`P([Z]) \prod_h K_h! / \prod_s L_s!`. There the :math:`K_h!` are gone, and the
    :math:`L_s!` do not depend on the assignment: what is left is the prior of ``fuse``,
    :class:`~pyro_fusion.IndianBuffetPrior`.

    :param alpha: the mass parameter, positive, a number or a tensor of the batch shape.
    :param num_parties: S.
    :param num_atoms: room, the number of columns. By default the least for which Poisson(α H_S) is
        larger with a probability below 1e-12, for the largest alpha of the batch. To learn alpha
        or to score matrices at hand, give it, so that the shape does not change with alpha.
    :raises ParameterError: if ``num_parties`` or ``num_atoms`` is not a positive integer, or if the
        room is to be found for an alpha that is not positive and finite.
    :raises ValueError: under validation, if an alpha is not positive.

    Source: Griffiths & Ghahramani, *The Indian Buffet Process: An Introduction and Review* (JMLR
    2011), eq. 14.
    """

    def __init__(
        self,
        alpha: Tensor | float,
        num_parties: int,
        num_atoms: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if num_atoms is None:
            _check_positive_integer("num_parties", num_parties)
            num_atoms = _room(_as_floating(alpha), num_parties)
        super().__init__(alpha, num_parties, num_atoms, validate_args=validate_args)

    @property
    def mean_num_atoms(self) -> Tensor:
        """The expected number of atoms, ``α H_S``: the batch shape."""
        return self.alpha * harmonic_number(self.num_parties)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of the class of ``value``, shape ``(...)`` for value ``(..., S, K)``."""
        if self._validate_args:
            self._validate_sample(value)
        weights = popularity_log_weights(self.num_parties).to(self.alpha)
        by_popularity = F.pad(self.alpha.log().unsqueeze(-1) + weights, (1, 0))
        columns = _sum_over_columns(by_popularity, value)
        return columns - _log_repeats(value, columns.dtype) - self.mean_num_atoms

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw matrices in order of appearance, ``sample_shape + batch_shape + (S, K)``.

        :raises ParameterError: if there are more atoms than room.
        """
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            party = torch.arange(1, self.num_parties + 1).to(self.alpha)
            new = torch.poisson((self.alpha.unsqueeze(-1) / party).expand(shape[:-1]))
            seen = new.cumsum(-1)
            if bool((seen[..., -1] > self.num_atoms).any()):
                raise ParameterError(
                    f"num_atoms = {self.num_atoms} is too little room: {int(seen[..., -1].max())} "
                    "atoms were drawn; give a larger num_atoms"
                )
            atom = torch.arange(self.num_atoms).to(self.alpha)
            first = (atom >= (seen - new).unsqueeze(-1)) & (atom < seen.unsqueeze(-1))
            value = first.to(self.alpha.dtype)
            popularity = torch.zeros_like(value[..., 0, :])
            for s, row in enumerate(value.unbind(-2), start=1):
                row += torch.bernoulli(popularity / s)
                popularity += row
            return value


class FiniteIndianBuffet(_PartiesByAtoms):
    r"""The distribution of which party has which of K atoms: ``π_k ~ Beta(α / K, 1)``,
    ``z_sk ~ Bernoulli(π_k)``.

    .. math:: P(Z) = \prod_{k=1}^{K} \frac{\alpha}{K}
        \frac{\Gamma(m_k + \alpha / K)\,\Gamma(S - m_k + 1)}{\Gamma(S + 1 + \alpha / K)}

    Value: event shape ``(num_parties, num_atoms)``, zeros and ones of the dtype of ``alpha``;
    :math:`m_k` is the sum of column k. Here the columns are told apart, and ``log_prob`` sums to
    one over matrices. ``class_log_prob`` is the probability of a matrix in any order of its
    columns; with K it goes to that of :class:`IndianBuffetProcess`, as 1 / K.

    :param alpha: the mass parameter, positive, a number or a tensor of the batch shape.
    :param num_parties: S.
    :param num_atoms: K.
    :raises ParameterError: if ``num_parties`` or ``num_atoms`` is not a positive integer.
    :raises ValueError: under validation, if an alpha is not positive.

    Source: Griffiths & Ghahramani (JMLR 2011), the finite model whose limit they take.
    """

    @property
    def mean_num_atoms(self) -> Tensor:
        """The expected number of atoms that some party has: the batch shape."""
        return -self.num_atoms * self._column_log_prob()[..., 0].expm1()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of the matrix itself, shape ``(...)`` for value ``(..., S, K)``."""
        if self._validate_args:
            self._validate_sample(value)
        return _sum_over_columns(self._column_log_prob(), value)

    def class_log_prob(self, value: Tensor) -> Tensor:
        r"""Log probability of ``value`` in any order of its columns, :math:`K! / \prod_h K_h!`
        matrices, with :math:`K_h` the numbers of equal columns, those of zeros too."""
        log_prob = self.log_prob(value)
        zeros = (value.sum(-2) == 0).sum(-1)
        orders = math.lgamma(self.num_atoms + 1) - torch.lgamma(zeros.double() + 1)
        return log_prob + orders.to(log_prob.dtype) - _log_repeats(value, log_prob.dtype)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw matrices, ``sample_shape + batch_shape + (S, K)``."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            uniform = self.alpha.new_empty(shape[:-2] + (1, self.num_atoms)).uniform_()
            share = uniform.pow((self.num_atoms / self.alpha)[..., None, None])  # ~ Beta(α/K, 1)
            return torch.bernoulli(share.expand(shape))

    def _column_log_prob(self) -> Tensor:
        """Log probability of a column by its popularity 0, ..., S: ``batch_shape + (S + 1,)``."""
        # With a = α/K: a Γ(m + a) Γ(S - m + 1) / Γ(S + 1 + a) = S! / Π_{j=1}^S (j + a) for m = 0,
        # else a (m-1)! (S-m)! / S! / Π_{j=m}^S (1 + a/j). Thus nothing cancels where K is large.
        mass = (self.alpha / self.num_atoms).unsqueeze(-1)
        party = torch.arange(1, self.num_parties + 1).to(self.alpha)
        shrinkage = (mass / party).log1p().flip(-1).cumsum(-1).flip(-1)
        weights = popularity_log_weights(self.num_parties).to(self.alpha)
        return torch.cat([-shrinkage[..., :1], mass.log() + weights - shrinkage], dim=-1)


def _check_positive_integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ParameterError(f"{name} must be a positive integer, got {value!r}")


def _as_floating(alpha: Tensor | float) -> Tensor:
    tensor = torch.as_tensor(alpha)
    return tensor if tensor.is_floating_point() else tensor.to(torch.get_default_dtype())


def _room(alpha: Tensor, num_parties: int) -> int:
    """The least ``K`` with ``P(N > K)`` negligible for ``N ~ Poisson(α H_S)``, at least 1."""
    mean = float(alpha.detach().max()) * harmonic_number(num_parties)
    if not bool((alpha > 0).all()) or not math.isfinite(mean):
        raise ParameterError(f"alpha must be positive and finite, got {alpha.detach()}")
    # Bernstein's inequality: P(N >= mean + x) <= exp(-x² / (2 mean + 2x/3)).
    third = -math.log(_NEGLIGIBLE) / 3
    reach = third + math.sqrt(third**2 + 6 * third * mean)
    counts = torch.arange(math.floor(mean), math.ceil(mean + reach) + 1, dtype=torch.float64)
    beyond = torch.special.gammainc(counts + 1, torch.full_like(counts, mean))
    return max(1, int(counts[beyond < _NEGLIGIBLE][0]))


def _sum_over_columns(table: Tensor, value: Tensor) -> Tensor:
    """Sums over columns ``Σ_k table[..., m_k]``, batch shapes broadcast: ``[..., S + 1]``,
    ``[..., S, K]`` -> ``[...]``."""
    popularity = value.sum(-2).long()
    batch_shape = torch.broadcast_shapes(table.shape[:-1], popularity.shape[:-1])
    table, popularity = table.expand(batch_shape + (-1,)), popularity.expand(batch_shape + (-1,))
    return table.gather(-1, popularity).sum(-1)


def _log_repeats(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``Σ_h log K_h!``, with ``K_h`` the number of equal columns, but for those of zeros:
    ``[..., S, K] -> [...]``."""
    held = value[..., value.flatten(0, -2).any(0)].float()  # without columns that nobody ever has
    popularity = held.sum(-2)
    shared = held.mT @ held  # how many parties have both; exact up to 2^24
    same = (shared == popularity.unsqueeze(-1)) & (shared == popularity.unsqueeze(-2))
    # The n-th of equal columns adds log n.
    nth = same.tril().sum(-1).to(dtype)
    return torch.where(popularity > 0, nth, 1).log().sum(-1)
