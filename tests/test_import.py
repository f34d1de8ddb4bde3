# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The cost of `import pyro_fusion` in modules, what it leaves alone, and what it offers."""

import json
import subprocess
import sys
from pathlib import Path

import pyro_fusion

ROOT = Path(pyro_fusion.__file__).parents[1]
# Each is imported by what needs it. scipy is a dependency, but slow to load.
LATER = {"arviz", "jax", "matplotlib", "numpyro", "pandas", "scipy", "sklearn", "xarray"}
ROOMS = ("cli", "plotting", "readers.draws", "readers.numpyro", "readers.sklearn", "testing")


def added(modules: str, before: str) -> set[str]:
    """The modules that a fresh interpreter has loaded for ``modules``, after those ``before``."""
    program = f"import json, sys, {before}; there = set(sys.modules); import {modules}; "
    program += "print(json.dumps(sorted(set(sys.modules) - there)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_import_loads_little_more_than_pyro() -> None:
    loaded = added("pyro_fusion", before="pyro")
    own = {m for m in loaded if m.split(".")[0] == "pyro_fusion"}
    packages = {m.split(".")[0] for m in loaded - own} - set(sys.stdlib_module_names)
    # Of Pyro's own, what defines its guides.
    assert packages <= {"pyro", "safetensors"}
    assert len(loaded - own) <= 90, sorted(loaded - own)
    early = [room for room in ROOMS if f"pyro_fusion.{room}" in own]
    assert early == []


def test_import_leaves_optional_packages_alone() -> None:
    loaded = added("pyro_fusion, pyro_fusion.plotting", before="sys")
    assert "pyro_fusion.plotting" in loaded
    assert {m.split(".")[0] for m in loaded} & LATER == set()


def test_all_is_sorted_and_every_name_exists() -> None:
    names = pyro_fusion.__all__
    assert list(names) == sorted(set(names))
    missing = [name for name in names if not hasattr(pyro_fusion, name)]
    assert missing == []
