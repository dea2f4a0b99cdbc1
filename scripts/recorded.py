"""What ``results.csv`` and ``curve.csv`` of the runs under results/ hold: today's statistics of their samples.
``make docs`` writes it, a test compares it."""

from __future__ import annotations

from pathlib import Path

from bench.errors import UserError
from bench.judge.curve import curve_rows
from bench.names import CURVE, RESULTS, SAMPLES, own_name
from bench.records.curve import curve_csv
from bench.records.finished import Run, members, read_runs
from bench.records.row import Row, rows_csv
from bench.records.starts import terms
from bench.report.anew import metric_of, rows_of
from tasks.base import Metric, TaskGroup
from tasks.registry import TASKS, get_task, split_spec

RECORDS = Path(__file__).resolve().parent.parent / "results"


def recorded() -> list[Path]:
    """The folders of runs."""
    return sorted(file.parent for file in RECORDS.rglob(RESULTS))


def tables(folder: Path) -> dict[str, str]:
    """What a run's tables hold, by the names of their files.

    Raises:
        UserError: the samples are not those that the rows are of.
    """
    (run,) = read_runs([folder])
    rows = [
        row
        for model, task in dict.fromkeys((row.model, row.task) for row in run.rows)
        for row in _anew(run, [row for row in run.rows if (row.model, row.task) == (model, task)])
    ]
    if [(row.cell, row.metric, row.n) for row in rows] != [(row.cell, row.metric, row.n) for row in run.rows]:
        raise UserError(f"{folder}: {SAMPLES} has other documents than {RESULTS}")
    found = {RESULTS: rows_csv(rows)}
    if (folder / CURVE).is_file():
        found[CURVE] = _curve(run)
    return found


def _anew(run: Run, rows: list[Row]) -> list[Row]:
    """The rows of one model and task or group."""
    model, task = rows[0].model, rows[0].task
    named = members(task, run.rows)
    samples = [item for item in run.samples.values() if item.model == model and item.task in named]
    metrics = {row.metric: metric_of(row) for row in rows} | {metric.name: metric for metric in _metrics(task)}
    found = rows_of(rows, samples, metrics.values(), [terms(dict(start)) for start in run.of_run.starts], of_all=True)
    for row in found:
        if run.of_run.continued and not run.of_run.starts:
            # Samples do not say in which start they were measured.
            row.timed_documents = None
    return found


def _metrics(task: str) -> tuple[Metric, ...]:
    """What a task of the suite says of its metrics, as far as it does before it is loaded; none of any other task."""
    name = own_name(task)
    if split_spec(name)[0] not in TASKS:
        return ()
    found = get_task(name)
    if not isinstance(found, TaskGroup):
        return found.metrics
    # A part is asked for as a group of one.
    part = next((item for item in found.tasks() if item.name == name), None)
    return found.metrics() if part is None else part.metrics


def _curve(run: Run) -> str:
    """Cell by cell, as a run writes it."""
    places = {cell: place for place, cell in enumerate(run.of_run.cells)}
    compared = [item for item in run.samples.values() if item.kind == "compared"]
    compared.sort(key=lambda item: (item.model, item.task, places[item.cell]))
    return curve_csv(curve_rows(run.samples.whole(compared)))


def write() -> None:
    """Write the tables of all runs."""
    for folder in recorded():
        for name, text in tables(folder).items():
            (folder / name).write_text(text, encoding="utf-8")
