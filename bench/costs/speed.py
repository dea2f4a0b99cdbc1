"""What a cache costs in time: prefill, compression and decoding over context lengths and batches, beside three others.

``full`` is the stock cache with everything; ``full-fused`` holds the same, and is read by the kernel that reads the
tri-state methods: what is faster than the first and not than the second owes nothing to compression. ``ceiling`` is a
stock cache that holds only C tokens, the fastest that any cache of that budget could be with the model's own attention.

A batch is copies of one prompt's cache, each with storage of its own: long prompts are then read once, and decoding
costs what it does behind as many prompts of that length. Where a method's rows can share a forward they do; else each
has one of its own, which the timing says. Every cell is measured once per repetition, all cells in turn, in an order
that is turned by one place each time, so that a machine whose speed drifts slows all of them alike; medians and ratios
within a repetition are what counts.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from arkv import CacheConfig, ConfigError, storage_bytes
from bench.costs.bandwidth import weight_bytes
from bench.costs.plan import USABLE
from bench.engine.jobs import FAILURES, in_a_line
from bench.errors import UserError, said_in_one_line, show_traceback
from bench.methods.cell import Cell
from bench.methods.grid import full_cell, tristate_cell
from bench.methods.prompt import Asked, Prompt, stand_in_question
from bench.methods.reading import record
from bench.names import CEILING, FULL, FUSED
from bench.records.files.numbers import bytes_text
from bench.records.timing import Timing, Untimed
from bench.telemetry import Peak, Stopwatch, free_memory_bytes


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A row of the table: a cell of the grid, or one of those beside it."""

    name: str
    cell: Cell
    asked: Asked
    """The budget that it is shown with."""

    @property
    def key(self) -> str:
        """Unique for the settings."""
        if self.name == CEILING:
            return f"{CEILING}-{self.asked.cache_size or self.asked.cache_ratio}"
        return self.name if self.name in (FULL, FUSED) else self.cell.key

    @property
    def label(self) -> str:
        """For a person."""
        return f"{self.name} {self.asked}".strip() if self.name in (FUSED, CEILING) else self.cell.label


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences side by side: so many, or what fits in so many bytes."""

    rows: int | None = None
    kv_memory: int | None = None


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A prompt, read and compressed once for all batches of a cell."""

    cache: Cache
    token: torch.Tensor
    """The first of the answer, [1, 1]."""
    prefill_s: float
    compress_s: float | None
    ttft_s: float
    peak: int | None


class SpeedBench:
    """Times cells of a grid with one model.

    Args:
        model: a transformers causal language model in eval mode.
        cells: the grid; both full caches and the ceilings are added.
        prompt_ids: at least as many tokens as the longest context.
        new_tokens: decoding steps per cell.
        batch_sizes: sequences that are decoded side by side.
        kv_memory: bytes, for each of which every cell has the largest batch that fits.
        shared_prefill: a prompt is read once for all cells and repetitions.
    """

    def __init__(
        self,
        model: Any,
        cells: Sequence[Cell],
        prompt_ids: Sequence[int],
        new_tokens: int = 32,
        *,
        batch_sizes: Sequence[int] = (1,),
        kv_memory: Sequence[int] = (),
        shared_prefill: bool = False,
    ) -> None:
        self.model = model
        self.device = model.device
        self.prompt_ids = prompt_ids
        self.new_tokens = new_tokens
        self.shared_prefill = shared_prefill
        self.batches = [Batch(rows=rows) for rows in batch_sizes] + [Batch(kv_memory=nbytes) for nbytes in kv_memory]
        self.grid = [cell for cell in cells if cell.method != FULL]
        self.refused = ""
        """Why the model has no fused full cache; empty where it has."""
        try:
            self._fused(len(prompt_ids)).impl.empty(model)
        except ConfigError as error:
            self.refused = str(error)
        self._failed: set[tuple[Any, ...]] = set()
        self._prompts: dict[int, Prompt] = {}
        """Those that are shared, by their length."""

    @cached_property
    def _weight_bytes(self) -> int | None:
        return weight_bytes(self.model)

    def _fused(self, tokens: int) -> Cell:
        """Room for ``tokens`` tokens and all that follow, each at model precision. Ranked by age, it keeps no account
        of attention, by which nothing would be evicted here."""
        return tristate_cell("window", CacheConfig.for_method("window", cache_size=tokens + self.new_tokens + 1))

    def rows(self, context_length: int) -> list[Timed]:
        """What is timed behind so many tokens."""
        found = [Timed(name=FULL, cell=full_cell(), asked=Asked())]
        if not self.refused:
            found.append(Timed(name=FUSED, cell=self._fused(context_length), asked=Asked()))
        budgets = dict.fromkeys((cell.cache_size, cell.cache_ratio) for cell in self.grid)
        for size, ratio in budgets:
            if ratio is not None or (size is not None and size <= context_length):
                found.append(Timed(name=CEILING, cell=full_cell(), asked=Asked("tokens", size, ratio)))
        return found + [Timed(name=cell.method, cell=cell, asked=cell.asked) for cell in self.grid]

    @torch.inference_mode()
    def measure(
        self,
        context_length: int,
        repetition: int,
        done: Container[tuple[Any, ...]] = frozenset(),
        bandwidth: float | None = None,
    ) -> Iterator[Timing | Untimed]:
        """One repetition of every cell behind a prompt of ``context_length`` tokens; what cannot be timed is said once.

        Args:
            done: the :attr:`Timing.work` of what is left out.
            bandwidth: bytes a second of the memory, measured for this repetition.

        Raises:
            UserError: the text is shorter than the context.
        """
        if len(self.prompt_ids) < context_length:
            raise UserError(f"the text has {len(self.prompt_ids)} tokens, fewer than the context of {context_length}")
        rows = self.rows(context_length)
        turn = repetition % len(rows)
        waiting = []
        for timed in rows[turn:] + rows[:turn]:
            works = [(batch, (timed.key, context_length, batch.rows, batch.kv_memory)) for batch in self.batches]
            batches = [batch for batch, work in works if work not in done and work not in self._failed]
            if batches:
                waiting.append((timed, batches))
        if not waiting:
            return
        prompt = self._prompt(context_length, max(timed.cell.recorded_queries for timed in rows))
        for timed, batches in waiting:
            for item in self._cell(timed, batches, prompt):
                if isinstance(item, Untimed):
                    self._failed.add(item.work)
                    yield item
                else:
                    yield item.model_copy(update={"repetition": repetition, "bandwidth": bandwidth})

    def _prompt(self, tokens: int, queries: int) -> Prompt:
        if tokens in self._prompts:
            return self._prompts[tokens]
        (prompt,) = record(self.model, [self.prompt_ids[:tokens]], queries)
        prompt = replace(prompt, question=stand_in_question(tokens))
        if self.shared_prefill:
            self._prompts[tokens] = prompt
        return prompt

    def _cell(self, timed: Timed, batches: Sequence[Batch], prompt: Prompt) -> Iterator[Timing | Untimed]:
        """A cell with all its batches."""
        try:
            with in_a_line():
                begun = self._begin(timed, prompt)
        except FAILURES as error:
            yield from [_untimed(timed, batch, prompt, error) for batch in batches]
            return
        for batch in batches:
            try:
                with in_a_line():
                    made = self._batch(timed, batch, begun, prompt, keep=batch is not batches[-1])
            except FAILURES as error:
                yield _untimed(timed, batch, prompt, error)
            else:
                yield made

    def _begin(self, timed: Timed, prompt: Prompt) -> Begun:
        peak = Peak(self.device)
        cell, keeps_all = timed.cell, timed.name in (FULL, FUSED, CEILING)
        # Of a press that compresses during a prefill of its own there is no such time.
        compress_s = None
        if self.shared_prefill:
            made = cell.compress(self.model, prompt)
            assert made.logits is not None
            cache, logits, prefill_s = made.cache, made.logits, made.prefill_s + (made.compress_s or 0.0)
            compress_s = None if keeps_all else made.compress_s
        else:
            if not keeps_all:
                compress_s = cell.compress(self.model, prompt).compress_s
            prefill = Stopwatch(self.device)
            with prefill:
                cache, logits = cell.prefill(self.model, prompt.ids)
            prefill_s = prefill.seconds
        if timed.name == CEILING:
            cache = self._newest(cache, timed.asked.kept(prompt.tokens))
        choice = Stopwatch(self.device)
        with choice:
            token = logits.argmax(dim=-1, keepdim=True)
        return Begun(
            cache=cache,
            token=token,
            prefill_s=prefill_s,
            compress_s=compress_s,
            ttft_s=prefill_s + choice.seconds,
            peak=peak.nbytes,
        )

    def _batch(self, timed: Timed, batch: Batch, begun: Begun, prompt: Prompt, *, keep: bool) -> Timing:
        """A batch of a cell, whose own cache is kept for others or decoded with."""
        rows = batch.rows if batch.kv_memory is None else self._largest(timed.cell, begun, batch.kv_memory, prompt)
        assert rows is not None
        peak = Peak(self.device)
        caches = [begun.cache] if rows == 1 and not keep else self._copies(timed.cell, begun.cache, rows)
        step = median(self._decode(timed.cell, caches, begun.token, rows))
        kv_bytes, weights = storage_bytes(caches), self._weight_bytes
        peaks = (begun.peak, peak.nbytes)
        return Timing(
            method=timed.name,
            quant_format=timed.cell.quant_format if timed.name != FUSED else None,
            context_length=prompt.tokens,
            cache_size=timed.asked.cache_size,
            cache_ratio=timed.asked.cache_ratio,
            budget_unit=timed.asked.unit,
            prefill_s=begun.prefill_s,
            compress_s=begun.compress_s,
            ttft_ms=1000.0 * begun.ttft_s,
            tpot_ms=1000.0 * step,
            decode_tokens_per_s=rows / step,
            kv_bytes=kv_bytes,
            peak_memory_bytes=max((nbytes for nbytes in peaks if nbytes is not None), default=None),
            repetition=0,
            batch_size=rows,
            one_by_one=len(caches) > 1,
            step_bytes=None if weights is None else weights * len(caches) + kv_bytes,
            kv_memory=batch.kv_memory,
            cell=timed.key,
        )

    def _largest(self, cell: Cell, begun: Begun, nbytes: int, prompt: Prompt) -> int:
        """Sequences whose caches fit in so many bytes until they have been decoded.

        Raises:
            UserError: not one does.
        """
        (alone,) = self._copies(cell, begun.cache, 1)
        before = storage_bytes(alone)
        self._decode(cell, [alone], begun.token, 1)
        each = max(before, storage_bytes(alone))
        if each > nbytes:
            raise UserError(
                f"one sequence takes {bytes_text(each)}: give --kv-memory as much; {bytes_text(nbytes)} would hold one "
                f"of about {prompt.tokens * nbytes // each:,} tokens"
            )
        return nbytes // each

    def _copies(self, cell: Cell, cache: Cache, rows: int) -> list[Cache]:
        """``rows`` copies of a cache, as samples of one where they can share a forward.

        Raises:
            UserError: there is no room for so many.
        """
        each, free = storage_bytes(cache), free_memory_bytes(self.device)
        if free is not None and rows * each > USABLE * free:
            raise UserError(
                f"{rows} caches take {bytes_text(rows * each)}; {bytes_text(free)} are free, of which {USABLE:.0%} "
                f"count: {int(USABLE * free) // each} would fit"
            )
        whole = cell.repeated(cache, rows)
        if whole is not None:
            return [whole]
        # A cache may point back at the model that it serves.
        model = {id(module): module for module in self.model.modules()}
        return [copy.deepcopy(cache, dict(model)) for _ in range(rows)]

    def _decode(self, cell: Cell, caches: Sequence[Cache], token: torch.Tensor, rows: int) -> list[float]:
        """Seconds of each decoding step of all rows, which stand in one cache or have one each."""
        tokens = [token.expand(rows // len(caches), 1) for _ in caches]
        seconds = []
        with cell.decoding(self.model, caches):
            for _ in range(self.new_tokens):
                clock = Stopwatch(self.device)
                with clock:
                    for place, cache in enumerate(caches):
                        logits = self.model(tokens[place], past_key_values=cache).logits
                        tokens[place] = logits[:, -1:].argmax(dim=-1)
                seconds.append(clock.seconds)
        return seconds

    def _newest(self, cache: Cache, size: int) -> DynamicCache:
        """A stock cache with the newest tokens of ``cache``, which grows to ``size`` tokens while it decodes.

        Raises:
            UserError: it would begin empty.
        """
        tokens = size - self.new_tokens
        if tokens < 1:
            raise UserError(
                f"a budget of {size} tokens is not more than --new-tokens={self.new_tokens}, which are a part of it"
            )
        ceiling = DynamicCache(config=self.model.config)
        for index, layer in enumerate(cache.layers):
            keys, values = layer.keys, layer.values
            assert keys is not None
            assert values is not None
            ceiling.update(keys[:, :, -tokens:].clone(), values[:, :, -tokens:].clone(), index)
        return ceiling


def _untimed(timed: Timed, batch: Batch, prompt: Prompt, error: Exception) -> Untimed:
    show_traceback(error)
    return Untimed(
        cell=timed.key,
        label=timed.label,
        context_length=prompt.tokens,
        batch_size=batch.rows,
        kv_memory=batch.kv_memory,
        error=said_in_one_line(error),
    )
