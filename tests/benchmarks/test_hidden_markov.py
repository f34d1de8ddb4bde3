# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Hidden Markov models from end to end: hand-written guides in, one guide out."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal

from pyro_fusion import (
    GroupNormPrior,
    IndianBuffetPrior,
    NormalWishart,
    StructureError,
    from_guide,
    fuse,
)
from pyro_fusion.fusion.arguments import resolve_prior
from pyro_fusion.fusion.atom_prior import prior_fill

AXES = {"initial": "state", "transition": ("state", "state"), "emission": "state"}
DIM, CALM, STICKY = 2, 0.5, 20.0
MEANS = 10.0 * torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.float64)
HOLDS = [[0, 1, 2], [2, 0], [3, 1, 0], [1, 2, 3]]


def sticky(n):
    return CALM + STICKY * torch.eye(n, dtype=torch.float64)


def model(num_states=3, num_frames=5, in_plate=True):
    """A sticky HMM with conjugate priors."""
    initial = pyro.sample("initial", dist.Dirichlet(torch.ones(num_states).double()))
    rows, emissions = dist.Dirichlet(sticky(num_states)), prior_emission().expand([num_states])
    transition, emission = sample_states(rows, emissions, in_plate)
    state = initial
    for t in pyro.markov(range(num_frames)):
        state = pyro.sample(f"state_{t}", dist.Categorical(transition[state] if t else initial))
        mean, precision = emission[state, :, 0], emission[state, :, 1:]
        frame = dist.MultivariateNormal(mean, precision_matrix=precision)
        pyro.sample(f"frame_{t}", frame)
    return state


def sample_states(transition, emission, in_plate):
    """In a plate, or as events."""
    if in_plate:
        with pyro.plate("state", len(emission.loc)):
            return pyro.sample("transition", transition), pyro.sample("emission", emission)
    transition = pyro.sample("transition", transition.to_event(1))
    return transition, pyro.sample("emission", emission.to_event(1))


def prior_emission():
    zero = torch.zeros(DIM, dtype=torch.float64)
    return NormalWishart(zero, 0.01, DIM + 2.0, precision_matrix=torch.eye(DIM).double())


BASE = {
    "initial": dist.Dirichlet(torch.ones(3).double()),
    "transition": dist.Dirichlet(sticky(3)),
    "emission": prior_emission(),
}


def evidence(holds, seed):
    """What a party with these of the four states has counted."""
    generator = torch.Generator().manual_seed(seed)
    n = len(holds)
    return {
        "starts": torch.rand(n, generator=generator).double(),
        "moves": torch.randint(30, (n, n), generator=generator).double(),
        "frames": 50 + torch.randint(30, (n,), generator=generator).double(),
        "noise": 0.1 * torch.randn(n, DIM, generator=generator).double(),
    }


def hand_written(holds, seed, in_plate=True):
    """The conjugate posterior of a party, as its user writes it down."""
    seen = evidence(holds, seed)
    n, frames = len(holds), seen["frames"]

    def param(name, value, constraint):
        return pyro.param(f"party_{seed}_{name}", value, constraint=constraint)

    def emission():
        return NormalWishart(
            param("loc", MEANS[holds] + seen["noise"], constraints.real),
            param("concentration", 0.01 + frames, constraints.positive),
            param("df", DIM + 2.0 + frames, constraints.greater_than(DIM - 1.0)),
            precision_matrix=param(
                "scatter",
                (1 + frames)[:, None, None] * torch.eye(DIM).double(),
                constraints.positive_definite,
            ),
        )

    def guide():
        initial = param("initial", 1 + seen["starts"], constraints.positive)
        pyro.sample("initial", dist.Dirichlet(initial))
        alpha = param("transition", sticky(n) + seen["moves"], constraints.positive)
        sample_states(dist.Dirichlet(alpha), emission(), in_plate)

    return guide


def parties(in_plate=True):
    guides = [hand_written(holds, seed, in_plate) for seed, holds in enumerate(HOLDS)]
    for guide in guides:
        guide()  # as SVI does: it makes the parameters
    return [from_guide(guide, axes=AXES) for guide in guides]


def true_states(fusion):
    """The true state that each atom is, by the emissions."""
    return torch.cdist(fusion.posterior.decomposed["emission"].params["loc"], MEANS).argmin(1)


@pytest.mark.parametrize("in_plate", [True, False])
def test_a_hand_written_guide_is_read_exactly(in_plate):
    posterior = parties(in_plate)[0]
    seen = evidence(HOLDS[0], 0)
    assert posterior.axes["emission"] == ("state", None, None)
    assert posterior.axes["transition"] == ("state", "state")
    truth = {
        ("initial", "concentration"): 1 + seen["starts"],
        ("transition", "concentration"): sticky(3) + seen["moves"],
        ("emission", "loc"): MEANS[HOLDS[0]] + seen["noise"],
        ("emission", "concentration"): 0.01 + seen["frames"],
        ("emission", "df"): DIM + 2 + seen["frames"],
    }
    for (site, name), expected in truth.items():
        f = posterior.decomposed[site]
        assert f.batch_dim == (1 if in_plate and site != "initial" else 0)
        # The parameter store keeps them unconstrained.
        torch.testing.assert_close(f.params[name], expected)


@pytest.mark.parametrize("indian_buffet", [True, False])
@pytest.mark.parametrize("pooling", ["inclusive", "exclusive", "product"])
def test_shuffled_and_missing_states(pooling, indian_buffet):
    # Without evidence a learned alpha may settle at one that has all components apart.
    alpha = None if pooling == "product" else 1.0
    prior = IndianBuffetPrior(alpha) if indian_buffet else GroupNormPrior()
    fusion = fuse(parties(), pooling, prior, prior=model)
    assert fusion.num_atoms == 4
    states = true_states(fusion)
    assert sorted(states.tolist()) == [0, 1, 2, 3]
    for holds, atoms in zip(HOLDS, fusion.assignment, strict=True):
        assert states[atoms].tolist() == holds


@pytest.mark.parametrize("pooling", ["inclusive", "exclusive", "product"])
@pytest.mark.parametrize("in_plate", [True, False])
def test_the_fused_guide_draws_for_the_model(pooling, in_plate):
    fusion = fuse(parties(in_plate), pooling, prior=model)
    frames, count = 15, 60
    names = [f"state_{t}" for t in range(frames)]
    sites = [*names, "transition", "frame_7"]
    predictive = Predictive(model, guide=fusion.guide, num_samples=count, return_sites=sites)
    draws = predictive(fusion.num_atoms, frames, in_plate)
    path = torch.stack([draws[name].flatten() for name in names])
    near = torch.cdist(draws["frame_7"].reshape(count, DIM), MEANS).argmin(1)
    assert torch.equal(true_states(fusion)[path[7]], near)
    # Moves are those of the drawn matrices, which are those of the posterior.
    moves = draws["transition"].reshape(count, 4, 4)
    chance = moves[torch.arange(count), path[:-1]].flatten(0, 1)
    taken = torch.nn.functional.one_hot(path[1:].flatten(), 4).double()
    five_sd = 5 * (chance * (1 - chance)).sum(0).sqrt()
    assert bool(((taken - chance).sum(0).abs() < five_sd).all())
    alpha = fusion.posterior.decomposed["transition"].params["concentration"]
    row = dist.Dirichlet(alpha)
    assert bool(((moves.mean(0) - row.mean).abs() < 5 * (row.variance / count).sqrt()).all())


class TestStickyPrior:
    """``product``: the prior, and everybody's counts on top."""

    @pytest.mark.parametrize("in_plate", [True, False])
    def test_counts_add_up(self, in_plate):
        fusion = fuse(parties(in_plate), "product", prior=model)
        states = true_states(fusion)
        truth = {"initial": torch.ones(4).double(), "transition": sticky(4)}
        place = states.argsort()  # the atom of each true state
        for seed, holds in enumerate(HOLDS):
            seen, atoms = evidence(holds, seed), place[holds]
            truth["initial"][atoms] += seen["starts"]
            truth["transition"][atoms[:, None], atoms] += seen["moves"]
        for site, expected in truth.items():
            actual = fusion.posterior.decomposed[site].params["concentration"]
            torch.testing.assert_close(actual, expected)

    def test_weights_of_parties_weigh_counts(self):
        weights = torch.tensor([2.0, 0.5, 1.0, 0.5]).double()
        fusion = fuse(parties(), "product", prior=model, weights=weights)
        place = true_states(fusion).argsort()
        truth = sticky(4)
        for seed, (holds, w) in enumerate(zip(HOLDS, weights, strict=True)):
            atoms = place[holds]
            truth[atoms[:, None], atoms] += w * evidence(holds, seed)["moves"]
        actual = fusion.posterior.factors["transition"].concentration
        torch.testing.assert_close(actual, truth)

    def test_a_row_of_a_symmetric_prior_is_enough(self):
        base = {**BASE, "transition": dist.Dirichlet(torch.full((2,), CALM).double())}
        whole = {**base, "transition": dist.Dirichlet(torch.full((3, 3), CALM).double())}
        one, other = (fuse(parties(), "product", prior=b) for b in (base, whole))
        torch.testing.assert_close(
            one.posterior.factors["transition"].concentration,
            other.posterior.factors["transition"].concentration,
        )

    def test_guides_whose_models_have_it(self):
        guides = []
        for num_states, stay in ((2, STICKY), (3, STICKY), (3, 2 * STICKY)):

            def chain(num_states=num_states, stay=stay):
                alpha = CALM + stay * torch.eye(num_states)
                pyro.sample("transition", dist.Dirichlet(alpha).to_event(1))

            guides.append(AutoNormal(chain))
            guides[-1]()
        base = resolve_prior(None, guides[:2], ["transition"])
        assert prior_fill("transition", base, base["transition"], (0, 1)) == (CALM, CALM + STICKY)
        with pytest.raises(StructureError, match="'transition': the model of guide 1 has another"):
            resolve_prior(None, guides[::2], ["transition"])

    @pytest.mark.parametrize(
        ("alpha", "message"),
        [
            (sticky(3) + torch.tensor([0.0, 1.0, 0.0]), "several values on its diagonal"),
            (sticky(3) + torch.eye(3)[0].diag(), "several values on its diagonal"),
            (sticky(3)[0], "several values on its diagonal"),
            (sticky(1), "of one component"),
        ],
        ids=["column", "one stays longer", "row", "one state"],
    )
    def test_a_prior_that_depends_on_the_order(self, alpha, message):
        base = {**BASE, "transition": dist.Dirichlet(alpha)}
        with pytest.raises(StructureError, match=f"site 'transition'.*{message}"):
            fuse(parties(), "product", prior=base)
