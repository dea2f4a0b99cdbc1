"""Tables as CSV: one reader and one writer, with pydantic models for the lines."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bench.errors import UserError, unread
from bench.records.files.text import printable
from bench.records.files.validation import said

DIGITS = 6
"""Significant digits of a number, unless all are asked for."""

Model = TypeVar("Model", bound=BaseModel)


def csv_text(
    columns: Sequence[str],
    rows: Iterable[BaseModel | Mapping[str, Any] | Sequence[Any]],
    digits: int | None = DIGITS,
    *,
    exact: bool = False,
) -> str:
    """A table with its header. Unknown, None or an absent key, is empty.

    Args:
        rows: models or mappings, of which the columns are taken, or the cells themselves.
        digits: significant ones of every float; None writes what reads back as the same number.
        exact: all digits where so many are another number: what was read is written as it stood in its file.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        if isinstance(row, BaseModel):
            cells: Iterable[Any] = (getattr(row, name) for name in columns)
        elif isinstance(row, Mapping):
            cells = (row.get(name) for name in columns)
        else:
            cells = row
        writer.writerow([_cell(value, digits, exact) for value in cells])
    return buffer.getvalue()


def _cell(value: Any, digits: int | None, exact: bool) -> Any:
    if isinstance(value, float) and digits is not None:
        text = f"{value:.{digits}g}"
        return value if exact and float(text) != value else text
    return "" if value is None else value


def read_cells(path: Path, needed: Sequence[str], remedy: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines of a table with their numbers, as text by column.

    Args:
        needed: columns that the file must have.
        remedy: what to do where one is missing.

    Raises:
        UserError: not such a file (the line is named where there is one).
    """
    try:
        # Excel marks its UTF-8 by three bytes.
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle)
            if missing := [name for name in needed if name not in (reader.fieldnames or [])]:
                raise UserError(f"{path}: no column {missing[0]!r}; {remedy}")
            for raw in reader:
                if None in raw:
                    raise UserError(f"{path}, line {reader.line_num}: more cells than columns")
                yield reader.line_num, {name: text or "" for name, text in raw.items()}
    except OSError as error:
        raise unread(path, error) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error})") from None


def read_models(path: Path, model: type[Model], needed: Sequence[str], remedy: str) -> list[Model]:
    """The lines of a table as models; an empty cell is the default of its field.

    Raises:
        UserError: as :func:`read_cells`, or a cell that makes no sense (line and column are named).
    """
    known = model.model_fields
    models = []
    for line, cells in read_cells(path, needed, remedy):
        values = {name: printable(text) for name, text in cells.items() if text and name in known}
        try:
            models.append(model.model_validate_strings(values))
        except ValidationError as error:
            column, problem = said(error)
            raise UserError(f"{path}, line {line}, column {column!r}: {_of_cell(problem)}") from None
    return models


def finite(text: str) -> float | None:
    """The number that a cell holds; None where it is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _of_cell(problem: str) -> str:
    return "empty" if problem == "missing" else problem
