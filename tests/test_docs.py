# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The pages: their code runs as printed, what they link to is there, and the API has every name."""

import importlib
import re
from pathlib import Path
from types import FunctionType

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_fusion
from pyro_fusion import FusionModel, Posterior, families
from pyro_fusion.families import family as base
from tests import markdown

ROOT = Path(pyro_fusion.__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# The pages with code; the others have none.
WITH_CODE = [
    "choosing",
    "extending",
    "files",
    "how_it_works",
    "limits",
    "program",
    "reading",
    "refining",
    "rounds",
]


def test_which_pages_have_code() -> None:
    found = {p.stem for p in PAGES if "```python" in p.read_text(encoding="utf-8")}
    assert found == set(WITH_CODE)


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_runs_as_printed(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_BY_TYPE", dict(base._BY_TYPE))  # a page registers a family
    assert "```text" in (DOCS / f"{page}.md").read_text(encoding="utf-8")
    markdown.run(DOCS / f"{page}.md", capsys)


@pytest.mark.parametrize(
    "path",
    [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_links_lead_somewhere(path: Path) -> None:
    markdown.check_links(path)


def test_every_page_is_in_the_table_of_contents() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^(?:\.\./tutorials/)?(\w+)$", text, flags=re.M))
    pages = [p.stem for p in PAGES if p.stem != "index"]
    assert {*pages, *(p.stem for p in (ROOT / "tutorials").glob("*.ipynb"))} <= listed


def test_the_layout_is_that_of_the_package() -> None:
    package = ROOT / "pyro_fusion"
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    (layout,) = [c for _, c in markdown.blocks(text) if c.startswith("pyro_fusion/\n")]
    shown: dict[str, str] = {}
    folders = [""]
    for line in layout.splitlines()[1:]:
        indent, name, said = re.fullmatch(r"( +)(\S+) +(\S.*)", line).groups()  # type: ignore[union-attr]
        folders[len(indent) // 2 :] = [name if name.endswith("/") else ""]
        shown["".join(folders[1 : len(indent) // 2]) + name] = said
    found = {str(path.relative_to(package).as_posix()) for path in package.rglob("*.py")}
    found |= {f"{Path(name).parent.as_posix()}/" for name in found if "/" in name}
    assert set(shown) == found


def test_the_families_are_those_that_are_known() -> None:
    text = (DOCS / "extending.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"the way back\. (.*?) are known", text, flags=re.S)
    names = set(re.findall(r"\w+", listed)) - {"and"}
    through_a_transform = {"InverseGamma", "LogNormal"}
    assert names == set(families.family_names()) | through_a_transform


API = "".join(p.read_text(encoding="utf-8") for p in (DOCS / "api").glob("*.rst"))
# Modules for users, and the directive by which the API pages have all of their names.
MODULES = ["assignment", "errors", "families", "nn", "plotting", "plotting.diagnostics"]
MODULES += [
    "pooling",
    "readers.draws",
    "readers.module.laplace",
    "readers.numpyro",
    "readers.pyro",
    "readers.sklearn",
    "testing",
]


@pytest.mark.parametrize("module", MODULES)
def test_the_api_has_every_module(module: str) -> None:
    assert re.search(rf"^\.\. automodule:: pyro_fusion\.{module}$", API, flags=re.M)


def test_the_api_has_every_public_name() -> None:
    named = set(re.findall(r"^\.\. auto(?:class|function):: (?:[\w.]+\.)?(\w+)$", API, flags=re.M))
    data = set(re.findall(r"^\.\. (?:auto|py:)data:: pyro_fusion\.([\w.]+)$", API, flags=re.M))
    for module in MODULES:
        content = importlib.import_module(f"pyro_fusion.{module}")
        named |= set(content.__all__)
        for name in content.__all__:  # of these a module's directive has those with a docstring
            value = getattr(content, name)
            known = isinstance(value, type | FunctionType) and value.__doc__
            assert known or f"{module}.{name}" in data, name
    assert pyro_fusion.__all__ == sorted(pyro_fusion.__all__)
    assert set(pyro_fusion.__all__) - named == {"__version__"}


def test_what_contributors_are_told_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_/]+(?:/|\.py))`", text)
    assert len(named) > 8
    for path in named:
        places = (ROOT, ROOT / "pyro_fusion", ROOT / "pyro_fusion" / "readers")
        assert any((place / path).exists() for place in places), path
    commands = re.findall(r"^make ([a-z ]+?)(?: +#.*)?$", text, flags=re.M)
    markdown.check_targets(ROOT / "Makefile", " ".join(commands).split())


def test_pyro_draws_a_model_with_what_it_depends_on() -> None:
    pytest.importorskip("graphviz")
    parties = [
        Posterior({"loc": dist.Normal(torch.randn(2, 3), 0.1).to_event(1)}, {"loc": "component"})
        for _ in range(2)
    ]
    graph = pyro.render_model(FusionModel(parties, pooling="inclusive"), render_distributions=True)
    assert "component_assignment -> loc" in graph.source
    assert "loc ~ Normal" in graph.source
    assert "cluster_local_component" in graph.source
