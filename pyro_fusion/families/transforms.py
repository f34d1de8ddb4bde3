# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Bijections as plain data: one description serves to compare the transforms of two parties and
to store them in a file.

KL and both KL barycentres are unchanged by a bijection, provided that it is the same one on both
sides. Many torch transforms compare by identity, so they are compared by description here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import transforms as pt
from torch.distributions import Transform
from torch.distributions import transforms as tt

from pyro_fusion.errors import UnsupportedFamilyError

__all__ = ["describe", "flatten", "is_elementwise", "rebuild", "register_transform"]

# name -> (type, arguments that rebuild it)
_KNOWN: dict[str, tuple[type[Transform], tuple[str, ...]]] = {}


def register_transform(transform: type[Transform], *arguments: str) -> None:
    """Let factors behind ``transform`` be compared and stored.

    :param transform: the transform's class.
    :param arguments: names of the constructor arguments, which are also attributes: numbers,
        tensors or tuples of integers.
    """
    _KNOWN[transform.__name__] = (transform, arguments)


for _t in (
    tt.ExpTransform,
    tt.SigmoidTransform,
    tt.TanhTransform,
    tt.SoftplusTransform,
    tt.StickBreakingTransform,
    tt.CorrCholeskyTransform,
    tt.LowerCholeskyTransform,
    tt.PositiveDefiniteTransform,
    pt.OrderedTransform,
    pt.SoftplusLowerCholeskyTransform,
    pt.UnitLowerCholeskyTransform,
):
    register_transform(_t)
register_transform(tt.PowerTransform, "exponent")
register_transform(tt.AffineTransform, "loc", "scale")
register_transform(tt.ReshapeTransform, "in_shape", "out_shape")


def flatten(transforms: Sequence[Transform]) -> tuple[Transform, ...]:
    """Unroll compositions; drop identities and the wrapper that only counts event dimensions."""
    result: list[Transform] = []
    for t in transforms:
        if isinstance(t, tt.ComposeTransform):
            result.extend(flatten(t.parts))
        elif isinstance(t, tt.IndependentTransform):
            result.extend(flatten([t.base_transform]))
        elif getattr(t, "_inv", None) is not None and isinstance(t, tt._InverseTransform):
            raise UnsupportedFamilyError(f"inverse transforms such as {t} are not supported")
        else:
            result.append(t)
    return tuple(result)


def is_elementwise(t: Transform) -> bool:
    """Whether ``t`` acts on each number alone, so that axes keep their meaning through it."""
    return t.domain.event_dim == 0 and t.codomain.event_dim == 0


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    return list(value) if isinstance(value, tuple) else value


def describe(t: Transform) -> list[Any]:
    """``t`` as ``[name, {argument: value}]``, JSON-serialisable and comparable by ``==``.

    :raises UnsupportedFamilyError: for a type that is not known; see :func:`register_transform`.
    """
    name = type(t).__name__
    if _KNOWN.get(name, (None,))[0] is not type(t):
        raise UnsupportedFamilyError(
            f"factors behind {name} cannot be compared or stored. Known transforms: "
            f"{', '.join(sorted(_KNOWN))}. Add it with "
            f"pyro_fusion.families.register_transform({name}, ...)"
        )
    return [name, {a: _plain(getattr(t, a)) for a in _KNOWN[name][1]}]


def rebuild(description: Sequence[Any]) -> Transform:
    """The inverse of :func:`describe`.

    :raises UnsupportedFamilyError: for a name that is not known.
    :raises TypeError, ValueError: for arguments that do not fit it.
    """
    name, arguments = description
    if name not in _KNOWN:
        raise UnsupportedFamilyError(f"unknown transform {name!r}")
    cls, expected = _KNOWN[name]
    if set(arguments) != set(expected):
        raise ValueError(f"{name} takes {list(expected)}, got {sorted(arguments)}")
    make: Callable[..., Transform] = cls
    return make(**{k: _argument(cls, v) for k, v in arguments.items()})


def _argument(cls: type[Transform], value: Any) -> Any:
    if cls is tt.ReshapeTransform:
        return torch.Size(value)
    return torch.tensor(value) if isinstance(value, list) else value
