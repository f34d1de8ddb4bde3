# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""The group-norm programme on a list of entries, by a primal-dual interior-point method.

.. math:: \min_{P, u \ge 0} \sum_i c_i P_i + \sum_k g_k \lVert P_k \rVert + \sum_n h_n u_n

over entries ``i``, each of an atom ``k`` and a column ``n``, where every column of ``P`` and its
``u`` add up to 1, and every row (an atom and a party) to at most 1. Tensor code: no loop over
atoms, columns, parties or pairs, only over blocks of parties; all sums in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Point", "Programme", "interior_point"]


@dataclass(frozen=True)
class Programme:
    """A group-norm programme: its entries, sorted by atom, then by column. Parties have ``W``
    columns each; a column without entries does no harm.

    :ivar cost: ``c``, ``[E]``.
    :ivar row: ``k S + s`` of each entry, ``[E]``.
    :ivar column: ``s W + l`` of each entry, ``[E]``.
    :ivar norm: ``g``, non-negative, ``[K]``.
    :ivar alone: ``h``, ``[S W]``.
    :ivar num_parties: ``S``.
    """

    cost: Tensor
    row: Tensor
    column: Tensor
    norm: Tensor
    alone: Tensor
    num_parties: int

    @property
    def width(self) -> int:
        """``W``, the number of columns of each party."""
        return len(self.alone) // self.num_parties

    @property
    def block(self) -> int:
        """``B``, the number of parties in a block of :meth:`spread`; the last may have fewer."""
        return min(self.num_parties, max(1, _MAX_NUMBERS // (len(self.norm) * self.width)))

    @cached_property
    def atom(self) -> Tensor:
        """The atom ``k`` of each entry, ``[E]``."""
        return self.row // self.num_parties

    @cached_property
    def lift(self) -> Tensor:
        """``g``, or 1 where it is zero, so that ``t`` of such an atom has somewhere to go."""
        return torch.where(self.norm > 0, self.norm, 1.0)

    @cached_property
    def _by_column(self) -> Tensor:
        return self.column.argsort(stable=True)

    @cached_property
    def _lengths(self) -> tuple[Tensor, Tensor, Tensor]:
        rows = len(self.norm) * self.num_parties
        return (
            torch.bincount(self.atom, minlength=len(self.norm)),
            torch.bincount(self.row, minlength=rows),
            torch.bincount(self.column, minlength=len(self.alone)),
        )

    def atoms(self, x: Tensor) -> Tensor:
        """Sums of entries ``[E]`` over each atom: ``[K]``."""
        return _sums(x, self._lengths[0])

    def rows(self, x: Tensor) -> Tensor:
        """Sums of entries ``[E]`` over each row: ``[K S]``."""
        return _sums(x, self._lengths[1])

    def columns(self, x: Tensor) -> Tensor:
        """Sums of entries ``[E]`` over each column: ``[S W]``."""
        return _sums(_at(x, self._by_column), self._lengths[2])

    @cached_property
    def _blocks(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """A buffer ``[B, K, W]``, and for each block of parties its entries and their places in the
        buffer."""
        entries, column = self._by_column, _at(self.column, self._by_column)
        party = column // self.width % self.block
        place = (party * len(self.norm) + _at(self.atom, entries)) * self.width
        place += column % self.width
        lengths = self._lengths[2].cpu().split(self.block * self.width)
        sizes = [int(n.sum()) for n in lengths]
        buffer = self.cost.new_empty(self.block, len(self.norm), self.width)
        return buffer, list(zip(entries.split(sizes), place.split(sizes), strict=True))

    def spread(self, x: Tensor) -> Iterator[Tensor]:
        """Entries ``[E]`` as ``[B, K, W]`` for one block of parties after another, all in the same
        memory: most numbers are zeros, and all blocks at once would take most of the memory."""
        buffer, blocks = self._blocks
        for i, (entries, place) in enumerate(blocks):
            buffer.zero_().view(-1).scatter_(0, place, _at(x, entries))
            yield buffer[: self.num_parties - i * self.block]

    def objective(self, p: Tensor) -> Tensor:
        """The objective of a feasible ``P``, ``[E]``."""
        norms = self.atoms(p.square()).sqrt()
        return p @ self.cost + norms @ self.norm + (1 - self.columns(p)) @ self.alone


def _at(x: Tensor, index: Tensor) -> Tensor:
    # x[index] gives the same, but takes three times as long.
    return x.index_select(0, index)


def _sums(x: Tensor, lengths: Tensor) -> Tensor:
    # Unlike index_add, this adds in the same order each time, on a GPU too.
    return torch.segment_reduce(x, "sum", lengths=lengths, initial=0, unsafe=True)


@dataclass(frozen=True)
class Point:
    """An iterate.

    :ivar p: exactly feasible, ``[E]``.
    :ivar y: multipliers of the columns, ``[S W]``.
    :ivar z: multipliers of the rows, non-negative, ``[K S]``.
    :ivar primal: the objective of ``p``.
    :ivar dual: ``Σ y - Σ z``: a lower bound in so far as the multipliers are feasible.
    """

    p: Tensor
    y: Tensor
    z: Tensor
    primal: float
    dual: float

    @property
    def difference(self) -> float:
        """``|primal - dual|``: near the optimum the duality gap, but for infeasibility."""
        return abs(self.primal - self.dual)


# Numbers in a block where entries are spread out, most of them zeros.
_MAX_NUMBERS = 1 << 17

# The fraction of the way to the boundary that a step goes.
_STEP = 0.99

# Added to the matrix of P and to its Schur complement: where atoms are free, the programme is a
# linear one with many optima, and without this rounding errors would stop the last iterations.
_DAMP_P, _DAMP_Y = 1e-4, 1e-8


def interior_point(a: Programme) -> Iterator[Point]:
    r"""Iterates that converge to the optimum; they end where rounding errors stop progress.

    With :math:`g \lVert P_k \rVert = \min_{t > 0} g (\lVert P_k \rVert^2 / t + t) / 2` the
    objective is smooth; there are barriers for ``P, u, t`` and the rows' slacks. A Newton matrix is
    diagonal but for a term of rank one for each row and each atom, so its Schur complement for the
    columns is a batch of ``W x W`` matrices, one for each party, and a term of rank ``K``. Ten to
    thirty steps do what takes a primal-dual hybrid gradient method hundreds to thousands of its
    cheaper ones, and there is no step size to tune.

    Source: Mehrotra, *On the implementation of a primal-dual interior point method* (SIAM J.
    Optimization 1992), with the curvature of the smooth part in the corrector.
    """
    state = _State.start(a)
    while True:
        state = _Newton(a, state).step()
        p = state.p / _at(a.rows(state.p).clamp(min=1), a.row)
        p = p / _at(a.columns(p).clamp(min=1), a.column)
        dual = state.y.sum() - state.z.sum()
        # Read at once all that the host has to know: a GPU waits meanwhile. Sums show NaN too.
        primal, dual, whole = torch.stack([a.objective(p), dual, state.p.sum()]).tolist()
        if not (math.isfinite(primal) and math.isfinite(dual) and math.isfinite(whole)):
            return
        yield Point(p, state.y, state.z, primal, dual)


@dataclass(frozen=True)
class _State:
    """Primal variables with the dual of each: ``P`` and ``q``, ``u`` and ``v``, the rows' slack
    ``r`` and ``z``, ``t`` and ``w``; and the multipliers of the columns."""

    p: Tensor
    u: Tensor
    r: Tensor
    t: Tensor
    q: Tensor
    v: Tensor
    z: Tensor
    w: Tensor
    y: Tensor

    @classmethod
    def start(cls, a: Programme) -> _State:
        one = torch.ones_like(a.cost)
        most = torch.maximum(_at(a.columns(one), a.column), _at(a.rows(one), a.row))
        p = 1 / (1 + most)
        u, r = 1 - a.columns(p), 1 - a.rows(p)
        t = 1.5 * a.atoms(p.square()).sqrt() + 1e-3
        v = 0.1 / u
        w = torch.minimum(a.lift / 4, 0.1 / t)
        return cls(p, u, r, t, 0.1 / p.clamp(min=0.1), v, 0.1 / r, w, a.alone - v)

    @property
    def primal(self) -> tuple[Tensor, ...]:
        return self.p, self.u, self.r, self.t

    @property
    def dual(self) -> tuple[Tensor, ...]:
        return self.q, self.v, self.z, self.w


class _Newton:
    """The linearised conditions of optimality at a state, factorised."""

    def __init__(self, a: Programme, x: _State) -> None:
        self.a, self.x = a, x
        square = a.atoms(x.p.square())
        self.slope = a.norm / x.t
        slope = _at(self.slope, a.atom)
        # Residuals of stationarity in P, u and t, and of the sums of columns and rows.
        self.res_p = a.cost + slope * x.p - _at(x.y, a.column) + _at(x.z, a.row) - x.q
        self.res_u = a.alone - x.y - x.v
        self.res_t = a.lift / 2 - a.norm / 2 * square / x.t**2 - x.w
        self.res_column = 1 - a.columns(x.p) - x.u
        self.res_row = 1 - a.rows(x.p) - x.r
        # The matrix of P is 1/inverse + (one of each row)(z/r)(its transpose) - ee'; its inverse
        # diag(inverse) - (a row's by_row)(its transpose) + (an atom's by_atom)(its transpose).
        ratio = x.q / x.p + _DAMP_P
        self.inverse = 1 / (ratio + slope)
        rho = x.z / x.r
        share = (rho / (1 + rho * a.rows(self.inverse))).sqrt()
        self.by_row = self.inverse * _at(share, a.row)
        self.curve = a.norm * square / x.t**3 + x.w / x.t
        self.pull = a.norm / x.t**2
        e = _at(self.pull / self.curve.sqrt(), a.atom) * x.p
        along = a.rows(e * self.by_row)
        # 1 - e' (...)^-1 e, without its cancellation.
        rest = _at(a.norm / (x.t**3 * self.curve), a.atom) * x.p.square() * ratio * self.inverse
        along_atom = along.square().view(len(a.norm), -1).sum(1)
        rest = x.w / (x.t * self.curve) + a.atoms(rest) + along_atom
        self.by_atom = self.inverse * e - _at(along, a.row) * self.by_row
        self.by_atom = self.by_atom / _at(rest.sqrt(), a.atom)
        # The Schur complement for the columns: a block for each party, plus F'F, where F [K, S W]
        # is by_atom. Dense are only the blocks' inverses, root' root, and 1 + F (these) F'.
        self.root = self._root()
        core = torch.eye(len(a.norm), dtype=e.dtype, device=e.device)
        for root, f in zip(self.root.split(a.block), a.spread(self.by_atom), strict=True):
            f = f @ root.mT
            core.addbmm_(f, f.mT)
        self.core = _cholesky(core)

    def _root(self) -> Tensor:
        """``root``, ``[S, W, W]``: the inverse of block ``s`` is ``root[s]' root[s]``.
        Intermediate tensors are as large, and are freed on return."""
        a, x = self.a, self.x
        diagonal = a.columns(self.inverse) + x.u / x.v + _DAMP_Y
        blocks = torch.diag_embed(diagonal.view(-1, a.width))
        for block, by_row in zip(blocks.split(a.block), a.spread(self.by_row), strict=True):
            block.baddbmm_(by_row.mT, by_row, alpha=-1)
        one = torch.eye(a.width, dtype=blocks.dtype, device=blocks.device).expand_as(blocks)
        return torch.linalg.solve_triangular(_cholesky(blocks), one, upper=False)

    def _solve(self, x: Tensor) -> Tensor:
        """Solve with the matrix of ``P``."""
        a = self.a
        rows = _at(a.rows(self.by_row * x), a.row)
        atoms = _at(a.atoms(self.by_atom * x), a.atom)
        return self.inverse * x - self.by_row * rows + self.by_atom * atoms

    def _solve_blocks(self, x: Tensor) -> Tensor:
        """Solve with the blocks of the Schur complement."""
        return (self.root.mT @ (self.root @ x.view(-1, self.a.width, 1))).flatten()

    def _solve_columns(self, x: Tensor) -> Tensor:
        """Solve with the Schur complement."""
        a = self.a
        x = self._solve_blocks(x)
        inner = a.atoms(self.by_atom * _at(x, a.column))
        inner = torch.cholesky_solve(inner[:, None], self.core).squeeze(1)
        return x - self._solve_blocks(a.columns(self.by_atom * _at(inner, a.atom)))

    def direction(
        self, products: list[Tensor], curve_p: Tensor | float = 0.0, curve_t: Tensor | float = 0.0
    ) -> _State:
        """The change that meets the linearised conditions, with ``products`` the changes of primal
        times dual variables."""
        a, x = self.a, self.x
        of_p, of_u, of_r, of_t = products
        force = of_t / x.t - self.res_t - curve_t
        rhs = of_p / x.p - self.res_p - curve_p
        rhs = rhs - _at((of_r - x.z * self.res_row) / x.r, a.row)
        rhs = rhs + _at(self.pull * force / self.curve, a.atom) * x.p
        lack = self.res_column - (of_u - x.u * self.res_u) / x.v
        y = self._solve_columns(lack - a.columns(self._solve(rhs)))
        p = self._solve(_at(y, a.column) + rhs)
        r = self.res_row - a.rows(p)
        t = (force + self.pull * a.atoms(x.p * p)) / self.curve
        v = self.res_u - y
        u = (of_u - x.u * v) / x.v
        q, z, w = (of_p - x.q * p) / x.p, (of_r - x.z * r) / x.r, (of_t - x.w * t) / x.t
        return _State(p, u, r, t, q, v, z, w, y)

    def step(self) -> _State:
        """Predict, correct, and go most of the way to the boundary."""
        a, x = self.a, self.x
        pairs = list(zip(x.primal, x.dual, strict=True))
        d = self.direction([-s * t for s, t in pairs])
        along, across = _reach(x.primal, d.primal), _reach(x.dual, d.dual)
        changes = list(zip(pairs, d.primal, d.dual, strict=True))
        now = torch.stack([s @ t for s, t in pairs]).sum()
        ahead = [(s + along * ds) @ (t + across * dt) for (s, t), ds, dt in changes]
        then = torch.stack(ahead).sum()
        centre = (then / now).clamp(1e-6, 1) ** 3 * now / sum(len(s) for s, _ in pairs)
        # Second-order terms, in proportion to how much of the prediction is feasible.
        part = along * across
        products = [centre - s * t - part * ds * dt for (s, t), ds, dt in changes]
        turn = d.t / x.t
        # First-order change of P / t.
        tilt = d.p / _at(x.t, a.atom) - x.p * _at(turn / x.t, a.atom)
        curve_p = -part * _at(a.norm * turn, a.atom) * tilt
        bend = a.atoms(tilt.square()) - 2 * turn * a.atoms(x.p * tilt) / x.t
        d = self.direction(products, curve_p, -part * a.norm / 2 * bend)
        along = (_STEP * _reach(x.primal, d.primal)).clamp(max=1)
        across = (_STEP * _reach(x.dual, d.dual)).clamp(max=1)
        primal = (s + along * ds for s, ds in zip(x.primal, d.primal, strict=True))
        dual = (s + across * ds for s, ds in zip((*x.dual, x.y), (*d.dual, d.y), strict=True))
        return _State(*primal, *dual)


def _reach(x: tuple[Tensor, ...], d: tuple[Tensor, ...]) -> Tensor:
    """The part of the change ``d``, at most 1, that keeps all of ``x`` non-negative."""
    worst = torch.stack([(-dx / x).amax() for x, dx in zip(x, d, strict=True)]).amax()
    return worst.clamp(min=1).reciprocal()


def _cholesky(x: Tensor) -> Tensor:
    """The Cholesky factor; NaN where ``x`` is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(x)
    return factor.masked_fill_((failed != 0)[..., None, None], torch.nan)
