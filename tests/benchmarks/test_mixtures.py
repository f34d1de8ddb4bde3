# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The first two simulations of benchmarks/simulation.py: local fits are kept, and the true atom of
each component and point is known."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist
from sklearn.mixture import BayesianGaussianMixture

from tests.benchmarks.load import load


@pytest.fixture(scope="module")
def mixtures() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield load("mixtures", monkeypatch)


@pytest.fixture(scope="module")
def problems(mixtures: ModuleType) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield load("problems", monkeypatch)


@pytest.mark.parametrize("number", [1, 2])
def test_local_fits_are_kept(mixtures: ModuleType, tmp_path: Path, number: int) -> None:
    tasks = mixtures.overlapping_tasks if number == 1 else mixtures.many_tasks
    (task,) = tasks([3], small=True)
    fresh = mixtures.local_fits(task, None)
    written = mixtures.local_fits(task, tmp_path)
    (file,) = tmp_path.iterdir()
    np.savez(file, **{**written, "marked": np.ones(1)})
    kept = mixtures.local_fits(task, tmp_path)
    assert kept.keys() == {*fresh, "marked"}
    for name, value in fresh.items():
        np.testing.assert_array_equal(written[name], value)
        np.testing.assert_array_equal(kept[name], value)


def test_messages_are_counts_and_sums_on_a_common_prior(
    mixtures: ModuleType, problems: ModuleType
) -> None:
    (task,) = mixtures.overlapping_tasks([0], small=True)
    problem = problems.problems_of(task, None)[""]
    base = problem.base
    for message in problem.messages:
        atom = message.factors["atom"]
        # What a party adds to the prior are its 300 points, each once.
        counts = atom.concentration - base.concentration
        assert counts.sum() == pytest.approx(300)
        np.testing.assert_allclose(atom.df - base.df, counts)


def test_true_matches_of_separated_atoms_are_the_nearest(
    mixtures: ModuleType, problems: ModuleType
) -> None:
    (task,) = mixtures.overlapping_tasks([10], small=True)
    problem = problems.problems_of(task, None)[""]
    drawn = problem.drawn
    assert pdist(drawn.truth).min() > 10
    nearest = cdist(problem.fits["loc"], drawn.truth).argmin(1)
    np.testing.assert_array_equal(problem.matches, nearest)
    assert (problem.matches != np.concatenate(drawn.atoms)).any()  # a fit has its own order
    # Parties are off by a normal jitter of sd 0.1, which pooling makes less.
    assert np.linalg.norm(problem.pooled_matches - drawn.truth, axis=1).max() < 0.2
    # Points of atoms so far apart are nearly all with their own, as drawn and as fitted.
    nearest = cdist(np.concatenate(drawn.data), drawn.truth).argmin(1)
    assert (drawn.true_labels == nearest).mean() > 0.99
    assert (problem.matches[problem.members] == drawn.true_labels).mean() > 0.99


def test_true_matches_look_at_covariances(mixtures: ModuleType, problems: ModuleType) -> None:
    # Two Gaussians about one centre, and a fit that has them the other way round.
    covariances = np.stack([np.eye(2), 2 * np.eye(2)])
    centre, df = np.zeros((2, 2)), np.array([10.0, 50.0])
    atoms = np.array([0, 1])
    drawn = mixtures.Draw(centre, [atoms], [centre], [covariances], [centre], [atoms])
    precision = df[:, None, None] * covariances[::-1]
    fits = {"sizes": np.array([2]), "loc": centre, "df": df, "precision": precision}
    np.testing.assert_array_equal(problems.true_matches(fits, drawn), [1, 0])


def test_points_are_where_scikit_learn_puts_them(
    mixtures: ModuleType, problems: ModuleType
) -> None:
    drawn = mixtures.draw_overlapping(mixtures.Task(1, 1.0, 4, 2, 1, 300))
    settings: dict[str, Any] = {"weight_concentration_prior_type": "dirichlet_distribution"}
    models = [
        BayesianGaussianMixture(n_components=size, random_state=s, max_iter=500, **settings).fit(x)
        for s, (size, x) in enumerate(zip((4, 3), drawn.data[:2], strict=True))
    ]
    fits = {"sizes": np.array([4, 3])}
    names = {"loc": "means_", "concentration": "mean_precision_", "df": "degrees_of_freedom_"}
    for name, theirs in names.items():
        fits[name] = np.concatenate([getattr(m, theirs) for m in models])
    fits["precision"] = fits["df"][:, None, None] * np.concatenate([m.covariances_ for m in models])
    expected = [m.predict(x) for m, x in zip(models, drawn.data, strict=False)]
    assert all(len(np.unique(x)) > 1 for x in expected)
    points = np.concatenate([m.mean_precision_ - m.mean_precision_prior_ for m in models])
    found = problems.predicted(fits, points, drawn.data[:2])
    np.testing.assert_array_equal(found, np.concatenate([expected[0], 4 + expected[1]]))


def test_components_and_points_of_simulation_2(mixtures: ModuleType, problems: ModuleType) -> None:
    (task,) = mixtures.many_tasks([0], small=True)
    for problem in problems.problems_of(task, None).values():
        drawn = problem.drawn
        nearest = cdist(np.concatenate(problem.means), drawn.truth).argmin(1)
        np.testing.assert_array_equal(problem.matches, nearest)
        points = cdist(np.concatenate(drawn.data), drawn.truth).argmin(1)
        np.testing.assert_array_equal(drawn.true_labels, points)
        np.testing.assert_array_equal(problem.matches[problem.members], points)


def test_fits_to_other_draws_are_refused(mixtures: ModuleType, problems: ModuleType) -> None:
    for tasks, draw, of in (
        (mixtures.overlapping_tasks, mixtures.draw_overlapping, problems.overlapping),
        (mixtures.many_tasks, mixtures.draw_many, problems.many),
    ):
        task, other = tasks([0, 1], small=True)
        with pytest.raises(ValueError, match="empty the cache"):
            of(mixtures.local_fits(task, None), draw(other))
