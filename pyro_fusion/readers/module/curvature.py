# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

r"""The diagonal of the curvature of a network's loss, from gradients of single examples.

Each curvature is a sum over examples of :math:`J^\top R R^\top J`: J is the Jacobian of the output
by the parameters, R a root of the loss's curvature, from ``losses.py``. The diagonal is
that of the squares of :math:`J^\top r` for each column r of R.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from pyro_fusion.errors import ParameterError, warn_user
from pyro_fusion.readers.module.losses import Columns, Loss, take

__all__ = ["Network", "as_trained", "diagonal"]

# So many numbers of gradients of single examples are there at once: on a CPU 16 MiB in float32,
# which are four times as fast as ten times more, since they stay in its cache; else 256 MiB.
_AT_ONCE, _AT_ONCE_ELSEWHERE = 2**22, 2**26


@contextmanager
def as_trained() -> Iterator[None]:
    """Run attention as it runs when gradients are taken, of many examples at once: else torch takes
    a shorter way, which gives padding other values."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass
class Network:
    """A module as a function of some of its parameters.

    :ivar parameters: those that there is curvature of, by name.
    """

    module: nn.Module
    parameters: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        every = self.module.named_parameters()
        self._fixed = {k: p.detach() for k, p in every if k not in self.parameters}
        self._vectorised = True

    def __call__(self, parameters: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """Outputs ``[B, ...]`` of inputs of a batch: a tensor, a tuple of arguments, or a mapping
        of keyword arguments."""
        # Copies: a module may write into its buffers and its inputs.
        inputs = pytree.tree_map_only(Tensor, torch.clone, inputs)
        buffers = {k: b.detach().clone() for k, b in self.module.named_buffers()}
        args: tuple[Any, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
        kwargs: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            args, kwargs = (), dict(inputs)
        output = torch.func.functional_call(
            self.module, {**self._fixed, **buffers, **parameters}, args, kwargs
        )
        if not isinstance(output, Tensor):
            raise ParameterError(
                f"{type(self.module).__name__} must return a tensor of outputs, got "
                f"{type(output).__name__}: wrap it in a module that does"
            )
        return output

    def squares(self, inputs: Any, columns: Columns, at_once: int | None) -> dict[str, Tensor]:
        """The sums over examples and columns of squared ``Jᵀ r``, as the parameters, float64.

        :param at_once: how many gradients there may be at once.
        """
        number = sum(p.numel() for p in self.parameters.values())
        some = next(t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))
        size, width, device = len(some), columns.width, some.device
        numbers = _AT_ONCE if device.type == "cpu" else _AT_ONCE_ELSEWHERE
        room = max(1, numbers // number) if at_once is None else at_once
        total = {k: p.new_zeros(p.shape, dtype=torch.float64) for k, p in self.parameters.items()}
        # The columns need room as well, if classes are all words, say.
        step = max(1, min(room, numbers // columns.numbers) // width)
        wide = max(1, numbers // columns.numbers) if step == 1 else width
        for i in range(0, size, step):
            rows = slice(i, i + step)
            part, of_part = take(inputs, rows), columns.of(rows)
            for which in torch.arange(width, device=device).split(wide):
                for found in self._squares(part, of_part(which).detach(), room):
                    for k, v in found.items():
                        total[k] += v.sum(0)
        return total

    def _squares(self, inputs: Any, columns: Tensor, room: int) -> Iterator[Mapping[str, Tensor]]:
        """Squared gradients of examples, summed over columns, with a leading axis."""

        def of_one(x: Any, r: Tensor) -> Mapping[str, Tensor]:
            x = pytree.tree_map_only(Tensor, lambda t: t.unsqueeze(0), x)
            pull = torch.func.vjp(lambda p: self(p, x).squeeze(0), dict(self.parameters))[1]
            # Not by the `chunk_size` of vmap, which has all gradients at once in the end.
            first, *rest = r.split(room)
            sums = _summed(torch.func.vmap(pull)(first)[0])
            for some in rest:
                more = _summed(torch.func.vmap(pull)(some)[0])
                sums = {k: v.double() + more[k] for k, v in sums.items()}
            return sums

        if self._vectorised:
            try:
                yield torch.func.vmap(of_one, in_dims=(0, 1))(inputs, columns)
                return
            except (RuntimeError, NotImplementedError) as e:
                if isinstance(e, torch.cuda.OutOfMemoryError):
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
                    k: _square(torch.zeros_like(p) if g is None else g).unsqueeze(0)
                    for (k, p), g in zip(leaves.items(), found, strict=True)
                }


def _square(g: Tensor) -> Tensor:
    half = g.dtype in (torch.float16, torch.bfloat16)
    return (g.float() if half else g).square()


def _summed(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: _square(g[0]) if len(g) == 1 else _square(g).sum(0) for k, g in gradients.items()}


def diagonal(
    network: Network,
    inputs: Any,
    targets: Any,
    loss: Loss,
    curvature: str,
    num_samples: int | None,
    at_once: int | None,
) -> tuple[dict[str, Tensor], int]:
    """The diagonal of the curvature over the examples of a batch, and the number of these.

    :raises ParameterError: for outputs that are not finite, not one for each example, or not of
        that example alone, and what does not fit.
    """
    what = type(network.module).__name__
    try:
        with torch.no_grad():
            output = network(network.parameters, inputs)
            alone = network(network.parameters, take(inputs, slice(0, 1)))
    except (RuntimeError, TypeError, ValueError, IndexError) as e:
        if isinstance(e, ParameterError | torch.cuda.OutOfMemoryError):
            raise
        raise ParameterError(
            f"{what} failed on these inputs: {type(e).__name__}: {' '.join(str(e).split())[:300]}"
        ) from e
    size = next(len(t) for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor))
    if output.dim() == 0 or len(output) != size:
        raise ParameterError(
            f"{what} must return one output for each of {size} examples, got shape "
            f"{tuple(output.shape)}"
        )
    if not bool(output.isfinite().all()):
        bad = int((~output.isfinite()).reshape(size, -1).any(1).sum())
        raise ParameterError(
            f"the outputs of {what} must be finite, got NaN or inf for {bad} of {size} examples"
        )
    _check_alone(what, alone, output)
    needed = curvature == "empirical_fisher" or (curvature == "ggn" and loss.root is None)
    if targets is None and needed:
        raise ParameterError(
            f'curvature "{curvature}" of loss {loss.name} needs targets: data of (inputs, targets)'
        )
    columns = loss.columns(curvature, num_samples, output, targets)
    return network.squares(inputs, columns, at_once), size


def _check_alone(what: str, alone: Tensor, output: Tensor) -> None:
    """The first example must have the output that it has among others, but for rounding."""
    among = output[:1]
    if alone.shape == among.shape:
        allowed = 10 * torch.finfo(output.dtype).eps ** 0.5 * float(output.abs().max())
        if float((alone - among).abs().max()) <= allowed:
            return
    raise ParameterError(
        f"{what} gives an example another output on its own than among others (shapes "
        f"{tuple(alone.shape)} and {tuple(among.shape)}), so there are no gradients of single "
        "examples: these must be along the first axis (batch_first=True), and nothing be random"
    )
