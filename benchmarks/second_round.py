# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""A second round of simulation 1: each party fits its points once more, with the atoms of the first
fusion as priors, and all are fused again.

Run ``python benchmarks/second_round.py`` for the table of both rounds, on the problems of
``simulation.py``; ``--cache`` keeps the first fits.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from measures import transport
from mixtures import Array, Draw, Fits, draw_overlapping, local_fits, one_thread, overlapping_tasks
from problems import locations, overlapping, true_matches
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from torch.distributions import Distribution

from pyro_fusion import Fusion, Posterior, from_sklearn, fuse
from pyro_fusion.fusion.rounds import PartyPrior

# A component with fewer points than this is dropped.
POINTS = 5.0
# Chosen on seeds 1000 to 1008: where parties differ, ten points hold them back.
STRENGTH = 2.0


@dataclass(frozen=True)
class SecondRound:
    """A second round.

    :ivar fits: of the second fits, in the form of ``mixtures.local_fits``: "sizes" ``[S]`` and
        "loc", "concentration", "df", "precision" and "points" of all components.
    :ivar parties: what was fused; for ``product`` under the common prior.
    :ivar fusion: of these.
    """

    fits: Fits
    parties: list[Posterior]
    fusion: Fusion


def second_round(
    data: Sequence[Array],
    first: Fusion,
    prior: Distribution,
    *,
    strength: float = STRENGTH,
    atoms: Literal["own", "all"] = "all",
) -> SecondRound:
    """Refit all parties with the atoms of ``first`` as priors, and fuse again by its pooling.

    A party has at most the components that it had in the first round, as it was told its number:
    offered all atoms, it keeps those with the most of its points.

    :param data: each party's points.
    :param prior: of one component, the common one of the parties for ``product``.
    """
    parties, messages, points = [], [], []
    for x, own, assignment in zip(
        data, first.as_prior(strength, atoms=atoms).values(), first.assignment, strict=True
    ):
        posterior, kept = refit(x, own, len(assignment))
        parties.append(posterior)
        before = kept.posterior.decomposed["atom"].params["concentration"]
        points.append(posterior.decomposed["atom"].params["concentration"] - before)
        if first.pooling == "product":
            messages.append(kept.divided_out(posterior, {"atom": prior}))
    fused = messages or parties
    fusion = fuse(fused, first.pooling, prior={"atom": prior} if messages else None)
    fits = _fits(parties) | {"points": torch.cat(points).numpy()}
    return SecondRound(fits, fused, fusion)


def refit(data: Array, prior: PartyPrior, most: int) -> tuple[Posterior, PartyPrior]:
    """The posterior at site "atom", and the prior, of the components that are kept: the ``most``
    that have the most points, and of these those with five at least, or the one."""
    while True:
        model = prior.to_sklearn(max_iter=300)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(data)
        points = model.mean_precision_ - model.mean_precision_prior_
        if len(points) <= most:
            break
        kept = np.sort(np.argsort(-points, kind="stable")[:most])
        prior = prior.select("component", torch.as_tensor(kept))
    kept = np.flatnonzero(points >= min(POINTS, points.max()))
    index = torch.as_tensor(kept)
    atom = from_sklearn(model).select("component", index).decomposed["gaussian"]
    return Posterior({"atom": atom}, {"atom": "component"}), prior.select("component", index)


def _fits(parties: Sequence[Posterior]) -> Fits:
    params = [p.decomposed["atom"].params for p in parties]
    fits = {k: np.concatenate([p[k].numpy() for p in params]) for k in params[0]}
    tril = np.concatenate([torch.cholesky_inverse(p["scale_tril"]).numpy() for p in params])
    del fits["scale_tril"]
    return fits | {"precision": tril, "sizes": np.array([len(p["loc"]) for p in params])}


# -- the table -------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """The table: of both rounds, per cent right, ARI of components, OT; the difference in pairs."""
    parser = argparse.ArgumentParser(description="A second round; see the top of this file.")
    parser.add_argument("--seeds", type=int, default=20, help="problems per setting")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="one small problem")
    parser.add_argument("--cache", type=Path, help="folder that keeps the first fits")
    parser.add_argument("--strength", type=float, default=STRENGTH)
    parser.add_argument("--atoms", nargs="+", choices=("own", "all"), default=("own", "all"))
    parser.add_argument("--pooling", nargs="+", default=("exclusive", "product"))
    args = parser.parse_args(arguments)

    def score(fusion: Fusion, fits: Fits, drawn: Draw) -> tuple[float, ...]:
        atoms = locations(fusion.posterior.decomposed["atom"])
        found = torch.cat(list(fusion.assignment)).numpy()
        ari = adjusted_rand_score(true_matches(fits, drawn), found)
        right = float(len(atoms) == len(drawn.truth))
        return right, ari, transport(atoms, drawn.truth)

    seeds = range(args.first_seed, args.first_seed + (1 if args.small else args.seeds))
    scores: dict[tuple[float, str], list[tuple[float, ...]]] = {}
    for task in overlapping_tasks(seeds, args.small):
        with one_thread():
            fits, drawn = local_fits(task, args.cache), draw_overlapping(task)
            problem = overlapping(fits, drawn)[""]
            for pooling in args.pooling:
                parties = problem.messages if pooling == "product" else problem.parties
                first = fuse(parties, pooling, prior={"atom": problem.base})
                before = score(first, fits, drawn)
                for atoms in args.atoms:
                    second = second_round(
                        drawn.data, first, problem.base, strength=args.strength, atoms=atoms
                    )
                    row = before + score(second.fusion, second.fits, drawn)
                    scores.setdefault((task.spread, f"{pooling}, {atoms}"), []).append(row)
    names = ("right %", "ARI", "OT")
    print(f"seeds {seeds[0]} to {seeds[-1]}, strength {args.strength:g}; first -> second round,")
    print("the difference in pairs and its standard error")
    for (separation, name), rows in sorted(scores.items()):
        values = np.array(rows).reshape(-1, 2, 3) * (100, 1, 1)
        difference = values[:, 1] - values[:, 0]
        error = difference.std(0, ddof=1) / len(rows) ** 0.5 if len(rows) > 1 else [np.nan] * 3
        cells = [
            f"{n} {a:.3g} -> {b:.3g} ({d:+.3f} ± {e:.3f})"
            for n, a, b, d, e in zip(names, *values.mean(0), difference.mean(0), error, strict=True)
        ]
        print(f"{separation:5g}  {name:15} {len(rows):3d} problems  {'   '.join(cells)}")


if __name__ == "__main__":
    main()
