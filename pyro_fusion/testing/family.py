# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of an exponential family, on members of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Distribution

from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor, Family, family_named, kl, pairwise_kl

__all__ = ["check_family"]

_SIGMAS = 5
"""How many standard errors a mean of draws may be off."""

_DRAWS = 4000

Statistics = Callable[[Tensor], Tensor]


def check_family(
    p: Distribution,
    q: Distribution,
    *,
    divergence: Tensor | None = None,
    statistics: Statistics | None = None,
    rtol: float = 1e-8,
    seed: int = 0,
) -> None:
    """Check a registered family on two batches of its members, bare or wrapped in ``Independent``,
    transforms, expansions, full masks.

    Conversions there and back; densities, the gradient of the log-normaliser and the mean of the
    sufficient statistics against draws and against ``log_prob``; divergences against
    ``divergence``, and that a common shift or multiple leaves them as they are, where the family
    has a ``location`` or a ``scale``; batches indexed, joined, expanded and made one; float32;
    numbers that are no parameters.

    :param p, q: of one structure, on the CPU, in float64, with one batch axis of at least three and
        two members, all different: ``[N]`` and ``[M]``.
    :param divergence: ``KL(p_i ‖ q_j)``, ``[N, M]``, from somewhere else: a textbook, or
        ``torch.distributions.kl_divergence`` where that has a formula for the family. By default
        estimated from draws, which only sees errors that are large.
    :param statistics: ``T(x)`` of the bare family, ``[..., *event_shape] -> [..., P]``, where
        :meth:`~pyro_fusion.families.Family.statistics` cannot tell it from a value.
    :param rtol: to which differences of ``log_prob`` are right, relative and absolute. Some
        distributions approximate it: the Bessel function of torch's ``VonMises`` has seven digits.
    :param seed: of the draws.
    :raises AssertionError: with what was expected and what came.
    :raises UnsupportedFamilyError: if the family is not registered.
    """
    f, g = Factor.of(p), Factor.of(q)
    for name, batch, least in (("p", f.batch_shape, 3), ("q", g.batch_shape, 2)):
        _require(
            len(batch) == 1 and batch[0] >= least,
            f"{name}: expected one batch axis of at least {least} members, got {tuple(batch)}",
        )
    _require(f.dtype == torch.float64, f"expected members in float64, got {f.dtype}")
    _require(
        f.structure() == g.structure(),
        f"expected p and q of one structure, got {f.structure()} and {g.structure()}",
    )
    own = statistics or f.family.statistics
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _check_names(f.family)
        _check_parts(f, p)
        _check_conversions(f)
        _check_density(f, g, own, rtol)
        _check_mean(f, own)
        _check_moves(f, g)
        _check_divergences(f, g, divergence)
        _check_axes(f)
        _check_expansion(f)
        _check_single_precision(f, g)
        _check_values(f)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _close(actual: Tensor, expected: Tensor, tolerance: float, what: str, least: float) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=least, msg=lambda m: f"{what}: {m}"
    )


def _same(actual: Factor, expected: Factor, tolerance: float, what: str) -> None:
    _require(
        actual.structure() == expected.structure() and actual.batch_dim == expected.batch_dim,
        f"{what}: expected {expected.structure()}, got {actual.structure()}",
    )
    for name, value in expected.params.items():
        _close(actual.params[name], value, tolerance, f"{what}, {name}", least=tolerance)


def _statistics(f: Factor, value: Tensor, own: Statistics) -> Tensor:
    """``T`` of a draw of ``f``: ``[..., *batch_shape, P]``, event axes made by ``Independent``
    flattened."""
    for transform in reversed(f.transforms):
        value = transform.inv(value)
    t = own(value)
    first = t.dim() - 1 - len(f.base_shape) + f.batch_dim
    return t.flatten(first) if t.dim() - 1 > first else t


def _sample(f: Factor, *shape: int) -> Tensor:
    return f.distribution().sample(torch.Size(shape))


def _log_prob(f: Factor, value: Tensor) -> Tensor:
    return f.distribution().log_prob(value)


def _check_names(family: Family) -> None:
    for attribute in ("location", "scale"):
        name = getattr(family, attribute)
        _require(
            name is None or name in family.parameters,
            f"{attribute}: expected one of {list(family.parameters)} or None, got {name!r}",
        )
    _require(
        family.scale is None or family.location is not None,
        f"scale {family.scale!r}: expected a location too",
    )


def _check_parts(f: Factor, d: Distribution) -> None:
    """A distribution taken apart and put together is the same one."""
    found = family_named(f.family.name)
    _require(
        found is f.family,
        f"expected one family called {f.family.name}, by which files know it, got {found} too",
    )
    again = f.distribution()
    _require(
        isinstance(again, TorchDistributionMixin),
        f"expected a distribution of Pyro, got {type(again).__name__} of torch alone",
    )
    shapes = (again.batch_shape, again.event_shape)
    _require(
        shapes == (d.batch_shape, d.event_shape) == (f.batch_shape, f.event_shape),
        f"expected batch and event shapes {(d.batch_shape, d.event_shape)}, got {shapes}; "
        f"the family says {(f.batch_shape, f.event_shape)}",
    )
    value = _sample(f, 5)
    _require(
        value.shape == (5,) + d.batch_shape + d.event_shape,
        f"expected draws of shape {(5,) + d.batch_shape + d.event_shape}, got {value.shape}",
    )
    what = "log_prob after params and build"
    _close(again.log_prob(value), d.log_prob(value), 1e-9, what, 1e-9)
    # Where there is an axis of its own, the family draws and shows a centre of the right shape.
    _require(
        f.center().shape == f.shape,
        f"expected a central value of shape {tuple(f.shape)}, got {tuple(f.center().shape)}",
    )


def _check_conversions(f: Factor) -> None:
    """From parameters to natural and mean ones and back, for any batch shape."""
    for name, flat in (("natural", f.natural), ("mean", f.mean)):
        _require(
            flat.dtype == torch.float64 and flat.shape[:-1] == f.batch_shape,
            f"{name} parameters: expected float64 [{f.batch_shape[0]}, P], got {flat.dtype} "
            f"{tuple(flat.shape)}",
        )
    _require(
        f.natural.shape == f.mean.shape,
        "expected as many natural as mean parameters, got "
        f"{f.natural.shape[-1]} and {f.mean.shape[-1]}",
    )
    _require(
        f.log_normalizer.shape == f.batch_shape,
        f"log-normaliser: expected shape {tuple(f.batch_shape)}, got "
        f"{tuple(f.log_normalizer.shape)}",
    )
    _same(f.from_natural(f.natural), f, 1e-10, "from_natural(natural)")
    _same(f.from_mean(f.mean), f, 1e-8, "from_mean(mean)")
    eta = f.natural.expand(2, *f.natural.shape)
    wide = f.from_natural(eta)
    shapes = (wide.batch_shape, wide.event_shape)
    _require(
        shapes == ((2, *f.batch_shape), f.event_shape),
        f"from_natural of shape {tuple(eta.shape)}: expected batch and event shapes "
        f"{((2, *f.batch_shape), tuple(f.event_shape))}, got {shapes}",
    )
    _close(wide.natural, eta, 1e-9, "natural(from_natural) of a wider batch", 1e-9)
    single = f.from_mean(f.mean[1])
    shapes = (single.batch_shape, single.event_shape)
    _require(
        shapes == ((), f.event_shape),
        f"from_mean of shape [P]: expected no batch axis and event shape {tuple(f.event_shape)}, "
        f"got {shapes}",
    )


def _check_density(f: Factor, g: Factor, own: Statistics, rtol: float) -> None:
    """The carrier and the Jacobian cancel between two members: at every x
    ``log p(x) - log q(x) = <η_p - η_q, T(x)> - A_p + A_q``."""
    n = min(f.batch_shape[0], g.batch_shape[0])
    f, g = (x.index_select(0, torch.arange(n)) for x in (f, g))
    value = _sample(f, 7)
    t = _statistics(f, value, own)
    _require(
        t.shape[-1] == f.natural.shape[-1],
        f"expected {f.natural.shape[-1]} statistics, as many as natural parameters, got "
        f"{t.shape[-1]}",
    )
    inner = ((f.natural - g.natural) * t).sum(-1)
    expected = _log_prob(f, value) - _log_prob(g, value)
    what = "<η_p - η_q, T(x)> - A_p + A_q against log p(x) - log q(x)"
    _close(inner - f.log_normalizer + g.log_normalizer, expected, rtol, what, rtol)


def _check_mean(f: Factor, own: Statistics) -> None:
    """Mean parameters are the gradient of the log-normaliser, and the mean of the statistics."""
    eta = f.natural.clone().requires_grad_(True)
    shaped = eta.reshape(*f.base_shape, -1)
    params = f.family.from_natural(shaped, f.family.event_shape(f.params))
    (gradient,) = torch.autograd.grad(f.family.log_normalizer(params).sum(), eta)
    _close(f.mean, gradient, 1e-8, "mean against the gradient of the log-normaliser", 1e-8)
    bare = Factor(f.family, f.params, (), f.batch_dim)
    t = _statistics(bare, _sample(bare, _DRAWS), own)
    off = (t.mean(0) - f.mean).abs() / (t.std(0) / math.sqrt(_DRAWS) + 1e-12)
    _require(
        bool((off <= _SIGMAS).all()),
        f"mean: expected the mean of the statistics of {_DRAWS} draws, got one that is up to "
        f"{float(off.max()):.1f} standard errors off",
    )


def _check_divergences(f: Factor, g: Factor, truth: Tensor | None) -> None:
    """All pairs against the truth, pairs in turn against all pairs, and zero at itself."""
    shape = (f.batch_shape[0], g.batch_shape[0])
    result = pairwise_kl(f, g)
    _require(
        result.shape == shape and result.dtype == torch.float64,
        f"pairwise_kl: expected float64 {shape}, got {result.dtype} {tuple(result.shape)}",
    )
    if truth is None:
        # What is behind a common bijection has the same divergences, and draws that it takes back.
        bare, other = (Factor(x.family, x.params, (), x.batch_dim) for x in (f, g))
        value = _sample(bare, _DRAWS)
        for j in range(shape[1]):
            one = other.index_select(0, torch.full((shape[0],), j))
            ratio = _log_prob(bare, value) - _log_prob(one, value)
            off = (ratio.mean(0) - result[:, j]).abs() / (ratio.std(0) / math.sqrt(_DRAWS) + 1e-12)
            _require(
                bool((off <= _SIGMAS).all()),
                f"KL to member {j} of q: expected the mean of log p - log q over {_DRAWS} draws, "
                f"got one that is up to {float(off.max()):.1f} standard errors off",
            )
    else:
        _close(result, truth, 1e-6, "pairwise_kl against the given divergences", 1e-13)
    n = min(shape)
    first, second = (x.index_select(0, torch.arange(n)) for x in (f, g))
    diagonal = result.diagonal() if truth is None else truth.diagonal()
    _close(kl(first, second), diagonal, 1e-6, "kl, one by one", 1e-13)
    own = pairwise_kl(f, f)
    _require(
        bool((own >= 0).all()) and float(own.diagonal().max()) < 1e-12,
        f"KL of members to themselves: expected 0, and no number below it, got {own}",
    )
    _require(float(kl(f, f).max()) < 1e-12, f"KL to itself: expected 0, got {kl(f, f)}")
    least = float((own + torch.eye(shape[0])).min())
    _require(least > 1e-3, f"expected members that differ, got two with a divergence of {least}")


def _check_moves(f: Factor, g: Factor) -> None:
    """A divergence is that of the values moved, and of their multiples."""
    family, n = f.family, min(f.batch_shape[0], g.batch_shape[0])
    loc, width = family.location, family.scale
    p, q = (dict(x.index_select(0, torch.arange(n)).params) for x in (f, g))
    expected = family.kl(p, q)
    if loc is not None:
        moved = ({**x, loc: x[loc] + 1.0} for x in (p, q))
        what = f"location {loc!r}: KL of members moved by 1"
        _close(family.kl(*moved), expected, 1e-6, what, 1e-9)
    if loc is not None and width is not None:
        multiples = ({**x, loc: 2.0 * x[loc], width: 2.0 * x[width]} for x in (p, q))
        what = f"scale {width!r}: KL of members times 2"
        _close(family.kl(*multiples), expected, 1e-6, what, 1e-9)


def _check_axes(f: Factor) -> None:
    """Members are chosen and joined along the batch; axes of independent parts become batch."""
    value = _sample(f)
    n = f.batch_shape[0]
    log_prob = _log_prob(f, value)
    order = torch.arange(n).flip(0)
    chosen, rest = f.index_select(0, order[:-1]), f.index_select(0, order[-1:])
    _close(_log_prob(chosen, value[order[:-1]]), log_prob[order[:-1]], 1e-9, "index_select", 1e-9)
    together = Factor.cat([chosen, rest])
    _close(_log_prob(together, value[order]), log_prob[order], 1e-9, "cat", 1e-9)
    joint = f.with_batch()
    _require(
        joint.batch_shape == () and joint.event_shape == f.shape and joint.natural.dim() == 1,
        f"all axes in the event: expected event shape {tuple(f.shape)}, got {joint.event_shape}",
    )
    _close(_log_prob(joint, value), log_prob.sum(), 1e-9, "all axes in the event", 1e-9)
    _same(joint.like(1, ()), f, 0, "all axes in the event, undone")
    for axis in range(1, f.separable_axes):
        moved, swapped = f.with_batch(axis), value.movedim(axis, 0)
        _require(
            moved.batch_shape == swapped.shape[:1] and moved.shape == swapped.shape,
            f"axis {axis} as the batch: expected shape {tuple(swapped.shape)}, got {moved.shape}",
        )
        along = _log_prob(moved, swapped)
        _close(along.sum(), log_prob.sum(), 1e-9, f"axis {axis} as the batch", 1e-9)
        order = torch.arange(len(swapped)).flip(0)
        turned = _log_prob(moved.index_select(0, order), swapped[order])
        _close(turned, along[order], 1e-9, f"index_select along axis {axis}", 1e-9)
        _same(moved.like(1, (axis,)), f, 0, f"axis {axis} as the batch, undone")


def _check_expansion(f: Factor) -> None:
    wide = f.expand_batch((2, *f.batch_shape))
    _require(
        wide.batch_shape == (2, *f.batch_shape) and wide.event_shape == f.event_shape,
        f"expanded to {(2, *f.batch_shape)}: got {(wide.batch_shape, wide.event_shape)}",
    )
    value = _sample(wide)
    _close(_log_prob(wide, value), _log_prob(f, value), 1e-9, "log_prob when expanded", 1e-9)


def _check_single_precision(f: Factor, g: Factor) -> None:
    """In float32, computed in float64: as near as the parameters are."""
    small, other = (x.to(dtype=torch.float32) for x in (f, g))
    result = pairwise_kl(small, other)
    _require(result.dtype == torch.float32, f"KL of float32: expected float32, got {result.dtype}")
    _close(result.double(), pairwise_kl(f, g), 1e-4, "KL in float32 against float64", 0.0)
    back = small.from_mean(small.mean)
    dtypes = {v.dtype for v in back.params.values()}
    _require(dtypes == {torch.float32}, f"from_mean in float32: got parameters of {dtypes}")
    _same(back, small, 1e-5, "from_mean(mean) in float32")
    drawn, expected = _sample(back).dtype, _sample(small).dtype
    _require(drawn == expected, f"draws in float32: expected {expected}, got {drawn}")


def _check_values(f: Factor) -> None:
    """Parameters that are numbers pass, others are refused by name."""
    f.check()
    for name in f.params:
        for bad in (math.nan, math.inf, -math.inf):
            broken = {k: v.clone() for k, v in f.params.items()}
            broken[name][(0,) * broken[name].dim()] = bad
            try:
                Factor(f.family, broken, f.transforms, f.batch_dim).check()
            except ParameterError as e:
                _require(
                    name in str(e),
                    f"{name} = {bad}: expected an error that names it, got {str(e)!r}",
                )
            else:
                raise AssertionError(f"{name} = {bad}: expected a ParameterError, got none")
