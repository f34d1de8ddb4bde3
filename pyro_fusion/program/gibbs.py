# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""FusionGibbs: draws of the assignment of a Pyro program. What is drawn from is at the top of
``pyro_fusion/fusion/chain.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.distributions import Distribution

from pyro_fusion.assignment.matching import MAX_EXACT
from pyro_fusion.errors import ParameterError, StructureError
from pyro_fusion.fusion.chain import AssignmentChains, check_has_posterior
from pyro_fusion.fusion.draws import AssignmentDraws
from pyro_fusion.program.guide import check_own
from pyro_fusion.program.model import FusionModel

__all__ = ["FusionGibbs", "GibbsResult"]


@dataclass(frozen=True)
class GibbsResult:
    """The draws of a :meth:`FusionGibbs.run`, by label."""

    labels: Mapping[str, AssignmentDraws]

    def only_label(self) -> AssignmentDraws:
        """The draws, if there is one label.

        :raises StructureError: if there is none, or several.
        """
        if len(self.labels) != 1:
            have = sorted(self.labels)
            raise StructureError(f"expected one label, got {have}: use result.labels[label]")
        return next(iter(self.labels.values()))

    def num_atoms_distribution(self) -> Tensor:
        """``num_atoms_distribution()`` of the only label."""
        return self.only_label().num_atoms_distribution()

    def same(self) -> Tensor:
        """``same()`` of the only label."""
        return self.only_label().same()

    def summary(self) -> str:
        """A table for each label."""
        return "\n\n".join(draws.summary() for draws in self.labels.values())


class FusionGibbs:
    """Gibbs sampling of the assignment of a ``product`` model, in place of ``SVI``: each
    :meth:`step` splits, merges and deals out pairs of atoms, matches every party anew, given all
    others, then draws alpha (of a learned :class:`~pyro_fusion.IndianBuffetPrior`, from
    ``Gamma(concentration + K, rate + H_S)``) and, if it has a prior, T (by slice sampling). The top
    of ``pyro_fusion/fusion/chain.py`` says what is drawn from. ``fuse(..., num_draws=)`` draws by
    the same chain, from where its search ended.

    :param model: of pooling ``product``, with its own ``assignment_prior``, ``local`` and
        ``scale``.
    :param assignment: label -> the atom of each component, LongTensor ``[N]``, to begin with, as
        the ``assignment`` of a guide; by default that of
        :meth:`FusionProblem.start() <pyro_fusion.FusionProblem.start>`.
    :param seed: of the draws. torch's global generator is left alone.
    :param learn_dispersion: a prior of T, a scalar distribution over positive numbers, to draw T
        too; by default T is the model's. Then T is learned as the scatter of what is the same,
        which is less than how far apart two may be: atoms come out too many, and their number too
        sure. See ``docs/program.md`` for what was measured.
    :param block: a party of at most so many components is matched as a block, exactly; larger ones
        go on from where they are, by ``markov_kernels.match_anew``.
    :raises ParameterError: for another model or pooling, a prior that weighs atoms by their rank,
        or arguments out of range.
    :raises StructureError: if the assignment does not fit.
    """

    def __init__(
        self,
        model: FusionModel,
        assignment: Mapping[str, Tensor] | None = None,
        *,
        seed: int = 0,
        learn_dispersion: Distribution | None = None,
        block: int = 8,
    ) -> None:
        check_own(model)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ParameterError(f"seed must be an integer, got {seed!r}")
        if not 0 <= block <= MAX_EXACT:
            raise ParameterError(f"block must be from 0 to {MAX_EXACT}, got {block}")
        check_has_posterior(model.problem)  # before a start is sought
        self.model = model
        self._chains = AssignmentChains(
            model.problem,
            model.problem.start(seed) if assignment is None else assignment,
            seed=seed,
            learn_dispersion=learn_dispersion,
            block=block,
        )

    @property
    def assignment(self) -> dict[str, Tensor]:
        """Label -> the present atom of each component, LongTensor ``[N]``."""
        return {label: chain.groups for label, chain in self._chains.chains.items()}

    def step(self) -> float:
        """One sweep. Returns the loss, minus the log joint density but for a constant: ``F`` at the
        present alpha and T, minus the log density of ``log T`` if that is learned.

        :raises ParameterError: where a product is improper.
        """
        return self._chains.step()

    def run(
        self, num_samples: int = 1000, warmup: int = 200, thinning: int = 1, progress: bool = False
    ) -> GibbsResult:
        """``warmup`` steps from where the chain is, then ``num_samples`` draws, ``thinning`` steps
        for each.

        :param progress: show a progress bar.
        :raises ParameterError: for arguments out of range, and where a product is improper.
        """
        if num_samples < 1 or warmup < 0 or thinning < 1:
            raise ParameterError("expected num_samples >= 1, warmup >= 0 and thinning >= 1")
        self._chains.run(num_samples, warmup, thinning, progress)
        return GibbsResult(self._chains.draws())
