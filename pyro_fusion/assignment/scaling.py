# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The entropic assignment of every party at fixed prices: all parties at once, by Sinkhorn, and by
Newton where that is slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_fusion.assignment.problem import party_of

__all__ = ["Scaled", "Scaling"]

# The factor from one temperature to the next, and up to what rows must hold on the way.
_COOLING, _ROUGHLY = 0.25, 0.1

# The number of Sinkhorn steps at a temperature before Newton's, which cost more and, further away,
# are no better; and the longest Newton step, in units of the temperature.
_PATIENCE, _LONGEST = 5, 2.0

# Added to Newton's matrix, which is singular where atoms and components are as many.
_RIDGE = 1e-12

# Numbers in a block where parties are spread out.
_MAX_NUMBERS = 1 << 20


@dataclass(frozen=True)
class Scaled:
    """The result of :meth:`Scaling.solve`.

    :ivar p: ``[N, K]``, or ``[N, K + 1]`` with new atoms; the columns of ``P`` are its rows.
    :ivar rows: their sums over each party.
    :ivar dual: multipliers of the row constraints, ``[S, K]``, never positive.
    :ivar heat: the temperature that each party has come down to, ``[S, 1]``.
    :ivar iterations: the number of times that ``p`` was computed.
    :ivar converged: whether all parties are at the final temperature, and the rows hold.
    """

    p: Tensor
    rows: Tensor
    dual: Tensor
    heat: Tensor
    iterations: int
    converged: bool


class Scaling:
    """The party of each component, and the parties in groups of similar sizes.

    :ivar party: of each component, ``[N]``.
    :ivar lengths: components of each party, ``[S]``.
    """

    def __init__(self, sizes: Sequence[int], num_atoms: int, device: torch.device) -> None:
        self.num_atoms = num_atoms
        lengths = torch.tensor(sizes)
        party = party_of(sizes)
        self.lengths = lengths.to(device, non_blocking=True)
        self.party = party.to(device, non_blocking=True)
        # For each group its parties and the places of their components, N where there is none: on
        # the CPU, where it is decided which parties Newton's method takes.
        self._groups: list[tuple[Tensor, Tensor]] = []
        first, width = lengths.cumsum(0) - lengths, max(sizes)
        while width > 0:
            members = ((lengths <= width) & (2 * lengths > width)).nonzero().squeeze(1)
            at = torch.arange(width)
            inside = at < lengths[members, None]
            place = torch.where(inside, first[members, None] + at, len(party))
            part = max(1, _MAX_NUMBERS // (width * num_atoms))
            self._groups += zip(members.split(part), place.split(part), strict=True)
            width //= 2

    def sums(self, p: Tensor) -> Tensor:
        """Sums of ``p``, ``[N, K]``, over each party: ``[S, K]``."""
        return torch.segment_reduce(p, "sum", lengths=self.lengths, initial=0, unsafe=True)

    def solve(
        self,
        cost: Tensor,
        price: Tensor,
        dual: Tensor,
        heat: Tensor,
        temperature: float,
        tolerance: float,
        limit: int,
    ) -> Scaled:
        """Scale until rows add up to at most 1, and to 1 where their multiplier is negative.

        A column is a softmax. A step of Sinkhorn moves a row's multiplier by the temperature times
        the logarithm of its sum, which at a low temperature takes very many steps from afar: so
        each party cools down from ``heat``. Near ties Sinkhorn is slow at any temperature: Newton's
        method takes over, until it makes rows worse.

        :param cost: ``[N, K]``, or ``[N, K + 1]`` with new atoms.
        :param price: of each atom for each party, ``[S, K]``.
        :param dual: multipliers to start from, ``[S, K]``.
        :param heat: of each party, ``[S, 1]``, at least the temperature.
        :param tolerance: allowed error of the sums of rows.
        :param limit: the most iterations.
        """
        slack, tiny = cost.shape[1] - self.num_atoms, torch.finfo(cost.dtype).tiny
        last = torch.full_like(heat, torch.inf)  # what was off before Newton's step, or infinity
        age = torch.zeros_like(heat)
        safe, iteration = dual, 0
        while True:
            iteration += 1
            logits = pad(dual - price, (0, slack)).index_select(0, self.party).sub_(cost)
            p = torch.softmax(logits.div_(heat.index_select(0, self.party)), 1)
            rows = self.sums(p)[:, : self.num_atoms]
            scaled = (dual - heat * rows.clamp(min=tiny).log_()).clamp_(max=0)
            # The change of each row, which is its error.
            change = rows * torch.expm1((scaled - dual) / heat)
            cold = heat <= temperature
            allowed = torch.where(cold, tolerance, _ROUGHLY)
            hold = change.abs().amax(1, keepdim=True) <= allowed
            off = change.abs().sum(1, keepdim=True)
            worse = off > last
            age = torch.where(hold, 0, age + 1)
            newton = (age > _PATIENCE) & ~worse
            # Read at once all that the host has to know: a GPU waits meanwhile.
            held, wanted = torch.stack([hold & cold, newton]).squeeze(2).cpu()
            converged = bool(held.all())
            if converged or iteration >= limit:
                return Scaled(p, rows, scaled, heat, iteration, converged)
            proposal = scaled
            if bool(wanted.any()):
                proposal = self._newton(dual, scaled, p, rows, change, heat, wanted)
            dual, safe = torch.where(worse, safe, proposal), scaled
            last = torch.where(newton, off, torch.inf)
            heat = torch.where(hold, (_COOLING * heat).clamp(min=temperature), heat)

    def _newton(
        self,
        dual: Tensor,
        scaled: Tensor,
        p: Tensor,
        rows: Tensor,
        change: Tensor,
        heat: Tensor,
        wanted: Tensor,
    ) -> Tensor:
        """The multipliers after Newton's step for the parties ``wanted``, and after Sinkhorn's for
        the others and where Newton's fails."""
        result, free = scaled.clone(), scaled < 0  # the rest is zero after either
        inverse = torch.where(free, 1 / rows.double(), 0.0)
        change = change.double()
        for members, place in self._groups:
            chosen = wanted[members]
            if not bool(chosen.any()):
                continue
            members = members[chosen].to(p.device, non_blocking=True)
            place = place[chosen].to(p.device, non_blocking=True)
            # The matrix is diag(rows) - P P', [K, K], inverted by way of [L, L].
            q = pad(p[:, : self.num_atoms].double(), (0, 0, 0, 1))[place]
            root = q * inverse[members].sqrt().unsqueeze(1)
            inner = -(root @ root.mT)
            inner.diagonal(dim1=1, dim2=2).add_(1 + _RIDGE)
            factor, failed = torch.linalg.cholesky_ex(inner)
            step = inverse[members] * change[members]
            x = torch.cholesky_solve(q @ step.unsqueeze(2), factor)
            step += inverse[members] * (q.mT @ x).squeeze(2)
            step /= (step.abs().amax(1, keepdim=True) / _LONGEST).clamp_(min=1)
            good = (failed == 0) & step.isfinite().all(1)
            to = dual[members] + heat[members] * step.to(dual.dtype)
            to = torch.where(free[members], to.clamp_(max=0), 0.0)
            result[members] = torch.where(good[:, None], to, scaled[members])
        return result
