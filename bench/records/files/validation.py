"""What pydantic finds wrong with a file, in a few words for a person."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from bench.records.files.text import printable

NOT_JSON = "not valid JSON"

_WORDS = {
    "missing": "missing",
    "json_invalid": NOT_JSON,
    "dataclass_type": "no JSON object",
    "model_type": "no JSON object",
    "model_attributes_type": "no JSON object",
    "dict_type": "no JSON object",
    "list_type": "no list",
    "tuple_type": "no list",
    "string_type": "no text",
    "bool_parsing": "neither True nor False",
    "bool_type": "neither true nor false",
    "int_parsing": "no number",
    "int_from_float": "no whole number",
    "int_type": "no whole number",
    "float_parsing": "no number",
    "float_type": "no number",
    "finite_number": "no number",
    "greater_than": "no number that can be",
    "greater_than_equal": "no number that can be",
}
_LONGEST = 40
"""Characters of a value that are shown."""


def said(error: ValidationError) -> tuple[str, str]:
    """The field that is wrong first, with dots between levels and empty for the whole, and what is wrong with it."""
    first = error.errors(include_url=False, include_context=True)[0]
    place = ".".join(str(part) for part in first["loc"])
    kind = first["type"]
    words = _WORDS.get(kind)
    if words in ("missing", NOT_JSON):
        return place, words
    if kind == "value_error":
        return place, str(first["ctx"]["error"])
    return place, f"{shown(first['input'])} is {words}" if words else f"{shown(first['input'])}: {first['msg']}"


def shown(value: Any) -> str:
    """A value for a person, cut where it is long."""
    text = printable(repr(value))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
