# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""benchmarks/estep.py runs, small, and prints what it promises; nothing is timed here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.load import BENCHMARKS, load


def test_estep_prints_a_row_for_every_quantity(tmp_path: Path) -> None:
    pytest.importorskip("cvxpy")
    picture = tmp_path / "growth.png"
    # In a process of its own, since it starts others, which import it by name.
    command = [sys.executable, str(BENCHMARKS / "estep.py"), "--small", "--plot", str(picture)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS.parent), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for quantity, count in {
        "cost, inclusive": 2,
        "cost, exclusive": 2,
        "coordinate, sweep": 2,
        "relaxed ": 2,
        "relaxed, by default": 1,
        "coordinate ": 1,
        "sinkhorn": 1,
        "fuse ": 3,
        "fuse, peak memory": 1,
        "fuse, many parties": 2,
        "fuse, growth": 1,
    }.items():
        assert sum(line.startswith(quantity) for line in lines) == count, quantity
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_estep_on_a_device_compares_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    estep = load("estep", monkeypatch)
    found = list(estep.device_rows(estep.SMALL, "cpu"))
    assert [row.quantity for row in found].count("fuse") == 4
    assert {row.peer for row in found} == {"same on the CPU"}


@pytest.mark.parametrize(
    ("measure", "theirs", "expected"),
    [("ratio", 1.0, "<= 2 x      yes"), ("ratio", 0.2, "<= 2 x      NO")]
    + [("speedup", 5.0, ">= 2 x      yes"), ("speedup", 1.0, ">= 2 x      NO")],
)
def test_estep_says_whether_a_target_is_met(
    monkeypatch: pytest.MonkeyPatch, measure: str, theirs: float, expected: str
) -> None:
    estep = load("estep", monkeypatch)
    assert expected in str(estep.Row("x", "y", 1.0, "z", theirs, 2, measure))
