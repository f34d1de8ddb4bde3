# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The demo: a small run of the whole, and its parts."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

from pyro_fusion import Posterior, fuse
from pyro_fusion.cli import demo
from pyro_fusion.errors import ParameterError


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "atoms.png"


@pytest.fixture(scope="module")
def result(picture: Path) -> demo.DemoResult:
    return demo.main(picture, parties=4, steps=80, draws=30, progress=False)


def test_fused_beats_every_party_and_is_near_the_pooled_fit(result: demo.DemoResult) -> None:
    # Parties score about -17 nats (they know half of the digits), the pooled fit about -13.5.
    best = max(row.log_density for row in result.parties)
    assert result.best_party.log_density == best
    for row in result.fused.values():
        assert row.log_density > best + 1.5
        assert row.log_density > result.pooled.log_density - 1
    product = result.fused["product"].log_density
    assert product > best + 2
    assert product > result.pooled.log_density - 0.5


def test_fused_clusters_agree_with_the_digits_better_than_unfused_ones(
    result: demo.DemoResult,
) -> None:
    best = max(row.rand_index for row in [*result.parties, result.unmatched])
    assert result.fused["product"].rand_index > best


def test_number_of_atoms_is_that_of_the_fusion(result: demo.DemoResult) -> None:
    assert [row.atoms for row in result.parties] == [5, 5, 5, 5]
    assert result.unmatched.atoms == 20
    assert result.fused["product"].atoms == result.fusion.num_atoms
    assert 8 <= result.fusion.num_atoms <= 14


def test_the_table_has_a_line_for_every_fit(result: demo.DemoResult) -> None:
    rows = [*result.parties, result.unmatched, *result.fused.values(), result.pooled]
    assert len(rows) == 4 + 1 + 3 + 1
    lines = str(result).splitlines()
    for row in rows:
        (line,) = [line for line in lines if line.startswith(row.name)]
        assert f"{row.log_density:.2f}" in line
    assert all(row.seconds > 0 for row in rows if row is not result.unmatched)


def test_says_below_the_table_that_the_dispersion_is_not_identified(
    result: demo.DemoResult,
) -> None:
    path = result.fusion.dispersion_path
    assert path is not None
    assert not path.identified
    data = demo.load(parties=4)
    report = demo._report(result, data)
    assert report.index("NOT SURE") > report.index(str(result))
    first, last = path.plateaus[0].num_atoms, path.plateaus[-1].num_atoms
    assert f"{first} atoms become {last} " in report
    # One whose T was given is not in doubt.
    sure = fuse(list(result.fusion.parties.values()), dispersion=result.fusion.dispersion)
    assert "NOT SURE" not in demo._report(replace(result, fusion=sure), data)


def test_the_picture_is_drawn(result: demo.DemoResult, picture: Path) -> None:
    assert result.picture == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_prints_the_table_and_shows_progress(
    result: demo.DemoResult,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fitted = result.fusion.posterior
    turns = itertools.count()  # no two parties are the same

    def fit(x: torch.Tensor, k: int, **_: object) -> Posterior:
        some = torch.arange(min(k, fitted.components("component")))
        return fitted.select("component", some.roll(next(turns)))

    monkeypatch.setattr(demo, "fit", fit)
    state = torch.get_rng_state()
    again = demo.main(None, parties=4, draws=5)
    assert torch.equal(torch.get_rng_state(), state)
    out, err = capsys.readouterr()
    assert str(again) in out
    assert "party 3" in err
    assert again.picture is None


def test_fit_is_reproducible_and_leaves_the_parameter_store_alone() -> None:
    x = torch.randn(60, 2) + torch.tensor([[-4.0], [4.0]]).repeat(30, 1)
    pyro.param("AutoNormal.locs.loc", torch.zeros(7))
    fits = []
    for _ in range(2):
        torch.manual_seed(1)
        fits.append(demo.fit(x, 2, steps=20))
    assert dict(pyro.get_param_store().items()).keys() == {"AutoNormal.locs.loc"}
    a, b = (p.factors["loc"].mean for p in fits)
    assert torch.equal(a, b)
    assert sorted(a.mean(-1).round().tolist()) == [-4.0, 4.0]
    assert fits[0].axes == {
        "weights": ("component",),
        "loc": ("component", None),
        "scale": ("component", None),
    }


@pytest.mark.parametrize("parties", [4, 6])
def test_parties_share_out_the_digits(parties: int) -> None:
    data = demo.load(parties=parties, dim=3, seed=2)
    holders = np.bincount(np.concatenate(data.seen), minlength=10)
    assert holders.tolist() == [parties // 2] * 10
    assert all(len(seen) == 5 for seen in data.seen)
    assert sum(map(len, data.parties)) + len(data.test) == 1797 - 250
    assert all(x.shape[1:] == (3,) for x in data.parties)
    assert set(data.labels.tolist()) == set(range(10))
    assert data.decode(data.test[:2]).shape == (2, 8, 8)


def test_decoding_undoes_the_reduction_but_for_what_it_left_out() -> None:
    coarse, fine = (demo.load(dim=d) for d in (2, 40))
    images = fine.decode(fine.test)
    assert abs(images.mean() - 0.3) < 0.05  # pixels of this data are 0 to 1, a third of them ink
    assert np.square(images - coarse.decode(coarse.test)).mean() > 0.01


@pytest.mark.parametrize("parties", [2, 5])
def test_number_of_parties_is_checked(parties: int) -> None:
    with pytest.raises(ParameterError, match="parties must be an even number"):
        demo.main(None, parties=parties, progress=False)


def test_number_of_threads_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ParameterError):
        demo.main(None, parties=3, progress=False)
    assert torch.get_num_threads() == before


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'pyro-fusion\[sklearn,plot\]'"):
        demo.main("x.png")
