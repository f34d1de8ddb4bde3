# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Bijections as plain data: one description serves to compare the transforms of two parties and
to store them in a file.

KL and both KL barycentres are unchanged by a bijection, provided that it is the same one on both
sides. Many torch transforms compare by identity, so they are compared by description here.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import transforms as pt
from torch.distributions import Transform
from torch.distributions import transforms as tt

from pyro_fusion.errors import UnsupportedFamilyError

__all__ = ["describe", "flatten", "is_elementwise", "rebuild", "register_transform"]

# Pyro has its own class for what is the same map.
_SAME: dict[type[Transform], type[Transform]] = {pt.SoftplusTransform: tt.SoftplusTransform}
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
    pt.CorrMatrixCholeskyTransform,
    pt.OrderedTransform,
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
        elif isinstance(t, tt._InverseTransform) and isinstance(t.inv, tt.IndependentTransform):
            result.extend(flatten([t.inv.base_transform.inv]))
        elif not _is_identity(t):
            result.append(t)
    return tuple(result)


def _is_identity(t: Transform) -> bool:
    # biject_to(positive) is exp and then "plus 0, times 1", where LogNormal is exp alone.
    return (
        isinstance(t, tt.AffineTransform)
        and bool((torch.as_tensor(t.loc) == 0).all())
        and bool((torch.as_tensor(t.scale) == 1).all())
    )


def is_elementwise(t: Transform) -> bool:
    """Whether ``t`` acts on each number alone, so that axes keep their meaning through it."""
    return t.domain.event_dim == 0 and t.codomain.event_dim == 0


# After the name of a transform: its inverse.
_INVERSE = ".inv"


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    return list(value) if isinstance(value, tuple) else value


def describe(t: Transform) -> list[Any]:
    """``t`` as ``[name, {argument: value}]``, JSON-serialisable and comparable by ``==``.

    :raises UnsupportedFamilyError: for a type that is not known; see :func:`register_transform`.
    """
    if isinstance(t, tt._InverseTransform):
        name, arguments = describe(t.inv)
        return [name + _INVERSE, arguments]
    kind = _SAME.get(type(t), type(t))
    name = kind.__name__
    if _KNOWN.get(name, (None,))[0] is not kind:
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
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise TypeError("a transform is described by its name and its arguments")
    bare = name.removesuffix(_INVERSE)
    if bare not in _KNOWN:
        raise UnsupportedFamilyError(f"unknown transform {name[:50]!r}")
    cls, expected = _KNOWN[bare]
    if set(arguments) != set(expected):
        raise ValueError(f"{bare} takes {list(expected)}, got {sorted(arguments)}")
    make: Callable[..., Transform] = cls
    t = make(**{k: _argument(cls, k, v) for k, v in arguments.items()})
    return t if bare == name else t.inv


def _argument(cls: type[Transform], name: str, value: Any) -> Any:
    """An argument as :func:`describe` writes it; torch's constructors check next to nothing."""
    what = f"{name} of {cls.__name__}"
    if cls is tt.ReshapeTransform:
        sizes = value if isinstance(value, list) and len(value) <= 16 else [None]
        if not all(type(v) is int and 0 < v < 1 << 31 for v in sizes):
            raise ValueError(f"{what} must be a list of at most 16 sizes")
        return torch.Size(value)
    if cls in (tt.AffineTransform, tt.PowerTransform):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{what} must be a finite number")
        if value == 0 and name != "loc":
            raise ValueError(f"{what} must not be zero")
        return float(value)
    return torch.tensor(value) if isinstance(value, list) else value
