"""Files of JSON, as they come: other separators within strings, marks and line ends of other systems, empty lines."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from typing import Any

import pytest

from tasks.base import TaskError
from tasks.jsonl import read_json_items, read_jsonl

SEPARATORS = ("\u2028", "\u2029", "\u0085", "\x1e", "\x1c", "\x0c", "\x0b", "\r")
ROWS: list[dict[str, Any]] = [{"text": f"one{mark}two", "n": n} for n, mark in enumerate(SEPARATORS)]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]


@pytest.mark.parametrize(
    "content",
    [
        b"\n".join(LINES),
        b"\n".join(LINES) + b"\n",
        BOM_UTF8 + b"\n".join(LINES) + b"\n\n",
        b"\r\n".join(LINES) + b"\r\n \r\n",
        b"\n\n".join(LINES),
        b"\n".join(LINES).decode().encode("utf-16"),
    ],
)
def test_lines(content: bytes) -> None:
    assert [row for _, row in read_jsonl("a.jsonl", content)] == ROWS
    # Lines often end in .json too.
    assert [row for _, row in read_json_items("a.json", content)] == ROWS


def test_places_are_lines_of_the_file() -> None:
    content = b"\n" + LINES[0] + b"\r\n\r\n" + LINES[1]
    assert [where for where, _ in read_jsonl("a.jsonl", content)] == ["a.jsonl, line 2", "a.jsonl, line 4"]


@pytest.mark.parametrize(
    "content, message",
    [
        (LINES[0] + b'\n{"text": ', "a, line 2: not JSON"),
        (LINES[0] + b"\n[1]\n", "a, line 2: not a JSON object"),
        (LINES[0] + b'\n{"text": "\xff"}', "a, line 2: not JSON: not UTF-8 text"),
    ],
)
def test_lines_that_are_none(content: bytes, message: str) -> None:
    for read in (read_jsonl, read_json_items):
        with pytest.raises(TaskError, match=message):
            list(read("a", content))


def test_a_document() -> None:
    for indent in (None, 2):
        listed = json.dumps(["x", *ROWS], indent=indent).encode()
        assert [item for _, item in read_json_items("a.json", BOM_UTF8 + listed)] == ["x", *ROWS]
        assert [item for _, item in read_json_items("a.json", json.dumps(ROWS[0], indent=indent).encode())] == ROWS[:1]
    with pytest.raises(TaskError, match=r"^a\.json: not JSON"):
        list(read_json_items("a.json", b"{'text': 'x'}"))
