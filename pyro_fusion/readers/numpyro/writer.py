# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior as a NumPyro guide."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any

import numpyro

from pyro_fusion.errors import at
from pyro_fusion.posterior import Posterior
from pyro_fusion.readers.numpyro.convert import (
    check_precision,
    constraint_of,
    to_array,
    to_numpyro_distribution,
)

__all__ = ["NumPyroGuide", "to_numpyro"]


def to_numpyro(posterior: Posterior) -> NumPyroGuide:
    """A NumPyro guide of a posterior, for NumPyro's ``Predictive``, or to start its ``SVI``."""
    return NumPyroGuide(posterior)


class NumPyroGuide:
    """A mean-field NumPyro guide at a :class:`~pyro_fusion.Posterior`.

    It takes any arguments, as a guide is called with those of the model. Its parameters have the
    values of the posterior where nothing else says otherwise: in
    ``Predictive(guide, params={}, num_samples=...)``, and at the start of an ``SVI``, which goes on
    from there. Each batch axis is a plate, called as in the guides that the posterior was read
    from.

    :param posterior: copied to JAX, by DLPack. float64 needs ``jax_enable_x64``; without it a
        warning says that the numbers are rounded.
    :raises UnsupportedFamilyError: for what NumPyro has not, as NormalWishart.

    :ivar params: parameter name -> JAX array, as ``SVI`` names them: ``z$loc`` of site ``z``, a
        name that neither a site nor a parameter of the model has.
    """

    def __init__(self, posterior: Posterior) -> None:
        self._factors = {k: f.map(lambda v: v.clone()) for k, f in posterior.decomposed.items()}
        self._plates = dict(posterior.plates)
        check_precision("sites", {k: f.dtype for k, f in self._factors.items()})
        self.params = {
            _name(site, name): to_array(value)
            for site, f in self._factors.items()
            for name, value in f.params.items()
        }
        for site in self._factors:
            self._distribution(site, self.params)  # an error comes now or never

    def _distribution(self, site: str, params: dict[str, Any]) -> Any:
        f = self._factors[site]
        with at(site=site):
            return to_numpyro_distribution(f, {k: params[_name(site, k)] for k in f.params})

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Sample every site; returns site name -> value, as autoguides do."""
        plates: dict[tuple[str, int], Any] = {}
        taken = set(self._factors)
        result = {}
        for site, f in self._factors.items():
            params = {
                _name(site, k): numpyro.param(
                    _name(site, k), self.params[_name(site, k)], constraint=constraint_of(f, k)
                )
                for k in f.params
            }
            with ExitStack() as stack:
                for i, label in enumerate(self._plates[site]):
                    size, dim = f.batch_shape[i], i - f.batch_dim
                    if label is None and size == 1:
                        continue  # stands to the right of another plate's axis
                    name = label or f"_{site}_axis{i}"
                    if (name, dim) not in plates:
                        # One name at two depths needs two plates, and none is called as a site.
                        more = (f"{name}_{n}" for n in itertools.count(-dim))
                        unique = next(n for n in itertools.chain([name], more) if n not in taken)
                        taken.add(unique)
                        plates[name, dim] = numpyro.plate(unique, size, dim=dim)
                    stack.enter_context(plates[name, dim])
                result[site] = numpyro.sample(site, self._distribution(site, params))
        return result


def _name(site: str, parameter: str) -> str:
    return f"{site}${parameter}"
