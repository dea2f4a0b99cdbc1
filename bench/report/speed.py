"""The table of ``arkv-bench speed``: one group per context and budget, as many columns as fit."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.costs.speed import COLUMNS as TIMED
from bench.costs.speed import Timing
from bench.errors import UserError
from bench.report.wording import printable

Row = dict[str, Any]


def _number(name: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "" if row[name] is None else f"{row[name] * scale:.{digits}f}"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("tokens", lambda row: str(row["context_length"])),
    ("C", lambda row: str(row["cache_size"] or "")),
    ("method", lambda row: row["method"]),
    ("format", lambda row: row["quant_format"] or ""),
    ("TPOT ms", _number("tpot_ms", 1)),
    ("vs full", _number("vs_full", 2)),
    ("vs ceil.", _number("vs_ceiling", 2)),
    ("KV MB", _number("kv_bytes", 2, 1e-6)),
    ("prefill s", _number("prefill_s", 2)),
    ("prefill\n/ full", _number("prefill_vs_full", 2)),
    ("compr. s", _number("compress_s", 3)),
    ("min-max", lambda row: f"{row['tpot_min']:.0f}-{row['tpot_max']:.0f}"),
)
"""Header and cell, the least needed last."""

LEGEND = (
    "tokens: context; C: tokens per layer that the cache may hold. TPOT: time per output token, and its min-max.",
    "vs full, vs ceil.: how many times faster than the stock full cache, and than a stock cache of only C tokens. "
    "Columns without room are in speed.csv (--outdir).",
)
"""What the columns mean."""


def read_timings(file: Path) -> list[Timing]:
    """The repetitions of a ``speed.csv``.

    Raises:
        UserError: not such a file, or a cell that makes no sense (line and column are named).
    """
    kinds = {field.name: str(field.type) for field in fields(Timing)}
    timings = []
    try:
        with open(file, encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            if missing := [name for name in TIMED if name not in (reader.fieldnames or [])]:
                raise UserError(f"{file}: no column {missing[0]!r}; arkv-bench speed writes the file anew")
            for raw in reader:
                if None in raw:
                    raise UserError(f"{file}, line {reader.line_num}: more cells than columns")
                values = {
                    name: _parse(raw[name] or "", kinds[name], f"{file}, line {reader.line_num}, column {name!r}")
                    for name in TIMED
                }
                timings.append(Timing(**values))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: not a CSV file in UTF-8 ({error})") from None
    if not timings:
        raise UserError(f"{file} has no rows")
    return timings


def _parse(text: str, kind: str, where: str) -> Any:
    if not text and "None" in kind:
        return None
    if kind.startswith("str"):
        return printable(text)
    try:
        value = int(text) if kind.startswith("int") else float(text)
    except ValueError:
        raise UserError(f"{where}: {text!r} is no number") from None
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{where}: {text!r} is no number of that kind")
    return value


def speed_table(rows: Sequence[Row], title: str, width: int) -> Table:
    """The rows of :func:`bench.costs.speed.summarize` within ``width`` characters; the last columns go first."""
    console = Console(width=10_000)
    columns = list(COLUMNS)
    while (table := _table(rows, columns)) and console.measure(table).maximum > width and len(columns) > 5:
        columns.pop()
    table.title = Text(title, style="bold", overflow="fold")
    return table


def _table(rows: Sequence[Row], columns: Sequence[tuple[str, Callable[[Row], str]]]) -> Table:
    table = Table(title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for header, _ in columns:
        left = header in ("method", "format")
        table.add_column(
            header if "\n" in header else header.replace(" ", "\n"), justify="left" if left else "right", no_wrap=True
        )
    groups = [(row["context_length"], row["cache_size"] or 0) for row in rows]
    # Stable: within a context the full cache first, then budget by budget.
    order = sorted(range(len(rows)), key=groups.__getitem__)
    for index, following in zip(order, [*order[1:], None], strict=True):
        cells = [cell(rows[index]) for _, cell in columns]
        ends = following is not None and groups[following] != groups[index]
        table.add_row(*cells, end_section=ends)
    return table
