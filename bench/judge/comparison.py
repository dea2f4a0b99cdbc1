"""What a table may claim: each score with its interval, its paired difference to ``full``, and who leads a budget.

The family that intervals and p-values of differences hold for together is every method of one task and metric that
compressed anything, against ``full``; within a budget, the method with the best score against each other one. A metric
that measures the distance from ``full`` is not compared with it, whose own value is no measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from bench.judge.budgets import by_budget
from bench.judge.family import Comparison, compare_over
from bench.judge.retention import add_retention, mark_untold
from bench.judge.stats import benjamini_hochberg, holm, is_binary, mean_interval
from bench.judge.verdict import ALPHA
from bench.names import FULL
from bench.records.row import STATISTICS, Row
from bench.records.sample import Measured, source_of
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
        metrics: what they say of their ranges and values.
        seed: of the resamples.
    """
    scores: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    sources: dict[tuple[str, str], tuple[str, str]] = {}
    unknown = set()
    document = ("", "")
    # Resamples are drawn by place: the order in which a run was continued must not matter.
    for sample in sorted(samples, key=attrgetter("task", "document")):
        if document != (sample.task, sample.document):
            # One object for all cells.
            document = (sample.task, sample.document)
        sources[document] = source_of(sample)
        for name, score in sample.scores.items():
            if score is None:
                unknown.add((name, sample.cell))
            else:
                scores.setdefault((name, sample.cell), {})[document] = score
    for key in unknown:
        scores.pop(key, None)
    for row in rows:
        for column in (*STATISTICS, "sources"):
            setattr(row, column, None)
    known = {metric.name: metric for metric in metrics}
    for name in dict.fromkeys(row.metric for row in rows):
        metric = known.get(name, Metric(name=name))
        mine = [row for row in rows if row.metric == name]
        by_cell = {row.cell: scores[name, row.cell] for row in mine if _averages(row, scores)}
        of_all = [list(found.values()) for (other, _), found in scores.items() if other == name]
        how = _How(metric, is_binary(*of_all, bounds=(metric.low, metric.high)), sources, seed)
        for row in mine:
            if row.cell in by_cell and not (row.method == FULL and metric.of_full is not None):
                _add_interval(row, by_cell[row.cell], how)
        if metric.of_full is None:
            _add_differences([row for row in mine if row.method != FULL], by_cell, how)
        for group in by_budget(mine):
            _mark_leading(group, by_cell, how)
        for row in mine:
            row.metric_low, row.metric_high = (end if math.isfinite(end) else None for end in how.bounds)
            row.binary, row.of_full = how.binary, metric.of_full
        mark_untold(mine, metric)
        add_retention(mine, metric, by_cell, how.sources_of)


@dataclass(frozen=True)
class _How:
    """How scores of a metric are compared."""

    metric: Metric
    of_two_values: bool
    """All that were measured are at the ends of the range. A metric of such scores may give others for some answers."""
    sources: Mapping[tuple[str, str], tuple[str, str]]
    """What each document is made of."""
    seed: int

    @property
    def binary(self) -> bool:
        return self.metric.binary is not False and self.metric.of_full is None and self.of_two_values

    @property
    def bounds(self) -> tuple[float, float]:
        return self.metric.low, self.metric.high

    @property
    def logarithm(self) -> bool:
        """A distance from ``full`` that cannot be negative: twice as far is what compares, not so much further."""
        return self.metric.of_full == self.metric.low == 0

    def sources_of(self, documents: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        return [self.sources[document] for document in documents]

    def compare(self, pairs: Sequence[tuple[Scores, Scores]]) -> list[Comparison]:
        return compare_over(
            pairs,
            self.sources_of,
            binary=self.binary,
            bounds=self.bounds,
            logarithm=self.logarithm,
            seed=self.seed,
        )


def _averages(row: Row, scores: Mapping[tuple[str, str], Scores]) -> bool:
    """Whether the score is the mean over documents, so that statistics of that mean are statistics of the score."""
    found = scores.get((row.metric, row.cell))
    if not found:
        return False
    return math.isclose(sum(found.values()) / len(found), row.score, rel_tol=1e-6, abs_tol=1e-9)


def _add_interval(row: Row, scores: Scores, how: _How) -> None:
    sources = how.sources_of(scores)
    row.sources = len(set(sources))
    interval = mean_interval(
        list(scores.values()),
        binary=how.binary,
        bounds=how.bounds,
        logarithm=how.logarithm,
        sources=sources,
        seed=how.seed,
    )
    if interval is not None:
        row.score_low, row.score_high = interval


def _against(
    rows: Sequence[Row], baseline: Row | str, by_cell: Mapping[str, Scores], how: _How
) -> list[tuple[Row, Comparison]]:
    """The rows that can be compared with a cell, on their own documents; one family, whatever documents they have."""
    other = by_cell.get(baseline if isinstance(baseline, str) else baseline.cell, {})
    having = [row for row in rows if (mine := by_cell.get(row.cell)) and mine.keys() <= other.keys()]
    return list(zip(having, how.compare([(by_cell[row.cell], other) for row in having]), strict=True))


def _add_differences(rows: Sequence[Row], by_cell: Mapping[str, Scores], how: _How) -> None:
    for row in rows:
        # What nothing was compressed of is no member of the family.
        if row.not_exercised:
            for _, found in _against([row], FULL, by_cell, how):
                row.difference = found.difference
    tested = []
    for row, found in _against([row for row in rows if not row.not_exercised], FULL, by_cell, how):
        row.difference = found.difference
        row.detectable_difference = found.detectable
        if found.interval is not None:
            row.difference_low, row.difference_high = found.interval
        if found.p_value is not None:
            row.p_value, row.p_adjusted = found.p_value, found.p_adjusted
            tested.append(row)
    p_values = [row.p_value for row in tested if row.p_value is not None]
    for row, p_holm, p_bh in zip(tested, holm(p_values), benjamini_hochberg(p_values), strict=True):
        row.p_holm, row.p_bh = p_holm, p_bh


def _mark_leading(group: Sequence[Row], by_cell: Mapping[str, Scores], how: _How) -> None:
    """Mark the best of a budget together with all that cannot be told from it; nobody where that is every row."""
    playing = [row for row in group if row.method != FULL and not row.not_exercised and row.cell in by_cell]
    if len(playing) < 2:
        return
    sign = 1 if playing[0].higher_is_better else -1
    best, *others = sorted(playing, key=lambda row: -sign * row.score)
    behind = set()
    for row, found in _against(others, best, by_cell, how):
        if found.p_adjusted is not None and found.p_adjusted < ALPHA:
            behind.add(row.cell)
        row.best, row.p_to_best = best.cell, found.p_adjusted
        if math.isfinite(found.difference):
            row.to_best = found.difference
        if found.interval is not None:
            row.to_best_low, row.to_best_high = found.interval
    for row in playing:
        row.leading = bool(behind) and row.cell not in behind
