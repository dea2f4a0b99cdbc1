"""The steps that every kind of request is made of: prompts are read, compressed by a cell, and read on from.

The stock full cache is read with the model's own attention function, as it would be without this suite. Several
documents can be answered side by side, from caches of their own (:class:`arkv.CacheBatch`): then that function is SDPA
for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from transformers.cache_utils import Cache

from arkv import storage_bytes
from bench.engine.jobs import Job, cells_of, noting
from bench.methods.cell import Cell
from bench.methods.prompt import Compressed, Prompt, StockPrefill
from bench.methods.reading import record
from bench.methods.rope import depends_on_length, rereads_beyond

_T = TypeVar("_T")

BLOCK = 512
"""Most tokens of a row whose logits over the whole vocabulary are held at once."""

AUTO_BYTES = 1 << 30
"""What the logits of an automatic batch, and its copies of the cache, take at most, if it has more than one row."""

_PREFILL_TOKENS = 512
"""Most tokens, with padding, of prompts that are computed in one forward: longer ones keep a device busy alone."""


def count(number: int, noun: str) -> str:
    """``1 prompt`` or ``2 prompts``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def _unwatched(doing: str) -> None:
    """Nobody looks."""


def block_of(cell: Cell, caches: Sequence[Cache]) -> int:
    """Tokens that are read through a cell's caches in one forward; 1 for caches that are read as they decode."""
    return BLOCK if all(map(cell.reads_blocks, caches)) else 1


class Steps:
    """A model and how it is used.

    Args:
        model: a transformers causal language model in eval mode.
        tokenizer: its tokenizer.
        cells: all that are to answer; the prompts keep as many queries as any of them looks at.
        batch_size: documents that are answered side by side; None for as many as take a gibibyte.
        prefill_chunk: tokens of a prompt that are read in one forward; None for all.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        cells: Sequence[Cell],
        *,
        batch_size: int | None = 1,
        prefill_chunk: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.watch: Callable[[str], None] = _unwatched
        """Told what is being done, in a few words, on the way to the next answer."""
        self.cells = list(cells)
        self.batch_size = batch_size
        self.one_by_one: str | None = None
        """Why documents are answered one by one, although more were to stand side by side."""
        kinds = {*(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())}
        if other := kinds - {"full_attention", "sliding_attention"}:
            # Not known to CacheBatch.
            self._go_one_by_one(f"the model has layers of {' and '.join(sorted(other))}")
        if depends_on_length(model):
            # Of texts side by side each would get the factors of the longest.
            self._go_one_by_one("the model's rotary factors depend on the length of a text")
        self.rereads_beyond = rereads_beyond(model)
        """Tokens of a text beyond which it is read anew, as ``generate`` does it; None for never."""
        self.prefill_chunk = prefill_chunk
        self.device = model.device
        self.recorded_queries = max((cell.recorded_queries for cell in cells), default=1)

    # --- Prompts ---

    def prefills(self, wanted: Sequence[tuple[Sequence[Job], tuple[int, ...]]]) -> dict[int, Prompt | None]:
        """Contexts by their place in ``wanted``, None for one that is empty; one that cannot be computed fails all
        cells of its jobs."""
        prefills: dict[int, Prompt | None] = {}
        for places in self._prefill_batches([ids for _, ids in wanted]):
            jobs = [job for place in places for job in wanted[place][0]]
            longest = max(len(wanted[place][1]) for place in places)
            self.watch(f"reading {count(len(places), 'prompt')} of up to {longest} tokens")
            with noting(jobs, cells_of(jobs)):
                done = self.prefill([wanted[place][1] for place in places])
                prefills.update(zip(places, done, strict=True))
        return prefills

    def _prefill_batches(self, contexts: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
        """Places of contexts that are computed in one forward: short ones, neighbours in length."""
        batch: list[int] = []
        for place in sorted(range(len(contexts)), key=lambda place: len(contexts[place])):
            length = len(contexts[place])
            # An empty context takes part in no forward.
            alone = self.batch_size == 1 or self.prefill_chunk is not None or (batch and not contexts[batch[0]])
            if batch and (alone or length * (len(batch) + 1) > _PREFILL_TOKENS):
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    def prefill(self, contexts: Sequence[tuple[int, ...]]) -> Sequence[Prompt | None]:
        """Compute contexts in one forward, or a single one in chunks."""
        if not all(contexts):
            return [None for _ in contexts]
        prompts = record(self.model, contexts, self.recorded_queries, self.prefill_chunk)
        if any(isinstance(prompt.cache, StockPrefill) for prompt in prompts):
            # Rows of several documents need the attention interface.
            self._go_one_by_one("no compressed cache serves the model")
        return prompts

    def _go_one_by_one(self, why: str) -> None:
        if self.batch_size != 1:
            self.batch_size, self.one_by_one = 1, why

    # --- Caches of a cell ---

    def compress(self, cell: Cell, prompt: Prompt | None, beside: Iterable[Cell] = ()) -> Compressed:
        """The cell's own cache of a context, which may be empty; the cells ``beside`` it wait for the same one."""
        if prompt is not None and cell.impl.has_budget:
            self.watch(f"{cell.label}: compressing {prompt.tokens} tokens")
        return cell.compress(self.model, prompt, beside)

    def attention(self, cell: Cell, caches: Sequence[Cache]) -> contextlib.AbstractContextManager[None]:
        """Under this, the model can read the cell's caches and copies of them."""
        return cell.decoding(self.model, caches, side_by_side=self.batch_size != 1)

    @staticmethod
    def turns(cells: Sequence[Cell], waiting: Callable[[Cell], Sequence[_T]]) -> Iterator[tuple[Cell, Sequence[_T]]]:
        """Each cell with the contexts that it answers at once: all that are ``waiting`` for it, or one by one where its
        method goes so. Cells that share a prefill take turns at each context, so that no more than what they have made
        of one is held."""
        groups: dict[object, list[Cell]] = {}
        for cell in cells:
            groups.setdefault(cell if cell.impl.prefill_group is None else cell.impl.prefill_group, []).append(cell)
        for shared, group in groups.items():
            if isinstance(shared, Cell):
                cell, found = shared, waiting(shared)
                size = 1 if cell.impl.one_by_one else len(found)
                yield from ((cell, found[start : start + size]) for start in range(0, len(found), size or 1))
                continue
            for context in dict.fromkeys(context for cell in group for context in waiting(cell)):
                yield from ((cell, [context]) for cell in group if context in waiting(cell))

    def together(self, cell: Cell, rows: Sequence[_T], caches: Sequence[Cache]) -> Iterator[Sequence[_T]]:
        """Rows that can go through the model side by side: as many as a batch has, or each alone.

        There are more than that only where several ask about one context.
        """
        size = 1
        if len(rows) > 1 and self.batch_size != 1 and cell.batches(caches):
            size = self.batch_size or max(1, AUTO_BYTES // max(1, *map(storage_bytes, caches)))
        for start in range(0, len(rows), size):
            yield rows[start : start + size]
