"""Rows made anew of samples, by the statistics of now: those of a whole run, or of some of its documents."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

from bench.judge.comparison import add_statistics
from bench.names import FULL
from bench.records.measured import columns_of
from bench.records.row import Row
from bench.records.sample import Measured
from bench.records.starts import timed
from tasks.base import Metric


def metric_of(row: Row) -> Metric:
    """What a row says of its metric."""
    return Metric(
        name=row.metric,
        higher_is_better=row.higher_is_better,
        low=-math.inf if row.metric_low is None else row.metric_low,
        high=math.inf if row.metric_high is None else row.metric_high,
        binary=row.binary,
        of_full=row.of_full,
    )


def is_mean(row: Row, samples: Iterable[Measured]) -> bool:
    """The row's score is the mean of what its samples score, as far as its file has digits."""
    taken = _of(row, samples)
    scores = _scores(row, taken)
    return 0 < len(scores) == len(taken) and math.isclose(fmean(scores), row.score, rel_tol=1e-5, abs_tol=1e-9)


def rows_of(
    rows: Iterable[Row],
    samples: Sequence[Measured],
    metrics: Iterable[Metric],
    terms: Sequence[str],
    *,
    of_all: bool = False,
) -> list[Row]:
    """The rows as these samples make them; without those of cells that have none.

    A score becomes the mean over the documents. Which documents are of one source stays unknown of samples of an older
    suite, which do not say it.

    Args:
        rows: of one model and task or group.
        samples: of all cells.
        metrics: of the task or group.
        terms: what times depend on, of each of the run's starts.
        of_all: the samples are all that the rows are of, so that a score which is no mean, such as a perplexity, is
            what it was.
    """
    starts = timed((item.start or 0 for item in samples), terms)
    found = []
    for row in rows:
        if not (taken := _of(row, samples)):
            continue
        score, full = row.score, row.score_full
        if not of_all or is_mean(row, taken):
            documents = {(sample.task, sample.document) for sample in taken}
            whole = [item for item in samples if item.cell == FULL and (item.task, item.document) in documents]
            score, full = fmean(_scores(row, taken)), fmean(_scores(row, whole)) if len(whole) == len(taken) else None
        changed = {
            "n": len({(sample.task, sample.own_id) for sample in taken}),
            "score": score,
            "score_full": full,
            "retention": score / full if full else None,
        }
        found.append(row.model_copy(update={**changed, **columns_of(taken, starts)}))
    add_statistics(found, samples, metrics)
    if any(sample.start is None and sample.source is None for sample in samples):
        for row in found:
            row.sources = None
    return found


def _of(row: Row, samples: Iterable[Measured]) -> list[Measured]:
    return [sample for sample in samples if sample.cell == row.cell and row.metric in sample.scores]


def _scores(row: Row, samples: Iterable[Measured]) -> list[float]:
    return [score for sample in samples if (score := sample.scores.get(row.metric)) is not None]
