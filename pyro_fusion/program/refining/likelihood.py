# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A user's Pyro model as a likelihood: what it observes, points drawn from it, and their density
with its discrete sites summed out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from pyro_fusion.errors import Site, StructureError
from pyro_fusion.program.refining.handlers import Cloud, EvenDraws, Held, Integrated

__all__ = ["Likelihood", "Model"]

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A Pyro model with a number of components, and data of the shape that its draws should have.

    :ivar fn: called as ``fn(example, K, *args, **kwargs)``.
    """

    fn: Callable[..., Any]
    example: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, size: int) -> Any:
        """Run with ``size`` components."""
        return self.fn(self.example, size, *self.args, **self.kwargs)


class Likelihood:
    """The likelihood of a model with K components.

    :param known: site -> value of the shape that the posterior gives it, for all latent sites that
        are no part of a datum.
    :ivar observed: names of the sites that hold data.
    :ivar local: names of the continuous latent sites of single data: integrated over by draws from
        their prior.
    :ivar transforms: site -> the bijection from real numbers to its support.
    :ivar priors: site of ``known`` -> its distribution in the model.
    :raises StructureError: where the model and the posterior have other sites or shapes, and for
        models without data or without a discrete latent site.
    """

    def __init__(self, model: Model, size: int, known: Values) -> None:
        self.model, self.size = model, size
        nodes: Mapping[str, Any] = poutine.trace(model).get_trace(size).nodes
        sites = {
            name: site
            for name, site in nodes.items()
            if site["type"] == "sample" and not isinstance(site["fn"], _Subsample | dist.Unit)
            if not site["infer"].get("_deterministic")
        }
        self._check(sites, known)
        self.observed = [name for name, site in sites.items() if site["is_observed"]]
        free = [name for name in sites if name not in {*self.observed, *known}]
        self.discrete = [x for x in free if sites[x]["fn"].has_enumerate_support]
        frames = [f for site in sites.values() for f in site["cond_indep_stack"] if f.vectorized]
        self._nesting = -min((f.dim for f in frames), default=0)
        # The plate that all of a datum is in, its hidden sites too: data are independent there.
        whole = set.intersection(
            *({f for f in sites[x]["cond_indep_stack"]} for x in (*self.observed, *free))
        )
        outer = min((f for f in whole if f.vectorized), key=lambda f: f.dim, default=None)
        self._data = (-1, 0) if outer is None else (outer.dim, outer.size)
        self.local = {x: Cloud.of(sites[x]["fn"]) for x in free if x not in self.discrete}
        self.transforms: dict[str, Transform] = {
            x: biject_to(sites[x]["fn"].support) for x in known
        }
        self.priors: dict[str, TorchDistribution] = {x: sites[x]["fn"] for x in known}
        self._evaluator: TraceEinsumEvaluator | None = None

    def _check(self, sites: Mapping[str, Any], known: Values) -> None:
        if missing := sorted(set(known) - set(sites)):
            raise StructureError(
                f"the posteriors have sites {missing} that the model does not sample; its sites "
                f"are {sorted(sites)}"
            )
        data = [site for site in sites.values() if site["is_observed"]]
        latent = [n for n, site in sites.items() if not site["is_observed"] and n not in known]
        if not data:
            raise StructureError(
                f"the model observes nothing when it is called with the example and "
                f"{self.size} components; its sites are {sorted(sites)}. Give an example of the "
                "data as refine(fusion, model, example): the model's first argument"
            )
        if not any(sites[x]["fn"].has_enumerate_support for x in latent):
            raise StructureError(
                "the model has no discrete latent site that says which component a datum is from, "
                "so its components cannot be counted: sample it from a Categorical, rather than "
                f"summing over it in a mixture distribution; its sites are {sorted(sites)}"
            )
        plates = {f.name for site in data for f in site["cond_indep_stack"]}
        for name in latent:
            own = {f.name for f in sites[name]["cond_indep_stack"]}
            if not (own & plates or sites[name]["fn"].has_enumerate_support):
                raise StructureError(
                    [
                        Site(name),
                        " is a latent site of the model that the posteriors do not have, and in "
                        "no plate of data: nobody knows its value. Put its posterior into that of "
                        "each party, or make it a constant of the model",
                    ]
                )
        for name, value in known.items():
            found = sites[name]["fn"].shape()
            if sites[name]["is_observed"] or found != value.shape:
                what = "data" if sites[name]["is_observed"] else f"shape {tuple(found)}"
                raise StructureError(
                    [
                        Site(name),
                        f": the posterior has shape {tuple(value.shape)} with {self.size} "
                        f"components, in the model it is {what}. The model is called as "
                        "model(example, number of components)",
                    ]
                )

    def numbers(self, site: str) -> int:
        """How many numbers without constraints a site has."""
        return self.transforms[site].inverse_shape(self.priors[site].shape()).numel()

    def draw(self, values: Values, seed: int) -> dict[str, Tensor]:
        """Data of the shape of the example, drawn evenly at ``values`` of the known sites."""
        (dim, size), width = self._data, 0
        for _ in range(2):  # how many numbers a datum takes is known once it has run
            even, held = EvenDraws(dim, size, width, seed), Held(values, {})
            with even, held:
                trace = poutine.trace(poutine.uncondition(self.model)).get_trace(self.size)
            width = even.needed
        nodes: Mapping[str, Any] = trace.nodes
        return {x: nodes[x]["value"].detach() for x in self.observed}

    def log_density(
        self, points: Values, values: Values, *, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The log-density of points, and what the prior says of ``values``: site -> log-density.

        :param weights: log-weights of the components, ``[K]``, beside those of the model.
        """
        held = Held(values, points)
        enumerated = config_enumerate(Integrated(self.local)(held(self.model)), "parallel")
        enumerated = poutine.enum(enumerated, first_available_dim=-1 - self._nesting)
        trace = poutine.trace(enumerated).get_trace(self.size)
        if weights is not None:
            trace.compute_log_prob()
            for site in (trace.nodes[x] for x in self.discrete):
                if site["value"].numel() == self.size:
                    extra = weights[site["value"]].to(site["log_prob"])
                    site["log_prob"] = site["log_prob"] + extra
        if self._evaluator is None:
            self._evaluator = TraceEinsumEvaluator(trace, True, self._nesting)
        return self._evaluator.log_prob(trace), held.prior

    def usage(self, points: Values, values: Values) -> Tensor:
        """How many draws of each component are expected, given the points: ``[K]``.

        :raises StructureError: if no discrete site has K values.
        """
        device = next(iter(values.values())).device
        weights = torch.zeros(self.size, dtype=torch.float64, device=device, requires_grad=True)
        with torch.enable_grad():
            density, _ = self.log_density(points, values, weights=weights)
        (counts,) = torch.autograd.grad(density, weights) if density.requires_grad else (None,)
        if counts is None:
            raise StructureError(
                f"none of the discrete sites {self.discrete} of the model has as many values as "
                f"there are components, {self.size}: the number of components is the second "
                "argument that the model is called with"
            )
        return counts
