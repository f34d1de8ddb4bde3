# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The search: what it pools and how often, why it stops, and that it needs no program."""

import ast
import importlib
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_fusion
from pyro_fusion import (
    FixedAtoms,
    FusionProblem,
    IndianBuffetPrior,
    ParameterError,
    Posterior,
    StopReason,
    fuse,
)
from pyro_fusion.assignment import coordinate
from pyro_fusion.fusion import search
from pyro_fusion.fusion.ascent import EMResult
from pyro_fusion.pooling.components import Components
from tests.fusion import networks
from tests.fusion.parties import BASE, parties


def test_fusion_needs_no_program() -> None:
    """No module of the room knows Pyro's primitives or modules, only its tensor mathematics."""
    for path in (Path(pyro_fusion.__file__).parent / "fusion").glob("*.py"):
        if path.name == "rounds.py":  # hands out Pyro distributions and models
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            names = [n for n in names if not n.startswith("pyro.ops.")]
            assert not any(n.split(".")[0] == "pyro" for n in names), path.name
            assert not any(n.startswith("pyro_fusion.program") for n in names), path.name


@pytest.mark.parametrize("pooling", ["exclusive", "inclusive", "product"])
def test_fuse_is_a_search_of_a_problem(pooling: str) -> None:
    problem = FusionProblem.of(parties(1.5), pooling, prior=BASE, weights=[1, 2, 1, 1])
    ours = search(problem, seed=3, restarts=4)
    theirs = fuse(parties(1.5), pooling, prior=BASE, weights=[1, 2, 1, 1], seed=3, restarts=4)
    assert ours.objective == theirs.objective
    for site, f in theirs.posterior.decomposed.items():
        for name, value in f.params.items():
            assert torch.equal(ours.posterior.decomposed[site].params[name], value)
    again = search(problem, seed=3, restarts=4)  # a problem is a value: nothing was left in it
    assert again.objective == ours.objective


@pytest.mark.parametrize("pooling", ["exclusive", "inclusive", "product"])
def test_shared_sites_and_final_atoms_are_pooled_once(
    pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled: Counter[str] = Counter()
    real = Components.barycenter

    def counted(self: Components, *args: object, **kwargs: object) -> object:
        pooled.update(self.local.keys())
        return real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Components, "barycenter", counted)
    problem = FusionProblem.of(parties(), pooling, prior=BASE)
    search(problem)
    assert pooled["noise"] == 1
    found = {"component": torch.tensor([0, 1, 2, 2, 0, 3, 1, 0, 1, 2, 3])}
    before = pooled["loc"]
    problem.fused(found, {"component": 4})
    assert pooled["loc"] == before + 1 and pooled["noise"] == 1


class TestStopped:
    def test_three_starts_agree(self) -> None:
        fused = fuse(parties()).only_label()
        assert fused.stopped is StopReason.AGREED and fused.converged
        assert len(fused.restarts) == 3

    def test_all_starts_were_used(self) -> None:
        fusion = fuse(parties(), restarts=1)
        assert fusion.only_label().stopped is StopReason.EXHAUSTED and fusion.converged
        assert "more `restarts` may help" in fusion.summary()

    def test_at_the_iteration_limit(self) -> None:
        fusion = fuse(parties(4.0), "inclusive", FixedAtoms(4), max_iterations=1, seed=1)
        assert fusion.only_label().stopped is StopReason.ITERATION_LIMIT and not fusion.converged
        assert "raise `max_iterations`" in fusion.summary()

    def test_interrupted(self) -> None:
        calls = 0

        def impatient(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            raise KeyboardInterrupt

        # The solver of one's own refines what the starts ended in.
        whole = fuse(parties(1.5))
        fusion = fuse(parties(1.5), solver=impatient)  # type: ignore[arg-type]
        assert calls == 1 and fusion.only_label().stopped is StopReason.INTERRUPTED
        assert not fusion.converged and "run it again to go on" in fusion.summary()
        assert fusion.objective[-1] >= whole.objective[-1] - 1e-9
        assert len(fusion.only_label().restarts) == 3

    def test_interrupted_before_there_is_anything(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        problem = FusionProblem.of(parties())
        start = problem.start()
        module = importlib.import_module(
            "pyro_fusion.fusion.search"
        )  # its function has the name too
        monkeypatch.setattr(module, "expectation_maximization", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(problem, start=start)

    @pytest.mark.parametrize("linked", [False, True])
    def test_interrupted_where_there_are_several_labels(
        self, linked: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Wherever it comes: nothing more is searched, and the result says so and is whole."""
        if linked:
            given = networks.parties(sizes=((3, 2), (2, 3), (3, 2)), num_units=(4, 3))[0]
        else:
            given = [
                Posterior(
                    {"x": p.factors["loc"], "y": q.factors["loc"]},
                    {"x": ("first", None), "y": ("second", None)},
                )
                for p, q in zip(parties(1.5), parties(0.5), strict=True)
            ]
        problem = FusionProblem.of(given, dispersion=2.0)
        module = importlib.import_module("pyro_fusion.fusion.search")
        real, calls, last = module.expectation_maximization, 0, 0

        def impatient(*args: Any, **kwargs: Any) -> EMResult:
            nonlocal calls
            calls += 1
            if calls == last:
                raise KeyboardInterrupt
            assert calls < last or args[3] == 0  # only F where it stands
            result: EMResult = real(*args, **kwargs)
            return result

        last = 10**6
        monkeypatch.setattr(module, "expectation_maximization", impatient)
        whole = search(problem, restarts=1, max_iterations=10)
        every, seen = calls, set()
        for there in {*range(1, every + 1, 4), every}:
            calls, last = 0, there
            try:
                fusion = search(problem, restarts=1, max_iterations=10)
            except KeyboardInterrupt:
                seen.add("nothing yet")
                continue
            seen.add("something")
            assert fusion.interrupted and not fusion.converged
            assert "run it again to go on" in fusion.summary()
            assert fusion.objective[-1] >= whole.objective[-1] - 1e-9
            assert all(b <= a + 1e-9 for a, b in itertools.pairwise(fusion.objective))
            for label, m in fusion.labels.items():
                assert [len(a) for a in m.assignment] == [p.components(label) for p in given]
                assert fusion.posterior.components(label) == m.num_atoms
        assert seen == {"nothing yet", "something"} and not whole.interrupted


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"restarts": 2.5}, "restarts must be an integer, got 2.5"),
        ({"restarts": None}, "restarts must be an integer, got None"),
        ({"max_iterations": 1.5}, "max_iterations must be an integer"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
        ({"seed": "0"}, "seed must be an integer"),
        ({"restarts": -1}, "restarts >= 0"),
        ({"solver": "simplex"}, "solver must be one of"),
    ],
)
def test_arguments_out_of_range(settings: dict[str, object], match: str) -> None:
    problem = FusionProblem.of(parties())
    with pytest.raises(ParameterError, match=match):
        search(problem, **settings)  # type: ignore[arg-type]


def test_integers_of_numpy_are_integers() -> None:
    import numpy as np

    assert fuse(parties(), seed=np.int64(3), restarts=np.int32(2)).converged  # type: ignore[arg-type]


def test_a_start_is_the_first() -> None:
    """From the optimum nothing better is found, and the first end is F there."""
    problem = FusionProblem.of(parties(1.5))
    best = search(problem)
    start = {"component": torch.cat(best.assignment)}
    again = search(problem, start=start, restarts=0, solver=coordinate)
    assert again.objective == pytest.approx([best.objective[-1]], rel=1e-12)
    assert again.only_label().restarts == pytest.approx(again.only_label().objective, rel=1e-12)


def test_a_solver_that_reads_the_prior_first_is_given_that_of_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where labels are linked and a start is made anew."""
    module = importlib.import_module("pyro_fusion.fusion.search")
    real, seen = module.annealed, set()

    def annealed(problem: Components, prior: IndianBuffetPrior, start: torch.Tensor) -> object:
        seen.add(prior.mass)
        return real(problem, prior, start)

    monkeypatch.setattr(module, "annealed", annealed)
    problem = FusionProblem.of(
        networks.parties(sizes=((3, 2), (2, 3), (3, 2)), num_units=(4, 3))[0],
        assignment_prior=IndianBuffetPrior(),
        dispersion=2.0,
    )
    start = {label: torch.arange(sum(p.problem.sizes)) for label, p in problem.parts.items()}
    search(problem, solver="sinkhorn", restarts=0, start=start)
    prior = IndianBuffetPrior()
    assert seen == {float(prior.update(len(a), 3).mass) for a in start.values()}
