# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A second round: each party's prior is its own atoms, in its order, bounded; models under it
against models by hand; and the prior taken out again, against Bayes' rule."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor

from pyro_fusion import (
    FixedAtoms,
    Fusion,
    NormalWishart,
    ParameterError,
    Posterior,
    StructureError,
    UnsupportedFamilyError,
    from_guide,
    fuse,
)
from pyro_fusion.fusion.prior_exchange import exchange_prior
from tests.fusion.parties import BASE, HOLDS, parties

TWO = {"north": [0, 1], "south": [1, 2, 0]}
CENTRES = torch.tensor([-6.0, 0.0, 6.0], dtype=torch.float64)


def line(scale: float = 0.25) -> Fusion:
    """Two parties of Normals on a line, which have some of three centres exactly."""
    given = {
        name: Posterior({"loc": dist.Normal(CENTRES[seen], scale)}, {"loc": "component"})
        for name, seen in TWO.items()
    }
    return fuse(given, dispersion=4.0)


# -- what the prior is -----------------------------------------------------------------------------


def test_each_party_has_its_own_atoms_in_its_order() -> None:
    fusion = fuse(parties())
    for s, (prior, p) in enumerate(zip(fusion.as_prior().values(), parties(), strict=True)):
        atoms = fusion.assignment[s]
        torch.testing.assert_close(prior.atoms["component"], atoms)
        fused = fusion.posterior.factors
        torch.testing.assert_close(prior.factors["loc"].mean, fused["loc"].mean[atoms])
        assert prior.factors["scale"].batch_shape == p.factors["scale"].batch_shape
        assert prior.posterior.axes == {k: p.axes[k] for k in ("loc", "scale")}
        assert len(prior.atoms["component"]) == len(HOLDS[s])


def test_all_atoms_are_those_of_the_fusion() -> None:
    fusion = fuse(parties())
    for prior in fusion.as_prior(atoms="all", sites=["loc"]).values():
        assert set(prior.factors) == {"loc"}
        torch.testing.assert_close(prior.factors["loc"].mean, fusion.posterior.factors["loc"].mean)


def test_a_normal_is_as_wide_as_parties_may_differ() -> None:
    # The mean variance of the members, times T = 4: sd .25 becomes .5, however sure the atom is.
    for pooling in ("exclusive", "product"):
        given = list(line().parties.values())
        prior = {"loc": dist.Normal(torch.tensor(0.0).double(), 10.0)}
        fusion = fuse(given, pooling, prior=prior, dispersion=4.0)
        assert fusion.num_atoms == 3
        for p in fusion.as_prior().values():
            sd = p.factors["loc"].stddev
            torch.testing.assert_close(sd, torch.full_like(sd, 0.5))


def test_parties_that_differ_by_the_dispersion_are_within_the_prior() -> None:
    # Parties' own centres are about a common one with variance (T - 1) s², and the means of their
    # posteriors about these with s². Then a party's own centre less the atom, the mean of ten, has
    # variance (.8 (T - 1) + .1 T) s² = 7.3 s², of which the prior says T s²: what it says to hold
    # in 80 % holds in 2 Φ(1.2816 √(9 / 7.3)) - 1. Of 400, within three standard errors.
    generator = torch.Generator().manual_seed(1)
    dispersion, s = 9.0, 0.5
    noise = torch.randn(2, 10, 40, generator=generator, dtype=torch.float64)
    own = 1e3 * torch.arange(40) + s * (dispersion - 1) ** 0.5 * noise[0]
    given = [
        Posterior({"loc": dist.Normal(m, s)}, {"loc": "component"}) for m in own + s * noise[1]
    ]
    fusion = fuse(given, assignment_prior=FixedAtoms(40), dispersion=dispersion)
    priors = [p.factors["loc"] for p in fusion.as_prior().values()]
    z = [(x - d.mean) / d.stddev for x, d in zip(own, priors, strict=True)]
    inside = (torch.stack(z).abs() < 1.2816).double().flatten()
    expected = math.erf(1.2816 * (9 / 7.3) ** 0.5 / 2**0.5)
    error = (expected * (1 - expected) / len(inside)) ** 0.5
    assert abs(float(inside.mean()) - expected) < 3 * error


def test_counts_are_bounded_by_points() -> None:
    given = [
        Posterior({"topics": dist.Dirichlet(torch.tensor(rows))}, {"topics": "topic"})
        for rows in ([[90.0, 5.0, 5.0], [4.0, 4.0, 92.0]], [[3.0, 4.0, 93.0]])
    ]
    fusion = fuse(given)
    assert fusion.num_atoms == 2
    for prior in fusion.as_prior(4.0).values():
        total = prior.factors["topics"].concentration.sum(-1)
        torch.testing.assert_close(total, torch.full_like(total, 4 * 3**0.5))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"strength": 0.0}, ParameterError, "positive number of points, got 0.0"),
        ({"strength": float("nan")}, ParameterError, "positive number of points, got nan"),
        ({"atoms": "mine"}, ParameterError, "'own' or 'all', got 'mine'"),
        ({"sites": ["weights"]}, StructureError, "site 'weights': expected sites with one label"),
        ({"sites": ["noise"]}, StructureError, r"of which there are \['loc', 'scale'\]"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fuse(parties()).as_prior(**options)


def test_a_family_without_a_bound_is_named() -> None:
    given = [
        Posterior({"rate": dist.Poisson(torch.tensor([3.0, more]))}, {"rate": "component"})
        for more in (50.0, 51.0)
    ]
    with pytest.raises(UnsupportedFamilyError, match="Poisson cannot be bounded") as e:
        fuse(given).as_prior()
    assert e.value.site == "rate"


def test_without_a_label_there_is_no_prior_to_make() -> None:
    given = [Posterior({"a": dist.Normal(torch.tensor(x), 1.0)}) for x in (1.0, 2.0)]
    with pytest.raises(StructureError, match="no site tells components apart"):
        fuse(given).as_prior()


def test_components_are_selected() -> None:
    prior = line().as_prior()["south"]
    kept = prior.select("component", [2, 0])
    torch.testing.assert_close(kept.factors["loc"].mean, CENTRES[[0, 1]])
    torch.testing.assert_close(kept.atoms["component"], prior.atoms["component"][[2, 0]])
    with pytest.raises(
        StructureError, match="party south: label 'component' has components 0 to 2"
    ):
        prior.select("component", [3])


# -- as the prior of a Pyro model ------------------------------------------------------------------

DATA = torch.tensor([-6.1, 0.2, 6.3, 5.8, -0.1], dtype=torch.float64)


def by_plate(size: int) -> None:
    noise = pyro.sample("noise", dist.Gamma(torch.tensor(2.0).double(), 1.0))
    with pyro.plate("component", size):
        loc = pyro.sample("loc", dist.Normal(torch.tensor(0.0).double(), 10.0))
    with pyro.plate("data", len(DATA)):
        mix = dist.Categorical(torch.ones(size).double() / size)
        pyro.sample("x", dist.MixtureSameFamily(mix, dist.Normal(loc, noise)), obs=DATA)


def by_event(size: int) -> None:
    noise = pyro.sample("noise", dist.Gamma(torch.tensor(2.0).double(), 1.0))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(size).double(), 10.0).to_event(1))
    with pyro.plate("data", len(DATA)):
        mix = dist.Categorical(torch.ones(size).double() / size)
        pyro.sample("x", dist.MixtureSameFamily(mix, dist.Normal(loc, noise)), obs=DATA)


def by_hand(loc_prior: dist.Normal) -> None:
    size = len(loc_prior.mean)
    noise = pyro.sample("noise", dist.Gamma(torch.tensor(2.0).double(), 1.0))
    with pyro.plate("component", size):
        loc = pyro.sample("loc", loc_prior)
    with pyro.plate("data", len(DATA)):
        mix = dist.Categorical(torch.ones(size).double() / size)
        pyro.sample("x", dist.MixtureSameFamily(mix, dist.Normal(loc, noise)), obs=DATA)


@pytest.mark.parametrize("model", [by_plate, by_event])
def test_the_model_under_the_prior_is_the_one_by_hand(model: Callable[[int], None]) -> None:
    prior = line().as_prior()["south"]
    wrapped = prior.to_pyro(model)
    values = {"loc": torch.tensor([0.5, 4.0, -7.0]).double(), "noise": torch.tensor(0.7).double()}
    expected = dist.Normal(CENTRES[TWO["south"]], 0.5)
    hand = poutine.trace(poutine.condition(by_hand, values)).get_trace(expected)
    found = poutine.trace(poutine.condition(wrapped, values)).get_trace(3)
    assert float(found.log_prob_sum()) == pytest.approx(float(hand.log_prob_sum()))
    # The model itself keeps its own prior.
    own = poutine.trace(poutine.condition(model, values)).get_trace(3)
    before, after = own.nodes["loc"]["fn"], found.nodes["loc"]["fn"]
    assert (after.batch_shape, after.event_shape) == (before.batch_shape, before.event_shape)
    assert abs(float(own.log_prob_sum() - hand.log_prob_sum())) > 1


def test_particles_and_draws_have_their_own_plates() -> None:
    def no_data() -> None:
        with pyro.plate("component", 3):
            pyro.sample("loc", dist.Normal(torch.tensor(0.0).double(), 10.0))

    wrapped = line().as_prior()["south"].to_pyro(no_data)
    draws = Predictive(wrapped, num_samples=4000, parallel=True)()["loc"]
    assert draws.shape == (4000, 3)
    error = 0.5 / 4000**0.5
    assert (draws.mean(0) - CENTRES[TWO["south"]]).abs().max() < 4 * error
    # The guide at the prior: the bound is zero, whatever is drawn.
    guide = AutoNormal(wrapped, init_loc_fn=lambda site: CENTRES[TWO["south"]], init_scale=0.5)
    elbo = Trace_ELBO(num_particles=7, vectorize_particles=True)
    assert abs(elbo.loss(wrapped, guide)) < 1e-5


def test_a_refit_is_the_conjugate_posterior() -> None:
    # One observation of each component: precisions add up.
    prior = line().as_prior()["north"]

    def model() -> None:
        with pyro.plate("component", 2):
            loc = pyro.sample("loc", dist.Normal(torch.tensor(0.0).double(), 100.0))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([-4.0, 1.0]).double())

    wrapped = prior.to_pyro(model)
    guide = AutoNormal(wrapped)
    guide()
    with torch.no_grad():  # at the exact answer, no gradient is left
        guide.locs.loc.copy_((CENTRES[:2] * 4 + torch.tensor([-4.0, 1.0])) / 5)
        guide.scales.loc = torch.full((2,), 5**-0.5).double()
    elbo = Trace_ELBO(num_particles=1)
    losses = torch.tensor([elbo.loss(wrapped, guide) for _ in range(20)])
    # The bound is tight there: it is the evidence, whatever is drawn.
    evidence = dist.Normal(CENTRES[:2], (0.25 + 1) ** 0.5).log_prob(torch.tensor([-4.0, 1.0]))
    torch.testing.assert_close(-losses.double(), evidence.sum().expand(20), rtol=1e-5, atol=1e-5)


def test_a_site_in_several_shapes_is_an_error_that_names_both() -> None:
    prior = line().as_prior()["north"]
    with pytest.raises(
        StructureError, match=r"party north, site 'loc'.*shape \(2,\).*batch shape \(3,\)"
    ):
        prior.to_pyro(by_plate)(3)


def test_a_model_without_the_site_is_an_error() -> None:
    def other() -> None:
        pyro.sample("centre", dist.Normal(0.0, 1.0))

    with pytest.raises(StructureError, match=r"no site 'loc'.*its sites are \['centre'\]"):
        line().as_prior()["north"].to_pyro(other)()


def test_each_run_of_the_model_is_checked() -> None:
    def sometimes(there: bool) -> None:
        if there:
            by_plate(2)

    wrapped = line().as_prior()["north"].to_pyro(sometimes)
    wrapped(True)
    with pytest.raises(StructureError, match="the model has no site 'loc'"):
        wrapped(False)


def test_a_model_of_another_support_is_an_error() -> None:
    def positive() -> None:
        with pyro.plate("component", 2):
            pyro.sample("loc", dist.Gamma(torch.tensor(1.0).double(), 1.0))

    with pytest.raises(StructureError, match=r"outside the support .*of the model's own Gamma"):
        line().as_prior()["north"].to_pyro(positive)()


def test_an_observed_site_stays_as_it_is() -> None:
    def seen() -> None:
        with pyro.plate("component", 2):
            pyro.sample("loc", dist.Normal(0.0, 1.0), obs=torch.zeros(2))

    trace = poutine.trace(line().as_prior()["north"].to_pyro(seen)).get_trace()
    expected = dist.Normal(torch.zeros(2), 1.0).log_prob(torch.zeros(2)).sum()
    assert float(trace.log_prob_sum()) == pytest.approx(float(expected))


def test_numpyro_has_the_same_density() -> None:
    numpyro = pytest.importorskip("numpyro")
    import jax.numpy as jnp
    import numpyro.distributions as ndist
    from numpyro.infer.util import log_density

    data = jnp.asarray(DATA.numpy())

    def model(size: int) -> None:
        noise = numpyro.sample("noise", ndist.Gamma(2.0, 1.0))
        with numpyro.plate("component", size):
            loc = numpyro.sample("loc", ndist.Normal(0.0, 10.0))
        with numpyro.plate("data", len(DATA)):
            mix = ndist.Categorical(jnp.ones(size) / size)
            numpyro.sample("x", ndist.MixtureSameFamily(mix, ndist.Normal(loc, noise)), obs=data)

    given = {k: p.to(dtype=torch.float32) for k, p in line().parties.items()}
    prior = fuse(given, dispersion=4.0).as_prior()["south"]
    values = {"loc": torch.tensor([0.5, 4.0, -7.0]).double(), "noise": torch.tensor(0.7).double()}
    there = {k: jnp.asarray(v.numpy()) for k, v in values.items()}
    found, _ = log_density(prior.to_numpyro(model), (3,), {}, there)
    hand = dist.Normal(CENTRES[TWO["south"]], 0.5)
    expected = poutine.trace(poutine.condition(by_hand, values)).get_trace(hand).log_prob_sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(StructureError, match=r"party south, site 'loc'.*batch shape \(2,\)"):
        log_density(prior.to_numpyro(model), (2,), {}, {**there, "loc": there["loc"][:2]})
    with pytest.raises(StructureError, match="the model has no site 'loc'"):
        log_density(prior.to_numpyro(lambda: None), (), {}, {})


# -- the prior taken out again ---------------------------------------------------------------------


def test_the_prior_is_divided_out_by_bayes_rule() -> None:
    # Normal means with known noise: posterior under N(m, v) has precision 1/v + n.
    prior = line().as_prior()["north"]
    points, mean = torch.tensor([4.0, 9.0]).double(), torch.tensor([-5.0, 1.0]).double()

    def posterior(loc: Tensor, variance: float) -> Posterior:
        precision = 1 / variance + points
        loc = (loc / variance + points * mean) / precision
        return Posterior({"loc": dist.Normal(loc, precision.rsqrt())}, {"loc": "component"})

    fitted = posterior(CENTRES[:2], 0.25)
    common = {"loc": dist.Normal(torch.tensor(1.0).double(), 3.0)}
    found = prior.divided_out(fitted, common).factors["loc"]
    exact = posterior(torch.ones(2).double(), 9.0).factors["loc"]
    torch.testing.assert_close(found.mean, exact.mean)
    torch.testing.assert_close(found.stddev, exact.stddev)


def test_a_prior_of_its_own_shape_and_a_joint_family_are_divided_out_too() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 30, 3, generator=generator, dtype=torch.float64) + 1e4

    def conjugate(loc: Tensor, kappa: float, df: float, spread: Tensor) -> NormalWishart:
        mean, n = x.mean(1), x.shape[1]
        offset = mean - loc
        scatter = (x - mean[:, None]).mT @ (x - mean[:, None])
        between = kappa * n / (kappa + n) * offset[:, :, None] * offset[:, None]
        new = (kappa * loc + n * mean) / (kappa + n)
        counts = torch.full((2,), kappa + n).double(), torch.full((2,), df + n).double()
        return NormalWishart(new, *counts, precision_matrix=spread + scatter + between)

    own_loc, spread = 1e4 + torch.randn(2, 3, generator=generator).double(), torch.eye(3).double()
    own = NormalWishart(
        own_loc, torch.full((2,), 10.0), torch.full((2,), 30.0), precision_matrix=30 * spread
    )
    common = NormalWishart(torch.full((3,), 1e4).double(), 0.5, 4.0, precision_matrix=2 * spread)
    axes = {"atom": "component"}
    fitted = Posterior({"atom": conjugate(own_loc, 10.0, 30.0, 30 * spread)}, axes)
    found = exchange_prior(fitted, {"atom": own}, {"atom": common}).factors["atom"]
    exact = conjugate(common.loc, 0.5, 4.0, 2 * spread)
    torch.testing.assert_close(found.loc, exact.loc)
    torch.testing.assert_close(found.concentration, exact.concentration)
    torch.testing.assert_close(found.df, exact.df)
    torch.testing.assert_close(found.precision_matrix, exact.precision_matrix)


def test_other_sites_stay_as_they_are() -> None:
    (first, *_) = parties()
    own = {"loc": dist.Normal(torch.zeros(2).double(), 10.0).to_event(1)}
    found = exchange_prior(first, own, BASE).decomposed
    for site in ("scale", "weights", "noise"):
        for name, value in first.decomposed[site].params.items():
            assert torch.equal(found[site].params[name], value)
    loc, before = found["loc"].params["scale"], first.decomposed["loc"].params["scale"]
    torch.testing.assert_close(loc**-2, before**-2 - 10.0**-2 + 20.0**-2)


def test_an_improper_quotient_names_party_and_site() -> None:
    prior = line().as_prior()["north"]
    common = {"loc": dist.Normal(torch.tensor(0.0).double(), 3.0)}
    wide = Posterior({"loc": dist.Normal(CENTRES[:2], 0.6)}, {"loc": "component"})
    with pytest.raises(ParameterError, match=r"party north, site 'loc': .*is improper"):
        prior.divided_out(wide, common)


def test_a_dropped_component_is_an_error_that_says_what_to_do() -> None:
    prior = line().as_prior()["south"]
    common = {"loc": dist.Normal(torch.tensor(0.0).double(), 3.0)}
    fitted = Posterior({"loc": dist.Normal(CENTRES[:2], 0.1)}, {"loc": "component"})
    with pytest.raises(StructureError, match=r"party south, site 'loc'.*select\(label, kept\)"):
        prior.divided_out(fitted, common)
    kept = prior.select("component", [2, 0])
    assert kept.divided_out(fitted, common).components("component") == 2


def test_priors_that_do_not_fit_are_refused() -> None:
    fitted = Posterior({"loc": dist.Normal(CENTRES, 0.1)}, {"loc": "component"})
    normal = {"loc": dist.Normal(torch.tensor(0.0).double(), 3.0)}
    with pytest.raises(StructureError, match=r"`own` is .*expected .* as the posterior"):
        exchange_prior(fitted, {"loc": dist.LogNormal(torch.tensor(0.0).double(), 3.0)}, normal)
    with pytest.raises(StructureError, match="`own` has site 'x'"):
        exchange_prior(fitted, {"x": normal["loc"]}, normal)
    with pytest.raises(StructureError, match="`common` lacks site 'loc'"):
        exchange_prior(fitted, normal, {})


# -- the whole -------------------------------------------------------------------------------------


def test_a_second_round_of_pyro_models() -> None:
    truth, found = [[0, 1], [2, 0]], {}
    generator = torch.Generator().manual_seed(0)
    data = [
        torch.cat([CENTRES[k] + torch.randn(40, generator=generator).double() for k in seen])
        for seen in truth
    ]

    def model(x: Tensor) -> None:
        with pyro.plate("component", 2):
            loc = pyro.sample("loc", dist.Normal(torch.tensor(0.0).double(), 10.0))
        mix = dist.Categorical(torch.ones(2).double() / 2)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MixtureSameFamily(mix, dist.Normal(loc, 1.0)), obs=x)

    def fit(program: Callable[[Tensor], None], x: Tensor, start: Tensor) -> Posterior:
        pyro.clear_param_store()
        guide = AutoNormal(program, init_loc_fn=lambda site: start.clone(), init_scale=0.2)
        svi = SVI(program, guide, Adam({"lr": 0.1}), Trace_ELBO())
        pyro.set_rng_seed(0)
        for _ in range(40):
            svi.step(x)
        return from_guide(guide)

    for s, x in enumerate(data):
        found[f"{s}"] = fit(model, x, torch.tensor([-3.0, 3.0]).double())
    first = fuse(found)
    assert first.num_atoms == 3
    again = {
        name: fit(prior.to_pyro(model), data[int(name)], prior.factors["loc"].mean)
        for name, prior in first.as_prior().items()
    }
    second = fuse(again)
    assert second.num_atoms == 3
    assert second.party_names == ("0", "1")
    atoms = second.posterior.factors["loc"].mean.sort().values
    assert (atoms - CENTRES).abs().max() < 0.5
