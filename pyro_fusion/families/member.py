# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Distributions taken apart into family, parameters, transforms and axes, and put together again.

Everything that fusion does to the axes of a distribution (index, permute, stack, pad) is done on a
:class:`Member`, so no other file needs to know ``Independent``, ``TransformedDistribution``,
``ExpandedDistribution`` or ``MaskedDistribution``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    Transform,
    TransformedDistribution,
    constraints,
)
from torch.distributions import transforms as tt

from pyro_fusion.errors import ParameterError, StructureError, UnsupportedFamilyError
from pyro_fusion.families.family import Family, Params, family_of
from pyro_fusion.families.transforms import (
    at_dtype,
    check_domains,
    describe,
    flatten,
    is_elementwise,
    plain_affine,
    plain_transform,
    with_cache,
)

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Member"]

# Pyro has a class for these bases behind these transforms, with a mean and a readable repr.
_NAMED: dict[tuple[type, type], Callable[..., dist.TorchDistribution]] = {
    (dist.Normal, tt.ExpTransform): dist.LogNormal,
    (dist.Gamma, tt.PowerTransform): dist.InverseGamma,
}

# Wrappers whose batch shape may be larger than that of their base.
_WIDENING = ExpandedDistribution | MaskedDistribution


@dataclass(frozen=True, eq=False)
class Member:
    """A distribution as family + parameters + transforms.

    The axes of the parameters' common batch shape come first; the leading ``batch_dim`` of them
    are batch axes of the distribution, the others are event axes made by ``Independent``; the
    family's own event axes follow. ``family.event_dim`` and the event axes of the value differ
    only behind a transform that changes shapes.
    """

    family: Family
    params: Params
    transforms: tuple[Transform, ...]
    batch_dim: int

    def __post_init__(self) -> None:
        # The caller keeps its own transforms, with their caches.
        plain = tuple(with_cache(t, 0) for t in self.transforms)
        object.__setattr__(self, "transforms", plain)

    # -- taking apart and putting together ---------------------------------------------------

    @classmethod
    def of(cls, d: Distribution) -> Self:
        """Take a distribution apart. Values are copied (detached), never shared.

        :raises UnsupportedFamilyError: if no family is registered for the distribution inside.
        """
        member = _absorb_affine(_take_apart(d))
        for t in member.transforms:
            if not t.bijective:
                raise UnsupportedFamilyError(
                    f"{type(d).__name__} is a {member.family.name} behind {type(t).__name__}, "
                    "which is not a bijection"
                )
        dtype = functools.reduce(torch.promote_types, (v.dtype for v in member.params.values()))
        params = {k: v.detach().to(dtype, copy=True) for k, v in member.params.items()}
        return cls(member.family, params, member.transforms, member.batch_dim)

    def distribution(self, validate_args: bool | None = None) -> dist.TorchDistribution:
        """The Pyro distribution, with the batch and event shape of the one taken apart."""
        independent = len(self.base_shape) - self.batch_dim
        named = self._named()
        d: Any
        if named is None:
            d = self.family.build(self.params, validate_args)
        else:
            d = named(**self.params, validate_args=validate_args)
        if independent:
            d = dist.Independent(d, independent, validate_args=validate_args)
        if self.transforms and named is None:
            parts = [with_cache(at_dtype(t, self.dtype), 1) for t in self.transforms]
            d = dist.TransformedDistribution(d, parts, validate_args=validate_args)
        return d

    def _named(self) -> Callable[..., dist.TorchDistribution] | None:
        if len(self.transforms) != 1:
            return None
        (t,) = self.transforms
        if isinstance(t, tt.PowerTransform) and float(t.exponent) != -1:
            return None
        return _NAMED.get((self.family.distribution, type(t)))

    def center(self) -> Tensor:
        """A central value, of :attr:`shape`: that of the family, taken through the transforms."""
        # Half precision lacks functions on some devices.
        dtype = torch.promote_types(self.dtype, torch.float32)
        x = self.family.center({k: v.to(dtype) for k, v in self.params.items()})
        for t in self.transforms:
            x = at_dtype(t, dtype)(x)
        return x.to(self.dtype) if x.is_floating_point() else x

    # -- shapes ------------------------------------------------------------------------------

    @property
    def base_shape(self) -> torch.Size:
        """Batch shape of the bare family: batch axes, then axes made events by Independent."""
        return self.family.batch_shape(self.params)

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape of the distribution."""
        return self.base_shape[: self.batch_dim]

    @property
    def shape(self) -> torch.Size:
        """``batch_shape + event_shape`` of the distribution."""
        shape = self.base_shape + self.family.event_shape(self.params)
        for t in self.transforms:
            shape = torch.Size(t.forward_shape(shape))
        return shape

    @property
    def event_shape(self) -> torch.Size:
        """Event shape of the distribution."""
        return self.shape[self.batch_dim :]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(iter(self.params.values())).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self.params.values())).device

    @property
    def separable_axes(self) -> int:
        """The number of leading axes of :attr:`shape` that index independent sub-factors."""
        if all(is_elementwise(t) for t in self.transforms):
            return len(self.base_shape)
        joint = max(t.codomain.event_dim for t in self.transforms)
        return min(len(self.base_shape), len(self.shape) - joint)

    def _double(self) -> Params:
        return {k: v.double() for k, v in self.params.items()}

    def structure(self) -> tuple[object, ...]:
        """The family and the transforms, which factors must share to be fused: comparable by
        ``==``. Sizes of axes are not part of it."""
        return (self.family.name, tuple(str(describe(t)) for t in self.transforms))

    # -- axes ----------------------------------------------------------------------------------

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Apply ``fn`` to every parameter."""
        return replace(self, params={k: fn(v) for k, v in self.params.items()})

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Move and cast the parameters; the member itself, with its cache, if nothing changes."""
        params = {k: v.to(device=device, dtype=dtype) for k, v in self.params.items()}
        same = all(v is self.params[k] for k, v in params.items())
        return self if same else replace(self, params=params)

    def expand(self, base_shape: Sequence[int]) -> Self:
        """Expand the parameters to a larger :attr:`base_shape`."""
        params = {}
        for name, event_dim in self.family.parameters.items():
            v = self.params[name]
            params[name] = v.expand(tuple(base_shape) + v.shape[v.dim() - event_dim :])
        return replace(self, params=params)

    def expand_batch(self, batch_shape: Sequence[int]) -> Self:
        """Expand the batch axes alone, as ``Distribution.expand`` does."""
        shape = tuple(batch_shape)
        expanded = self.expand(shape + self.base_shape[self.batch_dim :])
        return replace(expanded, batch_dim=len(shape))

    def index_select(self, axis: int, index: Tensor) -> Self:
        """Keep the entries ``index`` along ``axis`` of :attr:`shape` (non-negative)."""
        if axis < self.separable_axes:
            return self.map(lambda v: v.index_select(axis, index.to(v.device)))
        self._require_bare(axis)
        params = self.family.index_event(self.params, axis - len(self.shape), index.to(self.device))
        return replace(self, params=params)

    def index_copy(self, index: Tensor, other: Self) -> Self:
        """Replace the entries ``index`` along the first axis by those of ``other``."""
        params = {k: v.index_copy(0, index, other.params[k]) for k, v in self.params.items()}
        return replace(self, params=params)

    def pad(self, axis: int, index: Tensor, size: int, fill: Tensor | None = None) -> Self:
        """Scatter a family's event ``axis`` to ``size`` places; see :meth:`Family.pad_event`."""
        self._require_bare(axis)
        params = self.family.pad_event(
            self.params, axis - len(self.shape), index.to(self.device), size, fill
        )
        return replace(self, params=params)

    def _require_bare(self, axis: int) -> None:
        if self.transforms:
            names = ", ".join(type(t).__name__ for t in self.transforms)
            raise StructureError(
                f"axis {axis} lies behind {names}, which is not equivariant under permutations"
            )

    def with_batch(self, *axes: int) -> Self:
        """Make ``axes`` of :attr:`shape` the batch axes, in this order; the other separable axes
        become event axes, which changes nothing in a product of independent parts."""
        return self._permuted(self._first(axes), len(axes))

    def like(self, batch_dim: int, axes: Sequence[int]) -> Self:
        """Undo :meth:`with_batch`, given its ``axes`` and the original's ``batch_dim``."""
        order = self._first(axes)
        return self._permuted([order.index(i) for i in range(len(order))], batch_dim)

    def _first(self, axes: Sequence[int]) -> list[int]:
        """The axes of :attr:`base_shape`, ``axes`` before the others."""
        return [*axes, *(i for i in range(len(self.base_shape)) if i not in axes)]

    def _permuted(self, order: list[int], batch_dim: int) -> Self:
        n = len(order)
        moved = self.map(lambda v: v.permute(order + list(range(n, v.dim()))))
        return replace(moved, batch_dim=batch_dim)

    @classmethod
    def cat(cls, factors: Sequence[Self]) -> Self:
        """Concatenate along the first axis."""
        first = factors[0]
        params = {k: torch.cat([f.params[k] for f in factors]) for k in first.params}
        return replace(first, params=params)

    def check(self) -> None:
        """Check every parameter.

        :raises ParameterError: naming the parameter, what was expected and what came.
        """
        for name, value in self.params.items():
            if not value.is_floating_point():
                raise ParameterError(f"{name} must be floating point, got {value.dtype}")
            if value.dtype != self.dtype:
                raise ParameterError(
                    f"{name} must be {self.dtype} like the rest, got {value.dtype}"
                )
            if value.numel() == 0:
                raise ParameterError(f"{name} has no elements: its shape is {tuple(value.shape)}")
            if not bool(torch.isfinite(value).all()):
                bad = value[~torch.isfinite(value)][0].item()
                raise ParameterError(f"{name} must be finite, got {bad}")
        try:
            built = self.family.build(self.params, validate_args=True)
            params = self._double()  # not kept, as the cached properties would be
            normalizer = self.family.log_normalizer(params)
            statistics = {
                "natural parameters": self.family.natural(params),
                "mean parameters": self.family.mean(params),
            }
        except (ValueError, AssertionError, RuntimeError) as e:
            raise ParameterError(_first_line(e)) from e
        if built.batch_shape != self.base_shape:
            raise ParameterError(
                f"parameters broadcast to {tuple(built.batch_shape)}, "
                f"expected {tuple(self.base_shape)}"
            )
        if not bool(torch.isfinite(normalizer).all()):
            raise ParameterError("the log-normaliser is not finite: a singular scale")
        for name, value in statistics.items():
            if not bool(torch.isfinite(value).all()):
                raise ParameterError(f"the {name} are not finite: a value at the family's boundary")
        self._check_transforms(built)

    def _check_transforms(self, base: Distribution) -> None:
        """Check that the values of the family, and of each transform, suit the next transform."""
        if not self.transforms:
            return
        try:
            check_domains(_support(base), self.transforms, self.dtype)
            with torch.no_grad():
                self._check_center()
        except ParameterError:
            raise
        except (ValueError, AssertionError, LookupError, RuntimeError) as e:
            raise ParameterError(f"the transforms do not fit: {_first_line(e)}") from e

    def _check_center(self) -> None:
        """Check a central value: bounds of supports show neither overflow nor constraints that a
        user has written."""
        x = self.family.center(self._double())
        for t in self.transforms:
            if not bool(t.domain.check(x).all()):
                raise ParameterError(
                    f"{self.family.name} does not fit the domain {t.domain} of {type(t).__name__}"
                )
            x = t(x)
        if not bool(torch.isfinite(self.center()).all()):
            names = ", ".join(type(t).__name__ for t in self.transforms)
            raise ParameterError(f"a central value behind {names} is not finite")


def _support(d: Distribution) -> constraints.Constraint | None:
    try:
        return d.support
    except NotImplementedError:
        return None


def _first_line(e: Exception) -> str:
    return " ".join(str(e).split())[:300]


def _take_apart(d: Distribution) -> Member:
    """Take ``d`` apart from the inside out, without copying its parameters."""
    if not isinstance(d, Independent | TransformedDistribution | _WIDENING):
        family = family_of(d)
        return Member(family, family.params(d), (), len(d.batch_shape))
    inner = _take_apart(d.base_dist)
    if isinstance(d, MaskedDistribution):
        _require_full(d._mask)
    if isinstance(d, _WIDENING):
        # These expand batch axes only; axes that Independent made events inside stay.
        inner = inner.expand(d.batch_shape + inner.base_shape[inner.batch_dim :])
    elif isinstance(d, TransformedDistribution):
        outer = tuple(plain_transform(t) for t in flatten(d.transforms))
        inner = replace(inner, transforms=inner.transforms + outer)
    # Independent and transforms turn the rightmost batch axes into event axes.
    return replace(inner, batch_dim=len(d.batch_shape))


def _require_full(mask: bool | Tensor) -> None:
    if not bool(torch.as_tensor(mask).all()):
        raise UnsupportedFamilyError(
            "a factor that is partly masked out is no posterior over its whole site; "
            "remove the mask or block the site"
        )


def _is_multiple(t: Transform) -> TypeGuard[tt.AffineTransform]:
    return (
        isinstance(t, tt.AffineTransform)
        and bool((torch.as_tensor(t.loc) == 0).all())
        and bool((torch.as_tensor(t.scale) > 0).all())
    )


def _absorb_affine(member: Member) -> Member:
    """Absorb an affine map of a Normal, or a positive multiple of a Gamma, into the parameters:
    parties may differ in it, so it must not count as a transform."""
    params, transforms = dict(member.params), member.transforms
    if member.family.distribution is dist.Normal:
        while transforms and isinstance(t := transforms[0], tt.AffineTransform):
            transforms = transforms[1:]
            loc, scale = params["loc"] * t.scale + t.loc, (params["scale"] * t.scale).abs()
            params["loc"], params["scale"] = torch.broadcast_tensors(loc, scale)
    if member.family.distribution in (dist.Gamma, dist.Exponential):
        while transforms and _is_multiple(t := transforms[0]):
            transforms = transforms[1:]
            params["rate"] = params["rate"] / t.scale
        params = dict(zip(params, torch.broadcast_tensors(*params.values()), strict=True))
    plain = tuple(plain_affine(t) if isinstance(t, tt.AffineTransform) else t for t in transforms)
    return replace(member, params=params, transforms=plain)


def show_structure(x: object) -> str:
    """The text of a :meth:`Factor.structure` for a message; of anything else its ``str``."""
    if isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], tuple) and isinstance(x[0], str):
        name, transforms = x
        return " behind ".join([str(name), *map(str, reversed(transforms))])
    return str(x)
