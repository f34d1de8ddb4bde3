# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Bijections as plain data: one description serves to compare the transforms of two parties and
to store them in a file.

KL and both KL barycentres are unchanged by a bijection, provided that it is the same one on both
sides. Many torch transforms compare by identity, so they are compared by description here.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import transforms as pt
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.distributions import transforms as tt
from torch.distributions.constraints import Constraint

from pyro_fusion.errors import ParameterError, UnsupportedFamilyError

__all__ = [
    "at_dtype",
    "check_domains",
    "describe",
    "flatten",
    "is_elementwise",
    "plain_affine",
    "plain_transform",
    "rebuild",
    "register_transform",
    "with_cache",
]

# Pyro's own classes for maps that torch has too.
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


def with_cache(t: Transform, size: int) -> Transform:
    """``t`` with a cache of its own (``size`` 1), or without one (0): caches are neither shared
    nor copied, as their tensors may be part of an autograd graph."""
    if size == t._cache_size == 0:
        return t
    if isinstance(t, tt._InverseTransform):
        return with_cache(t.inv, size).inv
    try:
        if size != t._cache_size:
            return t.with_cache(size)
    except NotImplementedError:
        pass
    result = copy.copy(t)
    result._cache_size = size
    result._cached_x_y = None, None
    return result


def at_dtype(t: Transform, dtype: torch.dtype) -> Transform:
    """``t`` for values of ``dtype``: a power has the wider dtype of base and exponent."""
    if isinstance(t, tt._InverseTransform):
        inner = at_dtype(t.inv, dtype)
        return t if inner is t.inv else inner.inv
    if isinstance(t, tt.PowerTransform) and t.exponent.dtype != dtype:
        return tt.PowerTransform(t.exponent.to(dtype), cache_size=t._cache_size)
    return t


def is_elementwise(t: Transform) -> bool:
    """True if ``t`` acts on each number alone, so that axes keep their meaning through it."""
    return t.domain.event_dim == 0 and t.codomain.event_dim == 0


# Suffix of a transform's name that stands for its inverse.
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
    """The transform with a given description; the inverse of :func:`describe`.

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
    """A constructor's argument from a description, checked here because torch hardly does."""
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
        # torch reads exponent.sign(), and makes a float32 of a number.
        exact = torch.tensor(value, dtype=torch.float64)
        return exact if cls is tt.PowerTransform else float(value)
    return torch.tensor(value) if isinstance(value, list) else value


_Bounds = tuple[float, float]
_EVERYTHING: _Bounds = (-math.inf, math.inf)
# The least factor between what an affine map or a power does to one and overflow.
_MARGIN = 1e3


def _bare(c: Constraint) -> Constraint:
    while isinstance(c, constraints.independent):
        c = c.base_constraint
    return c


def _bounds(c: Constraint) -> _Bounds | None:
    """The bounds of all entries of a value; None if they are not known."""
    c = _bare(c)
    if isinstance(c, type(constraints.simplex)):
        return 0.0, 1.0
    if c is constraints.real or isinstance(c, type(constraints.real)):
        return _EVERYTHING
    low, high = getattr(c, "lower_bound", None), getattr(c, "upper_bound", None)
    if c is constraints.boolean:
        low, high = 0.0, 1.0
    if low is None and high is None:
        return None
    lower = -math.inf if low is None else float(torch.as_tensor(low).min())
    upper = math.inf if high is None else float(torch.as_tensor(high).max())
    # Half a step wider for discrete values, which include the ends, where a log is not finite.
    step = 0.5 if c.is_discrete else 0.0
    return lower - step, upper + step


def check_domains(
    support: Constraint | None, transforms: Sequence[Transform], dtype: torch.dtype
) -> None:
    """Check that ``transforms`` can follow a family with this ``support``, one after the other.

    :raises ParameterError: naming the transform whose domain does not hold the values before it.
    """
    before = None if support is None else _bare(support)
    bounds = None if support is None else _bounds(support)
    for t in transforms:
        domain = _bare(t.domain)
        inverse = isinstance(t, tt._InverseTransform)
        name = f"{type(t.inv).__name__}{_INVERSE}" if inverse else type(t).__name__
        needed = _bounds(domain)
        if domain.event_dim and before is not None:
            fits = isinstance(before, type(domain))
        else:
            # Unknown bounds are left to a check of values.
            fits = not (needed and bounds) or (needed[0] <= bounds[0] and bounds[1] <= needed[1])
        if not fits:
            raise ParameterError(
                f"{name} takes values in {t.domain}, but what it is given is in {before}"
            )
        _check_size(t.inv if inverse else t, dtype)
        if not isinstance(t, tt.ReshapeTransform):
            before, bounds = _bare(t.codomain), _image(t, bounds)


def _check_size(t: Transform, dtype: torch.dtype) -> None:
    if isinstance(t, tt.PowerTransform):
        size = float(t.exponent.abs().max())
        if not 1 / _MARGIN <= size <= _MARGIN:
            raise ParameterError(f"PowerTransform with exponent {t.exponent} leaves every range")
    if not isinstance(t, tt.AffineTransform):
        return
    info = torch.finfo(torch.promote_types(dtype, torch.float32))
    loc, scale = (torch.as_tensor(v).abs().max().item() for v in (t.loc, t.scale))
    if max(loc, scale) > info.max / _MARGIN or scale < info.tiny * _MARGIN:
        raise ParameterError(
            f"AffineTransform with loc {t.loc} and scale {t.scale} leaves the range of {dtype}"
        )


def _image(t: Transform, bounds: _Bounds | None) -> _Bounds | None:
    """Bounds of the images under ``t`` of values within ``bounds``: those of its codomain, and if
    it acts on each number alone, and is thus monotone, also the images of the ends."""
    known = _bounds(t.codomain)
    if bounds is None or not is_elementwise(t):
        return known
    ends = t(torch.tensor(bounds, dtype=torch.float64))
    if bool(torch.isnan(ends).any()):
        return known
    low, high = float(ends.min()), float(ends.max())
    return (low, high) if known is None else (max(low, known[0]), min(high, known[1]))


def _scalar(t: Transform, value: float | Tensor) -> float:
    values = torch.as_tensor(value).flatten()
    if bool((values != values[0]).any()):
        raise UnsupportedFamilyError(
            f"{type(t).__name__} with arguments that differ along an axis is not one bijection "
            "for all components"
        )
    return float(values[0])


def plain_transform(t: Transform) -> Transform:
    """``t`` with plain numbers in place of tensors, so that it is the same on every device."""
    if isinstance(t, tt._InverseTransform):
        inner: Transform = t.inv
        if isinstance(inner, tt.AffineTransform):
            return tt.AffineTransform(-inner.loc / inner.scale, 1 / inner.scale)
        if isinstance(inner, tt.PowerTransform):
            return plain_transform(tt.PowerTransform(1 / inner.exponent.double()))
        return t
    if isinstance(t, tt.PowerTransform):
        # torch reads exponent.sign(), so this one has to be a tensor.
        exponent = torch.tensor(_scalar(t, t.exponent), dtype=torch.float64)
        return tt.PowerTransform(exponent)
    return t


def plain_affine(t: tt.AffineTransform) -> tt.AffineTransform:
    """``t`` with plain numbers.

    :raises UnsupportedFamilyError: if its arguments differ along an axis.
    """
    return tt.AffineTransform(_scalar(t, t.loc), _scalar(t, t.scale))
