# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""benchmarks/simulation.py, small: its tables have their rows, columns and targets, and the
measures in them are right; nothing is timed here."""

from collections.abc import Iterator
from itertools import combinations, permutations
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tests.benchmarks.load import load_simulation


@pytest.fixture(scope="module")
def files() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield load_simulation(monkeypatch)


@pytest.fixture(scope="module")
def simulation(files: dict[str, ModuleType]) -> ModuleType:
    return files["simulation"]


@pytest.fixture(scope="module")
def measures(files: dict[str, ModuleType]) -> ModuleType:
    return files["measures"]


@pytest.fixture(scope="module")
def shares(files: dict[str, ModuleType]) -> ModuleType:
    return files["shares"]


# -- the program -----------------------------------------------------------------------------------


def test_a_row_for_every_method_and_pooling(
    simulation: ModuleType,
    shares: ModuleType,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    options = ["--small", "--jobs", "1", "--by-size", "--draws", "5", "--cache", str(tmp_path)]
    simulation.main(options)
    lines = capsys.readouterr().out.splitlines()
    blocks = [line for line in lines if line.endswith("1 problem")]
    # By separation, by size too, then from the jittered truth and from k-means.
    assert len(blocks) == 4
    others = ["k-means on all points, true K", "best single party (oracle)"]
    for row in [*simulation.FUSIONS, *others]:
        assert sum(line.startswith(f"{row}  ") for line in lines) - (row in shares.POOLINGS) == 4
    for row in ["exclusive, true matches", "average of the true matches", *simulation.BEYOND]:
        assert sum(line.startswith(f"{row} ") for line in lines) == 2  # of one simulation each
    # For the default of each pooling, and what goes on from it.
    assert sum("ARI >= 0.96: " in line for line in lines) == 2 * 3
    assert sum("ARI >= 0.98: " in line and ", OT <= 0.3: " in line for line in lines) == 2 * 4
    assert sum("worst ratio <= 1.02: " in line for line in lines) == 2 * 3
    assert sum(line.startswith("50 % sets in 50 to 90 %: ") for line in lines) == 1
    assert sum("right >= 90 %: " in line and "T <= 3 fusions: " in line for line in lines) == 3


@pytest.mark.parametrize(
    ("row", "values", "expected"),
    [
        ("exclusive", {"ARI": 0.56, "OT": 9.0}, "ARI >= 0.55: met"),
        ("exclusive", {"ARI": 0.54, "OT": 0.0}, "ARI >= 0.55: MISSED"),
        ("exclusive, refined", {"ARI": 0.77, "OT": 0.31}, "ARI >= 0.76: met, OT <= 0.3: MISSED"),
        ("product, second round", {"ARI": 0.75, "OT": 0.29}, "ARI >= 0.76: MISSED, OT <= 0.3: met"),
        ("exclusive, true K", {"ARI": 1.0, "OT": 0.0}, ""),
    ],
)
def test_targets(simulation: ModuleType, row: str, values: dict[str, float], expected: str) -> None:
    assert simulation.overlapping_targets(0.1)(row, values) == expected


def test_what_goes_on_from_a_default_is_given_its_fusion(
    simulation: ModuleType, files: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    (task,) = files["mixtures"].overlapping_tasks([0], small=True)
    (problem,) = files["problems"].problems_of(task, None).values()

    def all_alone(given: object, fusion: object) -> object:
        assert given is problem
        number = len(problem.matches)
        assert simulation.of_fusion(fusion).assignment.shape == (number,)
        atoms = np.concatenate(problem.means)
        return files["measures"].Found(atoms, np.arange(number))

    monkeypatch.setitem(simulation.BEYOND, "alone", ("exclusive", all_alone))
    alone = simulation.scores(problem, ["exclusive", "alone"])["alone"]
    assert alone.excess == len(problem.matches) - len(problem.truth)
    assert alone.components == 0  # nobody is with anybody
    assert 0 < alone.points < 1  # yet the points of one component are


def test_wrong_cases_are_listed(shares: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    good = shares.Share(0, 1.0, -2, 0.5, 2.0, 1.0, True)
    wrong = good._replace(excess=-1, ari=0.9, estimate=4.0, plateau=False)
    right_in_all = dict.fromkeys(shares.POOLINGS, good)
    results = [
        ("easy", right_in_all),
        ("hard", right_in_all),
        ("hard", {**right_in_all, "product": wrong}),
    ]
    shares.print_shares(results)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line[:4] in ("excl", "prod")}
    assert rows["exclusive"][:7] == ["100.00", "1.00", "0.00", "0.50", "2.00", "2.00", "0"]
    assert rows["product"][:7] == ["66.67", "0.97", "0.00", "0.50", "2.67", "4.00", "1"]
    assert "MISSED" not in " ".join(rows["exclusive"])
    assert "right >= 90 %: MISSED, ARI >= 0.97: MISSED, T <= 3 fusions: met" in " ".join(
        rows["product"]
    )
    assert [line.split() for line in lines if line.startswith(("easy", "hard"))] == [
        ["hard", "product", "1", "of", "2", "0.95", "+0", "-1"]
    ]


# -- measures --------------------------------------------------------------------------------------


def test_transport_and_hausdorff(measures: ModuleType) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 2)), rng.normal(size=(4, 2))
    # Uniform measures on 3 and 4 points are uniform on 12 with repeats: 4 and 3 of each.
    expected = measures.transport(np.repeat(x, 4, 0), np.repeat(y, 3, 0))
    assert measures.transport(x, y) == pytest.approx(expected)
    distance = np.linalg.norm(x[:, None] - y, axis=-1)
    best = min(distance[range(3), list(p)].mean() for p in permutations(range(3)))
    assert measures.transport(x, y[:3]) == pytest.approx(best)
    assert measures.hausdorff(x, y) == max(distance.min(0).max(), distance.min(1).max())
    assert measures.hausdorff(x, x) == 0


def test_rand_indices_of_components_and_of_points(measures: ModuleType) -> None:
    # Four components of two atoms, of which one is put with the other atom; it has one point of
    # ten, and one point is with a component of the wrong atom.
    matches, assignment = np.array([0, 1, 0, 1]), np.array([0, 1, 1, 1])
    members = np.array([0, 0, 0, 1, 1, 1, 1, 2, 3, 3])
    labels = matches[members]
    labels[0] = 1
    problem = SimpleNamespace(
        matches=matches,
        members=members,
        truth=np.eye(2),
        matched=None,
        drawn=SimpleNamespace(true_labels=labels),
    )
    found = measures.Found(np.eye(2), assignment)
    score = measures.score_found(problem, found)
    assert score.components == pytest.approx(_adjusted_rand(matches, assignment))
    assert score.points == pytest.approx(_adjusted_rand(labels, assignment[members]))
    others = measures.Found(np.eye(2), assignment, matches=assignment, members=members[::-1])
    again = measures.score_found(problem, others)
    assert again.components == 1
    assert again.points == pytest.approx(_adjusted_rand(labels, assignment[members[::-1]]))


def _adjusted_rand(x: np.ndarray, y: np.ndarray) -> float:
    """By counting pairs: agreement beyond that of chance (Hubert & Arabie 1985)."""
    pairs = list(combinations(range(len(x)), 2))
    a = np.array([x[i] == x[j] for i, j in pairs])
    b = np.array([y[i] == y[j] for i, j in pairs])
    chance = a.sum() * b.sum() / len(pairs)
    return float(((a & b).sum() - chance) / ((a.sum() + b.sum()) / 2 - chance))
