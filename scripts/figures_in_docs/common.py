"""What the pages share: rows of a record, and numbers in words."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from arkv.config import METHODS
from bench.methods.grid import grid
from bench.models.catalogue import EMBEDDED
from bench.names import RECORD
from bench.records.row import Row, read_results
from bench.settings.run import RunConfig

RESULTS = Path(__file__).resolve().parents[2] / "results"
WIDTH = 120
Value = TypeVar("Value")
WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def known(value: Value | None, what: str) -> Value:
    """``value``, which a page cannot do without. Raises :class:`SystemExit` where it is unknown."""
    if value is None:
        raise SystemExit(f"a page states a number that its record does not have: {what}")
    return value


def check_said(sentence: str, holds: bool) -> None:
    """Raises :class:`SystemExit` where a page's ``sentence`` is not what the records say any more."""
    if not holds:
        raise SystemExit(f"the records say otherwise by now, write it anew: {sentence}")


def rows_of(folder: str, metric: str) -> list[Row]:
    return [row for row in read_results(RESULTS / folder) if row.metric == metric]


def the_row(rows: Iterable[Row], method: str, ratio: float | None = None) -> Row:
    """The one row of a method and budget."""
    (found,) = [row for row in rows if row.method == method and row.cache_ratio == ratio]
    return found


def rows_at(rows: Iterable[Row], ratio: float) -> list[Row]:
    return [row for row in rows if row.cache_ratio == ratio]


def rows_within(rows: Sequence[Row], ratio: float) -> list[Row]:
    """Those of a budget that hold no more than it says."""
    held = ((row, row.kv_share_of_prompt) for row in rows_at(rows, ratio))
    return [row for row, share in held if share is not None and share <= 1.05 * ratio]


def least_budget(rows: Iterable[Row]) -> float:
    """The smallest budget."""
    return min(row.cache_ratio for row in rows if row.cache_ratio is not None)


def count_right(row: Row) -> int:
    """Documents that were right."""
    return round(row.score * row.n)


def in_words(number: int) -> str:
    return WORDS[number] if number < len(WORDS) else str(number)


def percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def with_interval(row: Row | None) -> str:
    if row is None:
        return ""
    known = row.score_low is not None and row.score_high is not None
    score = f"{round(row.score, 1):g}"
    return f"{score} [{row.score_low:.0f}, {row.score_high:.0f}]" if known else score


def method_said(row: Row) -> str:
    return " ".join(filter(None, (row.method, row.quant_format)))


def listed(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return " and ".join(filter(None, [", ".join(quoted[:-1]), quoted[-1]])) if quoted else "no row"


def paragraph(text: str) -> str:
    """In lines of the page's width, none broken within code or a link."""
    kept = re.sub(r"`[^`]*`", lambda found: found[0].replace(" ", "\0"), " ".join(text.split()))
    return textwrap.fill(kept, WIDTH, break_long_words=False, break_on_hyphens=False).replace("\0", " ")


def record_of(folder: str) -> dict[str, Any]:
    """The record of a folder, as it is written."""
    record: dict[str, Any] = json.loads((RESULTS / folder / RECORD).read_text(encoding="utf-8"))
    return record


def settings_of(folder: str) -> dict[str, Any]:
    """What a run was told."""
    settings: dict[str, Any] = record_of(folder)["settings"]
    return settings


def since_changed(folder: str) -> str:
    """Methods of a run whose defaults are others by now, in words; nothing where all are as they were."""
    record = record_of(folder)
    own = [name for name in record["settings"]["methods"] if name in METHODS]
    given = {key: value for key, value in record["settings"].items() if value is not None and key != "methods"}
    run = RunConfig(**given, methods=own)
    cells = grid(own, run.budgets, run.window_size, run.quant_format, run.method_settings)
    changed = list(dict.fromkeys(cell.method for cell in cells if cell.key not in record["cells"]))
    return f"{listed(changed)}: earlier defaults." if changed else ""


def threads_of(folder: str) -> str:
    """Threads that a run computed with, in words."""
    threads = record_of(folder)["hardware"]["torch_threads"]
    return f"{in_words(threads)} thread{'s' if threads > 1 else ''}"


def model_of(folder: str) -> str:
    """The model of a run, how its publisher's file holds the weights, and what it computed in."""
    ((name, about),) = record_of(folder)["models"].items()
    listed_as = EMBEDDED.get(name)
    held = ""
    if listed_as and listed_as.origin == about["source"]:
        # The description names the model, then the number format of its file.
        held = f"{listed_as.description.partition(';')[0].rpartition(', ')[2]}, dequantized to "
    return f"{name} ({held}{about['dtype']}, {about['device'].upper()})"


def length_asked(folder: str) -> int:
    """Tokens of the prompts of a run, as they were asked for."""
    (length,) = settings_of(folder)["lengths"]
    return int(length)


def aligned(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown that is one in a terminal, too: all columns but the first stand on the right."""
    lines = [headers, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        (first, *others), (wide, *rest) = cells, widths
        return f"| {' | '.join([first.ljust(wide), *map(str.rjust, others, rest)])} |"

    between = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return [line(lines[0]), between, *map(line, lines[1:])]
