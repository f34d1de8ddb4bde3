# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""benchmarks/second_round.py, small: it prints its table, keeps as many components as a party was
told of, and hands over what the data say under the common prior."""

from types import ModuleType

import numpy as np
import pytest
import torch

from pyro_fusion import NormalWishart, Posterior, fuse
from tests.benchmarks.load import load_simulation

CENTRES = np.array([[-8.0, 0.0], [0.0, 8.0], [8.0, 0.0]])


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_simulation(monkeypatch)["second_round"]


def test_it_prints_a_row_for_each_pooling(
    second: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    second.main(["--small", "--atoms", "all", "--strength", "3"])
    rows = capsys.readouterr().out.splitlines()[2:]
    names = ["exclusive, all", "product, all"]
    assert len(rows) == len(names)
    for row, name in zip(rows, names, strict=True):
        assert f"  {name} " in row
        assert "1 problems" in row
        assert all(f"{column} " in row for column in ("right %", "ARI", "OT"))


def test_a_second_round_by_product_hands_over_the_data_alone(second: ModuleType) -> None:
    rng = np.random.default_rng(0)
    seen = [[0, 1], [2, 0], [1, 2]]
    data = [np.concatenate([CENTRES[k] + rng.normal(size=(50, 2)) for k in own]) for own in seen]
    base = NormalWishart(torch.zeros(2).double(), 0.5, 3.0, torch.eye(2).double())
    # Clusters this far apart: the posterior of each is that of its own points, by hand.
    exact = []
    for x in data:
        parts = [_conjugate(part, base) for part in np.split(x, 2)]
        params = [torch.stack([getattr(p, n) for p in parts]) for n in ("loc", "concentration")]
        df = torch.stack([p.df for p in parts])
        spread = torch.stack([p.precision_matrix for p in parts])
        atom = NormalWishart(*params, df, precision_matrix=spread)
        exact.append(Posterior({"atom": atom}, {"atom": "component"}))
    first = fuse(exact, "product", prior={"atom": base})
    for atoms in ("own", "all"):
        result = second.second_round(data, first, base, atoms=atoms)
        assert result.fits["sizes"].tolist() == [2, 2, 2]
        assert result.fits["loc"].shape == (6, 2)
        assert result.fusion.num_atoms == 3
        for s, p in enumerate(result.parties):
            found, hand = p.decomposed["atom"].params, exact[s].decomposed["atom"].params
            order = [
                int(np.abs(found["loc"].numpy() - m).sum(1).argmin()) for m in hand["loc"].numpy()
            ]
            for name, value in hand.items():
                torch.testing.assert_close(found[name][order], value, rtol=1e-3, atol=1e-3)


def test_a_component_of_few_points_is_dropped(second: ModuleType) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([CENTRES[0] + rng.normal(size=(50, 2)), CENTRES[1:2] + [[0, 0], [1, 1]]])
    count = torch.full((3,), 10.0).double()
    atom = NormalWishart(
        torch.tensor(CENTRES), count, 3 * count, precision_matrix=30 * torch.eye(2).double()
    )
    parties = {"a": Posterior({"atom": atom}, {"atom": "component"})}
    prior = fuse(parties).as_prior()["a"]
    posterior, kept = second.refit(x, prior, 3)
    assert posterior.components("component") == kept.posterior.components("component") == 1
    assert float(kept.factors["atom"].loc[0, 0]) == CENTRES[0, 0]
    posterior, kept = second.refit(CENTRES[2:] + np.eye(4)[:, :2], prior, 2)  # the best of none
    assert posterior.components("component") == 1
    assert float(kept.factors["atom"].loc[0, 0]) == CENTRES[2, 0]


def _conjugate(x: np.ndarray, base: NormalWishart) -> NormalWishart:
    n, mean = len(x), torch.tensor(x.mean(0))
    scatter = torch.tensor((x - x.mean(0)).T @ (x - x.mean(0)))
    kappa, offset = base.concentration, mean - base.loc
    scatter = (
        base.precision_matrix + scatter + kappa * n / (kappa + n) * torch.outer(offset, offset)
    )
    loc = (kappa * base.loc + n * mean) / (kappa + n)
    return NormalWishart(loc, kappa + n, base.df + n, precision_matrix=scatter)
