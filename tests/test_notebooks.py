# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The notebooks: each runs from a clean kernel and prints what is kept in it, up to rounding; on
another kind of processor than it was kept on, the same words."""

import re
from pathlib import Path

import nbformat
import pytest

from tests import markdown
from tests.notebooks import NOTEBOOKS, read, run

NUMBER = re.compile(r"-?\d+\.\d+")
WORD = re.compile(r"[A-Za-z]{3,}")


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each cell of code printed."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(o.text for o in cell.outputs if o.output_type == "stream") for cell in cells]


def test_there_are_some():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_kept_as_it_ran(path: Path):
    notebook = read(path)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert len(cell.source.splitlines()) <= 25
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
    first = notebook.cells[0].source
    assert re.match(r"# .*\n\n\*[^*]*\?\*(\n|$)", first), "a title and a question"
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    assert "\n## What goes wrong when it goes wrong\n" in text
    assert any("image" in kind for c in cells for o in c.outputs for kind in o.get("data", ()))
    assert notebook.metadata["arithmetic"], "make notebooks"
    markdown.check_links(path, text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_from_a_clean_kernel(path: Path):
    if "import numpyro" in path.read_text(encoding="utf-8"):
        pytest.importorskip("numpyro")
    new, old = run(path), read(path)
    exact = new.metadata["arithmetic"] == old.metadata["arithmetic"]
    for mine, kept in zip(printed(new), printed(old), strict=True):
        if not exact:
            assert set(WORD.findall(mine)) == set(WORD.findall(kept))
            continue
        assert NUMBER.sub("#", mine) == NUMBER.sub("#", kept)
        numbers = ([float(x) for x in NUMBER.findall(text)] for text in (mine, kept))
        assert next(numbers) == pytest.approx(next(numbers), rel=0.02, abs=0.02)
