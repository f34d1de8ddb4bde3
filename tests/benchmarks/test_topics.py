# Copyright Contributors to the pyro_fusion project.
# SPDX-License-Identifier: Apache-2.0

"""benchmarks/topics.py, small: known topics come back from parties that have parts of them, in any
order; what rows are judged by is right; and it prints what it promises."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.spatial.distance import cdist
from scipy.special import gammaln
from sklearn.decomposition import LatentDirichletAllocation

from tests.benchmarks.load import load


@pytest.fixture(scope="module")
def topics() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        load("newsgroups", patch)  # which it imports
        yield load("topics", patch)


# -- recovery --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def solved(topics: ModuleType) -> tuple[Any, Any, dict[str, Any]]:
    corpus = topics.simulated_corpus(1)
    split = topics.split_corpus(corpus, "groups", 4, 1)
    fitting = topics.Fitting(iterations=20, starts=3)
    return corpus, split, topics.solve(corpus, split, fitting, 1, 2)


@pytest.mark.parametrize("row", ["exclusive", "inclusive", "product"])
def test_known_topics_come_back(
    topics: ModuleType, solved: tuple[Any, Any, dict[str, Any]], row: str
) -> None:
    corpus, split, found = solved
    fused = found[f"KL fusion: {row}"]
    shares = fused.concentration / fused.concentration.sum(1, keepdims=True)
    variation = cdist(shares, corpus.truth, "cityblock") / 2
    truth = variation.argmin(1)
    # As many as there are, each of them once, and near.
    assert sorted(truth) == list(range(len(corpus.truth)))
    assert variation.min(1).max() < 0.15
    # Those who have a topic are those who have documents about it; all have the first.
    members = topics.has(fused, len(split.parties))
    for k, own in enumerate(truth):
        parties = [own == 0 or own - 1 in corpus.groups[d] for d in split.parties]
        assert members[k].tolist() == parties
    # The parties' own orders differ, so nobody could have merged by number.
    assert len({tuple(truth[a]) for a in fused.assignment}) == len(split.parties)


def test_fused_topics_predict_like_those_of_all_text(
    topics: ModuleType, solved: tuple[Any, Any, dict[str, Any]]
) -> None:
    _, split, found = solved
    value = {name: topics.perplexity(row.concentration, split) for name, row in found.items()}
    pooled = value["all text in one place"]
    assert value["KL fusion: product"] < 1.02 * pooled
    assert value["KL fusion: exclusive"] < 1.02 * pooled
    for worse in ("best single party (oracle)", "product, no assignment", "product, AMPS"):
        assert value[worse] > 1.1 * pooled


def test_it_prints_a_row_for_every_method(
    topics: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    cache = tmp_path / "cache"
    small = ["--small", "--splits", "random", "--iterations", "5", "--restarts", "0"]
    topics.main([*small, "--cache", str(cache), "--out", str(tmp_path)])
    out = capsys.readouterr().out
    for row in [
        "best single party",
        "side by side",
        "product, no assignment",
        "product, AMPS",
        *(f"KL fusion: {name} " for name in topics.FUSIONS),
        "all text in one place",
    ]:
        assert sum(line.startswith(row) for line in out.splitlines()) == 1, row
    assert (tmp_path / "topics-random.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "topics-random.txt").read_text()
    assert table in out
    assert "party 3: all groups" in table
    assert len(list(cache.iterdir())) == 5  # four parties, and all text


# -- documents and fits ----------------------------------------------------------------------------


def test_reading_keeps_the_commonest_words_and_no_empty_document(
    topics: ModuleType, tmp_path: Path
) -> None:
    counts = csr_matrix(np.array([[2, 0, 1, 0], [0, 0, 0, 9], [1, 1, 1, 0], [0, 0, 0, 0]]))
    np.savez(
        tmp_path / "20news_bow.npz",
        data=counts.data, indices=counts.indices, indptr=counts.indptr, shape=counts.shape,
        label=np.array([0, 1, 1, 0]), vocab=np.array(list("abcd")),
        group_names=np.array(["x", "y"]),
    )  # fmt: skip
    every = topics.read_corpus(tmp_path, 0)
    assert (every.counts.shape, every.groups.tolist()) == ((3, 4), [0, 1, 1])
    some = topics.read_corpus(tmp_path, 2)
    assert some.vocabulary.tolist() == ["a", "c"]
    assert some.counts.toarray().tolist() == [[2, 1], [1, 1]]
    assert some.groups.tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["random", "groups"])
def test_every_document_is_somebodys_or_held_out(topics: ModuleType, kind: str) -> None:
    corpus = topics.simulated_corpus(0)
    split = topics.split_corpus(corpus, kind, 4, 0)
    every = np.concatenate([split.held_out, *split.parties])
    np.testing.assert_array_equal(np.sort(every), np.arange(corpus.counts.shape[0]))
    both = split.observed + split.scored
    np.testing.assert_array_equal(both.toarray(), corpus.counts[split.held_out].toarray())
    assert set(np.asarray(split.observed.sum(1)).ravel()) == {30.0}
    owners = [{s for s, d in enumerate(split.parties) if g in corpus.groups[d]} for g in range(8)]
    assert {len(o) for o in owners} == ({4} if kind == "random" else {2})


def test_fits_are_kept_and_those_of_other_documents_refused(
    topics: ModuleType, tmp_path: Path
) -> None:
    corpus = topics.simulated_corpus(0)
    documents = np.arange(60)
    fitting = topics.Fitting(iterations=2, cache=tmp_path)
    fresh = topics.Fitting(iterations=2)(corpus, documents, 0)
    written = fitting(corpus, documents, 0).components_
    (path,) = tmp_path.iterdir()
    np.savez(path, documents=documents, components=2 * written)
    kept = fitting(corpus, documents, 0)
    np.testing.assert_array_equal(fresh.components_, written)
    np.testing.assert_array_equal(kept.components_, 2 * written)
    assert kept.topic_word_prior_ == fresh.topic_word_prior_
    with pytest.raises(ValueError, match="empty the cache"):
        fitting(corpus, documents + 1, 0)


# -- measures and peers ----------------------------------------------------------------------------


def test_proportions_are_scikit_learns(topics: ModuleType) -> None:
    corpus = topics.simulated_corpus(0)
    model = LatentDirichletAllocation(
        6, random_state=0, max_doc_update_iter=200, mean_change_tol=1e-4
    ).fit(corpus.counts[:200])
    found = sys.modules["newsgroups"].proportions(model.components_, corpus.counts[200:260])
    expected = model.transform(corpus.counts[200:260])
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_perplexity_of_one_topic_is_that_of_its_words(topics: ModuleType) -> None:
    corpus = topics.simulated_corpus(0)
    split = topics.split_corpus(corpus, "random", 4, 0)
    shares = np.random.default_rng(0).dirichlet(np.ones(64))
    scored = split.scored.toarray()
    expected = np.exp(-(scored @ np.log(shares)).sum() / scored.sum())
    assert topics.perplexity(1e6 * shares[None], split) == pytest.approx(expected)
    # Half of the topics of all words: what was known of the documents is of use.
    assert topics.perplexity(1e6 * corpus.truth + 1e-3, split) < expected


def test_coherence_by_hand(topics: ModuleType) -> None:
    documents = csr_matrix(np.array([[1, 2, 0], [1, 1, 0], [0, 0, 3], [0, 1, 1]]))
    weights = np.array([[3.0, 2.0, 1.0], [2.0, 1.0, 3.0]])
    # Words 0 and 1 are together in 2 documents of 4, alone in 2 and 3; words 2 and 0 never.
    together = np.log(0.5 / (0.5 * 0.75)) / -np.log(0.5)
    assert topics.coherence(weights, documents, 2) == pytest.approx((together - 1) / 2)


def test_amps_of_two_parties_is_the_best_of_all_orders(topics: ModuleType) -> None:
    rng = np.random.default_rng(0)
    first = 0.1 + rng.gamma(0.3, 30, (4, 12))
    second = 0.1 + rng.gamma(0.3, 30, (4, 12))

    def value(order: tuple[int, ...]) -> float:
        total = first.copy()
        total[list(order)] += second - 0.1
        return float((gammaln(total).sum(1) - gammaln(total.sum(1))).sum())

    best = max(itertools.permutations(range(4)), key=value)
    total, order = topics.amps([first, second], 0.1)
    assert order[1].tolist() == list(best)
    expected = first.copy()
    expected[list(best)] += second - 0.1
    np.testing.assert_allclose(total, expected)


def test_amps_undoes_permutations(topics: ModuleType) -> None:
    rng = np.random.default_rng(0)
    counts = rng.gamma(0.3, 30, (5, 20))
    orders = [np.arange(5), *(rng.permutation(5) for _ in range(3))]
    total, found = topics.amps([0.1 + counts[o] for o in orders], 0.1)
    for order, own in zip(orders, found, strict=True):
        np.testing.assert_array_equal(order, own)
    np.testing.assert_allclose(total, 0.1 + 4 * counts)


def test_the_source_is_named(topics: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        topics.main([])
    assert "--data" in capsys.readouterr().err
