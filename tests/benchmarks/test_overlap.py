# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The separated components of benchmarks/overlap.py: who has which is as said, posteriors are
calibrated where they should be, and atoms are apart."""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from tests.benchmarks.load import load


@pytest.fixture(scope="module")
def overlap() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield load("overlap", monkeypatch)


def test_cases_are_named_once_and_each_is_drawn_anew_for_a_seed(overlap: ModuleType) -> None:
    assert len({case.name for case in overlap.CASES}) == len(overlap.CASES)
    for case in overlap.CASES:
        problem, again, other = (case.draw(seed) for seed in (0, 0, 1))
        x, y, z = (_natural(p) for p in (problem, again, other))
        assert torch.equal(x, y)
        assert x.shape != z.shape or not torch.equal(x, z)
        # A party has an atom once, and every number is some party's.
        parts = np.split(problem.matches, np.cumsum(problem.sizes)[:-1])
        assert all(len(np.unique(part)) == len(part) > 0 for part in parts)
        assert problem.num_atoms == problem.matches.max() + 1


def _natural(problem: Any) -> torch.Tensor:
    return torch.cat([p.decomposed["x"].natural for p in problem.parties])


def test_layouts(overlap: ModuleType) -> None:
    rng = np.random.default_rng(0)
    has = overlap.sharing([2, 3, 5], 3)(rng)
    assert [len(own) for own in has] == [2, 3, 5]
    assert set(has[0]) == {0, 1}
    assert set(has[1]) == {0, 1, 2}
    assert set(has[2]) == {0, 1, 2, 3, 4}
    has = overlap.sharing([2, 2], 0)(rng)
    assert set(has[0]).isdisjoint(has[1])
    has = overlap.by_chance(500, 4, 0.3)(rng)
    counts = np.bincount(np.concatenate(has)) / 500
    # That a party has one at least makes it likelier: .3 / (1 - .7^4).
    np.testing.assert_allclose(counts, 0.3 / (1 - 0.7**4), atol=0.07)
    assert min(len(own) for own in has) == 1


@pytest.mark.parametrize("family", ["Normals", "NormalWisharts", "Gammas", "Dirichlets"])
def test_posteriors_are_off_by_what_they_admit(overlap: ModuleType, family: str) -> None:
    rng = np.random.default_rng(0)
    kind = getattr(overlap, family)(6)
    atoms, _ = kind.atoms(rng, 300)
    error = []
    for party in kind.parties(rng, atoms, [rng.permutation(300) for _ in range(3)]):
        q = party.factors["x"]
        if family == "NormalWisharts":
            # A multivariate t distribution of the mean, with this precision.
            weight = (q.df - 7) * q.concentration
            inverse = torch.linalg.inv(q.precision_matrix) * weight[:, None, None]
            root = torch.linalg.cholesky(inverse)
            offset = q.loc[:, None] - torch.as_tensor(atoms[:, 0])
            z = (root.mT[:, None] @ offset[..., None])[..., 0]
        else:
            z = (q.mean[:, None] - torch.as_tensor(atoms)) / q.stddev[:, None]
        error.append(z.square().mean(-1).amin(1))  # of the nearest atom
    assert torch.cat(error).mean() == pytest.approx(1.0, abs=0.2)


def test_errors_that_are_not_admitted(overlap: ModuleType) -> None:
    rng = np.random.default_rng(0)
    has = [np.arange(50)] * 2

    def squares(**settings: Any) -> list[float]:
        kind = overlap.Normals(10, **settings)
        atoms, _ = kind.atoms(rng, 50)
        found = [p.factors["x"] for p in kind.parties(rng, atoms, has)]
        z = [(q.mean - torch.as_tensor(atoms)) / q.stddev for q in found]
        return [float(x.square().mean()) for x in z]

    assert squares(admitted=0.1) == pytest.approx([100, 100], rel=0.2)
    assert squares(admitted=3.0) == pytest.approx([1 / 9, 1 / 9], rel=0.2)
    assert squares(worse=5.0) == pytest.approx([25, 1], rel=0.2)
    assert squares(error=(0.1, 2.0)) == pytest.approx([1, 1], rel=0.2)


def test_normal_wishart_posteriors_are_bayes_rule(overlap: ModuleType) -> None:
    rng = np.random.default_rng(0)
    kind = overlap.NormalWisharts(2, points=7)
    noise = rng.normal(size=(1, 7, 2))
    root = np.array([[2.0, 0.0], [0.5, 1.0]])
    mean = np.array([[3.0, -1.0]])
    posterior = kind._fit(noise, np.concatenate([mean, root])[None])
    x = torch.as_tensor(mean + noise[0] @ root.T)
    ratio = []
    for _ in range(4):
        loc, scatter = rng.normal(size=2), rng.normal(size=(2, 5))
        precision = torch.as_tensor(scatter @ scatter.T)
        value = torch.cat([torch.as_tensor(loc)[:, None], precision], -1)
        likelihood = MultivariateNormal(torch.as_tensor(loc), precision_matrix=precision)
        joint = kind.prior().log_prob(value) + likelihood.log_prob(x).sum()
        ratio.append(float(posterior.log_prob(value)[0] - joint))
    assert max(ratio) - min(ratio) < 1e-9  # it is the evidence, whatever the value


@pytest.mark.parametrize(
    ("family", "atoms", "expected"),
    [
        # Two atoms, one posterior sd apart in one coordinate, by the sd that each family has there.
        ("Normals", [[0.0, 0.0], [0.2, 0.0]], 1.0),
        ("Gammas", [[2.0, 3.0], [2.0 + (2.0 / 50) ** 0.5, 3.0]], 1.0),
        ("Dirichlets", [[0.5, 0.5], [0.5 + (0.25 / 2000) ** 0.5, 0.5 - (0.25 / 2000) ** 0.5]], 1.0),
    ],
)
def test_distances_are_in_posterior_sds(
    overlap: ModuleType, family: str, atoms: list[list[float]], expected: float
) -> None:
    class Given:
        """Draws these atoms, whatever is asked for."""

        def normal(self, size: tuple[int, ...]) -> np.ndarray:
            return np.array(atoms) / 10

        def gamma(self, *_: float, size: tuple[int, ...]) -> np.ndarray:
            return np.array(atoms)

        def dirichlet(self, *_: Any) -> np.ndarray:
            return np.array(atoms)

    _, nearest = getattr(overlap, family)(2).atoms(Given(), 2)
    assert nearest == pytest.approx(expected, rel=0.05)


def test_atoms_are_drawn_again_until_they_are_apart(
    overlap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowded = overlap.Case("crowded", overlap.Normals(2, error=0.01), overlap.sharing([12, 12], 0))
    problem = crowded.draw(0)
    mean = np.concatenate([p.factors["x"].mean.numpy() for p in problem.parties])
    apart = np.linalg.norm(mean[:, None] - mean, axis=-1)[~np.eye(24, dtype=bool)].min()
    assert apart > 9 * 0.01
    monkeypatch.setattr(overlap, "_TRIES", 5)
    with pytest.raises(ValueError, match="no atoms 10 sds apart"):
        replace(crowded, family=overlap.Normals(2, error=5.0)).draw(0)
