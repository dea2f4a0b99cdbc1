"""What a cache costs in time: prefill, compression and decoding over context lengths, beside three others.

``full`` is the stock cache with everything; ``full-fused`` holds the same, and is read by the kernel that reads the
tri-state methods: what is faster than the first and not than the second owes nothing to compression. ``ceiling`` is a
stock cache that holds only C tokens, the fastest that any cache of that budget could be with the model's own attention.
Every cell is measured once per repetition, all cells in turn, so that a machine whose speed drifts slows all of them
alike; medians and ratios within the run are what counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from arkv import CacheConfig, ConfigError, storage_bytes
from bench.errors import UserError
from bench.methods.cell import Cell
from bench.methods.grid import full_cell, tristate_cell
from bench.methods.prompt import Prompt
from bench.methods.reading import record
from bench.names import CEILING, FULL, FUSED
from bench.records.timing import Timing
from bench.telemetry import Stopwatch, peak_memory_bytes, reset_peak_memory


class SpeedBench:
    """Times cells of a grid with one model.

    Args:
        model: a transformers causal language model in eval mode.
        cells: the grid; both full caches and the ceilings are added.
        prompt_ids: at least as many tokens as the longest context.
        new_tokens: decoding steps per cell.
    """

    def __init__(self, model: Any, cells: Sequence[Cell], prompt_ids: Sequence[int], new_tokens: int = 32) -> None:
        self.model = model
        self.device = model.device
        self.prompt_ids = prompt_ids
        self.new_tokens = new_tokens
        compressing = [cell for cell in cells if cell.method != FULL]
        sizes = dict.fromkeys(cell.cache_size for cell in compressing if cell.cache_size is not None)
        self.cells: list[tuple[str, int | None, Cell]] = [(FULL, None, full_cell())]
        self.refused = ""
        """Why the model has no fused full cache; empty where it has."""
        try:
            self._fused(len(prompt_ids)).impl.empty(model)
            self.cells.append((FUSED, None, self._fused(len(prompt_ids))))
        except ConfigError as error:
            self.refused = str(error)
        self.cells += [(CEILING, size, full_cell()) for size in sizes]
        self.cells += [(cell.method, cell.cache_size, cell) for cell in compressing]

    def _fused(self, tokens: int) -> Cell:
        """Room for ``tokens`` tokens and all that follow, each at model precision."""
        return tristate_cell("origin", CacheConfig.for_method("origin", cache_size=tokens + self.new_tokens + 1))

    @torch.inference_mode()
    def measure(self, context_length: int, repetition: int) -> Iterator[Timing]:
        """One repetition of every cell behind a prompt of ``context_length`` tokens.

        Raises:
            UserError: the text is shorter than the context.
        """
        if len(self.prompt_ids) < context_length:
            raise UserError(f"the text has {len(self.prompt_ids)} tokens, fewer than the context of {context_length}")
        queries = max(cell.recorded_queries for _, _, cell in self.cells)
        (prompt,) = record(self.model, [self.prompt_ids[:context_length]], queries)
        for name, size, cell in self.cells:
            if size is not None and name == CEILING and size > context_length:
                continue
            if name == FUSED:
                cell = self._fused(context_length)
            yield self._measure(name, size, cell, prompt, repetition)

    def _measure(self, name: str, size: int | None, cell: Cell, prompt: Prompt, repetition: int) -> Timing:
        reset_peak_memory(self.device)
        # Of a press, which compresses during its prefill, there is no such time.
        compress_s = None if name in (FULL, FUSED, CEILING) else cell.compress(self.model, prompt).compress_s
        prefill = Stopwatch(self.device)
        with prefill:
            cache, logits = cell.prefill(self.model, prompt.ids)
        if name == CEILING and size is not None:
            cache = _newest(cache, size - self.new_tokens, self.model.config)
        with cell.decoding(self.model, [cache]):
            steps = self._decode(cache, logits)
        step = median(steps[1:])
        return Timing(
            method=name,
            quant_format=cell.quant_format,
            context_length=prompt.tokens,
            cache_size=size,
            prefill_s=prefill.seconds,
            compress_s=compress_s,
            ttft_ms=1000.0 * (prefill.seconds + steps[0]),
            tpot_ms=1000.0 * step,
            decode_tokens_per_s=1.0 / step,
            kv_bytes=storage_bytes(cache),
            peak_memory_bytes=peak_memory_bytes(self.device),
            repetition=repetition,
        )

    def _decode(self, cache: Cache, logits: torch.Tensor) -> list[float]:
        """Seconds of the choice of the first token, then of each decoding step."""
        seconds = []
        clock = Stopwatch(self.device)
        with clock:
            token = logits.argmax(dim=-1, keepdim=True)
        seconds.append(clock.seconds)
        for _ in range(self.new_tokens):
            clock = Stopwatch(self.device)
            with clock:
                token = self.model(token, past_key_values=cache).logits[:, -1:].argmax(dim=-1)
            seconds.append(clock.seconds)
        return seconds


def _newest(cache: Cache, tokens: int, config: Any) -> DynamicCache:
    """A stock cache with the newest tokens of ``cache``, which grows to its budget while it decodes."""
    ceiling = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        ceiling.update(keys[:, :, -tokens:].clone(), values[:, :, -tokens:].clone(), index)
    return ceiling
