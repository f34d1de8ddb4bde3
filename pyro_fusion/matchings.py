# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The prior of an assignment as a Pyro distribution over the matchings of all parties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_fusion.distributions.matching import Matching
from pyro_fusion.priors import AssignmentPrior

__all__ = ["JointMatching"]

# Sweeps over the parties before a draw is taken.
_SWEEPS = 20


class JointMatching(TorchDistribution):
    r"""Assignments of the components of all parties, each a matching of its own to K atoms:

    .. math:: p(a) \propto \exp\Bigl(-\sum_k \varphi(m_k)\Bigr)

    with ``m_k`` the popularity of an atom. Atoms have no names: assignments that differ in them
    alone are one, of which ``p`` is the probability; atoms that nobody has are mere room. Of
    :class:`~pyro_fusion.IndianBuffet` it is normalised but for a factor ``Π L_s!`` (see
    :class:`~pyro_fusion.distributions.IndianBuffetProcess`), of other priors not.

    The value is a LongTensor ``[N]``, the atom of each component, the parties in turn. A relaxed
    one, ``[K, N]`` of probabilities, has a density too: ``φ`` is linear between integers.

    :param prior: has ``φ``, and a constant.
    :param sizes: ``L_s`` of each party.
    :param num_atoms: K, the room there is, at least ``max L_s``.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(self, prior: AssignmentPrior, sizes: Sequence[int], num_atoms: int) -> None:
        self.prior, self.sizes, self.num_atoms = prior, tuple(sizes), num_atoms
        self._penalty = prior.penalty(len(self.sizes))
        super().__init__(torch.Size(), torch.Size([sum(self.sizes)]), validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.num_atoms - 1), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> JointMatching:
        if tuple(batch_shape):
            raise NotImplementedError("an assignment is one for all parties: it has no batch axes")
        return self

    def log_prob(self, value: Tensor) -> Tensor:
        """``-Σ φ(m) -`` the prior's constant, a scalar.

        :param value: LongTensor ``[N]``, or relaxed ``[K, N]``.
        """
        if value.is_floating_point():
            m = value.sum(-1)
        else:
            m = torch.bincount(value, minlength=self.num_atoms).to(self._penalty.dtype)
        penalty = self._penalty.to(m)
        # Nowhere more than all parties, but for rounding.
        below = m.detach().floor().clamp(max=len(penalty) - 2).long()
        phi = penalty[below] + (m - below) * (penalty[below + 1] - penalty[below])
        weights = self.prior.rank_weights(len(m), max(self.sizes)).to(m)
        order = m.argsort(descending=True, stable=True)
        return -(weights * phi[order]).sum() - self.prior.constant(len(self.sizes))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws of a Gibbs chain that matches one party after the other given all others, after
        twenty sweeps; exact in the limit of many. Without rank weights."""
        shape = torch.Size(sample_shape)
        draws = [self._draw() for _ in range(shape.numel())]
        return torch.stack(draws).reshape(shape + self.event_shape)

    def _draw(self) -> Tensor:
        m = torch.zeros(self.num_atoms, dtype=torch.long)
        parties: list[Tensor | None] = [None] * len(self.sizes)
        for _ in range(_SWEEPS):
            for s, size in enumerate(self.sizes):
                old = parties[s]
                if old is not None:
                    m[old] -= 1
                parties[s] = self._match(m, size)
                m[parties[s]] += 1
        return torch.cat([a for a in parties if a is not None])

    def _match(self, m: Tensor, size: int) -> Tensor:
        """One party given the popularities among the others."""
        used, free = (m > 0).nonzero().squeeze(1), (m == 0).nonzero().squeeze(1)
        step = self._penalty.diff()
        logits = -step[m[used]].expand(size, -1)
        if len(free):
            # A new atom for each component: they have no names, so there is one way to take it.
            new = torch.full((size, size), -torch.inf, dtype=step.dtype)
            logits = torch.cat([logits, new.fill_diagonal_(-float(step[0]))], 1)
        matching = Matching(logits)
        while True:
            choice = matching.sample()
            fresh = choice >= len(used)
            if int(fresh.sum()) <= len(free):  # else there is no room for them
                break
        result = torch.empty_like(choice)
        result[~fresh] = used[choice[~fresh]]
        result[fresh] = free[: int(fresh.sum())]
        return result
