# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The README: its example is short, runs as printed, and finds what it was drawn from."""

import re
from pathlib import Path

import pytest
import torch

import pyro_fusion
from tests import markdown

ROOT = Path(pyro_fusion.__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_the_example_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [content for language, content in markdown.blocks(TEXT) if language == "python"]
    assert len([line for line in code.splitlines() if line.strip()]) <= 26
    fusion = markdown.run(README, capsys)["fusion"]
    # The clusters that were drawn from, with an error of 1 / sqrt(100) each, some less.
    atoms = fusion.posterior.factors["loc"].mean.sort().values
    assert (atoms - torch.tensor([-5.0, 0.0, 5.0])).abs().max() < 0.4


def test_its_commands_are_there() -> None:
    targets = re.findall(r"`make ([a-z]+)`", TEXT) + re.findall(r"^make ([a-z]+)", TEXT, flags=re.M)
    assert {"demo", "test", "docs"} <= set(targets)
    markdown.check_targets(ROOT / "Makefile", targets)
    for path in re.findall(r"python (benchmarks/\w+\.py)", TEXT):
        assert (ROOT / path).exists(), path


def test_every_notebook_is_listed() -> None:
    for path in (ROOT / "tutorials").glob("*.ipynb"):
        assert f"](tutorials/{path.name})" in TEXT, path.name
