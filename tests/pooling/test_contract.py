# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The contract of a pooling: kept by ours and by two of a user's own, and by none that is wrong."""

from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch

from pyro_fusion import ParameterError
from pyro_fusion.families import Factor
from pyro_fusion.pooling import Exclusive, Inclusive, Product, pooling_named
from pyro_fusion.testing.pooling import check_pooling
from tests.families.members import BARE
from tests.pooling.own import BuresWasserstein, Wasserstein
from tests.pooling.problems import prior_of


def normals(shape=(7, 3)):
    g = torch.Generator().manual_seed(0)
    loc = torch.randn(shape, generator=g, dtype=torch.float64)
    scale = 0.3 + torch.rand(shape, generator=g, dtype=torch.float64)
    return dist.Normal(loc, scale).to_event(len(shape) - 1)


def multivariate(shape=(6,)):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(*shape, 2, 2, generator=g, dtype=torch.float64)
    loc = torch.randn(*shape, 2, generator=g, dtype=torch.float64)
    d = dist.MultivariateNormal(loc, a @ a.mT + 0.3 * torch.eye(2))
    return d.to_event(len(shape) - 1)


@pytest.mark.parametrize("family", sorted(BARE))
@pytest.mark.parametrize("pooling", ["inclusive", "exclusive", "product"])
def test_ours(pooling, family):
    local = Factor.of(BARE[family][0](torch.arange(7)))
    how = pooling_named(pooling)
    check_pooling(how, local, prior_of(family, local) if how.needs_prior else None)


@pytest.mark.parametrize("pooling", [Inclusive(), Exclusive(), Product()], ids=lambda x: x.name)
@pytest.mark.parametrize("example", [normals(), multivariate((6, 3))], ids=["normal", "mvn"])
def test_ours_where_entries_may_be_missing(pooling, example):
    local = Factor.of(example)
    prior = None
    if pooling.needs_prior:
        one = prior_of("any", local)
        prior = one.map(lambda v: v[:, :1].expand_as(v))  # of each entry the same
    check_pooling(pooling, local, prior)


@pytest.mark.parametrize(
    ("pooling", "example"),
    [
        (Wasserstein(), normals((5,))),
        (Wasserstein(), normals()),
        (Wasserstein(), normals((5, 2, 3))),
        (BuresWasserstein(), multivariate()),
        (BuresWasserstein(), multivariate((6, 3))),
    ],
)
def test_of_a_user(pooling, example):
    check_pooling(pooling, example)


class Unweighted(Exclusive):
    def barycenter(self, local, groups, num_atoms, weights=None, prior=None):
        return super().barycenter(local, groups, num_atoms, None, prior)


class EachNumber(BuresWasserstein):
    """A divergence of each number of the event."""

    def divergence(self, atoms, local):
        return super().divergence(atoms, local).unsqueeze(1).expand(-1, 2)


class OtherDirection(Exclusive):
    def divergence(self, atoms, local):
        return Inclusive().divergence(atoms, local)


class OtherBarycentre(Exclusive):
    def barycenter(self, local, groups, num_atoms, weights=None, prior=None):
        return Inclusive().barycenter(local, groups, num_atoms, weights, prior)


class Negative(Wasserstein):
    def divergence(self, atoms, local):
        return super().divergence(atoms, local) - 1

    def cost(self, atoms, local, prior=None):
        return super().cost(atoms, local) - 1


class Far(Wasserstein):
    """Of coordinates in which there is no origin."""

    def group_potential(self, atoms, weight, prior=None):
        return super().group_potential(atoms, weight) + 1


class Opens(Exclusive):
    def opening(self, atoms, prior=None):
        return super().opening(atoms, prior) + 1


class Double(BuresWasserstein):
    def barycenter(self, local, *args):
        return super().barycenter(local.to(dtype=torch.float64), *args)


class FirstCounts(BuresWasserstein):
    """More than the others."""

    def barycenter(self, local, groups, num_atoms, weights=None, prior=None):
        w = torch.ones(len(groups)).double() if weights is None else weights.clone()
        w[0] *= 1.01
        return super().barycenter(local, groups, num_atoms, w)


class Fills(BuresWasserstein):
    """Empty atoms with the first component."""

    def barycenter(self, local, groups, num_atoms, weights=None, prior=None):
        if len(groups.unique()) < num_atoms:
            return local.index_select(0, torch.zeros(num_atoms, dtype=torch.long))
        return super().barycenter(local, groups, num_atoms, weights)


class Writes(Wasserstein):
    def barycenter(self, local, groups, num_atoms, weights=None, prior=None):
        result = super().barycenter(local, groups, num_atoms, weights)
        local.params["loc"].mul_(2)
        return result


class NoProgram(Exclusive):
    draws_from = "nowhere"


class OtherProgram(BuresWasserstein):
    """FusionModel knows no transport."""

    draws_from = "local"


class SwappedProgram(Exclusive):
    draws_from = "atoms"


class Cheap(Product):
    """Of half the price that the program asks for an atom by itself."""

    draws_from = "prior"

    def opening(self, atoms, prior=None):
        return super().opening(atoms, prior) / 2


class Half(Product):
    draws_from = "prior"

    def cost(self, atoms, local, prior=None):
        return super().cost(atoms, local, prior) / 2

    def pair_cost(self, atoms, local, prior=None):
        return super().pair_cost(atoms, local, prior) / 2


class NoPrior(BuresWasserstein):
    draws_from = "prior"


class NoName(BuresWasserstein):
    name = ""


class NoTensor(BuresWasserstein):
    def divergence(self, atoms, local):
        return 0.0


class Hot(Product):
    def temper(self, local, prior, weights, dispersion):
        return super().temper(local, prior, weights, 2 * dispersion)


class OneForAll(Exclusive):
    """A cost between components that have different entries as if they had all."""

    def cost_over_entries(self, atoms, local, prior=None):
        return self.cost(atoms.factor, local.factor)


@pytest.mark.parametrize(
    ("pooling", "what"),
    [
        (Unweighted(), "the barycentre is no minimum"),
        (EachNumber(), r"`divergence` must be a tensor of shape \[6\]: got \[6, 2\]"),
        (OtherDirection(), "`cost` is not `pair_cost`"),
        (OtherBarycentre(), "the barycentre is no minimum"),
        (Negative(), "a divergence is negative"),
        (Far(), "`pair_objective`"),
        (Opens(), "with `convex` set"),
        (Double(), "must be float32"),
        (FirstCounts(), "the barycentre is no minimum|depend on the order|half"),
        (Fills(), "must refuse an atom without a component"),
        (Writes(), "changes its arguments|the divergence|the barycentre"),
        (NoProgram(), "`draws_from` must be"),
        (
            OtherProgram(),
            r"`draws_from` 'local' the cost of FusionModel is KL\(atom ‖ local\), and",
        ),
        (SwappedProgram(), r"`draws_from` 'atoms' the cost of FusionModel is KL\(local ‖ atom\)"),
        (Cheap(), "KL.atom ‖ prior. for an atom by itself, and `opening` is another"),
        (Half(), r"- KL.atom ‖ prior., and `pair_cost` is another"),
        (NoPrior(), "`draws_from` 'prior', `needs_prior` must be set"),
        (NoName(), "pooling NoName: `name` must be a string"),
        (NoTensor(), "`divergence` must be a tensor .* got 0.0"),
        (Hot(), "tempered by nothing"),
        (OneForAll(), "`cost_over_entries`"),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, str) else "",
)
def test_what_is_wrong_is_found(pooling, what):
    example = multivariate() if isinstance(pooling, BuresWasserstein) else normals()
    prior = None
    if pooling.needs_prior:
        wide = Factor.of(dist.Normal(torch.zeros(1, 3).double(), 10.0))
        prior = replace(wide, batch_dim=1)
    with pytest.raises(AssertionError, match=what):
        check_pooling(pooling, example, prior)


def test_what_is_no_example():
    with pytest.raises(ParameterError, match="N >= 4"):
        check_pooling(Exclusive(), normals((3, 2)))
    with pytest.raises(ParameterError, match="needs a prior"):
        check_pooling(Product(), normals())
