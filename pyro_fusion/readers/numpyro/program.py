# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Running NumPyro programs, and reading any of them from its traces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as ndist
import torch
from numpyro import handlers
from numpyro.distributions import biject_to
from torch import Tensor
from torch.distributions import Transform

from pyro_fusion.errors import FusionError, GuideError, ParameterError, Site, UnsupportedFamilyError
from pyro_fusion.families import Factor
from pyro_fusion.readers import program as common
from pyro_fusion.readers.numpyro.convert import (
    check_precision,
    on_one_device,
    to_pyro_distribution,
    to_pyro_transform,
    to_tensor,
)
from pyro_fusion.readers.program import COMPARED, Frame, Message, read_runs
from pyro_fusion.readers.projection import constant_axes, factor_of
from pyro_fusion.readers.sites import Sites, Spread

__all__ = [
    "Program",
    "arrays_of",
    "bijection",
    "data_plates",
    "fit",
    "latent_sites",
    "log_likelihood",
    "plates_of",
    "read_program",
    "require",
    "set_up_in_jit",
]


@dataclass
class Program:
    """A guide or a model, with all that it takes to run it.

    :ivar what: "guide" or "model", for messages; a guide must have all of its ``params``.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    params: dict[str, Any]
    what: str
    seed: int

    def __post_init__(self) -> None:
        self._key = jax.random.key(self.seed)
        self._compiled: Callable[[Any], Any] | None = None

    def next_key(self) -> Any:
        """A new random key."""
        self._key, key = jax.random.split(self._key)
        return key

    def trace(self, key: Any | None = None) -> dict[str, Any]:
        """The trace of one run.

        :raises GuideError: if it fails, or lacks a parameter.
        """
        return self._trace(handlers.substitute(self.fn, data=self.params), key)

    def checked_params(self) -> dict[str, Any]:
        """The parameters in the shapes that the guide starts them with.

        :raises GuideError: for one that is not there or does not broadcast.
        :raises ParameterError: for one that is not finite.
        """
        params = dict(self.params)

        def given(site: Mapping[str, Any]) -> Any:
            name = site["name"]
            if site["type"] != "param":
                return None
            require(self, [name])
            if site["args"] and hasattr(site["args"][0], "shape"):
                params[name] = fit(name, params[name], site["args"][0].shape)
                if not bool(jnp.isfinite(params[name]).all()):
                    raise ParameterError(f"params['{name}'] must be finite")
            return params[name]

        # What the guide starts with is of no use where it was set up inside of jax.jit.
        self._trace(handlers.substitute(self.fn, substitute_fn=given))
        return params

    def _trace(self, fn: Callable[..., Any], key: Any | None = None) -> dict[str, Any]:
        seeded = handlers.seed(fn, self.next_key() if key is None else key)
        try:
            trace = handlers.trace(seeded).get_trace(*self.args, **self.kwargs)
        except FusionError:
            raise
        except jax.errors.UnexpectedTracerError as e:
            raise set_up_in_jit(self.what) from e
        except Exception as e:
            raise GuideError(
                f"the {self.what} fails with these arguments: {type(e).__name__}: {e}"
            ) from e
        if self.what == "guide":  # else NumPyro takes values to start from
            require(self, (k for k, s in trace.items() if s["type"] == "param"))
        return dict(trace)

    def run(self) -> dict[str, dict[str, Any]]:
        """The latent sites of another run, in Pyro's terms: name -> ``fn`` (None where Pyro has
        not its like), ``value``, ``mask``."""
        if self._compiled is None:
            self._compiled = jax.jit(self._latent)
        key = self.next_key()
        try:
            sites = self._compiled(key)
        except Exception:  # what does not compile can still be run
            self._compiled = self._latent
            sites = self._latent(key)
        return {
            name: {"fn": _pyro_or_none(fn), "value": to_tensor(value), "mask": None}
            for name, (fn, value) in sites.items()
        }

    def _latent(self, key: Any) -> dict[str, tuple[Any, Any]]:
        trace = self.trace(key)
        return {name: (s["fn"], s["value"]) for name, s in latent_sites(trace).items()}


def latent_sites(trace: Mapping[str, Any]) -> dict[str, Any]:
    """Site name -> message of the sites that a posterior is about."""
    return {
        name: site
        for name, site in trace.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site["infer"].get("is_auxiliary")
        and site["infer"].get("enumerate") is None
    }


def data_plates(trace: Mapping[str, Any]) -> dict[str, str]:
    """Plate -> an observed site in it."""
    return {
        frame.name: name
        for name, site in trace.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not isinstance(site["fn"], ndist.Unit)  # a factor
        for frame in site["cond_indep_stack"]
    }


def log_likelihood(program: Program, values: Mapping[str, Tensor]) -> float | None:
    """The log-density of the observed sites of a model at these values of its latent sites; None if
    it has others, or cannot be run."""
    given = {k: jnp.asarray(v.numpy(force=True)) for k, v in values.items()}
    key = jax.random.key(0)
    try:
        trace = replace(program, fn=handlers.condition(program.fn, data=given)).trace(key)
        sites = {k: s for k, s in trace.items() if s["type"] == "sample"}
        if not set(values) <= set(sites) or not all(s["is_observed"] for s in sites.values()):
            return None
        rest = [s for k, s in sites.items() if k not in values]
        return sum(float(jnp.sum(s["fn"].log_prob(s["value"]))) for s in rest)
    except Exception:  # no density at these values, say
        return None


def _pyro_or_none(fn: Any) -> Any:
    try:
        return to_pyro_distribution(fn)
    except UnsupportedFamilyError:
        return None


def set_up_in_jit(what: str) -> GuideError:
    """The error for a guide with arrays that have values only inside of ``jax.jit``."""
    return GuideError(
        f"the {what} was first called inside of jax.jit, with arguments that it depends on, and "
        "these have no values outside. Call svi.init outside of jax.jit, and fit from there"
    )


def plates_of(
    name: str, site: Mapping[str, Any], batch_dim: int, sizes: Mapping[str, int] | None = None
) -> tuple[str | None, ...]:
    """The plate (or None) of each of ``batch_dim`` batch axes.

    :param sizes: full sizes of plates, by name; without them all are taken to be full.
    :raises GuideError: for a subsampled plate.
    """
    return common.plates_of(name, _frames(site, batch_dim, sizes or {}), batch_dim)


def _frames(site: Mapping[str, Any], batch_dim: int, sizes: Mapping[str, int]) -> tuple[Frame, ...]:
    return tuple(
        Frame(f.name, batch_dim + f.dim, f.size, sizes.get(f.name, f.size))
        for f in site["cond_indep_stack"]
        if -f.dim <= batch_dim
    )


def _full_sizes(trace: Mapping[str, Any]) -> dict[str, int]:
    return {k: int(s["args"][0]) for k, s in trace.items() if s["type"] == "plate"}


def bijection(name: str, fn: Any) -> Transform:
    """Pyro's bijection from unconstrained space onto the support of a distribution."""
    try:
        return to_pyro_transform(biject_to(fn.support))
    except jax.errors.UnexpectedTracerError as e:
        raise set_up_in_jit("guide") from e
    except (NotImplementedError, UnsupportedFamilyError) as e:
        raise GuideError(
            f"support {fn.support} has no bijection to unconstrained space that "
            "Pyro has too. Give the site a distribution of a registered family, or leave it out "
            "of the guide",
            site=name,
        ) from e


def arrays_of(params: Any) -> dict[str, Any]:
    """Parameters as JAX arrays, by name.

    :raises ParameterError: for what is no mapping, or an array that was donated.
    """
    if not isinstance(params, Mapping):
        raise ParameterError(
            "expected the parameters as a mapping, svi.get_params(state) or svi.run(...).params, "
            f"got {type(params).__name__}"
        )
    rounded: dict[str, torch.dtype] = {}

    def array(name: str, x: Any) -> Any:
        if isinstance(x, np.ndarray | Tensor):
            if x.dtype in (np.float64, torch.float64):
                rounded[name] = torch.float64
            return jnp.asarray(x.detach().cpu().numpy() if isinstance(x, Tensor) else x)
        if isinstance(x, jax.Array) and x.is_deleted():
            raise ParameterError(f"params['{name}'] was given away (donated), so it has no value")
        return on_one_device(x)

    # A module's parameters are a tree of arrays.
    result = {k: jax.tree.map(functools.partial(array, k), v) for k, v in params.items()}
    check_precision("params", rounded)
    return result


def require(program: Program, names: Iterable[str]) -> None:
    """:raises GuideError: for parameters that are not there."""
    missing = sorted(set(names) - set(program.params))
    if missing:
        raise GuideError(
            f"params lack {missing}, which the guide has; there are {sorted(program.params)[:20]}"
        )


def fit(name: str, value: Any, shape: tuple[int, ...]) -> Any:
    """A parameter as an array of this shape.

    :raises GuideError: if it is none, or does not broadcast.
    """
    try:
        value = jnp.asarray(value)
    except (TypeError, ValueError) as e:
        raise GuideError(f"params['{name}'] is no array, but {type(value).__name__}") from e
    try:
        return jnp.broadcast_to(value, shape)
    except ValueError as e:
        raise GuideError(
            f"params['{name}'] has shape {value.shape}, but that of this guide has {shape}. Give "
            "the parameters that were fitted with this guide, and the guide the arguments of then"
        ) from e


def read_program(program: Program, spread: Spread) -> Sites:
    """Read any program from its runs; :func:`~pyro_fusion.readers.program.read_runs` says how.

    :raises GuideError: for a subsampled plate, a point mass without spread, a masked site, or a
        program that fails.
    """
    traces = [program.trace() for _ in range(COMPARED)]
    sizes = _full_sizes(traces[0])
    runs = [
        {name: _NumPyroMessage(name, site, sizes) for name, site in latent_sites(t).items()}
        for t in traces
    ]
    return read_runs(runs, spread, program.what)


@dataclass(frozen=True)
class _NumPyroMessage(Message):
    name: str
    site: Mapping[str, Any]
    sizes: Mapping[str, int]

    @property
    def batch_dim(self) -> int:
        return len(self.site["fn"].batch_shape)

    @property
    def frames(self) -> tuple[Frame, ...]:
        return _frames(self.site, self.batch_dim, self.sizes)

    def check(self) -> None:
        """Refuse a mask, with a factor or without."""
        _check_mask(self.name, self.site["fn"])

    def is_point(self) -> bool:
        return _is_point(self.site["fn"])

    def factor(self) -> Factor | None:
        d = _pyro_or_none(self.site["fn"])
        return None if d is None else factor_of(self.name, {"fn": d, "mask": None})

    def value(self) -> Tensor:
        return to_tensor(self.site["value"])

    def support(self) -> Transform:
        return bijection(self.name, self.site["fn"])

    def constant_axes(self) -> set[int]:
        return _constant_axes(self.site["fn"])


def _layers(fn: Any) -> Iterator[Any]:
    """A distribution and those that it wraps, down to a transformed one."""
    yield fn
    while isinstance(fn, ndist.Independent | ndist.ExpandedDistribution | ndist.MaskedDistribution):
        fn = fn.base_dist
        yield fn


def _is_point(fn: Any) -> bool:
    return any(isinstance(layer, ndist.Delta) for layer in _layers(fn))


def _check_mask(name: str, fn: Any) -> None:
    masks = [layer._mask for layer in _layers(fn) if isinstance(layer, ndist.MaskedDistribution)]
    if not all(isinstance(mask, bool) or bool(jnp.all(mask)) for mask in masks):
        raise GuideError(
            [
                Site(name),
                " is partly masked out, so there is no posterior over the whole of it. "
                "Remove the mask",
            ]
        )


def _constant_axes(fn: Any) -> set[int]:
    while isinstance(fn, ndist.Independent | ndist.MaskedDistribution):
        fn = fn.base_dist
    if _is_point(fn):
        return set()
    key = jax.random.key(0)
    return constant_axes(
        fn.batch_shape,
        lambda n: to_tensor(fn.sample(key, (n,))),
        lambda value: to_tensor(fn.log_prob(jnp.from_dlpack(value))),
    )
