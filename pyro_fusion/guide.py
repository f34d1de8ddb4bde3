# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior as a Pyro guide."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn.module import PyroModule, PyroParam
from torch import Tensor

if TYPE_CHECKING:
    from pyro_fusion.posterior import Posterior

__all__ = ["PosteriorGuide"]

# Guides of one name share their parameters in Pyro's global store, so each gets its own.
_COUNT = itertools.count()


class PosteriorGuide(PyroModule):
    """A mean-field guide that starts at a :class:`~pyro_fusion.Posterior`.

    It takes any arguments, as a guide is called with those of the model; its parameters are
    :class:`~pyro.nn.module.PyroParam`, so ``SVI`` goes on training from here. Each batch axis is a
    plate, called as in the guides that the posterior was read from.

    :param posterior: the factors and their plates; copied.
    """

    def __init__(self, posterior: Posterior) -> None:
        super().__init__(name=f"{type(self).__name__}{next(_COUNT)}")
        self._factors = dict(posterior.decomposed)
        self._plate_names = {
            site: [
                label or f"_{site}_axis{i}" for i, label in enumerate(posterior.plates[site])
            ]
            for site in self._factors
        }
        for site, f in self._factors.items():
            constraints = f.family.build(f.params, validate_args=False).arg_constraints
            for name, value in f.params.items():
                param = PyroParam(
                    value.clone(), constraints[name], event_dim=value.dim() - f.batch_dim
                )
                deep_setattr(self, f"params.{site}.{name}", param)

    def distribution(self, site: str) -> pyro.distributions.TorchDistribution:
        """The distribution of ``site`` at the present parameters."""
        f = self._factors[site]
        holder = attrgetter(f"params.{site}")(self)
        return replace(f, params={k: getattr(holder, k) for k in f.params}).distribution()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site; returns site name -> value, as autoguides do."""
        plates: dict[tuple[str, int], pyro.plate] = {}
        result = {}
        for site, f in self._factors.items():
            with ExitStack() as stack:
                for i, name in enumerate(self._plate_names[site]):
                    dim = i - f.batch_dim
                    if (name, dim) not in plates:
                        # One name at two depths needs two plates.
                        taken = any(other == name for other, _ in plates)
                        unique = f"{name}_{-dim}" if taken else name
                        plates[name, dim] = pyro.plate(unique, f.batch_shape[i], dim=dim)
                    stack.enter_context(plates[name, dim])
                result[site] = pyro.sample(site, self.distribution(site))
        return result

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """A central value of every site: the image of the location where there is one, else the
        mean. Site name -> value, as autoguides do."""
        result = {}
        for site, f in self._factors.items():
            name = f.family.location
            value = attrgetter(f"params.{site}")(self)
            if name is None or f.family.event_dim > 1:
                result[site] = self.distribution(site).mean
                continue
            x = getattr(value, name)
            for t in f.transforms:
                x = t(x)
            result[site] = x.detach().clone()
        return result
