"""The names of kvpress methods taken apart: ``kvpress:adakv[alpha_safeguard=0.3]+snapkv+quanto-int4``.

Behind the colon stand presses, each with options of its own in brackets, parted by semicolons; a press is followed by
the one that it wraps. Last may stand a backend of transformers' ``QuantizedCache``, into which goes what they leave.
Needs no library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from bench.errors import UserError

_PART = re.compile(r"(?P<name>[^\[\]+]+)(?:\[(?P<options>[^\[\]]*)\])?(?:\+|$)")


@dataclass(frozen=True)
class PressPart:
    """One press of a name."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    """As they were written."""


@dataclass(frozen=True)
class PressName:
    """What a name asks for."""

    parts: tuple[PressPart, ...]
    backend: str | None = None
    """What quantizes the tokens that stay, such as ``quanto-int4``."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the presses, outermost first."""
        return tuple(part.name for part in self.parts)


def parse_press(method: str, backends: Mapping[str, object]) -> PressName:
    """Take ``method``, such as ``kvpress:kvzip[chunk_size=512]``, apart.

    Args:
        backends: names of what can quantize the tokens that stay.

    Raises:
        UserError: it is not written like that, or only quantizes.
    """
    text, place, parts = method.partition(":")[2], 0, []
    while place < len(text):
        found = _PART.match(text, place)
        if found is None:
            break
        parts.append(PressPart(found["name"], _options(method, found["options"])))
        place = found.end()
    if place < len(text) or not parts or text.endswith("+"):
        raise UserError(f"{method}: write it as {EXAMPLE}", exit_code=2)
    backend = None
    if parts[-1].name in backends:
        last = parts.pop()
        if last.options or not parts:
            raise UserError(
                f"{method}: {last.name} takes no options and stands behind a press: write it as {EXAMPLE}", exit_code=2
            )
        backend = last.name
    return PressName(tuple(parts), backend)


EXAMPLE = "kvpress:PRESS, kvpress:PRESS[option=value;option=value], kvpress:PRESS+PRESS or kvpress:PRESS+quanto-int4"


def _options(method: str, text: str | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in filter(None, (text or "").split(";")):
        name, equals, value = (piece.strip() for piece in item.partition("="))
        if not (name and equals and value) or name in found:
            raise UserError(f"{method}: options are written as [option=value;option=value], each once", exit_code=2)
        found[name] = value
    return found
