# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Priors of the assignment: beliefs of how many atoms there are and how many parties share each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_fusion.assignment.indian_buffet import harmonic_number, popularity_log_weights
from pyro_fusion.errors import ParameterError, StructureError

__all__ = [
    "AssignmentPrior",
    "GroupNormPrior",
    "IndianBuffetPrior",
    "FixedAtoms",
    "assignment_priors",
    "check_penalty",
]


class AssignmentPrior(ABC):
    r"""A penalty :math:`\sum_k \varphi(m_k)` on the popularities of the atoms, with
    :math:`\varphi(0) = 0` and :math:`\varphi` concave from one party on, so that popular atoms
    attract parties more than rare ones."""

    num_atoms: int | None = None
    """The number of atoms if it is fixed, else None."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    @abstractmethod
    def penalty(self, num_parties: int) -> Tensor:
        """``φ(0), ..., φ(S)``: float64, shape ``[num_parties + 1]``."""

    def rank_weights(self, num_ranks: int, free: int) -> Tensor:
        """The factor of ``φ`` for each rank by falling popularity, never falling: float64, shape
        ``[num_ranks]``.

        :param free: ``max L_s``, the least number of atoms that there can be.
        """
        return torch.ones(num_ranks, dtype=torch.float64)

    def constant(self, num_parties: int) -> float:
        """The part of the objective that does not depend on the assignment."""
        return 0.0

    def calibrated(self, spread: Callable[[], float]) -> AssignmentPrior:
        """The prior with the settings that it takes from the posteriors; by default unchanged.

        :param spread: gives the standard deviation of all their pairwise divergences over the
            dispersion.
        """
        return self

    def update(self, num_atoms: int, num_parties: int) -> AssignmentPrior:
        """The prior with its own parameters at their optimum given the assignment; lowers the
        objective. A prior without parameters returns itself."""
        return self


@dataclass(frozen=True)
class IndianBuffetPrior(AssignmentPrior):
    r"""The Indian buffet process, the limit of a beta-Bernoulli with many atoms:

    .. math:: \varphi(m) = -\log \left[ \alpha \frac{(m-1)!\,(S-m)!}{S!} \right]

    and :math:`\alpha H_S` once, ``H_S`` the harmonic number. The probability of the assignment is
    meant up to the order of the atoms (left-ordered form without its factorials).

    It is made for ``product``, where the evidence that components agree is weighed against it. The
    KL poolings have no such evidence: there the gain from joining a popular atom (up to ``log S``
    at each step, times the dispersion) merges whatever may be merged.

    :param alpha: the mass parameter, positive: the expected number of atoms is
        ``alpha * H_S``. By default learned, at its mode under a Gamma prior. A Tensor is kept, so
        that in a model of one's own gradients reach it, and may have the batch axes of particles
        there; ``fuse`` takes the value of one number.
    :param concentration, rate: of the Gamma prior over a learned ``alpha``; concentration >= 1.
    :raises ParameterError: for values out of range.

    Source: Griffiths & Ghahramani, *The Indian Buffet Process* (JMLR 2011), eq. 14; as a matching
    prior Yurochkin et al., *Statistical Model Aggregation via Parameter Matching* (NeurIPS 2019).
    """

    alpha: float | Tensor | None = None
    concentration: float = 1.0
    rate: float = 1.0
    _estimate: float = field(default=1.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.alpha, Tensor):
            if self.alpha.numel() == 1:
                # Drops axes of size one, such as ``Predictive`` puts in front.
                object.__setattr__(self, "alpha", self.alpha.reshape(()))
            # Reading it would make a GPU wait; there it is checked when it is read as a number.
            good = (self.alpha > 0) & self.alpha.isfinite()
            if self.alpha.device.type == "cpu" and not bool(good.all()):
                raise ParameterError(f"alpha must be positive and finite, got {self.alpha}")
        elif self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ParameterError(f"alpha must be positive and finite, got {self.alpha}")
        if not 1 <= self.concentration < math.inf or not 0 < self.rate < math.inf:
            raise ParameterError(
                "the Gamma prior over alpha needs concentration >= 1 and rate > 0, got "
                f"{self.concentration} and {self.rate}"
            )

    def __hash__(self) -> int:
        # Equal tensors have different hashes.
        alpha = None if self.alpha is None else self.mass
        return hash((alpha, self.concentration, self.rate, self._estimate))

    def __str__(self) -> str:
        if isinstance(self.alpha, Tensor) and self.alpha.numel() != 1:
            return repr(self)
        learned = ", learned" if self.alpha is None else ""
        return f"IndianBuffetPrior(alpha={self.mass:.4g}{learned})"

    @property
    def mass(self) -> float:
        """The value of alpha in use: given, or the present estimate."""
        if isinstance(self.alpha, Tensor):
            if self.alpha.numel() != 1:
                raise ParameterError(
                    f"alpha must be a number, got a tensor of shape {tuple(self.alpha.shape)}"
                )
            mass = float(self.alpha.item())
            if not 0 < mass < math.inf:
                raise ParameterError(f"alpha must be positive and finite, got {mass}")
            return mass
        return self._estimate if self.alpha is None else self.alpha

    def penalty(self, num_parties: int) -> Tensor:
        mass = self._estimate if self.alpha is None else self.alpha
        log_mass = torch.as_tensor(mass, dtype=torch.float64).log()
        phi = popularity_log_weights(num_parties).to(log_mass, non_blocking=True)
        phi = -log_mass.unsqueeze(-1) - phi
        return torch.nn.functional.pad(phi, (1, 0))

    def constant(self, num_parties: int) -> Any:
        """The part of the objective that does not depend on the assignment; a Tensor if ``alpha``
        is one."""
        if self.alpha is not None:
            return self.alpha * harmonic_number(num_parties)
        result = self.mass * harmonic_number(num_parties)
        return result + self.rate * self.mass - (self.concentration - 1) * math.log(self.mass)

    def calibrated(self, spread: Callable[[], float]) -> IndianBuffetPrior:
        return replace(self, alpha=self.mass) if isinstance(self.alpha, Tensor) else self

    def update(self, num_atoms: int, num_parties: int) -> IndianBuffetPrior:
        if self.alpha is not None:
            return self
        # Gamma(c, r) is conjugate: Gamma(c + K, r + H_S), here at its mode.
        mode = (self.concentration + num_atoms - 1) / (self.rate + harmonic_number(num_parties))
        result = replace(self)
        object.__setattr__(result, "_estimate", mode)
        return result


@dataclass(frozen=True)
class GroupNormPrior(AssignmentPrior):
    r"""The regulariser of Claici et al., a group norm over parties,
    :math:`\varphi(m) = \lambda \sqrt{m}`.

    :param scale: λ, non-negative, in units of the dispersion. By default ``1 / (2 - √2)``, with
        which two lone components share an atom just when that costs less than one dispersion.
        ``"auto"`` is the paper's: half the standard deviation of all pairwise divergences, whatever
        the dispersion.
    :param ranked: the paper's weights: φ of the atom of rank ``r`` by falling popularity (1, 2,
        ...) times ``√max(0, r - max L_s)``, so that the most popular ``max L_s`` atoms are free.
    :raises ParameterError: if ``scale`` is negative or not finite.

    Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020), eq. 9, in a
    form that does not depend on the order of parties and components.
    """

    scale: float | Literal["auto"] = 1 / (2 - math.sqrt(2))
    ranked: bool = False

    def __post_init__(self) -> None:
        if self.scale != "auto" and (isinstance(self.scale, str) or not 0 <= self.scale < math.inf):
            raise ParameterError(
                f"scale must be non-negative and finite, or 'auto', got {self.scale!r}"
            )

    def __str__(self) -> str:
        scale = self.scale if isinstance(self.scale, str) else f"{self.scale:.4g}"
        return f"GroupNormPrior(scale={scale}{', ranked=True' if self.ranked else ''})"

    def calibrated(self, spread: Callable[[], float]) -> GroupNormPrior:
        return replace(self, scale=spread() / 2) if self.scale == "auto" else self

    def penalty(self, num_parties: int) -> Tensor:
        if self.scale == "auto":
            raise ParameterError("scale='auto' depends on the posteriors: `fuse` finds it")
        return self.scale * torch.arange(num_parties + 1, dtype=torch.float64).sqrt()

    def rank_weights(self, num_ranks: int, free: int) -> Tensor:
        if not self.ranked:
            return super().rank_weights(num_ranks, free)
        ranks = torch.arange(1, num_ranks + 1, dtype=torch.float64)
        return (ranks - free).clamp(min=0).sqrt()


@dataclass(frozen=True)
class FixedAtoms(AssignmentPrior):
    r"""A fixed number of atoms and no preference among them, :math:`\varphi = 0`.

    :param num_atoms: K, at least the number of components of every party.
    :raises ParameterError: unless ``num_atoms`` is a positive integer.
    """

    num_atoms: int

    def __post_init__(self) -> None:
        if isinstance(self.num_atoms, bool) or not isinstance(self.num_atoms, int):
            raise ParameterError(f"num_atoms must be an integer, got {self.num_atoms!r}")
        if self.num_atoms < 1:
            raise ParameterError(f"num_atoms must be positive, got {self.num_atoms}")

    def penalty(self, num_parties: int) -> Tensor:
        return torch.zeros(num_parties + 1, dtype=torch.float64)


def check_penalty(prior: AssignmentPrior, num_parties: int) -> None:
    """Check of a penalty before each use; ``check_assignment_prior`` checks all of a prior.

    :raises ParameterError: unless its penalty is finite, 0 for nobody, float64 ``[S + 1]``.
    """
    phi, shape = prior.penalty(num_parties), (num_parties + 1,)
    if isinstance(phi, Tensor):
        right = phi.dtype == torch.float64 and phi.shape == shape
        if right and phi[0] == 0 and bool(phi.isfinite().all()):
            return
        first = ", ".join(f"{x:.4g}" for x in phi.flatten()[:4].tolist())
        got = f"{phi.dtype} {list(phi.shape)}: [{first}{', ...' if phi.numel() > 4 else ''}]"
    else:
        got = repr(phi)
    raise ParameterError(
        f"{prior!r}.penalty({num_parties}) must be finite, 0 at first, torch.float64 "
        f"{list(shape)}, got {got}; pyro_fusion.testing.check_assignment_prior says what else"
    )


def assignment_priors(
    prior: AssignmentPrior | Mapping[str, AssignmentPrior] | None,
    labels: Sequence[str],
    default: AssignmentPrior,
) -> dict[str, AssignmentPrior]:
    """The prior of each label: the one that is given for it, or for all, else ``default``, which
    is the pooling's.

    :raises StructureError: for an unknown label.
    :raises ParameterError: for a value that is no prior.
    """
    given = prior if isinstance(prior, Mapping) else dict.fromkeys(labels, prior)
    if unknown := set(given) - set(labels):
        raise StructureError(
            f"assignment_prior names labels {sorted(map(str, unknown))}; the labels are "
            f"{sorted(labels)}"
        )
    for one in given.values() if isinstance(prior, Mapping) else (prior,):
        if not isinstance(one, AssignmentPrior | None):
            raise ParameterError(
                "assignment_prior must be IndianBuffetPrior(), GroupNormPrior(), FixedAtoms(K) or "
                f"an instance of an AssignmentPrior of your own, got {one!r}"
            )
    return {label: given.get(label) or default for label in labels}
