"""What a table claims follows from the samples, and from no more of them than were compared."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pytest

from bench.judge import stats
from bench.judge.comparison import add_statistics
from bench.judge.family import Comparison, compare_all
from bench.records.row import STATISTICS, Row
from bench.report.comparison import compare
from tasks.base import Metric
from tests.bench.lines import sample

Scores = dict[str, list[float]]


def statistics(scores: Scores, metrics: Sequence[Metric] = (), **more: Any) -> dict[str, Row]:
    """Rows by method, for scores of each method on the same documents; all but full have one budget."""
    rows = [
        Row(
            **{
                "model": "m",
                "task": "needle",
                "metric": "exact_match",
                "method": method,
                "cell": method,
                "n": len(values),
                "score": sum(values) / len(values),
                "budget_unit": "bytes",
                "cache_ratio": None if method == "full" else 0.25,
                "higher_is_better": True,
                "compressed_documents": 0 if method == "full" else 1,
                **more.get(method, {}),
            }
        )
        for method, values in scores.items()
    ]
    samples = [
        sample(f"d{i}", method, task="needle", scores={"exact_match": value})
        for method, values in scores.items()
        for i, value in enumerate(values)
    ]
    add_statistics(rows, samples, metrics)
    return {row.method: row for row in rows}


FULL, HALF, NONE = [1.0] * 20, [1.0] * 10 + [0.0] * 10, [0.0] * 20
PLACES = sorted(range(20), key=str)
"""Of the documents in the order of their ids, in which draws go through them."""


def compared(*methods: list[float]) -> list[Comparison]:
    return compare_all([[scores[place] for place in PLACES] for scores in methods], FULL)


def test_intervals_differences_and_the_family() -> None:
    rows = statistics({"full": FULL, "mix": FULL, "origin": HALF, "window": NONE})
    assert (rows["mix"].difference, rows["origin"].difference) == (0.0, -0.5)
    assert rows["full"].score_low == pytest.approx(stats.mean_interval(FULL).low)  # type: ignore[union-attr]
    assert (rows["full"].difference, rows["full"].p_value) == (None, None)
    names = ("mix", "origin", "window")
    p_values = [rows[name].p_value for name in names]
    assert [rows[name].p_holm for name in names] == stats.holm([p or 0.0 for p in p_values])
    expected = compared(FULL, HALF, NONE)
    for name, found in zip(names, expected, strict=True):
        row = rows[name]
        assert (row.p_value, row.p_adjusted) == (found.p_value, found.p_adjusted)
        assert (row.difference_low, row.difference_high) == found.interval
    assert rows["origin"].difference_low < -0.5 < rows["origin"].difference_high < 0


def test_leaders_are_the_best_and_what_cannot_be_told_from_it() -> None:
    nearly = [1.0] * 19 + [0.0]
    rows = statistics({"full": FULL, "mix": FULL, "quant": nearly, "window": NONE})
    assert {name: row.leading for name, row in rows.items()} == {
        "full": None,
        "mix": True,
        "quant": True,
        "window": False,
    }
    # Two documents tell nobody apart: nobody leads.
    few = statistics({"full": [1.0] * 2, "mix": [1.0] * 2, "window": [0.0] * 2})
    assert not few["mix"].leading


def test_who_compressed_nothing_is_not_compared() -> None:
    rows = statistics({"full": FULL, "mix": FULL, "quant": HALF, "window": NONE}, mix={"compressed_documents": 0})
    assert rows["mix"].p_value is None
    assert rows["mix"].leading is None
    assert rows["mix"].score_low is not None
    # Nor does it count in the family of the others.
    assert rows["quant"].p_adjusted == compared(HALF, NONE)[0].p_adjusted


def test_a_score_that_is_no_mean_has_no_interval() -> None:
    rows = statistics({"full": FULL, "mix": HALF}, mix={"score": 0.9})
    assert {name: getattr(rows["mix"], name) for name in STATISTICS} == dict.fromkeys(STATISTICS)


def test_without_full_or_with_other_documents_nothing_is_compared() -> None:
    assert statistics({"mix": HALF})["mix"].difference is None
    rows = statistics({"full": FULL[:10], "mix": HALF})
    assert rows["mix"].difference is None
    assert rows["mix"].score_low is not None


def test_the_order_of_the_samples_does_not_matter() -> None:
    values = [0.1 * i for i in range(12)]
    rows = [statistics({"full": [1.0] * 12, "mix": values})["mix"] for _ in range(2)]
    samples = [sample(f"d{i}", "mix", task="needle", scores={"exact_match": v}) for i, v in enumerate(values)]
    add_statistics([rows[1]], reversed(samples))
    assert (rows[0].score_low, rows[0].score_high) == (rows[1].score_low, rows[1].score_high)


def test_a_constant_is_no_proportion_where_others_are_none() -> None:
    rows = statistics({"full": [0.0] * 12, "mix": [0.1 * i for i in range(12)]})
    assert (rows["full"].score_low, rows["full"].score_high) == (None, None)
    assert rows["mix"].score_low < rows["mix"].score < rows["mix"].score_high


def test_nor_where_the_others_are_no_means() -> None:
    """A percentile over all tokens is no mean over documents; that of the full cache's divergence is 0 in each."""
    rows = statistics({"full": [0.0] * 12, "mix": [0.1 * i for i in range(12)]}, mix={"score": 1.0})
    assert (rows["full"].score_low, rows["full"].score_high) == (None, None)


def test_intervals_keep_to_the_range_of_the_metric() -> None:
    scores = {"full": [1.0] * 5, "mix": [1.0, 1.0, 1.0, 1.0, 0.4]}
    assert statistics(scores)["mix"].score_high > 1
    row = statistics(scores, metrics=[Metric(name="exact_match", low=0.0, high=1.0)])["mix"]
    assert row.score_high == 1
    assert -1 <= row.difference_low < row.difference_high


def test_documents_of_a_groups_tasks_may_share_ids_and_lack_a_score() -> None:
    values = {"full": [1.0, 1.0, 1.0, 1.0], "mix": [1.0, 0.0, 0.0, 0.0]}
    plain = statistics({method: values[method] * 3 for method in values})["mix"]

    def grouped(unknown: bool) -> Row:
        rows = [
            plain.model_copy(update={"method": method, "cell": method, "score": fmean(values[method])})
            for method in values
        ]
        samples = [
            sample(f"d{i}", method, task=task, scores={"exact_match": value})
            for task in ("a", "b", "c")
            for method in values
            for i, value in enumerate(values[method])
        ]
        if unknown:
            samples[-1].scores = {"exact_match": None}
        add_statistics(rows, samples)
        return rows[1]

    known = grouped(unknown=False)
    assert (known.difference, known.score_low) == (plain.difference, plain.score_low)
    assert all(getattr(grouped(unknown=True), name) is None for name in STATISTICS)


def test_what_is_measured_from_full_is_not_compared_with_it() -> None:
    """A divergence of full is 0 by definition; methods are compared with the best of their budget, by ratios."""
    spread = [0.01 * (1 + i % 7) for i in range(20)]
    worse = [value * (3 + 0.1 * (i % 3)) for i, value in enumerate(spread)]
    metric = Metric(name="exact_match", higher_is_better=False, low=0.0, of_full=0.0)
    lower = {"higher_is_better": False}
    rows = statistics({"full": [0.0] * 20, "mix": spread, "window": worse}, [metric], mix=lower, window=lower)
    for row in rows.values():
        assert (row.difference, row.p_value, row.p_adjusted, row.detectable_difference) == (None,) * 4
    assert rows["full"].score_low is None
    assert 0 < rows["mix"].score_low < rows["mix"].score < rows["mix"].score_high
    window = rows["window"]
    assert window.best == "mix"
    assert 1 < window.to_best_low < window.to_best < window.to_best_high
    assert window.p_to_best < 0.05
    assert (rows["mix"].leading, window.leading) == (True, False)


def test_percent_scores_of_two_values() -> None:
    metric = Metric(name="exact_match", low=0.0, high=100.0, binary=True)
    rows = statistics({"full": [100.0] * 20, "mix": [100.0] * 19 + [0.0], "window": NONE}, [metric])
    assert (rows["mix"].score_low, rows["mix"].score_high) == pytest.approx((76.4, 99.1), abs=0.1)
    assert (rows["window"].score_low, rows["window"].score_high) == pytest.approx((0.0, 16.1), abs=0.1)
    assert rows["window"].p_adjusted < 0.001


def test_rows_over_fewer_documents_are_of_the_same_family() -> None:
    both = statistics({"full": FULL, "origin": HALF, "window": NONE})
    fewer = statistics({"full": FULL, "origin": HALF, "window": NONE[:12]})
    assert fewer["window"].p_adjusted > both["window"].p_adjusted
    assert fewer["origin"].p_adjusted >= both["origin"].p_value


def test_a_binary_metric_says_its_range() -> None:
    with pytest.raises(ValueError, match="which must be given"):
        Metric(name="right", binary=True)
    with pytest.raises(ValueError, match="between low and high"):
        Metric(name="right", low=1.0, high=1.0)


def test_a_table_of_one_document_says_the_difference_and_nothing_more() -> None:
    rows = statistics({"full": [1.0], "mix": [0.0], "window": [1.0]}, [Metric(name="exact_match", low=0.0, high=1.0)])
    assert (rows["mix"].difference, rows["window"].difference) == (-1.0, 0.0)
    for row in rows.values():
        unknown = {
            "score_low",
            "difference_low",
            "p_value",
            "p_adjusted",
            "detectable_difference",
            "cannot_tell",
            "leading",
        }
        assert {getattr(row, name) for name in unknown} <= {None, False}
        assert row.sources in (1, None)
    notes = compare(list(rows.values()))[0].notes
    how = "12 could, where half of the answers is lost: --samples, or --limit for given documents"
    assert f"so few documents cannot show a difference to full (n = 1); {how}" in notes


def test_a_table_says_how_many_documents_could_show_a_difference() -> None:
    others = {name: [0.0, 0.0, 1.0, 1.0, 1.0] for name in ("mix", "quant", "window")}
    rows = statistics({"full": [1.0, 0.0, 1.0, 0.0, 1.0], **others}, [Metric(name="exact_match", low=0.0, high=1.0)])
    how = "12 could, where half of the answers is lost: --samples, or --limit for given documents"
    assert f"so few documents cannot show a difference to full (n = 5); {how}" in compare(list(rows.values()))[0].notes
    partly = {name: [score / 2 for score in scores[:3]] for name, scores in others.items()}
    rows = statistics({"full": [1.0, 0.0, 0.5], **partly}, [Metric(name="f1", low=0.0, high=1.0)])
    how = "5 give intervals: --samples, or --limit for given documents"
    assert f"so few documents cannot show a difference to full (n = 3); {how}" in compare(list(rows.values()))[0].notes


def test_scores_that_are_all_equal() -> None:
    """Of two values they have the statistics of proportions; of others nothing is known of how they scatter."""
    right = statistics({"full": [1.0] * 12, "mix": [1.0] * 12}, [Metric(name="exact_match", low=0.0, high=1.0)])["mix"]
    assert (right.difference, right.p_adjusted, right.cannot_tell) == (0.0, 1.0, "ceiling")
    assert right.score_low == pytest.approx(12 / (12 + 1.959964**2))
    assert (right.difference_low or 0) < 0 < (right.difference_high or 0)
    half = statistics({"full": [0.5] * 12, "mix": [0.5] * 12, "window": [0.25] * 12})
    assert (half["mix"].difference, half["mix"].p_adjusted, half["mix"].difference_low) == (0.0, 1.0, None)
    assert (half["window"].difference, half["window"].p_adjusted) == (-0.25, None)
    assert half["mix"].score_low is None
