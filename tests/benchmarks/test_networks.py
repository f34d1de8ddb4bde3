# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""``benchmarks/networks.py`` on scikit-learn's digits: units that are known to be the same are
found, and the program prints its rows."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pyro_fusion import fuse
from tests.benchmarks.load import load


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("networks", monkeypatch)


@pytest.mark.parametrize("sizes", [(64, 16, 10), (64, 16, 16, 10)])
def test_units_of_one_origin_are_found(networks: ModuleType, sizes: tuple[int, ...]) -> None:
    """Parties that train one network further, its units shuffled, each on a share of the data."""
    train, test = networks.load(None)
    setting = networks.Setting(sizes, 25, 64)
    origin = networks.fit(setting, train, seed=0)
    parts = networks.split("even", train.y, seed=0)[:3]
    g = torch.Generator().manual_seed(0)
    parties, truth = [], []
    for s, index in enumerate(parts):
        own, orders = origin, {}
        for label in setting.hidden:
            orders[label] = torch.randperm(16, generator=g)
            own = own.permute(label, orders[label])
        further = networks.Setting(sizes, 5, 64)
        parties.append(networks.fit(further, train.take(index), s, networks.means(own)))
        truth.append(orders)
    fusion = fuse(parties)
    for label in setting.hidden:
        found = torch.cat(fusion.labels[label].assignment)
        units = torch.cat([orders[label] for orders in truth])
        same = found.unsqueeze(0) == found.unsqueeze(1)
        right = units.unsqueeze(0) == units.unsqueeze(1)
        # Of all that are the same, and of all that are said to be.
        assert float((same & right).sum() / right.sum()) > 0.95
        assert float((same & right).sum() / same.sum()) > 0.95

    def accuracy(posterior: object) -> float:
        p = networks.predict(posterior, test.x, 20, 0)
        return float(networks.Score.of(p, test.y, 0).accuracy)

    best = max(accuracy(p) for p in parties)
    assert accuracy(fusion.posterior) > best - 2
    assert accuracy(networks.averaged(parties).posterior) < best - 10


def test_prints_a_row_for_every_method(
    networks: ModuleType,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit = networks.fit
    monkeypatch.setattr(networks, "fit", lambda s, *rest: fit(replace(s, epochs=20), *rest))
    networks.main(["--small", "--layers", "1", "--out", str(tmp_path), "--cache", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    setting = networks.Setting((64, 20, 10), 60, 32)
    others = ["parties, mean", "parties, best", "ensemble", "one fit to all data", "naive average"]
    others.append("means alone")
    blocks = [[*networks.fusions(setting, kind), *others] for kind in networks.TARGETS]
    for row in {row for block in blocks for row in block}:
        count = sum(line.startswith(f"{row} ") for line in lines)
        assert count == sum(row in block for block in blocks)
    assert (tmp_path / "networks.png").stat().st_size > 10_000
    fits = sorted(tmp_path.glob("*.safetensors"))
    assert len(fits) == 2 * networks.NUM_PARTIES + 1

    def accuracy(row: str) -> list[float]:
        found = [x.removeprefix(row).split()[0] for x in lines if x.startswith(f"{row} ")]
        return [float(x) for x in found]

    own, naive = accuracy("parties, mean"), accuracy("naive average")
    fused = accuracy("exclusive, default")
    assert all(a > b + 10 for a, b in zip(fused, naive, strict=True))
    assert fused[0] > own[0]  # of the even split; parties that see few classes differ too much


def test_data_or_small_is_needed(networks: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        networks.main([])
    assert "--data FOLDER is needed" in capsys.readouterr().err


def test_calibration_error(networks: ModuleType) -> None:
    """Of forecasts of 80 %, half right."""
    p = torch.tensor([[0.8, 0.2]]).expand(10, 2)
    score = networks.Score.of(p, torch.tensor([0, 1] * 5), 1)
    assert score.ece == pytest.approx(0.3) and score.accuracy == 50
