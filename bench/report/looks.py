"""One place and one colour for every method, on every page and in every figure."""

from __future__ import annotations

import zlib

from bench.names import DESCRIPTIONS, FULL, HF, KVPRESS

COLOURED = (
    *("mix", "origin", "window", "quant", "mix-replay"),
    *(f"{KVPRESS}:snapkv", f"{KVPRESS}:kvzip", f"{HF}:quanto-int4"),
)
"""Methods that have a colour of their own; the others share the last ones of them."""
_SHARED = 3


def colour_of(method: str) -> int:
    """The number of its colour, from 1; 0 is that of text, for the full cache."""
    if method == FULL:
        return 0
    if method in COLOURED:
        return COLOURED.index(method) + 1
    return len(COLOURED) - _SHARED + 1 + zlib.crc32(method.encode()) % _SHARED


def place_of(method: str) -> tuple[int, str]:
    """What methods are sorted by: the suite's own as it lists them, then the others by name."""
    own = list(DESCRIPTIONS)
    return (own.index(method) if method in own else len(own)), method
