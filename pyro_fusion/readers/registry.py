# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The registry of readers: which reader takes what, ours and those of others side by side, and for
what no reader takes, the line that converts it."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_fusion.errors import FileFormatError, FusionError, ParameterError, StructureError
from pyro_fusion.posterior import Posterior

__all__ = ["GUIDES", "Entry", "is_single", "read", "reader_of", "register_reader"]

Source = type | str | Callable[[Any], bool]
R = TypeVar("R", bound=Callable[..., Posterior])


@dataclass(frozen=True)
class Entry:
    """A reader, and what it takes.

    :ivar source: a type; a type's name after that of its library, as ``"numpyro.MCMC"``, so that
        nothing is imported to tell; or a predicate.
    :ivar name: of the reader, in messages.
    :ivar reader: from what it takes, and arguments, to a posterior; None where there is no reader.
    :ivar remedy: what to do where there is none.
    """

    source: Source
    name: str
    reader: Callable[..., Posterior] | None
    remedy: str = ""

    def distance(self, x: Any) -> float | None:
        """The number of steps from the type of ``x`` up to this source, infinity for a predicate
        that holds, None where this entry is not for ``x``.

        :raises StructureError: for a predicate that fails.
        """
        mro = type(x).__mro__
        if isinstance(self.source, type):
            if self.source in mro:
                return mro.index(self.source)
            return len(mro) if isinstance(x, self.source) else None
        if isinstance(self.source, str):
            library, _, name = self.source.rpartition(".")
            for i, base in enumerate(mro):
                if base.__name__ == name and f"{base.__module__}.".startswith(f"{library}."):
                    return i
            return None
        try:
            return math.inf if self.source(x) else None
        except Exception as e:
            raise StructureError(
                f"the predicate of the reader {self.name} fails for a {type(x).__name__}: "
                f"{type(e).__name__}: {e}"
            ) from e


def register_reader(source: Source) -> Callable[[R], R]:
    """Decorator of a reader, a function from what it takes (and perhaps arguments) to a
    :class:`~pyro_fusion.Posterior`: :func:`read` and :func:`~pyro_fusion.fuse` then take it too.

    Of readers for types the one nearest in the method resolution order is asked, as
    ``functools.singledispatch`` does; then those with a predicate. Of several alike, as a second
    one for the same type, the one that was registered last.

    :param source: a type; the name of a type, ``"library.Name"``, where the library should not be
        imported to tell (modules in between are left out or given, as in ``"numpyro.MCMC"``);
        or a predicate, a function that says whether it takes an object.
    :raises ParameterError: for anything else.

    Example::

        @register_reader(Table)
        def from_table(table):
            effect = Normal(table.estimate, table.error)
            return Posterior({"effect": effect}, {"effect": "subgroup"})

        fuse([table, guide, mcmc])
    """
    if isinstance(source, str):
        if not all(part.isidentifier() for part in source.split(".")) or "." not in source:
            raise ParameterError(
                f"expected the name of a type after that of its library, 'library.Name', got "
                f"{source!r}"
            )
    elif not callable(source):
        raise ParameterError(
            f"expected a type, a type's name 'library.Name' or a predicate, got {source!r}"
        )

    def decorate(reader: R) -> R:
        if not callable(reader):
            raise ParameterError(
                "expected a reader, a function that returns a Posterior, got "
                f"{type(reader).__name__}: @register_reader(what it takes) stands before a reader, "
                "and never without what it takes"
            )
        name = getattr(reader, "__name__", type(reader).__name__)
        _ENTRIES.append(Entry(source, name, reader))
        return reader

    return decorate


def read(source: Any, *args: Any, **kwargs: Any) -> Posterior:
    """The posterior of whatever a reader takes: a Pyro guide, an ``MCMC`` of Pyro or NumPyro, an
    ``InferenceData`` of ArviZ, a mapping from sites to draws, a fit of scikit-learn, the path of a
    file, what a reader of yours takes; a posterior is returned as it is.

    :param source: what to read.
    :param args: arguments of its reader, as the ``params`` of ``from_numpyro``.
    :param kwargs: keyword arguments of its reader, as ``axes``.
    :raises StructureError: for what no reader takes; says which were asked, and what to do.
    :raises ParameterError: for arguments that the reader does not have, or lacks.

    The reader's own errors come as they are. Example::

        posterior = read(mcmc, axes={"weights": ("component",)})
    """
    if isinstance(source, Posterior):
        if args or kwargs:
            raise ParameterError("a Posterior is taken as it is, but arguments came with it")
        return source
    return reader_of(source)(source, *args, **kwargs)


def is_single(x: Any) -> bool:
    """True for one party, that a reader takes or a remedy is known for; not for several."""
    if isinstance(x, Posterior):
        return True
    entry = _find(x)
    return entry is not None and entry.source is not Mapping


def reader_of(x: Any) -> _Checked:
    """The reader that takes ``x``.

    :raises StructureError: if there is none; says which were asked, and what to do.
    """
    entry = _find(x)
    if entry is not None and entry.reader is not None:
        return _Checked(entry)
    kind = type(x).__name__
    names = ", ".join(dict.fromkeys(e.name for e in _ENTRIES if e.reader is not None))
    if entry is not None:
        what = f"{entry.remedy}. None of the readers {names} takes it as it is"
    else:
        what = (
            f". None of the readers {names} takes it: make a Posterior of it, or write a reader, "
            "see register_reader"
        )
    raise StructureError(f"expected a Posterior or a Pyro guide, got {kind}{what}")


@dataclass(frozen=True)
class _Checked:
    """A reader whose arguments and result are checked."""

    entry: Entry

    def __call__(self, source: Any, *args: Any, **kwargs: Any) -> Posterior:
        reader, name = self.entry.reader, self.entry.name
        assert reader is not None
        try:
            inspect.signature(reader).bind(source, *args, **kwargs)
        except TypeError as e:
            raise ParameterError(
                f"the reader {name} does not take a {type(source).__name__} with these arguments "
                f"({e}): call it by hand, and pass on the posterior"
            ) from e
        except ValueError:  # no signature to be had
            pass
        result = reader(source, *args, **kwargs)
        if not isinstance(result, Posterior):
            raise StructureError(
                f"expected a Posterior from the reader {name}, got {type(result).__name__}"
            )
        return result


def _find(x: Any) -> Entry | None:
    by_type = [e for e in reversed(_ENTRIES) if isinstance(e.source, type | str)]
    found = [(distance, e) for e in by_type if (distance := e.distance(x)) is not None]
    if found:
        return min(found, key=lambda pair: pair[0])[1]
    predicates = (e for e in reversed(_ENTRIES) if not isinstance(e.source, type | str))
    return next((e for e in predicates if e.distance(x) is not None), None)


# -- ours ------------------------------------------------------------------------------------------


def _ours(module: str, name: str) -> Callable[..., Posterior]:
    """A reader of ours, imported when it is first used."""

    def reader(source: Any, *args: Any, **kwargs: Any) -> Posterior:
        function = getattr(import_module(f"pyro_fusion.readers.{module}"), name)
        result: Posterior = function(source, *args, **kwargs)
        return result

    return reader


_from_guide = _ours("pyro", "from_guide")
_from_draws = _ours("draws", "from_draws")


def _read_guide(guide: Any, *args: Any, **kwargs: Any) -> Posterior:
    try:
        return _from_guide(guide, *args, **kwargs)
    except FusionError as e:
        if not isinstance(guide, nn.Module) or _is_of(guide, "pyro", "pyro_fusion"):
            raise
        raise type(e)(
            [
                *e.pieces,
                f". If this {type(guide).__name__} is a trained network, and no guide: "
                "from_module(module, data)",
            ]
        ) from e


def _read_numpyro(guide: Any, *args: Any, **kwargs: Any) -> Posterior:
    from pyro_fusion.readers.pyro import check_is_pyro

    if not args and "params" not in kwargs:
        if not hasattr(guide, "params"):
            check_is_pyro(guide)  # raises, and says how
        args = (guide.params,)
    return _ours("numpyro", "from_numpyro")(guide, *args, **kwargs)


def _read_mapping(values: Mapping[str, Any], *args: Any, **kwargs: Any) -> Posterior:
    """Draws by site; what looks like something else is refused, since most arrays could be draws.

    :raises StructureError: for parameters of a network or of a NumPyro guide, and distributions.
    """
    names = [k for k in values if isinstance(k, str)]
    ends = {k.rpartition(".")[2] for k in names}
    kinds = {type(v) for v in values.values()}
    remedy = ""
    if hasattr(values, "_metadata") or (
        ends & {"weight", "bias"} and (any("." in k for k in names) or ends <= {"weight", "bias"})
    ):
        remedy = "the parameters of a network: load them into it, and from_module(module, data)"
    elif any(k.endswith(("auto_loc", "auto_scale", "auto_scale_tril")) for k in names):
        remedy = "the parameters of a NumPyro guide: from_numpyro(guide, params)"
    elif set(names) == {"params", "constraints"}:
        remedy = "a parameter store: load it, and from_guide(guide)"
    elif any(issubclass(kind, Distribution) for kind in kinds):
        remedy = "distributions: Posterior(distributions, axes={'site': ('label', ...)})"
    if remedy:
        raise StructureError(
            f"expected a Posterior, a Pyro guide or draws, got a {type(values).__name__} that "
            f"looks like {remedy}. If it holds draws: from_draws(draws)"
        )
    return _from_draws(values, *args, **kwargs)


# What others write, by the ends of the names of their files.
_FILES = {
    (".nc", ".netcdf"): "read it with ArviZ, from_draws(arviz.from_netcdf(path))",
    (".pt", ".pth", ".pkl", ".pickle"): "nothing is unpickled here: load it with what wrote it, "
    "and read what it holds, as from_guide(guide) or from_module(module, data)",
    (".csv", ".json"): "read the draws from it, and from_draws({'site': draws})",
}


def _read_file(path: str | os.PathLike[str]) -> Posterior:
    try:
        return Posterior.load(path)
    except FileFormatError as e:
        for ends, remedy in _FILES.items():
            if os.fspath(path).endswith(ends):
                raise FileFormatError([*e.pieces, f". {remedy[0].upper()}{remedy[1:]}"]) from e
        raise


def _is_of(x: object, *libraries: str) -> bool:
    return type(x).__module__.split(".")[0] in libraries


def _none(source: Source, remedy: str) -> Entry:
    return Entry(source, "", None, f": {remedy}")


_DRAWS = "read the draws, from_draws(mcmc)"
_NUMPYRO = "read the guide with its parameters, from_numpyro(guide, params), params being those of "

GUIDES = Entry(callable, "from_guide", _read_guide)
"""The reader of Pyro's guides: any function may be one."""

_ENTRIES: list[Entry] = [
    GUIDES,
    Entry("numpyro.AutoGuide", "from_numpyro", _read_numpyro),
    Entry("pyro_fusion.NumPyroGuide", "from_numpyro", _read_numpyro),
    Entry("pyro.AbstractMCMC", "from_draws", _from_draws),
    Entry("numpyro.MCMC", "from_draws", _from_draws),
    Entry("arviz.InferenceData", "from_draws", _from_draws),
    Entry("xarray.DataTree", "from_draws", _from_draws),
    Entry("xarray.Dataset", "from_draws", _from_draws),
    Entry(Mapping, "from_draws", _read_mapping),
    Entry("pyro_fusion.DrawsReading", "from_draws", lambda reading: reading.posterior),
    Entry("sklearn.BaseEstimator", "from_sklearn", _ours("sklearn", "from_sklearn")),
    Entry(str, "Posterior.load", _read_file),
    Entry(os.PathLike, "Posterior.load", _read_file),
    # What has no reader, and how to make of it what has one.
    _none("pyro_fusion.Fusion", "take its posterior, fusion.posterior"),
    _none("pyro.ParamStoreDict", "read the guide whose parameters it holds, from_guide(guide)"),
    _none("pyro.SVI", "read its guide, from_guide(svi.guide)"),
    _none("numpyro.SVI", f"{_NUMPYRO}svi.run(...)"),
    _none("numpyro.SVIRunResult", f"{_NUMPYRO}this result"),
    _none("numpyro.SVIState", f"{_NUMPYRO}svi.get_params(state)"),
    _none(
        "gensim.LdaModel",
        "give its topics, Posterior({'topics': Dirichlet(torch.as_tensor(lda.state.get_lambda()))},"
        " {'topics': 'topic'})",
    ),
    _none("cmdstanpy.CmdStanMCMC", "read the draws, from_draws(fit.stan_variables())"),
    _none("stan.Fit", "read the draws, from_draws(arviz.from_pystan(fit))"),
    _none("pymc.MultiTrace", "read the draws, from_draws(pymc.to_inference_data(trace))"),
    _none("emcee.EnsembleSampler", "read the draws, from_draws(arviz.from_emcee(sampler))"),
    _none(lambda x: "MCMC" in type(x).__name__ and not callable(x), _DRAWS),
    _none(Distribution, "name its site, Posterior({'site': distribution})"),
    _none(Tensor, "name the site of draws, from_draws({'site': draws})"),
    _none(np.ndarray, "name the site of draws, from_draws({'site': draws})"),
    _none("jaxlib.ArrayImpl", "name the site of draws, from_draws({'site': draws})"),
    _none(
        "pandas.DataFrame", "read its columns, from_draws({k: x.to_numpy() for k, x in df.items()})"
    ),
]
