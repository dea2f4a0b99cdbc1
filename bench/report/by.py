"""Rows by what a document is: its length, the depth of a needle, or whatever else its task says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from bench.errors import UserError
from bench.names import FULL, RESULTS
from bench.records.finished import Run, members
from bench.records.measured import columns_of
from bench.records.row import Row
from bench.records.sample import Measured
from bench.records.shown import headline
from bench.records.starts import terms, timed
from tasks.base import Metric
from tasks.errors import nearest

Values = Mapping[tuple[str, str, str], Any]
"""Of one fact, by model, task and document."""


def split_by(run: Run, fact: str) -> Run:
    """The run with a row for each value of a fact in the place of each row: ``needle, length 2000``.

    Statistics are those of the documents of that value alone. A score that is no mean over documents, such as a
    perplexity, has no such rows.

    Args:
        fact: what ``info`` of the samples calls it, such as ``length`` or ``depth``.

    Raises:
        UserError: no document says it, and the nearest fact is named; or ``results.csv`` is of an older suite.
    """
    values: dict[tuple[str, str, str], Any] = {}
    known: set[str] = set()
    for sample in run.samples.whole(run.samples.values()):
        known |= {name for name, value in sample.info.items() if isinstance(value, str | int | float)}
        value = sample.info.get(fact)
        if isinstance(value, str | int | float):
            values[sample.model, sample.task, sample.document] = value
    if not values:
        hint = nearest(fact, known) if known else "nor anything else"
        raise UserError(f"{run.name}: no document says its {fact}: {hint}", exit_code=2)
    # The statistics of parts need what the rows of older files do not say.
    if run.rows and all(row.sources is None for row in run.rows):
        message = f"{run.name}: {RESULTS} is of an older suite and does not say between which ends its scores lie"
        raise UserError(f"{message}: the run's own command writes the file anew", exit_code=2)
    rows: list[Row] = []
    shown = headline(run.rows)
    for model, task in dict.fromkeys((row.model, row.task) for row in shown):
        mine = [row for row in shown if (row.model, row.task) == (model, task)]
        rows += _split(run, mine, members(task, run.rows), values, fact)
    return replace(run, rows=rows)


def _split(run: Run, rows: Sequence[Row], tasks: set[str], values: Values, fact: str) -> list[Row]:
    """Rows of one model and task or group, value by value."""
    # SciPy, which tables of one run do without.
    from bench.judge.comparison import add_statistics

    by_value: dict[Any, list[Measured]] = {}
    for sample in run.samples.values():
        key = (sample.model, sample.task, sample.document)
        if sample.model == rows[0].model and sample.task in tasks and key in values:
            by_value.setdefault(values[key], []).append(sample)
    metrics = {row.metric: _metric(row) for row in rows}
    found: list[Row] = []
    for value in sorted(by_value, key=lambda value: (isinstance(value, str), value)):
        samples = by_value[value]
        starts = timed((item.start or 0 for item in samples), [terms(dict(start)) for start in run.of_run.starts])
        mine = [part for row in rows if (part := _part(row, samples, starts, f"{row.task}, {fact} {_text(value)}"))]
        add_statistics(mine, samples, metrics.values())
        found += mine
    return found


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _metric(row: Row) -> Metric:
    return Metric(
        name=row.metric,
        higher_is_better=row.higher_is_better,
        low=-math.inf if row.metric_low is None else row.metric_low,
        high=math.inf if row.metric_high is None else row.metric_high,
        binary=row.binary,
        of_full=row.of_full,
    )


def _part(row: Row, samples: Sequence[Measured], starts: Any, task: str) -> Row | None:
    """What a row is over these samples; None where single documents have no such score."""
    taken = [sample for sample in samples if sample.cell == row.cell and row.metric in sample.scores]
    scores = [score for sample in taken if (score := sample.scores[row.metric]) is not None]
    if not scores or len(scores) < len(taken):
        return None
    documents = {(sample.task, sample.document) for sample in taken}
    whole = [
        score
        for sample in samples
        if sample.cell == FULL and (sample.task, sample.document) in documents
        if (score := sample.scores.get(row.metric)) is not None
    ]
    score, full = fmean(scores), fmean(whole) if len(whole) == len(taken) else None
    changed = {"task": task, "part_of": None, "n": len(taken), "score": score, "score_full": full}
    return row.model_copy(update={**changed, "retention": score / full if full else None, **columns_of(taken, starts)})
