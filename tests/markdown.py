# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The code of a Markdown page: runs as printed, and prints what stands below it."""

import re
from typing import Any

import pytest

Blocks = list[tuple[str, str]]


def blocks(text: str) -> Blocks:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.M | re.S)


def run(
    page: str,
    content: Blocks,
    i: int,
    namespace: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> bool:
    """Run block ``i``, of Python; whether it printed what the next block, of text, says."""
    exec(compile(content[i][1], f"{page}, block {i}", "exec"), namespace)
    out = capsys.readouterr().out
    following = content[i + 1] if i + 1 < len(content) else ("", "")
    if following[0] != "text":
        assert out == ""
        return False
    assert out == following[1]
    return True
