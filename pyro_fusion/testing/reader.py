# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a reader, against a source whose posterior is known."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import Normal
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_fusion.errors import FusionError, StructureError
from pyro_fusion.families.pairwise import kl
from pyro_fusion.posterior import Posterior

__all__ = ["check_reader"]

NONSENSE: tuple[Any, ...] = (None, 3, (), object())
"""What no reader takes."""


def check_reader(
    reader: Callable[[Any], Posterior],
    source: Any,
    expected: Mapping[str, Distribution],
    axes: Mapping[str, Sequence[str | None]] | None = None,
    *,
    nats: float = 1e-9,
    nonsense: Sequence[Any] = NONSENSE,
) -> None:
    """Check a reader, called as ``fuse`` does, ``reader(source)``; one that needs arguments, or a
    seed, as a ``functools.partial`` that has them.

    It returns a :class:`~pyro_fusion.Posterior` with the right sites, values, labels and dtypes,
    which shares no memory with the source and has no gradients. It gives the same bits whatever the
    global random states and torch's default dtype, and leaves alone these, Pyro's parameter store,
    effect handlers around it, and the source. Nonsense is a ``FusionError``.

    :param source: something to read, of which the posterior is known.
    :param expected: site -> its distribution, in the dtype that is to be kept.
    :param axes: site -> its labels, for sites that have some.
    :param nats: how far from what is expected a number of a site may be read, as
        ``KL(expected ‖ read)``: that of two Normals that are δ standard deviations apart is δ²/2.
        For a reader of draws say what their number warrants.
    :param nonsense: what this reader must refuse.
    :raises AssertionError: with what was expected and what came.
    """
    before = _fingerprint(source)
    with _nothing_changes():
        posterior = _traced(reader, source)
    _check_sites(posterior, expected, axes or {}, nats)
    assert _fingerprint(source) == before, "expected the source unchanged, but reading changed it"
    with _nothing_changes():
        _check_repeats(reader, source, posterior)
    for f in posterior.decomposed.values():
        for v in f.params.values():
            v.zero_()
    assert _fingerprint(source) == before, (
        "expected copies of values, but the posterior shares memory with the source"
    )
    for x in nonsense:
        with _nothing_changes():
            _check_refuses(reader, x)


def _traced(reader: Callable[[Any], Posterior], source: Any) -> Posterior:
    with poutine.trace() as outside:
        posterior = reader(source)
    seen = [name for name in outside.trace.nodes if name not in ("_INPUT", "_RETURN")]
    assert not seen, f"expected effect handlers outside to see nothing, but they saw {seen}"
    assert isinstance(posterior, Posterior), f"expected a Posterior, got {type(posterior).__name__}"
    return posterior


def _check_sites(
    posterior: Posterior,
    expected: Mapping[str, Distribution],
    axes: Mapping[str, Sequence[str | None]],
    nats: float,
) -> None:
    assert set(posterior.axes) == set(expected), (
        f"expected the sites {sorted(expected)}, got {sorted(posterior.axes)}"
    )
    whole = Posterior(expected, axes)
    for site, f in posterior.decomposed.items():
        g = whole.decomposed[site]
        what = f"site '{site}': expected "
        for aspect, mine, theirs in (
            ("the labels", whole.axes[site], posterior.axes[site]),
            ("the shape", tuple(g.shape), tuple(f.shape)),
            ("the dtype", g.dtype, f.dtype),
        ):
            assert mine == theirs, f"{what}{aspect} {mine}, got {theirs}"
        assert not any(v.requires_grad for v in f.params.values()), f"{what}values, got gradients"
        try:
            lost = float(kl(g, f).max()) / max(1, g.event_shape.numel())
        except StructureError as e:
            raise AssertionError(f"{what}a distribution of its family: {e}") from e
        assert lost <= nats, (
            f"{what}at most {nats:.1g} nats for each number from what is known, got {lost:.1g}"
        )


def _check_repeats(reader: Callable[[Any], Posterior], source: Any, first: Posterior) -> None:
    """Read it again with other global random states, and another default dtype."""
    default = torch.get_default_dtype()
    for seed, dtype in enumerate((torch.float32, torch.float64), 1):
        with _restored():
            pyro.set_rng_seed(seed)
            torch.set_default_dtype(dtype)
            again = reader(source)
        assert torch.get_default_dtype() == default
        for site, f in first.decomposed.items():
            g = again.decomposed[site]
            same = _fingerprint(f.params) == _fingerprint(g.params)
            assert same and f.structure() == g.structure(), (
                f"site '{site}': expected the same bits from the same source, whatever torch's "
                f"random state and default dtype ({dtype} now): what is drawn needs a seed of its "
                "own, and a tensor of plain numbers a dtype"
            )


def _check_refuses(reader: Callable[[Any], Posterior], x: Any) -> None:
    try:
        reader(x)
    except FusionError:
        return
    except Exception as e:
        raise AssertionError(
            f"expected a FusionError for {x!r}, got {type(e).__name__}: {e}. A registered "
            "reader is given only what it takes: check it as `read`"
        ) from e
    raise AssertionError(f"expected a FusionError for {x!r}, but it was read")


# -- what is to stay as it is ----------------------------------------------------------------------


@contextmanager
def _restored() -> Iterator[None]:
    state, default = pyro.util.get_rng_state(), torch.get_default_dtype()
    try:
        yield
    finally:
        pyro.util.set_rng_state(state)
        torch.set_default_dtype(default)


@contextmanager
def _nothing_changes() -> Iterator[None]:
    """A parameter more is in the store, so that clearing it would be seen."""
    with pyro.get_param_store().scope():
        pyro.param("check_reader", torch.ones(2))
        before = _global_state()
        yield
        for what, value in _global_state().items():
            assert value == before[what], f"expected {what} unchanged, but the reader changed it"


def _global_state() -> dict[str, Any]:
    store = pyro.get_param_store().get_state()
    random = pyro.util.get_rng_state()
    return {
        "Pyro's parameter store": _fingerprint({k: v.detach() for k, v in store["params"].items()}),
        "the random states": _fingerprint(list(random.values())),
        "torch's default dtype": torch.get_default_dtype(),
        "whether gradients are on": torch.is_grad_enabled(),
        "whether distributions are validated": Normal._validate_args,
    }


def _fingerprint(x: Any, seen: tuple[int, ...] = ()) -> Any:
    """A value that is equal for objects with the same attributes and entries."""
    if isinstance(x, Tensor):
        return (x.dtype, tuple(x.shape), x.detach().cpu().numpy().tobytes())
    if isinstance(x, np.ndarray):
        return (str(x.dtype), x.shape, x.tobytes())
    if hasattr(x, "__array__"):
        return _fingerprint(np.asarray(x))
    if isinstance(x, Path):
        return x.read_bytes() if x.is_file() else str(x)
    if isinstance(x, str):
        return Path(x).read_bytes() if os.path.isfile(x) else x
    if x is None or isinstance(x, int | float | bytes) or id(x) in seen:
        return repr(x) if id(x) not in seen else None
    seen = (*seen, id(x))
    if isinstance(x, nn.Module):
        state = {k: _fingerprint(v) for k, v in x.state_dict().items()}
        return (state, x.training, [p.requires_grad for p in x.parameters()])
    if isinstance(x, Mapping):
        return {k: _fingerprint(v, seen) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [_fingerprint(v, seen) for v in x]
    if len(seen) < 4 and hasattr(x, "__dict__"):
        return {k: _fingerprint(v, seen) for k, v in vars(x).items()}
    return type(x).__name__
