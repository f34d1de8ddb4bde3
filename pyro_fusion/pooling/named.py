# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The poolings by name."""

from __future__ import annotations

from pyro_fusion.errors import ParameterError
from pyro_fusion.pooling.kl import Exclusive, Inclusive
from pyro_fusion.pooling.pooling import Pooling
from pyro_fusion.pooling.product import Product

__all__ = ["pooling_named"]


_POOLINGS: dict[str, Pooling] = {p.name: p for p in (Inclusive(), Exclusive(), Product())}


def pooling_named(pooling: str | Pooling) -> Pooling:
    """Look up a pooling by name.

    :raises ParameterError: for an unknown name, or a pooling whose attributes do not fit together.
    """
    if isinstance(pooling, Pooling):
        if not pooling.needs_prior and (pooling.tempers or pooling.draws_from == "prior"):
            why = "`tempers` is set" if pooling.tempers else "`draws_from` is 'prior'"
            raise ParameterError(
                f"pooling {pooling.name!r}: {why}, which needs the prior of the local models: set "
                "`needs_prior`"
            )
        return pooling
    if not isinstance(pooling, str) or pooling not in _POOLINGS:
        shown = repr(pooling) if isinstance(pooling, str) else type(pooling).__name__
        remedy = ": are the parties in a list?" if not isinstance(pooling, str) else ""
        if isinstance(pooling, type) and issubclass(pooling, Pooling):
            shown, remedy = f"the class {pooling.__name__}", f": give {pooling.__name__}()"
        raise ParameterError(
            f"pooling must be one of {sorted(_POOLINGS)} or a Pooling, got {shown}{remedy}"
        )
    return _POOLINGS[pooling]
