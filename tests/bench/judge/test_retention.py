"""How much of the full cache's score is kept, and where the full cache leaves nothing to be told."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.judge.retention import ratio_interval
from bench.records.row import Row
from bench.report.columns import AGAINST_FULL
from tasks.base import Metric
from tests.bench.judge.test_comparison import Scores, statistics

RIGHT = Metric(name="exact_match", low=0.0, high=1.0, binary=True)
PERCENT = Metric(name="exact_match", low=0.0, high=100.0)


def share(right: int, n: int = 40) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


def told(scores: Scores, metric: Metric = RIGHT, **more: object) -> dict[str, Row]:
    full = sum(scores["full"]) / len(scores["full"])
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    return statistics(
        scores,
        [metric],
        **{
            name: {"score_full": full, "retention": mean / full if full else None, **more}
            for name, mean in means.items()
        },
    )


@pytest.mark.parametrize(
    ("full", "mix", "more", "why", "said"),
    [
        (0, 0, {}, "floor", "cannot tell: full scores 0.000, the least is 0.000"),
        (2, 1, {}, "floor", "cannot tell: full scores 0.050, the least is 0.000"),
        (11, 10, {"chance": 0.25}, "chance", "cannot tell: full scores 0.275, chance is 0.250"),
        (40, 40, {}, "ceiling", "cannot tell: full scores 1.000, the most is 1.000"),
        (40, 39, {}, "ceiling", "cannot tell: full scores 1.000, the most is 1.000"),
        (30, 29, {}, None, "tied"),
        (30, 29, {"chance": 0.25}, None, "tied"),
        # What is found to differ is told, wherever full stands.
        (2, 30, {}, None, "better, p <0.001"),
        (40, 20, {}, None, "worse, p <0.001"),
    ],
)
def test_full_at_an_end_of_the_range_leaves_nothing_to_be_told(
    full: int, mix: int, more: dict[str, float], why: str | None, said: str
) -> None:
    rows = told({"full": share(full), "mix": share(mix)}, **more)
    assert (rows["mix"].cannot_tell, rows["full"].cannot_tell) == (why, None)
    assert AGAINST_FULL.cell(rows["mix"]) == said


def test_a_fall_from_the_ceiling_shows_that_there_was_something_to_lose() -> None:
    """Another row below the interval of full: the questions are not too easy to tell methods apart."""
    rows = told({"full": share(40), "mix": share(40), "window": share(10)})
    assert rows["mix"].cannot_tell is None
    assert AGAINST_FULL.cell(rows["mix"]) == "tied"


def test_a_metric_without_a_range_has_neither_floor_nor_ceiling() -> None:
    rows = told(
        {"full": [0.0] * 19 + [1e-3], "mix": [0.0] * 18 + [1e-3, 1e-3]}, Metric(name="exact_match", binary=False)
    )
    assert rows["mix"].cannot_tell is None
    assert rows["mix"].metric_low is None
    assert rows["mix"].score_low is not None


def test_retention_has_an_interval_and_is_empty_where_it_means_nothing() -> None:
    kept = told({"full": share(32), "mix": share(28), "quant": share(32)})
    assert kept["mix"].retention == pytest.approx(28 / 32)
    assert kept["mix"].retention_low is not None
    assert kept["mix"].retention_high is not None
    assert 0.6 < kept["mix"].retention_low < 28 / 32 < kept["mix"].retention_high < 1.1
    # No document on which the two differ is no certainty.
    assert kept["quant"].retention_low is not None
    assert kept["quant"].retention_low < 1 < (kept["quant"].retention_high or 0)
    assert (kept["full"].retention, kept["full"].retention_low) == (1.0, None)
    assert told({"full": share(2), "mix": share(1)})["mix"].retention is None
    assert told({"full": share(11), "mix": share(10)}, chance=0.25)["mix"].retention is None
    worse = Metric(name="exact_match", higher_is_better=False)
    assert told({"full": [2.0] * 20, "mix": [3.0] * 20}, worse, higher_is_better=False)["mix"].retention is None


def test_retention_on_the_scale_of_percent_is_the_same() -> None:
    unit = told({"full": share(32), "mix": share(28)})["mix"]
    percent = told(
        {"full": [100 * value for value in share(32)], "mix": [100 * value for value in share(28)]},
        Metric(name="exact_match", low=0.0, high=100.0, binary=True),
    )["mix"]
    assert percent.retention_low == pytest.approx(unit.retention_low)
    assert percent.retention_high == pytest.approx(unit.retention_high)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("n", [20, 60])
def test_coverage_of_retention(binary: bool, n: int) -> None:
    rng = np.random.default_rng(n)
    held = 0
    for _ in range(1000):
        hard = rng.random(n)
        full, mix = (hard < 0.8).astype(float), ((hard < 0.8) & (rng.random(n) < 0.75)).astype(float)
        if not binary:
            full, mix = 100 * full * rng.beta(3, 2, n), 100 * mix * rng.beta(3, 2, n)
        found = ratio_interval(mix, full, binary=binary)
        held += found is None or found.low <= 0.75 <= found.high
    assert 0.925 <= held / 1000 <= 0.98


def test_a_ratio_to_almost_nothing_has_no_interval() -> None:
    assert ratio_interval(np.array(share(3, 20)), np.array(share(1, 20)), binary=True) is None
    assert ratio_interval(np.ones(3), np.ones(3)) is None
    sources = [place // 5 for place in range(20)]
    assert ratio_interval(np.array(share(14, 20)), np.array(share(16, 20)), binary=True, sources=sources) is None
    assert math.isfinite(
        (ratio_interval(np.array(share(14, 20)), np.array(share(16, 20)), binary=True) or (math.nan,))[0]
    )
