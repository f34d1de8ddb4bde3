# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""``benchmarks/fisher.py``: its tasks and shifts are what they are called, its rows are printed."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from pyro_fusion.nn import alignment
from tests.benchmarks.load import load


@pytest.fixture
def fisher(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    load("networks", monkeypatch)  # which it imports from
    module = load("fisher", monkeypatch)
    monkeypatch.setattr(module, "GRID", 3)
    monkeypatch.setattr(module, "SIMPLEX", 8)
    return module


@pytest.mark.parametrize("parties", [2, 5])
def test_each_digit_has_one_task(fisher: ModuleType, parties: int) -> None:
    tasks = torch.stack(fisher.split(parties, 0))
    assert ((tasks >= 0).sum(0) == 1).all()
    assert ((tasks >= 0).sum(1) == 10 // parties).all()
    images = fisher.Images(torch.zeros(10, 1, 8, 8), torch.arange(10))
    part = fisher.of_task(images, tasks[0], True)
    assert part.y.sort().values.tolist() == list(range(10 // parties))
    assert len(fisher.of_task(images, fisher.questions(0)[0], True).y) == 10


def test_shifts(fisher: ModuleType) -> None:
    x = torch.zeros(40, 1, 8, 8)
    x[:, :, 4, 2] = 1.0
    generator = torch.Generator().manual_seed(0)
    for shift in fisher.SHIFTS:
        y = fisher.shifted(x, shift, generator)
        assert y.shape == x.shape
        assert not torch.equal(y, x)
    faint = fisher.shifted(x, "faint", generator)
    torch.testing.assert_close(faint, 0.35 * x)
    places = torch.arange(8.0).expand(8, 8)
    moved = fisher.shifted(x, "moved", generator)[:, 0]
    columns = (moved * places).sum((1, 2)) / moved.sum((1, 2))
    # Pixels are 2/8 wide: 0.3 to either side, and as much down or up.
    torch.testing.assert_close((columns - 2).abs(), torch.full((40,), 1.2))
    assert 0 < int((columns > 2).sum()) < 40


def test_ensemble_and_accuracy(fisher: ModuleType) -> None:
    images = fisher.Images(torch.eye(2).reshape(2, 1, 1, 2), torch.tensor([0, 1]))
    right, wrong = nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    wrong[1].weight.data = torch.tensor([[0.0, 0.5], [0.5, 0.0]])
    assert fisher.accuracy(right, images) == 100
    assert fisher.accuracy(wrong, images) == 0
    assert fisher.accuracy([right, wrong], images) == 100


def test_prints_a_row_for_every_method(
    fisher: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    pytest.importorskip("matplotlib")
    fisher.main(["--small", "--seeds", "2", "--only", "1a", "1d", "3", "--out", str(tmp_path)])
    monkeypatch.setattr(alignment, "_RESTARTS", 0)
    fisher.main(["--small", "--seeds", "1", "--only", "2"])
    printed = capsys.readouterr().out
    for title, rows in (
        ("1a. two tasks", ["each for its task", "Fisher, best λ", "empirical Fisher", "Laplace"]),
        ("1d. five digits each", ["one party with all data", "average, best λ"]),
        ("2. different initialisations", ["average, aligned", "Fisher, aligned, best λ"]),
        ("3. robust fine-tuning", ["average, λ = 0.5", "Fisher, best sum"]),
    ):
        _, _, block = printed.partition(f"\n{title}")
        block = block.partition("\n\n")[0]
        for row in rows:
            assert any(line.startswith(f"{row}  ") for line in block.splitlines()), row
    assert "standard error" in printed
    assert (tmp_path / "fisher.png").stat().st_size > 10_000
