"""One context, several questions: it is compressed once for each cell, and every question reads a copy of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench.methods.cell import Cell
from bench.methods.prompt import Compressed
from tasks.base import Document, Generate, LogLikelihood


@dataclass(eq=False)
class Source:
    """What a cell made of a context."""

    cell: Cell
    compressed: Compressed
    """Times are those of one reader: each has an equal part of the work."""
    readers: int
    """That are still to come."""

    @classmethod
    def of(cls, cell: Cell, compressed: Compressed, readers: int, prefilled_for: int) -> Source:
        """Make one whose readers share the work.

        Args:
            compressed: with the times of the whole work.
            readers: with this cell.
            prefilled_for: readers of the prefill, whatever cell answers them.
        """
        compress_s = compressed.compress_s
        # A cell that compresses while it prefills does so by itself.
        prefills = readers if compress_s is None else prefilled_for
        shared = replace(
            compressed,
            prefill_s=compressed.prefill_s / prefills,
            compress_s=None if compress_s is None else compress_s / readers,
        )
        return cls(cell, shared, readers)

    def take(self) -> Compressed:
        """The cache of one more reader: a copy, and for the last one the cache itself."""
        self.readers -= 1
        if not self.readers:
            return self.compressed
        return replace(self.compressed, cache=self.cell.fork(self.compressed.cache))


def context_of(document: Document) -> tuple[int, ...] | None:
    """The context that a document shares with others which ask about it; None where its question is inside.

    The prompt of a sampled answer is shared by all its repeats.
    """
    request = document.request
    if isinstance(request, Generate) and (request.question_ids or request.sampling is not None):
        return request.prompt_ids
    if isinstance(request, LogLikelihood) and request.continuations[0].question_ids:
        return request.continuations[0].context_ids
    return None


def by_context(documents: Iterable[Document]) -> list[list[int]]:
    """Places of documents, those of one context together, in the order in which contexts come first."""
    found: dict[object, list[int]] = {}
    for place, document in enumerate(documents):
        context = context_of(document)
        found.setdefault(place if context is None else context, []).append(place)
    return list(found.values())
