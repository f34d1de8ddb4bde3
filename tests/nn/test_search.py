# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The search for weights, where the best ones are known."""

import pytest
import torch
from torch import nn

from pyro_fusion import ParameterError, StructureError, merge_modules, search_weights


def modules(size):
    """Networks of ``size`` numbers, each 1 at its own place: their average is the weights."""
    result = []
    for row in torch.eye(size).double():
        m = nn.Linear(size, 1, bias=False).double()
        m.weight.data = row.unsqueeze(0)
        result.append(m)
    return result


def nearness(*target):
    """A score that is best at the weights ``target``."""
    goal = torch.tensor([target]).double()
    return lambda m: -float((m.weight - goal).square().sum())


class TestTwo:
    def test_grid(self):
        found = search_weights(modules(2), nearness(0.3, 0.7), num_evaluations=11)
        torch.testing.assert_close(found.weights, torch.tensor([0.3, 0.7]).double())
        torch.testing.assert_close(found.tried[:, 1], torch.linspace(0, 1, 11).double())
        torch.testing.assert_close(found.tried.sum(1), torch.ones(11).double())
        with torch.no_grad():
            expected = [
                nearness(0.3, 0.7)(merge_modules(modules(2), weights=w)) for w in found.tried
            ]
        torch.testing.assert_close(found.scores, torch.tensor(expected).double())
        assert found.score == max(expected)
        torch.testing.assert_close(found.module.weight[0].detach(), found.weights)

    def test_of_weights_that_score_alike_the_nearest_to_equal(self):
        found = search_weights(
            modules(2), lambda m: float(m.weight[0, 0] < 0.45), num_evaluations=11
        )
        torch.testing.assert_close(found.weights, torch.tensor([0.4, 0.6]).double())

    def test_ends_are_the_modules_themselves(self):
        scores = search_weights(modules(2), lambda m: float(m.weight[0, 1])).scores
        assert scores[0] == 0 and scores[-1] == 1 and len(scores) == 51


class TestMore:
    @pytest.mark.parametrize("target", [(0.2, 0.5, 0.3), (0.6, 0.1, 0.2, 0.1)])
    def test_simplex(self, target):
        found = search_weights(modules(len(target)), nearness(*target), num_evaluations=200)
        assert len(found.scores) <= 200
        torch.testing.assert_close(found.weights, torch.tensor(target).double(), atol=0.02, rtol=0)
        torch.testing.assert_close(found.module.weight[0].detach(), found.weights)
        assert found.score == found.scores.max()
        # Better than the half of the evaluations that are random.
        assert found.score > found.scores[:100].max()

    def test_a_module_alone(self):
        found = search_weights(modules(3), nearness(0.0, 1.0, 0.0), num_evaluations=20)
        assert found.weights.tolist() == [0.0, 1.0, 0.0]

    def test_same_seed_same_result(self):
        a, b = (
            search_weights(modules(3), nearness(0.2, 0.5, 0.3), num_evaluations=30, seed=3)
            for _ in range(2)
        )
        assert torch.equal(a.tried, b.tried)


class TestErrors:
    def test_score(self):
        with pytest.raises(ParameterError, match=r"got nan at weights \[1.0, 0.0\]"):
            search_weights(modules(2), lambda m: float("nan"))
        with pytest.raises(ParameterError, match="a finite number, got None"):
            search_weights(modules(2), lambda m: None)

    def test_no_integer(self):
        with pytest.raises(ParameterError, match="must be an integer of at least 3"):
            search_weights(modules(2), nearness(0.5, 0.5), num_evaluations=10.0)

    @pytest.mark.parametrize("size, number, least", [(2, 2, 3), (4, 4, 5)])
    def test_too_few(self, size, number, least):
        match = f"at least {least} for {size} modules, got {number}"
        with pytest.raises(ParameterError, match=match):
            search_weights(modules(size), nearness(*[0.0] * size), num_evaluations=number)

    def test_one_module(self):
        with pytest.raises(StructureError, match="at least two modules, got 1"):
            search_weights(modules(1), lambda m: 0.0)
