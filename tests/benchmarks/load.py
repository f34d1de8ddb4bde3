# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The programs of `benchmarks`, which is no package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A program of ``benchmarks``, which is no package."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def load_simulation(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """``simulation`` and the files that it is made of, by name."""
    names = ["mixtures", "problems", "measures", "overlap", "shares"]
    names += ["second_round", "refined", "credible_sets", "beyond", "simulation"]
    return {name: load(name, monkeypatch) for name in names}
