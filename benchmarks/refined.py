# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The row ``refine`` of ``simulation.py``: its first simulation, fused and then refined by the
parties' own model, without their data.

Run ``python benchmarks/refined.py --cache FOLDER`` for paired figures of the fusion and its
refinement, with two rates for who has which atom (adjusted Rand indices, ARI):

- *components*: the assignment of the parties' own components, against their true matches. A
  component that covers two Gaussians has no right place there.
- *atoms*: the atoms that each party is said to have, each against the one of the party's true
  Gaussians that it is matched with.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from measures import score
from mixtures import (
    Array,
    Draw,
    Fits,
    draw_overlapping,
    local_fits,
    one_thread,
    overlapping_tasks,
)
from problems import locations, overlapping, true_matches
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from tqdm import tqdm

from pyro_fusion import Fusion, NormalWishart, Posterior, Refinement, fuse, refine

POINTS = 300


def mixture(data: Tensor, size: int, base: NormalWishart) -> None:
    """The parties' model: a mixture of ``size`` Gaussians in the plane."""
    weights = pyro.sample("weights", dist.Dirichlet(data.new_ones(size)))
    with pyro.plate("component", size):
        atom = pyro.sample("atom", base)
    with pyro.plate("data", len(data)):
        own = atom[pyro.sample("component_of", dist.Categorical(weights))]
        likelihood = dist.MultivariateNormal(own[..., 0], precision_matrix=own[..., 1:])
        pyro.sample("x", likelihood, obs=data)


def fused(parties: Sequence[Posterior], f: Fits, pooling: str = "exclusive") -> Fusion:
    """The parties fused by default, each with the weights of its mixture: scikit-learn's, which
    has one for each component and the points that are its."""
    sizes = f["sizes"]
    counts = f["concentration"] - f["prior_concentration"].repeat(sizes)
    own = np.split(counts, sizes.cumsum()[:-1])
    return fuse(
        [
            Posterior(
                {**p.factors, "weights": dist.Dirichlet(1 + torch.as_tensor(n))},
                {**p.axes, "weights": ("component",)},
            )
            for p, n in zip(parties, own, strict=True)
        ],
        pooling,
    )


def refined(fusion: Fusion, base: NormalWishart, seed: int = 0) -> Refinement:
    """The refinement of a fusion of simulation 1.

    :param base: a common prior of the parties' components.
    """
    example = torch.zeros(POINTS, base.loc.shape[-1], dtype=torch.float64)
    return refine(fusion, mixture, example, base, seed=seed)


@dataclass(frozen=True)
class Rates:
    """Who has which atom, as adjusted Rand indices; the head of this file says of what."""

    components: float
    atoms: float


def rates(fusion: Fusion, f: Fits, drawn: Draw) -> Rates:
    """The rates of a fusion of simulation 1, or of its refinement."""
    groups = torch.cat(fusion.assignment).numpy()
    return Rates(
        adjusted_rand_score(true_matches(f, drawn), groups),
        adjusted_rand_score(true_matches(as_atoms(fusion, f), drawn), groups),
    )


def as_atoms(fusion: Fusion, f: Fits) -> Fits:
    """The fits with the atom of each component in place of the component."""
    groups = torch.cat(list(fusion.assignment)).numpy()
    params = fusion.posterior.decomposed["atom"].params
    tril = params["scale_tril"].numpy()[groups]
    precision = np.linalg.inv(tril @ tril.swapaxes(-1, -2))
    loc, df = params["loc"].numpy()[groups], params["df"].numpy()[groups]
    return {**f, "loc": loc, "df": df, "precision": precision}


COLUMNS = ("K - truth", "Hausdorff", "OT", "components", "atoms", "seconds")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="See the top of this file.")
    parser.add_argument("--seeds", type=int, default=20, help="problems per setting")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder that keeps the local fits")
    parser.add_argument("--small", action="store_true", help="one small problem")
    args = parser.parse_args(arguments)
    seeds = range(args.first_seed, args.first_seed + (1 if args.small else args.seeds))
    rows: dict[float, list[Array]] = {}
    for task in tqdm(overlapping_tasks(seeds, args.small), unit="problem"):
        with one_thread():
            f, drawn = local_fits(task, args.cache), draw_overlapping(task)
            problem = overlapping(f, drawn)[""]
            start = time.perf_counter()
            first = fused(problem.parties, f)
            middle = time.perf_counter()
            assert isinstance(problem.base, NormalWishart)
            second = refined(first, problem.base)
            seconds = (middle - start, time.perf_counter() - middle)
            values = [[second.overdispersion, float(second.taken), *[0.0] * 4]]
            for fusion, t in zip((first, second.fusion), seconds, strict=True):
                rate = rates(fusion, f, drawn)
                atoms = locations(fusion.posterior.decomposed["atom"])
                excess, far, transport, *_ = score(problem, atoms)
                values.append([excess, far, transport, rate.components, rate.atoms, t])
        rows.setdefault(task.spread, []).append(np.array(values))
    for separation, found in sorted(rows.items()):
        _print(separation, np.stack(found))


def _print(separation: float, values: Array) -> None:
    """:param values: ``[problems, overdispersion or one of two rows, columns]``."""
    size = len(values)
    print(f"\nseparation {separation:g}, {size} problem{'s' * (size > 1)}")
    print(f"{'':<12}" + "".join(f"{x:>12}" for x in COLUMNS))
    for name, row in (("exclusive", 1), ("refine", 2)):
        print(f"{name:<12}" + "".join(f"{v:>12.3f}" for v in values[:, row].mean(0)))
    change = values[:, 2] - values[:, 1]
    error = change.std(0, ddof=1) / size**0.5 if size > 1 else np.full(len(COLUMNS), np.nan)
    print(f"{'change':<12}" + "".join(f"{v:>+12.3f}" for v in change.mean(0)[:-1]))
    print(f"{'± one se':<12}" + "".join(f"{v:>12.3f}" for v in error[:-1]))
    quartiles = np.quantile(values[:, 0, 0], (0.25, 0.5, 0.75))
    shown = ", ".join(f"{v:.2f}" for v in quartiles)
    print(f"taken in {100 * values[:, 0, 1].mean():.0f} %; quartiles of the overdispersion {shown}")


if __name__ == "__main__":
    main()
