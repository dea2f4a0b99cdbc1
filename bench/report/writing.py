"""Comparisons as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Sequence

from bench.report.columns import EVERYTHING, LEGEND
from bench.report.comparison import compare
from bench.report.rows import Row
from bench.runs.folder import COLUMNS


def to_markdown(tables: Sequence[Sequence[Row]]) -> str:
    """The comparisons as Markdown."""
    lines: list[str] = []
    for rows in tables:
        for comparison in compare(rows):
            lines += [f"**{in_markdown(comparison.title)}**", ""]
            lines.append("| " + " | ".join(column.header for column in EVERYTHING) + " |")
            lines.append("|" + "".join("---|" if column.left else "---:|" for column in EVERYTHING))
            for row in itertools.chain.from_iterable(comparison.groups):
                cells = [in_markdown(column.cell(row)) for column in EVERYTHING]
                lines.append(
                    "| " + " | ".join(f"**{cell}**" if row["leading"] and cell else cell for cell in cells) + " |"
                )
            lines += ["", *[f"- {note}" for note in comparison.notes], ""]
    return "\n".join([*lines, " ".join(LEGEND), ""])


def in_markdown(text: str) -> str:
    """``text`` in a cell of a Markdown table, as it stands."""
    for char in "\\|*_<`":
        text = text.replace(char, f"\\{char}")
    return text


LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "…": r"\ldots{}",
        "×": r"$\times$",
        **{char: f"\\{char}" for char in "&%$#_{}"},
    }
)
"""What stands for characters that LaTeX would obey, or that not every font has."""
LATEX_LEFT_OUT = ("against full", "KV bytes")
"""Columns of :data:`EVERYTHING` that a page has no room for."""


def in_latex(text: str) -> str:
    """``text`` in LaTeX, as it stands; a sign before a digit is a minus, not a hyphen."""
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", text.translate(LATEX))


def to_latex(tables: Sequence[Sequence[Row]]) -> str:
    """The comparisons as tables for a paper; they need the package booktabs."""
    columns = [column for column in EVERYTHING if column.header not in LATEX_LEFT_OUT]
    lines = ["% Needs \\usepackage{booktabs}. Written by arkv-bench report."]
    for comparison in itertools.chain.from_iterable(map(compare, tables)):
        lines += ["", r"\begin{table}", r"\centering", r"\small", rf"\caption{{{in_latex(comparison.title)}}}"]
        lines += [rf"\begin{{tabular}}{{@{{}}{''.join('l' if column.left else 'r' for column in columns)}@{{}}}}"]
        lines += [r"\toprule", " & ".join(in_latex(column.header) for column in columns) + r" \\"]
        for group in comparison.groups:
            lines.append(r"\midrule")
            for row in group:
                cells = [in_latex(column.cell(row)) for column in columns]
                cells = [rf"\textbf{{{cell}}}" if row["leading"] and cell else cell for cell in cells]
                lines.append(" & ".join(cells) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par\smallskip\footnotesize {in_latex(note)}." for note in comparison.notes]
        lines.append(r"\end{table}")
    return "\n".join([*lines, ""])


def to_csv(tables: Sequence[Sequence[Row]]) -> str:
    """All rows of all runs under one header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for rows in tables:
        writer.writerows(rows)
    return buffer.getvalue()
