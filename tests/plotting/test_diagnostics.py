# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Heterogeneity and calibration, against formulas by hand and cases with known answers."""

import math

import numpy as np
import pytest
import torch

from pyro_fusion import ParameterError, StructureError
from pyro_fusion.plotting.diagnostics import heterogeneity, reliability

# -- heterogeneity ---------------------------------------------------------------------------------


def test_known_answer() -> None:
    """Of 0, 3, 6 with variance 1: the mean is 3, Q = 9 + 0 + 9, I² = 16/18."""
    h = heterogeneity(torch.tensor([0.0, 3.0, 6.0]), torch.ones(3))
    assert (h.q, h.df, h.i_squared) == pytest.approx((18, 2, 16 / 18))


def test_formula_by_hand() -> None:
    rng = np.random.default_rng(0)
    y, sd = rng.normal(size=7), rng.uniform(0.1, 0.5, 7)
    w = 1 / sd**2
    q = (w * (y - (w * y).sum() / w.sum()) ** 2).sum()
    h = heterogeneity(torch.tensor(y), torch.tensor(sd))
    assert (h.q, h.i_squared) == pytest.approx((q, (q - 6) / q))
    assert 0.5 < h.i_squared < 1


def test_numbers_of_a_component_add_up() -> None:
    torch.manual_seed(0)
    loc, scale = torch.randn(4, 3, 2), torch.rand(4, 3, 2) + 0.1
    whole = heterogeneity(loc, scale)
    parts = [heterogeneity(loc[:, i, j], scale[:, i, j]) for i in range(3) for j in range(2)]
    assert whole.q == pytest.approx(sum(p.q for p in parts))
    assert whole.df == sum(p.df for p in parts) == 18


def test_less_than_expected_is_none_and_of_one_party_unknown() -> None:
    assert heterogeneity(torch.tensor([0.0, 0.1]), torch.ones(2)).i_squared == 0
    assert heterogeneity(torch.zeros(2), torch.ones(2)).i_squared == 0
    assert math.isnan(heterogeneity(torch.zeros(1), torch.ones(1)).i_squared)


def test_neither_origin_nor_unit_matters() -> None:
    loc, scale = torch.tensor([0.0, 3.0, 6.0]).double(), torch.tensor([1.0, 2.0, 0.5]).double()
    q = heterogeneity(loc, scale).q
    assert heterogeneity(loc + 1e9, scale).q == pytest.approx(q, rel=1e-6)
    assert heterogeneity(loc * 1e-200, scale * 1e-200).q == pytest.approx(q)


def test_what_parties_give_is_checked() -> None:
    with pytest.raises(StructureError, match=r"got \[3\] and \[2\]"):
        heterogeneity(torch.zeros(3), torch.ones(2))
    with pytest.raises(StructureError, match=r"got \[0\] and \[0\]"):
        heterogeneity(torch.zeros(0), torch.ones(0))
    with pytest.raises(ParameterError, match="loc must be finite"):
        heterogeneity(torch.tensor([math.nan, 0]), torch.ones(2))
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ParameterError, match="scale must be finite and positive"):
            heterogeneity(torch.zeros(2), torch.tensor([1.0, bad]))


# -- reliability -----------------------------------------------------------------------------------


def test_bins() -> None:
    p = torch.tensor([[0.8, 0.2]] * 4 + [[0.1, 0.9]] * 2 + [[1.0, 0.0]])
    r = reliability(p, torch.tensor([0, 0, 0, 1, 1, 0, 0]), bins=5)
    assert r.count.tolist() == [0, 0, 0, 0, 7]  # 0.8 begins a bin; 1 is in the last
    r = reliability(p, torch.tensor([0, 0, 0, 1, 1, 0, 0]), bins=10)
    assert r.count.tolist() == [0] * 8 + [4, 3]
    assert r.accuracy[8:].tolist() == pytest.approx([3 / 4, 2 / 3])
    assert r.confidence[8:].tolist() == pytest.approx([0.8, 2.8 / 3])
    assert r.confidence[:8].isnan().all() and r.accuracy[:8].isnan().all()
    assert r.error == pytest.approx((4 * 0.05 + 3 * (2.8 / 3 - 2 / 3)) / 7)


def test_calibrated_forecasts_have_a_small_error() -> None:
    torch.manual_seed(0)
    p = torch.randn(20_000, 5).mul(1.5).softmax(-1)
    y = torch.multinomial(p, 1).squeeze(-1)
    # Each bin's accuracy is off by about sqrt(p (1 - p) / n), some 0.01: 0.02 is twice that.
    assert reliability(p, y).error < 0.02
    assert reliability(p.sqrt() / p.sqrt().sum(-1, keepdim=True), y).error > 0.1


def test_forecasts_are_checked() -> None:
    p, y = torch.full((3, 2), 0.5), torch.tensor([0, 1, 1])
    with pytest.raises(StructureError, match=r"\[N, C\], got \[3\]; of one class"):
        reliability(p[:, 0], y)
    with pytest.raises(StructureError, match=r"integers \[3\], got torch.int64 \[2\]"):
        reliability(p, y[:2])
    with pytest.raises(StructureError, match=r"got torch.float32 \[3\]"):
        reliability(p, y.float())
    with pytest.raises(ParameterError, match="classes 0 to 1, got 0 to 2"):
        reliability(p, torch.tensor([0, 2, 1]))
    for bad in (p * 2, torch.tensor([[1.5, -0.5]] * 3), p * math.nan):
        with pytest.raises(ParameterError, match="adding up to 1"):
            reliability(bad, y)
    with pytest.raises(ParameterError, match="bins must be at least 1, got 0"):
        reliability(p, y, 0)
