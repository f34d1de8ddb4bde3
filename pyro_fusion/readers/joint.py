# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""One Gaussian over all sites, read as its exact block marginals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import transforms as tt

from pyro_fusion.errors import GuideError, at, warn_user
from pyro_fusion.families import Factor, family_named
from pyro_fusion.families.transforms import flatten
from pyro_fusion.readers.sites import Labels, Read, Sites, normal_factor, transform_of

__all__ = ["Joint", "Piece", "block", "marginals"]

# A block of more numbers than this is read as its marginals: its covariance would be too big.
_LARGEST_BLOCK = 512
# Reading a joint Normal as its blocks is reported when it loses more than this per dimension.
_NATS_PER_DIMENSION = 0.1


@dataclass(frozen=True)
class Joint:
    """A Gaussian over a vector of ``D`` numbers, covariance ``rows rowsᵀ + diag(variance)``;
    float64, perhaps with batch axes in front.

    :param loc: ``[*batch, D]``.
    :param rows: ``[*batch, D, M]``, or None.
    :param variance: ``[*batch, D]``, or None.
    :param dtype: the dtype of the parameters that it was made from.
    """

    loc: Tensor
    rows: Tensor | None
    variance: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, d: Distribution) -> Joint | None:
        """The joint of a distribution over a vector, which a Normal's last batch axis counts as."""
        rows = variance = None
        if isinstance(d, torch.distributions.MultivariateNormal):
            rows = d.scale_tril
        elif isinstance(d, torch.distributions.LowRankMultivariateNormal):
            rows, variance = d.cov_factor, d.cov_diag
        elif isinstance(d, torch.distributions.Normal):
            variance = d.scale.double().square()
        else:
            return None
        rows = None if rows is None else rows.detach().double()
        variance = None if variance is None else variance.detach().double()
        return cls(d.loc.detach().double(), rows, variance, d.loc.dtype)

    def equals(self, other: Joint) -> bool:
        """True if both have equal numbers."""
        return all(
            a is b if a is None or b is None else torch.equal(a, b)
            for a, b in zip(
                (self.loc, self.rows, self.variance),
                (other.loc, other.rows, other.variance),
                strict=True,
            )
        )

    def scale(self) -> Tensor:
        """Standard deviations: ``[*batch, D]``."""
        total = torch.zeros_like(self.loc) if self.variance is None else self.variance
        if self.rows is not None:
            total = total + self.rows.square().sum(-1)
        return total.sqrt()

    def covariance(self, index: Tensor) -> Tensor:
        """The diagonal blocks at ``index``, ``[*b, n] -> [*b, n, n]`` (no batch axes)."""
        n = index.shape[-1]
        total = self.loc.new_zeros(index.shape + (n,))
        if self.rows is not None:
            rows = self.rows[index]
            total = total + rows @ rows.mT
        if self.variance is not None:
            total = total + torch.diag_embed(self.variance[index])
        return total

    def log_det(self) -> float:
        """Log-determinant of the covariance (no batch axes)."""
        if self.rows is None:
            return 2 * float(self.scale().log().sum())
        if self.variance is None:
            return 2 * float(torch.linalg.slogdet(self.rows).logabsdet)
        # Matrix determinant lemma: M × M instead of D × D.
        weighted = self.rows / self.variance.unsqueeze(-1)
        small = torch.eye(self.rows.shape[-1], dtype=weighted.dtype, device=weighted.device)
        small = small + self.rows.mT @ weighted
        return float(self.variance.log().sum() + torch.linalg.slogdet(small).logabsdet)


# name, positions in the joint vector (in the site's unconstrained shape), support, plates
Piece = tuple[str, Tensor, Any, tuple[str | None, ...]]


def marginals(
    joint: Joint, pieces: Sequence[Piece], labels: Labels, kind: str, structured: bool = False
) -> Sites:
    """One factor a site, and a warning if that loses much of the joint.

    What is lost is ``KL(joint ‖ product of blocks) = ½ (Σ log det blocks − log det joint)``.
    """
    result: Sites = {}
    kept = 0.0
    for name, index, support, plates in pieces:
        factor, log_det = block(name, joint, index, support, plates, labels.get(name))
        result[name] = Read(factor, plates)
        kept += log_det
    lost = 0.5 * (kept - joint.log_det())
    dimension = sum(index.numel() for _, index, _, _ in pieces)
    if structured or lost > _NATS_PER_DIMENSION * dimension:
        why = (
            "is structured: its sites depend on each other"
            if structured
            else ("has strongly correlated sites or components")
        )
        warn_user(
            f"{kind} {why}. It is read as its exact block marginals (fusion takes sites and "
            f"components for independent), which loses {lost:.1f} nats of correlation over "
            f"{dimension} dimensions",
        )
    return result


def block(
    name: str,
    joint: Joint,
    index: Tensor,
    support: Any,
    plates: tuple[str | None, ...],
    labels: Sequence[str | None] | None,
) -> tuple[Factor, float]:
    """The marginal of one site, and the log-determinants of the covariance blocks it keeps.

    Batch axes and labelled axes are independent components. What remains of the event is one
    Gaussian vector when it lies to the right of those and is not too large; otherwise, and where
    the axes of a simplex or a matrix are labelled, the site is a diagonal Normal.
    """
    labels = labels if labels is not None else plates
    labels = (*labels, *itertools.repeat(None, max(0, index.dim() - len(labels))))
    parts = flatten([transform_of(name, support)])
    inseparable = max((t.domain.event_dim for t in parts), default=0)
    separable = index.dim() - inseparable
    split = [i for i in range(separable) if i < len(plates) or labels[i] is not None]
    leading = split == list(range(len(split)))
    rest = index.shape[len(split) :]
    if (
        joint.rows is None
        or len(rest) == 0
        or not leading
        or any(label is not None for label in labels[separable:])
        or rest.numel() > _LARGEST_BLOCK
    ):
        loc, scale = joint.loc[index], joint.scale()[index]
        log_det = 2 * float(scale.log().sum())
        loc, scale = loc.to(joint.dtype), scale.to(joint.dtype)
        return normal_factor(name, loc, scale, support, len(plates)), log_det
    index = index.reshape(index.shape[: len(split)] + (-1,))
    try:
        tril = torch.linalg.cholesky(joint.covariance(index))
    except torch.linalg.LinAlgError as e:
        raise GuideError("the guide's covariance is singular", site=name) from e
    log_det = 2 * float(tril.diagonal(dim1=-2, dim2=-1).log().sum())
    reshape: tuple[tt.Transform, ...] = ()
    if len(rest) > 1:
        reshape = (tt.ReshapeTransform(torch.Size([rest.numel()]), rest),)
    params = {"loc": joint.loc[index].to(joint.dtype), "scale_tril": tril.to(joint.dtype)}
    factor = Factor(family_named("MultivariateNormal"), params, (*reshape, *parts), len(plates))
    with at(site=name):
        return Factor.of(factor.distribution(validate_args=False)), log_det
