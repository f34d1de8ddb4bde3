# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Diagnostics: heterogeneity between parties, and reliability of forecasts. Pure tensor code."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_fusion.errors import ParameterError, StructureError

__all__ = ["Heterogeneity", "Reliability", "heterogeneity", "reliability"]


@dataclass(frozen=True)
class Heterogeneity:
    """The result of :func:`heterogeneity`.

    :ivar q: Cochran's Q.
    :ivar df: the mean of Q if parties differ by nothing but their own uncertainty.
    """

    q: float
    df: int

    @property
    def i_squared(self) -> float:
        """I², the share of the variation that is heterogeneity, from 0 to 1; NaN for one party."""
        if self.df == 0:
            return math.nan
        return max(0.0, 1 - self.df / self.q) if self.q > 0 else 0.0


def heterogeneity(loc: Tensor, scale: Tensor) -> Heterogeneity:
    r"""Cochran's Q and I²: how far parties differ by more than their own uncertainty.

    .. math:: Q = \sum_s \frac{(\mu_s - \bar\mu)^2}{\sigma_s^2}, \quad
        \bar\mu = \frac{\sum_s \mu_s / \sigma_s^2}{\sum_s 1 / \sigma_s^2}, \quad
        I^2 = \max\Bigl(0, \frac{Q - \mathit{df}}{Q}\Bigr), \quad \mathit{df} = (m - 1) D

    Q and df are added up over the D numbers of a component, as if these were independent. Means and
    standard deviations are taken as if they came from the data alone: a prior that all parties have
    is counted m times, and makes them look more alike than they are.

    :param loc: the parties' means in unconstrained coordinates, ``[m]`` or ``[m, *shape]``.
    :param scale: their standard deviations, of the same shape.
    :raises StructureError: if the shapes differ, or there is no party.
    :raises ParameterError: if ``loc`` is not finite, or ``scale`` not finite and positive.

    Source: Cochran, *The Combination of Estimates from Different Experiments* (Biometrics 1954);
    Higgins & Thompson, *Quantifying Heterogeneity in a Meta-analysis* (Statistics in Medicine
    2002).
    """
    if loc.shape != scale.shape or loc.dim() == 0 or loc.numel() == 0:
        raise StructureError(
            "expected loc and scale of one shape, [m, ...] for m >= 1 parties, got "
            f"{list(loc.shape)} and {list(scale.shape)}"
        )
    if not bool(torch.isfinite(loc).all()):
        raise ParameterError("loc must be finite")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ParameterError("scale must be finite and positive")
    x, sd = loc.double(), scale.double()
    x = x - x[:1]  # about a party: parties far from the origin lose no digits
    precision = (sd / sd.amin(0)) ** -2
    mean = (x * precision).sum(0) / precision.sum(0)
    return Heterogeneity(float(((x - mean) / sd).square().sum()), loc[1:].numel())


@dataclass(frozen=True)
class Reliability:
    """The result of :func:`reliability`, for each bin of confidence.

    :ivar confidence: the mean confidence, NaN in an empty bin, ``[bins]``, float64.
    :ivar accuracy: the share of forecasts that are right, NaN in an empty bin, ``[bins]``, float64.
    :ivar count: the number of forecasts, LongTensor ``[bins]``.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error: the mean absolute difference of accuracy and confidence,
        over bins weighted by their number of forecasts."""
        gap = (self.accuracy - self.confidence).abs().nan_to_num(0.0)
        return float((gap * self.count).sum() / self.count.sum())


def reliability(probabilities: Tensor, targets: Tensor, bins: int = 15) -> Reliability:
    """The share of forecasts whose most probable class is right, by its stated probability.

    :param probabilities: of the classes, ``[N, C]``.
    :param targets: the true classes, integers ``[N]``.
    :param bins: the number of bins, of equal width, from 0 to 1.
    :raises StructureError: if the shapes do not fit.
    :raises ParameterError: if rows are no probabilities, a class is out of range, or ``bins < 1``.

    Source: Naeini, Cooper & Hauskrecht, *Obtaining Well Calibrated Probabilities Using Bayesian
    Binning* (AAAI 2015); Guo et al., *On Calibration of Modern Neural Networks* (ICML 2017).
    """
    _check_forecasts(probabilities, targets)
    if bins < 1:
        raise ParameterError(f"bins must be at least 1, got {bins}")
    confidence, guess = probabilities.detach().max(-1)
    right = (guess == targets).double()
    # Not converted to double: a float32 0.9 begins a bin, as a double it is slightly less than 0.9.
    place = (confidence * bins).long().clamp(max=bins - 1)
    count = torch.bincount(place, minlength=bins)
    values = torch.stack([confidence.double(), right])
    sums = values.new_zeros(2, bins).index_add(1, place, values)
    mean = sums / count  # 0 / 0 of an empty bin is NaN
    return Reliability(mean[0], mean[1], count)


def _check_forecasts(probabilities: Tensor, targets: Tensor) -> None:
    if probabilities.dim() != 2 or probabilities.numel() == 0:
        raise StructureError(
            f"expected the probabilities of classes, [N, C], got {list(probabilities.shape)}; "
            "of one class p: torch.stack([1 - p, p], -1)"
        )
    n, classes = probabilities.shape
    if targets.shape != (n,) or targets.is_floating_point() or targets.dtype == torch.bool:
        raise StructureError(
            f"expected the true classes of {n} forecasts, integers [{n}], got {targets.dtype} "
            f"{list(targets.shape)}"
        )
    if bool((targets < 0).any() | (targets >= classes).any()):
        low, high = int(targets.min()), int(targets.max())
        raise ParameterError(f"expected classes 0 to {classes - 1}, got {low} to {high}")
    total = probabilities.double().sum(-1)
    if not bool((probabilities >= 0).all() & ((total - 1).abs() < 1e-2).all()):
        raise ParameterError("expected probabilities, not negative and adding up to 1 in each row")
