"""How much of the full cache's score a method keeps, and where the full cache itself leaves nothing to be told.

A method can lose only what ``full`` has: where that is next to nothing, or to what guessing scores, every method looks
like ``full``, whatever it does. The same holds where everything is about as good as can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from bench.judge.resampling import Array
from bench.judge.stats import Interval, by_source, normal
from bench.judge.tails import student_end
from bench.judge.verdict import ALPHA
from bench.names import FULL, LEAST_DOCUMENTS
from bench.records.row import Row
from tasks.base import Metric

Document = tuple[str, str]

Place = Literal["floor", "chance", "ceiling"]
NEAR = 0.05
"""Share of the way from the floor to the top of a score within which it counts as being there."""


def mark_untold(rows: Sequence[Row], metric: Metric) -> None:
    """Fill ``cannot_tell`` of the rows of one metric that are not told from ``full`` for what ``full`` scores.

    ``full`` is at the floor where the lower end of its interval is within :data:`NEAR` of the least score, and at
    chance where it is within that of what guessing scores. It is at the ceiling where its score is within that of the
    best one and the scores of all other rows lie in its interval too. A row that is found to differ is told.
    """
    full = next((row for row in rows if row.method == FULL), None)
    if full is None or metric.of_full is not None:
        return
    why = _place_of(full, rows, metric)
    for row in rows:
        is_told = row.p_adjusted is not None and row.p_adjusted < ALPHA
        row.cannot_tell = None if row.method == FULL or row.not_exercised or is_told else why


def _place_of(full: Row, rows: Sequence[Row], metric: Metric) -> Place | None:
    if full.score_low is None or full.score_high is None or not math.isfinite(metric.high - metric.low):
        return None
    width = metric.high - metric.low
    # From here the score gets no worse, and up to there no better.
    worst, best = (metric.low, metric.high) if metric.higher_is_better else (metric.high, metric.low)
    sign = 1.0 if metric.higher_is_better else -1.0
    nearest = min(sign * full.score_low, sign * full.score_high)
    if full.chance is not None and metric.higher_is_better:
        chance = metric.low + width * full.chance
        if nearest <= chance + NEAR * (metric.high - chance):
            return "chance"
    elif nearest <= sign * worst + NEAR * width:
        return "floor"
    inside = all(full.score_low <= row.score <= full.score_high for row in rows)
    return "ceiling" if inside and abs(best - full.score) <= NEAR * width else None


def add_retention(
    rows: Sequence[Row],
    metric: Metric,
    by_cell: Mapping[str, Mapping[Document, float]],
    sources_of: Callable[[Iterable[Document]], Sequence[object]],
) -> None:
    """Fill the ends of ``retention``, and empty it where it does not say how much of the score is kept.

    It says that of a score of which more is better, which begins at 0 and of which ``full`` has more than guessing.

    Args:
        by_cell: scores by cell and document, of those cells whose score is the mean over documents.
        sources_of: what documents are made of.
    """
    full = next((row for row in rows if row.method == FULL), None)
    place = None if full is None else _place_of(full, rows, metric)
    whole = by_cell.get(FULL, {}) if full is None else by_cell.get(full.cell, {})
    for row in rows:
        row.retention_low = row.retention_high = None
        begins_at_0 = metric.low == 0 or not math.isfinite(metric.low)
        if (
            not metric.higher_is_better
            or not begins_at_0
            or place in ("floor", "chance")
            or (row.score_full or 0.0) <= 0
        ):
            row.retention = None
        mine = by_cell.get(row.cell, {})
        if row.retention is None or row.method == FULL or not mine or not mine.keys() <= whole.keys():
            continue
        scale = metric.high if row.binary and math.isfinite(metric.high) else 1.0
        interval = ratio_interval(
            np.array(list(mine.values())) / scale,
            np.array([whole[document] for document in mine]) / scale,
            binary=bool(row.binary),
            sources=sources_of(mine),
        )
        if interval is not None:
            row.retention_low, row.retention_high = interval


def ratio_interval(
    scores: Array, baseline: Array, *, binary: bool = False, sources: Sequence[object] | None = None
) -> Interval | None:
    """95 % interval of the ratio of two means over the same documents, or None where they do not bound it.

    The ratios that ``mean(scores - ratio * baseline) = 0`` is not rejected of (Fieller 1954). To scores of two values
    one document is added of each kind, in halves: right with both, with either, with none (as Agresti & Min do for
    differences, Statistics in Medicine 2005), since there need not be any on which the two differ.

    Args:
        scores: [n], of a binary score 0 and 1.
        baseline: [n].
        sources: of the documents, see :func:`bench.judge.stats.by_source`.
    """
    above, sizes = by_source(scores, sources)
    below, _ = by_source(baseline, sources)
    n, groups = len(scores), len(sizes)
    if groups < LEAST_DOCUMENTS:
        return None
    weights = np.ones(groups)
    if binary:
        above, below = np.append(above, [1.0, 1.0, 0.0, 0.0]), np.append(below, [1.0, 0.0, 1.0, 0.0])
        weights = np.append(weights, [0.5] * 4)
    # Sums over sources: their moments about the ratio of the two means need no centring.
    x, y = float(weights @ above), float(weights @ below)
    total = float(weights.sum())
    critical = normal(groups, n) if binary else student_end(ALPHA / 2, groups - 1)

    def moment(first: Array, second: Array) -> float:
        middle = float(weights @ first) * float(weights @ second) / total
        return (float(weights @ (first * second)) - middle) * total / (total - 1)

    # (x - ratio y)^2 = critical^2 * variance(ratio), a quadratic in the ratio.
    a = y * y - critical**2 * moment(below, below)
    b = x * y - critical**2 * moment(above, below)
    c = x * x - critical**2 * moment(above, above)
    root = b * b - a * c
    if a <= 0 or root < 0:
        return None
    spread = math.sqrt(root)
    if spread == 0 and not binary:
        return None
    low, high = (b - spread) / a, (b + spread) / a
    return Interval(max(low, 0.0), high) if scores.min() >= 0 and baseline.min() >= 0 else Interval(low, high)
