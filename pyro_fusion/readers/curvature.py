# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""The diagonal of the curvature of a network's loss, from gradients of single examples.

Each curvature is a sum over examples of :math:`J^\top R R^\top J`: J is the Jacobian of the output
by the parameters, R what the kind of curvature puts there. The diagonal is that of the squares of
:math:`J^\top r` for each column r of R:

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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Normal
from torch.utils import _pytree as pytree

from pyro_fusion.errors import ParameterError, warn_user

__all__ = ["CURVATURES", "LOSSES", "Loss", "Network", "diagonal", "take"]

CURVATURES = ("fisher", "empirical_fisher", "ggn")

# So many numbers of gradients of single examples are there at once: on a CPU 16 MiB in float32,
# which are four times as fast as ten times more, since they stay in its cache; else 256 MiB.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 2**22, 2**26


# -- losses ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """The negative log-likelihood of a target, given a network's output.

    :ivar name: for messages.
    :ivar likelihood: outputs ``[B, ...]`` -> the distribution of their targets, if it is known.
    :ivar value: output and target of a batch of one -> a number, in place of a likelihood.
    :ivar root: outputs ``[B, ...]`` -> columns ``[M, B, ...]`` whose squares add up to the Hessian
        by the output, where that does not depend on the target, and so is the Fisher information
        as well.
    """

    name: str
    likelihood: Callable[[Any], Distribution] | None = None
    value: Callable[[Any, Any], Tensor] | None = None
    root: Callable[[Tensor], Tensor] | None = None

    def scores(self, output: Tensor, target: Any) -> Tensor:
        """The gradients of the losses of examples by their outputs: ``[B, ...]``."""
        if self.likelihood is not None:
            with torch.enable_grad():
                output = output.detach().requires_grad_()
                total = -self._log_prob(output, target).sum()
            return torch.autograd.grad(total, output)[0]
        return torch.func.vmap(torch.func.grad(self._of_one))(output, target)

    def _log_prob(self, output: Tensor, target: Any) -> Tensor:
        assert self.likelihood is not None
        try:
            d = self.likelihood(output)
            result = d.log_prob(target)
            if result.shape != d.batch_shape or len(result) != len(output):
                raise ValueError(f"log densities have shape {tuple(result.shape)}")
        except (ValueError, RuntimeError, TypeError, AttributeError, IndexError) as e:
            shape = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ParameterError(
                f"loss {self.name}: the targets (shape {shape}) do not fit the outputs (shape "
                f"{tuple(output.shape)}): {' '.join(str(e).split())[:200]}"
            ) from e
        return result

    def _of_one(self, output: Tensor, target: Any) -> Tensor:
        assert self.value is not None
        loss = self.value(
            output.unsqueeze(0), pytree.tree_map_only(Tensor, lambda t: t.unsqueeze(0), target)
        )
        if loss.numel() != 1:
            raise ParameterError(
                f"loss {self.name} must return one number for one example, got shape "
                f"{tuple(loss.shape)}: sum it"
            )
        return loss.reshape(())

    def columns(
        self, curvature: str, num_samples: int | None, output: Tensor, target: Any
    ) -> Tensor:
        """R of each example, ``[M, B, ...]``; see the top of this file."""
        if curvature == "empirical_fisher":
            return self.scores(output, target).unsqueeze(0)
        if self.root is not None and (curvature == "ggn" or num_samples is None):
            return self.root(output)
        if curvature == "ggn":
            return self._root_of_hessian(output, target)
        if self.likelihood is None:
            raise ParameterError(
                'curvature "fisher" draws labels from the model: give likelihood=, a function from '
                "outputs to the distribution of their targets, as lambda out: Normal(out, 0.1), in "
                f'place of the loss {self.name}; or take "ggn" or "empirical_fisher"'
            )
        count = num_samples or 1
        labels = self.likelihood(output).sample(torch.Size([count]))
        return torch.stack([self.scores(output, y) for y in labels]) / count**0.5

    def _root_of_hessian(self, output: Tensor, target: Any) -> Tensor:
        shape, size = output.shape, output[0].numel()
        if self.likelihood is None:
            of_one = torch.func.jacrev(torch.func.grad(self._of_one))
            hessian = torch.func.vmap(of_one)(output, target)
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


def _classes(output: Tensor) -> Tensor:
    """Logits ``[B, C, ...]``, as torch's cross entropy has them, -> ``[B, ..., C]``."""
    if output.dim() < 2:
        raise ParameterError(
            f"cross_entropy takes logits of shape [batch, classes, ...], got {tuple(output.shape)}"
        )
    return output.movedim(1, -1)


def _categorical_root(output: Tensor) -> Tensor:
    p = _classes(output).softmax(-1)
    size = p.shape[-1]
    # √p_c (e_c - p), by class and by position; a position has nothing to do with the others.
    columns = (torch.eye(size).to(p) - p.unsqueeze(-2)) * p.sqrt().unsqueeze(-1)
    return _apart(columns.movedim(-2, 0)).movedim(-1, 2)


def _apart(columns: Tensor) -> Tensor:
    """Columns ``[C, B, *positions, N]``, one set for each position, zero at the others:
    ``[C · prod(positions), B, *positions, N]``."""
    positions = columns.shape[2:-1]
    number = positions.numel()
    if number == 1:
        return columns
    flat = columns.reshape(*columns.shape[:2], number, -1)
    eye = torch.eye(number).to(flat)[:, None, None, :, None]
    return (eye * flat).reshape(-1, columns.shape[1], *columns.shape[2:])


def _each(output: Tensor, deviation: Tensor) -> Tensor:
    """One column for each number of the output."""
    size = output[0].numel()
    columns = torch.eye(size).to(output).unsqueeze(1) * deviation.reshape(len(output), size)
    return columns.reshape(size, *output.shape)


def _bernoulli_root(output: Tensor) -> Tensor:
    p = output.sigmoid()
    return _each(output, (p * (1 - p)).sqrt())


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
        root=lambda o: _each(o, torch.ones_like(o)),
    ),
}


def take(batch: Any, rows: slice) -> Any:
    """Some examples of a batch, whatever its tensors are in."""
    return pytree.tree_map_only(Tensor, lambda t: t[rows], batch)


# -- networks --------------------------------------------------------------------------------------


@dataclass
class Network:
    """A module as a function of some of its parameters.

    :ivar parameters: those that there is curvature of, by name.
    """

    module: nn.Module
    parameters: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        others = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        # Buffers that a run counts in are the module's own.
        self._others = {k: v.detach().clone() for k, v in others.items() if not self._is_one(k)}
        self._vectorised = True

    def _is_one(self, name: str) -> bool:
        return name in self.parameters

    def __call__(self, parameters: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """Outputs ``[B, ...]`` of inputs of a batch: a tensor, a tuple of arguments, or a mapping
        of keyword arguments."""
        args: tuple[Any, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
        kwargs: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            args, kwargs = (), dict(inputs)
        output = torch.func.functional_call(
            self.module, {**self._others, **parameters}, args, kwargs
        )
        if not isinstance(output, Tensor):
            raise ParameterError(
                f"{type(self.module).__name__} must return a tensor of outputs, got "
                f"{type(output).__name__}: wrap it in a module that does"
            )
        return output

    def squares(self, inputs: Any, columns: Tensor, at_once: int | None) -> dict[str, Tensor]:
        """The sums over examples and columns of squared ``Jᵀ r``, as the parameters, float64.

        :param columns: ``[M, B, ...]``.
        :param at_once: how many gradients there may be at once.
        """
        number = sum(p.numel() for p in self.parameters.values())
        on_cpu = columns.device.type == "cpu"
        numbers = _AT_ONCE if on_cpu else _AT_ONCE_ELSEWHERE
        room = max(1, numbers // number) if at_once is None else at_once
        size, width = columns.shape[1], columns.shape[0]
        step = max(1, room // width)
        total = {k: p.new_zeros(p.shape, dtype=torch.float64) for k, p in self.parameters.items()}
        for i in range(0, size, step):
            rows = slice(i, i + step)
            part = take(inputs, rows)
            for found in self._gradients(part, columns[:, rows], min(width, room)):
                for k, g in found.items():
                    if g.dtype in (torch.float16, torch.bfloat16):
                        g = g.float()
                    total[k] += g.square().flatten(0, g.dim() - total[k].dim() - 1).sum(0)
        return total

    def _gradients(
        self, inputs: Any, columns: Tensor, at_once: int
    ) -> Iterator[Mapping[str, Tensor]]:
        """Gradients of examples, in some order, with leading axes."""

        def of_one(x: Any, r: Tensor) -> Mapping[str, Tensor]:
            x = pytree.tree_map_only(Tensor, lambda t: t.unsqueeze(0), x)
            pull = torch.func.vjp(lambda p: self(p, x).squeeze(0), dict(self.parameters))[1]
            return torch.func.vmap(lambda c: pull(c)[0], chunk_size=at_once)(r)

        if self._vectorised:
            try:
                yield torch.func.vmap(of_one, in_dims=(0, 1))(inputs, columns)
                return
            except (RuntimeError, NotImplementedError) as e:
                if isinstance(e, torch.OutOfMemoryError):
                    raise
                self._vectorised = False
                warn_user(
                    f"{type(self.module).__name__} cannot be run on many examples at once with "
                    f"torch.func.vmap ({' '.join(str(e).split())[:200]}): one by one, slower"
                )
        yield from self._one_by_one(inputs, columns)

    def _one_by_one(self, inputs: Any, columns: Tensor) -> Iterator[Mapping[str, Tensor]]:
        for b in range(columns.shape[1]):
            one = take(inputs, slice(b, b + 1))
            leaves = {k: p.detach().requires_grad_() for k, p in self.parameters.items()}
            with torch.enable_grad():
                output = self(leaves, one)
            for r in columns[:, b : b + 1]:
                found = torch.autograd.grad(
                    output, list(leaves.values()), r, retain_graph=True, allow_unused=True
                )
                yield {
                    k: (torch.zeros_like(p) if g is None else g).unsqueeze(0)
                    for (k, p), g in zip(leaves.items(), found, strict=True)
                }


def diagonal(
    network: Network,
    inputs: Any,
    targets: Any,
    loss: Loss,
    curvature: str,
    num_samples: int | None,
    at_once: int | None,
) -> tuple[dict[str, Tensor], int]:
    """The diagonal of the curvature over the examples of a batch, and how many these are.

    :raises ParameterError: for outputs that are not finite or not one for each example, and what
        does not fit.
    """
    try:
        with torch.no_grad():
            output = network(network.parameters, inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as e:
        if isinstance(e, ParameterError | torch.OutOfMemoryError):
            raise
        raise ParameterError(
            f"{type(network.module).__name__} failed on these inputs: {type(e).__name__}: "
            f"{' '.join(str(e).split())[:300]}"
        ) from e
    size = next(len(t) for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))
    if output.dim() == 0 or len(output) != size:
        raise ParameterError(
            f"{type(network.module).__name__} must return one output for each of {size} examples, "
            f"got shape {tuple(output.shape)}"
        )
    if not bool(output.isfinite().all()):
        bad = int((~output.isfinite()).reshape(size, -1).any(1).sum())
        raise ParameterError(
            f"the outputs of {type(network.module).__name__} must be finite, got NaN or inf for "
            f"{bad} of {size} examples"
        )
    needed = curvature == "empirical_fisher" or (curvature == "ggn" and loss.root is None)
    if targets is None and needed:
        raise ParameterError(
            f'curvature "{curvature}" of loss {loss.name} needs targets: data of (inputs, targets)'
        )
    columns = loss.columns(curvature, num_samples, output, targets)
    return network.squares(inputs, columns.detach(), at_once), size
