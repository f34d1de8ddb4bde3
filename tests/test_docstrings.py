# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Docstrings begin with what a thing is or does: the reference pages show each by itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyro_fusion

PACKAGE = Path(pyro_fusion.__file__).parent
ROOMS = ["families", "assignment", "posterior", "pooling", "fusion", "program", "testing", "nn"]
ROOMS += ["plotting", "cli", "readers", "errors.py"]
FIRST_WORDS = {"as", "likewise", "of", "what", "where", "whether"}

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def faults(source: str) -> Iterator[str]:
    """The places whose docstring hangs on another sentence, each with its first line."""
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, Documented) else None
        if not text:
            continue
        words = [w.strip(",.:;").lower() for w in text.split()[:2]]
        if words[0] in FIRST_WORDS or words == ["the", "same"]:
            line = getattr(node, "lineno", 1)
            yield f"{line}: {getattr(node, 'name', 'the file')}: {text.splitlines()[0]}"


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_begin_with_what_the_thing_is_or_does(room: str) -> None:
    place = PACKAGE / room
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert files
    names = {path: path.relative_to(PACKAGE).as_posix() for path in files}
    found = [
        f"{name}:{fault}"
        for path, name in names.items()
        for fault in faults(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("place", ["{doc}", "class C:\n    {doc}", "async def f():\n    {doc}"])
@pytest.mark.parametrize("start", [*sorted(w.title() for w in FIRST_WORDS), "The same"])
def test_a_docstring_that_hangs_on_another_is_found(place: str, start: str) -> None:
    assert len(list(faults(place.format(doc=f'"""{start}, in nats."""')))) == 1
    assert len(list(faults(place.format(doc=f'"""\n    {start} as before."""')))) == 1
    assert list(faults(place.format(doc=f'"""The cost {start.lower()} it is."""'))) == []
    assert list(faults(place.format(doc='"""Offset of all orders, in nats."""'))) == []
