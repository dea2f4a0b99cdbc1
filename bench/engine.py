"""One prefill, many methods: each context is computed once, then every cell of the grid compresses its own copy of the
cache and answers from it.

The stock full cache is read with the model's own attention function, as it would be without this suite. All cells go
through the same steps: decode greedily, token by token, or read given tokens and score them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from arkv import PrefillCache, TriStateCache, attach, storage_bytes
from bench.methods import FULL, Cell
from bench.telemetry import Stopwatch, peak_memory_bytes, reset_peak_memory
from tasks.base import (
    Answer,
    Compare,
    Compared,
    Continuation,
    Document,
    Generate,
    Generated,
    LogLikelihood,
    LogLikelihoods,
    Rolling,
    Scored,
)

_BLOCK = 512
"""Most tokens of a row whose logits over the whole vocabulary are held at once."""

_AUTO_BYTES = 1 << 30
"""What the logits of an automatic batch, and its copies of the cache, take at most, if it has more than one row."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What answering one document with one cell gave and cost.

    States and bytes are those of the cache at the end of decoding. For scored continuations they are those that all of
    them were read from, after compression; of several contexts, or windows of a text, the mean.
    """

    cell: Cell
    answer: Answer
    prompt_tokens: int
    generated_tokens: int = 0
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
    """The document's prefill, shared by all cells."""
    compress_s: float
    ttft_ms: float | None = None
    """Prefill, compression and the choice of the first token; None where nothing is generated."""
    decode_s: float
    """From the first token to the last, or the reading of what was scored."""
    tpot_ms: float | None = None
    """Milliseconds per output token after the first; None for a single token and where nothing is generated."""
    peak_memory_bytes: int | None
    oq_ratios: list[float] = field(default_factory=list)
    """Per compressible layer, where the method uses them."""

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Output tokens after the first per second; prompt tokens never count."""
        return None if self.tpot_ms is None else 1000.0 / self.tpot_ms


@dataclass(frozen=True, kw_only=True)
class _Prefill:
    """A context that has been computed once for all cells."""

    cache: PrefillCache | None
    """None for a context without tokens."""
    logits: torch.Tensor | None
    """Of the token that follows, [1, V]."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What a cache holds at one moment."""

    original: float = 0.0
    quantized: float = 0.0
    evicted: float = 0.0
    kv_bytes: int = 0
    full_kv_bytes: int = 0
    oq_ratios: list[float] = field(default_factory=list)


@dataclass
class _Reading:
    """What one cell's reading of a document adds up to, context by context."""

    held: list[_Held] = field(default_factory=list)
    kv_bytes_peak: int = 0
    compress_s: float = 0.0
    read_s: float = 0.0
    peak_memory_bytes: int | None = None
    scored: dict[int, Scored] = field(default_factory=dict)
    """By the place of the continuation or window in the request."""

    def measurement(
        self, cell: Cell, request: LogLikelihood | Rolling, scored_tokens: int, prefill_s: float
    ) -> Measurement:
        return Measurement(
            cell=cell,
            answer=LogLikelihoods(scored=tuple(self.scored[place] for place in sorted(self.scored))),
            prompt_tokens=request.prompt_tokens,
            scored_tokens=scored_tokens,
            prefills=len(self.held),
            tokens_original=fmean(held.original for held in self.held),
            tokens_quantized=fmean(held.quantized for held in self.held),
            tokens_evicted=fmean(held.evicted for held in self.held),
            kv_bytes=round(fmean(held.kv_bytes for held in self.held)),
            kv_bytes_peak=self.kv_bytes_peak,
            full_kv_bytes=round(fmean(held.full_kv_bytes for held in self.held)),
            prefill_s=prefill_s,
            compress_s=self.compress_s,
            decode_s=self.read_s,
            peak_memory_bytes=self.peak_memory_bytes,
            # Layers are compared within a context; of several, the first one stands for the document.
            oq_ratios=self.held[0].oq_ratios,
        )


class Engine:
    """Answers documents with one model through every cell of a grid.

    Args:
        model: a transformers causal language model in eval mode.
        tokenizer: its tokenizer.
        cells: the grid.
        batch_size: continuations of a context that are read in one forward, each from its own copy of the cache; None
            for as many as take a gibibyte.
    """

    def __init__(self, model: Any, tokenizer: Any, cells: Sequence[Cell], *, batch_size: int | None = 1) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cells = list(cells)
        self.batch_size = batch_size
        self.device = model.device
        end = model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        self.end_ids = {token for token in [*ends, tokenizer.eos_token_id] if token is not None}
        self.window_size = max([cell.config.window_size for cell in cells if cell.config is not None], default=1)

    def warm_up(self) -> None:
        """Run a few tokens through every cell, so that one-time costs do not count for the first document."""
        request = Generate(prompt_ids=(0,) * 2 * self.window_size, max_new_tokens=3)
        for _ in self.answer(Document(id="warm-up", request=request), self.cells):
            pass

    @torch.inference_mode()
    def answer(self, document: Document, cells: Sequence[Cell]) -> Iterator[Measurement]:
        """Compute the document's contexts once, then answer with each of ``cells``, in their order."""
        request = document.request
        if isinstance(request, Generate):
            prefill = self._prefill(request.prompt_ids)
            for cell in cells:
                yield self._generate(cell, request, prefill)
        elif isinstance(request, LogLikelihood):
            yield from self._log_likelihoods(request, cells)
        elif isinstance(request, Compare):
            yield from self._compare(request, cells)
        else:
            yield from self._rolling(request, cells)

    # --- The steps that every kind of request is made of ---

    def _ids(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """[B, T] of rows of token ids, padded on the right, where nothing that comes before can see it."""
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self.device)

    def _prefill(self, ids: Sequence[int]) -> _Prefill:
        """Compute a context."""
        if not ids:
            return _Prefill(cache=None, logits=None, seconds=0.0)
        cache = PrefillCache(self.model, self.window_size)
        clock = Stopwatch(self.device)
        with attach(self.model), clock:
            logits = self.model(self._ids([ids]), past_key_values=cache, logits_to_keep=1).logits[:, -1]
        return _Prefill(cache=cache, logits=logits, seconds=clock.seconds)

    def _compress(self, cell: Cell, prefill: PrefillCache | None) -> tuple[Cache, float]:
        """The cell's own cache of a context, which may be empty, and the seconds it took."""
        reset_peak_memory(self.device)
        clock = Stopwatch(self.device)
        with clock:
            cache: Cache
            if cell.config is None:
                cache = DynamicCache(config=self.model.config) if prefill is None else prefill.to_dynamic()
            elif prefill is None:
                cache = TriStateCache(self.model, cell.config)
            else:
                cache = TriStateCache.from_prefill(prefill, cell.config)
        return cache, clock.seconds

    def _attention(self, cell: Cell) -> contextlib.AbstractContextManager[Any]:
        """Under this, the model can read the cell's cache."""
        return contextlib.nullcontext() if cell.config is None else attach(self.model)

    @staticmethod
    def _fork(cache: Cache) -> Cache:
        """A copy that can go its own way."""
        if isinstance(cache, TriStateCache):
            return cache.fork()
        twin = copy.copy(cache)
        # Stock layers replace their tensors and never write into them.
        twin.layers = [copy.copy(layer) for layer in cache.layers]
        return twin

    @staticmethod
    def _held(cell: Cell, cache: Cache, prefill: PrefillCache | None) -> _Held:
        seen = cache.get_seq_length()
        if prefill is None or not seen:
            return _Held()
        counts, ratios = {"original": float(seen), "quantized": 0.0, "evicted": 0.0}, []
        if isinstance(cache, TriStateCache):
            counts, ratios = cache.token_counts(), cache.oq_ratios() if cell.config and cell.config.uses_oq else []
        return _Held(
            **counts, kv_bytes=storage_bytes(cache.layers), full_kv_bytes=prefill.full_bytes(seen), oq_ratios=ratios
        )

    def _read(self, cache: Cache, ids: torch.Tensor, chunk: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Feed ``ids`` [B, T] in chunks: the place of each one's first token, and its log-probabilities [B, t, V]."""
        for start in range(0, ids.shape[1], chunk):
            logits = self.model(ids[:, start : start + chunk], past_key_values=cache).logits
            yield start, logits.float().log_softmax(dim=-1)

    # --- Generation ---

    def _generate(self, cell: Cell, request: Generate, prefill: _Prefill) -> Measurement:
        assert prefill.cache is not None
        assert prefill.logits is not None
        cache, compress_s = self._compress(cell, prefill.cache)
        after_compression = storage_bytes(cache.layers)
        with self._attention(cell):
            tokens, first, decode = self._decode(cache, prefill.logits, request)
        held = self._held(cell, cache, prefill.cache)
        return Measurement(
            cell=cell,
            answer=Generated(text=self._text(tokens, request), token_ids=tuple(tokens)),
            prompt_tokens=request.prompt_tokens,
            generated_tokens=len(tokens),
            tokens_original=held.original,
            tokens_quantized=held.quantized,
            tokens_evicted=held.evicted,
            kv_bytes=held.kv_bytes,
            kv_bytes_peak=max(after_compression, held.kv_bytes),
            full_kv_bytes=held.full_kv_bytes,
            prefill_s=prefill.seconds,
            compress_s=compress_s,
            ttft_ms=1000.0 * (prefill.seconds + compress_s + first.seconds),
            decode_s=decode.seconds,
            tpot_ms=1000.0 * decode.seconds / (len(tokens) - 1) if len(tokens) > 1 else None,
            peak_memory_bytes=peak_memory_bytes(self.device),
            oq_ratios=held.oq_ratios,
        )

    def _decode(self, cache: Cache, logits: torch.Tensor, request: Generate) -> tuple[list[int], Stopwatch, Stopwatch]:
        """Greedy decoding. Returns the tokens, the clock of the first one and that of the others."""
        first, rest = Stopwatch(self.device), Stopwatch(self.device)
        with first:
            tokens = [int(logits.argmax(dim=-1))]
        # Where the answer begins; None while the model is thinking.
        begin = 0 if request.think_end is None else None
        while True:
            if begin is None and request.think_end is not None and self._ends_in(tokens, (request.think_end,)):
                begin = len(tokens)
            if self._ended(tokens, begin, request):
                return tokens, first, rest
            with rest:
                step = torch.tensor([tokens[-1:]], device=self.device)
                logits = self.model(step, past_key_values=cache).logits[:, -1]
                tokens.append(int(logits.argmax(dim=-1)))

    def _ended(self, tokens: list[int], begin: int | None, request: Generate) -> bool:
        if len(tokens) >= request.max_new_tokens or tokens[-1] in self.end_ids:
            return True
        return begin is not None and self._ends_in(tokens[begin:], request.stop)

    def _ends_in(self, tokens: list[int], strings: tuple[str, ...]) -> bool:
        """One of ``strings`` has just been completed."""
        if not strings or not tokens:
            return False
        # Long enough for any of the strings to lie in it, short enough to be decoded at every step.
        tail = self.tokenizer.decode(tokens[-max(16, 2 * max(map(len, strings))) :])
        return any(string in tail for string in strings)

    def _text(self, tokens: list[int], request: Generate) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if request.think_end is not None:
            # As lm-eval has it: all of a thought that never ended.
            text = text.split(request.think_end)[-1].lstrip()
        for stop in request.stop:
            text = text.split(stop)[0]
        return text

    # --- Given continuations ---

    def _log_likelihoods(self, request: LogLikelihood, cells: Sequence[Cell]) -> Iterator[Measurement]:
        by_context: dict[tuple[int, ...], list[int]] = {}
        for place, item in enumerate(request.continuations):
            by_context.setdefault(item.context_ids, []).append(place)
        readings = [_Reading() for _ in cells]
        prefill_s = 0.0
        for context, places in by_context.items():
            # The last token is read from the cache, so that even the first one of a continuation is predicted from it.
            prefill = self._prefill(context[:-1])
            prefill_s += prefill.seconds
            continuations = {place: request.continuations[place].token_ids for place in places}
            for cell, reading in zip(cells, readings, strict=True):
                cache, seconds = self._compress(cell, prefill.cache)
                held = self._held(cell, cache, prefill.cache)
                clock = Stopwatch(self.device)
                with self._attention(cell), clock:
                    reading.scored |= self._choices(cache, context[-1], continuations)
                reading.held.append(held)
                reading.kv_bytes_peak = max(reading.kv_bytes_peak, held.kv_bytes)
                reading.compress_s += seconds
                reading.read_s += clock.seconds
                reading.peak_memory_bytes = _larger(reading.peak_memory_bytes, peak_memory_bytes(self.device))
        scored_tokens = sum(len(item.token_ids) for item in request.continuations)
        for cell, reading in zip(cells, readings, strict=True):
            yield reading.measurement(cell, request, scored_tokens, prefill_s)

    def _choices(self, cache: Cache, first: int, continuations: dict[int, tuple[int, ...]]) -> dict[int, Scored]:
        """Score continuations behind the token ``first``. ``cache`` is used up.

        ``first`` is read once for all of them and predicts their first tokens. The others are read in one forward from
        copies of the cache; continuations that differ in their last token only share theirs.
        """
        ((_, log_probabilities),) = self._read(cache, self._ids([[first]]), chunk=1)
        parts = {place: [_score(log_probabilities[0], tokens[:1])] for place, tokens in continuations.items()}
        sharing: dict[tuple[int, ...], list[int]] = {}
        for place, tokens in continuations.items():
            if len(tokens) > 1:
                sharing.setdefault(tokens[:-1], []).append(place)
        for batch in self._batches(list(sharing), storage_bytes(cache.layers)):
            twin = self._fork(cache)
            if len(batch) > 1:
                twin.batch_repeat_interleave(len(batch))
            for begin, log_probabilities in self._read(twin, self._ids(batch), _BLOCK):
                for row, shared in zip(log_probabilities, batch, strict=True):
                    for place in sharing[shared]:
                        if targets := continuations[place][1 + begin : 1 + begin + row.shape[0]]:
                            parts[place].append(_score(row, targets))
        return {place: _sum(scores) for place, scores in parts.items()}

    def _batches(self, rows: Sequence[tuple[int, ...]], cache_bytes: int) -> Iterator[Sequence[tuple[int, ...]]]:
        """Rows of ids that are read in one forward: neighbours in length, for little padding.

        A single token is decoded, where several are read as a block: one must not stand beside the other.
        """
        for single in (True, False):
            mine = sorted((row for row in rows if (len(row) == 1) == single), key=len)
            size = self.batch_size
            if size is None and mine:
                vocabulary = self.model.get_output_embeddings().weight.shape[0]
                logits_bytes = min(len(mine[-1]), _BLOCK) * vocabulary * torch.float32.itemsize
                size = max(1, _AUTO_BYTES // (logits_bytes + cache_bytes))
            for start in range(0, len(mine), size or 1):
                yield mine[start : start + (size or 1)]

    # --- Whole texts ---

    def _rolling(self, request: Rolling, cells: Sequence[Cell]) -> Iterator[Measurement]:
        readings = [_Reading() for _ in cells]
        prefill_s = 0.0
        for place, window in enumerate(request.windows):
            inputs = self._ids([window.context_ids + window.token_ids[:-1]])
            # Something to compress where there is more than one token, and something to read from it.
            prompt = min(max(1, int(request.prefill_share * inputs.shape[1])), inputs.shape[1] - 1)
            prefill = PrefillCache(self.model, self.window_size) if prompt else None
            parts: list[Scored] = []
            if prefill is not None:
                clock = Stopwatch(self.device)
                with attach(self.model), clock:
                    for begin, log_probabilities in self._read(prefill, inputs[:, :prompt], _BLOCK):
                        parts += _window_score(window, begin, log_probabilities[0])
                prefill_s += clock.seconds
            for cell, reading in zip(cells, readings, strict=True):
                cache, seconds = self._compress(cell, prefill)
                after_compression = storage_bytes(cache.layers)
                clock = Stopwatch(self.device)
                mine = list(parts)
                with self._attention(cell), clock:
                    for begin, log_probabilities in self._read(cache, inputs[:, prompt:], request.chunk):
                        mine += _window_score(window, prompt + begin, log_probabilities[0])
                held = self._held(cell, cache, prefill)
                reading.scored[place] = _sum(mine)
                reading.held.append(held)
                reading.kv_bytes_peak = max(reading.kv_bytes_peak, held.kv_bytes, after_compression)
                reading.compress_s += seconds
                reading.read_s += clock.seconds
                reading.peak_memory_bytes = _larger(reading.peak_memory_bytes, peak_memory_bytes(self.device))
        for cell, reading in zip(cells, readings, strict=True):
            yield reading.measurement(cell, request, request.prompt_tokens, prefill_s)

    # --- Distributions ---

    def _compare(self, request: Compare, cells: Sequence[Cell]) -> Iterator[Measurement]:
        prefill = self._prefill(request.context_ids[:-1])
        inputs = self._ids([request.context_ids[-1:] + request.continuation_ids[:-1]])
        targets = torch.tensor(request.continuation_ids, device=self.device)
        reference: list[torch.Tensor] = []
        # The full cache is read first, whether it is asked for or not; every other cell is compared with it.
        for cell in [Cell(FULL), *(cell for cell in cells if cell.config is not None)]:
            cache, compress_s = self._compress(cell, prefill.cache)
            after_compression = storage_bytes(cache.layers)
            clock = Stopwatch(self.device)
            steps: list[tuple[float, bool, float]] = []
            with self._attention(cell), clock:
                for place, log_probabilities in self._read(cache, inputs, chunk=1):
                    mine = log_probabilities[0, 0]
                    if cell.config is None:
                        reference.append(mine)
                    steps.append(_difference(reference[place], mine, targets[place]))
            if cell not in cells:
                continue
            held = self._held(cell, cache, prefill.cache)
            kl, agrees, delta_nll = zip(*steps, strict=True)
            yield Measurement(
                cell=cell,
                answer=Compared(kl=kl, agrees=agrees, delta_nll=delta_nll),
                prompt_tokens=request.prompt_tokens,
                scored_tokens=len(request.continuation_ids),
                tokens_original=held.original,
                tokens_quantized=held.quantized,
                tokens_evicted=held.evicted,
                kv_bytes=held.kv_bytes,
                kv_bytes_peak=max(after_compression, held.kv_bytes),
                full_kv_bytes=held.full_kv_bytes,
                prefill_s=prefill.seconds,
                compress_s=compress_s,
                decode_s=clock.seconds,
                peak_memory_bytes=peak_memory_bytes(self.device),
                oq_ratios=held.oq_ratios,
            )


def _difference(full: torch.Tensor, mine: torch.Tensor, target: torch.Tensor) -> tuple[float, bool, float]:
    """KL full || mine of log-probabilities [V], whether they agree on the likeliest, and the change of NLL."""
    kl = (full.exp() * (full - mine)).sum()
    return float(kl), bool(full.argmax() == mine.argmax()), float(full[target] - mine[target])


def _score(log_probabilities: torch.Tensor, targets: Sequence[int]) -> Scored:
    """Of ``targets``, predicted by the first rows of ``log_probabilities`` [t, V]."""
    rows = log_probabilities[: len(targets)]
    wanted = torch.tensor(targets, device=rows.device)
    picked = rows.gather(-1, wanted[:, None])
    return Scored(float(picked.sum()), bool((rows.argmax(dim=-1) == wanted).all()))


def _window_score(window: Continuation, begin: int, log_probabilities: torch.Tensor) -> list[Scored]:
    """Of the targets that the inputs from place ``begin`` on predict; the first ones of a window may predict none."""
    skip = max(len(window.context_ids) - 1 - begin, 0)
    first = begin + skip - (len(window.context_ids) - 1)
    targets = window.token_ids[first : first + max(log_probabilities.shape[0] - skip, 0)]
    return [_score(log_probabilities[skip:], targets)] if targets else []


def _sum(parts: Sequence[Scored]) -> Scored:
    return Scored(sum(part.log_likelihood for part in parts), all(part.is_greedy for part in parts))


def _larger(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else max(one, other)
