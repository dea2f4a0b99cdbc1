"""Files of JSON: one object per line, or one document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tasks.base import TaskError


def read_jsonl(source: str, content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its ``file, line n``; a BOM and Windows line ends are no content.

    Raises:
        TaskError: a line that is no JSON object.
    """
    # Not splitlines(): a JSON string may hold other line separators.
    for number, line in enumerate(_decoded(source, content).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise TaskError(f"{where}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise TaskError(f"{where}: not a JSON object")
        yield where, fields


def read_json_items(source: str, content: bytes) -> Iterator[tuple[str, Any]]:
    """What a file with the ending ``.json`` lists, each with its place: the items of an array, a single value, or the
    objects of lines, which often bear that ending too.

    Raises:
        TaskError: it is none of these.
    """
    try:
        whole = json.loads(_decoded(source, content))
    except ValueError as error:
        first = content.strip().partition(b"\n")[0]
        try:
            json.loads(first)
        except ValueError:
            raise TaskError(f"{source}: not JSON: {error}") from error
        yield from read_jsonl(source, content)
        return
    if isinstance(whole, list):
        yield from ((f"{source}, item {number}", item) for number, item in enumerate(whole, start=1))
    else:
        yield source, whole


def _decoded(source: str, content: bytes) -> str:
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        said = f"not JSON: not UTF-8 text (byte {error.start} of the file)"
        raise TaskError(f"{source}, line {line_number}: {said}") from error
