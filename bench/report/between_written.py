"""Run against run as text: in the terminal, as Markdown and LaTeX, and as columns of the CSV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.names import with_format
from bench.records.files.latex import latex_table
from bench.records.files.markdown import in_markdown, markdown_table
from bench.records.files.numbers import interval_text, score_text
from bench.report.between import Change, Pair
from bench.report.columns import budget_cell

HEADERS = (
    "run",
    "task, metric",
    "method",
    "budget",
    "n",
    "before",
    "now",
    "change",
    "95 % interval",
    "verdict",
    "fell/rose",
)
LEFT = (0, 1, 2, 9)
AGAINST = (
    "against_run",
    "against_cell",
    "against_n",
    "against_score",
    "change",
    "change_low",
    "change_high",
    "change_p",
)
"""Columns of the CSV for a run that is compared with the first one."""
LEGEND = (
    "change: second run minus first on the documents that both have answered, paired; its interval and p hold for all "
    "rows of a task's metric together. fell/rose: documents whose score became worse and better."
)


def cells(change: Change) -> list[str]:
    """A row under :data:`HEADERS`."""
    row = change.row
    return [
        change.run,
        f"{row.task}, {row.metric}",
        _method(change),
        budget_cell(row),
        str(change.n),
        score_text(change.before),
        score_text(change.now),
        score_text(change.difference, sign="+"),
        interval_text(change.low, change.high),
        change.said,
        f"{change.lost}/{change.found}",
    ]


def _method(change: Change) -> str:
    """With its format; with those of both runs, where they have others, and so of its window."""
    changed = {term.name: f"{term.first or 'none'} to {term.second or 'none'}" for term in change.settings}
    window = f"window {changed['window_size']}" if "window_size" in changed else ""
    kind = changed.get("quant_format", change.row.quant_format)
    return ", ".join(filter(None, (with_format(change.row.method, kind), window)))


def notes(pair: Pair) -> list[str]:
    """What stands below the table."""
    differs = [f"differs: {term}" for term in pair.terms] or ["nothing in the records differs"]
    changed = [_method(change) for change in pair.changes if change.settings]
    paired = [f"paired by method and budget, though its settings differ: {name}" for name in dict.fromkeys(changed)]
    return [*paired, *differs, *pair.notes]


def _groups(pair: Pair) -> list[list[Change]]:
    """By model, task and metric."""
    found: dict[tuple[str, str, str], list[Change]] = {}
    for change in pair.changes:
        found.setdefault((change.row.model, change.row.task, change.row.metric), []).append(change)
    return list(found.values())


def _first_metrics(groups: Sequence[list[Change]]) -> list[list[Change]]:
    found: dict[tuple[str, str], list[Change]] = {}
    for group in groups:
        found.setdefault((group[0].row.model, group[0].row.task), group)
    return list(found.values())


STACKED = ("run", "method\nbudget", "n", "before\nnow", "change\n95 % interval", "verdict", "fell\nrose")
"""The same within 80 columns; task and metric stand in the title."""


def _stacked(change: Change) -> list[str]:
    run, _, method, budget, n, before, now, difference, interval, said, moved = cells(change)
    pairs = (("\n".join(filter(None, pair))) for pair in ((method, budget), (before, now), (difference, interval)))
    name, scores, changed = pairs
    return [run, name, n, scores, changed, said, moved.replace("/", "\n")]


def print_pairs(pairs: Sequence[Pair], console: Console, *, details: bool) -> None:
    """Print every pair: what differs between the two, then a table for each task and metric.

    Args:
        details: all of them; else by each task's first metric only.
    """
    for pair in pairs:
        console.print()
        console.print(pair.title, markup=False, highlight=False, style="bold")
        for note in notes(pair):
            console.print(f"- {note}", markup=False, highlight=False)
        groups = _groups(pair)
        for group in groups if details else _first_metrics(groups):
            row = group[0].row
            title = Text(f"{pair.title}: {row.task}, {row.metric}, {row.model}", overflow="fold")
            table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
            for header in STACKED:
                left = header in ("run", "method\nbudget", "verdict")
                table.add_column(Text(header), justify="left" if left else "right", overflow="fold")
            for change in group:
                table.add_row(*map(Text, _stacked(change)))
            console.print()
            console.print(table)
        console.print(LEGEND, markup=False, highlight=False, style="dim")


def to_markdown(pairs: Sequence[Pair]) -> str:
    lines: list[str] = []
    right = [place for place in range(len(HEADERS)) if place not in LEFT]
    for pair in pairs:
        lines += ["", f"**{in_markdown(pair.title)}**", ""]
        lines += markdown_table(HEADERS, [cells(change) for group in _groups(pair) for change in group], right=right)
        lines += ["", *[f"- {in_markdown(note)}" for note in notes(pair)], "", LEGEND]
    return "".join(f"{line}\n" for line in lines)


def to_latex(pairs: Sequence[Pair]) -> str:
    lines: list[str] = []
    for pair in pairs:
        groups = [[(cells(change), False) for change in group] for group in _groups(pair)]
        lines += ["", *latex_table(pair.title, HEADERS, groups, left=LEFT, notes=[*notes(pair), LEGEND.rstrip(".")])]
    return "".join(f"{line}\n" for line in lines)


def csv_cells(pairs: Sequence[Pair]) -> dict[tuple[str, str, str, str, str], dict[str, Any]]:
    """What stands under :data:`AGAINST`, by run, model, task, metric and cell."""
    found = {}
    for pair in pairs:
        for change in pair.changes:
            row = change.row
            ends = (change.difference, change.low, change.high, change.p_adjusted)
            values = dict(zip(AGAINST, (pair.first, row.cell, change.n, change.before, *ends), strict=True))
            found[pair.second, row.model, row.task, row.metric, change.cell] = values
    return found
