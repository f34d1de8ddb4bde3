# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The table of credible sets: what is counted, and that it runs, small."""

import numpy as np
import pytest
import torch

from pyro_fusion.fusion.draws import AssignmentDraws
from tests.benchmarks.load import load_simulation


def draws(groups: list[list[int]], sizes: tuple[int, ...]) -> AssignmentDraws:
    a = torch.tensor(groups)
    return AssignmentDraws("atom", sizes, a, a.amax(1) + 1, torch.zeros(len(a)), None, None)


def test_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = load_simulation(monkeypatch)["credible_sets"]
    # K = 3 six times in ten, and 4 four times; the pair of other parties is the same as often.
    found = draws([[0, 1, 0, 2]] * 6 + [[0, 1, 2, 3]] * 4, (2, 2))
    of_four = sets.compare(found, 4, np.array([0, 1, 2, 3]))
    assert of_four.held == (False, True, True) and of_four.sizes == (1, 2, 2)
    assert not of_four.mode and of_four.of_truth == pytest.approx(0.4)
    assert of_four.excess == pytest.approx(-0.6)
    # Pairs of different parties are four; one is said to be the same with .6, and is not.
    assert of_four.brier == pytest.approx(0.6**2 / 4) and of_four.base_rate == 0
    of_three = sets.compare(found, 3, np.array([0, 1, 0, 2]))
    assert of_three.held == (True, True, True) and of_three.mode
    assert of_three.brier == pytest.approx(0.4**2 / 4)
    assert of_three.base_rate == pytest.approx(3 / 16)
    assert sets.compare(found, 3).brier is None
    table = sets.table({"both": [of_three, of_four]}).splitlines()
    assert table[1].split()[:5] == ["both", "2", "50", "1.0", "100"]
    assert "50 % sets in 50 to 90 %: 50 %, met" in sets.aims([of_three, of_four])
    assert "95 % sets in 92 to 99 %: 100 %, MISSED" in sets.aims([of_three, of_four])


def test_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sets = load_simulation(monkeypatch)["credible_sets"]
    sets.main(["--small", "--draws", "5", "--seeds", "1"])
    shown = capsys.readouterr().out
    assert "separation 10 " in shown and "95 % sets in 92 to 99 %" in shown
