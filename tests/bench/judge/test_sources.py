"""Documents of one source are counted as what they are: it is sources that are drawn."""

from __future__ import annotations

import numpy as np
import pytest

from bench.judge.comparison import add_statistics
from bench.judge.family import compare_all
from bench.judge.stats import by_source, design_effect, mean_interval
from bench.records.row import Row
from bench.records.sample import SOURCE
from bench.report.comparison import compare
from tasks.base import Metric
from tests.bench.lines import sample

GROUPS, EACH = 25, 4
SOURCES = [place // EACH for place in range(GROUPS * EACH)]


def clustered(rng: np.random.Generator, within: float = 0.8) -> np.ndarray:
    """Values of documents, which hang together within a source."""
    shared = np.repeat(rng.normal(size=GROUPS), EACH)
    return np.sqrt(within) * shared + np.sqrt(1 - within) * rng.normal(size=GROUPS * EACH)


@pytest.mark.parametrize("binary", [True, False])
def test_coverage_where_documents_share_sources(binary: bool) -> None:
    """Taken for independent, a hundred documents of 25 sources cover far less than they say."""
    rng = np.random.default_rng(0)
    held, naive = 0, 0
    bounds = (0.0, 1.0) if binary else (-np.inf, np.inf)
    for _ in range(300):
        change = clustered(rng)
        # Scores of two values lose those documents of a source together.
        mine = (change < 0.5).astype(float) if binary else change
        truth = 0.6914625 - 1.0 if binary else 0.0
        full = np.ones(len(mine)) if binary else np.zeros(len(mine))
        for sources in (SOURCES, None):
            found = compare_all([mine], full, bounds=bounds, sources=sources)[0].interval
            assert found is not None
            holds = found.low <= truth <= found.high
            held, naive = (held + holds, naive) if sources else (held, naive + holds)
    assert 0.915 <= held / 300 <= 0.98
    assert naive / 300 < 0.85


def test_sources_of_one_document_each_change_nothing() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=30)
    own = [f"source {place}" for place in range(30)]
    assert mean_interval(values.tolist(), sources=own) == mean_interval(values.tolist())
    assert compare_all([values], np.zeros(30), sources=own) == compare_all([values], np.zeros(30))
    right = (values > 0).astype(float)
    assert mean_interval(right.tolist(), sources=own) == mean_interval(right.tolist())


def test_a_document_that_is_asked_twice_says_as_much_as_once() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=30)
    twice, sources = np.repeat(values, 2), np.repeat(np.arange(30), 2).tolist()
    assert mean_interval(twice.tolist(), sources=sources) == pytest.approx(mean_interval(values.tolist()))
    right = (values > 0.5).astype(float)
    effect = design_effect(np.repeat(right, 2), sources)
    assert effect == pytest.approx(2.0, rel=0.02)
    divergences = np.exp(values)
    once = mean_interval(divergences.tolist(), logarithm=True)
    assert mean_interval(np.repeat(divergences, 2).tolist(), logarithm=True, sources=sources) == pytest.approx(once)


def test_sources_of_unequal_size_are_weighed_by_their_documents() -> None:
    sums, sizes = by_source(np.array([1.0, 2.0, 3.0, 4.0]), ["a", "b", "b", "b"])
    assert sums.tolist() == [1.0, 9.0]
    assert sizes.tolist() == [1.0, 3.0]
    rng = np.random.default_rng(3)
    sources = rng.integers(12, size=60).tolist()
    values = rng.normal(size=60)
    interval = mean_interval(values.tolist(), sources=sources)
    assert interval is not None
    assert interval.low < values.mean() < interval.high


def test_too_few_sources_give_no_interval_however_many_documents() -> None:
    values = np.random.default_rng(4).random(40)
    sources = [place % 4 for place in range(40)]
    assert mean_interval(values.tolist(), sources=sources) is None
    found = compare_all([values], np.zeros(40), sources=sources)[0]
    assert (found.n, found.interval, found.p_adjusted) == (40, None, None)


def test_a_table_counts_documents_and_sources() -> None:
    rng = np.random.default_rng(5)
    scores = {"full": np.ones(24), "mix": rng.random(24).round(2)}
    rows = [
        Row(
            model="m",
            task="t",
            metric="exact_match",
            method=name,
            cell=name,
            n=24,
            score=float(values.mean()),
            cache_ratio=None if name == "full" else 0.25,
            higher_is_better=True,
            compressed_documents=0 if name == "full" else 24,
        )
        for name, values in scores.items()
    ]
    samples = [
        sample(f"d{place}", name, scores={"exact_match": float(value)}, info={SOURCE: f"text {place // 3}"})
        for name, values in scores.items()
        for place, value in enumerate(values)
    ]
    add_statistics(rows, samples, [Metric(name="exact_match", low=0.0, high=1.0)])
    assert [row.sources for row in rows] == [8, 8]
    assert "n=24 documents of 8 sources" in compare(rows)[0].title
    grouped = mean_interval(
        scores["mix"].tolist(), binary=False, bounds=(0.0, 1.0), sources=[p // 3 for p in range(24)]
    )
    assert grouped is not None
    # Documents stand in the order of their ids, sources in that of their first document.
    assert rows[1].score_low == pytest.approx(grouped.low, abs=0.02)
