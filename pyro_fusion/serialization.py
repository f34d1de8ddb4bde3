# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The file format of posteriors: one safetensors file, its structure as JSON in the metadata.

Files come from strangers. Nothing is unpickled or executed; names, shapes, dtypes and values are
checked before a distribution is built from them.

Tensors are called ``<site>/<parameter>``. The metadata has ``format``, ``version`` and ``sites``:
a JSON list of ``{name, family, transforms, batch_dim, axes, plates}``.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyro_fusion.errors import FileFormatError, FusionError
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
) -> None:
    """Write to a temporary file beside ``path``, then rename it over ``path``."""
    tensors: dict[str, Tensor] = {}
    sites = []
    for site, f in factors.items():
        for name, value in f.params.items():
            tensors[f"{site}/{name}"] = value.cpu().contiguous().clone()
        sites.append(
            {
                "name": site,
                "family": f.family.name,
                "transforms": [describe(t) for t in f.transforms],
                "batch_dim": f.batch_dim,
                "axes": axes[site],
                "plates": plates[site],
            }
        )
    metadata = {"format": FORMAT, "version": str(VERSION), "sites": json.dumps(sites)}
    path = os.fspath(path)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Factor], _Axes, _Axes]:
    """Read factors, axes and plates, checking everything but the parameters' values, which
    :class:`~pyro_fusion.Posterior` checks.

    :raises FileFormatError: naming the file, the site, what was expected and what came.
    :raises FileNotFoundError: if there is no such file.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {path}")
    if not os.path.isfile(path):
        raise FileFormatError(f"{path} is not a file")
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            sites = _read_header(path, metadata)
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as e:
        if isinstance(e, FileFormatError):
            raise
        raise FileFormatError(f"{path} is not a readable safetensors file: {e}") from e
    factors: dict[str, Factor] = {}
    axes: _Axes = {}
    plates: _Axes = {}
    for site in sites:
        name = site.get("name") if isinstance(site, dict) else None
        if not isinstance(name, str) or name in factors:
            raise FileFormatError(f"{path}: a site without a name of its own: {str(site)[:100]}")
        try:
            factors[name] = _read_factor(name, site, tensors)
            axes[name], plates[name] = _labels(site, "axes"), _labels(site, "plates")
        except (FusionError, ValueError, TypeError, KeyError, RuntimeError) as e:
            raise FileFormatError(f"{path}: site '{name}': {e}") from e
    if tensors:
        raise FileFormatError(f"{path}: tensors that belong to no site: {sorted(tensors)[:5]}")
    return factors, axes, plates


def _read_header(path: str, metadata: Mapping[str, str]) -> list[Any]:
    if metadata.get("format") != FORMAT:
        raise FileFormatError(
            f"{path} holds no posterior: its format is {metadata.get('format')!r}, "
            f"expected {FORMAT!r}"
        )
    if metadata.get("version") != str(VERSION):
        raise FileFormatError(
            f"{path} has version {metadata.get('version')!r} of the format; "
            f"this library reads version {VERSION}"
        )
    try:
        sites = json.loads(metadata.get("sites", ""))
    except (ValueError, RecursionError) as e:
        raise FileFormatError(f"{path}: the list of sites is not valid JSON: {e}") from e
    if not isinstance(sites, list) or not 0 < len(sites) <= _MAX_SITES:
        raise FileFormatError(f"{path}: expected a non-empty list of sites")
    return sites


def _labels(site: Mapping[str, Any], key: str) -> tuple[str | None, ...]:
    value = site[key]
    if not isinstance(value, list) or len(value) > _MAX_DIM:
        raise ValueError(f"{key} must be a list of at most {_MAX_DIM} names, got {value!r}")
    if not all(v is None or isinstance(v, str) for v in value):
        raise ValueError(f"{key} must be names or null, got {value!r}")
    return tuple(value)


def _read_factor(name: str, site: Mapping[str, Any], tensors: dict[str, Tensor]) -> Factor:
    family = family_named(str(site["family"]))
    descriptions = site["transforms"]
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
    shapes = {
        p: tuple(v.shape[: v.dim() - family.parameters[p]]) for p, v in params.items()
    }
    if len(set(shapes.values())) != 1:
        raise ValueError(f"the parameters' batch shapes differ: {shapes}")
    batch_dim = site["batch_dim"]
    if type(batch_dim) is not int or not 0 <= batch_dim <= len(next(iter(shapes.values()))):
        raise ValueError(f"batch_dim {batch_dim!r} does not fit the batch shapes {shapes}")
    factor = Factor(family, params, tuple(rebuild(t) for t in descriptions), batch_dim)
    factor.shape  # noqa: B018  (raises if the transforms do not fit)
    return factor
