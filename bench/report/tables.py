"""The comparison of a task: ``full`` on top, methods as rows by true bytes, budgets grouped, leaders in bold."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.errors import UserError
from bench.judge.comparison import by_budget, not_exercised
from bench.judge.stats import ALPHA, p_text, verdict
from bench.names import BUDGET_UNITS, FULL, KVPRESS, LIMITS, TRISTATE
from bench.runs.folder import COLUMNS, RESULTS

Row = dict[str, Any]

INTEGERS = ("cache_size", "window_size", "n", "kv_bytes_peak", "peak_memory_bytes", "compressed_documents")
TEXTS = ("model", "task", "metric", "method", "quant_format", "budget_unit", "cell", "part_of")
TRUTHS = {"True": True, "False": False}
NEEDED = ("model", "task", "metric", "method", "n", "score", "higher_is_better", "cell")

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
                raise UserError(f"{file}: no column {missing[0]!r}; the run's own command writes the file anew")
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
        elif name in ("higher_is_better", "leading"):
            if text and text not in TRUTHS:
                raise wrong(name, f"{text!r} is neither True nor False")
            row[name] = TRUTHS.get(text)
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


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def score_text(value: float | None, digits: int = 3, sign: str = "") -> str:
    """So many decimals; more for a small number, which else would lose its second digit, fewer for percentages."""
    if value is None:
        return ""
    if value and abs(value) < 10.0 ** (1 - digits):
        digits = min(1 - math.floor(math.log10(abs(value))), 6)
    elif abs(value) >= 10:
        digits -= 2
    return f"{value:{sign}.{digits}f}"


def _interval(low: float | None, high: float | None) -> str:
    """Both ends with the decimals that the larger one needs."""
    if low is None or high is None:
        return ""
    digits = len(score_text(max(abs(low), abs(high)), 2).partition(".")[2])
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def percent_text(value: float | None, sign: str = "") -> str:
    """A share in percent."""
    return "" if value is None else f"{100 * value:{sign}.1f} %"


def bytes_text(value: float | None) -> str:
    """Bytes with their unit, in powers of 1,000."""
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


def _share(row: Row) -> str:
    return percent_text(row["kv_share"]) + ("*" if off_budget(row) else "")


def off_budget(row: Row) -> bool:
    """The bytes are more than 2 % away from the share of bytes that was asked for."""
    if row["budget_unit"] != "bytes" or not row["cache_ratio"] or not row["kv_share_of_prompt"] or not_exercised(row):
        return False
    return bool(abs(row["kv_share_of_prompt"] / row["cache_ratio"] - 1) > TOLERANCE)


def _against_full(row: Row) -> str:
    if not_exercised(row):
        return "not exercised"
    if row["difference"] is None:
        return ""
    return verdict(row["difference"], row["p_holm"], higher_is_better=row["higher_is_better"])


TOLERANCE = 0.02
"""Relative distance from the bytes asked for up to which a row stands at them."""


@dataclass(frozen=True)
class Column:
    """A column of the table that a person reads. Headers and cells may have two lines."""

    header: str
    cell: Callable[[Row], str]
    left: bool = False
    needed: bool = False
    """Never left out for want of width."""


BUDGET = Column("budget", _budget, needed=True)
STATES = Column("O/Q/E %", _states)
TTFT = Column("TTFT s", lambda row: "" if row["ttft_ms"] is None else _number(row["ttft_ms"] / 1000, 2))
TPOT = Column("TPOT ms", lambda row: _number(row["tpot_ms"], 1))

EVERYTHING = (
    *(
        BUDGET,
        Column("method", lambda row: row["method"], left=True),
        Column("format", lambda row: row["quant_format"] or ""),
    ),
    Column("score", lambda row: score_text(row["score"])),
    Column("95 % interval", lambda row: _interval(row["score_low"], row["score_high"])),
    Column("minus full", lambda row: score_text(row["difference"], sign="+")),
    Column("95 % interval", lambda row: _interval(row["difference_low"], row["difference_high"])),
    Column("against full", _against_full, left=True),
    Column("KV bytes", lambda row: bytes_text(row["kv_bytes_mean"])),
    *(Column("KV of full", _share), STATES, TTFT, TPOT),
)
"""One line per row, for Markdown and wide terminals."""


def _two_lines(above: str, below: str) -> str:
    return f"{above}\n{below}" if below else above


def _method(row: Row) -> str:
    """A peer's name stands before the library it comes from."""
    library, _, name = row["method"].rpartition(":")
    return _two_lines(name, "not exercised" if not_exercised(row) else library or row["quant_format"] or "")


STACKED = (
    *(BUDGET, Column("method", _method, left=True, needed=True)),
    Column(
        "score",
        lambda row: _two_lines(score_text(row["score"]), _interval(row["score_low"], row["score_high"])),
        needed=True,
    ),
    Column(
        "minus full",
        lambda row: _two_lines(
            score_text(row["difference"], sign="+"), _interval(row["difference_low"], row["difference_high"])
        ),
        needed=True,
    ),
    Column("p", lambda row: "" if row["p_holm"] is None else p_text(row["p_holm"])),
    Column("KV\nof full", lambda row: _two_lines(_share(row), bytes_text(row["kv_bytes_mean"])), needed=True),
    STATES,
    Column("TTFT s\nTPOT ms", lambda row: _two_lines(TTFT.cell(row), TPOT.cell(row))),
)
"""The same within 80 columns: intervals below their numbers, the format below the method, p in the place of words."""

LEGEND = (
    "[ , ]: 95 % interval over documents. minus full: paired difference to the full cache on the same documents; its p "
    f"is adjusted over all rows (Holm), and from {ALPHA:.2f} on the two are not distinguishable.",
    "KV of full: all bytes that the cache stores, scales, positions and scores of tokens included, over the keys and "
    "values of a full one. O/Q/E: tokens that ended Original, Quantized, Evicted.",
    "TTFT: prefill, compression and the first token; TPOT: every later token. Times are of the machine in record.json.",
)
"""What the columns mean."""


# --- The comparison ---


@dataclass(frozen=True)
class Comparison:
    """One table: rows in groups, one group per budget, all by falling bytes."""

    title: str
    groups: list[list[Row]]
    notes: list[str] = field(default_factory=list)


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """One comparison per model, task and metric, in the order of the rows."""
    keys = dict.fromkeys((row["model"], row["task"], row["metric"]) for row in rows)
    comparisons = []
    for model, task, metric in keys:
        mine = [row for row in rows if (row["model"], row["task"], row["metric"]) == (model, task, metric)]
        groups = [sorted(group, key=_by_bytes) for group in by_budget(mine)]
        groups.sort(key=lambda group: _by_bytes(group[0]))
        counts = sorted({row["n"] for row in mine})
        direction = "higher" if mine[0]["higher_is_better"] else "lower"
        title = f"{task}, {metric} ({direction} is better), {model}, n={'-'.join(map(str, counts))}"
        comparisons.append(Comparison(title, groups, _notes(mine)))
    return comparisons


def headline(rows: Sequence[Row]) -> list[Row]:
    """The rows to show: parts of a group that has rows of its own are left to the CSV file."""
    groups = {row["task"] for row in rows}
    return [row for row in rows if row["part_of"] not in groups]


def _by_bytes(row: Row) -> tuple[bool, float]:
    """``full`` first, then most bytes first."""
    return row["method"] != FULL, -(row["kv_bytes_mean"] or 0.0)


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    units = {row["budget_unit"] for row in rows if row["budget_unit"] is not None}
    windows = sorted({row["window_size"] for row in rows if row["window_size"] is not None})
    window = f"; the newest {', '.join(map(str, windows))} tokens stay at model precision" if windows else ""
    if units:
        notes.append("budget: " + "; ".join(BUDGET_UNITS[unit] for unit in sorted(units)) + window)
    if any(row["leading"] for row in rows):
        notes.append("bold: the best of a budget, and what cannot be told from it")
    notes += detectable(rows)
    if any(map(not_exercised, rows)):
        notes.append("not exercised: every prompt and answer fits the budget, so that nothing was compressed")
    off = [
        f"{row['method']} {percent_text(row['kv_share_of_prompt'])} of {_budget(row)}"
        for row in rows
        if off_budget(row)
    ]
    if off:
        notes.append(
            f"* more than {100 * TOLERANCE:.0f} % off the share of the prompt's bytes asked for: {', '.join(off)}"
        )
        notes += dict.fromkeys(filter(None, map(_why_off, filter(off_budget, rows))))
    for row in rows:
        if row["method"] != FULL and row["cache_size"] is None and row["cache_ratio"] is None:
            stands = f"{row['method']} stands at {percent_text(row['kv_share_of_prompt'])} of the prompt's bytes"
            notes.append(f"{stands}: it is of one size, whatever the budget")
    truncated = max((row["truncated_documents"] or 0) for row in rows)
    if truncated:
        notes.append(f"{truncated:.0f} prompts were longer than the context or --max-length and were cut")
    if len({row["n"] for row in rows}) > 1:
        notes.append("the rows are over different numbers of documents: the run is not complete")
    return notes


def _why_off(row: Row) -> str:
    """Why a method does not stand at the bytes asked for; empty where nothing here knows."""
    if row["method"].startswith(KVPRESS):
        return f"{KVPRESS} {LIMITS[KVPRESS]}"
    if row["method"] not in TRISTATE:
        return ""
    if row["kv_share_of_prompt"] > row["cache_ratio"]:
        return f"{row['method']}: the window and the sinks of prompts so short take more"
    return (
        f"{row['method']}: what is left is less than a token, or than a whole group of quantized ones, in every layer"
    )


def detectable(rows: Sequence[Row]) -> list[str]:
    """What differences to ``full`` so many documents could have shown."""
    compared = [row for row in rows if row["p_value"] is not None]
    known = sorted({score_text(row["detectable_difference"], 2) for row in compared} - {""}, key=float)
    if known:
        span = " to ".join(dict.fromkeys((known[0], known[-1])))
        return [f"smallest difference to full that so many documents show in 4 of 5 cases: {span}"]
    return ["so few documents cannot show a difference to full"] if compared else []


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
        header = column.header if "\n" in column.header else "\n".join(column.header.rsplit(" ", 1))
        table.add_column(Text(header), justify="left" if column.left else "right", no_wrap=True)
    for group in comparison.groups:
        for row in group:
            style = "bold" if row["leading"] else ""
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

    columns = list(EVERYTHING)
    table = _table(comparison, columns)
    if not fits(table):
        columns = list(STACKED)
        table = _table(comparison, columns)
    left_out: list[str] = []
    while not fits(table) and (spare := [column for column in columns if not column.needed]):
        columns.remove(spare[-1])
        left_out.insert(0, spare[-1].header.replace("\n", ", "))
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
