# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Search for the weights of the networks in a merge, by the merged network's validation score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyro_fusion.errors import ParameterError, StructureError
from pyro_fusion.nn.merging import pooled, prepared
from pyro_fusion.posterior import Axes, Posterior

__all__ = ["WeightSearch", "search_weights"]


@dataclass(frozen=True)
class WeightSearch:
    """The result of :func:`search_weights`.

    :ivar module: the merged network with the best weights.
    :ivar weights: the best weights, adding up to 1: ``[S]``, float64.
    :ivar score: the score of ``module``.
    :ivar tried: all weights that were tried, in order: ``[N, S]``. For two networks, the λ curve.
    :ivar scores: the scores of ``tried``: ``[N]``.
    """

    module: nn.Module
    weights: Tensor
    score: float
    tried: Tensor
    scores: Tensor


def search_weights(
    modules: Sequence[nn.Module],
    score: Callable[[nn.Module], float],
    posteriors: Sequence[Posterior] | None = None,
    *,
    num_evaluations: int = 51,
    axes: Axes | Literal["auto"] | None = None,
    inputs: tuple[Any, ...] = (),
    floor: float = 0.0,
    normalize: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> WeightSearch:
    """The weights λ with which :func:`merge_modules` scores best.

    For two networks, λ is tried on a grid over [0, 1]. For more, equal weights, each network alone
    and random weights, uniform over the simplex, are tried; with the second half of the evaluations
    the best of them are improved by the Nelder-Mead method in log-ratios of the weights. Among
    weights with equal scores, the ones nearest to equal are taken.

    :param score: a function of a module, such as its accuracy on validation data; the higher the
        better. It is called without gradients, and with the module in the mode of the first one.
    :param num_evaluations: the most weights to try; at least one more than modules.
    :param progress: show a progress bar over the evaluations.
    :raises ParameterError: for a score that is not finite, or too few evaluations.

    The other parameters and errors are those of :func:`merge_modules`.

    Source: Matena & Raffel, *Merging Models with Fisher-Weighted Averaging* (NeurIPS 2022), sec. 3;
    Nelder & Mead, *A Simplex Method for Function Minimization* (Computer Journal 1965).
    """
    ready = prepared(modules, posteriors, axes, inputs, floor, seed)
    size = len(modules)
    if size < 2:
        raise StructureError(f"expected at least two modules, got {size}")
    if not isinstance(num_evaluations, int) or num_evaluations < size + 1:
        raise ParameterError(
            f"num_evaluations must be an integer of at least {size + 1} for {size} modules, got "
            f"{num_evaluations}"
        )
    tried: list[np.ndarray] = []
    scores: list[float] = []

    def evaluate(weights: np.ndarray) -> float:
        module = pooled(modules, ready, torch.as_tensor(weights), normalize)
        with torch.no_grad():
            given = score(module)
        try:
            value = float(given)
        except (TypeError, ValueError, RuntimeError):
            value = float("nan")
        if not np.isfinite(value):
            raise ParameterError(
                f"score must be a finite number, got {given} at weights {weights.round(4).tolist()}"
            )
        tried.append(weights)
        scores.append(value)
        bar.update()
        return value

    with tqdm(total=num_evaluations, disable=not progress, desc="weights") as bar:
        for weights in _candidates(size, num_evaluations, seed):
            evaluate(weights)
        if size > 2:
            _improve(evaluate, tried[_best(tried, scores)], num_evaluations - len(tried))
    best = _best(tried, scores)
    module = pooled(modules, ready, torch.as_tensor(tried[best]), normalize)
    return WeightSearch(
        module,
        torch.as_tensor(tried[best]),
        scores[best],
        torch.as_tensor(np.stack(tried)),
        torch.tensor(scores, dtype=torch.float64),
    )


def _candidates(size: int, number: int, seed: int) -> Iterator[np.ndarray]:
    if size == 2:
        for x in np.linspace(0, 1, number):
            yield np.array([1 - x, x])
        return
    yield np.full(size, 1 / size)
    yield from np.eye(size)
    random = max(0, number // 2 - size - 1)
    yield from np.random.default_rng(seed).dirichlet(np.ones(size), random)


def _best(tried: Sequence[np.ndarray], scores: Sequence[float]) -> int:
    """The index of the highest score; among equal scores, of the weights nearest to equal."""
    return min(range(len(tried)), key=lambda i: (-scores[i], float(np.sum(tried[i] ** 2))))


# How far inside the simplex weights on its border begin, and the length of the first steps.
_INSIDE, _STEP = 0.01, 1.0


def _improve(evaluate: Callable[[np.ndarray], float], start: np.ndarray, number: int) -> None:
    if number < 1:
        return
    from scipy.optimize import minimize  # slow to import: only when needed

    def loss(ratios: np.ndarray) -> float:
        weights = np.exp(np.append(ratios, 0.0) - max(0.0, ratios.max()))
        return -evaluate(weights / weights.sum())

    inside = (1 - _INSIDE) * start + _INSIDE / len(start)
    ratios = np.log(inside[:-1] / inside[-1])
    corners = np.vstack([ratios, ratios + _STEP * np.eye(len(ratios))])
    options = {"maxfev": number, "initial_simplex": corners, "xatol": 1e-3, "fatol": 0.0}
    minimize(loss, ratios, method="Nelder-Mead", options=options)
