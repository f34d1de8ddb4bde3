# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of the assignment: how many atoms there are, and who shares what, with what probability."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pyro.ops.stats import effective_sample_size
from torch import Tensor

__all__ = ["AssignmentDraws"]


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

    @classmethod
    def of_one_party(cls, label: str, size: int, num_draws: int) -> AssignmentDraws:
        """Draws where there is nothing to draw: each component is an atom."""
        every = torch.arange(size).expand(num_draws, size)
        count = torch.full((num_draws,), size)
        none = torch.zeros(num_draws, dtype=torch.float64)
        return cls(label, (size,), every, count, none, alpha=None, dispersion=None)

    def num_atoms_distribution(self) -> Tensor:
        """``P(K = 0), P(K = 1), ...`` up to the largest K drawn."""
        return torch.bincount(self.num_atoms).double() / len(self.num_atoms)

    def num_atoms_set(self, level: float) -> list[int]:
        """The smallest set of K that has at least this probability, the most probable first."""
        p, k = self.num_atoms_distribution().sort(descending=True, stable=True)
        # One more than those that do not reach it; probabilities add up to one but for rounding.
        count = int((p.cumsum(0) < level - 1e-9).sum()) + 1
        return k[:count].tolist()

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

    def num_atoms_summary(self) -> str:
        """A line to print: how probable each number of atoms is."""
        pmf = enumerate(self.num_atoms_distribution().tolist())
        return ", ".join(f"P({k}) = {p:.3f}" for k, p in pmf if p > 0)

    def summary(self) -> str:
        """A table to print: how many atoms, and a row for each quantity."""
        same = self.same()
        pairs = same[torch.ones_like(same, dtype=torch.bool).triu(1)]
        sure, doubtful = int((pairs >= 0.95).sum()), int(((pairs > 0.05) & (pairs < 0.95)).sum())
        what = f"{sum(self.sizes)} × {self.label} of {len(self.sizes)} parties"
        lines = [
            f"{len(self.assignments)} draws of the atoms of {what}",
            f"atoms: {self.num_atoms_summary()}",
            f"pairs of components: {sure} the same with P ≥ 0.95, {doubtful} in doubt",
            "                    mean        sd  effective draws",
        ]
        sizes = self.effective_sample_sizes()
        for name, x in self._traces().items():
            row = f"{float(x.mean()):10.4g}{float(x.std(correction=0)):10.4g}{sizes[name]:17.0f}"
            lines.append(f"  {name:12s}{row}")
        return "\n".join(lines)
