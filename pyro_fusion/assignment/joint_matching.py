# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The prior of an assignment as a Pyro distribution over the matchings of all parties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import one_hot

from pyro_fusion.assignment.markov_kernels import match_anew
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.assignment.problem import party_of

__all__ = ["JointMatching"]

# Sweeps over the parties before a draw is taken.
_SWEEPS = 20

# A party of at most so many components is matched as a block, exactly.
_BLOCK = 8


@dataclass
class _Form:
    """The form of values: the room for atoms, whether values are relaxed, the prior in force, and
    whether the last value was drawn here."""

    num_atoms: int
    relaxed: bool
    prior: AssignmentPrior
    drawn: bool = False


class JointMatching(TorchDistribution):
    r"""Assignments of the components of all parties, each a matching of its own to K atoms:

    .. math:: p(a) \propto \exp\Bigl(-\sum_k \varphi(m_k)\Bigr)

    with ``m_k`` the popularity of an atom. Atoms have no names: ``p`` is the probability of all
    assignments together that differ only in how atoms are numbered; atoms that nobody has are mere
    room. ``p`` is not normalised: with :class:`~pyro_fusion.IndianBuffetPrior`, ``p / Π L_s!`` adds
    up to 1 over the assignments of all sizes ``L_s`` together (see
    :class:`~pyro_fusion.assignment.IndianBuffetProcess`), not over those of the given sizes.

    The value is a LongTensor ``[N]``, the atom of each component, the parties in turn; or relaxed,
    ``[K, N]`` of probabilities, for which ``φ`` is taken as linear between integers. In a program
    that does not know beforehand which it will be, nor with how many atoms, :meth:`take_form_of`
    takes both from the value, and sets the prior's own parameters to their optimum for it.

    :param assignment_prior: gives ``φ`` and a constant; its batch shape is the distribution's.
    :param sizes: ``L_s`` of each party.
    :param num_atoms: K, the room for atoms, at least ``max L_s``.
    :param relaxed: whether values are relaxed.
    :param device: of the values.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(
        self,
        assignment_prior: AssignmentPrior,
        sizes: Sequence[int],
        num_atoms: int,
        relaxed: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.assignment_prior, self.sizes, self._device = assignment_prior, tuple(sizes), device
        self._form = _Form(num_atoms, relaxed, assignment_prior)
        self._penalty = assignment_prior.penalty(len(self.sizes)).to(device, non_blocking=True)
        super().__init__(self._penalty.shape[:-1], self.event_shape, validate_args=False)

    @property
    def num_atoms(self) -> int:
        """K, the room for atoms."""
        return self._form.num_atoms

    @property
    def relaxed(self) -> bool:
        """True if values are matrices of probabilities."""
        return self._form.relaxed

    @property
    def event_shape(self) -> torch.Size:
        """The shape of a value: ``[N]``, or ``[K, N]`` if relaxed."""
        size = sum(self.sizes)
        return torch.Size((self.num_atoms, size) if self.relaxed else (size,))

    @property
    def prior(self) -> AssignmentPrior:
        """The assignment prior, with its own parameters as :meth:`take_form_of` set them."""
        return self._form.prior

    def take_form_of(self, value: Tensor) -> int:
        """Take on the form of ``value``: relaxed if it is, with its number of atoms, and with the
        prior's own parameters at their optimum for that number. Distributions expanded from this
        one follow. A program calls it with a value that may be replayed or observed; a hard value
        that was drawn here leaves the room as it is.

        :return: K.
        """
        form = self._form
        form.relaxed = value.is_floating_point()
        if form.relaxed:
            used = form.num_atoms = value.shape[-2]
        else:
            used = len(value.unique())
            if not form.drawn:
                form.num_atoms = int(value.max()) + 1
        form.prior = self.assignment_prior.update(used, len(self.sizes))
        return form.num_atoms

    @property
    def support(self) -> Any:
        if self.relaxed:
            return constraints.independent(constraints.unit_interval, 2)
        return constraints.independent(constraints.integer_interval(0, self.num_atoms - 1), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> JointMatching:
        """Expand to ``batch_shape`` independent assignments."""
        new = type(self)(
            self.assignment_prior, self.sizes, self.num_atoms, self.relaxed, self._device
        )
        new._form = self._form
        super(JointMatching, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """``-Σ φ(m) -`` the prior's constant: ``[*batch]`` for a value ``[*batch, N]``, or relaxed
        ``[*batch, K, N]``; ``-inf`` if two components of a party share an atom, or if an atom is
        not in ``0, ..., K - 1``."""
        num_parties, prior = len(self.sizes), self._form.prior
        if self.relaxed:
            m = value.sum(-1)
        else:
            m = self._penalty.new_zeros(value.shape[:-1] + (self.num_atoms,), device=value.device)
            one = torch.ones_like(value, dtype=m.dtype)
            m = m.scatter_add(-1, value.clamp(0, self.num_atoms - 1), one)
        penalty = prior.penalty(num_parties)
        # A hard assignment is on the CPU; a learned alpha may be elsewhere.
        m = m if self.relaxed else m.to(penalty.device, non_blocking=True)
        penalty = penalty.to(m, non_blocking=True)
        batch = torch.broadcast_shapes(m.shape[:-1], penalty.shape[:-1])
        m, penalty = m.expand(batch + m.shape[-1:]), penalty.expand(batch + penalty.shape[-1:])
        # m is at most the number of parties, but for rounding.
        below = m.detach().floor().clamp(max=num_parties - 1).long()
        phi = penalty.gather(-1, below)
        phi = phi + (m - below) * (penalty.gather(-1, below + 1) - phi)
        weights = prior.rank_weights(self.num_atoms, max(self.sizes)).to(m, non_blocking=True)
        order = m.argsort(descending=True, stable=True)
        result = -(weights * phi.gather(-1, order)).sum(-1) - prior.constant(num_parties)
        if not self.relaxed:
            result = result.masked_fill(~self._fits(value), -torch.inf)
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))

    def _fits(self, value: Tensor) -> Tensor:
        """True where all atoms exist, and no two components of a party share one."""
        party = party_of(self.sizes).to(value.device, non_blocking=True)
        place = (party * self.num_atoms + value).sort(-1).values
        inside = (value >= 0) & (value < self.num_atoms)
        return inside.all(-1) & (place.diff(dim=-1) != 0).all(-1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draws of a Gibbs chain that matches one party after the other given all others, after
        twenty sweeps; exact in the limit of many sweeps. Rank weights are left out."""
        self._form.drawn = True
        shape = torch.Size(sample_shape) + self.batch_shape
        steps = self._penalty.detach().diff(dim=-1).cpu().expand(shape + (-1,))
        draws = torch.stack([self._draw(s) for s in steps.reshape(-1, len(self.sizes))])
        draws = draws.to(self._device)
        if self.relaxed:
            draws = one_hot(draws, self.num_atoms).mT.to(self._penalty.dtype)
        return draws.reshape(shape + self.event_shape)

    def _draw(self, step: Tensor) -> Tensor:
        parties = [torch.arange(size) for size in self.sizes]
        m = torch.bincount(torch.cat(parties), minlength=self.num_atoms)
        for _ in range(_SWEEPS):
            for s, old in enumerate(parties):
                m[old] -= 1
                parties[s] = self._match(m, old, step)
                m[parties[s]] += 1
        return torch.cat(parties)

    def _match(self, m: Tensor, old: Tensor, step: Tensor) -> Tensor:
        """Match one party anew, given the popularities ``m`` among the others."""
        used, free = (m > 0).nonzero().squeeze(1), (m == 0).nonzero().squeeze(1)
        place = torch.full_like(m, len(used))  # a new one, unless others have it
        place[used] = torch.arange(len(used))
        join = -step[m[used]].expand(len(old), -1)
        choice = match_anew(join, -float(step[0]), place[old], len(free), _BLOCK)
        result = torch.empty_like(choice)
        fresh = choice == len(used)
        result[~fresh] = used[choice[~fresh]]
        result[fresh] = free[: int(fresh.sum())]
        return result
