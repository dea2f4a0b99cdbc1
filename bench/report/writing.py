"""Comparisons as Markdown, LaTeX and CSV."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from bench.records.files.latex import latex_table
from bench.records.files.markdown import in_markdown, markdown_table
from bench.records.row import Row, rows_csv
from bench.report.columns import EVERYTHING, LEGEND
from bench.report.comparison import compare

LATEX_LEFT_OUT = ("against full", "KV bytes")
"""Columns of :data:`EVERYTHING` that a page has no room for."""


def to_markdown(tables: Sequence[Sequence[Row]]) -> str:
    """The comparisons as Markdown."""
    lines: list[str] = []
    headers = [column.header for column in EVERYTHING]
    right = [place for place, column in enumerate(EVERYTHING) if not column.left]
    for comparison in itertools.chain.from_iterable(map(compare, tables)):
        rows = list(itertools.chain.from_iterable(comparison.groups))
        cells = [[column.cell(row) for column in EVERYTHING] for row in rows]
        leading = [place for place, row in enumerate(rows) if row.leading]
        lines += [f"**{in_markdown(comparison.title)}**", ""]
        lines += markdown_table(headers, cells, right=right, bold=leading)
        lines += ["", *[f"- {note}" for note in comparison.notes], ""]
    return "\n".join([*lines, " ".join(LEGEND), ""])


def to_latex(tables: Sequence[Sequence[Row]]) -> str:
    """The comparisons as tables for a paper; they need the package booktabs."""
    columns = [column for column in EVERYTHING if column.header not in LATEX_LEFT_OUT]
    left = [place for place, column in enumerate(columns) if column.left]
    lines = ["% Needs \\usepackage{booktabs}. Written by arkv-bench report."]
    for comparison in itertools.chain.from_iterable(map(compare, tables)):
        groups = [
            [([column.cell(row) for column in columns], bool(row.leading)) for row in group]
            for group in comparison.groups
        ]
        headers = [column.header for column in columns]
        lines += ["", *latex_table(comparison.title, headers, groups, left=left, notes=comparison.notes)]
    return "\n".join([*lines, ""])


def to_csv(tables: Mapping[str, Sequence[Row]]) -> str:
    """All rows of all runs under one header; of several runs, with a column that says which.

    Args:
        tables: the rows by the name of their run.
    """
    several = len(tables) > 1
    rows = (row.model_copy(update={"run": name}) if several else row for name, mine in tables.items() for row in mine)
    # What was read has the digits of its file.
    return rows_csv(rows, of_runs=several, digits=None)
