# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a prior of the assignment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_fusion.assignment.priors import AssignmentPrior

__all__ = ["check_assignment_prior"]

_PARTIES = (1, 2, 7, 1000)
_POPULARITIES = ([1], [6, 6], [1, 2, 3, 4, 5, 6, 6, 6])
"""Of the atoms of six parties."""


def check_assignment_prior(prior: AssignmentPrior) -> None:
    """Check a prior of the assignment: the shape of what it returns; a penalty that is 0 for an
    atom that nobody has, and concave from one party on; weights that never fall with the rank; an
    update that does not raise the objective.

    :param prior: with all of its settings. What it takes from the posteriors, by ``calibrated``, it
        is given as a spread of 1.
    :raises AssertionError: with what was expected and what came.
    """
    prior = prior.calibrated(lambda: 1.0)
    _is_prior(prior, "calibrated")
    k = prior.num_atoms
    if not (k is None or (isinstance(k, int) and k >= 1)):
        raise AssertionError(f"num_atoms: expected None or a positive integer, got {k!r}")
    for num_parties in _PARTIES:
        _check_penalty(prior, num_parties)
    _check_weights(prior)
    _check_update(prior)


def _is_prior(value: object, what: str) -> None:
    if not isinstance(value, AssignmentPrior):
        raise AssertionError(f"{what}: expected an AssignmentPrior, got {value!r}")


def _check_vector(x: Tensor, size: int, what: str) -> None:
    if not isinstance(x, Tensor) or x.shape != (size,) or x.dtype != torch.float64:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)
        raise AssertionError(f"{what}: expected float64 ({size},), got {got}")
    if not bool(torch.isfinite(x).all()):
        raise AssertionError(f"{what}: expected finite numbers, got {x}")


def _check_penalty(prior: AssignmentPrior, num_parties: int) -> None:
    phi, what = prior.penalty(num_parties), f"penalty({num_parties})"
    _check_vector(phi, num_parties + 1, what)
    if float(phi[0]) != 0:
        raise AssertionError(f"{what}: expected φ(0) = 0, got {float(phi[0])}")
    if not torch.equal(phi, prior.penalty(num_parties)):
        raise AssertionError(f"{what}: expected the same numbers each time")
    bends = phi[1:].diff().diff()
    slack = 1e-12 * max(1.0, float(phi.abs().max()))
    if bool((bends > slack).any()):
        m = 2 + int(bends.argmax())
        raise AssertionError(
            f"{what}: expected φ concave from one party on, got φ({m - 1}), φ({m}), φ({m + 1}) = "
            f"{phi[m - 1 : m + 2].tolist()}"
        )
    constant = float(prior.constant(num_parties))
    if not math.isfinite(constant):
        raise AssertionError(f"constant({num_parties}): expected a finite number, got {constant}")


def _check_weights(prior: AssignmentPrior) -> None:
    for num_ranks, free in ((1, 1), (6, 3), (4, 9)):
        weights, what = prior.rank_weights(num_ranks, free), f"rank_weights({num_ranks}, {free})"
        _check_vector(weights, num_ranks, what)
        if bool((weights < 0).any()) or bool((weights.diff() < 0).any()):
            raise AssertionError(
                f"{what}: expected weights >= 0 that never fall, got {weights.tolist()}"
            )


def _check_update(prior: AssignmentPrior) -> None:
    def value(p: AssignmentPrior, popularities: list[int]) -> float:
        return float(p.constant(6)) + float(p.penalty(6)[torch.tensor(popularities)].sum())

    for popularities in _POPULARITIES:
        updated = prior.update(len(popularities), 6)
        _is_prior(updated, "update")
        if updated.num_atoms != prior.num_atoms:
            raise AssertionError(
                f"update: expected num_atoms = {prior.num_atoms} as before, got {updated.num_atoms}"
            )
        before, after = value(prior, popularities), value(updated, popularities)
        if not after <= before + 1e-12 * max(1.0, abs(before)):
            raise AssertionError(
                f"update({len(popularities)}, 6): expected an objective of at most {before}, got "
                f"{after}"
            )
