"""One prefill, many methods: each document's prompt is computed once, then every cell of the grid compresses its own
copy of the cache and answers from it.

The stock full cache decodes with the model's own attention function, as it would without this suite. All cells decode
greedily, token by token, in the same loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from arkv import PrefillCache, TriStateCache, attach, storage_bytes
from bench import peers
from bench.methods import Cell
from bench.telemetry import Stopwatch, peak_memory_bytes, reset_peak_memory
from tasks.base import Document, Generate, Generated


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What answering one document with one cell gave and cost."""

    cell: Cell
    answer: Generated
    prompt_tokens: int
    generated_tokens: int
    tokens_original: float
    """Mean over layers and KV heads, at the end of decoding; likewise the next two."""
    tokens_quantized: float
    tokens_evicted: float
    kv_bytes: int
    """All storage of the cache at the end of decoding."""
    kv_bytes_peak: int
    """The larger of the bytes right after compression and at the end of decoding."""
    full_kv_bytes: int
    """Keys and values of the same tokens at model precision."""
    prefill_s: float
    """The document's one prefill, shared by all cells but presses."""
    compress_s: float | None
    """None for a press, which compresses during a prefill of its own."""
    ttft_ms: float
    """Prefill, compression and the choice of the first token."""
    decode_s: float
    """From the first token to the last."""
    tpot_ms: float | None
    """Milliseconds per output token after the first; None for a single token."""
    peak_memory_bytes: int | None
    oq_ratios: list[float] = field(default_factory=list)
    """Per compressible layer, where the method uses them."""

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Output tokens after the first per second; prompt tokens never count."""
        return None if self.tpot_ms is None else 1000.0 / self.tpot_ms


class Engine:
    """Answers documents with one model through every cell of a grid.

    Args:
        model: a transformers causal language model in eval mode.
        tokenizer: its tokenizer.
        cells: the grid.
    """

    def __init__(self, model: Any, tokenizer: Any, cells: Sequence[Cell]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cells = list(cells)
        self.device = model.device
        end = model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        self.end_ids = {token for token in [*ends, tokenizer.eos_token_id] if token is not None}
        self.window_size = max([cell.config.window_size for cell in cells if cell.config is not None], default=1)

    def warm_up(self) -> None:
        """Run a few tokens through every cell, so that one-time costs do not count for the first document."""
        request = Generate(prompt_ids=(0,) * max(2 * self.window_size, 64), max_new_tokens=3)
        for _ in self.answer(Document(id="warm-up", request=request), self.cells):
            pass

    @torch.inference_mode()
    def answer(self, document: Document, cells: Sequence[Cell]) -> Iterator[Measurement]:
        """Prefill once, then answer with each of ``cells`` in turn."""
        request = document.request
        prompt = torch.tensor([request.prompt_ids], device=self.device)
        prefill = PrefillCache(self.model, self.window_size)
        clock = Stopwatch(self.device)
        with attach(self.model), clock:
            logits = self.model(prompt, past_key_values=prefill, logits_to_keep=1).logits[:, -1]
        for cell in cells:
            yield self._answer(cell, request, prefill, logits, clock.seconds)

    def _answer(
        self, cell: Cell, request: Generate, prefill: PrefillCache, logits: torch.Tensor, prefill_s: float
    ) -> Measurement:
        reset_peak_memory(self.device)
        compress = Stopwatch(self.device)
        with compress:
            cache: Cache
            if cell.peer is not None:
                shared = peers.Shared(prefill, logits, prefill_s)
                prompt = torch.tensor([request.prompt_ids], device=self.device)
                prefilled = peers.prefill(self.model, prompt, cell.peer, shared)
                cache, logits, prefill_s = prefilled.cache, prefilled.logits, prefilled.prefill_s
            elif cell.config is None:
                cache = prefill.to_dynamic()
            else:
                cache = TriStateCache.from_prefill(prefill, cell.config)
        compress_s = compress.seconds if cell.peer is None else prefilled.compress_s
        after_compression = storage_bytes(cache)
        if cell.config is None:
            with peers.decoding(self.model, cache):
                tokens, first, decode = self._decode(cache, logits, request)
        else:
            with attach(self.model):
                tokens, first, decode = self._decode(cache, logits, request)
        seen = cache.get_seq_length()
        kv_bytes = storage_bytes(cache)
        if isinstance(cache, TriStateCache):
            counts, ratios = cache.token_counts(), cache.oq_ratios() if cell.config and cell.config.uses_oq else []
        elif cell.peer is not None:
            counts, ratios = peers.token_counts(cache), []
        else:
            counts, ratios = {"original": float(seen), "quantized": 0.0, "evicted": 0.0}, []
        return Measurement(
            cell=cell,
            answer=Generated(text=self._text(tokens, request), token_ids=tuple(tokens)),
            prompt_tokens=len(request.prompt_ids),
            generated_tokens=len(tokens),
            tokens_original=counts["original"],
            tokens_quantized=counts["quantized"],
            tokens_evicted=counts["evicted"],
            kv_bytes=kv_bytes,
            kv_bytes_peak=max(after_compression, kv_bytes),
            full_kv_bytes=prefill.full_bytes(seen),
            prefill_s=prefill_s,
            compress_s=compress_s,
            ttft_ms=1000.0 * (prefill_s + (compress_s or 0.0) + first.seconds),
            decode_s=decode.seconds,
            tpot_ms=1000.0 * decode.seconds / (len(tokens) - 1) if len(tokens) > 1 else None,
            peak_memory_bytes=peak_memory_bytes(self.device),
            oq_ratios=ratios,
        )

    def _decode(self, cache: Cache, logits: torch.Tensor, request: Generate) -> tuple[list[int], Stopwatch, Stopwatch]:
        """Greedy decoding. Returns the tokens, the clock of the first one and that of the others."""
        first, rest = Stopwatch(self.device), Stopwatch(self.device)
        with first:
            tokens = [int(self._answerable(logits, request).argmax(dim=-1))]
        while not self._ended(tokens, request):
            with rest:
                step = torch.tensor([tokens[-1:]], device=self.device)
                logits = self.model(step, past_key_values=cache).logits[:, -1]
                tokens.append(int(logits.argmax(dim=-1)))
        return tokens, first, rest

    def _answerable(self, logits: torch.Tensor, request: Generate) -> torch.Tensor:
        """Logits [1, V] of the first token, of which some cannot begin an answer."""
        if not request.end_ids:
            return logits
        ends = torch.tensor([*self.end_ids, *request.end_ids], device=logits.device)
        return logits.index_fill(-1, ends, -torch.inf)

    def _ended(self, tokens: list[int], request: Generate) -> bool:
        if len(tokens) >= request.max_new_tokens or tokens[-1] in self.end_ids:
            return True
        if tokens[-1] in request.end_ids:
            return True
        if not request.stop:
            return False
        # Long enough for any stop string to lie in it, short enough to be decoded at every step.
        tail = self.tokenizer.decode(tokens[-max(16, 2 * max(map(len, request.stop))) :])
        return any(stop in tail for stop in request.stop)

    def _text(self, tokens: list[int], request: Generate) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for stop in request.stop:
            text = text.split(stop)[0]
        return text
