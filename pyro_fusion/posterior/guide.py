# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior as a Pyro guide, whose parameters SVI can train."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.nn.module import PyroModule, PyroParam
from torch import Tensor

from pyro_fusion.families import Factor
from pyro_fusion.posterior.posterior import Posterior

__all__ = ["FactorParams", "PosteriorGuide", "unique_name"]

_COUNT = itertools.count()


def unique_name(cls: type) -> str:
    """A new name for a module: modules of one name share parameters in Pyro's global store."""
    return f"{cls.__name__}{next(_COUNT)}"


class FactorParams(PyroModule):
    """Named factors, whose parameters are :class:`~pyro.nn.module.PyroParam`.

    :param factors: site -> factor; copied.
    """

    def __init__(self, factors: Mapping[str, Factor], name: str = "") -> None:
        super().__init__(name=name)
        self._factors = dict(factors)
        self._holders: dict[str, str] = {}
        for site, f in self._factors.items():
            # A flat name: no dots, and no clash with an attribute of modules.
            holder = site.replace(".", "_")
            while hasattr(self, holder):
                holder += "_"
            self._holders[site] = holder
            setattr(self, holder, PyroModule())
            constraints = f.family.build(f.params, validate_args=False).arg_constraints
            for param, value in f.params.items():
                event_dim = value.dim() - f.batch_dim
                initial = PyroParam(value.clone(), constraints[param], event_dim=event_dim)
                setattr(getattr(self, holder), param, initial)

    def factor(self, site: str) -> Factor:
        """The factor of ``site`` at the present parameters."""
        f, holder = self._factors[site], getattr(self, self._holders[site])
        return replace(f, params={k: getattr(holder, k) for k in f.params})

    def set_factor(self, site: str, f: Factor) -> None:
        """Set the parameters to those of ``f``, which may have another batch shape."""
        holder = getattr(self, self._holders[site])
        for name, value in f.params.items():
            setattr(holder, name, value)
        for parameter in holder.parameters():
            parameter.grad = None  # of the old shape


class PosteriorGuide(FactorParams):
    """A mean-field guide that starts at a :class:`~pyro_fusion.Posterior`.

    It takes any arguments, since a guide is called with those of the model; its parameters are
    :class:`~pyro.nn.module.PyroParam`, so ``SVI`` goes on training from here. Each batch axis is a
    plate, named as in the guides that the posterior was read from.

    Plates have their full size: a model that subsamples a plate with a latent site inside needs an
    autoguide of its own, started from these values. A batch axis without a name gets a plate of
    its own, about which Pyro warns if the model has none there.

    :param posterior: the factors and their plates; copied.
    :ivar axes, outgoing: those of the posterior; ``from_guide`` uses them by default.
    """

    def __init__(self, posterior: Posterior) -> None:
        factors = posterior.decomposed
        super().__init__(factors, name=unique_name(type(self)))
        self.axes, self.outgoing = dict(posterior.axes), dict(posterior.outgoing)
        self._plate_names = {
            # An axis of size one needs no plate: it only pads between other plates' axes.
            site: [
                label or (None if f.batch_shape[i] == 1 else f"_{site}_axis{i}")
                for i, label in enumerate(posterior.plates[site])
            ]
            for site, f in factors.items()
        }

    def distribution(self, site: str) -> pyro.distributions.TorchDistribution:
        """The distribution of ``site`` at the present parameters."""
        return self.factor(site).distribution()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site; return site name -> value, as autoguides do."""
        plates: dict[tuple[str, int], pyro.plate] = {}
        taken = set(self._factors)
        result = {}
        for site, f in self._factors.items():
            with ExitStack() as stack:
                for i, name in enumerate(self._plate_names[site]):
                    dim = i - f.batch_dim
                    if name is None:
                        continue
                    if (name, dim) not in plates:
                        # One name at two depths needs two plates, neither named like a site.
                        more = (f"{name}_{n}" for n in itertools.count(-dim))
                        unique = next(n for n in itertools.chain([name], more) if n not in taken)
                        taken.add(unique)
                        plates[name, dim] = pyro.plate(unique, f.batch_shape[i], dim=dim)
                    stack.enter_context(plates[name, dim])
                result[site] = pyro.sample(site, self.distribution(site))
        return result

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """A central value of every site, site name -> value: the image of the location where there
        is one, else of the mean; of discrete sites the mode."""
        return {site: self.factor(site).center().clone() for site in self._factors}
