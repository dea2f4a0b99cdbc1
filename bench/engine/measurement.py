"""What answering one document with one cell gave and cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from bench.methods.cell import Cell, Held
from bench.methods.prompt import Compressed
from tasks.base import Answer, LogLikelihood, LogLikelihoods, Rolling, Scored


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A cell that could not answer a document."""

    cell: Cell
    error: str
    """In one line."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What answering one document with one cell gave and cost.

    States and bytes are those of the cache at the end of decoding. For scored continuations they are those that all of
    them were read from, after compression; of several contexts, or windows of a text, the mean. They are those of the
    document's own cache, whatever stands beside it in a batch.

    Times are the document's share: a forward of several rows counts for each of them in equal parts. So the times of
    all documents add up to that of the work, and times to the first token and per output token tell the throughput of
    a batch, not how long anybody would wait; they are latencies where documents are answered one by one.
    """

    cell: Cell
    answer: Answer
    prompt_tokens: int
    """All that is read before the answer, a question behind the context with it."""
    context_tokens: int
    """Those of them that were compressed, which a budget as a share is meant of; of several contexts, the longest."""
    generated_tokens: int = 0
    answers: int = 1
    """Generated in turn, each behind a question of its own."""
    scored_tokens: int = 0
    """Tokens of continuations or of a text whose probability was asked for."""
    prefills: int = 1
    """Contexts that were computed for the document, for all cells together."""
    tokens_original: float
    """Mean over layers and KV heads; likewise the next two."""
    tokens_quantized: float
    tokens_evicted: float
    kv_bytes: int
    """All storage of the cache."""
    kv_bytes_peak: int
    """The largest of the bytes right after compression and at the end of what was read."""
    full_kv_bytes: int
    """Keys and values of the same tokens at model precision."""
    prefill_s: float
    """The document's prefills, shared by all cells but presses, most of which share another. Questions to one context
    have equal parts of it, and of its compression."""
    compress_s: float | None
    """None for a press that compresses during a prefill of its own."""
    ttft_ms: float | None = None
    """Prefill, compression, the first question behind them, and the choice of the first token; None where nothing is
    generated."""
    question_s: float | None = None
    """Reading of questions behind the compressed context, before an answer is generated; None without one."""
    decode_s: float
    """From the first token to the last, or the reading of what was scored."""
    tpot_ms: float | None = None
    """Milliseconds per output token after the first of an answer; None for a single token, and where nothing is
    generated."""
    peak_memory_bytes: int | None
    """While the cell answered the document and those beside it."""
    ragged_kv_bytes: int | None = None
    """Where tokens of single heads are masked: bytes as if each head stored only what it attends to."""
    oq_ratios: list[float] = field(default_factory=list)
    """Per compressible layer, where the method uses them."""

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Output tokens after the first per second; prompt tokens never count."""
        return None if self.tpot_ms is None else 1000.0 / self.tpot_ms

    @classmethod
    def of_one(cls, cell: Cell, compressed: Compressed, held: Held, **more: Any) -> Measurement:
        """Of an answer from one cache: what it cost to make, and what it holds at the end."""
        return cls(
            cell=cell,
            tokens_original=held.original,
            tokens_quantized=held.quantized,
            tokens_evicted=held.evicted,
            kv_bytes=held.kv_bytes,
            kv_bytes_peak=max(compressed.kv_bytes, held.kv_bytes),
            full_kv_bytes=held.full_kv_bytes,
            ragged_kv_bytes=held.ragged_kv_bytes,
            prefill_s=compressed.prefill_s,
            compress_s=compressed.compress_s,
            oq_ratios=held.oq_ratios,
            **more,
        )


@dataclass
class Reading:
    """What one cell's reading of a document adds up to, context by context."""

    held: list[Held] = field(default_factory=list)
    kv_bytes_peak: int = 0
    prefill_s: float = 0.0
    compress_s: float | None = 0.0
    read_s: float = 0.0
    peak_memory_bytes: int | None = None
    scored: dict[int, Scored] = field(default_factory=dict)
    """By the place of the continuation or window in the request."""

    def add(self, compressed: Compressed, held: Held, read_s: float, peak: int | None) -> None:
        """One more context that has been read."""
        self.held.append(held)
        self.kv_bytes_peak = max(self.kv_bytes_peak, compressed.kv_bytes, held.kv_bytes)
        self.prefill_s += compressed.prefill_s
        if compressed.compress_s is None or self.compress_s is None:
            self.compress_s = None
        else:
            self.compress_s += compressed.compress_s
        self.read_s += read_s
        if peak is not None:
            self.peak_memory_bytes = max(self.peak_memory_bytes or 0, peak)

    def measurement(
        self, cell: Cell, request: LogLikelihood | Rolling, scored_tokens: int, context_tokens: int, prefills: int
    ) -> Measurement:
        ragged = [held.ragged_kv_bytes for held in self.held if held.ragged_kv_bytes is not None]
        return Measurement(
            cell=cell,
            answer=LogLikelihoods(scored=tuple(self.scored[place] for place in sorted(self.scored))),
            prompt_tokens=request.prompt_tokens,
            context_tokens=context_tokens,
            scored_tokens=scored_tokens,
            prefills=prefills,
            tokens_original=fmean(held.original for held in self.held),
            tokens_quantized=fmean(held.quantized for held in self.held),
            tokens_evicted=fmean(held.evicted for held in self.held),
            kv_bytes=round(fmean(held.kv_bytes for held in self.held)),
            kv_bytes_peak=self.kv_bytes_peak,
            full_kv_bytes=round(fmean(held.full_kv_bytes for held in self.held)),
            ragged_kv_bytes=round(fmean(ragged)) if ragged else None,
            prefill_s=self.prefill_s,
            compress_s=self.compress_s,
            decode_s=self.read_s,
            peak_memory_bytes=self.peak_memory_bytes,
            # Layers are compared within a context; of several, the first one stands for the document.
            oq_ratios=self.held[0].oq_ratios,
        )
