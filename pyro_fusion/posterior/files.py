# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The file format of posteriors: one safetensors file, its structure as JSON in the metadata.

Files come from strangers. Nothing is unpickled or executed; names, shapes, dtypes and values are
checked before a distribution is built from them.

Tensors are called ``<site>/<parameter>``. The metadata has ``format``, ``version`` and ``sites``:
a JSON list of ``{name, family, transforms, batch_dim, axes, plates}``, and ``outgoing`` where a
site has it.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributions.transforms import _InverseTransform

from pyro_fusion.errors import FileFormatError, FusionError, Site
from pyro_fusion.families import Factor, family_named
from pyro_fusion.families.transforms import describe, rebuild

__all__ = ["FORMAT", "VERSION", "read", "write"]

FORMAT = "pyro_fusion.Posterior"
VERSION = 1

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# No posterior of a real model comes near these; a hostile file might.
_MAX_SITES = 100_000
_MAX_DIM = 16
_MAX_TRANSFORMS = 16

_Axes = dict[str, tuple[str | None, ...]]


def write(
    path: str | os.PathLike[str],
    factors: Mapping[str, Factor],
    axes: Mapping[str, tuple[str | None, ...]],
    plates: Mapping[str, tuple[str | None, ...]],
    outgoing: Mapping[str, str],
) -> None:
    """Write a posterior to a temporary file beside ``path``, then rename it over ``path``."""
    tensors: dict[str, Tensor] = {}
    sites = []
    for site, f in factors.items():
        for name, value in f.params.items():
            tensors[f"{site}/{name}"] = value.cpu().contiguous().clone()
        entry = {
            "name": site,
            "family": f.family.name,
            "transforms": [describe(t) for t in f.transforms],
            "batch_dim": f.batch_dim,
            "axes": axes[site],
            "plates": plates[site],
        }
        sites.append(entry | ({"outgoing": outgoing[site]} if site in outgoing else {}))
    metadata = {"format": FORMAT, "version": str(VERSION), "sites": json.dumps(sites)}
    path = os.fspath(path)
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise FileNotFoundError(f"no such folder: {os.path.dirname(path)}")
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    # Created here to learn the permissions of an ordinary file; safetensors sets others.
    with open(temporary, "xb") as made:
        mode = os.fstat(made.fileno()).st_mode
    try:
        save_file(tensors, temporary, metadata)
        os.chmod(temporary, mode)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _refusing(*what: str | Site) -> Iterator[None]:
    """Turn any exception from reading hostile data into a FileFormatError of one short line."""
    try:
        yield
    except (
        FusionError,
        SafetensorError,
        ArithmeticError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        # repr: a file may name things with line breaks or lone surrogates in them.
        text = " ".join(str(e).split()).encode("utf-8", "backslashreplace").decode()
        raise FileFormatError([*what, f": {text[:300]}"]) from e


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Factor], _Axes, _Axes, dict[str, str]]:
    """Read factors, axes, plates and outgoing labels, checking everything but the parameters'
    values, which :class:`~pyro_fusion.Posterior` checks.

    :raises FileFormatError: naming the file, the site, what was expected and what came.
    :raises FileNotFoundError: if there is no such file.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {path}")
    if not os.path.isfile(path):
        raise FileFormatError(f"{path} is not a file")
    with (
        _refusing(f"{path} is not a readable posterior"),
        safe_open(path, framework="pt") as f,
    ):
        sites = _read_header(f.metadata() or {})
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    factors: dict[str, Factor] = {}
    axes: _Axes = {}
    plates: _Axes = {}
    outgoing: dict[str, str] = {}
    for site in sites:
        name = site.get("name") if isinstance(site, dict) else None
        if not isinstance(name, str) or not name or name in factors:
            raise FileFormatError(f"{path}: a site without a name of its own: {ascii(site)[:100]}")
        with _refusing(f"{path}: ", Site(name)):
            factors[name] = _read_factor(name, site, tensors)
            axes[name], plates[name] = _labels(site, "axes"), _labels(site, "plates")
            if "outgoing" in site:
                if not isinstance(site["outgoing"], str):
                    raise ValueError(
                        f"outgoing must be a name, got {ascii(site['outgoing'])[:100]}"
                    )
                outgoing[name] = site["outgoing"]
    if tensors:
        names = ascii(sorted(tensors)[:5])[:200]
        raise FileFormatError(f"{path}: tensors that belong to no site: {names}")
    return factors, axes, plates, outgoing


def _read_header(metadata: Mapping[str, str]) -> list[Any]:
    if metadata.get("format") != FORMAT:
        found = str(metadata.get("format"))[:50]
        raise FileFormatError(f"its format is {found!r}, expected {FORMAT!r}")
    if metadata.get("version") != str(VERSION):
        found = str(metadata.get("version"))[:50]
        raise FileFormatError(
            f"its format has version {found!r}, but this library reads version {VERSION}"
        )
    try:
        sites = json.loads(metadata.get("sites", ""))
    except (ValueError, RecursionError) as e:
        raise FileFormatError(f"the list of sites is not valid JSON: {e}") from e
    if not isinstance(sites, list) or not 0 < len(sites) <= _MAX_SITES:
        raise FileFormatError("expected a non-empty list of sites")
    return sites


def _labels(site: Mapping[str, Any], key: str) -> tuple[str | None, ...]:
    value = site.get(key)
    if not isinstance(value, list) or len(value) > _MAX_DIM:
        raise ValueError(
            f"{key} must be a list of at most {_MAX_DIM} names, got {ascii(value)[:100]}"
        )
    if not all(v is None or isinstance(v, str) for v in value):
        raise ValueError(f"{key} must be names or null, got {ascii(value)[:100]}")
    return tuple(value)


def _read_factor(name: str, site: Mapping[str, Any], tensors: dict[str, Tensor]) -> Factor:
    family = family_named(str(site.get("family"))[:50])
    descriptions = site.get("transforms")
    if not isinstance(descriptions, list) or len(descriptions) > _MAX_TRANSFORMS:
        raise ValueError(f"expected a list of at most {_MAX_TRANSFORMS} transforms")
    params = {}
    for parameter, event_dim in family.parameters.items():
        key = f"{name}/{parameter}"
        if key not in tensors:
            raise ValueError(f"the parameter '{parameter}' of {family.name} is missing")
        value = tensors.pop(key)
        if value.dtype not in _DTYPES:
            raise ValueError(f"'{parameter}' must be floating point, got {value.dtype}")
        if not event_dim <= value.dim() <= _MAX_DIM or value.numel() == 0:
            raise ValueError(f"'{parameter}' has the impossible shape {tuple(value.shape)}")
        params[parameter] = value
    shapes = {p: tuple(v.shape[: v.dim() - family.parameters[p]]) for p, v in params.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"the parameters' batch shapes differ: {shapes}")
    batch_dim = site.get("batch_dim")
    if type(batch_dim) is not int or not 0 <= batch_dim <= len(next(iter(shapes.values()))):
        raise ValueError(f"batch_dim {str(batch_dim)[:50]} does not fit the batch shapes {shapes}")
    factor = Factor(family, params, tuple(rebuild(t) for t in descriptions), batch_dim)
    _check_shapes(factor)
    return factor


def _check_shapes(factor: Factor) -> None:
    """Check shapes by running one element's zeros through the transforms, many of which notice a
    wrong shape only when they are used."""
    event = factor.family.event_shape(factor.params)
    value = torch.zeros(factor.base_shape[factor.batch_dim :] + event, dtype=torch.float64)
    for t in factor.transforms:
        expected = torch.Size(t.forward_shape(value.shape))
        if isinstance(t, _InverseTransform):  # zero need not be in its domain
            value = value.new_zeros(expected)
            continue
        value = t(value)
        joint = t.codomain.event_dim > 0
        if value.shape != expected or (joint and not bool(t.codomain.check(value).all())):
            raise ValueError(f"{type(t).__name__} does not fit shape {tuple(factor.base_shape)}")
    if factor.shape != factor.batch_shape + value.shape:
        raise ValueError(f"the transforms do not fit the shape {tuple(factor.base_shape)}")
