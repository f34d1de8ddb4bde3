# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The pages under docs/: their code runs as printed, and what they link to is there."""

import re
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_fusion import FusionModel, Posterior
from tests import markdown

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_code_runs_as_printed(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = markdown.blocks(page.read_text(encoding="utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    python = [i for i, (language, _) in enumerate(content) if language == "python"]
    compared = [markdown.run(page.name, content, i, namespace, capsys) for i in python]
    assert sum(compared) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_it_links_to_is_there(page: Path) -> None:
    targets = re.findall(r"\]\((?!http)(\S+?)\)", page.read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        assert (DOCS / target.partition("#")[0]).exists(), target


def test_what_contributors_are_told_is_there() -> None:
    root = DOCS.parent
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)(\S+?)\)", text):
        assert (root / target.partition("#")[0]).exists(), target
    named = re.findall(r"`([a-z_/]+(?:/|\.py))`", text)
    assert len(named) > 8
    for path in named:
        places = (root, root / "pyro_fusion", root / "pyro_fusion" / "readers")
        assert any((place / path).exists() for place in places), path
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for line in re.findall(r"^make ([a-z ]+?)(?: +#.*)?$", text, flags=re.M):
        for target in line.split():
            assert re.search(rf"^{target}:", makefile, flags=re.M), target


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
