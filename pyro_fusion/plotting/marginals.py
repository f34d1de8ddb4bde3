# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Marginals of components, single numbers and pairs: their intervals, densities and ellipses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Transform
from torch.distributions import transforms as tt

from pyro_fusion.errors import Site, StructureError, UnsupportedFamilyError
from pyro_fusion.families import Factor
from pyro_fusion.families.transforms import is_elementwise
from pyro_fusion.posterior import Posterior

__all__ = ["Dims", "Marginals", "label_of", "marginals"]

# Which numbers of a component: places along its only axis, or along each of its axes.
Dims = Sequence[int | tuple[int, ...]]

# Densities are drawn between these quantiles.
_TAIL = 5e-4


@dataclass(frozen=True)
class Marginals:
    """``d`` numbers of each of ``L`` components, in a family behind transforms of single numbers.

    :ivar family: Normal, Gamma or Beta.
    :ivar params: loc and scale, shape and rate, or both concentrations: float64, ``[L, d]`` each.
    :ivar transforms: from these coordinates to those of the site.
    :ivar covariance: of Normals, ``[L, d, d]``; else None.
    """

    family: str
    params: tuple[Tensor, Tensor]
    transforms: tuple[Transform, ...]
    covariance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x`` into the coordinates of the site."""
        for t in self.transforms:
            x = t(x)
        return x

    def unconstrained(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation in unconstrained coordinates, ``[L, d]`` each: of the log of
        a Gamma, the logit of a Beta."""
        a, b = self.params
        if self.family == "Normal":
            return a, b
        if self.family == "Gamma":
            return a.digamma() - b.log(), torch.polygamma(1, a).sqrt()
        variance = torch.polygamma(1, a) + torch.polygamma(1, b)
        return a.digamma() - b.digamma(), variance.sqrt()

    def quantiles(self, levels: Sequence[float]) -> Tensor:
        """Quantiles in the coordinates of the site, from low to high: ``[len(levels), L, d]``."""
        p = np.asarray(levels, dtype=np.float64).reshape(-1, 1, 1)
        x = torch.as_tensor(self._scipy().ppf(p))
        return self.forward(x).sort(0).values

    def density(self, component: int, num_points: int = 200) -> tuple[Tensor, Tensor]:
        """The density of the first number of a component: points in the coordinates of the site,
        from low to high, and the density at them."""
        d = self._scipy((component, 0))
        quantiles = d.ppf(np.linspace(_TAIL, 1 - _TAIL, num_points))
        # Even steps show the bulk of a density, quantiles its narrow parts.
        even = np.linspace(quantiles[0], quantiles[-1], num_points)
        y = torch.as_tensor(np.union1d(even, quantiles))
        log_density = torch.as_tensor(d.logpdf(y.numpy()))
        for t in self.transforms:
            log_density = log_density - t.log_abs_det_jacobian(y, t(y))
            y = t(y)
        density = log_density.exp()
        # Where a density has a pole, its lowest quantiles may be on it.
        finite = y.isfinite() & density.isfinite()
        y, order = y[finite].sort()
        return y, density[finite][order]

    def outline(self, component: int, deviations: float, num_points: int = 100) -> Tensor:
        """The ellipse of ``deviations`` standard deviations about a pair of Normal numbers, in the
        coordinates of the site: ``[num_points, 2]``."""
        assert self.covariance is not None
        angle = torch.linspace(0, 2 * torch.pi, num_points, dtype=torch.float64)
        circle = deviations * torch.stack([angle.cos(), angle.sin()], -1)
        tril = torch.linalg.cholesky(self.covariance[component])
        return self.forward(self.params[0][component] + circle @ tril.mT)

    def _scipy(self, index: Any = ...) -> Any:
        from scipy import stats

        a, b = (v[index].numpy() for v in self.params)
        if self.family == "Normal":
            return stats.norm(a, b)
        return stats.gamma(a, scale=1 / b) if self.family == "Gamma" else stats.beta(a, b)


def label_of(posterior: Posterior, site: str, label: str | None) -> str | None:
    """The label along which the site has components; None for a shared site.

    :raises StructureError: for an unknown site, another label than the site's, or several.
    """
    if site not in posterior.axes:
        raise StructureError(
            ["there is no ", Site(site), f"; the sites are {sorted(posterior.axes)}"]
        )
    labels = [x for x in posterior.axes[site] if x is not None]
    if len(labels) > 1:
        raise StructureError(
            [
                Site(site),
                f" has the labels {labels}: expected one, as places along the other are "
                "not the same in all parties",
            ]
        )
    own = labels[0] if labels else None
    if label is not None and label != own:
        raise StructureError(
            [
                Site(site),
                " has "
                + ("no label" if own is None else f"the label '{own}'")
                + f", got label '{label}'",
            ]
        )
    return own


def marginals(posterior: Posterior, site: str, dims: Dims | None, most: int) -> Marginals:
    """The marginals of the numbers ``dims`` of each component of a site, in float64 on the CPU; a
    shared site is one component.

    :param dims: by default all, if these are at most ``most``.
    :raises StructureError: if ``dims`` are needed, too many, or unknown, naming those that exist.
    :raises UnsupportedFamilyError: if single numbers of the factor are not Normal, Gamma or Beta.
    """
    f, axes = posterior.decomposed[site], posterior.axes[site]
    f = f.to(torch.device("cpu"), torch.float64)
    axis = next((i for i, x in enumerate(axes) if x is not None), None)
    # Reshaping keeps the row-by-row order of numbers, so it is left out.
    transforms = tuple(t for t in f.transforms if not isinstance(t, tt.ReshapeTransform))
    if not all(map(is_elementwise, transforms)):
        names = ", ".join(type(t).__name__ for t in transforms)
        raise UnsupportedFamilyError(
            f"expected transforms of single numbers, got {names}", site=site
        )
    shape = tuple(n for i, n in enumerate(f.shape) if i != axis)
    places = _places(site, dims, shape, most)
    family, params, joint = _numbers(site, f, axis)
    a, b = (v.reshape(len(v), -1)[:, places] for v in params)
    covariance = _covariance(b, joint, places) if family == "Normal" else None
    return Marginals(family, (a, b), transforms, covariance)


def _places(site: str, dims: Dims | None, shape: tuple[int, ...], most: int) -> list[int]:
    """The places of ``dims`` among the numbers of a component, counted row by row."""
    shape = shape or (1,)
    size = int(np.prod(shape))
    if dims is None and size <= most:
        return list(range(size))
    ends = [(0,) * len(shape), tuple(n - 1 for n in shape)]
    low, high = (ends[0], ends[1]) if len(shape) > 1 else (0, size - 1)
    expected = (
        f"site '{site}' has {size} numbers in a component: expected at most {most} different dims "
        f"from {low} to {high}, such as dims={(low, high)[: min(most, size)]}"
    )
    if dims is None:
        raise StructureError(f"{expected}, got none")
    places = []
    for place in dims:
        index = place if isinstance(place, tuple) else (place,)
        known = len(index) == len(shape) and all(isinstance(i, int) for i in index)
        if not known or any(not 0 <= i < n for i, n in zip(index, shape, strict=True)):
            raise StructureError(f"{expected}, got {tuple(dims)}")
        places.append(int(np.ravel_multi_index(index, shape)))
    if not 1 <= len(set(places)) == len(places) <= most:
        raise StructureError(f"{expected}, got {tuple(dims)}")
    return places


def _numbers(
    site: str, f: Factor, axis: int | None
) -> tuple[str, tuple[Tensor, Tensor], Tensor | None]:
    """The family of single numbers, its parameters ``[L, ...]`` and, for Normals that depend on
    each other, their covariance, ``[L, ..., D, D]``."""
    name = f.family.name

    def first(v: Tensor) -> Tensor:
        return v.unsqueeze(0) if axis is None else v.movedim(axis, 0)

    p = {k: first(v) for k, v in f.params.items()}
    if name == "Normal":
        return "Normal", (p["loc"], p["scale"]), None
    if name == "MultivariateNormal":
        covariance = p["scale_tril"] @ p["scale_tril"].mT
        scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        return "Normal", (p["loc"], scale), covariance
    if name == "Gamma":
        return "Gamma", (p["concentration"], p["rate"]), None
    if name == "Exponential":
        return "Gamma", (torch.ones_like(p["rate"]), p["rate"]), None
    if name == "Beta":
        return "Beta", (p["concentration1"], p["concentration0"]), None
    if name == "Dirichlet":
        alpha = f.params["concentration"]
        rest = alpha.sum(-1, keepdim=True) - alpha
        return "Beta", (first(alpha), first(rest)), None
    raise UnsupportedFamilyError(
        f"expected a Normal, MultivariateNormal, Gamma, Exponential, Beta or "
        f"Dirichlet, perhaps behind a bijection, got {name}",
        site=site,
    )


def _covariance(scale: Tensor, joint: Tensor | None, places: Sequence[int]) -> Tensor:
    """The covariance of the chosen Normal numbers: ``[L, d]`` and ``[L, ..., D, D]`` to
    ``[L, d, d]``."""
    result = torch.diag_embed(scale**2)
    if joint is None:
        return result
    size = joint.shape[-1]
    blocks = joint.reshape(len(joint), -1, size, size)
    for i, p in enumerate(places):
        for j, q in enumerate(places):
            if p // size == q // size:
                result[:, i, j] = blocks[:, p // size, p % size, q % size]
    return result
