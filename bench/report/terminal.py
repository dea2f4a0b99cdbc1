"""Reports in the terminal: the answer and a short table of each task; with details every table, as many columns as
there is room for, leaders in bold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.records.finished import Run
from bench.records.row import Row
from bench.report.averages import print_averages, together
from bench.report.between import Pair
from bench.report.between_written import print_pairs
from bench.report.columns import (
    EVERYTHING,
    LEGEND,
    NARROWER,
    SHORT,
    SHORT_LEGEND,
    SHORTER,
    STACKED,
    Column,
    for_rows,
)
from bench.report.comparison import Comparison, compare
from bench.report.verdicts import HEADERS, answer, by_task, times_of

SHORT_TABLES = 4
"""Tasks up to which each gets a short table; more of them scroll the answer away."""


def _table(comparison: Comparison, columns: Sequence[Column], apart: int = 1) -> Table:
    table = Table(
        title=Text(comparison.title, style="bold", overflow="fold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, apart, 0, 0),
    )
    for column in columns:
        header = column.header if "\n" in column.header else "\n".join(column.header.rsplit(" ", 1))
        table.add_column(Text(header), justify="left" if column.left else "right", no_wrap=True)
    for group in comparison.groups:
        for row in group:
            style = "bold" if row.leading else ""
            cells = [Text(column.cell(row), style=style) for column in columns]
            table.add_row(*cells, end_section=row is group[-1])
    return table


def _fitting(comparison: Comparison, console: Console, layouts: Sequence[Sequence[Column]]) -> tuple[Table, list[str]]:
    """The table in the first layout that the console is wide enough for, or the last one without the columns that it
    has no room for, and the headers of these."""

    def fits(table: Table) -> bool:
        # Measured as if there were room for all: a table that is too wide would shrink its columns silently.
        table.title, title = None, table.title
        width = console.measure(table, options=console.options.update(width=10_000)).maximum
        table.title = title
        return width <= console.width

    rows = list(itertools.chain.from_iterable(comparison.groups))
    for layout in layouts:
        columns = for_rows(layout, rows)
        table = _table(comparison, columns)
        if fits(table):
            return table, []
    table = _table(comparison, columns, apart=0)
    left_out: list[str] = []
    while not fits(table) and (spare := [column for column in columns if not column.needed]):
        columns.remove(spare[-1])
        left_out.insert(0, spare[-1].header.replace("\n", ", "))
        table = _table(comparison, columns, apart=0)
    return table, left_out


def print_answer(run: Run, console: Console, name: str = "") -> None:
    """Print what the page has on top: at each budget the best method, what is tied with it, and what it costs.

    Args:
        name: of the run, where several are told apart.
    """
    said = answer(run)
    console.print()
    if said.lines:
        title = Text(f"The answer{f', {name}' if name else ''}", style="bold", overflow="fold")
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for header in HEADERS:
            # The last column has most to say, and gets what the others leave.
            table.add_column(header, overflow="fold", max_width=None if header is HEADERS[-1] else console.width // 5)
        for line in said.lines:
            table.add_row(*map(Text, line.cells))
        console.print(table)
    for note in said.notes:
        console.print(f"- {note}", markup=False, highlight=False)


def print_comparison(tables: Sequence[Sequence[Row]], console: Console, times: str = "") -> None:
    """Print every comparison of the runs' rows with all that is known, then what the columns mean.

    Args:
        times: what times are of, by :func:`bench.report.verdicts.times_of`.
    """
    for comparison in itertools.chain.from_iterable(map(compare, tables)):
        _print(comparison, comparison.notes, console, (EVERYTHING, NARROWER, STACKED))
    _print_legend((*LEGEND, times), console)


def _print_short(tables: Sequence[Sequence[Row]], console: Console, times: str) -> None:
    """Print the comparison by each task's first metric, a line per row."""
    comparisons = [compare(rows)[0] for rows in tables]
    for comparison in comparisons:
        _print(comparison, comparison.brief, console, (SHORT, SHORTER))
    _print_legend((*SHORT_LEGEND, times), console)


def _print(comparison: Comparison, notes: Sequence[str], console: Console, layouts: Sequence[Sequence[Column]]) -> None:
    table, left_out = _fitting(comparison, console, layouts)
    console.print()
    console.print(table)
    more = [f"no room for {', '.join(left_out)}: see results.csv, or --format markdown"] if left_out else []
    for note in (*notes, *more):
        console.print(f"- {note}", markup=False, highlight=False)


def _print_legend(lines: Sequence[str], console: Console) -> None:
    console.print()
    for line in filter(None, lines):
        console.print(line, markup=False, highlight=False, style="dim")


def print_runs(
    runs: Sequence[Run],
    tables: Sequence[Sequence[Row]],
    console: Console,
    *,
    pairs: Sequence[Pair] = (),
    reasons: Sequence[str] = (),
    details: bool = False,
) -> None:
    """Print the answer of each run, then what changed between them, and the tables.

    Args:
        tables: the rows that stand together in a comparison.
        reasons: why some of the runs must not be compared.
        details: every table with everything; else a short table of each task by its first metric, as far as there are
            few.
    """
    for run in runs:
        print_answer(run, console, run.name if len(runs) > 1 else "")
    print_pairs(pairs, console, details=details)
    tasks = [one for rows in tables for one in by_task(rows)]
    if details:
        print_comparison(tables, console, times_of(runs))
    elif len(tasks) <= SHORT_TABLES:
        _print_short(tasks, console, times_of(runs))
    else:
        console.print(f"\n{len(tasks)} tables, one for each task, stand in the details.", highlight=False)
    for reason in reasons:
        console.print(reason, markup=False, highlight=False)
    print_averages(together({run.name: run.rows for run in runs}), console)
