# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a pooling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_fusion.errors import ParameterError
from pyro_fusion.families import Factor, as_factor, kl
from pyro_fusion.families.masked import Masked
from pyro_fusion.pooling.additive import AdditivePooling
from pyro_fusion.pooling.pooling import Pooling

__all__ = ["check_pooling"]

_PERTURBATIONS = 16


def check_pooling(
    pooling: Pooling,
    example: Distribution | Factor,
    prior: Distribution | Factor | None = None,
    *,
    rtol: float = 1e-6,
    seed: int = 0,
) -> None:
    """Check on an example that a pooling does what fusion relies on: its barycentre is a minimum of
    its cost, whatever the order, weights and dtype of the components; what has several ways to be
    computed is the same in each; and what fusion asks of it fits together, as the Pyro program that
    ``draws_from`` promises.

    :param example: components of the family that is pooled, all different, of batch shape ``[N]``,
        ``N >= 4``, in float64. With an event axis of independent entries, missing ones are checked
        too.
    :param prior: of one atom, batch shape ``[1]``, if the pooling needs it.
    :param rtol: to which results of two ways of computing agree, relative to the costs.
    :param seed: of the perturbations.
    :raises AssertionError: saying what does not hold, with what was expected and what came.
    :raises ParameterError: if the example does not do.
    """
    if not isinstance(getattr(pooling, "name", None), str) or pooling.name == "":
        raise AssertionError(
            f"pooling {type(pooling).__name__}: `name` must be a string, not empty"
        )
    local = as_factor(example)
    base = None if prior is None else as_factor(prior)
    if local.batch_dim != 1 or local.batch_shape[0] < 4 or local.dtype != torch.float64:
        raise ParameterError(
            "expected an example of batch shape [N] with N >= 4 in float64, got "
            f"{list(local.batch_shape)} in {local.dtype}"
        )
    if pooling.needs_prior and base is None:
        raise ParameterError(f"pooling {pooling.name!r} needs a prior, batch shape [1]")
    check = _Check(pooling, local, base, rtol, seed)
    check.attributes()
    check.cost()
    check.barycenter()
    check.weights()
    check.dtypes()
    check.pairs()
    if isinstance(pooling, AdditivePooling):
        check.sums(pooling)
    if pooling.tempers:
        check.tempering()
    if len(local.base_shape) > 1:
        check.missing_entries()


class _Check:
    """One pooling on one example, in two groups."""

    def __init__(
        self, pooling: Pooling, local: Factor, prior: Factor | None, rtol: float, seed: int
    ) -> None:
        self.pooling, self.local, self.prior, self.rtol = pooling, local, prior, rtol
        self.count = local.batch_shape[0]
        self.generator = torch.Generator().manual_seed(seed)
        self.groups = torch.arange(self.count) % 2
        self.w = 0.5 + torch.rand(self.count, generator=self.generator, dtype=torch.float64)
        alone = pooling.divergence(local, local)
        self.holds(
            f"`divergence` must be a tensor of shape [{self.count}]",
            isinstance(alone, Tensor) and alone.shape == (self.count,),
            f": got {list(alone.shape) if isinstance(alone, Tensor) else repr(alone)}",
        )
        self.atoms = pooling.barycenter(local, self.groups, 2, self.w, prior)
        self.costs = pooling.cost(self.atoms, local, prior).double()

    # -- what is compared ------------------------------------------------------------------------

    def holds(self, what: str, condition: bool, detail: str = "") -> None:
        if not condition:
            raise AssertionError(f"pooling {self.pooling.name!r}: {what}{detail}")

    def close(self, what: str, got: Tensor, expected: Tensor, scale: float | None = None) -> None:
        got, expected = got.double(), expected.double()
        size = float(expected.abs().max()) if scale is None else scale
        same = got.shape == expected.shape and bool(
            ((got - expected).abs() <= self.rtol * (1 + size)).all()
        )
        self.holds(what, same, f": expected {_show(expected)}, got {_show(got)}")

    def same_atoms(self, what: str, got: Factor, expected: Factor) -> None:
        for name, value in expected.params.items():
            self.close(f"{what}, {name}", got.params[name], value)

    def objective(self, atoms: Factor, local: Factor, groups: Tensor, w: Tensor) -> Tensor:
        """The objective of each group, pair by pair: ``[K]``."""
        own = self.pooling.pair_cost(atoms.index_select(0, groups), local, self.prior).double()
        return self.pooling.opening(atoms, self.prior).double().index_add(0, groups, w * own)

    def barycentre_of(self, index: Tensor, groups: Tensor, w: Tensor | None) -> Factor:
        local = self.local.index_select(0, index)
        count = int(groups.max()) + 1
        return self.pooling.barycenter(local, groups, count, w, self.prior)

    # -- the contract ----------------------------------------------------------------------------

    def attributes(self) -> None:
        p = self.pooling
        self.holds(
            "`draws_from` must be 'local', 'atoms', 'prior' or None",
            p.draws_from in ("local", "atoms", "prior", None),
            f", got {p.draws_from!r}",
        )
        self.holds(
            "with `tempers` set, or `draws_from` 'prior', `needs_prior` must be set",
            p.needs_prior or not (p.tempers or p.draws_from == "prior"),
        )
        self.holds(
            "atoms are of another structure than the components",
            self.atoms.structure() == self.local.structure()
            and self.atoms.shape == (2, *self.local.shape[1:]),
            f": {self.atoms.structure()} of shape {tuple(self.atoms.shape)}",
        )

    def cost(self) -> None:
        p, k, n = self.pooling, *torch.cartesian_prod(torch.arange(2), torch.arange(self.count)).T
        atoms, local = self.atoms.index_select(0, k), self.local.index_select(0, n)
        pairs = p.pair_cost(atoms, local, self.prior).reshape(2, -1)
        self.close("`cost` is not `pair_cost` of each pair", self.costs, pairs)
        if p.draws_from in ("local", "atoms"):
            which = "KL(atom ‖ local)" if p.draws_from == "local" else "KL(local ‖ atom)"
            program = kl(atoms, local) if p.draws_from == "local" else kl(local, atoms)
            self.close(
                f"with `draws_from` {p.draws_from!r} the cost of FusionModel is {which}, and "
                "`pair_cost` is another",
                pairs,
                program.reshape(2, -1),
            )
        if p.draws_from == "prior":
            self.of_shared_draws(pairs)
        divergence = p.divergence(atoms, local)
        self.holds("a divergence is negative", bool((divergence >= 0).all()))
        itself = p.divergence(self.local, self.local)
        zero = torch.zeros(self.count)
        self.close("the divergence from itself is not zero", itself, zero, float(divergence.max()))
        opening = p.opening(self.atoms, self.prior)
        self.holds(
            "`opening` must be of shape [K]", opening.shape == (2,), f", got {opening.shape}"
        )
        self.holds(
            "with `convex` set an atom may cost nothing by itself",
            not p.convex or bool((opening == 0).all()),
        )

    def of_shared_draws(self, pairs: Tensor) -> None:
        """The objective of the program that draws each atom once, from the prior."""
        prior = self.pooling.given(self.prior)
        opening = kl(self.atoms, prior.expand_batch(self.atoms.batch_shape))
        k, n = torch.cartesian_prod(torch.arange(2), torch.arange(self.count)).T
        own = kl(self.atoms.index_select(0, k), self.local.index_select(0, n)).reshape(2, -1)
        what = "with `draws_from` 'prior' the cost of FusionModel is "
        self.close(
            what + "KL(atom ‖ local) - KL(atom ‖ prior), and `pair_cost` is another",
            pairs,
            own - opening.unsqueeze(1),
        )
        self.close(
            what + "KL(atom ‖ prior) for an atom by itself, and `opening` is another",
            self.pooling.opening(self.atoms, self.prior),
            opening,
        )

    def barycenter(self) -> None:
        best = self.objective(self.atoms, self.local, self.groups, self.w)
        slack = 1e-9 * (1 + float(self.costs.abs().max()))
        for i in range(_PERTURBATIONS):
            eta = self.atoms.natural
            noise = torch.randn(eta.shape, generator=self.generator, dtype=torch.float64)
            size = 1e-2 if i % 2 else 1e-3
            other = self.atoms.from_natural(eta * (1 + size * noise))
            worse = self.objective(other, self.local, self.groups, self.w)
            self.holds(
                "the barycentre is no minimum",
                bool((worse >= best - slack).all()),
                f": its objective is {_show(best)}, that of another atom {_show(worse)}",
            )
        every = torch.arange(self.count)
        alone = self.barycentre_of(every, every, None)
        self.same_atoms("the barycentre of one component is another", alone, self.local)
        order = torch.randperm(self.count, generator=self.generator)
        again = self.barycentre_of(order, 1 - self.groups[order], self.w[order])
        swapped = again.index_select(0, torch.tensor([1, 0]))
        self.same_atoms("atoms depend on the order of components", swapped, self.atoms)
        self.refuses("an atom without a component", torch.zeros_like(self.groups), self.prior)
        if self.pooling.needs_prior:
            self.refuses("a missing prior", self.groups, None)

    def refuses(self, what: str, groups: Tensor, prior: Factor | None) -> None:
        try:
            self.pooling.barycenter(self.local, groups, 2, self.w, prior)
        except ParameterError:
            return
        self.holds(f"`barycenter` must refuse {what} with a ParameterError", False)

    def weights(self) -> None:
        every = torch.arange(self.count)
        twice = self.barycentre_of(every.repeat(2), self.groups.repeat(2), self.w.repeat(2) / 2)
        self.same_atoms("twice half a component is not one", twice, self.atoms)
        w = self.w.clone()
        w[0] = 0.0
        without = self.barycentre_of(every[1:], self.groups[1:], w[1:])
        with_it = self.barycentre_of(every, self.groups, w)
        self.same_atoms("a component of weight zero counts", with_it, without)
        if self.pooling.normalised:
            scaled = self.barycentre_of(every, self.groups, 3.0 * self.w)
            self.same_atoms("with `normalised` set only ratios count", scaled, self.atoms)
            none = torch.where(self.groups == 0, 0.0, self.w)
            alike = torch.where(self.groups == 0, 1.0, self.w)
            self.same_atoms(
                "components of a group without weight do not count alike",
                self.barycentre_of(every, self.groups, none),
                self.barycentre_of(every, self.groups, alike),
            )

    def dtypes(self) -> None:
        single = self.local.to(dtype=torch.float32)
        prior = None if self.prior is None else self.prior.to(dtype=torch.float32)
        kept = {name: v.clone() for name, v in single.params.items()}
        atoms = self.pooling.barycenter(single, self.groups, 2, self.w, prior)
        self.holds(
            "atoms of float32 components must be float32",
            atoms.dtype == torch.float32,
            f", got {atoms.dtype}",
        )
        same = all(torch.equal(v, single.params[name]) for name, v in kept.items())
        self.holds("`barycenter` changes its arguments", same)
        cost = self.pooling.cost(atoms, single, prior).double()
        error = float((cost - self.costs).abs().max())
        self.holds(
            "float32 costs are far from those in float64",
            error <= 1e-2 * (1 + float(self.costs.abs().max())),
            f", by {error:.3g}",
        )

    def pairs(self) -> None:
        first, second = torch.arange(self.count - 1), torch.arange(1, self.count)
        got = self.pooling.pair_objective(self.local, first, second, self.prior)
        both, groups = torch.cat([first, second]), torch.arange(len(first)).repeat(2)
        atoms = self.barycentre_of(both, groups, None)
        ones = torch.ones(len(both), dtype=torch.float64)
        expected = self.objective(atoms, self.local.index_select(0, both), groups, ones)
        scale = float(self.costs.abs().max())
        self.close("`pair_objective` is not that of each pair's barycentre", got, expected, scale)

    def sums(self, pooling: AdditivePooling) -> None:
        """The objective from sums, about the origin of all, against pair by pair."""
        local, origin = self.local.centred, self.local.origin
        prior = None if self.prior is None else self.prior.shift(origin)
        statistics = pooling.statistics(local) * self.w.unsqueeze(1)
        total = torch.zeros(2, statistics.shape[1], dtype=torch.float64)
        total = total.index_add(0, self.groups, statistics)
        weight = torch.zeros(2, dtype=torch.float64).index_add(0, self.groups, self.w)
        atoms = pooling.from_statistics(local, total, weight, prior)
        self.same_atoms(
            "atoms from sums are not the barycentres", atoms.shift(origin, sign=1.0), self.atoms
        )
        potential = pooling.potential(local, prior) * self.w
        got = torch.zeros(2, dtype=torch.float64).index_add(0, self.groups, potential)
        got = got - pooling.group_potential(atoms, weight, prior)
        expected = self.objective(self.atoms, self.local, self.groups, self.w)
        scale = float(potential.abs().max())
        self.close("potentials do not add up to the objective", got, expected, scale)
        none = pooling.from_statistics(local, total[:0], weight[:0], prior)
        self.holds("no groups must have no atoms", none.batch_shape == (0,))

    def tempering(self) -> None:
        assert self.prior is not None
        ones = torch.ones(self.count, dtype=torch.float64)
        same = self.pooling.temper(self.local, self.prior, ones, 1.0)
        self.same_atoms("tempered by nothing, components change", same, self.local)

    def missing_entries(self) -> None:
        """Entries by themselves, from the components that have them."""
        size = self.local.base_shape[1]
        mass = torch.ones(self.count, size, dtype=torch.float64)
        mass[0, 0] = 0.0
        masked: Any = Masked(self.local, mass)
        how = self.pooling.suited(masked)
        atoms: Any = how.barycenter(masked, self.groups, 2, self.w, self.prior)
        for j in range(size):
            has = (mass[:, j] > 0).nonzero().squeeze(-1)
            one = _entry(self.local, j).index_select(0, has)
            prior = None if self.prior is None else _entry(self.prior, j)
            groups, w = self.groups[has], self.w[has]
            expected = self.pooling.barycenter(one, groups, 2, w, prior)
            got = _entry(atoms.factor, j)
            self.same_atoms(f"entry {j} of atoms depends on the others", got, expected)
        k, n = torch.cartesian_prod(torch.arange(2), torch.arange(self.count)).T
        cost = how.cost(atoms, masked, self.prior)
        pairs = how.pair_cost(atoms.index_select(0, k), masked.index_select(0, n), self.prior)
        self.close("`cost_over_entries` is not the sum over entries", cost, pairs.reshape(2, -1))


def _entry(f: Factor, j: int) -> Factor:
    return replace(f.map(lambda v: v[:, j]), batch_dim=1)


def _show(x: Tensor) -> str:
    values = ", ".join(f"{v:.6g}" for v in x.flatten()[:6].tolist())
    return f"[{values}{', ...' if x.numel() > 6 else ''}]"
