# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior as a NumPyro guide."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpyro

from pyro_fusion.posterior import Posterior
from pyro_fusion.readers.numpyro.convert import (
    CONSTRAINTS,
    check_precision,
    to_array,
    to_numpyro_distribution,
)

__all__ = ["NumPyroGuide"]


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

    :ivar params: parameter name -> JAX array, as ``SVI`` names them.
    """

    def __init__(self, posterior: Posterior) -> None:
        self._factors = {k: f.map(lambda v: v.clone()) for k, f in posterior.decomposed.items()}
        self._plates = dict(posterior.plates)
        check_precision(posterior.dtype)
        self.params = {
            f"{site}_{name}": to_array(value)
            for site, f in self._factors.items()
            for name, value in f.params.items()
        }
        for site in self._factors:
            self._distribution(site, self.params)  # an error comes now or never

    def _distribution(self, site: str, params: dict[str, Any]) -> Any:
        f = self._factors[site]
        return to_numpyro_distribution(f, {k: params[f"{site}_{k}"] for k in f.params})

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Sample every site; returns site name -> value, as autoguides do."""
        plates: dict[tuple[str, int], Any] = {}
        result = {}
        for site, f in self._factors.items():
            params = {
                f"{site}_{k}": numpyro.param(
                    f"{site}_{k}", self.params[f"{site}_{k}"], constraint=CONSTRAINTS[k]
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
                        # One name at two depths needs two plates.
                        taken = any(other == name for other, _ in plates)
                        unique = f"{name}_{-dim}" if taken else name
                        plates[name, dim] = numpyro.plate(unique, size, dim=dim)
                    stack.enter_context(plates[name, dim])
                result[site] = numpyro.sample(site, self._distribution(site, params))
        return result
