"""The rows of a run's results.csv, read and checked."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.errors import UserError
from bench.names import BUDGET_UNITS
from bench.report.wording import printable
from bench.runs.folder import COLUMNS, RESULTS

Row = dict[str, Any]

INTEGERS = ("cache_size", "window_size", "n", "kv_bytes_peak", "peak_memory_bytes", "compressed_documents")
TEXTS = ("model", "task", "metric", "method", "quant_format", "budget_unit", "cell", "part_of")
TRUTHS = {"True": True, "False": False}
NEEDED = ("model", "task", "metric", "method", "n", "score", "higher_is_better", "cell")


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


def headline(rows: Sequence[Row]) -> list[Row]:
    """The rows to show: parts of a group that has rows of its own are left to the CSV file."""
    groups = {row["task"] for row in rows}
    return [row for row in rows if row["part_of"] not in groups]
