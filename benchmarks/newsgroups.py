# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""The 20 newsgroups, or a simulated corpus, in parts; and what topics are worth on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.special import digamma

Array = NDArray[np.float64]
Index = NDArray[np.intp]


# -- documents -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Documents as bags of words.

    :ivar counts: of each word in each document, ``[N, V]``; no document is empty.
    :ivar vocabulary: the words.
    :ivar groups: of each document, as an index of ``names``.
    :ivar held_out: how many documents are kept from all parties.
    :ivar truth: the topics that the words were drawn from, ``[K, V]``: one that all groups have,
        then one for each group. None where nobody knows.
    """

    counts: csr_matrix
    vocabulary: NDArray[np.str_]
    groups: Index
    names: list[str]
    held_out: int
    truth: Array | None = None


def read_corpus(folder: Path, num_words: int) -> Corpus:
    """:param num_words: so many are kept, of those that most documents have; 0 for all."""
    with np.load(folder / "20news_bow.npz", allow_pickle=False) as file:
        parts = (file["data"].astype(np.float64), file["indices"], file["indptr"])
        counts = csr_matrix(parts, shape=tuple(file["shape"]))
        documents = np.bincount(counts.indices, minlength=counts.shape[1])
        words = np.sort(np.argsort(-documents, kind="stable")[: num_words or None])
        counts = counts[:, words]
        used = np.diff(counts.indptr) > 0  # some are empty
        names = [str(name) for name in file["group_names"]]
        groups = file["label"].astype(np.intp)[used]
        return Corpus(counts[used], file["vocab"][words], groups, names, 1000)


def simulated_corpus(seed: int, groups: int = 8, each: int = 100, length: int = 60) -> Corpus:
    """Of each group's words seven in ten are about its own topic, the others about one that all
    groups have; topics are of ten words or so."""
    rng = np.random.default_rng([seed, groups])
    truth = rng.dirichlet(np.full(8 * groups, 0.1), groups + 1)
    label = np.repeat(np.arange(groups), each)
    share = rng.beta(7, 3, len(label))[:, None]
    words = share * truth[1 + label] + (1 - share) * truth[0]
    counts = csr_matrix(rng.multinomial(length, words).astype(np.float64))
    vocabulary = np.array([f"w{v}" for v in range(truth.shape[1])])
    names = [f"group {g}" for g in range(groups)]
    return Corpus(counts, vocabulary, label, names, len(label) // 10, truth)


@dataclass(frozen=True)
class Split:
    """Which documents are whose.

    :ivar parties: the documents of each party.
    :ivar held_out: those of nobody, ``[N]``.
    :ivar observed, scored: the two halves of their words, ``[N, V]``.
    """

    parties: list[Index]
    held_out: Index
    observed: csr_matrix
    scored: csr_matrix


def split_corpus(corpus: Corpus, kind: str, num_parties: int, seed: int) -> Split:
    """:param kind: ``"random"``, or ``"groups"``: the groups in a circle, in random order, two for
    each party and the next party's two; of both parties that have it, a document is one's."""
    rng = np.random.default_rng(seed)
    length = np.asarray(corpus.counts.sum(1)).ravel()
    held_out = rng.choice(np.nonzero(length > 1)[0], corpus.held_out, replace=False)
    observed, scored = _halves(corpus.counts[held_out], rng)
    rest = np.setdiff1d(np.arange(len(length)), held_out)
    if kind == "random":
        owner = rng.integers(num_parties, size=len(rest))
    else:
        place = rng.permutation(len(corpus.names))[corpus.groups[rest]]
        own = len(corpus.names) // num_parties
        owner = (place // own + rng.integers(2, size=len(rest))) % num_parties
    return Split([rest[owner == s] for s in range(num_parties)], held_out, observed, scored)


def _halves(counts: csr_matrix, rng: np.random.Generator) -> tuple[csr_matrix, csr_matrix]:
    """Each document's words in two, at random."""
    observed = counts.copy()
    for start, end in zip(counts.indptr, counts.indptr[1:], strict=False):
        own = counts.data[start:end].astype(np.int64)
        observed.data[start:end] = rng.multivariate_hypergeometric(own, own.sum() // 2)
    scored = counts - observed
    observed.eliminate_zeros()
    scored.eliminate_zeros()
    return observed, scored


# -- what topics are judged by ---------------------------------------------------------------------


def proportions(topics: Array, counts: csr_matrix) -> Array:
    """``E[θ]`` of each document given Dirichlet topics ``[K, V]``, by variational Bayes, under a
    prior of one count in all: ``[N, K]``.

    Source: Hoffman, Blei & Bach, *Online Learning for Latent Dirichlet Allocation* (2010), alg. 1.
    """
    weights = np.exp(digamma(topics) - digamma(topics.sum(1, keepdims=True)))
    prior = 1 / len(topics)
    result = np.empty((counts.shape[0], len(topics)))
    for d, (start, end) in enumerate(zip(counts.indptr, counts.indptr[1:], strict=False)):
        own, count = weights[:, counts.indices[start:end]], counts.data[start:end]
        gamma = np.full(len(topics), prior + count.sum() / len(topics))
        for _ in range(200):
            last, theta = gamma, np.exp(digamma(gamma) - digamma(gamma.sum()))
            gamma = prior + theta * (own @ (count / (theta @ own + 1e-300)))
            if np.abs(gamma - last).mean() < 1e-4:
                break
        result[d] = gamma / gamma.sum()
    return result


def perplexity(topics: Array, split: Split) -> float:
    """Of the scored half of the held-out words, given the other: ``E[θ] E[β]``."""
    shares = topics / topics.sum(1, keepdims=True)
    theta = proportions(topics, split.observed)
    scored = split.scored.tocoo()
    density = np.einsum("nk,kn->n", theta[scored.row], shares[:, scored.col])
    return float(np.exp(-(scored.data @ np.log(density)) / scored.data.sum()))


def coherence(topics: Array, counts: csr_matrix, num_words: int = 10) -> float:
    """Mean normalised pointwise mutual information of the pairs of each topic's top words, by how
    many documents have both; -1 for a pair that none has.

    Source: Lau, Newman & Baldwin, *Machine Reading Tea Leaves* (EACL 2014).
    """
    top = np.argsort(-topics, 1)[:, :num_words]
    used, place = np.unique(top, return_inverse=True)
    has = csr_matrix(counts[:, used] > 0, dtype=np.float64)
    both = (has.T @ has).toarray() / counts.shape[0]
    first, second = np.triu_indices(num_words, 1)
    place = place.reshape(top.shape)
    i, j = place[:, first], place[:, second]
    joint, alone = both[i, j], both.diagonal()
    with np.errstate(divide="ignore", invalid="ignore"):
        npmi = np.log(joint / (alone[i] * alone[j])) / -np.log(joint)
    return float(np.where(joint > 0, npmi, -1.0).mean())
