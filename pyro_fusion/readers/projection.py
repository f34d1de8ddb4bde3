# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Sites that are no product of exponential families, projected by moment matching."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_fusion.errors import GuideError, ParameterError, Site, UnsupportedFamilyError, warn_user
from pyro_fusion.families import Factor
from pyro_fusion.families.projection import normal_from_draws
from pyro_fusion.families.transforms import flatten
from pyro_fusion.readers.sites import Draws, Read, Sites, transform_of

__all__ = ["bare", "constant_axes", "factor_of", "resolve", "same_factors"]

# Draws at which the densities of the members along an axis are compared.
_PROBES = 32


def bare(d: Distribution) -> Distribution:
    """The distribution inside of all wrappers but transforms."""
    while hasattr(d, "base_dist") and not isinstance(
        d, torch.distributions.TransformedDistribution
    ):
        d = d.base_dist
    return d


def factor_of(name: str, site: Mapping[str, Any]) -> Factor | None:
    """The site's distribution as a factor, or None if it is of no registered family."""
    mask = site["mask"]
    if isinstance(mask, Tensor) and not bool(mask.all()):
        raise GuideError(
            [
                Site(name),
                " is partly masked out, so there is no posterior over the whole of it. "
                "Remove the mask, or block the site",
            ]
        )
    if isinstance(bare(site["fn"]), dist.Delta):
        return None
    try:
        factor = Factor.of(site["fn"])
        factor.structure()  # raises for a transform that nobody registered, such as a flow
    except UnsupportedFamilyError:
        return None
    return factor


def same_factors(a: Factor | None, b: Factor | None) -> bool:
    """True if two factors have one structure and equal parameters."""
    if a is None or b is None:
        return a is b
    return a.structure() == b.structure() and all(
        torch.equal(a.params[k], b.params[k]) for k in a.params
    )


def constant_axes(
    batch_shape: Sequence[int],
    sample: Callable[[int], Tensor],
    log_prob: Callable[[Tensor], Tensor],
) -> set[int]:
    """The batch axes along which all members have the same density, at draws of each of them.

    :param sample: a number -> that many draws of the whole batch.
    :param log_prob: values -> their log-densities, one for each member.
    """
    result = set()
    try:
        draws = sample(_PROBES)
        for axis, size in enumerate(batch_shape):
            member = (torch.arange(_PROBES, device=draws.device) * size) // _PROBES
            index = member.reshape((-1,) + (1,) * (draws.dim() - 1))
            shape = list(draws.shape)
            shape[axis + 1] = 1
            value = draws.gather(axis + 1, index.expand(shape)).expand(draws.shape)
            density = log_prob(value.contiguous())
            first = density.narrow(axis + 1, 0, 1).expand(density.shape)
            same = torch.allclose(density, first, rtol=1e-5)
            if density.dim() == len(batch_shape) + 1 and same:
                result.add(axis)
    except Exception:  # a draw of one is out of the support of another, or there is no density
        return result
    return result


def resolve(
    sites: Sites, run: Callable[[], Mapping[str, Any]], what: str, num_samples: int
) -> dict[str, Read]:
    """Match what is still :class:`Draws` to ``num_samples`` runs of a program, with one warning
    that names the sites.

    :param run: the latent sites of another run: name -> message with ``fn``, ``value``, ``mask``.
    :param what: the program, in messages.

    :raises GuideError: if no member of the family matches the draws.
    """
    pending = {name: s for name, s in sites.items() if isinstance(s, Draws)}
    if not pending:
        return {name: s for name, s in sites.items() if isinstance(s, Read)}
    values: dict[str, list[Tensor]] = {name: [] for name in pending}
    dtypes: dict[str, torch.dtype] = {}
    for name, s in pending.items():
        if s.sample is not None:
            draws = s.sample(num_samples)
            values[name], dtypes[name] = [draws.double()], draws.dtype
    run_for = {name: s for name, s in pending.items() if s.sample is None}
    for _ in range(num_samples if run_for else 0):
        there = run()
        for name, s in run_for.items():
            if name not in there:
                raise GuideError(
                    [Site(name), f" is not there in every run of the {what}; block it"]
                )
            values[name].append(_statistic(name, s, there[name]).unsqueeze(0))
            dtypes[name] = there[name]["value"].dtype
    matched: dict[str, Read] = {}
    for name, s in pending.items():
        try:
            factor = _match(name, s, torch.cat(values[name]))
            dtype = dtypes[name] if s.like is None else s.like.dtype
            matched[name] = Read(factor.to(dtype=dtype), s.plates)
        except UnsupportedFamilyError as e:
            e.locate(site=name)
            raise
        except (ParameterError, torch.linalg.LinAlgError) as e:
            raise GuideError(
                f"{num_samples} draws of the {what} match no "
                f"{s.like.family.name if s.like else 'Normal'}: {e}",
                site=name,
            ) from e
    _warn_projected(pending, what, num_samples)
    return {name: s if isinstance(s, Read) else matched[name] for name, s in sites.items()}


def _statistic(name: str, s: Draws, site: Mapping[str, Any]) -> Tensor:
    if s.like is None:
        value: Tensor = transform_of(name, s.support).inv(site["value"].double())
        return value
    factor = factor_of(name, site)
    if factor is None or factor.structure() != s.like.structure():
        raise GuideError(
            [
                Site(name),
                " changes its kind of distribution from run to run, so there is no one "
                "family to project it onto",
            ]
        )
    return factor.shift(s.like.location()).mean


def _match(name: str, s: Draws, values: Tensor) -> Factor:
    if not bool(torch.isfinite(values).all()):
        raise ParameterError(
            "some are at or beyond the border of the support, which may depend on other sites"
        )
    if s.like is None:
        t = transform_of(name, s.support)
        inseparable = max((part.domain.event_dim for part in flatten([t])), default=0)
        pooled = {k: n for k, n in s.pooled.items() if k + 1 < values.dim() - inseparable}
        for axis in pooled:
            values = torch.cat(values.split(1, axis + 1))
        factor = normal_from_draws(values, [t], len(s.plates))
        shape = [pooled.get(axis, size) for axis, size in enumerate(factor.base_shape)]
        return factor.expand(shape).map(torch.clone)
    # Centred at the first conditional location: second moments cancel badly far from zero.
    origin = s.like.location()
    centred = s.like.shift(origin).from_mean(values.mean(0))
    factor = centred.shift(origin, 1.0)
    factor.check()
    return factor


def _warn_projected(pending: Mapping[str, Draws], what: str, num_samples: int) -> None:
    parts = []
    mixed = sorted(n for n, s in pending.items() if s.like is not None)
    drawn = sorted(n for n, s in pending.items() if s.like is None)
    if mixed:
        parts.append(f"{mixed}, which depend on other sites, onto the family they have given those")
    if drawn:
        supports = ", ".join(sorted({_named(pending[n].support) for n in drawn}))
        parts.append(f"{drawn} onto a Normal in the unconstrained space of {supports}")
    error = 1 / math.sqrt(num_samples)
    warn_user(
        f"this {what} is no product of exponential families. Projected by moment matching over "
        f"{num_samples} draws (so to about {error:.1g} standard deviations): "
        + "; and ".join(parts),
    )


def _named(support: Any) -> str:
    return str(support.codomain if isinstance(support, Transform) else support)
