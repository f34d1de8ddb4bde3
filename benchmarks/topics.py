# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""Topics of ten parties that each have a part of the 20 newsgroups: (a) at random, (b) by
newsgroup, so that topics are not shared by all.

Each party fits a latent Dirichlet allocation of its own; what it hands over are the Dirichlets of
its topics. Held-out documents are completed: half of a document's words tell its proportions, the
other half is scored, alike for all rows.

Run ``python benchmarks/topics.py --data FOLDER``, where ``20news_bow.npz`` is, or ``--small`` for a
simulated corpus whose topics are known. ``--cache`` keeps the local fits.

Source: Claici et al., *Model Fusion with Kullback-Leibler Divergence* (ICML 2020); Campbell & How,
*Approximate Decentralized Bayesian Inference* (UAI 2014).
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from newsgroups import (
    Corpus,
    Split,
    coherence,
    perplexity,
    read_corpus,
    simulated_corpus,
    split_corpus,
)
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.special import gammaln
from sklearn.decomposition import LatentDirichletAllocation
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import pyro_fusion
from pyro_fusion import (
    IndianBuffetPrior,
    from_sklearn,
    fuse,
)
from pyro_fusion.assignment.priors import AssignmentPrior
from pyro_fusion.readers.sklearn import prior_from_sklearn

Array = NDArray[np.float64]
Index = NDArray[np.intp]

SPLITS = ("random", "groups")
POOLINGS = ("exclusive", "inclusive", "product")
TITLES = {
    "random": "(a) documents at random",
    "groups": "(b) by newsgroup: {own} of {all} for each party, each newsgroup at two",
}
FUSIONS: dict[str, tuple[str, AssignmentPrior | None]] = {
    "exclusive": ("exclusive", None),
    "exclusive, IndianBuffetPrior": ("exclusive", IndianBuffetPrior()),
    "inclusive": ("inclusive", None),
    "inclusive, IndianBuffetPrior": ("inclusive", IndianBuffetPrior()),
    "product": ("product", None),
}


# -- local fits ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitting:
    """How topics are fitted.

    :ivar topics: of each fit.
    :ivar iterations: of batch variational Bayes.
    :ivar starts: of which the one of least perplexity is kept.
    :ivar cache: a folder that keeps the fits, arrays alone, or None.
    """

    topics: int = 50
    iterations: int = 30
    starts: int = 1
    cache: Path | None = None

    def __call__(self, corpus: Corpus, documents: Index, seed: int) -> LatentDirichletAllocation:
        """:raises ValueError: if what is in the cache is of other documents."""
        size = self.topics
        if corpus.truth is not None:  # as many as there are
            size = 1 + len(np.unique(corpus.groups[documents]))
        counts = corpus.counts[documents]
        if self.cache is None:
            return self._fit(counts, size, seed)
        name = (size, self.iterations, self.starts, counts.shape[1], len(documents), seed)
        path = self.cache / f"topics-{'-'.join(map(str, name))}.npz"
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}.part")
            components = self._fit(counts, size, seed).components_
            with open(part, "wb") as new:
                np.savez(new, allow_pickle=False, documents=documents, components=components)
            os.replace(part, path)
        with np.load(path, allow_pickle=False) as file:
            if not np.array_equal(file["documents"], documents):
                raise ValueError("the cached fits are of other documents: empty the cache")
            with np.errstate(over="ignore"):  # of how bad it is, not fitted at all
                model = LatentDirichletAllocation(size, max_iter=0).fit(counts[:1])
            model.components_ = file["components"]
            return model

    def _fit(self, counts: csr_matrix, size: int, seed: int) -> LatentDirichletAllocation:
        fits = [
            LatentDirichletAllocation(size, max_iter=self.iterations, random_state=seed + i)
            for i in range(self.starts)
        ]
        return min((m.fit(counts) for m in fits), key=lambda m: m.bound_)


# -- rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Topics:
    """One row: topics from somewhere.

    :ivar concentration: of the Dirichlets, ``[K, V]``.
    :ivar assignment: of each party's topics, which of these it became, or None.
    :ivar seconds: to fuse; NaN where nothing is.
    """

    concentration: Array
    assignment: list[Index] | None = None
    seconds: float = np.nan


def amps(parties: Sequence[Array], prior: float) -> tuple[Array, list[Index]]:
    """Campbell & How's merging: the product of all posteriors, each party's topics in the order
    that makes the product's normaliser largest, one party after the other until no order changes.
    The number of topics is that of the first party."""
    total, order = parties[0].copy(), [np.arange(len(p)) for p in parties]
    changed = first = True
    while changed:
        changed = False
        for s in range(1, len(parties)):
            message = parties[s] - prior
            if not first:
                total[order[s]] -= message
            # Σ log Γ - log Γ(Σ) for each with each
            value = np.stack([_log_beta(total + m) for m in message])
            best = linear_sum_assignment(value, maximize=True)[1]
            changed |= first or not np.array_equal(best, order[s])
            order[s] = best
            total[best] += message
        first = False
    return total, order


def _log_beta(concentration: Array) -> Array:
    result = gammaln(concentration).sum(1) - gammaln(concentration.sum(1))
    return np.asarray(result)


def merged(parties: Sequence[Array], prior: float) -> Array:
    """The product, topic i of one party with topic i of any other."""
    return np.asarray(sum(p - prior for p in parties) + prior)


def rows(
    models: Sequence[LatentDirichletAllocation],
    pooled: Array,
    split: Split,
    restarts: int,
    poolings: Sequence[str] = POOLINGS,
) -> dict[str, Topics]:
    """Nothing but the choice of the best party, and the last row, sees a document."""
    local = [m.components_ for m in models]
    prior = float(models[0].topic_word_prior_)
    best = min(local, key=lambda topics: perplexity(topics, split))
    result = {"best single party (oracle)": Topics(best)}
    result["side by side, nothing shared"] = Topics(np.concatenate(local))
    if len({len(topics) for topics in local}) == 1:
        start = time.perf_counter()
        naive = merged(local, prior)
        result["product, no assignment"] = Topics(naive, None, time.perf_counter() - start)
        start = time.perf_counter()
        total, order = amps(local, prior)
        result["product, AMPS"] = Topics(total, order, time.perf_counter() - start)
    posteriors = [from_sklearn(m) for m in models]
    base = prior_from_sklearn(models[0])
    chosen = [name for name, (pooling, _) in FUSIONS.items() if pooling in poolings]
    for name in tqdm(chosen, desc="fusions", unit="fusion", leave=False):
        pooling, assignment_prior = FUSIONS[name]
        start = time.perf_counter()
        fusion = fuse(
            posteriors,
            pooling,
            assignment_prior,
            prior=base if pooling == "product" else None,
            restarts=restarts,
        )
        seconds = time.perf_counter() - start
        concentration = fusion.posterior.factors["topics"].concentration.numpy()
        assignment = [a.numpy() for a in fusion.assignment]
        result[f"KL fusion: {name}"] = Topics(concentration, assignment, seconds)
    result["all text in one place"] = Topics(pooled)
    return result


# -- printing --------------------------------------------------------------------------------------

LEGEND = """
perplexity: of half of the words of the held-out documents, given the other half; less is better.
topics: how many. shared: those that two parties or more have. NPMI: coherence of the ten likeliest
words of each topic, by all parties' documents. seconds: to fuse, one thread. Side by side: all
parties' topics, none assigned to another. No assignment: topic i of one party with topic i of any
other. AMPS: Campbell & How's. exclusive, inclusive, product: the defaults. Which party is best
nobody knows but the oracle, which has the held-out documents."""


def shared(row: Topics) -> float:
    if row.assignment is None:
        return np.nan
    return float((np.bincount(np.concatenate(row.assignment)) > 1).sum())


def print_table(title: str, results: Sequence[dict[str, tuple[float, ...]]]) -> None:
    """Means over the seeds, and the standard deviation of the perplexity if there are several."""
    seeds = f"{len(results)} seed{'s' * (len(results) > 1)}"
    print(f"\n{title}; {seeds}")
    head = ("perplexity", "topics", "shared", "NPMI", "seconds")
    print(f"{'':40}" + "".join(f"{name:>10}" for name in head))
    for name in results[0]:
        values = np.array([r[name] for r in results])
        mean = values.mean(0)
        cells = [f"{mean[0]:10.1f}", f"{mean[1]:10.1f}", f"{mean[2]:10.1f}", f"{mean[3]:10.3f}"]
        cells = [c if "nan" not in c else f"{'':10}" for c in (*cells, f"{mean[4]:10.2f}")]
        deviation = f"  perplexity ± {values[:, 0].std(ddof=1):.1f}" if len(results) > 1 else ""
        print((f"{name:40}" + "".join(cells) + deviation).rstrip())


def top_words(topics: Array, vocabulary: NDArray[np.str_], count: int = 8) -> list[str]:
    order = np.argsort(-topics, 1)[:, :count]
    return [" ".join(str(w) for w in vocabulary[words]) for words in order]


def has(row: Topics, num_parties: int) -> NDArray[np.bool_]:
    """Which party has which topic, ``[K, S]``."""
    assert row.assignment is not None
    result = np.zeros((len(row.concentration), num_parties), dtype=bool)
    for s, own in enumerate(row.assignment):
        result[own, s] = True
    return result


def table_of_topics(row: Topics, corpus: Corpus, split: Split) -> list[str]:
    """A line for each topic, those of most parties first; then the groups of each party."""
    members = has(row, len(split.parties))
    words = top_words(row.concentration, corpus.vocabulary)
    lines = ["parties  which       words"]
    for k in np.argsort(-members.sum(1), kind="stable"):
        marks = "".join(str(s % 10) if m else "." for s, m in enumerate(members[k]))
        lines.append(f"{members[k].sum():7}  {marks:10}  {words[k]}")
    lines.append("")
    for s, documents in enumerate(split.parties):
        own = np.unique(corpus.groups[documents])
        named = ", ".join(corpus.names[g] for g in own)
        lines.append(f"party {s}: {'all groups' if len(own) == len(corpus.names) else named}")
    return lines


def draw(row: Topics, corpus: Corpus, split: Split, path: Path, most: int = 60) -> None:
    """The topics that most parties have, as rows; a square for each party that has it."""
    from matplotlib.figure import Figure

    members = has(row, len(split.parties))
    order = np.argsort(-members.sum(1), kind="stable")[:most]
    words = top_words(row.concentration, corpus.vocabulary)
    figure = Figure(figsize=(9, 1.2 + 0.18 * len(order)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(members[order], cmap="Blues", aspect="auto", vmin=0, vmax=1.4)
    axes.set_xticks(range(len(split.parties)), [str(s) for s in range(len(split.parties))])
    axes.set_yticks(range(len(order)), [words[k] for k in order], fontsize=7)
    axes.yaxis.tick_right()
    axes.set_xticks(np.arange(0.5, len(split.parties)), minor=True)
    axes.set_yticks(np.arange(0.5, len(order)), minor=True)
    axes.grid(which="minor", color="white")
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("party")
    axes.set_title(
        f"{len(order)} of {len(members)} topics, those of most parties first", fontsize=9
    )
    figure.savefig(path, dpi=120)


# -- the whole -------------------------------------------------------------------------------------


def solve(
    corpus: Corpus,
    split: Split,
    fitting: Fitting,
    seed: int,
    restarts: int,
    poolings: Sequence[str] = POOLINGS,
) -> dict[str, Topics]:
    """Fit, and fuse."""
    numbers = range(len(split.parties))
    models = [
        fitting(corpus, split.parties[s], 1000 * (seed + 1) + 10 * s)
        for s in tqdm(numbers, desc="local fits", unit="party", leave=False)
    ]
    everything = np.sort(np.concatenate(split.parties))
    pooled = fitting(corpus, everything, 1000 * (seed + 1) - 10).components_
    return rows(models, pooled, split, restarts, poolings)


def measure(row: Topics, corpus: Corpus, split: Split) -> tuple[float, ...]:
    documents = corpus.counts[np.concatenate(split.parties)]
    topics = row.concentration
    npmi = coherence(topics, documents)
    return (perplexity(topics, split), float(len(topics)), shared(row), npmi, row.seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    for folder in (args.cache, args.out):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    starts, parties = (3, 4) if args.small else (1, 10)
    fitting = Fitting(args.topics, args.iterations, starts, args.cache)
    print(f"pyro_fusion {pyro_fusion.__version__}, Python {platform.python_version()}", end="")
    for package in ("torch", "scikit-learn", "numpy"):
        print(f", {package} {version(package)}", end="")
    if not args.small:
        corpus = read_corpus(args.data, args.words)
    with threadpool_limits(1):
        torch.set_num_threads(1)
        for kind in args.splits:
            results = []
            for seed in range(args.seeds):
                if args.small:
                    corpus = simulated_corpus(seed)
                split = split_corpus(corpus, kind, parties, seed)
                found = solve(corpus, split, fitting, seed, args.restarts, args.poolings)
                results.append({k: measure(row, corpus, split) for k, row in found.items()})
                if seed == 0:
                    shown = f"KL fusion: {args.shown}"
                    lines = table_of_topics(found[shown], corpus, split)
                    if args.out is not None:
                        (args.out / f"topics-{kind}.txt").write_text("\n".join(lines) + "\n")
                        picture = args.out / f"topics-{kind}.png"
                        draw(found[shown], corpus, split, picture)
            own = 2 * len(corpus.names) // parties
            print_table(TITLES[kind].format(own=own, all=len(corpus.names)), results)
            print(f"\nTopics of {args.shown}, seed 0\n" + "\n".join(lines))
    print(LEGEND)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Topics of ten parties; see the top of this file.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder of 20news_bow.npz")
    source.add_argument("--small", action="store_true", help="a simulated corpus, four parties")
    parser.add_argument("--out", type=Path, help="folder for tables of topics, and pictures")
    parser.add_argument("--cache", type=Path, help="folder that keeps the local fits")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--topics", type=int, default=50, help="of each local fit")
    parser.add_argument("--words", type=int, default=2000, help="the commonest; 0 for all")
    parser.add_argument("--iterations", type=int, default=30, help="of each local fit")
    parser.add_argument("--restarts", type=int, default=0, help="of each fusion")
    parser.add_argument("--poolings", nargs="+", choices=POOLINGS, default=POOLINGS)
    parser.add_argument("--shown", choices=FUSIONS, default="product")
    return parser


if __name__ == "__main__":
    main()
