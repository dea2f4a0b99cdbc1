"""What the pages share: rows of a record, and numbers in words."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.models.catalogue import EMBEDDED
from bench.names import RECORD
from bench.records.row import Row, read_results

RESULTS = Path(__file__).resolve().parents[2] / "results"
WIDTH = 120
WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


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
    return [row for row in rows_at(rows, ratio) if (row.kv_share_of_prompt or 1.0) <= 1.05 * ratio]


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


def model_of(folder: str) -> str:
    """The model of a run, how its publisher's file holds the weights, and what it computed in."""
    record = json.loads((RESULTS / folder / RECORD).read_text(encoding="utf-8"))
    ((name, about),) = record["models"].items()
    known = EMBEDDED.get(name)
    # The description names the model, then the number format of its file.
    held = known.description.partition(";")[0].rpartition(", ")[2] if known and known.origin == about["source"] else ""
    return f"{name} ({f'{held}, dequantized to ' if held else ''}{about['dtype']}, CPU)"


def length_asked(folder: str) -> int:
    """Tokens of the prompts of a run, as they were asked for."""
    record = json.loads((RESULTS / folder / RECORD).read_text(encoding="utf-8"))
    (length,) = record["settings"]["lengths"]
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
