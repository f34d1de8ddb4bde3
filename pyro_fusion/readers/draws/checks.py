# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Checks that draws are enough, that they vary, and that their chains have converged."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from pyro_fusion.errors import DrawsError, Site
from pyro_fusion.readers.draws.site_draws import SiteDraws

__all__ = ["check_converged", "check_enough", "check_number", "check_varies", "columns", "extreme"]

# R-hat and ESS need two draws in each half of a chain.
_LEAST_DRAWS = 4


def check_varies(s: SiteDraws) -> None:
    """:raises DrawsError: if a number is the same in all draws."""
    base = s.value if s.as_dirichlet else s.base()
    constant = (base == base[:1]).flatten(1).all(0) if base.dim() > 1 else (base == base[:1]).all()
    if bool(constant.any()):
        raise DrawsError(
            f"{int(constant.sum())} of its {constant.numel()} numbers are the "
            f"same in all {len(base)} draws, so they have no spread to read. Leave the site out "
            "with sites=[...], or fix it in the model",
            site=s.name,
        )


def columns(found: Mapping[str, SiteDraws]) -> list[tuple[str, Tensor]]:
    """The numbers of each site that vary, ``[chain, draw, D]``, as half of a Cholesky factor."""
    result = []
    for name, s in found.items():
        x = s.value.reshape(len(s.value), -1)
        x = x[:, (x != x[:1]).any(0)]
        result.append((name, x.unflatten(0, (s.chains, -1))))
    return result


def extreme(x: Tensor, otherwise: float) -> float:
    """The largest number, with ``otherwise`` in place of NaN."""
    return float(x.nan_to_num(nan=otherwise, posinf=math.inf, neginf=-math.inf).max())


def check_converged(rhat: Mapping[str, float], limit: float | None, relabelled: bool) -> None:
    """:raises DrawsError: for an R-hat above the limit."""
    site = max(rhat, key=lambda k: rhat[k])
    if limit is None or rhat[site] <= limit:
        return
    after = ", after relabelling" if relabelled else ""
    raise DrawsError(
        [
            "the chains have not converged: R-hat of ",
            Site(site),
            f" is {rhat[site]:.3g}{after}, and {limit} is allowed. Run them for longer; label axes "
            "whose components have no order (axes=), so that those that changed places are "
            "matched; or take the draws all the same with max_rhat=None",
        ]
    )


def check_enough(ess: Mapping[str, float], limit: float | None, total: int) -> None:
    """:raises DrawsError: for an effective sample size below the limit."""
    site = min(ess, key=lambda k: ess[k])
    if limit is None or ess[site] >= limit:
        return
    raise DrawsError(
        [
            "too few draws: the effective sample size of ",
            Site(site),
            f" is {ess[site]:.0f}, of {total} draws, and {limit:g} are asked "
            "for. Run the chains for longer, or ask for fewer with min_ess",
        ]
    )


def check_number(chains: int, num_draws: int, min_ess: float | None) -> None:
    """:raises DrawsError: for chains that are too short, whatever their draws."""
    least = max(_LEAST_DRAWS, math.ceil((min_ess or 0) / chains))
    if num_draws < least:
        why = (
            "" if least == _LEAST_DRAWS else f", as min_ess={min_ess} effective draws are asked for"
        )
        raise DrawsError(
            f"expected at least {least} draws in each chain{why}; got {chains} chains of "
            f"{num_draws}. Draw more"
        )
