# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The row of refine() in the simulation."""

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.benchmarks.load import load_simulation


@pytest.fixture(scope="module")
def refined() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        yield load_simulation(patch)["refined"]


def test_a_row(refined: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(refined.refine, max_iterations=2)
    monkeypatch.setattr(refined, "refine", few)
    (task,) = refined.overlapping_tasks([1], small=True)
    f, drawn = refined.local_fits(task, None), refined.draw_overlapping(task)
    problem = refined.overlapping(f, drawn)[""]
    first = refined.fused(problem.parties, f)
    # The weights change nothing of who is who, and count each party's 300 points.
    plain = refined.fuse(problem.parties)
    assert all(torch.equal(a, b) for a, b in zip(first.assignment, plain.assignment, strict=True))
    weights = [p.decomposed["weights"].params["concentration"] for p in first.parties.values()]
    np.testing.assert_allclose([w.sum() - len(w) for w in weights], 300, rtol=1e-6)
    second = refined.refined(first, problem.base)
    np.testing.assert_allclose(second.usage.sum(1), 300, rtol=1e-6)
    sizes = {len(refined.locations(f.posterior.decomposed["atom"])) for f in (first, second.fusion)}
    assert sizes == {first.num_atoms}
    rates = refined.rates(first, f, drawn)
    truth = refined.true_matches(f, drawn)
    groups = torch.cat(first.assignment).numpy()
    assert rates.components == refined.adjusted_rand_score(truth, groups)
    assert 0 <= rates.atoms <= 1
