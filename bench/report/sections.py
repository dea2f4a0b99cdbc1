"""The sections of the page: a comparison or timings, as a sortable table with notes and figures."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.records.files.text import printable
from bench.records.finished import Run, comparable
from bench.records.row import Row
from bench.records.sample import Measured, Sample
from bench.records.shown import headline
from bench.records.starts import terms, timed
from bench.records.timing import SpeedRecord, summarize
from bench.report.columns import AGAINST_FULL, BUDGET, DIFFERENCE, METHOD, SCORE, SHARE, STATES, TPOT, TTFT, Column
from bench.report.comparison import compare
from bench.report.figures.canvas import Figure, file_name
from bench.report.figures.curve import curve_figure
from bench.report.figures.layers import oq_figure
from bench.report.figures.scores import score_figure
from bench.report.figures.times import share_figure, speed_figure, time_figure
from bench.report.paragraphs import in_words, named
from bench.report.speed import COLUMNS as SPEED_COLUMNS
from bench.report.speed import LEGEND as SPEED_LEGEND

FIGURED = 40
"""Comparisons that get figures: more would make the page too large for a phone, and nobody looks at more."""
SHARED = 12
"""Comparisons that get a figure of time and memory shares, for the same reason."""


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
    (AGAINST_FULL, lambda row: row.p_holm),
    (SHARE, lambda row: row.kv_bytes_mean),
    (STATES, lambda row: row.original_share),
    (TTFT, lambda row: row.ttft_ms),
    (TPOT, lambda row: row.tpot_ms),
)
"""The columns of the page, and by what each is sorted."""
RUN = Column("run", lambda row: row.run or "", left=True)


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
            sections += _of_task(rows, _TaskSamples(together, model, task), suffix, several, len(sections))
    return sections, warnings


class _TaskSamples:
    """The samples of some runs on a model's task, those that its rows are made of."""

    def __init__(self, runs: Sequence[Run], model: str, task: str) -> None:
        self._of_runs = [
            (run, _newest(item for item in run.samples.values() if (item.model, item.task) == (model, task)))
            for run in runs
        ]

    def clocked(self) -> list[Measured]:
        """Those whose times count."""
        found = []
        for run, mine in self._of_runs:
            starts = timed((item.start or 0 for item in mine), [terms(dict(start)) for start in run.of_run.starts])
            found += [item for item in mine if (item.start or 0) in starts]
        return found

    def whole(self) -> Iterator[Sample]:
        """With their answers, read one by one."""
        for run, mine in self._of_runs:
            yield from run.samples.whole(mine)

    def compared(self) -> Iterator[Sample]:
        """Those that are compared with the full cache token by token."""
        for run, mine in self._of_runs:
            yield from run.samples.whole(item for item in mine if item.kind == "compared")


def _newest(samples: Iterable[Measured]) -> list[Measured]:
    """Of a document that was asked in several ways, those of the last one."""
    found = list(samples)
    asked = {item.document: item.prompt_sha256 for item in found}
    return [item for item in found if asked[item.document] == item.prompt_sha256]


def _of_task(rows: Sequence[Row], samples: _TaskSamples, suffix: str, several: bool, done: int) -> list[Section]:
    """One section per metric of a model's task; times and ratios stand with the first."""
    sections: list[Section] = []
    columns = [*ORDERED[:2], (RUN, lambda row: row.run), *ORDERED[2:]] if several else list(ORDERED)
    columns = [item for item in columns if any(item[0].cell(row) for row in rows)]
    for comparison in compare(rows):
        mine = list(itertools.chain.from_iterable(comparison.groups))
        name = f"{done + len(sections) + 1:02d}-{file_name(mine[0].task, mine[0].metric)}"
        notes = list(comparison.notes)
        if several:
            notes.append("differences, p-values and bold are within each run; nothing is tested from run to run")
        figures: list[Figure | None] = []
        if done + len(sections) < FIGURED:
            figures.append(score_figure(name, mine))
            if not sections:
                figures.append(time_figure(f"{name}-time", mine))
                if done < SHARED:
                    figures.append(share_figure(f"{name}-shares", mine, samples.clocked()))
                figures.append(oq_figure(f"{name}-oq", mine, samples.whole()))
                figures.append(curve_figure(f"{name}-curve", mine, samples.compared()))
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
    sections = []
    for number, together in enumerate(sets.values(), start=1):
        names = ", ".join(run.name for run in together)
        record = together[0].record
        model = record.model.name if isinstance(record, SpeedRecord) else "unknown model"
        rows = [row for run in together for row in summarize(run.timings)]
        rows.sort(key=lambda row: (row.context_length, row.cache_size or 0))
        lengths = [row.context_length for row in rows]
        sections.append(
            Section(
                title=f"Speed over context lengths, {printable(model)} ({names})",
                anchor=f"speed-{number}",
                headers=[(header.replace("\n", " "), header in ("method", "format")) for header, _ in SPEED_COLUMNS],
                lines=[
                    Line(
                        cells=[Cell([cell(row)], cell(row)) for _, cell in SPEED_COLUMNS],
                        leading=False,
                        exercised=True,
                        first=place == 0 or lengths[place - 1] != lengths[place],
                    )
                    for place, row in enumerate(rows)
                ],
                notes=list(SPEED_LEGEND),
                figures=[speed_figure(f"speed-{number}", rows)],
            )
        )
    named = [in_words([run.name for run in together]) for together in sets.values()]
    warnings = [
        f"Timings of {first} and {second} must not be compared: another model, precision or machine, or none known."
        for first, second in itertools.combinations(named, 2)
    ]
    return sections, warnings
