# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The hidden units of torch modules: their labels, proposed by the order of linear layers and
confirmed by permuting units."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.nn.module import PyroModule
from torch import Tensor, nn

from pyro_fusion.errors import ParameterError
from pyro_fusion.readers.symmetries import Axis, Finder, FoundAxes, Probe, Proposal, Values

__all__ = ["evaluating", "hidden_layers", "module_axes", "random_input"]

_PROBES = 2
_BATCH = 16


def module_axes(module: nn.Module, *inputs: Any, seed: int = 0) -> FoundAxes:
    """The labels of a network's hidden units.

    Where the outputs of a linear layer are as many as the inputs of the next, they are taken for
    hidden units: ``hidden1``, ``hidden2``, ... along the networks. That is confirmed, at random
    parameters, by permuting units, which must leave the output as it is; so is through which
    weights a unit acts (``outgoing``). What convolutions make has no label.

    The module is run in evaluation mode, and left as it was.

    :param inputs: arguments of the module; by default a random batch for the first linear layer.
    :param seed: of the parameters, permutations and inputs that are tried.
    :return: labels of the parameters by name, for ``Posterior(factors, found.axes,
        outgoing=found.outgoing)``.
    :raises StructureError: if units of consecutive layers are not exchangeable, as behind a
        residual connection: give axes by hand.
    :raises ParameterError: for what is no plain module, or cannot be run with ``inputs``.

    Example::

        found = module_axes(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        found.axes["2.weight"]  # (None, "hidden1")
        found.outgoing  # {"2.weight": "hidden1"}
    """
    if not isinstance(module, nn.Module) or isinstance(module, PyroModule):
        raise ParameterError(
            f"expected a torch module, got {type(module).__name__}; the posterior of a PyroModule "
            'is read from its guide, Posterior.from_guide(guide, *args, axes="auto")'
        )
    parameters = {k: p for k, p in module.named_parameters() if p.is_floating_point()}
    shapes = {k: tuple(p.shape) for k, p in parameters.items()}
    with torch.random.fork_rng(), torch.no_grad(), evaluating([module]):
        torch.manual_seed(seed)
        if not inputs and (x := random_input([module])) is not None:
            inputs = (x,)
        draws = [{k: _random(p) for k, p in parameters.items()} for _ in range(_PROBES)]

        def respond(values: Values) -> Mapping[str, Tensor]:
            torch.manual_seed(seed)
            state = {**{k: b.clone() for k, b in module.named_buffers()}, **values}
            output = torch.func.functional_call(module, state, inputs)
            return dict(_tensors("output", output))

        try:
            probes = [Probe(values, respond) for values in draws]
        except Exception as e:
            raise ParameterError(
                f"the module failed when it was run: {type(e).__name__}: {e}. Pass its arguments: "
                "module_axes(module, *inputs)"
            ) from e

        def once(_: str, labels: Sequence[str | None]) -> bool:
            used = [a for a in labels if a is not None]
            return len(used) == len(set(used))

        finder = Finder(shapes, probes, once, shapes, seed)
        return finder.run(list(hidden_layers([module], shapes, taken=shapes)))


def _random(p: Tensor) -> Tensor:
    """Values at which units differ and their sums neither vanish nor explode."""
    fan_in = p[0].numel() if p.dim() > 1 else 1
    return torch.randn_like(p) / fan_in**0.5


def _tensors(name: str, output: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(f"{name}[{key!r}]", value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for i, value in enumerate(output):
            yield from _tensors(f"{name}[{i}]", value)


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run modules in evaluation mode: what is dropped at random would tell units apart."""
    modes = [(m, m.training) for root in modules for m in root.modules()]
    for m, _ in modes:
        m.training = False
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def random_input(modules: Sequence[nn.Module]) -> Tensor | None:
    """A random batch for the first linear layer; None if there is none."""
    for root in modules:
        for m in root.modules():
            if isinstance(m, nn.Linear):
                like = next((p for p in root.parameters()), torch.empty(0))
                return torch.randn(_BATCH, m.in_features).to(like)
    return None


def hidden_layers(
    modules: Sequence[nn.Module],
    shapes: Mapping[str, Sequence[int]],
    taken: Collection[str] = (),
) -> Iterator[Proposal]:
    """A label for the units between each two consecutive linear layers.

    :param shapes: site -> shape; a layer whose numbers are no sites is fixed.
    :param taken: names that no label may have.
    """
    number = 0
    for root in modules:
        prefix = getattr(root, "_pyro_name", "")
        named = [(f"{prefix}.{k}".strip("."), m) for k, m in root.named_modules()]
        linear = [i for i, (_, m) in enumerate(named) if isinstance(m, nn.Linear)]
        for i, j in itertools.pairwise(linear):
            (name, first), (_, second) = named[i], named[j]
            if first.out_features != second.in_features:
                continue
            size = first.out_features
            every: list[Axis] = [(f"{name}.weight", 0)]
            every += [(f"{k}.{p}", 0) for k, m in named[i:j] for p in _vectors(m, size)]
            every += [(f"{named[j][0]}.weight", 1)]
            sites = [a for a in every if tuple(shapes.get(a[0], ()))[a[1] : a[1] + 1] == (size,)]
            made = tuple(a for a in sites if a[0] in (f"{name}.weight", f"{name}.bias"))
            if not made:
                continue  # fixed features have an order of their own
            number += 1
            while (label := f"hidden{number}") in taken:
                number += 1
            likely = tuple(a for a in sites if a not in made)
            there = {f"{k}.{p}" for k, m in named[i : j + 1] for p, _ in _own(m)}
            fixed = tuple(site for site, _ in every if site in there and site not in shapes)
            yield Proposal(label, f"layer '{name}'", made, likely, fixed, certain=True)


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(recurse=False)


def _vectors(module: nn.Module, size: int) -> tuple[str, ...]:
    """What a module may have one number for each unit of."""
    if isinstance(module, nn.Linear):
        return ("bias",)
    normalises = getattr(module, "num_features", getattr(module, "normalized_shape", None))
    known = isinstance(module, (nn.BatchNorm1d, nn.LayerNorm)) and normalises in (size, (size,))
    return ("weight", "bias") if known else ()
