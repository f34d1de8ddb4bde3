# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""NumPyro's distributions, transforms and arrays as Pyro's, and back.

Arrays cross by DLPack: nothing is copied, unless the dtype has to change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as ndist
import pyro.distributions as dist
import torch
from numpyro.distributions import constraints
from numpyro.distributions import transforms as nt
from pyro.distributions import transforms as pt
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.distributions import transforms as tt

from pyro_fusion.errors import UnsupportedFamilyError, warn_user
from pyro_fusion.families import Factor
from pyro_fusion.families.wishart import Wishart

__all__ = [
    "check_precision",
    "constraint_of",
    "on_one_device",
    "to_array",
    "to_numpyro_distribution",
    "to_pyro_distribution",
    "to_pyro_transform",
    "to_tensor",
]


def to_tensor(x: Any) -> Tensor:
    """A JAX or NumPy array, or a number, as a tensor on the same device that may share memory."""
    return torch.from_dlpack(on_one_device(jnp.asarray(x)))


def on_one_device(x: Any) -> Any:
    """An array that lies on several devices, in parts or in copies, put on the first of them."""
    devices = x.sharding.device_set if isinstance(x, jax.Array) else ()
    if len(devices) < 2:
        return x
    return jax.device_put(np.asarray(x), min(devices, key=lambda d: d.id))


def to_array(x: Tensor) -> Any:
    """A tensor as a JAX array on the same device; it may share memory, so leave the tensor alone.
    Without ``jax_enable_x64`` float64 becomes float32."""
    x = x.detach().contiguous()
    return jnp.from_dlpack(x.to(torch.float32) if _is_rounded(x.dtype) else x)


def _is_rounded(dtype: torch.dtype) -> bool:
    return dtype == torch.float64 and not jax.config.jax_enable_x64


def check_precision(what: str, found: Mapping[str, torch.dtype]) -> None:
    """Warn of float64 where JAX has none.

    :param found: name -> dtype, of what becomes JAX arrays.
    """
    rounded = sorted(name for name, dtype in found.items() if _is_rounded(dtype))
    if rounded:
        warn_user(
            f"{what} {rounded[:5]} are float64, but JAX is not: their numbers are rounded to "
            'float32. Call numpyro.enable_x64() or set jax.config.update("jax_enable_x64", True) '
            "first"
        )


# -- distributions ---------------------------------------------------------------------------------

# NumPyro's class -> Pyro's, and the names of the parameters.
_FAMILIES: dict[type, tuple[Callable[..., Distribution], tuple[str, ...]]] = {
    ndist.Normal: (dist.Normal, ("loc", "scale")),
    ndist.LogNormal: (dist.LogNormal, ("loc", "scale")),
    ndist.MultivariateNormal: (dist.MultivariateNormal, ("loc", "scale_tril")),
    ndist.LowRankMultivariateNormal: (
        dist.LowRankMultivariateNormal,
        ("loc", "cov_factor", "cov_diag"),
    ),
    ndist.Gamma: (dist.Gamma, ("concentration", "rate")),
    ndist.Chi2: (dist.Gamma, ("concentration", "rate")),
    ndist.InverseGamma: (dist.InverseGamma, ("concentration", "rate")),
    ndist.Exponential: (dist.Exponential, ("rate",)),
    ndist.Poisson: (dist.Poisson, ("rate",)),
    ndist.Beta: (dist.Beta, ("concentration1", "concentration0")),
    ndist.BetaProportion: (dist.Beta, ("concentration1", "concentration0")),
    ndist.Dirichlet: (dist.Dirichlet, ("concentration",)),
    ndist.BernoulliProbs: (dist.Bernoulli, ("probs",)),
    ndist.BernoulliLogits: (dist.Bernoulli, ("logits",)),
    ndist.CategoricalProbs: (dist.Categorical, ("probs",)),
    ndist.CategoricalLogits: (dist.Categorical, ("logits",)),
    ndist.Wishart: (Wishart, ("df", "scale_tril")),
}
# NumPyro's names of parameters, where they differ.
_THEIRS = {"df": "concentration"}

# The way back, by the family's name.
_BUILDERS: dict[str, Callable[..., Any]] = {
    "Normal": ndist.Normal,
    "MultivariateNormal": ndist.MultivariateNormal,
    "Gamma": ndist.Gamma,
    "Exponential": ndist.Exponential,
    "Poisson": ndist.Poisson,
    "Beta": ndist.Beta,
    "Dirichlet": ndist.Dirichlet,
    "Bernoulli": ndist.Bernoulli,
    "Categorical": ndist.Categorical,
    "Wishart": ndist.Wishart,
}

# Constraints on the parameters of all of these, by name.
_CONSTRAINTS: dict[str, Any] = {
    "loc": constraints.real,
    "logits": constraints.real,
    "scale_tril": constraints.lower_cholesky,
    **dict.fromkeys(
        ("concentration", "concentration0", "concentration1", "rate", "scale"),
        constraints.positive,
    ),
}


def constraint_of(f: Factor, name: str) -> Any:
    """NumPyro's constraint on a parameter of a factor."""
    if name == "df":
        return constraints.greater_than(f.params["scale_tril"].shape[-1] - 1.0)
    return _CONSTRAINTS[name]


def to_pyro_distribution(d: Any) -> Distribution:
    """A NumPyro distribution as Pyro's.

    :raises UnsupportedFamilyError: for one that Pyro, or this package, has not.
    """
    kind = type(d)
    if kind in _FAMILIES:
        make, names = _FAMILIES[kind]
        params = {k: _parameter(getattr(d, _THEIRS.get(k, k))) for k in names}
        if "loc" in params and d.event_shape:  # one number for all of the vector
            loc = params["loc"]
            params["loc"] = loc.expand(loc.shape[:-1] + torch.Size(d.event_shape))
        made = make(**params, validate_args=False)
        # Parameters may be narrower than the distribution.
        return made if made.batch_shape == d.batch_shape else made.expand(d.batch_shape)
    if kind is ndist.Independent:
        return dist.Independent(to_pyro_distribution(d.base_dist), d.reinterpreted_batch_ndims)
    if kind is ndist.ExpandedDistribution:
        return to_pyro_distribution(d.base_dist).expand(d.batch_shape)
    if kind is ndist.MaskedDistribution:
        return to_pyro_distribution(d.base_dist)
    if kind is ndist.TransformedDistribution:
        parts = [to_pyro_transform(t) for t in d.transforms]
        made = dist.TransformedDistribution(to_pyro_distribution(d.base_dist), parts)
        return made if made.batch_shape == d.batch_shape else made.expand(d.batch_shape)
    raise UnsupportedFamilyError(f"{kind.__name__} of NumPyro has no counterpart here")


def _parameter(x: Any) -> Tensor:
    x = jnp.asarray(x)
    return to_tensor(x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float))


def to_numpyro_distribution(f: Factor, params: Mapping[str, Any]) -> Any:
    """A factor as a NumPyro distribution, at ``params`` in place of its own.

    :raises UnsupportedFamilyError: for a family or a transform that NumPyro has not.
    """
    if f.family.name not in _BUILDERS:
        raise UnsupportedFamilyError(
            f"NumPyro has no {f.family.name}; it has {', '.join(sorted(_BUILDERS))}"
        )
    d = _BUILDERS[f.family.name](**{_THEIRS.get(k, k): v for k, v in params.items()})
    independent = len(f.base_shape) - f.batch_dim
    if independent:
        d = d.to_event(independent)
    if f.transforms:
        d = ndist.TransformedDistribution(d, [to_numpyro_transform(t) for t in f.transforms])
    return d


# -- transforms ------------------------------------------------------------------------------------

_PLAIN: dict[type, type[Transform]] = {
    nt.ExpTransform: tt.ExpTransform,
    nt.SigmoidTransform: tt.SigmoidTransform,
    nt.SoftplusTransform: tt.SoftplusTransform,
    nt.StickBreakingTransform: tt.StickBreakingTransform,
    nt.OrderedTransform: pt.OrderedTransform,
    nt.CorrCholeskyTransform: tt.CorrCholeskyTransform,
    nt.CorrMatrixCholeskyTransform: pt.CorrMatrixCholeskyTransform,
}
_PLAIN_BACK: dict[type[Transform], type] = {v: k for k, v in _PLAIN.items()}


def to_pyro_transform(t: Any) -> Transform:
    """A NumPyro transform as Pyro's.

    :raises UnsupportedFamilyError: for one that Pyro has not.
    """
    kind = type(t)
    if kind in _PLAIN:
        return _PLAIN[kind]()
    if kind is nt.IdentityTransform:
        return tt.identity_transform
    if kind is nt.AffineTransform:
        loc, scale = to_tensor(t.loc), to_tensor(t.scale)
        return tt.AffineTransform(loc, scale, event_dim=0)
    if kind is nt.PowerTransform:
        return tt.PowerTransform(to_tensor(t.exponent))
    if kind is nt.ComposeTransform:
        return tt.ComposeTransform([to_pyro_transform(part) for part in t.parts])
    if kind is nt.IndependentTransform:
        base = to_pyro_transform(t.base_transform)
        return tt.IndependentTransform(base, t.reinterpreted_batch_ndims)
    if kind is nt.ReshapeTransform:
        # NumPyro counts the event axes of both sides alike.
        return tt.ReshapeTransform(torch.Size(t._inverse_shape), torch.Size(t._forward_shape))
    if kind is nt._InverseTransform:
        return to_pyro_transform(t.inv).inv
    raise UnsupportedFamilyError(f"{kind.__name__} of NumPyro has no counterpart here")


def to_numpyro_transform(t: Transform) -> Any:
    """A Pyro transform as NumPyro's.

    :raises UnsupportedFamilyError: for one that NumPyro has not.
    """
    if isinstance(t, tt._InverseTransform):
        return to_numpyro_transform(t.inv).inv
    kind = tt.SoftplusTransform if type(t) is pt.SoftplusTransform else type(t)
    if kind in _PLAIN_BACK:
        return _PLAIN_BACK[kind]()
    if isinstance(t, tt.AffineTransform):
        return nt.AffineTransform(float(t.loc), float(t.scale))
    if isinstance(t, tt.PowerTransform):
        return nt.PowerTransform(float(t.exponent))
    if isinstance(t, tt.ReshapeTransform):
        return nt.ReshapeTransform(tuple(t.out_shape), tuple(t.in_shape))
    raise UnsupportedFamilyError(f"NumPyro has no {kind.__name__}")
