# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a solver: one that is wrong in one place does not pass. That ours pass is in
tests/assignment/test_contract.py."""

from dataclasses import replace

import pytest
import torch

from pyro_fusion import FixedAtoms, GroupNormPrior, IndianBuffetPrior
from pyro_fusion.assignment import NEW, Assignment, coordinate
from pyro_fusion.testing import check_solver


def idle(problem, prior, *, start):
    """What it was given: no better, and nothing wrong."""
    atoms = problem.join(start)
    return Assignment(start, problem.objective(atoms), iterations=0, converged=True)


def changed(**changes):
    def solver(problem, prior, *, start):
        result = coordinate(problem, prior, start=start)
        return replace(result, **{k: f(problem, result) for k, f in changes.items()})

    return solver


def alone(problem, prior, *, start):
    """Every component an atom of its own."""
    atoms = torch.full((sum(problem.sizes),), NEW)
    return Assignment(problem.split(atoms), problem.objective(atoms), 0, True)


def nearest(problem, prior, *, start):
    """Two components of a party may take the same atom."""
    atoms = problem.cost.argmin(0)
    return Assignment(problem.split(atoms), 0.0, 0, True)


def fickle(problem, prior, *, start):
    """Another result each time."""
    fickle.calls += 1
    return (idle if fickle.calls % 2 else coordinate)(problem, prior, start=start)


fickle.calls = 0


def careless(problem, prior, *, start):
    result = coordinate(problem, prior, start=start)
    start[0].fill_(0)
    return result


def test_right_ones():
    check_solver(coordinate)
    check_solver(idle)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda problem, prior, *, start: start, "expected an Assignment, got list"),
        (alone, "expected F of at most the start's"),
        (nearest, "expected each atom at most once"),
        (fickle, "expected the same result each time"),
        (careless, "expected that costs and start stay as they are"),
        (changed(objective=lambda p, r: 0.9 * r.objective), "the result says"),
        (changed(bound=lambda p, r: r.objective + 1.0), "expected a bound of at most F"),
        (changed(bound=lambda p, r: r.objective), "expected a bound of at most"),
        (changed(atoms=lambda p, r: r.atoms[1:]), "expected 4 parties, got 3"),
        (changed(atoms=lambda p, r: [a + p.num_atoms for a in r.atoms]), "expected atoms from -1"),
        (changed(atoms=lambda p, r: [a.int() for a in r.atoms]), "expected int64"),
        (changed(soft=lambda p, r: p.split(p.cost)), "relaxed, party 0: expected columns"),
        (changed(soft=lambda p, r: p.split(p.cost.float())), "relaxed, party 0: expected torch"),
        (changed(soft=lambda p, r: p.split(0 * p.cost - 1)), "expected entries >= 0"),
    ],
)
def test_a_wrong_one(wrong, message):
    with pytest.raises(AssertionError, match=message):
        check_solver(wrong, [GroupNormPrior()])


def test_a_new_atom_where_their_number_is_fixed():
    with pytest.raises(AssertionError, match="expected no new atom under FixedAtoms"):
        check_solver(alone, [FixedAtoms(9)])


def test_it_is_only_asked_for_what_it_is_for():
    seen = []

    def picky(problem, prior, *, start):
        assert not bool(problem.opening.any())
        seen.append(prior)
        return coordinate(problem, prior, start=start)

    check_solver(picky, [IndianBuffetPrior(2.0)], opening=False)
    assert set(seen) == {IndianBuffetPrior(2.0)}
