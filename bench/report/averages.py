"""LongBench's averages over the datasets of a run: a table for each model, with the cells of the grid as rows; of
several runs, with the run in a column."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.names import own_name, with_format
from bench.records.files.markdown import in_markdown, markdown_table
from bench.records.row import Row
from bench.report.columns import BUDGET
from tasks.longbench.averages import averages
from tasks.longbench.datasets import DATASETS, EXTENDED

BENCHMARKS: Mapping[str, tuple[str, ...]] = {"longbench": tuple(DATASETS), "longbench-e": EXTENDED}
"""What precedes the colon in the names of the tasks, and the datasets that may follow it."""


def together(tables: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The rows of runs by name; of several, each says which it is of."""
    several = len(tables) > 1
    return [row.model_copy(update={"run": name}) if several else row for name, rows in tables.items() for row in rows]


def run_averages(rows: Sequence[Row]) -> list[tuple[str, list[list[str]]]]:
    """The tables: a title, and lines of cells, of which the first line are the headers. None without LongBench rows."""
    groups: dict[tuple[str, str, str], dict[tuple[str | None, str], list[tuple[Row, str]]]] = {}
    for row in rows:
        benchmark, _, name = own_name(row.task).partition(":")
        if name in BENCHMARKS.get(benchmark, ()) and row.metric == DATASETS[name].metric:
            place = row.task.removeprefix(own_name(row.task))
            cells = groups.setdefault((benchmark, place, row.model), {})
            cells.setdefault((row.run, row.cell), []).append((row, name))
    return [
        (f"{benchmark}{place}, averages, {model}", _lines(benchmark, cells))
        for (benchmark, place, model), cells in groups.items()
    ]


def _lines(benchmark: str, cells: Mapping[tuple[str | None, str], Sequence[tuple[Row, str]]]) -> list[list[str]]:
    means = {
        key: {mean.kind: mean for mean in averages({name: row.score for row, name in mine}, BENCHMARKS[benchmark])}
        for key, mine in cells.items()
    }
    kinds = max(means.values(), key=len)
    several = any(run is not None for run, _ in cells)
    lines = [[*(["run"] if several else []), "budget", "method", *kinds]]
    for key, mine in cells.items():
        first = mine[0][0]
        method = with_format(first.method, first.quant_format)
        scores = []
        for kind in kinds:
            mean = means[key].get(kind)
            part = "" if mean is None or mean.datasets == mean.of else f" ({mean.datasets}/{mean.of})"
            scores.append("" if mean is None else f"{mean.score:.2f}{part}")
        lines.append([*([first.run or ""] if several else []), BUDGET.cell(first), method, *scores])
    return lines


LEFT = ("run", "method")
_BROKEN = {
    "Single-doc QA": "Single\ndoc QA",
    "Multi-doc QA": "Multi\ndoc QA",
    "Summarization": "Sum-\nmari-\nzation",
    "Few-shot": "Few-\nshot",
    "Synthetic": "Syn-\nthe-\ntic",
    "English": "Eng-\nlish",
    "Chinese": "Chi-\nnese",
}
"""Headers on several lines, so that all columns fit a terminal of 80."""

LEGEND = "Averages give each dataset the same weight; (2/4) marks one over 2 of 4 datasets."


def print_averages(rows: Sequence[Row], console: Console) -> None:
    """Print the averages of a run, or of several whose rows say which, if there are LongBench tasks; 80 columns have no
    room for a run beside its method, so each run has a table."""
    tables = run_averages(rows)
    for title, (headers, *lines) in tables:
        if headers[0] != "run":
            shown = [_table(title, headers, lines)]
        else:
            names = dict.fromkeys(line[0] for line in lines)
            of_run = {name: [line[1:] for line in lines if line[0] == name] for name in names}
            shown = [_table(f"{title}, {name}", headers[1:], mine) for name, mine in of_run.items()]
        for table in shown:
            console.print()
            console.print(table)
    if tables:
        console.print(LEGEND, markup=False, highlight=False, style="dim")


def _table(title: str, headers: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(
        title=Text(title, style="bold", overflow="fold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
    for header in headers:
        left = header in LEFT
        shown = Text(_BROKEN.get(header, header))
        table.add_column(shown, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for line in lines:
        table.add_row(*(Text(_BREAKS.sub("\n", cell)) for cell in line))
    return table


_BREAKS = re.compile(r" (?=\()|(?<=[:+])")
"""Before over how many datasets an average is, and in the names of peers, which are long."""


def to_markdown(rows: Sequence[Row]) -> str:
    """The same as Markdown; nothing without LongBench tasks."""
    parts: list[str] = []
    for title, (headers, *lines) in run_averages(rows):
        right = [place for place, name in enumerate(headers) if name not in LEFT]
        parts += [f"**{in_markdown(title)}**", "", *markdown_table(headers, lines, right=right), ""]
    return "\n".join([*parts, LEGEND, ""]) if parts else ""
