"""The sections of the page: a comparison or timings, as a sortable table with notes and figures."""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bench.judge.speed import growths, summarize
from bench.names import asked_after, own_name
from bench.records.files.text import printable
from bench.records.finished import Run, comparable, members
from bench.records.row import Row
from bench.records.sample import Measured, Sample
from bench.records.shown import headline
from bench.records.starts import terms, timed
from bench.records.timing import SpeedRecord
from bench.report.between import between
from bench.report.between_written import HEADERS as PAIR_HEADERS
from bench.report.between_written import LEFT as PAIR_LEFT
from bench.report.between_written import LEGEND as PAIR_LEGEND
from bench.report.between_written import cells as pair_cells
from bench.report.between_written import notes as pair_notes
from bench.report.columns import (
    AGAINST_FULL,
    BUDGET,
    DIFFERENCE,
    METHOD,
    RETENTION,
    RUN,
    SCORE,
    SHARE,
    STATES,
    TPOT,
    TTFT,
    Column,
    adjusted,
)
from bench.report.comparison import compare
from bench.report.figures.canvas import Figure, file_name
from bench.report.figures.curve import curve_figure
from bench.report.figures.heat import fact_figures, task_figure
from bench.report.figures.layers import oq_figure
from bench.report.figures.scores import retention_figure, score_figure
from bench.report.figures.throughput import throughput_figures
from bench.report.figures.times import share_figure, speed_figure, time_figure
from bench.report.paragraphs import in_words, named
from bench.report.speed import GROWTH_COLUMNS, GROWTH_LEGEND, ordered, shown
from bench.report.speed import LEGEND as SPEED_LEGEND
from bench.report.speed import Columns as SpeedColumns

_Sampled = TypeVar("_Sampled", bound=Measured)

FIGURED = 40
"""Comparisons that get figures: more would make the page too large for a phone, and nobody looks at more."""
DETAILED = 12
"""Comparisons that get more than a figure of scores, for the same reason."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table on the page: lines, and what its column is sorted by."""

    lines: list[str]
    order: str | float | None


@dataclass(frozen=True)
class Line:
    """A row of a table on the page."""

    cells: list[Cell]
    leading: bool
    exercised: bool
    first: bool
    """Of its budget."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A comparison on the page."""

    title: str
    anchor: str
    headers: list[tuple[str, bool]]
    """With whether the column stands on the left."""
    lines: list[Line]
    notes: list[str]
    figures: list[Figure] = field(default_factory=list)


ORDERED: tuple[tuple[Column, Callable[[Row], Any]], ...] = (
    (BUDGET, lambda row: row.cache_ratio if row.cache_ratio is not None else row.cache_size),
    (METHOD, lambda row: named(row).casefold()),
    (SCORE, lambda row: row.score),
    (DIFFERENCE, lambda row: row.difference),
    (AGAINST_FULL, adjusted),
    (RETENTION, lambda row: row.retention),
    (SHARE, lambda row: row.kv_bytes_mean),
    (STATES, lambda row: row.original_share),
    (TTFT, lambda row: row.ttft_ms),
    (TPOT, lambda row: row.tpot_ms),
)
"""The columns of the page, and by what each is sorted."""


def run_sections(runs: Sequence[Run]) -> tuple[list[Section], list[str]]:
    """The comparisons, and why some of the runs must not be compared."""
    sections: list[Section] = []
    warnings: list[str] = []
    keys = dict.fromkeys((row.model, row.task) for run in runs for row in headline(run.rows))
    for model, task in keys:
        sets, reasons = comparable(runs, model, task)
        warnings += reasons
        for together in sets:
            several = len(together) > 1
            rows = [
                row.model_copy(update={"run": run.name if several else None})
                for run in together
                for row in run.rows
                if (row.model, row.task) == (model, task)
            ]
            suffix = f", {together[0].name}" if len(sets) > 1 else ""
            samples = _TaskSamples(together, rows, model, task)
            beside = _beside(together, model, task)
            sections += _of_task(rows, samples, suffix, several, len(sections), beside)
    return sections, warnings


def _beside(runs: Sequence[Run], model: str, task: str) -> list[Row] | None:
    """The rows of a task with its questions before compression, which share the figure of those with its questions
    after it; None where the task's own stand there."""
    rows = [(run.name if len(runs) > 1 else None, row) for run in runs for row in run.rows if row.model == model]
    if any(row.task == asked_after(task) for _, row in rows):
        return None
    return [row.model_copy(update={"run": run}) for run, row in rows if row.task == own_name(task) != task]


class _TaskSamples:
    """The samples of some runs on a model's task, exactly those that the rows of a table are made of.

    A folder can hold others beside them: of documents that its results are without, or of a start that has not ended.
    Which they are no row says, but how many it has: a cell with another number of samples gets no figure of them.
    """

    def __init__(self, runs: Sequence[Run], rows: Sequence[Row], model: str, task: str) -> None:
        counts = {(row.run, row.cell): row.n for row in rows}
        self._timed = {(row.run, row.cell): row.timed_documents for row in rows}
        self._of_runs: list[tuple[Run, str | None, list[Measured]]] = []
        self._model, self._members = model, members(task, itertools.chain.from_iterable(run.rows for run in runs))
        self._members.discard(task)
        self.other: list[str] = []
        """Cells with another number of samples than their row."""
        for run in runs:
            name = run.name if len(runs) > 1 else None
            mine = _newest(item for item in run.samples.values() if (item.model, item.task) == (model, task))
            held = Counter(item.cell for item in mine)
            other = {cell for cell, count in held.items() if counts.get((name, cell), count) != count}
            self.other += [key(name, run.of_run.cells.get(cell, cell)) for cell in sorted(other)]
            self._of_runs.append((run, name, [item for item in mine if item.cell not in other]))

    def clocked(self) -> list[Measured]:
        """Those whose times count."""
        found = []
        for run, name, mine in self._of_runs:
            starts = timed((item.start or 0 for item in mine), [terms(dict(start)) for start in run.of_run.starts])
            counting = [item for item in mine if (item.start or 0) in starts]
            held = Counter(item.cell for item in counting)
            wanted = {cell: self._timed.get((name, cell)) for cell in held}
            found += [_of_run(item, name) for item in counting if wanted[item.cell] in (None, held[item.cell])]
        return found

    def whole(self) -> Iterator[Sample]:
        """With their answers, read one by one."""
        for run, name, mine in self._of_runs:
            yield from (_of_run(item, name) for item in run.samples.whole(mine))

    def of_members(self) -> Iterator[Sample]:
        """Those of the tasks of a group; none of a task."""
        for run, name, _ in self._of_runs:
            mine = [item for item in run.samples.values() if item.model == self._model and item.task in self._members]
            yield from (_of_run(item, name) for item in run.samples.whole(_newest(mine)))

    def compared(self) -> Iterator[Sample]:
        """Those that are compared with the full cache token by token."""
        for run, name, mine in self._of_runs:
            found = run.samples.whole(item for item in mine if item.kind == "compared")
            yield from (_of_run(item, name) for item in found)


def key(run: str | None, cell: str) -> str:
    """A cell of one of several runs: the same method in two runs is two series of a figure."""
    return cell if run is None else f"{run}: {cell}"


def _of_run(sample: _Sampled, run: str | None) -> _Sampled:
    """The sample under the key of its run's cell."""
    found = copy.copy(sample)
    found.cell = key(run, sample.cell)
    return found


def _newest(samples: Iterable[Measured]) -> list[Measured]:
    """Of a document that was asked in several ways, those of the last one."""
    found = list(samples)
    asked = {item.document: item.prompt_sha256 for item in found}
    return [item for item in found if asked[item.document] == item.prompt_sha256]


def _of_task(
    rows: Sequence[Row],
    samples: _TaskSamples,
    suffix: str,
    several: bool,
    done: int,
    beside: Sequence[Row] | None,
) -> list[Section]:
    """One section per metric of a model's task; times and ratios stand with the first."""
    sections: list[Section] = []
    columns = [*ORDERED[:2], (RUN, lambda row: row.run), *ORDERED[2:]] if several else list(ORDERED)
    columns = [item for item in columns if any(item[0].cell(row) for row in rows)]
    for comparison in compare(rows):
        mine = list(itertools.chain.from_iterable(comparison.groups))
        name = f"{done + len(sections) + 1:02d}-{file_name(mine[0].task, mine[0].metric)}"
        notes = list(comparison.notes)
        # Figures take rows and samples by their cell.
        drawn = [row.model_copy(update={"cell": key(row.run, row.cell)}) for row in mine]
        if samples.other and not sections:
            notes.append(
                "not in the figures that are made of samples, of which the folder holds others than the table: "
                + ", ".join(samples.other)
            )
        figures: list[Figure | None] = []
        if done + len(sections) < FIGURED:
            if beside is not None:
                figures.append(score_figure(name, drawn, [row for row in beside if row.metric == mine[0].metric]))
            if not sections and done < DETAILED:
                figures.append(retention_figure(f"{name}-kept", drawn))
                figures.append(time_figure(f"{name}-time", drawn))
                figures.append(share_figure(f"{name}-shares", drawn, samples.clocked()))
                figures.append(oq_figure(f"{name}-oq", drawn, samples.whole()))
                figures.append(curve_figure(f"{name}-curve", drawn, samples.compared()))
                figures += fact_figures(name, drawn, samples.whole())
                figures.append(task_figure(name, drawn, samples.of_members()))
        sections.append(
            Section(
                title=comparison.title + suffix,
                anchor=f"table-{name}",
                headers=[(column.header.replace("\n", " "), column.left) for column, _ in columns],
                lines=[
                    Line(
                        cells=[Cell(column.cell(row).split("\n"), order(row)) for column, order in columns],
                        leading=bool(row.leading),
                        exercised=not row.not_exercised,
                        first=place == 0,
                    )
                    for group in comparison.groups
                    for place, row in enumerate(group)
                ],
                notes=notes,
                figures=[figure for figure in figures if figure is not None],
            )
        )
    return sections


def pair_sections(runs: Sequence[Run]) -> list[Section]:
    """A section for each run that is compared with the first one, as far as the two may be."""
    sections = []
    for number, pair in enumerate((pair for pair in between(runs) if pair.changes), start=1):
        order = [
            [None, None, None, None, item.n, item.before, item.now, item.difference, None, item.p_adjusted, item.lost]
            for item in pair.changes
        ]
        lines = [
            Line(
                cells=[
                    Cell([text], text if key is None else key)
                    for text, key in zip(pair_cells(change), keys, strict=True)
                ],
                leading=False,
                exercised=not change.row.not_exercised,
                first=place == 0,
            )
            for place, (change, keys) in enumerate(zip(pair.changes, order, strict=True))
        ]
        sections.append(
            Section(
                title=pair.title,
                anchor=f"pair-{number}",
                headers=[(header, place in PAIR_LEFT) for place, header in enumerate(PAIR_HEADERS)],
                lines=lines,
                notes=[*pair_notes(pair), PAIR_LEGEND],
            )
        )
    return sections


def speed_sections(runs: Sequence[Run]) -> tuple[list[Section], list[str]]:
    """A section for each model and machine that was timed, and why timings must not be compared."""
    sets: dict[str, list[Run]] = {}
    for run in runs:
        if run.timings:
            # Timings without a record may be of anything.
            where = run.name
            if isinstance(run.record, SpeedRecord):
                known = {"model": run.record.model.model_dump(), "hardware": run.record.hardware}
                where = json.dumps(known, sort_keys=True)
            sets.setdefault(where, []).append(run)
    sections: list[Section] = []
    for number, together in enumerate(sets.values(), start=1):
        sections += _of_timings(together, number)
    named = [in_words([run.name for run in together]) for together in sets.values()]
    warnings = [
        f"Timings of {first} and {second} must not be compared: another model, precision or machine, or none known."
        for first, second in itertools.combinations(named, 2)
    ]
    return sections, warnings


def _of_timings(together: Sequence[Run], number: int) -> list[Section]:
    """What was timed with one model on one machine, and how times grow with the context."""
    names = ", ".join(run.name for run in together)
    records = [run.record for run in together if isinstance(run.record, SpeedRecord)]
    model = printable(records[0].model.name) if records else "unknown model"
    rows = ordered([row for run in together for row in summarize(run.timings)])
    name = f"speed-{number}"
    failures = [f"not timed: {failure.line}" for record in records for failure in record.failures]
    tables = [
        Section(
            title=f"Speed over context lengths, {model} ({names})",
            anchor=name,
            headers=_headers(shown(rows)),
            lines=_lines(rows, shown(rows), [row.context_length for row in rows]),
            notes=[*SPEED_LEGEND, *map(printable, failures)],
            figures=[speed_figure(name, rows), *throughput_figures(name, rows)],
        )
    ]
    if grown := growths(rows):
        tables.append(
            Section(
                title=f"Time of a step over the context, {model} ({names})",
                anchor=f"{name}-growth",
                headers=_headers(GROWTH_COLUMNS),
                lines=_lines(grown, GROWTH_COLUMNS, [item.row.batch_size for item in grown]),
                notes=[GROWTH_LEGEND],
            )
        )
    return tables


def _headers(columns: SpeedColumns) -> list[tuple[str, bool]]:
    return [(header.replace("\n", " "), header in ("method", "format")) for header, _ in columns]


def _lines(rows: Sequence[Any], columns: SpeedColumns, groups: Sequence[int]) -> list[Line]:
    return [
        Line(
            cells=[Cell([cell(row)], cell(row)) for _, cell in columns],
            leading=False,
            exercised=True,
            first=place == 0 or groups[place - 1] != groups[place],
        )
        for place, row in enumerate(rows)
    ]
