# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""Losses of a network's outputs, and roots of their curvatures: the R in
:math:`J^\top R R^\top J`, J being the Jacobian of the output by the parameters.

================================  ==================================================================
curvature                         columns of R, for each example
================================  ==================================================================
``"fisher"``                      :math:`\sqrt{p(y)}` times the score by the output, for each y
``"fisher"`` with draws           the score by the output for labels drawn from the model
``"empirical_fisher"``            the score by the output for the label in the data
``"ggn"``                         a root of the Hessian of the loss by the output
================================  ==================================================================

Source: Kunstner, Balles & Hennig, *Limitations of the Empirical Fisher Approximation for Natural
Gradient Descent* (NeurIPS 2019), eqs. 2 to 7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal
from torch.utils import _pytree as pytree

from pyro_fusion.errors import ParameterError

__all__ = ["CURVATURES", "LOSSES", "Columns", "Loss", "take"]

CURVATURES = ("fisher", "empirical_fisher", "ggn")


@dataclass(frozen=True)
class Columns:
    """R for a batch, made piece by piece: as a whole it may be larger than all that is made of it.

    :ivar width: how many columns there are, M.
    :ivar numbers: how many numbers there are in a column of one example.
    :ivar of: some examples -> the numbers of some columns ``[m]`` -> these, ``[m, B, ...]``.
    """

    width: int
    numbers: int
    of: Callable[[slice], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Loss:
    """The negative log-likelihood of a target, given a network's output.

    :ivar name: for messages.
    :ivar likelihood: outputs ``[B, ...]`` -> the distribution of their targets, if it is known.
    :ivar value: output and target of a batch of one -> a number, in place of a likelihood.
    :ivar root: outputs ``[B, ...]`` and numbers ``[m]`` of columns, of which there are as many as
        numbers in an output -> columns ``[m, B, ...]`` whose squares add up to the Hessian by the
        output, where that does not depend on the target, and so is the Fisher information as well.
    """

    name: str
    likelihood: Callable[[Any], Distribution] | None = None
    value: Callable[[Any, Any], Tensor] | None = None
    root: Callable[[Tensor, Tensor], Tensor] | None = None

    def scores(self, output: Tensor, target: Any) -> Tensor:
        """The gradients of the losses of examples by their outputs: ``[B, ...]``."""
        if self.likelihood is not None:
            with torch.enable_grad():
                output = output.detach().requires_grad_()
                total = -self._log_prob(output, target).sum()
            return torch.autograd.grad(total, output)[0]
        return self._each(torch.func.grad(self._of_one), output, target)

    def _log_prob(self, output: Tensor, target: Any) -> Tensor:
        assert self.likelihood is not None
        try:
            d = self.likelihood(output)
            result = d.log_prob(target)
            if result.shape != d.batch_shape or len(result) != len(output):
                raise ValueError(f"log densities have shape {tuple(result.shape)}")
        except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as e:
            raise ParameterError(
                f"loss {self.name}: the targets ({_shape(target)}) do not fit the outputs "
                f"({_shape(output)}): {' '.join(str(e).split())[:200]}"
            ) from e
        return result

    def _of_one(self, output: Tensor, target: Any) -> Tensor:
        assert self.value is not None
        loss = self.value(
            output.unsqueeze(0), pytree.tree_map_only(Tensor, lambda t: t.unsqueeze(0), target)
        )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = _shape(loss)
            raise ParameterError(
                f"loss {self.name} must return one number for one example, got {shape}: sum it"
            )
        return loss.reshape(())

    def _each(self, f: Callable[..., Tensor], output: Tensor, target: Any) -> Tensor:
        """A derivative of the loss of one example, for each of a batch."""
        try:
            return torch.func.vmap(f)(output, target)
        except ParameterError:
            raise
        except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as e:
            raise ParameterError(
                f"loss {self.name} failed under torch.func.vmap, on outputs ({_shape(output)}) and "
                f"targets ({_shape(target)}): {' '.join(str(e).split())[:200]}"
            ) from e

    def columns(
        self, curvature: str, num_samples: int | None, output: Tensor, target: Any
    ) -> Columns:
        """R of a batch; see the top of this file."""
        size, root = output[0].numel(), self.root
        if curvature == "empirical_fisher":
            scores = self.scores(output, target).unsqueeze(0)
            return Columns(1, size, lambda rows: lambda which: scores[which, rows])
        if root is not None and (curvature == "ggn" or num_samples is None):
            return Columns(size, size, lambda rows: lambda which: root(output[rows], which))
        if curvature == "ggn":

            def of(rows: slice) -> Callable[[Tensor], Tensor]:
                found = self._root_of_hessian(output[rows], take(target, rows))
                return lambda which: found[which]

            return Columns(size, size, of)
        if self.likelihood is None:
            raise ParameterError(
                'curvature "fisher" draws labels from the model: give likelihood=, a function from '
                "outputs to the distribution of their targets, as lambda out: Normal(out, 0.1), in "
                f'place of the loss {self.name}; or take "ggn" or "empirical_fisher"'
            )
        count = num_samples or 1
        labels = self.likelihood(output).sample(torch.Size([count]))

        def drawn(rows: slice, which: Tensor) -> Tensor:
            y = labels[which][:, rows]
            outputs = output[rows].expand(*y.shape[:2], *output.shape[1:])
            scores = self.scores(outputs.flatten(0, 1), y.flatten(0, 1))
            return scores.reshape(outputs.shape) / count**0.5

        return Columns(count, size, lambda rows: lambda which: drawn(rows, which))

    def _root_of_hessian(self, output: Tensor, target: Any) -> Tensor:
        shape, size = output.shape, output[0].numel()
        if self.likelihood is None:
            of_one = torch.func.jacrev(torch.func.grad(self._of_one))
            hessian = self._each(of_one, output, target)
        else:
            with torch.enable_grad():
                x = output.detach().requires_grad_()
                total = -self._log_prob(x, target).sum()
                (g,) = torch.autograd.grad(total, x, create_graph=True)
                rows = [
                    torch.autograd.grad(g_j.sum(), x, retain_graph=True, allow_unused=True)[0]
                    if g_j.requires_grad
                    else None
                    for g_j in g.reshape(len(g), -1).unbind(1)
                ]
            zero = torch.zeros_like(output)
            hessian = torch.stack([zero if r is None else r for r in rows], 1)
        values, vectors = torch.linalg.eigh(hessian.detach().reshape(len(output), size, size))
        least, most = float(values.min()), float(values.abs().max())
        if least < -1e-4 * max(most, torch.finfo(values.dtype).tiny):
            raise ParameterError(
                f'curvature "ggn" needs a loss that is convex in the output, but the Hessian of '
                f'{self.name} has the eigenvalue {least:.3g}: take "fisher" or "empirical_fisher"'
            )
        root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
        return root.movedim(-1, 0).reshape(size, *shape)


def _shape(x: Any) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def take(batch: Any, rows: slice) -> Any:
    """Some examples of a batch, whatever its tensors are in."""
    return pytree.tree_map_only(Tensor, lambda t: t[rows], batch)


# -- losses with a name ----------------------------------------------------------------------------


def _classes(output: Tensor) -> Tensor:
    """Logits ``[B, C, ...]``, as torch's cross entropy has them, -> ``[B, ..., C]``."""
    if output.dim() < 2:
        raise ParameterError(
            f"cross_entropy takes logits of shape [batch, classes, ...], got {tuple(output.shape)}"
        )
    return output.movedim(1, -1)


def _categorical_root(output: Tensor, which: Tensor) -> Tensor:
    """``√p_c (e_c - p)`` for each class and position; a position has nothing to do with others."""
    p = _classes(output).softmax(-1).movedim(-1, 1)
    p = p.reshape(*p.shape[:2], -1)
    classes, positions = which // p.shape[-1], which % p.shape[-1]
    one = torch.nn.functional.one_hot(classes, p.shape[1]).T
    columns = (one - p[:, :, positions]) * p[:, classes, positions].sqrt().unsqueeze(1)
    result = p.new_zeros(len(which), *p.shape)
    result[torch.arange(len(which)), :, :, positions] = columns.movedim(-1, 0)
    return result.reshape(-1, *output.shape)


def _one_at_a_time(output: Tensor, deviation: Tensor, which: Tensor) -> Tensor:
    """One column for each number of the output."""
    result = output.new_zeros(len(which), len(output), output[0].numel())
    result[torch.arange(len(which)), :, which] = deviation.reshape(len(output), -1)[:, which].T
    return result.reshape(-1, *output.shape)


def _bernoulli_root(output: Tensor, which: Tensor) -> Tensor:
    p = output.sigmoid()
    return _one_at_a_time(output, (p * (1 - p)).sqrt(), which)


LOSSES = {
    "cross_entropy": Loss(
        "cross_entropy",
        lambda o: Categorical(logits=_classes(o), validate_args=True),
        root=_categorical_root,
    ),
    "binary_cross_entropy": Loss(
        "binary_cross_entropy",
        lambda o: Bernoulli(logits=o, validate_args=True),
        root=_bernoulli_root,
    ),
    "squared_error": Loss(
        "squared_error",
        lambda o: Normal(o, torch.ones_like(o), validate_args=True),
        root=lambda o, which: _one_at_a_time(o, torch.ones_like(o), which),
    ),
}
