# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The benchmarks run, small, and print what they promise; nothing is timed here."""

import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist

from tests.benchmarks.load import BENCHMARKS, load

# -- simulation ------------------------------------------------------------------------------------


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("simulation", monkeypatch)


def test_simulation_prints_a_row_for_every_method(
    simulation: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    simulation.main(["--small", "--jobs", "1", "--by-size", "--cache", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    blocks = [line for line in lines if line.endswith("1 problem")]
    # By separation, by size too, then from the jittered truth and from k-means.
    assert len(blocks) == 4
    others = ["k-means on all points, true K", "best single party (oracle)"]
    for row in [*simulation.FUSIONS, *others]:
        assert sum(line.startswith(f"{row} ") for line in lines) == len(blocks)
    for row in ["exclusive, true matches", "average of the true matches"]:
        assert sum(line.startswith(f"{row} ") for line in lines) == 2  # of one simulation each
    # For the default of each pooling.
    assert sum("right >= 85 %: " in line for line in lines) == 2 * 3
    assert sum("worst ratio <= 1.02: " in line for line in lines) == 2 * 3


@pytest.mark.parametrize("number", [1, 2])
def test_simulation_keeps_its_local_fits(
    simulation: ModuleType, tmp_path: Path, number: int
) -> None:
    tasks = simulation.overlapping_tasks if number == 1 else simulation.many_tasks
    (task,) = tasks([3], small=True)
    fresh = simulation.local_fits(task, None)
    written = simulation.local_fits(task, tmp_path)
    (file,) = tmp_path.iterdir()
    np.savez(file, **{**written, "marked": np.ones(1)})
    kept = simulation.local_fits(task, tmp_path)
    assert kept.keys() == {*fresh, "marked"}
    for name, value in fresh.items():
        np.testing.assert_array_equal(written[name], value)
        np.testing.assert_array_equal(kept[name], value)


def test_messages_are_counts_and_sums_on_a_common_prior(simulation: ModuleType) -> None:
    (task,) = simulation.overlapping_tasks([0], small=True)
    fits = simulation.local_fits(task, None)
    problem = simulation.overlapping(fits, simulation.draw_overlapping(task))[""]
    base = problem.base
    for message in problem.messages:
        atom = message.factors["atom"]
        # What a party adds to the prior are its 300 points, each once.
        counts = atom.concentration - base.concentration
        assert counts.sum() == pytest.approx(300)
        np.testing.assert_allclose(atom.df - base.df, counts)


def test_true_matches_of_separated_atoms_are_the_nearest(simulation: ModuleType) -> None:
    (task,) = simulation.overlapping_tasks([10], small=True)
    fits, drawn = simulation.local_fits(task, None), simulation.draw_overlapping(task)
    assert pdist(drawn.truth).min() > 10
    groups = simulation.true_matches(fits, drawn)
    np.testing.assert_array_equal(groups, cdist(fits["loc"], drawn.truth).argmin(1))
    assert (groups != np.concatenate(drawn.atoms)).any()  # a fit has an order of its own
    atoms = simulation.overlapping(fits, drawn)[""].pooled_matches
    # Parties are off by a normal jitter of sd 0.1, which pooling makes less.
    assert np.linalg.norm(atoms - drawn.truth, axis=1).max() < 0.2


def test_true_matches_look_at_covariances(simulation: ModuleType) -> None:
    # Two Gaussians about one centre, and a fit that has them the other way round.
    covariances = np.stack([np.eye(2), 2 * np.eye(2)])
    centre, df = np.zeros((2, 2)), np.array([10.0, 50.0])
    drawn = simulation.Draw(centre, [np.array([0, 1])], [centre], [covariances], [centre])
    precision = df[:, None, None] * covariances[::-1]
    fits = {"sizes": np.array([2]), "loc": centre, "df": df, "precision": precision}
    np.testing.assert_array_equal(simulation.true_matches(fits, drawn), [1, 0])


def test_fits_to_other_draws_are_refused(simulation: ModuleType) -> None:
    task, other = simulation.overlapping_tasks([0, 1], small=True)
    with pytest.raises(ValueError, match="empty the cache"):
        simulation.overlapping(
            simulation.local_fits(task, None), simulation.draw_overlapping(other)
        )


def test_transport_and_hausdorff(simulation: ModuleType) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 2)), rng.normal(size=(4, 2))
    # Uniform measures on 3 and 4 points are uniform on 12 with repeats: 4 and 3 of each.
    expected = simulation.transport(np.repeat(x, 4, 0), np.repeat(y, 3, 0))
    assert simulation.transport(x, y) == pytest.approx(expected)
    distance = np.linalg.norm(x[:, None] - y, axis=-1)
    best = min(distance[range(3), list(p)].mean() for p in permutations(range(3)))
    assert simulation.transport(x, y[:3]) == pytest.approx(best)
    assert simulation.hausdorff(x, y) == max(distance.min(0).max(), distance.min(1).max())
    assert simulation.hausdorff(x, x) == 0


# -- estep -----------------------------------------------------------------------------------------


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
