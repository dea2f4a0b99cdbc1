"""What a table may claim: each score with its interval, its paired difference to ``full``, and who leads a budget.

The family of comparisons that p-values are adjusted over is every method of one task and metric that compressed
anything, against ``full``; within a budget, the method with the best score against each other one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isclose
from operator import itemgetter

from bench.judge.budgets import by_budget
from bench.judge.stats import (
    UNBOUNDED,
    benjamini_hochberg,
    compare,
    holm,
    is_binary,
    mean_interval,
    p_value,
)
from bench.judge.verdict import ALPHA
from bench.names import FULL
from bench.records.row import STATISTICS, Row
from bench.records.sample import Measured
from tasks.base import Metric

Scores = Mapping[tuple[str, str], float]
"""One score per document, whose key is its task and id: those of a group may share ids."""


def add_statistics(
    rows: Sequence[Row], samples: Iterable[Measured], metrics: Iterable[Metric] = (), *, seed: int = 0
) -> None:
    """Fill the columns :data:`bench.records.row.STATISTICS` of the rows of one model and task or group.

    None is unknown; a score that is no mean over documents, such as a perplexity, gets none.

    Args:
        rows: as :func:`bench.runs.results.rows` makes them.
        samples: those that the rows are made of, with ``task``, ``document``, ``cell`` and ``scores``, where None is a
            score that one document cannot have.
        metrics: whose range no interval leaves.
        seed: of the resamples.
    """
    scores: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    unknown = set()
    # Resamples are drawn by place: the order in which a run was continued must not matter.
    for document, sample in sorted(((_document(sample), sample) for sample in samples), key=itemgetter(0)):
        for metric, score in sample.scores.items():
            if score is None:
                unknown.add((metric, sample.cell))
            else:
                scores.setdefault((metric, sample.cell), {})[document] = score
    for key in unknown:
        scores.pop(key, None)
    for row in rows:
        for name in STATISTICS:
            setattr(row, name, None)
    ranges = {metric.name: (metric.low, metric.high) for metric in metrics}
    for metric in dict.fromkeys(row.metric for row in rows):
        bounds = ranges.get(metric, UNBOUNDED)
        mine = [row for row in rows if row.metric == metric]
        by_cell = {row.cell: scores[metric, row.cell] for row in mine if _averages(row, scores)}
        # A divergence of the full cache from itself is 0 in every document and yet no proportion.
        binary = is_binary(*(list(found.values()) for (name, _), found in scores.items() if name == metric))
        for row in mine:
            if row.cell in by_cell:
                _add_interval(row, by_cell[row.cell], binary, bounds, seed)
        _add_differences([row for row in mine if row.method != FULL], by_cell, bounds, seed)
        for group in by_budget(mine):
            _mark_leading(group, by_cell, seed)


def _document(sample: Measured) -> tuple[str, str]:
    return sample.task, sample.document


def _averages(row: Row, scores: Mapping[tuple[str, str], Scores]) -> bool:
    """Whether the score is the mean over documents, so that statistics of that mean are statistics of the score."""
    found = scores.get((row.metric, row.cell))
    if not found:
        return False
    return isclose(sum(found.values()) / len(found), row.score, rel_tol=1e-6, abs_tol=1e-9)


def _add_interval(row: Row, scores: Scores, binary: bool, bounds: tuple[float, float], seed: int) -> None:
    interval = mean_interval(list(scores.values()), binary=binary, bounds=bounds, seed=seed)
    if interval is not None:
        row.score_low, row.score_high = interval


def _paired(mine: Scores | None, other: Scores | None) -> tuple[list[float], list[float]] | None:
    """Scores of both on the documents of the first, or None where the other has not answered all of them."""
    if mine is None or other is None or not mine.keys() <= other.keys():
        return None
    return list(mine.values()), [other[document] for document in mine]


def _add_differences(
    rows: Sequence[Row], by_cell: Mapping[str, Scores], bounds: tuple[float, float], seed: int
) -> None:
    tested = []
    for row in rows:
        paired = _paired(by_cell.get(row.cell), by_cell.get(FULL))
        if paired is None:
            continue
        found = compare(*paired, bounds=bounds, seed=seed)
        row.difference = found.difference
        if row.not_exercised:
            continue
        row.detectable_difference = found.detectable
        if found.interval is not None:
            row.difference_low, row.difference_high = found.interval
        if found.p_value is not None:
            row.p_value = found.p_value
            tested.append(row)
    p_values = [row.p_value for row in tested if row.p_value is not None]
    for row, p_holm, p_bh in zip(tested, holm(p_values), benjamini_hochberg(p_values), strict=True):
        row.p_holm, row.p_bh = p_holm, p_bh


def _mark_leading(group: Sequence[Row], by_cell: Mapping[str, Scores], seed: int) -> None:
    """Mark the best of a budget together with all that cannot be told from it; nobody where that is every row."""
    playing = [row for row in group if row.method != FULL and not row.not_exercised and row.cell in by_cell]
    if len(playing) < 2:
        return
    sign = 1 if playing[0].higher_is_better else -1
    best, *others = sorted(playing, key=lambda row: -sign * row.score)
    p_values = []
    for row in others:
        paired = _paired(by_cell[row.cell], by_cell[best.cell])
        found = None if paired is None else p_value(*paired, seed=seed)
        p_values.append(1.0 if found is None else found)
    behind = [adjusted < ALPHA for adjusted in holm(p_values)]
    for row, is_behind in zip([best, *others], [False, *behind], strict=True):
        row.leading = any(behind) and not is_behind
