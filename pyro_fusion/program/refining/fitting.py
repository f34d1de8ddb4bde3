# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The global model fitted to points of all parties at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_fusion.program.refining.likelihood import Likelihood, Values

__all__ = ["Fit", "fit"]


@dataclass(frozen=True)
class Fit:
    """The values that a fit ended at.

    :ivar shared: site -> value of what all parties have in common.
    :ivar own: per party, site -> value of what each has for itself.
    :ivar finite: True if the density was finite there.
    """

    shared: dict[str, Tensor]
    own: list[dict[str, Tensor]]
    finite: bool


def fit(
    likelihood: Likelihood,
    points: Sequence[Values],
    scales: Sequence[float],
    shared: Values,
    own: Values,
    *,
    max_iterations: int,
) -> Fit:
    r"""Maximise

    .. math:: \sum_s c_s \log p(x_s \mid \theta, w_s) + \log p(\theta) + \sum_s \log p(w_s)

    over the shared values :math:`\theta` and those of each party :math:`w_s`, in coordinates
    without constraints: there a Dirichlet has a mode, whatever its concentration.

    :param scales: ``c_s``, how many times the points of a party count.
    :param shared: site -> value to begin with.
    :param own: site -> value to begin with, the same for each party.
    :param max_iterations: of L-BFGS.
    """
    to = likelihood.transforms
    leaves: list[Tensor] = []

    def free(values: Values) -> dict[str, Tensor]:
        result = {k: to[k].inv(v).detach().clone().requires_grad_() for k, v in values.items()}
        leaves.extend(result.values())
        return result

    x, ws = free(shared), [free(own) for _ in points]

    def loss() -> Tensor:
        theta = {k: to[k](v) for k, v in x.items()}
        total = torch.stack(_jacobians(likelihood, x, theta)).sum()
        for s, (data, scale, free_w) in enumerate(zip(points, scales, ws, strict=True)):
            w = {k: to[k](v) for k, v in free_w.items()}
            density, prior = likelihood.log_density(data, {**theta, **w})
            counted = [*w, *(theta if s == 0 else ())]  # what is shared has one prior
            terms = [scale * density, *(prior[k] for k in counted)]
            total = total + torch.stack(terms + _jacobians(likelihood, free_w, w)).sum()
        return -total / sum(scales)

    optimizer = torch.optim.LBFGS(
        leaves,
        max_iter=max_iterations,
        history_size=20,
        tolerance_change=1e-6,
        line_search_fn="strong_wolfe",
    )

    last: list[tuple[Tensor, tuple[Tensor, ...]]] = []

    def closure() -> Tensor:
        value = _finite(loss)
        if value is not None:
            # Not backward(): a model's own parameters are to get no gradients.
            last[:] = [(value.detach(), torch.autograd.grad(value, leaves))]
        elif not last:
            raise FloatingPointError
        # A step too far is so bad that the line search comes back.
        for leaf, grad in zip(leaves, last[0][1], strict=True):
            leaf.grad = grad.clone()
        return last[0][0] if value is not None else last[0][0] + 1e6

    with torch.enable_grad():
        try:
            optimizer.step(closure)
            finite = _finite(loss) is not None
        except FloatingPointError:
            finite = False

    def ended(values: Values) -> dict[str, Tensor]:
        return {k: to[k](v).detach() for k, v in values.items()}

    return Fit(ended(x), [ended(w) for w in ws], finite)


def _finite(loss: Callable[[], Tensor]) -> Tensor | None:
    """The loss, or None where it has no finite value."""
    try:
        value = loss()
    except torch.linalg.LinAlgError:
        return None
    return value if bool(value.isfinite()) else None


def _jacobians(likelihood: Likelihood, x: Values, y: Values) -> list[Tensor]:
    return [likelihood.transforms[k].log_abs_det_jacobian(x[k], y[k]).sum() for k in x]
