"""Comparisons as Markdown, LaTeX and CSV."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from bench.records.files.csv_ import csv_text
from bench.records.files.latex import latex_table
from bench.records.files.markdown import in_markdown, markdown_table
from bench.records.row import COLUMNS, RUN, Row
from bench.report.between import Pair
from bench.report.between_written import AGAINST, csv_cells
from bench.report.columns import EVERYTHING, LEGEND, for_rows
from bench.report.comparison import compare

LATEX_LEFT_OUT = ("against full", "score kept", "KV bytes")
"""Columns of :data:`EVERYTHING` that a page has no room for."""


def to_markdown(tables: Sequence[Sequence[Row]], times: str = "") -> str:
    """The comparisons as Markdown.

    Args:
        times: what times are of, by :func:`bench.report.verdicts.times_of`.
    """
    lines: list[str] = []
    for comparison in itertools.chain.from_iterable(map(compare, tables)):
        rows = list(itertools.chain.from_iterable(comparison.groups))
        columns = for_rows(EVERYTHING, rows)
        headers = [column.header for column in columns]
        right = [place for place, column in enumerate(columns) if not column.left]
        cells = [[column.cell(row) for column in columns] for row in rows]
        leading = [place for place, row in enumerate(rows) if row.leading]
        lines += [f"**{in_markdown(comparison.title)}**", ""]
        lines += markdown_table(headers, cells, right=right, bold=leading)
        lines += ["", *[f"- {note}" for note in comparison.notes], ""]
    return "\n".join([*lines, " ".join(filter(None, (*LEGEND, in_markdown(times)))), ""])


def to_latex(tables: Sequence[Sequence[Row]]) -> str:
    """The comparisons as tables for a paper; they need the package booktabs."""
    fitting = [column for column in EVERYTHING if column.header not in LATEX_LEFT_OUT]
    lines = ["% Needs \\usepackage{booktabs}. Written by arkv-bench report."]
    for comparison in itertools.chain.from_iterable(map(compare, tables)):
        columns = for_rows(fitting, list(itertools.chain.from_iterable(comparison.groups)))
        left = [place for place, column in enumerate(columns) if column.left]
        groups = [
            [([column.cell(row) for column in columns], bool(row.leading)) for row in group]
            for group in comparison.groups
        ]
        headers = [column.header for column in columns]
        lines += ["", *latex_table(comparison.title, headers, groups, left=left, notes=comparison.notes)]
    return "\n".join([*lines, ""])


def to_csv(tables: Mapping[str, Sequence[Row]], pairs: Sequence[Pair] = ()) -> str:
    """All rows of all runs under one header; of several runs, with a column that says which.

    Args:
        tables: the rows by the name of their run.
        pairs: runs that are compared with the first, whose rows get the columns :data:`AGAINST`.
    """
    several = len(tables) > 1
    against = csv_cells(pairs)
    lines = [
        {**row.model_dump(), RUN: name, **against.get((name, row.model, row.task, row.metric, row.cell), {})}
        for name, mine in tables.items()
        for row in mine
    ]
    columns = [*([RUN] if several else []), *COLUMNS, *(AGAINST if against else ())]
    return csv_text(columns, lines, exact=True)
