"""The comparison of a task: methods as rows, budgets grouped, the best of each budget in bold, ``full`` on top."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.errors import UserError
from bench.methods import FULL
from bench.records import COLUMNS, RESULTS

Row = dict[str, Any]

INTEGERS = ("cache_size", "window_size", "n", "kv_bytes_peak", "peak_memory_bytes", "compressed_documents")
TEXTS = ("model", "task", "metric", "method", "quant_format", "budget_unit", "cell")


def read_results(path: Path) -> list[Row]:
    """Rows of a run's ``results.csv``, numbers as numbers and unknown as None.

    Raises:
        UserError: no such file, a missing column, or a cell that is no number (line and column are named).
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} is no run folder: it has no {RESULTS}")
    with open(file, encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise UserError(f"{file}: no column {missing[0]!r}")
        return [_parse(row, file, reader.line_num) for row in reader]


def _parse(raw: dict[str, str], file: Path, line: int) -> Row:
    row: Row = {}
    for name in COLUMNS:
        text = raw[name]
        if name in TEXTS:
            row[name] = text or None
        elif name == "higher_is_better":
            row[name] = text == "True"
        else:
            try:
                row[name] = None if not text else int(text) if name in INTEGERS else float(text)
            except (TypeError, ValueError):
                raise UserError(f"{file}, line {line}, column {name!r}: {text!r} is no number") from None
    return row


@dataclass(frozen=True)
class Comparison:
    """One table: a title, a header, and rows in groups; ``best`` holds the (group, row) of the winners."""

    title: str
    header: tuple[str, ...]
    groups: list[list[tuple[str, ...]]]
    best: set[tuple[int, int]]
    notes: list[str]


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _bytes(value: float | None) -> str:
    if value is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


HEADER = (
    *("method", "format", "score", "of full", "KV bytes", "of full", "orig.", "quant.", "evicted"),
    *("TTFT ms", "ms/token", "tokens/s"),
)


def _line(row: Row) -> tuple[str, ...]:
    return (
        row["method"],
        row["quant_format"] or "",
        _number(row["score"]),
        _percent(row["retention"]),
        _bytes(row["kv_bytes_mean"]),
        _percent(row["kv_share"]),
        _percent(row["original_share"]),
        _percent(row["quantized_share"]),
        _percent(row["evicted_share"]),
        _number(row["ttft_ms"], 0),
        _number(row["tpot_ms"], 1),
        _number(row["decode_tokens_per_s"], 1),
    )


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """One comparison per model, task and metric, in the order of the rows."""
    keys = dict.fromkeys((row["model"], row["task"], row["metric"]) for row in rows)
    comparisons = []
    for model, task, metric in keys:
        mine = [row for row in rows if (row["model"], row["task"], row["metric"]) == (model, task, metric)]
        budgets = dict.fromkeys(_budget_of(row) for row in mine if row["method"] != FULL)
        groups = [[row for row in mine if row["method"] == FULL]]
        groups += [[row for row in mine if row["method"] != FULL and _budget_of(row) == budget] for budget in budgets]
        groups = [group for group in groups if group]
        best = set()
        for index, group in enumerate(groups):
            if group[0]["method"] == FULL or len(group) == 1:
                continue
            sign = 1 if group[0]["higher_is_better"] else -1
            top = max(sign * row["score"] for row in group)
            winners = [position for position, row in enumerate(group) if sign * row["score"] == top]
            # Where all are equal nobody is best.
            if len(winners) < len(group):
                best |= {(index, position) for position in winners}
        first = mine[0]
        direction = "higher" if first["higher_is_better"] else "lower"
        title = f"{task}, {metric} ({direction} is better), {model}, n={first['n']}"
        notes = [_budget_note(index, group) for index, group in enumerate(groups) if group[0]["method"] != FULL]
        notes += _caveats(mine)
        comparisons.append(Comparison(title, HEADER, [[_line(row) for row in group] for group in groups], best, notes))
    return comparisons


def _budget_note(index: int, group: list[Row]) -> str:
    row = group[0]
    if row["cache_ratio"] is not None:
        size = f"{100 * row['cache_ratio']:g} % of each prompt's {row['budget_unit']}"
    elif row["budget_unit"] == "bytes":
        size = f"the bytes of {row['cache_size']} tokens at model precision per layer"
    else:
        size = f"{row['cache_size']} tokens per layer"
    return f"budget {index}: {size}, window {row['window_size']}"


def _budget_of(row: Row) -> tuple[Any, ...]:
    """What makes rows comparable: methods are ranked within one budget."""
    return tuple(row[name] for name in ("budget_unit", "cache_size", "cache_ratio", "window_size"))


def _caveats(rows: Sequence[Row]) -> list[str]:
    notes = []
    idle = [row for row in rows if row["method"] != FULL and not row["compressed_documents"]]
    if idle:
        names = ", ".join(dict.fromkeys(f"{row['method']} C={row['cache_size'] or row['cache_ratio']}" for row in idle))
        notes.append(f"not exercised (every prompt fits the budget, nothing was compressed): {names}")
    truncated = max((row["truncated_documents"] or 0) for row in rows)
    if truncated:
        notes.append(f"{truncated:.0f} prompts were longer than the model's context and were cut")
    return notes


def print_comparison(tables: Sequence[Sequence[Row]], console: Console) -> None:
    """Print every comparison of the runs' rows."""
    for rows in tables:
        for comparison in compare(rows):
            console.print()
            table = Table(title=escape(comparison.title), title_justify="left", title_style="bold")
            for position, name in enumerate(comparison.header):
                table.add_column(name, justify="left" if position < 2 else "right", no_wrap=True)
            for index, group in enumerate(comparison.groups):
                for position, line in enumerate(group):
                    style = "bold" if (index, position) in comparison.best else None
                    table.add_row(*map(escape, line), style=style, end_section=position == len(group) - 1)
            console.print(table)
            for note in comparison.notes:
                console.print(note, markup=False, highlight=False)


def to_markdown(tables: Sequence[Sequence[Row]]) -> str:
    """The comparisons as Markdown."""
    lines: list[str] = []
    for rows in tables:
        for comparison in compare(rows):
            lines += [f"**{comparison.title}**", ""]
            lines.append("| budget | " + " | ".join(comparison.header) + " |")
            lines.append("|---|---|---|" + "---:|" * (len(comparison.header) - 2))
            for index, group in enumerate(comparison.groups):
                for position, line in enumerate(group):
                    bold = (index, position) in comparison.best
                    cells = [f"**{cell}**" if bold and cell else cell for cell in line]
                    lines.append(f"| {index or ''} | " + " | ".join(cells) + " |")
            lines += ["", *[f"- {note}" for note in comparison.notes], ""]
    return "\n".join(lines)


def to_csv(tables: Sequence[Sequence[Row]]) -> str:
    """All rows of all runs under one header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for rows in tables:
        writer.writerows(rows)
    return buffer.getvalue()
