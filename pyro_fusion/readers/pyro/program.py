# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Running a Pyro program without leaving a mark: its handlers, its modules, and runs isolated from
all else."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoCallable, AutoGuide
from pyro.nn.module import PyroModule
from pyro.params.param_store import normalize_param_name
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import nn

from pyro_fusion.errors import FusionError, GuideError

__all__ = ["KNOW_THEIR_MODEL", "Program", "isolated", "modules_of", "peel", "without"]

# Guides that are made for a model, and keep it.
KNOW_THEIR_MODEL = (AutoGuide, EasyGuide, GuideMessenger)


def peel(fn: Callable[..., Any]) -> tuple[list[Messenger], Callable[..., Any]]:
    """The effect handlers around a program, outermost first, and the program inside."""
    handlers: list[Messenger] = []
    while isinstance(fn, functools.partial) and not fn.keywords:
        if not fn.args:
            fn = fn.func  # Pyro's wrapper of handlers around methods
        elif len(fn.args) == 2 and isinstance(fn.args[0], Messenger):
            handlers.append(fn.args[0])
            fn = fn.args[1]
        else:
            break
    return handlers, fn


def without(model: Callable[..., Any], *kinds: type[Messenger]) -> Callable[..., Any]:
    """The model without handlers of these kinds, as those with which a guide chose its initial
    values."""
    handlers, inner = peel(model)
    for h in reversed(handlers):
        if not isinstance(h, kinds):
            inner = h(inner)
    return inner


def modules_of(fn: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a program is, is a method of, wraps, or refers to as a variable."""
    result: list[nn.Module] = []

    def visit(value: object, names: bool = True) -> None:
        if isinstance(value, nn.Module):
            if any(value is m for m in result):
                return
            result.append(value)
            for m in value.modules():
                if isinstance(m, AutoCallable):
                    visit(peel(m._guide)[1])
        elif inspect.ismethod(value):
            visit(value.__self__, names=False)
        elif isinstance(value, functools.partial):
            visit(peel(value.func)[1], names)
        elif names and inspect.isfunction(value):
            variables = inspect.getclosurevars(value)
            for v in (*variables.nonlocals.values(), *variables.globals.values()):
                if callable(v) and not inspect.isclass(v):
                    visit(peel(v)[1], names=False)

    visit(peel(fn)[1])
    return result


def _own_names(modules: Sequence[nn.Module]) -> set[str]:
    """The names of PyroModules' parameters in the store, with dots only."""
    names = set()
    for root in modules:
        if not isinstance(root, PyroModule):
            continue
        prefix = f"{root._pyro_name}." if root._pyro_name else ""
        names |= {prefix + n.removesuffix("_unconstrained") for n, _ in root.named_parameters()}
    return names


@contextmanager
def isolated(fn: Callable[..., Any], seed: int) -> Iterator[None]:
    """Isolate any number of runs of ``fn``: parameter store, random states, modules and the
    handlers outside are left as they were.

    Inside, the parameters of a PyroModule that has been called are its own. The store may have
    others under the same names, if it was cleared and another guide was fitted since; calling the
    guide would then replace its parameters by those.
    """
    modules = modules_of(fn)
    called = [m for m in modules if isinstance(m, PyroModule) and m._pyro_context.used]
    own = _own_names(called)
    store = pyro.get_param_store()
    state = store.get_state()
    for name in [k for k in state["params"] if normalize_param_name(k) in own]:
        del state["params"][name], state["constraints"][name]
    inner = [m for root in modules for m in root.modules()]
    parameters = [(m, dict(m._parameters)) for m in inner]
    buffers = [(b, b.clone()) for root in modules for b in root.buffers()]
    contexts = [(m._pyro_context, m._pyro_context.used) for m in inner if isinstance(m, PyroModule)]
    messenger = peel(fn)[1]
    trace = messenger.trace if isinstance(messenger, GuideMessenger) else None
    rng = pyro.util.get_rng_state()
    try:
        with torch.random.fork_rng(), store.scope(state), torch.no_grad(), poutine.block():
            pyro.set_rng_seed(seed)
            yield
    finally:
        pyro.util.set_rng_state(rng)
        for m, saved in parameters:
            m._parameters.clear()
            m._parameters.update(saved)
        for b, value in buffers:
            if not torch.equal(b, value):  # batch normalisation
                b.copy_(value)
        for context, used in contexts:
            context.used = used
        if trace is not None:
            messenger.trace = trace  # type: ignore[attr-defined]


@dataclass
class Program:
    """A program with its arguments, to be run inside :func:`isolated`.

    :param what: "guide" or "model", for messages.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    what: str = "guide"
    _checked: bool = field(default=False, repr=False)

    def trace(self) -> Trace:
        """Run once.

        :raises GuideError: if it fails, or makes parameters: nobody fitted those.
        """
        store = pyro.get_param_store()
        before = {normalize_param_name(k) for k in store}
        try:
            trace = poutine.trace(self.fn).get_trace(*self.args, **self.kwargs)
        except FusionError:
            raise
        except Exception as e:
            raise GuideError(
                f"the {self.what} failed when it was run to read it: {type(e).__name__}: {e}. "
                f"Arguments that follow the {self.what} are passed on to it: give those that "
                "it was fitted with"
            ) from e
        if not self._checked:
            # Parameters of modules have values of their own; pyro.param has an initial one.
            before |= _own_names(modules_of(self.fn))
            made = [k for k in store if normalize_param_name(k) not in before and "$$$" not in k]
            if made:
                raise GuideError(
                    f"the {self.what} has no fitted parameters: {sorted(made)} not in the "
                    "parameter store, so it was never called or the store was cleared since. Call "
                    f"{self.what}(*args) once and fit it, or load the store it was fitted in "
                    "(pyro.get_param_store().load), and read it before the store is cleared"
                )
            self._checked = True
        return trace
