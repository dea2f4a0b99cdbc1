"""Comparisons in the terminal: as many columns as it has room for, leaders in bold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.records.finished import Run
from bench.records.row import Row
from bench.report.columns import EVERYTHING, LEGEND, NARROWER, STACKED, Column, for_rows
from bench.report.comparison import Comparison, compare
from bench.report.verdicts import HEADERS, answer


def _table(comparison: Comparison, columns: Sequence[Column]) -> Table:
    table = Table(
        title=Text(comparison.title, style="bold", overflow="fold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
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


def _fitting(comparison: Comparison, console: Console) -> tuple[Table, list[str]]:
    """The table with as many columns as the console is wide, and the headers of those left out."""

    def fits(table: Table) -> bool:
        # Measured as if there were room for all: a table that is too wide would shrink its columns silently.
        table.title, title = None, table.title
        width = console.measure(table, options=console.options.update(width=10_000)).maximum
        table.title = title
        return width <= console.width

    rows = list(itertools.chain.from_iterable(comparison.groups))
    for layout in (EVERYTHING, NARROWER, STACKED):
        columns = for_rows(layout, rows)
        table = _table(comparison, columns)
        if fits(table):
            return table, []
    left_out: list[str] = []
    while not fits(table) and (spare := [column for column in columns if not column.needed]):
        columns.remove(spare[-1])
        left_out.insert(0, spare[-1].header.replace("\n", ", "))
        table = _table(comparison, columns)
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
            table.add_column(header, overflow="fold")
        for line in said.lines:
            table.add_row(*map(Text, line.cells))
        console.print(table)
    for note in said.notes:
        console.print(f"- {note}", markup=False, highlight=False)


def print_comparison(tables: Sequence[Sequence[Row]], console: Console) -> None:
    """Print every comparison of the runs' rows, then what the columns mean."""
    for rows in tables:
        for comparison in compare(rows):
            table, left_out = _fitting(comparison, console)
            console.print()
            console.print(table)
            notes = list(comparison.notes)
            if left_out:
                notes.append(f"no room for {', '.join(left_out)}: see results.csv, or --format markdown")
            for note in notes:
                console.print(f"- {note}", markup=False, highlight=False)
    console.print()
    for line in LEGEND:
        console.print(line, markup=False, highlight=False, style="dim")
