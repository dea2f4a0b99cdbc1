"""JSON: whole files as models, and files of one object per line."""

from __future__ import annotations

import json
import math
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from bench.errors import UserError, unread
from bench.records.files.text import read_bytes
from bench.records.files.validation import NOT_JSON, said

T = TypeVar("T")


def json_text(content: Mapping[str, Any], indent: int | None = 2) -> str:
    """A whole file. Raises :class:`ValueError` for a number that is not finite."""
    return json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def known_numbers(content: Mapping[str, Any]) -> dict[str, Any]:
    """With None in the place of NaN and infinity, which JSON does not know."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in content.items()
    }


def read_json(path: Path, kind: TypeAdapter[T], what: str) -> T:
    """A whole file as ``kind``.

    Args:
        what: what the file should be, such as ``the record of a run``.

    Raises:
        UserError: it cannot be read, or is something else (the field is named).
    """
    content = read_bytes(path)
    try:
        return kind.validate_json(content, strict=True)
    except ValidationError as error:
        place, problem = said(error)
        where = f", field {place!r}" if place else ""
        raise UserError(f"{path} is not {what}{where}: {problem}") from None


def read_lines(path: Path, parse: Callable[[bytes], T], remedy: str = "") -> Iterator[tuple[int, T]]:
    """The lines of a JSONL file with the byte that each begins at; none where there is no file.

    A last line that a killed process left unfinished is not one.

    Args:
        parse: makes a line's object; may raise :class:`pydantic.ValidationError`.
        remedy: what to do about a broken line.

    Raises:
        UserError: the file cannot be read, or a line makes no sense (line and field are named).
    """
    place = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                begin, place = place, place + len(line)
                if number == 1 and line.startswith(BOM_UTF8):
                    begin, line = len(BOM_UTF8), line.removeprefix(BOM_UTF8)
                if not line.strip():
                    continue
                try:
                    yield begin, parse(line)
                except ValidationError as error:
                    field, problem = said(error)
                    if problem == NOT_JSON and not line.endswith(b"\n"):
                        return
                    named = f", field {field!r}" if field else ""
                    hint = f"; {remedy}" if remedy else ""
                    raise UserError(f"{path}, line {number}{named}: {problem}{hint}") from None
    except FileNotFoundError:
        return
    except OSError as error:
        raise unread(path, error) from None
