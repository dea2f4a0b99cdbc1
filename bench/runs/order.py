"""In which order the cells of a grid answer a document.

What comes first after a prefill finds other caches, clocks and memory than what comes later. So no cell is always the
first: from document to document the order is turned by one place. It depends on the document's place in its task alone,
so that a run that is continued goes on in the order that it would have had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from bench.engine.engine import AUTO_DOCUMENTS

_T = TypeVar("_T")


def turned(cells: Sequence[_T], place: int, at_once: int | None) -> list[_T]:
    """The cells in the order of the document at ``place``.

    Args:
        at_once: documents that are answered side by side, in one order; None for as many as fit, where a batch has the
            order of its first document.
    """
    turns = place // at_once if at_once is not None else place + place // AUTO_DOCUMENTS
    first = turns % len(cells) if cells else 0
    return [*cells[first:], *cells[:first]]


def order_text(at_once: int | None) -> str:
    """What the record says of it."""
    if at_once == 1:
        return "turned by one place from document to document"
    return "turned by one place from batch to batch" if at_once else "turned from batch to batch"
