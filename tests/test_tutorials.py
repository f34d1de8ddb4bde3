# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The tutorials: each is short, runs as it stands, and finds what can be computed otherwise."""

import ast
import importlib.util
import itertools
import math
import re
from pathlib import Path
from types import ModuleType

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from scipy.optimize import minimize, minimize_scalar
from torch.distributions import kl_divergence

from pyro_fusion import Posterior

FOLDER = Path(__file__).parent.parent / "tutorials"
NAMES = {"counts", "learn_alpha", "random_effects", "trust"}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tutorials_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_to_one(assignment: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether two ways to number the atoms of the components differ in the numbers alone."""
    pairs = set(zip(assignment.tolist(), truth.tolist(), strict=True))
    return len(pairs) == len(assignment.unique()) == len(truth.unique())


def test_all_are_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_at_most_forty_lines(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    lesson = ast.parse(text).body[0]
    assert isinstance(lesson, ast.Expr), "the docstring comes first"
    lines = text.splitlines()[lesson.end_lineno :]
    assert sum(bool(line.strip()) for line in lines) <= 40
    assert len(text.splitlines()) <= 70


@pytest.mark.parametrize("seed", [0, 1])
def test_learn_alpha(seed, capsys):
    num_atoms, shape, mean = load("learn_alpha").main(seed=seed)
    assert num_atoms == 5
    exact = dist.Gamma(2.0 + num_atoms, 1.0 + sum(1 / s for s in range(1, 9)))
    learned = dist.Gamma(shape, shape / mean)
    assert kl_divergence(learned, exact) < 0.01  # the prior is 0.6 away
    assert kl_divergence(dist.Gamma(2.0, 1.0), exact) > 0.3
    assert capsys.readouterr().out.endswith("; exactly Gamma(7, 3.72)\n")


def test_alpha_under_predictive():
    tutorial = load("learn_alpha")
    factors = {"loc": dist.Normal(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), 0.2).to_event(1)}
    parties = [Posterior(factors, {"loc": ("component",)})] * 2
    base = {"loc": dist.Normal(torch.zeros(2), 10.0).to_event(1)}
    with pytest.warns(UserWarning, match="identical"):
        model = tutorial.AlphaModel(parties, pooling="product", prior=base, dispersion=1.0)
    draws = Predictive(model, guide=tutorial.AlphaGuide(model), num_samples=5)()
    assert draws["alpha"].shape[0] == 5
    assert draws["alpha"].unique().numel() == 5


class TestRandomEffects:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_finds_tau(self, seed, capsys):
        found = load("random_effects").main(seed=seed)
        assert abs(found["tau"] / 0.5 - 1) < 0.15
        assignment, truth, loc, scale = found["data"]
        assert one_to_one(assignment, truth)
        groups = [
            (loc[assignment == k].double(), scale[assignment == k].double()) for k in range(4)
        ]

        # The atoms have a flat prior and are integrated out: restricted maximum likelihood.
        def loss(tau):
            total = 0.0
            for x, s in groups:
                v = s**2 + tau**2
                residual = x - (x / v).sum(0) / (1 / v).sum(0)
                total += (v.log() + residual**2 / v).sum() + (1 / v).sum(0).log().sum()
            return float(total)

        best = minimize_scalar(loss, bounds=(0.01, 3.0), method="bounded").x
        assert found["tau"] == pytest.approx(best, rel=0.01)

        # Given tau the atoms are Normal.
        for k, (x, s) in enumerate(groups):
            precision = (1 / (s**2 + best**2)).sum(0)
            mean = (x / (s**2 + best**2)).sum(0) / precision
            sd = precision.rsqrt()
            assert ((found["atoms"].mean[k] - mean) / sd).abs().max() < 0.15
            torch.testing.assert_close(found["atoms"].stddev[k], sd, rtol=0.1, atol=0)

        # What tau means for I², with the typical variance of Higgins and Thompson (2002), eq. 9.
        for (_, s), share in zip(groups, found["shares"], strict=True):
            w = s**-2
            typical = (len(w) - 1) * w.sum(0) / (w.sum(0) ** 2 - (w**2).sum(0))
            assert share == pytest.approx(float(0.25 / (0.25 + typical.mean())), abs=0.2)
        assert sum(found["shares"]) / 4 == pytest.approx(0.71, abs=0.08)
        out = capsys.readouterr().out.splitlines()
        assert out[0] == f"tau = {found['tau']:.3f} (true: 0.5)"
        assert [line[-3:] for line in out[1:]] == [f"{share:.0%}" for share in found["shares"]]

    def test_i_squared(self):
        i_squared = load("random_effects").i_squared
        # Weights 4 and 1, mean 1: Q = 4 · 1 + 1 · 16 = 20, df = 1.
        loc, scale = torch.tensor([[0.0], [5.0]]), torch.tensor([[0.5], [1.0]])
        assert i_squared(loc, scale) == pytest.approx(19 / 20)
        assert i_squared(loc / 10, scale) == 0.0


class TestTrust:
    @staticmethod
    def parties(distance):
        torch.manual_seed(0)
        centres = torch.tensor([[-6.0, 0.0], [0.0, 6.0], [6.0, 0.0]])
        locs = [dist.Normal(centres[torch.randperm(3)], 0.3).sample() for _ in range(8)]
        locs[0] += distance
        return [
            Posterior({"loc": dist.Normal(x, 0.3).to_event(1)}, {"loc": ("component",)})
            for x in locs
        ]

    @staticmethod
    def from_left_to_right(means):
        return means[means[:, 0].argsort()]

    @pytest.mark.parametrize("weight", [1.0, 0.1])
    def test_atoms_follow_a_party_with_a_weight(self, weight):
        weights, atoms = [weight] + [1.0] * 7, load("trust").atoms
        near, far = (self.from_left_to_right(atoms(self.parties(d), weights)) for d in (0, 1000))
        step = torch.full_like(near, 1000 * weight / (7 + weight))
        torch.testing.assert_close(far - near, step, rtol=1e-4, atol=0)

    def test_the_effect_of_an_outlier_is_bounded(self):
        atoms = load("trust").atoms
        distances = [0.0, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0]
        without, *means = [
            self.from_left_to_right(atoms(parties, trust=True))
            for parties in (self.parties(0)[1:], *map(self.parties, distances))
        ]
        effect = [float((m - without).norm(dim=-1).max()) for m in means]
        assert max(effect) < 0.15  # half the scale of a component
        assert all(farther < nearer for nearer, farther in itertools.pairwise(effect[2:]))
        assert effect[-1] < 1e-4

    @pytest.mark.parametrize("distance", [0.0, 2.0])
    def test_trust_and_loss(self, distance):
        tutorial, parties = load("trust"), self.parties(distance)
        means = self.from_left_to_right(tutorial.atoms(parties, trust=True))
        trust = pyro.param("mode").detach().double()
        locs = [self.from_left_to_right(p.factors["loc"].mean).double() for p in parties]
        # All scales are one, so that of the atoms is too.
        d = torch.stack([(x - means).square().sum() / (2 * 0.3**2) for x in locs])
        torch.testing.assert_close(trust, 1 / (1 + 2 * d / tutorial.NU), rtol=1e-3, atol=0)
        mean = sum(t * x for t, x in zip(trust, locs, strict=True)) / trust.sum()
        torch.testing.assert_close(means, mean, rtol=0, atol=1e-4)

    def test_runs(self, capsys):
        load("trust").main(distances=(0, 1000))
        out = capsys.readouterr().out
        near, far = (list(map(float, re.findall(r"\d+\.\d+", x))) for x in out.splitlines())
        assert near == pytest.approx([0.25, 0.29, 0.20], abs=0.011)
        assert far == pytest.approx([176.73, 19.85, 0.25], abs=0.011)


class TestCounts:
    def test_is_that_of_quadrature(self, capsys):
        tutorial = load("counts")
        found = tutorial.main()
        assignment, truth, k, n = (x.double() for x in found["data"])
        assert one_to_one(assignment, truth)
        grid = torch.linspace(-10, 10, 4001, dtype=torch.float64)
        step = float(grid[1] - grid[0])
        worst = 0.0
        for i in range(3):
            mine = assignment == i
            log_p = tutorial.log_likelihood(grid.unsqueeze(1), k[mine], n[mine]).sum(1)
            log_p += tutorial.PRIOR.log_prob(grid)
            log_p -= log_p.logsumexp(0) + math.log(step)
            mean = float((log_p.exp() * grid).sum() * step)
            sd = math.sqrt(float((log_p.exp() * (grid - mean) ** 2).sum() * step))
            exact = found["exact"].mean[i].item(), found["exact"].stddev[i].item()
            assert abs(exact[0] - mean) < 0.1 * sd
            assert exact[1] == pytest.approx(sd, rel=0.1)
            worst = max(worst, abs(found["rough"].mean[i].item() - mean) / sd)

            # A little narrower than the exact posterior, as the best Normal is.
            def divergence(x, log_p=log_p):
                q = dist.Normal(x[0], math.exp(x[1])).log_prob(grid)
                return float((q.exp() * (q - log_p)).sum() * step)

            best = minimize(divergence, [mean, math.log(sd)], method="Nelder-Mead")
            assert divergence([exact[0], math.log(exact[1])]) < best.fun + 0.005
        assert worst > 1  # standard deviations, of the rough messages
        out = capsys.readouterr().out.splitlines()
        assert [line.split(":")[0] for line in out] == ["rough messages", "exact messages"]
