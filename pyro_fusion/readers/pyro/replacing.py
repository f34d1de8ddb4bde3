# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""An effect handler that puts other priors into a Pyro model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger

from pyro_fusion.errors import StructureError
from pyro_fusion.families import Factor
from pyro_fusion.readers.replacing import Replacing, shaped

__all__ = ["PriorMessenger"]


class PriorMessenger(Replacing, Messenger):
    """A handler under which the sites of a model have the priors given, ``PriorMessenger(...)(
    model)``. Plates, scales and masks stay as they are; an observed site keeps what it is.

    :param factors: site -> its prior, with the axes that the site has in the model, plates first.
    :param party: whose they are, for errors.
    :raises StructureError: when the model runs, if it lacks one of the sites, or a site has another
        shape or another support.
    """

    def __init__(self, factors: Mapping[str, Factor], party: str) -> None:
        super().__init__(factors=factors, party=party)

    def _pyro_sample(self, msg: Any) -> None:
        # Inner handlers came first: the distribution is as wide as its plates within the model.
        name, fn = msg["name"], msg["fn"]
        self._met.add(name)
        if name not in self._factors or msg["is_observed"]:
            return
        f = shaped(self._factors[name], fn.batch_shape, fn.event_shape, self._party, name)
        center = f.center()
        try:
            inside = bool(torch.as_tensor(fn.support.check(center)).all())
        except NotImplementedError:  # a support that is not known
            inside = True
        if not inside:
            raise StructureError(
                f"the prior of '{name}' is a {type(f.distribution()).__name__}, whose centre is "
                f"outside the support {fn.support} of the model's own {type(fn).__name__}",
                party=self._party,
                site=name,
            )
        msg["fn"] = f.distribution()
