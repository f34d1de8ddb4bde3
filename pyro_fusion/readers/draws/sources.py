# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The sources of draws: names of sites, chains, and the model that knows supports and plates. Only
the library that the draws come from is imported."""

# Neither library offers a public way to these. Checked with Pyro 1.9.2 and NumPyro 0.22.
#   MCMC of both  _args, _kwargs
#   Pyro's        _samples, _diagnostics
#   NumPyro's     _states

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro.infer.mcmc.api import MCMC, AbstractMCMC
from torch import Tensor
from torch.distributions import Transform

from pyro_fusion.errors import DrawsError, FusionError, GuideError
from pyro_fusion.families.transforms import describe, flatten
from pyro_fusion.readers.pyro.program import Program, isolated
from pyro_fusion.readers.pyro.sites import data_plates, latent_sites, log_likelihood, plates_of
from pyro_fusion.readers.sites import transform_of

__all__ = [
    "Known",
    "KnownModel",
    "Source",
    "known_model",
    "read_source",
    "to_tensor",
    "transform_onto",
]

_ACCEPTED = (
    "a mapping from site to draws, an MCMC of Pyro or NumPyro that was run, or an InferenceData "
    "of ArviZ with the group 'posterior'"
)


@dataclass(frozen=True)
class Source:
    """Draws as they came.

    :ivar values: site -> ``[chain, draw, *shape]`` if :attr:`chains`, else ``[draw, *shape]``.
    :ivar model: the model that was sampled, if it is known, with ``args`` and ``kwargs``.
    :ivar library: of the model: "pyro", "numpyro", or None if that is not known.
    :ivar transforms: site -> the bijection onto its support, where no model says it.
    :ivar divergences: how many transitions diverged, or None if that is not known.
    """

    values: Mapping[str, Any]
    chains: bool
    model: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    library: str | None = None
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    divergences: int | None = None


def read_source(draws: Any, group_by_chain: bool) -> Source:
    """The source of draws of any kind.

    :raises DrawsError: for anything else, or an MCMC that was not run.
    """
    if isinstance(draws, AbstractMCMC):
        return _from_pyro(draws)
    if _is_of(draws, "numpyro"):
        return _from_numpyro(draws)
    dataset = _group(draws, "posterior")
    if dataset is not None:
        return _from_xarray(draws, dataset)
    if _is_of(draws, "arviz") or _is_of(draws, "xarray") or not isinstance(draws, Mapping):
        raise DrawsError(f"expected {_ACCEPTED}; got {type(draws).__name__}{_groups(draws)}")
    return Source(draws, group_by_chain)


def _is_of(x: object, library: str) -> bool:
    return any(base.__module__.split(".")[0] == library for base in type(x).__mro__)


def _from_pyro(mcmc: AbstractMCMC) -> Source:
    if not isinstance(mcmc, MCMC):
        raise DrawsError(
            f"a {type(mcmc).__name__} keeps no draws; use pyro.infer.MCMC, or pass the draws "
            "themselves"
        )
    if mcmc._samples is None:
        raise DrawsError("the MCMC has no draws: call mcmc.run(...) first")
    diagnostics: list[Any] = [d for d in mcmc._diagnostics if d is not None]
    known = len(diagnostics) == mcmc.num_chains and all("divergences" in d for d in diagnostics)
    return Source(
        mcmc.get_samples(group_by_chain=True),
        True,
        model=getattr(mcmc.kernel, "model", None),
        args=tuple(mcmc._args or ()),
        kwargs=dict(mcmc._kwargs or {}),
        library="pyro",
        transforms={k: t.inv for k, t in (mcmc.transforms or {}).items()},
        divergences=sum(len(d["divergences"]) for d in diagnostics) if known else None,
    )


def _from_numpyro(mcmc: Any) -> Source:
    if not hasattr(mcmc, "get_samples"):
        raise DrawsError(f"expected {_ACCEPTED}; got {type(mcmc).__name__} of NumPyro")
    if mcmc._states is None:
        raise DrawsError("the MCMC has no draws: call mcmc.run(rng_key, ...) first")
    values = mcmc.get_samples(group_by_chain=True)
    if not isinstance(values, Mapping):
        raise DrawsError(
            f"the MCMC has its draws as a {type(values).__name__}, without names of sites: pass "
            "them by name, {'site': draws}"
        )
    diverging = mcmc.get_extra_fields().get("diverging")
    return Source(
        values,
        True,
        model=getattr(mcmc.sampler, "model", None),
        args=tuple(mcmc._args),
        kwargs=dict(mcmc._kwargs),
        library="numpyro",
        divergences=None if diverging is None else int(np.asarray(diverging).sum()),
    )


# -- ArviZ, by what its objects have ---------------------------------------------------------------


def _group(draws: Any, name: str) -> Any:
    """A group of an InferenceData or a DataTree; a Dataset is the posterior by itself."""
    if not _is_of(draws, "arviz") and not _is_of(draws, "xarray") and isinstance(draws, Mapping):
        return None
    group = getattr(draws, name, None)
    if hasattr(group, "data_vars"):
        return group
    alone = name == "posterior" and getattr(draws, "data_vars", None)
    return draws if alone else None


def _groups(draws: Any) -> str:
    """The groups that there are in place of the one that was expected, for messages."""
    groups = getattr(draws, "groups", None)
    groups = groups() if callable(groups) else groups
    return f" with the groups {[str(g) for g in groups]}" if groups else ""


def _from_xarray(draws: Any, dataset: Any) -> Source:
    values = {}
    for name in dataset.data_vars:
        x = dataset[name]
        if not {"chain", "draw"} <= set(x.dims):
            raise DrawsError(
                f"expected the dimensions 'chain' and 'draw', got {tuple(x.dims)}. "
                "Do not select or stack them; expand_dims('chain') brings back one that is lost",
                site=name,
            )
        values[str(name)] = x.transpose("chain", "draw", ...).values
    stats = _group(draws, "sample_stats") if draws is not dataset else None
    diverging = None
    if stats is not None and "diverging" in stats.data_vars:
        diverging = int(np.asarray(stats["diverging"].values).sum())
    return Source(values, True, divergences=diverging)


# -- numbers ---------------------------------------------------------------------------------------


def to_tensor(site: str, value: Any) -> Tensor:
    """Draws of one site as a tensor on their device; it may share memory, so leave it alone.

    :raises DrawsError: for what is no floating-point array.
    """
    try:
        if isinstance(value, Tensor):
            result = value.detach()
        elif hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray):
            if np.dtype(value.dtype).kind in "biu":  # not all of them cross
                result = torch.zeros((), dtype=torch.long)
            else:
                result = torch.from_dlpack(value)
        else:
            result = torch.from_numpy(_native(np.ma.array(value)))
    except (TypeError, ValueError, RuntimeError, BufferError) as e:
        raise DrawsError(
            f"expected draws as an array of numbers, got {type(value).__name__}: "
            f"{' '.join(str(e).split())[:200]}",
            site=site,
        ) from e
    if not result.is_floating_point():
        raise DrawsError(
            f"expected floating-point draws, got {getattr(value, 'dtype', 'int')}. "
            "A discrete site has no posterior that could be fused: leave it out with sites=[...], "
            "or sum it out of the model; if it is continuous, convert it",
            site=site,
        )
    return result


def _native(x: Any) -> Any:
    """A copy that torch can take: NaN where it is masked, in the machine's order of bytes, and no
    wider than float64."""
    if x.dtype.kind != "f":
        return np.array(x)
    dtype = x.dtype.newbyteorder("=") if x.dtype.itemsize <= 8 else np.float64
    return np.array(x.filled(np.nan), dtype=dtype)


# -- the model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A site as the model knows it.

    :ivar transform: makes the bijection onto the support.
    :ivar plates: the plate (or None) of each batch axis.
    :ivar shape: of the value.
    """

    transform: Callable[[], Transform]
    plates: tuple[str | None, ...]
    shape: torch.Size


@dataclass(frozen=True)
class KnownModel:
    """The latent sites of a model, the plates of its data and its likelihood.

    :ivar data: plate -> an observed site in it.
    :ivar likelihood: the log-density of the observed sites at values of the sites, if there are no
        others.
    """

    sites: Mapping[str, Known]
    data: Mapping[str, str]
    likelihood: Callable[[Mapping[str, Tensor]], float | None]


def known_model(source: Source, seed: int) -> KnownModel:
    """The source's model, of Pyro or of NumPyro, as a run shows it.

    :raises GuideError: if it cannot be run with its arguments, or has subsampled plates.
    """
    if source.library == "numpyro":
        return _known_to_numpyro(source, seed)
    try:
        found = _known_to_pyro(source, seed)
    except GuideError:
        if source.library is not None or "numpyro" not in sys.modules:
            raise
        try:
            other = _known_to_numpyro(source, seed)
        except FusionError:
            other = None
        if other is None or not other.sites:
            raise
        return other
    if found.sites or source.library is not None or "numpyro" not in sys.modules:
        return found
    return _known_to_numpyro(source, seed)


def _known_to_pyro(source: Source, seed: int) -> KnownModel:
    assert source.model is not None
    program = Program(source.model, source.args, dict(source.kwargs), "model")
    with isolated(source.model, seed):
        trace = program.trace()
        first, second = latent_sites(trace), latent_sites(program.trace())

    def known(name: str, site: Any) -> Known:
        def transform() -> Transform:
            # The bijection that autoguides and samplers have.
            runs = (site, second.get(name, site))
            t, other = (transform_of(name, s["fn"].support) for s in runs)
            return _constant(name, t, other)

        plates = plates_of(name, site, len(site["fn"].batch_shape))
        return Known(transform, plates, site["value"].shape)

    sites = {name: known(name, site) for name, site in first.items()}
    return KnownModel(sites, data_plates(trace), lambda values: log_likelihood(program, values))


def _known_to_numpyro(source: Source, seed: int) -> KnownModel:
    from pyro_fusion.readers.numpyro import program as theirs

    assert source.model is not None
    program = theirs.Program(source.model, source.args, dict(source.kwargs), {}, "model", seed)
    trace = program.trace()
    first, second = theirs.latent_sites(trace), theirs.latent_sites(program.trace())

    def known(name: str, site: Any) -> Known:
        def transform() -> Transform:
            t, other = (theirs.bijection(name, s["fn"]) for s in (site, second.get(name, site)))
            return _constant(name, t, other)

        plates = theirs.plates_of(name, site, len(site["fn"].batch_shape))
        return Known(transform, plates, torch.Size(np.shape(site["value"])))

    sites = {name: known(name, site) for name, site in first.items()}
    return KnownModel(
        sites, theirs.data_plates(trace), lambda values: theirs.log_likelihood(program, values)
    )


def _constant(name: str, t: Transform, other: Transform) -> Transform:
    """The bijection ``t`` onto a site's support, if another run of the model has it too."""
    try:
        same = [describe(x) for x in flatten([t])] == [describe(x) for x in flatten([other])]
    except FusionError:
        return t  # of a kind that is refused later, or compared by itself
    if not same:
        raise DrawsError(
            "its support depends on other sites of the model, so no one bijection "
            "takes its draws to unconstrained space. Leave it out with sites=[...], or rewrite the "
            "model with a site that is scaled afterwards",
            site=name,
        )
    return t


def transform_onto(name: str, support: Any) -> Transform:
    """The bijection onto a support that the caller gave: a constraint of Pyro or of NumPyro, or the
    bijection."""
    if _is_of(support, "numpyro"):
        from numpyro.distributions import biject_to

        from pyro_fusion.readers.numpyro.convert import to_pyro_transform

        return to_pyro_transform(biject_to(support))
    return transform_of(name, support)
