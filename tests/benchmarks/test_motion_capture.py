# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The motion-capture benchmark: its hidden Markov models against enumeration and closed forms, a
simulation whose states are recovered, and what the program prints."""

import sys
from collections.abc import Iterator
from itertools import pairwise, permutations, product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pyro_fusion import GroupNormPrior, IndianBuffetPrior, NormalWishart, fuse
from pyro_fusion.assignment.priors import AssignmentPrior
from tests.benchmarks.load import load


@pytest.fixture(scope="module")
def motion_capture() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("hidden_markov", "state_sequences"):  # which it imports
            load(name, monkeypatch)
        yield load("motion_capture", monkeypatch)


@pytest.fixture(scope="module")
def hidden_markov(motion_capture: ModuleType) -> ModuleType:
    return sys.modules["hidden_markov"]


@pytest.fixture(scope="module")
def simulated_fits(motion_capture: ModuleType) -> list[Any]:
    p = motion_capture.prior_of(2)
    data = motion_capture.simulated()
    return [motion_capture.fit([x], p, max_states=6, restarts=3).hmm for x in data.frames]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def prior(module: ModuleType, dim: int = 2, **settings):
    zero, eye = torch.zeros(dim).double(), torch.eye(dim).double()
    return module.Prior(NormalWishart(zero, 0.5, dim + 1.5, precision_matrix=eye), **settings)


def some_hmm(module: ModuleType, num_states: int, dim: int = 2):
    """A posterior in which nothing is symmetric: that of random blocks."""
    data = module.Frames.of([randn(30, dim)])
    counts = module.blocks(data, num_states, torch.Generator().manual_seed(1))
    return prior(module, dim).updated(module.Counts.stack([counts]))


def expected_logs(hmm) -> tuple[torch.Tensor, torch.Tensor]:
    initial, rows = hmm.initial[0], hmm.transition[0]
    log = [v.digamma() - v.sum(-1, keepdim=True).digamma() for v in (initial, rows)]
    return log[0], log[1]


# -- recursions ------------------------------------------------------------------------------------


def test_forward_is_that_of_pyro(hidden_markov: ModuleType) -> None:
    x, means = randn(25, 2), 2 * randn(3, 2, seed=1)
    initial, moves = (dist.Dirichlet(torch.ones(n, 3).double()).sample().log() for n in (1, 3))
    cluster = dist.Normal(means, 1.0).to_event(1)
    theirs = dist.DiscreteHMM(initial[0], moves, cluster, duration=25).log_prob(x)
    there = torch.ones(1, 25, dtype=torch.bool)
    # Pyro's chain moves before its first frame.
    first = (initial.unsqueeze(-1) + moves).logsumexp(1)
    density = cluster.log_prob(x.unsqueeze(1)).unsqueeze(0)
    ours = hidden_markov.forward(first, moves.unsqueeze(0), density, there)[0, -1].logsumexp(0)
    torch.testing.assert_close(ours, theirs)


def test_e_step_is_the_sum_over_all_paths(hidden_markov: ModuleType) -> None:
    hmm, sequences = some_hmm(hidden_markov, 3), [randn(5, 2, seed=2), randn(3, 2, seed=3)]
    initial, moves = expected_logs(hmm)
    e = hmm.emission
    total, starts, counts = 0.0, torch.zeros(3).double(), torch.zeros(3, 3).double()
    frames = torch.zeros(3, 7).double()
    for x in sequences:
        density = hidden_markov.expected_log_density(e, hidden_markov.Frames.of([x]))[0, 0]
        paths = torch.tensor(list(product(range(3), repeat=len(x))))
        score = initial[paths[:, 0]] + moves[paths[:, :-1], paths[:, 1:]].sum(1)
        score = score + density[torch.arange(len(x)), paths].sum(1)
        total += float(score.logsumexp(0))
        for path, p in zip(paths, score.softmax(0), strict=True):
            starts[path[0]] += p
            for i, j in pairwise(path):
                counts[i, j] += p
            for state, frame in zip(path, x, strict=True):
                one = torch.ones(1).double()
                frames[state] += p * torch.cat([one, frame, frame.outer(frame).flatten()])
    evidence, found = hidden_markov.e_step(hmm, hidden_markov.Frames.of(sequences))
    assert float(evidence) == pytest.approx(total, rel=1e-10)
    torch.testing.assert_close(found.starts[0], starts)
    torch.testing.assert_close(found.moves[0], counts)
    torch.testing.assert_close(found.frames[0], frames)


def test_expected_log_density_is_that_of_draws(hidden_markov: ModuleType) -> None:
    hmm, x = some_hmm(hidden_markov, 2), randn(4, 2, seed=2)
    draws = hmm.emission.sample(torch.Size([20_000]))[:, 0].unsqueeze(1)
    normal = dist.MultivariateNormal(draws[..., 0], precision_matrix=draws[..., 1:])
    drawn = normal.log_prob(x[:, None])
    ours = hidden_markov.expected_log_density(hmm.emission, hidden_markov.Frames.of([x]))[0, 0]
    five_sd = 5 * drawn.std(0) / len(drawn) ** 0.5
    assert bool(((ours - drawn.mean(0)).abs() < five_sd).all())


def test_viterbi_is_the_best_of_all_paths(hidden_markov: ModuleType) -> None:
    x = randn(6, 2, seed=2)
    initial, moves, density = hidden_markov.predictive(some_hmm(hidden_markov, 3), x)
    paths = torch.tensor(list(product(range(3), repeat=6)))
    score = initial[paths[:, 0]] + moves[paths[:, :-1], paths[:, 1:]].sum(1)
    score = score + density[torch.arange(6), paths].sum(1)
    found = hidden_markov.viterbi(initial, moves, density)
    assert torch.equal(found, paths[score.argmax()])


# -- variational Bayes -----------------------------------------------------------------------------


def test_one_state_is_exact(hidden_markov: ModuleType) -> None:
    x = 1 + randn(12, 3) @ randn(3, 3, seed=1)
    p = prior(hidden_markov, 3)
    fitted = hidden_markov.fit([x], p, max_states=1, restarts=1)
    # One frame after the other: each is predicted by a Student t, and moves the posterior on.
    e, evidence = p.emission, 0.0
    loc, concentration, df, matrix = e.loc, e.concentration, e.df, e.precision_matrix
    for frame in x:
        one = torch.ones(1, 1).double()
        emission = NormalWishart(
            loc[None, None], concentration[None, None], df[None, None],
            precision_matrix=matrix[None, None],
        )  # fmt: skip
        now = hidden_markov.HMM(one, one[None], emission)
        evidence += hidden_markov.log_predictive(now, frame[None])
        offset = frame - loc
        matrix = matrix + concentration / (concentration + 1) * offset.outer(offset)
        loc = loc + offset / (concentration + 1)
        concentration, df = concentration + 1, df + 1
    assert fitted.elbo == pytest.approx(evidence, rel=1e-10)
    found = fitted.hmm.emission
    for ours, theirs in (
        (found.loc, loc), (found.concentration, concentration), (found.df, df),
        (found.precision_matrix, matrix),
    ):  # fmt: skip
        torch.testing.assert_close(ours[0, 0], theirs)


def test_the_elbo_never_falls(hidden_markov: ModuleType) -> None:
    sequences = [randn(40, 2).cumsum(0), randn(25, 2, seed=1).cumsum(0)]
    data, p = hidden_markov.Frames.of(sequences), prior(hidden_markov)
    generator = torch.Generator().manual_seed(0)
    starts = [hidden_markov.blocks(data, 5, generator) for _ in range(4)]
    counts = hidden_markov.Counts.stack(starts)
    _, counts, trace = hidden_markov.ascend(p, data, counts, 60)
    assert len(trace) > 5
    assert float(torch.stack(trace).diff(dim=0).min()) > -1e-9
    for r in range(4):
        merged = hidden_markov.merge(p, data, counts.one(r), 60)
        assert merged.elbo > float(trace[-1][r]) - 1e-9


def test_joined_counts_are_those_of_joined_states(hidden_markov: ModuleType) -> None:
    data = hidden_markov.Frames.of([randn(20, 2), randn(10, 2, seed=1)])
    counts = hidden_markov.blocks(data, 4, torch.Generator().manual_seed(0))
    assert (counts.starts.sum(), counts.moves.sum(), counts.frames[:, 0].sum()) == (2, 28, 30)
    groups = torch.tensor([[0, 1, 0, 2], [0, 1, 2, 2]])
    joined = hidden_markov.Counts.stack([counts]).joined(groups)
    for p, group in enumerate(groups):
        moves, frames = torch.zeros(3, 3).double(), torch.zeros(3, 7).double()
        for i in range(4):
            frames[group[i]] += counts.frames[i]
            for j in range(4):
                moves[group[i], group[j]] += counts.moves[i, j]
        torch.testing.assert_close(joined.moves[p], moves)
        torch.testing.assert_close(joined.frames[p], frames)
        torch.testing.assert_close(joined.starts[p].sum(), counts.starts.sum())


# -- the program -----------------------------------------------------------------------------------


def test_a_fit_is_read_from_its_guide(
    motion_capture: ModuleType, hidden_markov: ModuleType
) -> None:
    hmm = some_hmm(hidden_markov, 3)
    again = motion_capture.hmm_of(motion_capture.posterior_of(hmm))
    assert len(pyro.get_param_store()) == 0
    for name, f in motion_capture.PARAMETERS.items():
        torch.testing.assert_close(f(again), f(hmm), msg=name)


def test_hamming_is_that_of_the_best_matching(motion_capture: ModuleType) -> None:
    rng = np.random.default_rng(0)
    paths, actions = (list(torch.as_tensor(rng.integers(n, size=(2, 30)))) for n in (4, 3))
    best = min(
        (torch.tensor([*p])[torch.cat(paths)] != torch.cat(actions)).double().mean()
        for p in permutations(range(4))
    )
    assert motion_capture.hamming(paths, actions) == pytest.approx(float(best))


@pytest.mark.parametrize(
    ("pooling", "belief"),
    [("inclusive", GroupNormPrior()), ("exclusive", GroupNormPrior())]
    + [("product", GroupNormPrior()), ("product", IndianBuffetPrior())],
    ids=["inclusive", "exclusive", "product", "product, Indian buffet"],
)
def test_the_states_of_a_simulation_are_recovered(
    motion_capture: ModuleType, simulated_fits: list[Any], pooling: str, belief: AssignmentPrior
) -> None:
    data, means = motion_capture.simulated(), motion_capture.MEANS
    p = motion_capture.prior_of(2)
    assert [h.num_states for h in simulated_fits] == [len(h) for h in motion_capture.HOLDS]
    posteriors = [motion_capture.posterior_of(h) for h in simulated_fits]
    fusion = fuse(posteriors, pooling, belief, prior=motion_capture.model_of(p))
    assert fusion.num_atoms == 4
    hmm = motion_capture.hmm_of(fusion.posterior)
    distance = torch.cdist(hmm.emission.loc[0], means)
    atoms, states = linear_sum_assignment(distance)
    place = torch.as_tensor(atoms)[torch.as_tensor(states).argsort()]  # the atom of each state
    # A state of a party has some fifty frames of unit noise.
    assert float(distance[place, torch.arange(4)].max()) < 0.4
    paths = motion_capture.decoded(hmm, data.frames)
    assert motion_capture.hamming(paths, data.actions) < 0.01
    # Moves as they were.
    moves = torch.zeros(4, 4).double()
    for actions in data.actions:
        for i, j in pairwise(actions):
            moves[i, j] += 1
    concentration = hmm.transition[0][place[:, None], place]
    if pooling == "product":  # all counts, but for frames of which the state is in doubt
        assert float((concentration - p.transition(4) - moves).abs().max()) < 1
    rows = moves / moves.sum(1, keepdim=True)
    found = concentration / concentration.sum(1, keepdim=True)
    assert float((found - rows).abs().max()) < 0.1


def test_motion_capture_prints_every_row_and_draws(
    motion_capture: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    motion_capture.main(["--small", "--out", str(out), "--cache", str(cache)])
    lines = capsys.readouterr().out.splitlines()
    columns = {"separate": 5, "separate, best (oracle)": 1, "one HMM on all sequences": 5}
    for row, count in {**columns, **dict.fromkeys(motion_capture.FUSIONS, 6)}.items():
        (line,) = [line for line in lines if line.startswith(f"{row}  ")]
        assert line.count("±") == count
    assert (out / "motion_capture.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(cache.iterdir())) == 4 + 1 + 4  # each, all, and all but each


def test_fits_are_kept(motion_capture: ModuleType, tmp_path: Path) -> None:
    data = motion_capture.simulated()

    def fitted(cache: Path | None):
        p = motion_capture.prior_of(2)
        hmm, seconds = motion_capture.Fitter(p, 4, 1, 0, cache)(data, [1, 2])
        return [f(hmm) for f in motion_capture.PARAMETERS.values()], seconds

    (fresh, _), (written, seconds) = fitted(None), fitted(tmp_path)
    kept, then = fitted(tmp_path)
    assert then == seconds and len(list(tmp_path.iterdir())) == 1
    for x, y, z in zip(fresh, written, kept, strict=True):
        assert torch.equal(x, y) and torch.equal(y, z)


def test_motion_capture_needs_a_folder(
    motion_capture: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        motion_capture.main([])
    assert "--data" in capsys.readouterr().err
