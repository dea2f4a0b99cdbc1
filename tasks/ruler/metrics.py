"""The official scores: which of the references stand in the answer, whatever the case."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def cleaned(answer: str) -> str:
    """An answer as it is scored: control characters are line breaks, none at the ends."""
    return _CONTROL.sub("\n", answer.strip()).strip()


def _found(answer: str, references: Sequence[str]) -> list[bool]:
    lowered = cleaned(answer).lower()
    return [reference.lower() in lowered for reference in references]


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that the answer holds, in percent."""
    return 100 * sum(_found(answer, references)) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """100 where the answer holds one of the references, else 0."""
    return 100.0 * any(_found(answer, references))
