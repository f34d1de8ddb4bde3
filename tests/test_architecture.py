# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The order of the rooms: imports run downwards only, tensor rooms know tensors only, and tests
stand on no other test."""

from pathlib import Path

import pytest

import pyro_fusion
from tests import imports

PACKAGE = Path(pyro_fusion.__file__).parent
TESTS = Path(__file__).parent

# From the ground up; the rooms of one floor do not import each other.
ORDER: list[tuple[str, ...]] = [
    ("errors",),
    ("families", "assignment"),
    ("posterior", "pooling"),
    ("readers", "testing"),
    ("fusion",),
    ("program", "nn", "scores"),
    ("plotting",),
    ("cli",),
    ("pyro_fusion",),  # the public names, and `python -m pyro_fusion`
]
FLOORS = {name: floor for floor, names in enumerate(ORDER) for name in names}
TENSOR_ROOMS = ("families", "assignment", "pooling")


def test_imports_run_downwards_only() -> None:
    assert imports.faults(PACKAGE, FLOORS) == []


def test_nothing_else_lies_at_the_top() -> None:
    there = {p.name for p in PACKAGE.iterdir() if p.is_file()}
    assert there == {"__init__.py", "__main__.py", "errors.py", "py.typed"}
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms <= set(FLOORS)
    assert all((PACKAGE / name / "__init__.py").exists() for name in rooms)


@pytest.mark.parametrize("room", TENSOR_ROOMS)
def test_tensor_rooms_know_no_primitive_and_no_shared_state(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    assert [fault for path in files for fault in imports.not_of_tensors(path)] == []


def test_no_test_imports_from_another_test_file() -> None:
    found = []
    for module, path in imports.modules(TESTS).items():
        within = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found += [f"{module}: {f}" for f in imports.from_test_files(path, within)]
    assert found == []


def tree(root: Path, files: dict[str, str]) -> Path:
    """A package ``p`` of these files, with an empty ``__init__`` in each folder."""
    for name, text in files.items():
        path = root / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for folder in [root / "p", *(x for x in (root / "p").iterdir() if x.is_dir())]:
        (folder / "__init__.py").touch()
    return root / "p"


SOUND = {
    "low/a.py": "import torch\nx = 1\n",
    "low/b.py": "from p.low.a import x\n",
    "high/c.py": "from p.low import b\n",
    "high/d.py": "from . import c\nfrom ..low.a import x\n",
    "beside/e.py": "import p.low.a\n",
    "__init__.py": "from p.high.d import c\n",
}
SMALL = {"low": 0, "high": 1, "beside": 1, "p": 2}

UNSOUND = {
    "circle": ({"low/a.py": "from p.low.b import x\n"}, "circle of modules: p.low.a, p.low.b"),
    "in a function": (
        {"low/a.py": "def f():\n    from p.low import b\n"},
        "circle of modules: p.low.a, p.low.b",
    ),
    "for types alone": (
        {"low/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import p.low.b\n"},
        "circle of modules: p.low.a, p.low.b",
    ),
    "by way of the room's own names": (
        {"low/__init__.py": "from p.low.b import x\n", "low/a.py": "from p.low import x\n"},
        "circle of modules: p.low, p.low.a, p.low.b",
    ),
    "relative": ({"low/a.py": "from .b import x\n"}, "circle of modules: p.low.a, p.low.b"),
    "by name": (
        {"low/a.py": "import importlib\nimportlib.import_module('p.low.b')\n"},
        "circle of modules: p.low.a, p.low.b",
    ),
    "by a relative name": (
        {"low/a.py": "from importlib import import_module as f\nf('..high.c', __package__)\n"},
        "p.low.a imports p.high.c, which is not below it",
    ),
    "by keyword": (
        {"low/a.py": "import importlib\nimportlib.import_module(name='p.high.c')\n"},
        "p.low.a imports p.high.c, which is not below it",
    ),
    "upward": ({"low/f.py": "from p.high.c import b\n"}, "p.low.f imports p.high.c, which is not"),
    "upward in a function": (
        {"low/f.py": "def f():\n    from p.high import c\n"},
        "p.low.f imports p.high.c, which is not below it",
    ),
    "upward for types": (
        {"low/f.py": "if TYPE_CHECKING:\n    from p.high import thing\n"},
        "p.low.f imports p.high, which is not below it",
    ),
    "to the top": ({"low/f.py": "from p import thing\n"}, "p.low.f imports p, which is not below"),
    "rooms": ({"low/f.py": "import p.high.c\n"}, "circle of rooms: high, low"),
    "beside": (
        {"beside/f.py": "from p.high import c\n"},
        "p.beside.f imports p.high.c, which is not below it",
    ),
    "a new room": ({"other/g.py": ""}, "other is no room of the plan"),
}


def test_a_sound_tree_has_no_fault(tmp_path: Path) -> None:
    package = tree(tmp_path, SOUND)
    assert imports.faults(package, SMALL) == []
    graph = imports.import_graph(package)
    assert graph["p.high.d"] == {"p.high.c", "p.low.a"}
    assert imports.room_graph(graph) == {
        "p": {"high"},
        "high": {"low"},
        "beside": {"low"},
        "low": set(),
    }


@pytest.mark.parametrize("case", UNSOUND)
def test_an_unsound_tree_has_one(case: str, tmp_path: Path) -> None:
    changed, expected = UNSOUND[case]
    found = imports.faults(tree(tmp_path, SOUND | changed), SMALL)
    assert any(fault.startswith(expected) for fault in found), found


@pytest.mark.parametrize(
    "line",
    [
        "import pyro\npyro.sample('x', d)",
        "pyro.param('x')",
        "import pyro as p",
        "from pyro import poutine",
        "from pyro.poutine.util import is_validation_enabled",
        "import pyro.distributions\npyro.param('x')",
        "import pyro.poutine as poutine",
        "import torch\ntorch.manual_seed(0)",
        "def f():\n    from pyro import plate",
        "from torch import set_default_dtype",
        "def f():\n    global x",
        "with torch.no_grad():\n    torch.manual_seed(0)",
    ],
)
def test_what_tensor_code_has_not(line: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(line, encoding="utf-8")
    assert imports.not_of_tensors(tmp_path / "x.py") != []


def test_distributions_are_tensor_code(tmp_path: Path) -> None:
    text = (
        "import pyro.distributions as dist\nfrom pyro.distributions.util import f\nimport torch\n"
    )
    text += "with torch.random.fork_rng(), torch.no_grad():\n    torch.manual_seed(0)\n"
    text += "generator = torch.Generator().manual_seed(0)\n"
    (tmp_path / "x.py").write_text(text, encoding="utf-8")
    assert imports.not_of_tensors(tmp_path / "x.py") == []


@pytest.mark.parametrize(
    "line",
    [
        "from tests.test_a import x",
        "from tests.fusion import test_moves",
        "import tests.fusion.test_moves",
        "def f():\n    from .test_b import x",
        "from ..pooling.test_base import y",
    ],
)
def test_an_import_of_a_test_is_seen(line: str, tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(line, encoding="utf-8")
    assert imports.from_test_files(tmp_path / "x.py", "tests.fusion") != []
    (tmp_path / "x.py").write_text("from tests.fusion.parties import x", encoding="utf-8")
    assert imports.from_test_files(tmp_path / "x.py", "tests.fusion") == []
