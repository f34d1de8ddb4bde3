# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Special functions, their inverses, and packed symmetric matrices.

Conversions of mean to natural parameters without a closed form reduce to one scalar monotone
equation per batch element, which Newton's method within a bracket solves without ever diverging.
(Dirichlets, whose equation is a nested one, use it where a faster method does not converge.)
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "decreasing_root",
    "dirichlet_concentration",
    "excess",
    "gamma_concentration",
    "in_blocks",
    "inverse_tril",
    "log_minus_digamma",
    "log_share",
    "mvdigamma",
    "pack_symmetric",
    "stirling_kl",
    "stirling_rest",
    "unpack_symmetric",
    "wishart_df",
]

# From here on the asymptotic series of digamma is exact to double precision.
_ASYMPTOTIC = 20.0

# Numbers in a block of rows. A dozen intermediate tensors of this size stay in the processor's
# cache; for a large batch at once they would not, and would take four times as long.
_BLOCK = 1 << 16


def in_blocks(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorator: apply a function of ``[..., P]`` to blocks of rows on the CPU, to all on a GPU."""

    @functools.wraps(f)
    def blocked(*alpha: Tensor) -> Tensor:
        x = alpha[0]
        if x.numel() <= _BLOCK or x.device.type != "cpu":
            return f(*alpha)
        rows = max(1, _BLOCK // x.shape[-1])
        parts = (a.reshape(-1, a.shape[-1]).split(rows) for a in alpha)
        result = torch.cat([f(*block) for block in zip(*parts, strict=True)])
        return result.reshape(x.shape[:-1] + result.shape[1:])

    return blocked


def log_minus_digamma(c: Tensor) -> Tensor:
    """``log c - ψ(c)`` without the cancellation that the difference has at large ``c``."""
    big = c.clamp(min=_ASYMPTOTIC)
    i = 1 / big
    i2 = i * i
    tail = i2 * (1 / 12 - i2 * (1 / 120 - i2 * (1 / 252 - i2 * (1 / 240 - i2 / 132))))
    return torch.where(c > _ASYMPTOTIC, i / 2 + tail, c.log() - torch.digamma(c))


def _log_minus_digamma_slope(c: Tensor) -> Tensor:
    """``-c d/dc (log c - ψ(c)) = c ψ'(c) - 1``, positive, also without cancellation."""
    big = c.clamp(min=_ASYMPTOTIC)
    i = 1 / big
    i2 = i * i
    tail = i2 * (1 / 6 - i2 * (1 / 30 - i2 * (1 / 42 - i2 * (1 / 30 - i2 * 5 / 66))))
    return torch.where(c > _ASYMPTOTIC, i / 2 + tail, c * torch.polygamma(1, c) - 1)


def excess(x: Tensor, y: Tensor) -> Tensor:
    """``x/y - 1 - log(x/y)``, never negative, without cancellation where ``x`` is near ``y``."""
    gap = (x - y) / y
    return gap - log_near_one(x / y, gap)


def log_near_one(ratio: Tensor, gap: Tensor) -> Tensor:
    """``log(ratio)`` given also ``gap = ratio - 1``, accurate near 1 and near 0."""
    return torch.where(gap < -0.5, ratio.log(), gap.clamp(min=-0.5).log1p())


def stirling_rest(x: Tensor) -> Tensor:
    """The remainder of Stirling's formula: ``log Γ(x) - (x - 1/2) log x + x - log(2π)/2``."""
    small, big = x.clamp(max=_ASYMPTOTIC), x.clamp(min=_ASYMPTOTIC)
    value = torch.lgamma(small) - (small - 0.5) * small.log() + small - 0.5 * math.log(2 * math.pi)
    i = 1 / big
    i2 = i * i
    tail = i * (1 / 12 - i2 * (1 / 360 - i2 * (1 / 1260 - i2 / 1680)))
    return torch.where(x > _ASYMPTOTIC, tail, value)


def stirling_rest_slope(x: Tensor) -> Tensor:
    """The derivative of :func:`stirling_rest`: ``ψ(x) - log x + 1/(2x)``."""
    small, big = x.clamp(max=_ASYMPTOTIC), x.clamp(min=_ASYMPTOTIC)
    i2 = big**-2
    tail = -i2 * (1 / 12 - i2 * (1 / 120 - i2 * (1 / 252 - i2 / 240)))
    return torch.where(x > _ASYMPTOTIC, tail, torch.digamma(small) - small.log() + 0.5 / small)


def stirling_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL divergence between Gammas of concentrations ``a`` and ``b`` and equal means.

    It is the part of the Bregman divergence of ``log Γ`` that stays small,
    ``log Γ(b) - log Γ(a) - (b - a) ψ(a) = b (a/b - 1 - log(a/b)) + stirling_kl(a, b)``:
    by Stirling's formula the terms that grow with the concentrations cancel analytically.
    """
    bregman = stirling_rest(b) - stirling_rest(a) - (b - a) * stirling_rest_slope(a)
    return excess(b, a) / 2 + bregman


def decreasing_root(
    f: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    lower: float,
    upper: float,
    max_iterations: int = 200,
) -> Tensor:
    """The root of a decreasing function, elementwise, by Newton steps inside a shrinking bracket.

    :param f: maps ``x`` to ``(value, derivative)``, each of the shape of ``start``.
    :param start: initial guess.
    :param lower, upper: a bracket that holds every root; a root outside of it comes back as the
        bracket's end.
    """
    lo = torch.full_like(start, lower)
    hi = torch.full_like(start, upper)
    x = start.clamp(lower, upper)
    last = torch.full_like(start, math.inf)
    done = torch.zeros_like(start, dtype=torch.bool)
    for _ in range(max_iterations):
        value, slope = f(x)
        lo = torch.where(value > 0, x, lo)
        hi = torch.where(value < 0, x, hi)
        step = x - value / slope
        # A step that leaves the bracket (or is NaN) is replaced by bisection.
        newton = (step >= lo) & (step <= hi)
        new = torch.where(newton, step, (lo + hi) / 2)
        new = torch.where(done | (value == 0), x, new)
        size, unit = (new - x).abs(), 1 + x.abs()
        # Newton steps that are short and no longer shrink are the rounding of f, not progress.
        stuck = newton & (size <= 1e-4 * unit) & (size > last / 2)
        done |= (size <= 4e-16 * unit) | stuck
        x, last = new, size
        if bool(done.all()):
            break
    return x


def gamma_concentration(s: Tensor) -> Tensor:
    """Solve ``log c - ψ(c) = s`` for ``c``; ``s = log E[x] - E[log x] > 0``.

    Newton in ``log c`` on the logarithm of both sides, which is nearly linear (slope -1 at both
    ends), from Minka's starting point (*Estimating a Gamma distribution*, 2002).
    """
    s = s.clamp(min=1e-17)
    start = (3 - s + ((s - 3) ** 2 + 24 * s).sqrt()) / (12 * s)
    log_s = s.log()

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        c = x.exp()
        u = log_minus_digamma(c)
        return u.log() - log_s, -_log_minus_digamma_slope(c) / u

    return decreasing_root(f, start.log(), -60.0, 40.0).exp()


def _wishart_terms(df: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """``D log(ν/2) - ψ_D(ν/2)`` and its derivative in ``ν``."""
    i = torch.arange(dim, dtype=df.dtype, device=df.device)
    half = (df.unsqueeze(-1) - i) / 2
    value = log_minus_digamma(half) - torch.log1p(-i / df.unsqueeze(-1))
    # d/dν of each term: 1/ν - ψ'(h)/2 = -(hψ'(h) - 1)/(2h) + 1/ν - 1/(2h)
    slope = -_log_minus_digamma_slope(half) / (2 * half) - i / (2 * half * df.unsqueeze(-1))
    return value.sum(-1), slope.sum(-1)


def wishart_df(s: Tensor, dim: int) -> Tensor:
    """Solve ``D log(ν/2) - ψ_D(ν/2) = s`` for ``ν > D - 1``; ``s = log|E Λ| - E log|Λ| > 0``."""
    s = s.clamp(min=1e-17)
    log_s = s.log()

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        excess = x.exp()
        value, slope = _wishart_terms(excess + (dim - 1), dim)
        return value.log() - log_s, slope * excess / value

    start = (dim * (dim + 1) / (2 * s)).log()
    return decreasing_root(f, start, -60.0, 40.0).exp() + (dim - 1)


def _log_ratio(t: Tensor, a: Tensor) -> Tensor:
    """Solve ``ψ(a e^r) - ψ(a) = t`` for ``r``, elementwise; ``t <= 0``."""
    rhs = t - log_minus_digamma(a)
    z = rhs + a.log()
    guess = _inverse_digamma_guess(z)

    def f(r: Tensor) -> tuple[Tensor, Tensor]:
        c = a * r.exp()
        return rhs - r + log_minus_digamma(c), -(1 + _log_minus_digamma_slope(c))

    return decreasing_root(f, (guess / a).log().clamp(max=0.0), -750.0, 1.0, 60)


def log_share(alpha: Tensor, total: Tensor) -> Tensor:
    """``log(α_k / Σα)``, relatively exact even where one part is nearly all of it."""
    share = (alpha / total).log()
    # For the largest part, use the sum of the others, without a subtraction.
    top = alpha.detach().argmax(-1, keepdim=True)
    left = alpha.scatter(-1, top, 0.0).sum(-1, keepdim=True) / total
    largest = torch.where(left < 0.5, (-left).log1p(), share.gather(-1, top))
    return share.scatter(-1, top, largest)


@in_blocks
def dirichlet_concentration(t: Tensor) -> Tensor:
    """Solve ``ψ(α_k) - ψ(Σα) = t_k`` for ``α``, ``t = E[log x]``: ``[..., K] -> [..., K]``.

    Newton in all of ``log α`` at once, in linear time, as the Jacobian is a diagonal plus a matrix
    of rank one; elements of the batch that do not settle are solved by nested root finding, which
    cannot fail. Source: Minka, *Estimating a Dirichlet distribution* (2000), section 1.
    """
    flat = t.reshape(-1, t.shape[-1])
    alpha, settled = _dirichlet_newton(flat)
    rest = (~settled).nonzero().squeeze(-1)
    if len(rest):
        alpha[rest] = _dirichlet_nested(flat[rest])
    return alpha.reshape(t.shape)


def _dirichlet_total(t: Tensor) -> Tensor:
    """A first guess at ``Σα``, right where it is large."""
    slack = -torch.expm1(torch.logsumexp(t, -1)).clamp(max=-1e-17)
    return (t.shape[-1] - 1) / (2 * slack)


def _inverse_digamma_guess(y: Tensor) -> Tensor:
    """Minka's starting point for ``ψ(x) = y``."""
    return torch.where(y >= -2.22, y.clamp(max=700).exp() + 0.5, -1 / (y + 0.5772156649))


def _dirichlet_newton(t: Tensor, max_iterations: int = 30) -> tuple[Tensor, Tensor]:
    """Solutions by Newton's method, ``[N, K]``, and which of the ``N`` have converged."""
    total = _dirichlet_total(t).unsqueeze(-1)
    for _ in range(4):
        x = _inverse_digamma_guess(t + torch.digamma(total))
        total = x.sum(-1, keepdim=True)
    result, settled = x.log(), torch.zeros(len(t), dtype=torch.bool, device=t.device)
    active = torch.arange(len(t), device=t.device)
    last = torch.full((len(t),), math.inf, dtype=t.dtype, device=t.device)
    for _ in range(max_iterations):
        step = _dirichlet_step(result[active], t[active])
        size = step.abs().amax(-1)
        # Long steps are shortened: Newton's linear model does not hold so far away.
        y = result[active] + step * (2 / size.clamp(min=2)).unsqueeze(-1)
        result[active] = y.clamp(-700.0, 60.0)
        # Short steps shrink quadratically, the next to less than a digit; those that no longer
        # shrink are the rounding of t, not progress.
        before = last[active]
        following = size**2 * (size / before**2).clamp(min=1)
        done = (size <= 1e-4) & ((following <= 1e-17) | (size > before / 2))
        last[active] = size
        settled[active[done]] = True
        active = active[~done]
        if not len(active):
            break
    return result.exp(), settled


def _dirichlet_step(y: Tensor, t: Tensor) -> Tensor:
    """Newton's step in ``y = log α``."""
    alpha = y.exp()
    total = alpha.sum(-1, keepdim=True)
    gap = t - log_share(alpha, total) + log_minus_digamma(alpha) - log_minus_digamma(total)
    slope, slope_total = _log_minus_digamma_slope(alpha), _log_minus_digamma_slope(total)
    inverse, inverse_total = alpha / (1 + slope), total / (1 + slope_total)  # 1/ψ'
    # 1/ψ'(Σα) - Σ 1/ψ'(α_k), with the terms linear in α cancelled analytically.
    far = (inverse * slope).sum(-1, keepdim=True) - inverse_total * slope_total
    near = inverse_total - inverse.sum(-1, keepdim=True)
    common = (gap * inverse).sum(-1, keepdim=True) / torch.where(total > 1, far, near)
    return (gap + common) / (1 + slope)


def _dirichlet_nested(t: Tensor) -> Tensor:
    """Solutions by nested root finding, safe but slow, ``[N, K]``. Given the total ``a = Σα`` each
    ``α_k`` follows by inverting digamma, which leaves one scalar equation, ``Σ_k α_k(a) = a``, with
    exactly one root."""
    start = _dirichlet_total(t).log()

    def f(y: Tensor) -> tuple[Tensor, Tensor]:
        a = y.exp().unsqueeze(-1)
        r = _log_ratio(t, a)
        share = torch.softmax(r, -1)
        ratio = (1 + _log_minus_digamma_slope(a)) / (1 + _log_minus_digamma_slope(a * r.exp()))
        return torch.logsumexp(r, -1), (share * (ratio - 1)).sum(-1)

    a = decreasing_root(f, start, -60.0, 40.0).exp().unsqueeze(-1)
    return a * _log_ratio(t, a).exp()


def mvdigamma(x: Tensor, dim: int) -> Tensor:
    """``Σ_{i<dim} ψ(x - i/2)``, the derivative of ``torch.mvlgamma``."""
    i = torch.arange(dim, dtype=x.dtype, device=x.device)
    return torch.digamma(x.unsqueeze(-1) - i / 2).sum(-1)


@functools.lru_cache(maxsize=16)
def _packing(dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Index tables: the place of each packed entry in the flat matrix and its factor, and the place
    of each entry of the matrix among the packed ones."""
    with torch.inference_mode(False):  # cached tensors outlive the first caller's mode
        i, j = torch.tril_indices(dim, dim, device=device)
        place = torch.empty(dim, dim, dtype=torch.long, device=device)
        place[i, j] = place[j, i] = torch.arange(len(i), device=device)
        return i * dim + j, math.sqrt(2) ** (i != j).double(), place.flatten()


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Pack symmetric matrices, ``[..., D, D] -> [..., D(D+1)/2]``, with off-diagonal entries times
    √2, so that inner products of packed matrices are traces of the products."""
    index, scale, _ = _packing(matrix.shape[-1], matrix.device)
    return matrix.flatten(-2).index_select(-1, index) * scale.to(matrix.dtype)


def unpack_symmetric(packed: Tensor, dim: int) -> Tensor:
    """Unpack symmetric matrices; the inverse of :func:`pack_symmetric`."""
    _, scale, place = _packing(dim, packed.device)
    entries = packed / scale.to(packed.dtype)
    return entries.index_select(-1, place).unflatten(-1, (dim, dim))


def inverse_tril(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor of the inverse of ``matrix``."""
    # From J M J = C Cᵀ, J reversing the order, M⁻¹ = (J C⁻ᵀ J)(J C⁻ᵀ J)ᵀ.
    reverse = torch.linalg.cholesky(matrix.flip(-2, -1)).flip(-2, -1).mT
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(reverse, eye, upper=False)
