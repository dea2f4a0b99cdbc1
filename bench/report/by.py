"""Rows by what a document is: its length, the depth of a needle, or whatever else its task says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.errors import UserError
from bench.names import RESULTS, SAMPLES
from bench.records.finished import Run, members
from bench.records.row import Row
from bench.records.sample import Measured
from bench.records.shown import headline
from bench.records.starts import terms
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
        UserError: no document says it, and the nearest fact is named; or ``results.csv`` is of an older suite, or has
            no score that is a mean over the documents.
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
    if run.rows and all(row.binary is None for row in run.rows):
        message = f"{run.name}: {RESULTS} is of an older suite and does not say between which ends its scores lie"
        raise UserError(f"{message}: the run's own command writes the file anew", exit_code=2)
    rows: list[Row] = []
    shown = headline(run.rows)
    for model, task in dict.fromkeys((row.model, row.task) for row in shown):
        mine = [row for row in shown if (row.model, row.task) == (model, task)]
        rows += _split(run, mine, members(task, run.rows), values, fact)
    if not rows:
        raise UserError(f"{run.name}: no score in {RESULTS} is the mean over the documents in {SAMPLES}", exit_code=2)
    return replace(run, rows=rows)


def _split(run: Run, rows: Sequence[Row], tasks: set[str], values: Values, fact: str) -> list[Row]:
    """Rows of one model and task or group, value by value."""
    # SciPy, which tables of one run do without.
    from bench.report.anew import is_mean, metric_of, rows_of

    mine = [item for item in run.samples.values() if item.model == rows[0].model and item.task in tasks]
    means = [row for row in rows if is_mean(row, mine)]
    by_value: dict[Any, list[Measured]] = {}
    for sample in mine:
        key = (sample.model, sample.task, sample.document)
        if key in values:
            by_value.setdefault(values[key], []).append(sample)
    metrics = list({row.metric: metric_of(row) for row in means}.values())
    of_starts = [terms(dict(start)) for start in run.of_run.starts]
    found: list[Row] = []
    for value in sorted(by_value, key=lambda value: (isinstance(value, str), value)):
        named = {"task": f"{rows[0].task}, {fact} {_text(value)}", "part_of": None}
        found += [row.model_copy(update=named) for row in rows_of(means, by_value[value], metrics, of_starts)]
    return found


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
