"""What must be in no file: tokens and keys that a model is loaded with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
_SECRET = re.compile(r"(^|.*[_-])(token|key|password|passwd|secret|credentials?)s?", re.IGNORECASE)
_GIVEN_BY = "--model-kwargs"


def redacted(values: Any) -> Any:
    """``values`` with :data:`HIDDEN` in the place of every value under a name such as ``token`` or ``api_key``."""
    if isinstance(values, Mapping):
        return {
            name: HIDDEN if value is not None and _SECRET.fullmatch(str(name)) else redacted(value)
            for name, value in values.items()
        }
    return [redacted(item) for item in values] if isinstance(values, list | tuple) else values


def redacted_arguments(arguments: Sequence[str]) -> list[str]:
    """Words of a command line with what is secret in ``--model-kwargs`` hidden, however it was spelled."""
    shown: list[str] = []
    for word in arguments:
        option, equals, value = word.partition("=")
        if _is_kwargs(option) and equals:
            shown.append(f"{option}={redacted_text(value)}")
        elif shown and _is_kwargs(shown[-1]):
            shown.append(redacted_text(word))
        else:
            shown.append(word)
    return shown


def _is_kwargs(word: str) -> bool:
    return word.replace("_", "-") == _GIVEN_BY


def redacted_text(text: str) -> str:
    """A mapping as it was typed: as it is where nothing is secret in it, or else as JSON with that hidden."""
    import json

    from bench.errors import UserError
    from bench.settings.mappings import read_mapping

    try:
        values = read_mapping(_GIVEN_BY, text)
    except UserError:
        # Nobody knows what is in it.
        return HIDDEN
    hidden = redacted(values)
    return text if hidden == values else json.dumps(hidden, default=str)
