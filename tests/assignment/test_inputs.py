# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""What every solver refuses, and odd input that it takes."""

import pytest
import torch

from pyro_fusion import (
    FixedAtoms,
    GroupNormPrior,
    IndianBuffetPrior,
    ParameterError,
    StructureError,
)
from pyro_fusion.assignment import NEW, AssignmentProblem, coordinate
from tests.assignment.problems import random_costs
from tests.assignment.solvers import SOLVERS, every_solver, solve


@every_solver
class TestBadInput:
    def test_no_party(self, name):
        with pytest.raises(StructureError, match="at least one party"):
            SOLVERS[name]([], GroupNormPrior())

    def test_ragged_atoms(self, name):
        with pytest.raises(StructureError, match=r"party 1: expected costs of shape \[2, L\]"):
            SOLVERS[name]([torch.zeros(2, 1), torch.zeros(3, 1)], GroupNormPrior())

    def test_not_a_matrix(self, name):
        with pytest.raises(StructureError, match=r"party 0: expected costs of shape \[2, L\]"):
            SOLVERS[name]([torch.zeros(2)], GroupNormPrior())

    def test_too_few_atoms(self, name):
        with pytest.raises(StructureError, match="party 0 has 3 components, but there are only 2"):
            SOLVERS[name]([torch.zeros(2, 3)], FixedAtoms(2))

    @pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
    def test_not_a_cost(self, name, bad):
        cost = [torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [0.0, bad]])]
        with pytest.raises(ParameterError, match="party 1: costs must not be NaN or -inf"):
            SOLVERS[name](cost, GroupNormPrior())

    @pytest.mark.parametrize("start", [None, [torch.tensor([0, 1]), torch.tensor([0, 1])]])
    def test_all_forbidden(self, name, start):
        cost = [torch.zeros(2, 2), torch.tensor([[0.0, torch.inf], [0.0, torch.inf]])]
        with pytest.raises(ParameterError, match="party 1: every assignment has infinite cost"):
            SOLVERS[name](cost, FixedAtoms(2), start=start)

    @pytest.mark.parametrize("start", [None, [torch.tensor([0, 1]), torch.tensor([0, 1])]])
    def test_two_components_with_one_atom(self, name, start):
        cost = [torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [torch.inf, torch.inf]])]
        with pytest.raises(ParameterError, match="every assignment has infinite cost"):
            SOLVERS[name](cost, FixedAtoms(2), start=start)

    def test_opening_of_another_shape(self, name):
        with pytest.raises(ValueError, match="opening costs"):
            SOLVERS[name]([torch.zeros(2, 2)], GroupNormPrior(), opening=torch.ones(3))

    @pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
    def test_opening_that_is_no_cost(self, name, bad):
        opening = torch.tensor([0.0, bad])
        with pytest.raises(ParameterError, match="opening costs must not be NaN or -inf"):
            SOLVERS[name]([torch.zeros(2, 2)], GroupNormPrior(), opening=opening)

    @pytest.mark.parametrize("bad", [torch.zeros(2, 1).bool(), torch.zeros(2, 1) + 0j, [[0.0]]])
    def test_costs_that_are_no_real_tensors(self, name, bad):
        cost = [torch.zeros(2, 1), bad]
        with pytest.raises(ParameterError, match="party 1: expected costs as"):
            SOLVERS[name](cost, GroupNormPrior())
        with pytest.raises(ParameterError, match="party 1: expected costs as"):
            SOLVERS[name]([cost[0], torch.zeros(2, 1).numpy()], GroupNormPrior())

    @pytest.mark.parametrize("prior", [GroupNormPrior(), FixedAtoms(2)], ids=str)
    @pytest.mark.parametrize("far", [1e308, -1e308])
    def test_costs_whose_sum_overflows(self, name, prior, far):
        cost = [torch.zeros(2, 2), torch.full((2, 2), far, dtype=torch.float64)]
        cost[1][0, 0] = torch.inf
        with pytest.raises(ParameterError, match="party 1: finite costs must be between"):
            SOLVERS[name](cost, prior)

    @pytest.mark.parametrize(
        "prior", [GroupNormPrior(2.0), IndianBuffetPrior(), FixedAtoms(2)], ids=str
    )
    def test_checked_problem_with_something_else(self, name, prior):
        problem = AssignmentProblem.of([torch.zeros(2, 2)], GroupNormPrior())
        solver = SOLVERS[name]
        if not (name == "relaxed" and isinstance(prior, IndianBuffetPrior)):
            with pytest.raises(ParameterError, match="checked with another assignment prior"):
                solver(problem, prior)
        with pytest.raises(ParameterError, match="has its own opening costs"):
            solver(problem, GroupNormPrior(), opening=torch.zeros(2))

    @pytest.mark.parametrize(
        ("start", "message"),
        [
            ([[0, 1, 2]], "an assignment of 2 parties, got 1"),
            ([[0, 1, 2], [0], [0]], "an assignment of 2 parties, got 3"),
            ([[0, 1], [0]], r"party 0: expected an assignment of shape \[3\], got \[2\]"),
            ([[0, 1], [0, 1]], r"party 0: expected an assignment of shape \[3\], got \[2\]"),
            ([[0, 1, 2], [4]], "party 1: expected atoms from .* to 3, got 4 for component 0"),
            ([[0, 1, -2], [0]], "party 0: expected atoms from .* to 3, got -2 for component 2"),
            ([[0, 1, 2], [1.0]], "party 1: expected atoms as integers, got torch.float32"),
            ([[0, 1, 2], [True]], "party 1: expected atoms as integers, got torch.bool"),
            ([[3, 1, 3], [3]], "party 0: expected each atom at most once, got atom 3"),
        ],
    )
    def test_start(self, name, start, message):
        cost = random_costs(0, 4, [3, 1])
        start = [torch.tensor(a) for a in start]
        for prior in (GroupNormPrior(), FixedAtoms(4)):
            with pytest.raises((StructureError, ParameterError), match=message):
                SOLVERS[name](cost, prior, start=start)

    def test_start_from_new_atoms_where_there_are_none(self, name):
        start = [torch.full((n,), NEW) for n in (3, 1)]
        with pytest.raises(ParameterError, match="party 0: expected atoms from 0 to 3, got -1"):
            SOLVERS[name](random_costs(0, 4, [3, 1]), FixedAtoms(4), start=start)

    @pytest.mark.parametrize("bad", [-1, float("nan")])
    @pytest.mark.parametrize(
        "setting", ["tolerance", "max_iterations", "max_sweeps", "restarts", "seed"]
    )
    def test_settings(self, name, setting, bad):
        if (name == "coordinate") == (setting in ("tolerance", "max_iterations")):
            pytest.skip("has no such setting")
        with pytest.raises(ParameterError, match=f"{setting} must be at least ., got {bad}"):
            SOLVERS[name]([torch.zeros(2, 2)], GroupNormPrior(), **{setting: bad})

    def test_no_iterations(self, name):
        if name == "coordinate":
            assert coordinate([torch.zeros(2, 2)], GroupNormPrior(), max_sweeps=0).iterations <= 1
            return
        with pytest.raises(ParameterError, match="max_iterations must be at least 1, got 0"):
            SOLVERS[name]([torch.zeros(2, 2)], GroupNormPrior(), max_iterations=0)


@every_solver
class TestOddInput:
    def test_an_infeasible_start_is_not_optimal(self, name):
        # Both components of party 0 would have atom 0, at no cost.
        cost = [torch.tensor([[0.0, 0.0], [5.0, 5.0]])] + [torch.tensor([[9.0], [0.0]])] * 3
        start = [torch.tensor([0, 0])] + [torch.tensor([1])] * 3
        with pytest.raises(ParameterError, match="party 0: expected each atom at most once"):
            SOLVERS[name](cost, FixedAtoms(2), start=start)
        assert solve(name, cost, FixedAtoms(2)).objective == 5

    @pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
    def test_start_of_any_integers(self, name, dtype):
        cost = random_costs(0, 4, [3, 0, 1])
        start = [torch.tensor(a) for a in ([0, 1, 2], [], [3])]
        expected = solve(name, cost, GroupNormPrior(), start=[a.long() for a in start])
        result = solve(name, cost, GroupNormPrior(), start=[*(a.to(dtype) for a in start)])
        assert result.objective == expected.objective

    def test_integer_costs(self, name):
        cost = [(3 * c).long() for c in random_costs(0, 4, [3, 1, 2])]
        real = [c.to(torch.get_default_dtype()) for c in cost]
        for prior in (GroupNormPrior(), FixedAtoms(4)):
            here, there = SOLVERS[name](cost, prior), solve(name, real, prior)
            assert here.objective == there.objective
            for p, q in zip(here.soft or [], there.soft or [], strict=True):
                assert torch.equal(p, q)

    def test_an_atom_that_is_infinitely_dear_to_open_is_forbidden(self, name):
        cost = random_costs(0, 4, [3, 1, 2])
        opening = torch.tensor([0.0, torch.inf, 0.0, 0.0])
        forbidden = [c.index_fill(0, torch.tensor([1]), torch.inf) for c in cost]
        for prior in (GroupNormPrior(0.3), FixedAtoms(4)):
            here = solve(name, cost, prior, opening=opening)
            assert here.converged
            assert here.objective == solve(name, forbidden, prior).objective
