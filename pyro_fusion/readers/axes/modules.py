# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The labels of hidden units of torch modules: proposed where a linear layer takes the output of
another, and confirmed by permuting units."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.nn.module import PyroModule
from torch import Tensor, nn

from pyro_fusion.errors import ParameterError, warn_user
from pyro_fusion.readers.axes.symmetries import Axis, Finder, FoundAxes, Probe, Proposal, Values

__all__ = ["evaluating", "hidden_layers", "module_axes", "random_input", "unchanged"]

_PROBES = 2
_BATCH = 16
# Modules that make units, or have numbers for each of them.
_WATCHED = (nn.Linear, nn.BatchNorm1d, nn.LayerNorm)


def module_axes(module: nn.Module, *inputs: Any, seed: int = 0) -> FoundAxes:
    """The labels of a network's hidden units.

    Units are proposed where a linear layer takes the output of another: ``hidden1``, ``hidden2``,
    ... in the order in which they run. They are confirmed at random parameters: permuting them must
    leave the module's output as it is, and permuting their incoming weights alone must not. The
    weights through which a unit acts (``outgoing``) are found by such trials too. Channels of
    convolutions get no label.

    The module is run in evaluation mode, and left as it was.

    :param inputs: arguments of the module; by default a random batch for the first linear layer.
    :param seed: seed of the random parameters, permutations and inputs.
    :return: labels of the parameters by name, for ``Posterior(factors, found.axes,
        outgoing=found.outgoing)``.
    :raises StructureError: if units of consecutive layers are not exchangeable, as behind a
        residual connection, or have no effect at these inputs: give axes by hand.
    :raises ParameterError: for what is no plain module, cannot be run with ``inputs``, or returns
        no tensor.

    Example::

        found = module_axes(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        found.axes["2.weight"]  # (None, "hidden1")
        found.outgoing  # {"2.weight": "hidden1"}
    """
    if not isinstance(module, nn.Module) or isinstance(module, PyroModule):
        raise ParameterError(
            f"expected a torch module, got {type(module).__name__}; the posterior of a PyroModule "
            'is read from its guide, from_guide(guide, *args, axes="auto")'
        )
    if lazy := [k for k, p in module.named_parameters() if nn.parameter.is_lazy(p)]:
        raise ParameterError(f"parameters {lazy} have no shape yet: run the module once first")
    parameters = {k: p for k, p in module.named_parameters() if p.is_floating_point()}
    shapes = {k: tuple(p.shape) for k, p in parameters.items()}
    with torch.random.fork_rng(), torch.no_grad(), unchanged(module), evaluating([module]):
        torch.manual_seed(seed)
        if not inputs and (x := random_input([module])) is not None:
            inputs = (x,)
        draws = [{k: _random(p) for k, p in parameters.items()} for _ in range(_PROBES)]

        def respond(values: Values) -> Mapping[str, Tensor]:
            torch.manual_seed(seed)
            like = next(iter(values.values()), torch.empty(0)).dtype
            state = {**{k: _at(b.clone(), like) for k, b in module.named_buffers()}, **values}
            output = torch.func.functional_call(module, state, _at(inputs, like))
            return dict(_tensors("output", output))

        try:
            # With all the digits that there are, so that small differences show.
            probes = [Probe(_at(values, torch.float64), respond) for values in draws]
        except Exception:  # tensors of another dtype made on the way
            try:
                probes = [Probe(values, respond) for values in draws]
            except Exception as e:
                raise ParameterError(
                    f"the module failed when it was run: {type(e).__name__}: {e}. Pass its "
                    "arguments: module_axes(module, *inputs)"
                ) from e
        if not probes[0].before:
            raise ParameterError(
                f"found no tensor in what the {type(module).__name__} returns, so there is no "
                "telling what permuting its units changes: give axes by hand"
            )

        def once(_: str, labels: Sequence[str | None]) -> bool:
            used = [a for a in labels if a is not None]
            return len(used) == len(set(used))

        finder = Finder(shapes, probes, once, shapes, seed)
        proposals = list(
            hidden_layers([module], lambda: respond(probes[0].values), shapes, taken=shapes)
        )
        found = finder.run(proposals)
    if not proposals:
        warn_user(
            f"found no hidden units in the {type(module).__name__}: no linear layer takes what "
            "another makes. If some of its parameters have units in common, give axes by hand"
        )
    return found


def _at(x: Any, dtype: torch.dtype) -> Any:
    """Cast floating-point tensors, in tuples, lists and mappings too."""
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if type(x) in (tuple, list):
        return type(x)(_at(v, dtype) for v in x)
    return {k: _at(v, dtype) for k, v in x.items()} if type(x) is dict else x


def _random(p: Tensor) -> Tensor:
    """Random values at which units differ and their sums neither vanish nor explode."""
    fan_in = p[0].numel() if p.dim() > 1 else 1
    return torch.randn_like(p) / fan_in**0.5


def _tensors(name: str, output: Any, depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield name, output
    elif depth == 0 or isinstance(output, str):
        return
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(f"{name}[{key!r}]", value, depth - 1)
    elif isinstance(output, Sequence):
        for i, value in enumerate(output):
            yield from _tensors(f"{name}[{i}]", value, depth - 1)
    else:  # distributions, dataclasses
        for key, value in getattr(output, "__dict__", {}).items():
            yield from _tensors(f"{name}.{key}", value, depth - 1)


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run modules in evaluation mode: dropout would tell units apart."""
    modes = [(m, m.training) for root in modules for m in root.modules()]
    for m, _ in modes:
        m.training = False
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Leave a module as it was, whatever runs of it do to its attributes and to lists, sets and
    mappings that are attributes. ``torch.func.functional_call`` leaves other parameters behind in
    modules that have two names, and in recurrent ones; and some modules keep what they computed."""
    before = []
    for m in module.modules():
        attributes = dict(vars(m))
        held = [(v, copy.copy(v)) for v in attributes.values() if isinstance(v, (list, set, dict))]
        before.append((m, attributes, held))
    try:
        yield
    finally:
        for m, attributes, held in before:
            vars(m).clear()
            vars(m).update(attributes)
            for now, was in held:
                now.clear()
                now.extend(was) if isinstance(now, list) else now.update(was)


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
    run: Callable[[], Any],
    shapes: Mapping[str, Sequence[int]],
    taken: Collection[str] = (),
) -> Iterator[Proposal]:
    """A label for the units between each linear layer and those that take what it makes.

    :param run: runs the modules, with the same result each time.
    :param shapes: site -> shape; a layer whose numbers are no sites is fixed.
    :param taken: names that no label may have.
    """
    watched = {
        f"{getattr(root, '_pyro_name', '')}.{k}".strip("."): m
        for root in modules
        for k, m in root.named_modules()
        if isinstance(m, _WATCHED)
    }
    number = 0
    for name, norms, heads in _chains(watched, run):
        size: Any = watched[name].out_features
        heads = [k for k in heads if watched[k].in_features == size]
        if not heads:
            continue
        every: list[Axis] = [(f"{name}.weight", 0)]
        every += [(f"{k}.{p}", 0) for k in (name, *norms) for p in _vectors(watched[k], size)]
        every += [(f"{k}.weight", 1) for k in heads]
        sites = [a for a in every if tuple(shapes.get(a[0], ()))[a[1] : a[1] + 1] == (size,)]
        made = tuple(a for a in sites if a[0] in (f"{name}.weight", f"{name}.bias"))
        if not made:
            continue  # fixed features have an order of their own
        number += 1
        while (label := f"hidden{number}") in taken:
            number += 1
        likely = tuple(a for a in sites if a not in made)
        there = {f"{k}.{p}" for k in (name, *norms, *heads) for p, _ in _own(watched[k])}
        fixed = tuple(site for site, _ in every if site in there and site not in shapes)
        yield Proposal(label, f"layer '{name}'", made, likely, fixed, certain=True)


def _chains(
    watched: Mapping[str, nn.Module], run: Callable[[], Any]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each linear layer, in the order in which they run, with the normalisations and the linear
    layers whose input changes when its output does, and that no later linear layer precedes."""
    plain = _inputs(watched, run)
    linear = [k for k in plain if isinstance(watched[k], nn.Linear)]
    behind = {}
    for k in linear:
        other = _inputs(watched, run, disturbed=k)
        behind[k] = [x for x in plain if not _equal(plain[x], other.get(x))]
    last = {x: k for k in linear for x in behind[k]}  # later ones overwrite
    for k in linear:
        own = [x for x in behind[k] if last[x] == k]
        heads = [x for x in own if isinstance(watched[x], nn.Linear)]
        yield k, [x for x in own if x not in heads], heads


def _inputs(
    watched: Mapping[str, nn.Module], run: Callable[[], Any], disturbed: str | None = None
) -> dict[str, Tensor]:
    """The inputs of modules at their first call, by name, in the order of the calls."""
    result: dict[str, Tensor] = {}
    handles = []

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if given:
                result.setdefault(name, given[0].detach().clone())

        return hook

    def disturb(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + torch.linspace(0.5, 1.5, output.shape[-1]).to(output)

    try:
        for name, m in watched.items():
            handles.append(m.register_forward_pre_hook(note(name), with_kwargs=True))
        if disturbed is not None:
            handles.append(watched[disturbed].register_forward_hook(disturb))
        run()
    finally:
        for handle in handles:
            handle.remove()
    return result


def _equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and torch.equal(a, b)


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(recurse=False)


def _vectors(module: nn.Module, size: int) -> tuple[str, ...]:
    """The parameters of a module that have one number for each of ``size`` units."""
    if isinstance(module, nn.Linear):
        return ("bias",)
    normalises = getattr(module, "num_features", getattr(module, "normalized_shape", None))
    known = isinstance(module, (nn.BatchNorm1d, nn.LayerNorm)) and normalises in (size, (size,))
    return ("weight", "bias") if known else ()
