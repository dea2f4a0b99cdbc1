"""The comparison of a task: methods as rows, budgets grouped, the best of each budget in bold, ``full`` on top."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.errors import UserError
from bench.methods import FULL
from bench.records import COLUMNS, RESULTS

Row = dict[str, Any]

INTEGERS = ("cache_size", "window_size", "n", "kv_bytes_peak", "peak_memory_bytes", "compressed_documents")
TEXTS = ("model", "task", "metric", "method", "quant_format", "budget_unit", "cell", "part_of")
NEEDED = ("model", "task", "metric", "method", "n", "score", "cell")

# --- Reading ---


def read_results(path: Path) -> list[Row]:
    """Rows of a run's ``results.csv``, numbers as numbers and unknown as None.

    Raises:
        UserError: no such file, no rows, a missing column, or a cell that makes no sense (line and column are named).
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} is no run folder: it has no {RESULTS}")
    try:
        with open(file, encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise UserError(f"{file}: no column {missing[0]!r}")
            rows = [_parse(row, file, reader.line_num) for row in reader]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: not a CSV file in UTF-8 ({error})") from None
    if not rows:
        raise UserError(f"{file} has no rows: no task of the run has ended yet, or all have failed")
    return rows


def _parse(raw: dict[str, str], file: Path, line: int) -> Row:
    def wrong(name: str, what: str) -> UserError:
        return UserError(f"{file}, line {line}, column {name!r}: {what}")

    if None in raw:
        raise UserError(f"{file}, line {line}: more cells than columns")
    row: Row = {}
    for name in COLUMNS:
        text = raw[name] or ""
        if not text and name in NEEDED:
            raise wrong(name, "empty")
        if name in TEXTS:
            row[name] = printable(text) or None
            if name == "budget_unit" and text and text not in BUDGET_UNITS:
                raise wrong(name, f"{text!r} is neither tokens nor bytes")
        elif name == "higher_is_better":
            if text not in ("True", "False"):
                raise wrong(name, f"{text!r} is neither True nor False")
            row[name] = text == "True"
        else:
            try:
                row[name] = None if not text else int(text) if name in INTEGERS else float(text)
            except ValueError:
                raise wrong(name, f"{text!r} is no number") from None
            if row[name] is not None and not math.isfinite(row[name]):
                raise wrong(name, f"{text!r} is no number")
    return row


def printable(text: str) -> str:
    """``text`` with everything that a terminal would obey written out: a name must not move the cursor."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# --- Columns ---


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _bytes(value: float | None) -> str:
    if value is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def _budget(row: Row) -> str:
    if row["cache_ratio"] is not None:
        return f"{100 * row['cache_ratio']:g} %"
    return "" if row["cache_size"] is None else str(row["cache_size"])


def _states(row: Row) -> str:
    shares = [row[f"{state}_share"] for state in ("original", "quantized", "evicted")]
    return "" if None in shares else "/".join(f"{100 * share:.0f}" for share in shares)


def not_exercised(row: Row) -> bool:
    """Nothing was compressed: the row says nothing about its method."""
    return row["method"] != FULL and row["compressed_documents"] == 0


@dataclass(frozen=True)
class Column:
    """A column of the table that a person reads."""

    header: str
    cell: Callable[[Row], str]
    left: bool = False
    needed: bool = False
    """Never left out for want of width."""


BUDGET = Column("budget", _budget, needed=True)
METHOD = Column("method", lambda row: str(row["method"]), left=True, needed=True)
SCORE = Column("score", lambda row: _number(row["score"]), needed=True)
RETENTION = Column("score of full", lambda row: _percent(row["retention"]))
KV_BYTES = Column("KV bytes", lambda row: _bytes(row["kv_bytes_mean"]))
KV_SHARE = Column("KV of full", lambda row: _percent(row["kv_share"]), needed=True)
TTFT = Column("TTFT ms", lambda row: _number(row["ttft_ms"], 0))
TTFT_S = Column("TTFT s", lambda row: "" if row["ttft_ms"] is None else _number(row["ttft_ms"] / 1000, 2))
TPOT = Column("ms per token", lambda row: _number(row["tpot_ms"], 1))

EVERYTHING = (
    *(BUDGET, METHOD, Column("format", lambda row: row["quant_format"] or "", left=True)),
    *(SCORE, RETENTION, KV_BYTES, KV_SHARE),
    Column("orig.", lambda row: _percent(row["original_share"])),
    Column("quant.", lambda row: _percent(row["quantized_share"])),
    Column("evicted", lambda row: _percent(row["evicted_share"])),
    *(TTFT, TPOT, Column("tokens per s", lambda row: _number(row["decode_tokens_per_s"], 1))),
)
STACKED = (
    BUDGET,
    Column("method", lambda row: " ".join(filter(None, (row["method"], row["quant_format"]))), left=True, needed=True),
    *(SCORE, RETENTION, KV_BYTES, KV_SHARE, Column("O/Q/E %", _states), TTFT_S, TPOT),
)
"""The same within 80 columns: format beside method, the three states in one cell, no tokens per s (1000 / ms)."""

BUDGET_UNITS = {
    "tokens": "so many tokens in every layer, however many bytes each takes",
    "bytes": "the bytes of so many tokens at model precision, into which more quantized tokens fit",
}
"""What a budget counts."""

LEGEND = (
    "score of full: the score over that of the full cache on the same prompts.",
    "KV bytes: everything the cache stores at the end of decoding, scales, positions and scores of tokens included; "
    "KV of full: those bytes over what a full cache stores for the same tokens.",
    "orig., quant., evicted (O/Q/E): share of the tokens that ended Original, Quantized and Evicted.",
    "TTFT: time to the first token, that is prefill + compression + choosing it. ms per token: every later token. "
    "Times are of the machine in record.json.",
)
"""What the columns mean."""


# --- The comparison ---


@dataclass(frozen=True)
class Comparison:
    """One table: rows in groups, one group per budget; ``best`` holds the (group, row) of the winners."""

    title: str
    groups: list[list[Row]]
    best: set[tuple[int, int]] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """One comparison per model, task and metric, in the order of the rows."""
    keys = dict.fromkeys((row["model"], row["task"], row["metric"]) for row in rows)
    comparisons = []
    for model, task, metric in keys:
        mine = [row for row in rows if (row["model"], row["task"], row["metric"]) == (model, task, metric)]
        by_budget: dict[tuple[Any, ...], list[Row]] = {}
        for row in sorted(mine, key=lambda row: row["method"] != FULL):
            names = ("budget_unit", "cache_size", "cache_ratio", "window_size") if row["method"] != FULL else ()
            budget = tuple(row[name] for name in names)
            by_budget.setdefault(budget, []).append(row)
        groups = list(by_budget.values())
        first = mine[0]
        counts = sorted({row["n"] for row in mine})
        direction = "higher" if first["higher_is_better"] else "lower"
        title = f"{task}, {metric} ({direction} is better), {model}, n={'-'.join(map(str, counts))}"
        comparisons.append(Comparison(title, groups, _best(groups), _notes(mine)))
    return comparisons


def _best(groups: Sequence[Sequence[Row]]) -> set[tuple[int, int]]:
    """The winners of each budget; where all are equal nobody is best, and who was not exercised does not compete."""
    best = set()
    for index, group in enumerate(groups):
        playing = [(place, row) for place, row in enumerate(group) if row["method"] != FULL and not not_exercised(row)]
        if len(playing) < 2:
            continue
        sign = 1 if group[0]["higher_is_better"] else -1
        top = max(sign * row["score"] for _, row in playing)
        winners = [(index, place) for place, row in playing if sign * row["score"] == top]
        if len(winners) < len(playing):
            best |= set(winners)
    return best


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    units = {row["budget_unit"] for row in rows if row["budget_unit"] is not None}
    if units:
        notes.append(
            "budget, as tokens or as a share of the prompt: " + "; ".join(BUDGET_UNITS[unit] for unit in sorted(units))
        )
    windows = sorted({row["window_size"] for row in rows if row["window_size"] is not None})
    if windows:
        notes.append(f"newest tokens always kept at model precision: {', '.join(map(str, windows))}")
    if any(map(not_exercised, rows)):
        notes.append("not exercised: every prompt and answer fits the budget, so that nothing was compressed")
    truncated = max((row["truncated_documents"] or 0) for row in rows)
    if truncated:
        notes.append(f"{truncated:.0f} prompts were longer than the model's context and were cut")
    if len({row["n"] for row in rows}) > 1:
        notes.append("the rows are over different numbers of documents: the run is not complete")
    return notes


# --- Writing ---


def _table(comparison: Comparison, columns: Sequence[Column]) -> Table:
    table = Table(
        title=Text(comparison.title, style="bold", overflow="fold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        header = Text(column.header.replace(" ", "\n", 1))
        table.add_column(header, justify="left" if column.left else "right", no_wrap=True)
    for index, group in enumerate(comparison.groups):
        for place, row in enumerate(group):
            cells = [column.cell(row) for column in columns]
            if not_exercised(row):
                cells[columns.index(METHOD) if METHOD in columns else 1] += "\nnot exercised"
            style = "bold" if (index, place) in comparison.best else ""
            last = place == len(group) - 1
            table.add_row(*(Text(cell, style=style) for cell in cells), end_section=last)
    return table


def _fitting(comparison: Comparison, console: Console) -> tuple[Table, list[str]]:
    """The table with as many columns as the console is wide, and the headers of those left out."""

    def fits(table: Table) -> bool:
        # Measured as if there were room for all: a table that is too wide would shrink its columns silently.
        table.title, title = None, table.title
        width = console.measure(table, options=console.options.update(width=10_000)).maximum
        table.title = title
        return width <= console.width

    columns = list(EVERYTHING)
    table = _table(comparison, columns)
    if not fits(table):
        columns = list(STACKED)
        table = _table(comparison, columns)
    left_out: list[str] = []
    while not fits(table) and (spare := [column for column in columns if not column.needed]):
        columns.remove(spare[-1])
        left_out.insert(0, spare[-1].header)
        table = _table(comparison, columns)
    return table, left_out


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


def to_markdown(tables: Sequence[Sequence[Row]]) -> str:
    """The comparisons as Markdown."""
    lines: list[str] = []
    for rows in tables:
        for comparison in compare(rows):
            lines += [f"**{_in_cell(comparison.title)}**", ""]
            lines.append("| " + " | ".join(column.header for column in EVERYTHING) + " |")
            lines.append("|" + "".join("---|" if column.left else "---:|" for column in EVERYTHING))
            for index, group in enumerate(comparison.groups):
                for place, row in enumerate(group):
                    cells = [_in_cell(column.cell(row)) for column in EVERYTHING]
                    if not_exercised(row):
                        cells[EVERYTHING.index(METHOD)] += " (not exercised)"
                    bold = (index, place) in comparison.best
                    lines.append("| " + " | ".join(f"**{cell}**" if bold and cell else cell for cell in cells) + " |")
            lines += ["", *[f"- {note}" for note in comparison.notes], ""]
    return "\n".join([*lines, " ".join(LEGEND), ""])


def _in_cell(text: str) -> str:
    for char in "\\|*_<`":
        text = text.replace(char, f"\\{char}")
    return text


def to_csv(tables: Sequence[Sequence[Row]]) -> str:
    """All rows of all runs under one header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for rows in tables:
        writer.writerows(rows)
    return buffer.getvalue()
