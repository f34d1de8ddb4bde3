# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Label switching: permutations that were put in are undone up to one that is common to all draws;
where none were, nothing is changed."""

import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch.distributions import constraints

from pyro_fusion import DrawsError, Posterior, from_draws
from pyro_fusion.families import Factor
from pyro_fusion.readers.draws import read_draws
from pyro_fusion.readers.draws.relabel import _code_length, permuted, relabel

N = 1000


def shuffled(value: Tensor, order: Tensor, *axes: int) -> Tensor:
    """Each draw's components in another order, on these axes."""
    rows = torch.arange(len(value)).unsqueeze(1)
    for axis in axes:
        value = value.movedim(axis + 1, 1)[rows, order].movedim(1, axis + 1)
    return value


def orders(how: str, n: int, size: int) -> Tensor:
    given = torch.arange(size).repeat(n, 1)
    if how == "always":
        return torch.rand(n, size).argsort(1)
    if how == "chain":  # the first quarter settled in another labelling
        given[: n // 4] = given[: n // 4].roll(1, 1)
    if how == "rarely":
        given[::50] = given[::50].flip(1)
    return given


def fit(labels: dict[str, tuple[str | None, ...]], supports: dict[str, object] | None = None):
    def factor(site: str, value: Tensor) -> Factor:
        chosen = {k: v for k, v in (supports or {}).items() if k == site}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is lost before
            posterior = from_draws(
                {site: value},
                axes={site: labels[site]},
                supports=chosen,
                relabel=False,
                max_rhat=None,
                min_ess=None,
            )
        return posterior.decomposed[site]

    return factor


def mixture(n: int, size: int, dim: int, separation: float) -> Tensor:
    centres = separation * torch.randn(size, dim)
    return centres + torch.randn(n, size, dim)


AXES = {"loc": ("component", None), "weights": ("component",)}
SIMPLEX = {"weights": constraints.simplex}


@pytest.mark.parametrize("how", ["always", "chain", "rarely"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestUndoes:
    def test_exactly(self, how, dtype):
        """All that has the label is as it was, up to one order of all draws."""
        truth = {
            "loc": mixture(N, 5, 3, 10.0).to(dtype),
            "weights": dist.Dirichlet(torch.arange(1.0, 6)).sample([N]).to(dtype),
        }
        order = orders(how, N, 5)
        draws = {k: shuffled(v, order, 0) for k, v in truth.items()}
        reading = read_draws(draws, axes=AXES, supports=SIMPLEX)
        right = read_draws(truth, axes=AXES, supports=SIMPLEX, relabel=False)
        loc, expected = (r.posterior.factors["loc"].mean for r in (reading, right))
        same = torch.cdist(expected, loc).argmin(1)
        assert same.sort().values.tolist() == list(range(5))
        for site, f in right.posterior.decomposed.items():
            g = reading.posterior.permute("component", same).decomposed[site]
            for name, value in f.params.items():
                torch.testing.assert_close(g.params[name], value, rtol=1e-5, atol=1e-5)
        switched = {"always": 0.98, "chain": 0.25, "rarely": 0.02}[how]
        assert reading.relabelled["component"] == pytest.approx(switched, abs=0.015)
        assert reading.ambiguous["component"] == 0
        assert reading.rhat["loc"] < 1.02
        assert reading.ess["loc"] > 0.7 * N

    def test_families_of_the_values(self, how, dtype):
        truth = dist.Gamma(torch.tensor([20.0, 200.0, 2000.0], dtype=dtype), 1.0).sample([N])
        order = orders(how, N, 3)
        draws = {"rate": shuffled(truth, order, 0)}
        reading = read_draws(draws, axes={"rate": "c"}, families=dist.Gamma)
        found = reading.posterior.factors["rate"].mean.sort().values
        torch.testing.assert_close(found, truth.mean(0), rtol=1e-5, atol=0)


class TestLabels:
    def test_both_axes_of_a_transition_matrix(self):
        rows = torch.tensor([[50.0, 2.0, 30.0], [4.0, 40.0, 6.0], [20.0, 8.0, 70.0]])
        truth = {"loc": mixture(N, 3, 2, 10.0), "t": dist.Dirichlet(rows).sample([N])}
        order = orders("always", N, 3)
        draws = {"loc": shuffled(truth["loc"], order, 0), "t": shuffled(truth["t"], order, 0, 1)}
        labels = {"loc": ("state", None), "t": ("state", "state")}
        supports = {"t": constraints.simplex}
        found = relabel(draws, labels, fit(labels, supports), 0)["state"].order
        again = order.gather(1, found)
        assert (again == again[0]).all()
        t = permuted(draws["t"], labels["t"], "state", found)
        for n in range(0, N, 100):
            assert torch.equal(t[n], truth["t"][n][again[0]][:, again[0]])

    def test_linked_labels(self):
        """Units of two layers change places, and the weights between them know both."""
        truth = {
            "b1": mixture(N, 3, 1, 20.0).squeeze(-1),
            "W2": 30 * torch.randn(4, 3) + torch.randn(N, 4, 3),
        }
        first, second = orders("always", N, 3), orders("always", N, 4)
        draws = {
            "b1": shuffled(truth["b1"], first, 0),
            "W2": shuffled(shuffled(truth["W2"], first, 1), second, 0),
        }
        labels = {"b1": ("hidden1",), "W2": ("hidden2", "hidden1")}
        found = relabel(draws, labels, fit(labels), 0)
        assert set(found) == {"hidden1", "hidden2"}
        for label, order in (("hidden1", first), ("hidden2", second)):
            again = order.gather(1, found[label].order)
            assert (again == again[0]).all()

    def test_two_labels_one_of_which_switched(self):
        draws = {"a": mixture(N, 3, 2, 10.0), "b": mixture(N, 4, 1, 20.0).squeeze(-1)}
        draws["a"] = shuffled(draws["a"], orders("always", N, 3), 0)
        reading = read_draws(draws, axes={"a": ("x", None), "b": ("y",)})
        assert reading.relabelled["x"] > 0.5
        assert reading.relabelled["y"] == 0

    def test_a_label_that_only_follows(self):
        """Weights alone do not tell components apart in this way: they are left as they are."""
        draws = {"weights": dist.Dirichlet(torch.tensor([20.0, 5.0])).sample([N])}
        reading = read_draws(draws, axes={"weights": "component"}, supports=SIMPLEX)
        assert reading.relabelled == {"component": 0.0}

    def test_one_component(self):
        assert read_draws({"x": torch.randn(N, 1)}, axes={"x": "c"}).relabelled == {"c": 0.0}

    def test_sizes_that_do_not_agree(self):
        with pytest.raises(ValueError, match="label 'c' has size 2 at site 'y'"):
            read_draws({"x": torch.randn(N, 3), "y": torch.randn(N, 2)}, axes={"x": "c", "y": "c"})


def same_bits(a: Posterior, b: Posterior) -> bool:
    return all(
        torch.equal(value, b.decomposed[site].params[name])
        for site, f in a.decomposed.items()
        for name, value in f.params.items()
    )

    def test_two_labels_of_one_site(self):
        """Along only one did it switch, and the site that has it alone does not tell."""
        n = 800
        centres = torch.tensor([[0.0, 4.0], [0.0, 4.0], [4.0, 0.0]])
        x, chosen = centres + 0.3 * torch.randn(n, 3, 2), orders("always", n, 2)
        draws = {"x": shuffled(x, chosen, 1), "y": torch.randn(n, 2)}
        reading = read_draws(draws, axes={"x": ("feature", "c"), "y": "c"})
        assert 0.4 < reading.relabelled["c"] < 0.6
        assert reading.relabelled["feature"] == 0
        assert reading.posterior.factors["x"].stddev.max() < 0.35


class TestLeavesAlone:
    @pytest.mark.parametrize("separation", [0.0, 0.5, 1.0, 3.0, 30.0])
    @pytest.mark.parametrize("size", [2, 8])
    def test_components_that_did_not_switch(self, separation, size):
        """However much they overlap: a label may be that of schools."""
        draws = {"x": separation * torch.arange(size) + torch.randn(N, size)}
        done, left = (read_draws(draws, axes={"x": "c"}, relabel=r) for r in (True, False))
        assert done.relabelled == {"c": 0.0}
        assert same_bits(done.posterior, left.posterior)

    def test_schools(self):
        """Partly pooled: they depend on each other, in the tails too."""
        mu, tau = torch.randn(N, 1), torch.randn(N, 1).exp()
        draws = {"theta": mu + tau * (torch.randn(8) + 0.5 * torch.randn(N, 8))}
        with pytest.warns(UserWarning, match="the projection loses"):
            done = read_draws(draws, axes={"theta": "school"})
        assert done.relabelled == {"school": 0.0}

    def test_tails_that_the_family_does_not_have(self):
        draws = {"x": torch.randn(N, 3, dtype=torch.float64).exp() + torch.arange(3)}
        with pytest.warns(UserWarning, match="the projection loses"):
            done = read_draws(draws, axes={"x": "c"})
        assert done.relabelled == {"c": 0.0}

    def test_by_request(self):
        draws = {"x": shuffled(mixture(N, 3, 2, 10.0), orders("always", N, 3), 0)}
        with pytest.warns(UserWarning, match="the projection loses"):
            left = read_draws(draws, axes={"x": ("c", None)}, relabel=False)
        assert left.relabelled == {"c": 0.0}
        means = left.posterior.factors["x"].mean
        assert (means - means.mean(0)).abs().max() < 2  # of components 10 apart

    def test_many_components(self):
        """Local variables, say: a label of which there is no end."""
        draws = {"z": torch.randn(100, 300)}
        reading = read_draws(draws, axes={"z": "data"}, min_ess=None, max_rhat=None)
        assert reading.relabelled == {"data": 0.0}


class TestHonest:
    def test_overlapping_components_that_switched(self):
        """Two of four are close: their order is a toss-up in many draws, as is said."""
        centres = torch.tensor([0.0, 1.0, 20.0, 40.0])
        x = shuffled(centres + torch.randn(N, 4), orders("always", N, 4), 0)
        with pytest.warns(UserWarning, match="components along 'c' overlap: in [4-9].% of the"):
            reading = read_draws({"x": x}, axes={"x": "c"})
        assert reading.ambiguous["c"] > 0.4
        means = reading.posterior.factors["x"].mean.sort().values
        torch.testing.assert_close(means[2:], centres[2:], rtol=0, atol=0.15)

    def test_chains_that_found_other_components(self):
        """No order makes them agree: that is no label switching, and is refused."""
        x = torch.tensor([0.0, 10.0, 20.0]) + torch.randn(4, 250, 3)
        x[0, :, 2] += 30
        with pytest.raises(DrawsError, match="R-hat of site 'x'"):
            from_draws({"x": x}, axes={"x": "c"}, group_by_chain=True)

    def test_chains_in_other_labellings_only_pass_when_labelled(self):
        x = torch.tensor([0.0, 10.0, 20.0]) + torch.randn(4, 250, 3)
        x[0] = x[0].roll(1, -1)
        with pytest.raises(DrawsError, match="label axes whose components have no order"):
            from_draws({"x": x}, group_by_chain=True)
        reading = read_draws({"x": x}, axes={"x": "c"}, group_by_chain=True)
        assert reading.relabelled["c"] == 0.25
        assert reading.rhat["x"] < 1.02
        assert reading.posterior.factors["x"].stddev.max() < 1.1


class TestCode:
    """The length of a code for the orders is at least minus the logarithm of a probability."""

    @pytest.mark.parametrize(("n", "size"), [(1, 2), (3, 2), (2, 3)])
    def test_probabilities_add_up_to_less_than_one(self, n, size):
        every = [torch.tensor(p) for p in itertools.permutations(range(size))]
        total = 0.0
        for sequence in itertools.product(every, repeat=n):
            order = torch.stack(sequence)
            if (order != order[0]).any():
                total += math.exp(-_code_length(order))
        assert total <= 1
        assert _code_length(every[0].expand(5, size)) == 0

    def test_no_more_than_uniform(self):
        order = torch.rand(500, 6).argsort(1)
        uniform = 500 * math.log(math.factorial(6))
        assert _code_length(order) <= (uniform + math.log(2)) * (1 + 1e-12)
        rare = torch.arange(6).repeat(500, 1)
        rare[7] = rare[7].flip(0)
        assert _code_length(rare) < 30


def gaussian_mixture(x: Tensor) -> None:
    with pyro.plate("component", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        both = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(loc, 1.0))
        pyro.sample("x", both, obs=x)


def test_two_chains_of_a_mixture() -> None:
    """Of a real sampler, which starts each in another labelling."""
    x = torch.cat([torch.randn(30) - 3, torch.randn(30) + 3])
    chains = []
    for start in ([-3.0, 3.0], [3.0, -3.0]):
        kernel = NUTS(gaussian_mixture)
        initial = {"loc": torch.tensor(start)}
        mcmc = MCMC(kernel, 100, 50, initial_params=initial, disable_progbar=True)
        mcmc.run(x)
        chains.append(mcmc.get_samples()["loc"])
    reading = read_draws({"loc": torch.stack(chains)}, gaussian_mixture, x, group_by_chain=True)
    assert reading.relabelled["component"] == 0.5
    # Of each component about thirty data of variance 1.
    found = reading.posterior.factors["loc"]
    means = torch.stack([x[:30].mean(), x[30:].mean()])
    assert (found.mean.sort().values - means).abs().max() < 0.15
    assert (found.stddev * math.sqrt(30) - 1).abs().max() < 0.35
