# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""An effect handler that puts other priors into a NumPyro model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpyro.primitives import Messenger

from pyro_fusion.errors import at
from pyro_fusion.families import Factor
from pyro_fusion.readers.numpyro.convert import check_precision, to_array, to_numpyro_distribution
from pyro_fusion.readers.replacing import Replacing, shaped

__all__ = ["PriorMessenger"]


class PriorMessenger(Replacing, Messenger):
    """A handler under which the sites of a NumPyro model have the priors given. Plates, scales and
    masks stay as they are; an observed site keeps what it is.

    :param fn: the model.
    :param factors: site -> its prior, with the axes that the site has in the model, plates first.
    :param party: whose they are, for errors.
    :raises UnsupportedFamilyError: for a prior that NumPyro has not, as NormalWishart.
    :raises StructureError: when the model runs, if it lacks one of the sites, or a site has another
        shape.
    """

    def __init__(self, fn: Callable[..., Any], factors: Mapping[str, Factor], party: str) -> None:
        super().__init__(fn, factors=factors, party=party)
        check_precision("sites", {k: f.dtype for k, f in self._factors.items()})
        self._params = {
            site: {k: to_array(v.clone()) for k, v in f.params.items()}
            for site, f in self._factors.items()
        }
        for site, f in self._factors.items():
            with at(party=party, site=site):
                to_numpyro_distribution(f, self._params[site])  # an error comes now or never

    def process_message(self, msg: Any) -> None:
        if msg["type"] != "sample":
            return
        # Inner handlers came first: the distribution is as wide as its plates within the model.
        name, fn = msg["name"], msg["fn"]
        self._met.add(name)
        if name in self._factors and not msg["is_observed"]:
            f = shaped(self._factors[name], fn.batch_shape, fn.event_shape, self._party, name)
            msg["fn"] = to_numpyro_distribution(f, self._params[name])
