"""Scores of runs beside published ones.

The published figures are a CSV file with the columns ``model``, ``method``, ``budget``, ``task`` and
``performance``, in percent; others are ignored. ``budget`` is a cache size in tokens, empty for the full cache.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.errors import UserError
from bench.names import FULL, own_name
from bench.records.files.csv_ import csv_text, finite, read_cells
from bench.records.files.markdown import markdown_table
from bench.records.files.text import printable
from bench.records.row import Row
from tasks.longbench.datasets import DATASETS

NEEDED = ("model", "method", "budget", "task", "performance")

METHODS = {"base": FULL, "arkv": "mix"}
"""Published names of methods, where they are not ours."""

SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics between 0 and 1, published in percent. LongBench's are in percent here too."""

HEADERS = ("model", "task", "metric", "method", "budget", "n", "here", "published", "difference")
ON_THE_LEFT = ("model", "task", "metric", "method")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A row of a run beside the published figure of the same model, task, method and budget; both in percent."""

    row: Row
    here: float
    published: float

    @property
    def difference(self) -> float:
        """What a run is above the published figure."""
        return self.here - self.published

    def cells(self) -> list[str]:
        """Under :data:`HEADERS`."""
        row = self.row
        numbers = (f"{self.here:.2f}", f"{self.published:.2f}", f"{self.difference:+.2f}")
        budget = "" if row.cache_size is None else str(row.cache_size)
        return [row.model, row.task, row.metric, row.method, budget, str(row.n), *numbers]


Key = tuple[str, str, str, int | None]


def read_published(path: Path) -> dict[Key, float]:
    """Figures by model, task, method and budget.

    Raises:
        UserError: no such file, a missing column, or a cell that makes no sense (line and column are named).
    """
    figures: dict[Key, float] = {}
    for line, cells in read_cells(path, NEEDED, f"published figures need {', '.join(NEEDED)}"):
        budget, performance = cells["budget"], cells["performance"]
        if budget and not budget.isdecimal():
            raise UserError(f"{path}, line {line}, column 'budget': {printable(budget)!r} is no number of tokens")
        if (value := finite(performance)) is None:
            raise UserError(f"{path}, line {line}, column 'performance': {printable(performance)!r} is no number")
        method = cells["method"].casefold()
        size = int(budget) if budget else None
        figures[_model(cells["model"]), _task(cells["task"]), METHODS.get(method, method), size] = value
    if not figures:
        raise UserError(f"{path} has no rows")
    return figures


def _model(name: str) -> str:
    """``meta-llama/Llama-3.1-8B-Instruct`` and ``Meta-Llama-3.1-8B-Instruct`` are one model."""
    return name.rpartition("/")[2].casefold().removeprefix("meta-")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold()).replace("retrieval", "retr")


_LONGBENCH = {_plain(title): name for name, dataset in DATASETS.items() for title in (dataset.title, name)}


def _task(name: str) -> str:
    """The task of a published name, which may be a dataset's title such as ``PassageRetr.-en``."""
    found = _LONGBENCH.get(_plain(name))
    return f"longbench:{found}" if found else name


def pair(rows: Sequence[Row], figures: dict[Key, float]) -> list[Pair]:
    """The rows that have a published figure, in their order.

    A budget in bytes or as a share of the prompt is another one than the published and pairs with nothing, and so is
    a question behind the compressed context.

    Raises:
        UserError: no row has a figure; the models of both sides are named.
    """
    pairs = []
    for row in rows:
        if row.task != own_name(row.task):
            continue
        metric = row.metric.partition(",")[0]
        in_percent = row.task.startswith("longbench:")
        if in_percent and row.metric != DATASETS[row.task.partition(":")[2]].metric:
            continue
        if not in_percent and metric not in SHARES:
            continue
        if row.method != FULL and (row.budget_unit != "tokens" or row.cache_size is None):
            continue
        published = figures.get((_model(row.model), row.task, row.method, row.cache_size))
        if published is not None:
            pairs.append(Pair(row=row, here=row.score * (1 if in_percent else 100), published=published))
    if not pairs:
        here = ", ".join(sorted({_model(row.model) for row in rows}))
        there = ", ".join(sorted({model for model, *_ in figures}))
        raise UserError(
            f"no row has a published figure: models here: {here}; published: {there}; "
            "model, task, method and cache size in tokens must be the same"
        )
    return pairs


def means(pairs: Sequence[Pair]) -> list[list[str]]:
    """A line per model, method and budget with the means over the tasks of one scale, where there are several."""
    groups: dict[tuple[str, str, int | None], list[Pair]] = {}
    for item in pairs:
        if item.row.task.startswith("longbench:"):
            groups.setdefault((item.row.model, item.row.method, item.row.cache_size), []).append(item)
    lines = []
    for (model, method, cache_size), mine in groups.items():
        if len(mine) < 2:
            continue
        here, published = (
            sum(values) / len(mine) for values in zip(*((p.here, p.published) for p in mine), strict=True)
        )
        numbers = (f"{here:.2f}", f"{published:.2f}", f"{here - published:+.2f}")
        budget = "" if cache_size is None else str(cache_size)
        lines.append([model, f"mean of {len(mine)} datasets", "", method, budget, "", *numbers])
    return lines


def print_against(pairs: Sequence[Pair], console: Console) -> None:
    """Print the pairs, then their means."""
    table = Table(
        title="Beside published figures, in percent", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False
    )
    for header in HEADERS:
        table.add_column(header, justify="left" if header in ON_THE_LEFT else "right")
    for item in pairs:
        table.add_row(*map(Text, item.cells()))
    table.add_section()
    for line in means(pairs):
        table.add_row(*map(Text, line), style="bold")
    console.print()
    console.print(table)


def to_markdown(pairs: Sequence[Pair]) -> str:
    """The pairs and their means as Markdown."""
    right = [place for place, name in enumerate(HEADERS) if name not in ON_THE_LEFT]
    return "\n".join([*markdown_table(HEADERS, [*(item.cells() for item in pairs), *means(pairs)], right=right), ""])


def to_csv(pairs: Sequence[Pair]) -> str:
    """The pairs, without their means."""
    return csv_text(HEADERS, [item.cells() for item in pairs])
