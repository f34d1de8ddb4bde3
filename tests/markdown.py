# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The code of a Markdown page: runs as printed, and prints what stands below it."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pyro_fusion.cli.command import main

Blocks = list[tuple[str, str]]


def blocks(text: str) -> Blocks:
    """Language and content of each fenced block, all of which are of one form."""
    found = re.findall(r"^```(\S+)\n(.*?)^```$", text, flags=re.M | re.S)
    fences = re.findall(r"^\s*(?:```|~~~)", text, flags=re.M)
    assert len(fences) == 2 * len(found), "a block that is indented, titled or has no language"
    return found


def run(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run a page from top to bottom, in the present folder: its Python, and the commands
    ``pyro-fusion`` but for the demo. What is printed must be what stands in the block of text below
    the code, and nothing where there is none. The names that the page has defined."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    content = blocks(path.read_text(encoding="utf-8"))
    for i, (language, code) in enumerate(content):
        if language == "python":
            exec(compile(code, f"{path.name}, block {i}", "exec"), namespace)
            below, text = content[i + 1] if i + 1 < len(content) else ("", "")
            assert capsys.readouterr().out == (text if below == "text" else "")
        for line in code.splitlines() if language == "sh" else ():
            if line.startswith("pyro-fusion ") and line != "pyro-fusion demo":
                assert main(shlex.split(line)[1:]) == 0
                assert capsys.readouterr().err == ""
    return namespace


def links(text: str) -> list[str]:
    """The targets of links and pictures that are no web addresses."""
    text = re.sub(r"^```.*?^```$|`[^`]*`", "", text, flags=re.M | re.S)
    assert not re.search(r"\]\[\w", text), "a link by reference, which is not followed here"
    return re.findall(r"\]\((?!http)(\S+?)(?:\s+\"[^\"]*\")?\)", text)


def check_targets(makefile: Path, targets: Iterable[str]) -> None:
    """Every target that a page names is in the Makefile."""
    there = re.findall(r"^([a-z]+):", makefile.read_text(encoding="utf-8"), flags=re.M)
    assert set(targets) <= set(there)


def anchors(path: Path) -> set[str]:
    """What a link may have behind its ``#``: the headings, as GitHub and MyST name them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def check_links(path: Path, text: str | None = None) -> None:
    """Every link of a page, or of its text, leads to a file, and to a heading in it."""
    for target in links(path.read_text(encoding="utf-8") if text is None else text):
        name, _, anchor = target.partition("#")
        there = path.parent / name if name else path
        assert there.exists(), f"{path.name}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{path.name}: {target}"
