# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A device that is not there: tensors that say that they are on another device and are computed on
the CPU. As on a GPU, tensors of two devices do not mix; and whatever makes the host wait for the
device is noted. So tests can see without a GPU where a program would fail or stall on one."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Not "cuda": a build of torch without CUDA refuses that before it asks any Python.
DEVICE = torch.device("meta")

aten = torch.ops.aten

# What reads a value or a size from the device, after the kernels of CUDA.
_READS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.is_nonzero,
    aten.equal,
    aten.bincount,
    aten.multinomial,
    aten.repeat_interleave,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten._linalg_check_errors,
    aten._linalg_eigh,
    aten._linalg_svd,
}
_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class There(torch.Tensor):
    """A tensor on :data:`DEVICE`, with its values in ``here``."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        stride = here.stride() if here.layout == torch.strided else (here.shape[1], 1)
        offset = here.storage_offset() if here.layout == torch.strided else 0
        result = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, stride, offset, dtype=here.dtype, device=DEVICE
        )
        result.here = here
        return result

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.here})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: There) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.here = value.here

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, [])


class _Elsewhere(TorchDispatchMode):
    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.reads)


class _OfNumbers(TorchFunctionMode):
    """``torch.tensor`` and ``torch.as_tensor`` of numbers by way of the CPU: of all functions these
    ask no dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.new_tensor and isinstance(args[0], There):
            dtype = kwargs.get("dtype") or args[0].dtype
            return torch.tensor(args[1], dtype=dtype).to(DEVICE)
        made = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        to = kwargs.get("device")
        if not made or to is None or torch.device(to) != DEVICE:
            return func(*args, **kwargs)
        return func(*args, **(kwargs | {"device": "cpu"})).to(DEVICE)


@contextmanager
def elsewhere() -> Iterator[list[str]]:
    """Where :data:`DEVICE` can be used. Yields a list that grows by the place of each read: of
    whatever makes the host wait."""
    reads: list[str] = []
    with _OfNumbers(), _Elsewhere(reads):
        yield reads


def _run(func: Any, args: Any, kwargs: Any, reads: list[str]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = any(isinstance(x, There) for x in tensors)
    strangers = [x for x in tensors if not isinstance(x, There) and x.dim()]
    packet = func.overloadpacket
    copies = packet in (aten._to_copy, aten.copy_)
    if packet in _INDEXING and isinstance(args[0], There):
        # An index may be on the CPU, at the price of a wait.
        strangers = [x for x in args[2:] if isinstance(x, torch.Tensor) and x.dim()]
        strangers = [x for x in strangers if not isinstance(x, There)]
    if there and not copies and strangers:
        raise RuntimeError(f"{func}: expected all tensors on one device")
    to = kwargs.get("device")
    result_there = there if to is None else torch.device(to) == DEVICE
    if there or result_there:
        waits = packet in _READS
        waits |= packet is aten.segment_reduce and not kwargs.get("unsafe")
        waits |= any(x.layout != torch.strided for x in map(_here, tensors))
        if packet in _INDEXING:
            index = [x for x in args[1] if x is not None]
            waits |= any(x.dtype == torch.bool or not isinstance(x, There) for x in index)
        if copies:
            blocking = not (
                kwargs.get("non_blocking") or (packet is aten.copy_ and args[2:] == (True,))
            )
            across = any(not isinstance(x, There) for x in tensors) or there != result_there
            waits |= across and (blocking or not result_there)
        if waits:
            reads.append(f"{packet}: {_place()}")
    if to is not None:
        kwargs = kwargs | {"device": "cpu"}
    args, kwargs = tree_map(_here, (args, kwargs))
    result = func(*args, **kwargs)
    if not result_there:
        return result
    return tree_map(lambda x: There(x) if isinstance(x, torch.Tensor) else x, result)


def _here(x: Any) -> Any:
    return x.here if isinstance(x, There) else x


def _place() -> str:
    """The innermost line that is neither torch's nor of this file."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            return f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
    raise AssertionError
