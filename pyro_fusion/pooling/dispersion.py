# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The rule of two prices: an estimate of the dispersion ``T`` from what merges cost, for where the
assignment changes with every T. ``fusion/persistence.py`` looks for one that does not."""

from __future__ import annotations

import math

from pyro_fusion.errors import ParameterError
from pyro_fusion.pooling.merges import Merges

__all__ = ["two_prices"]

_BULK, _TAIL = 1.36, 5.5


def two_prices(merges: Merges) -> float:
    """The price up to which two components may be the same, in nats: ``1.36 + 5.5 √(2 / D)`` times
    the geometric mean of that of a wrong merge and that of a right one.

    The price of a wrong merge is the upper quartile over merges within a party, since a fit that
    gave one atom two components has a low one there; that of a right merge the median of the
    cheapest ones between parties, which is wrong where fewer than half of the components have a
    counterpart. Prices are sums over ``D`` dimensions, and the fewer these are, the longer the tail
    of what is still the same. Where no party has two components, so that nothing is known to be
    different, it is two nats per dimension.

    The factors and the quantiles were chosen on the mixtures of ``benchmarks/simulation.py``, with
    other seeds, and where there are many dimensions on one seed of ``benchmarks/networks.py``. They
    are the same for all separations, sizes and poolings.

    :raises ParameterError: if the prices are not finite.
    """
    if not merges.known_different:
        limit = 2.0 * merges.dimensions
    else:
        right, wrong = merges.right_price(), merges.wrong_price()
        tail = _BULK + _TAIL * (2 / merges.dimensions) ** 0.5
        limit = tail * (max(right, 1e-6 * wrong) * wrong) ** 0.5
    if not math.isfinite(limit):
        raise ParameterError(
            f"the dispersion cannot be estimated: merges cost {limit} nats. Some posterior is "
            "numerically degenerate; mend it, or give `dispersion`"
        )
    return limit if limit > 0 else 1.0
