# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""T by persistence: what is known to differ stays apart whatever parties have in common, the path
is the best assignment at each T, and where the posteriors do not tell T that is said."""

import itertools
import math
import warnings

import pyro.distributions as dist
import pytest
import torch

from pyro_fusion import (
    FusionProblem,
    ParameterError,
    Posterior,
    StructureError,
    dispersion_path,
    fuse,
)
from pyro_fusion.pooling import pooling_named
from pyro_fusion.pooling.components import Components
from tests.fusion import networks
from tests.fusion.overlap import problem
from tests.fusion.parties import BASE, parties

POOLINGS = ["inclusive", "exclusive", "product"]
FAMILIES = ["normal", "wishart", "gamma", "dirichlet"]


def of(pooling, prior):
    return {"prior": prior} if pooling == "product" else {}


def normals(*locs, scale=0.1):
    return [
        Posterior(
            {"x": dist.Normal(torch.tensor(m, dtype=torch.float64), scale)}, {"x": "component"}
        )
        for m in locs
    ]


@pytest.mark.parametrize("shared", [0, 2, 5])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_any_share_of_overlap(pooling, family, shared):
    posteriors, prior, truth = problem(family, own=5, shared=shared, parties=3, seed=0)
    with warnings.catch_warnings():
        # Nothing shared may be said to be in doubt, and is not to be wrong.
        warnings.simplefilter("ignore" if shared == 0 else "error")
        fusion = fuse(posteriors, pooling, **of(pooling, prior))
    atoms, truth = torch.cat(fusion.assignment), torch.tensor(truth)
    assert torch.equal(atoms[:, None] == atoms, truth[:, None] == truth)
    path = fusion.dispersion_path
    assert path.chosen is not None and path.chosen.low <= fusion.dispersion
    assert fusion.dispersion <= path.cap


def test_what_was_merged_at_139_standard_deviations():
    torch.manual_seed(0)
    centres = 10 * torch.randn(10, 20)
    posteriors = [
        Posterior(
            {"loc": dist.Normal(centres[i : i + 5] + 0.2 * torch.randn(5, 20), 0.2).to_event(1)},
            {"loc": ("component", None)},
        )
        for i in (0, 5)
    ]
    fusion = fuse(posteriors)
    assert fusion.num_atoms == 10
    assert fusion.only_label().shared < 0.5


def test_plateaus_by_hand():
    # Merges cost (d / 2 s)²: 1 for the pair at 0, 4 for that at 20; of neighbours in a party 400²
    # and more. Under the default prior two components share an atom where that is less than T.
    path = dispersion_path(normals([0.0, 20.0, 80.0], [0.2, 20.4, 140.0]))
    low, middle, high = path.plateaus[:3]
    assert (low.num_atoms, middle.num_atoms, high.num_atoms) == (6, 5, 4)
    assert low.high == pytest.approx(1.0, rel=1e-6) and middle.high == pytest.approx(4.0, rel=1e-6)
    assert path.chosen == high
    # Within parties neighbours are 20, 20, 60 and 20.2, 20.2, 119.6 apart.
    prices = [(d / 0.2) ** 2 for d in (20.0, 20.0, 60.0, 20.2, 20.2, 119.6)]
    quarter = float(torch.tensor(prices, dtype=torch.float64).quantile(0.25))
    assert path.cap == pytest.approx(quarter, rel=1e-6)
    assert path.estimate == pytest.approx(math.sqrt(4.0 * quarter), rel=1e-6)
    end = float(torch.tensor(prices, dtype=torch.float64).quantile(0.75))
    assert high.length == pytest.approx(min(end, high.high) / 4.0, rel=1e-6)
    # The first ends where a component merges, and begins at face value: half a nat in one number.
    assert low.length == pytest.approx(1.0 / 0.5, rel=1e-6)


def partitions(sizes):
    """All partitions in which no two components of a party share a group."""
    party = [s for s, n in enumerate(sizes) for _ in range(n)]

    def grow(groups, n):
        if n == len(party):
            yield list(groups)
            return
        for k in range(max(groups, default=-1) + 2):
            if all(not (groups[i] == k and party[i] == party[n]) for i in range(n)):
                yield from grow([*groups, k], n + 1)

    return list(grow([], 0))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_path_is_the_best_assignment_at_each_t(pooling):
    posteriors = normals([0.0, 1.1], [0.3, 2.0], [0.25, 1.0], scale=0.2)
    prior = {"x": dist.Normal(torch.tensor(0.0).double(), 3.0)}
    path = dispersion_path(posteriors, pooling, **of(pooling, prior))
    how = pooling_named(pooling)
    belief = how.default_assignment_prior()
    every = [torch.tensor(p) for p in partitions((2, 2, 2))]
    for i, t in enumerate(path.dispersion.tolist()):
        part = FusionProblem.of(
            posteriors, pooling, dispersion=max(t, 1e-9), **of(pooling, prior)
        ).parts["component"]
        best = math.inf
        for groups in every:
            num_atoms = int(groups.max()) + 1
            own = belief.update(num_atoms, 3)
            value = float(part.problem.values(groups, num_atoms).sum()) + own.constant(3)
            value += float(own.penalty(3)[torch.bincount(groups)].sum())
            best = min(best, value)
        assert float(path.objective[i]) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_assignments_are_in_the_order_of_the_parties():
    posteriors = normals([80.0, 0.0, 20.0], [140.0, 20.4, 0.2])
    path = dispersion_path(posteriors)
    at = int((path.dispersion <= path.estimate).nonzero().max())
    assert path.assignment[at].tolist() == [0, 1, 2, 3, 2, 1]
    assert path.components.tolist() == list(range(6)) and path.parties.tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
    ]
    again = dispersion_path(posteriors[::-1])
    assert again.estimate == pytest.approx(path.estimate, rel=1e-9)
    assert again.assignment[at].tolist() == [0, 1, 2, 3, 2, 1]


def test_steps_do_not_move_plateaus():
    # Wide steps may pass over an assignment that is the best for a short while: not more than that.
    coarse, fine = (dispersion_path(parties(), step=step) for step in (2.0, 1.1))
    assert fine.chosen.num_atoms == coarse.chosen.num_atoms == 4
    assert fine.chosen.low == pytest.approx(coarse.chosen.low, rel=1.0)
    assert fine.chosen.high == pytest.approx(coarse.chosen.high, rel=1.0)
    assert len(fine.dispersion) > 5 * len(coarse.dispersion)


def gradual():
    """Components at all distances: nothing tells what is the same."""
    generator = torch.Generator().manual_seed(1)
    return normals(*(torch.randn(6, generator=generator).cumsum(0).tolist() for _ in range(4)))


def test_where_t_is_not_told_that_is_said():
    with pytest.warns(UserWarning, match="do not tell how far apart .* 'component'"):
        fusion = fuse(gradual())
    path = fusion.dispersion_path
    assert path.chosen is None and not path.identified
    assert "NOT SURE" in fusion.summary()
    with pytest.warns(UserWarning) as record:
        FusionProblem.of(gradual())
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse(gradual(), dispersion=2.0).dispersion_path is None


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("seed", range(3))
def test_t_is_below_what_differs_or_a_warning_says_so(pooling, seed):
    # Each of ten components lies within the noise of some other one.
    generator = torch.Generator().manual_seed(seed)
    locs = [(2 * torch.randn(5, generator=generator)).tolist() for _ in range(4)]
    prior = {"x": dist.Normal(torch.tensor(0.0).double(), 5.0)}
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        fusion = fuse(normals(*locs), pooling, **of(pooling, prior))
    if fusion.dispersion > fusion.dispersion_path.cap * (1 + 1e-9):
        assert any("quarter of the components" in str(w.message) for w in record)
    elif not fusion.dispersion_path.identified:
        assert any("do not tell" in str(w.message) for w in record)


def test_a_party_counts_once_however_many_components_it_has():
    # The components of the last are close to each other: prices of wrong merges are low there.
    crowded = torch.linspace(300.0, 320.0, 41).tolist()
    few = [[0.0, 50.0, 100.0], [0.3, 50.2, 150.0], [100.1, 0.1, 200.0]]
    with_crowd = FusionProblem.of(normals(*few, crowded)).parts["component"].merges
    without = FusionProblem.of(normals(*few)).parts["component"].merges
    assert with_crowd.wrong_price(0.75) == pytest.approx(without.wrong_price(0.6), rel=0.5)
    assert fuse(normals(*few, crowded)).num_atoms == 5 + 41


def test_labels_that_share_sites_have_a_path_each():
    posteriors, _ = networks.parties()
    fusion = fuse(posteriors)
    assert len(fusion.labels) > 1
    for label, one in fusion.labels.items():
        assert one.dispersion_path is not None and one.dispersion_path.label == label
        assert len(one.margins) == len(posteriors)


def test_components_that_their_party_does_not_tell_apart_have_no_say():
    # Units that are switched off are all alike, at a prior that is far wider than the others.
    def party(locs, off):
        loc = torch.cat([torch.tensor(locs), torch.zeros(off)]).double().unsqueeze(1).expand(-1, 8)
        scale = torch.cat([torch.full((len(locs),), 0.1), torch.ones(off)]).double().unsqueeze(1)
        local = dist.Normal(loc + 0.01 * torch.arange(len(loc)).unsqueeze(1), scale).to_event(1)
        return Posterior({"x": local}, {"x": "unit"})

    locs = ([3.0, -3.0, 6.0], [3.02, -2.95, 9.0])
    path, without = (dispersion_path([party(x, n) for x in locs]) for n in (6, 0))
    assert path.components.tolist() == [0, 1, 2, 9, 10, 11]
    assert path.estimate == pytest.approx(without.estimate, rel=0.2)


def test_numbers_of_which_nothing_is_known_do_not_count():
    # Two numbers tell components apart; of six more the posteriors are as wide as their prior.
    generator = torch.Generator().manual_seed(0)
    posteriors = []
    for _ in range(3):
        loc = torch.cat([10 * torch.arange(5.0).unsqueeze(1).expand(-1, 2), torch.zeros(5, 6)], 1)
        loc = loc.double() + 0.01 * torch.randn(5, 8, generator=generator, dtype=torch.float64)
        scale = torch.cat([torch.full((5, 2), 0.1), torch.ones(5, 6)], 1).double()
        posteriors.append(
            Posterior({"x": dist.Normal(loc, scale).to_event(1)}, {"x": ("unit", None)})
        )
    merges = FusionProblem.of(posteriors).parts["unit"].merges
    assert merges.dimensions == 8.0
    assert merges.face_value == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"step": 1.0}, "above 1"), ({"label": "topic"}, "one of .*component")],
)
def test_arguments(arguments, message):
    with pytest.raises((ParameterError, StructureError), match=message):
        dispersion_path(parties(), **arguments)


def test_one_party_has_no_path():
    with pytest.raises(StructureError, match="two parties"):
        dispersion_path(parties()[:1])
    assert fuse(parties()[:1]).dispersion_path is None


def test_parties_of_one_component_each():
    # Nothing is known to differ: two nats per dimension, and a warning.
    posteriors = normals([0.0], [0.1], [50.0])
    with pytest.warns(UserWarning, match="no party has two of them"):
        fusion = fuse(posteriors)
    assert fusion.num_atoms == 2
    assert math.isinf(fusion.only_label().price_ratio)
    assert fusion.dispersion == 2.0


def test_product_needs_its_prior_for_a_path():
    path = dispersion_path(parties(), "product", prior=BASE)
    assert path.estimate >= 1.0
    assert isinstance(FusionProblem.of(parties()).parts["component"].messages, Components)
    assert list(itertools.pairwise(path.dispersion.tolist())) == sorted(
        itertools.pairwise(path.dispersion.tolist())
    )
