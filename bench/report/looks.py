"""One place and one colour for every method, on every page and in every figure."""

from __future__ import annotations

import zlib

from bench.names import DESCRIPTIONS, FULL, HF, KVPRESS

COLOURED = (
    *("mix", "origin", "window", "quant", "mix-replay"),
    *(f"{KVPRESS}:snapkv", f"{KVPRESS}:kvzip", f"{HF}:quanto-int4"),
    *(f"{KVPRESS}:kvzip+quanto-int4", f"{KVPRESS}:adakv+snapkv"),
)
"""Methods that have a colour of their own."""
COLOURS, SHARED = 12, 5
"""How many there are, and how many of them, the last ones, all other methods share."""


def colour_of(method: str) -> int:
    """The number of its colour, from 1; 0 is that of text, for the full cache."""
    if method == FULL:
        return 0
    if method in COLOURED:
        return COLOURED.index(method) + 1
    return COLOURS - SHARED + 1 + zlib.crc32(method.encode()) % SHARED


def place_of(method: str) -> tuple[int, str]:
    """What methods are sorted by: the suite's own as it lists them, then the others by name."""
    own = list(DESCRIPTIONS)
    return (own.index(method) if method in own else len(own)), method
