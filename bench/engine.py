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
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache

from arkv import ConfigError, PrefillCache, TriStateCache, attach, storage_bytes
from bench import peers
from bench.errors import UserError
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
    Request,
    Rolling,
    Scored,
)

_BLOCK = 512
"""Most tokens of a row whose logits over the whole vocabulary are held at once."""

_AUTO_BYTES = 1 << 30
"""What the logits of an automatic batch, and its copies of the cache, take at most, if it has more than one row."""


FAILURES = (ConfigError, UserError, RuntimeError, MemoryError)
"""What a cell may meet in a document: a prompt or a model that its method cannot do, or no memory left."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A cell that could not answer a document."""

    cell: Cell
    error: str
    """In one line."""


_Failed = dict[str, Failure]
"""By the key of the cell."""


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
    """The document's prefills, shared by all cells but presses."""
    compress_s: float | None
    """None for a press, which compresses during a prefill of its own."""
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

    ids: tuple[int, ...]
    """May be empty; then there is nothing below."""
    cache: PrefillCache | None = None
    logits: torch.Tensor | None = None
    """Of the token that follows, [1, V]."""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Compressed:
    """A cell's own cache of a context."""

    cache: Cache
    logits: torch.Tensor | None
    """Of the token that follows, [1, V]; None for an empty context."""
    prefill_s: float
    compress_s: float | None
    kv_bytes: int


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
    prefill_s: float = 0.0
    compress_s: float | None = 0.0
    read_s: float = 0.0
    peak_memory_bytes: int | None = None
    scored: dict[int, Scored] = field(default_factory=dict)
    """By the place of the continuation or window in the request."""

    def add(self, compressed: _Compressed, held: _Held, read_s: float, peak: int | None) -> None:
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

    def measurement(self, cell: Cell, request: LogLikelihood | Rolling, scored_tokens: int) -> Measurement:
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
            prefill_s=self.prefill_s,
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
        prefill_chunk: tokens of a prompt that are read in one forward, to save memory; None for all.
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
        self.cells = list(cells)
        self.batch_size = batch_size
        self.prefill_chunk = prefill_chunk
        self.device = model.device
        end = model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        self.end_ids = {token for token in [*ends, tokenizer.eos_token_id] if token is not None}
        self.window_size = max((cell.recorded_queries for cell in cells), default=1)

    def warm_up(self) -> None:
        """Run a few tokens through every cell, so that one-time costs do not count for the first document."""
        request = Generate(prompt_ids=(0,) * max(2 * self.window_size, 64), max_new_tokens=3)
        for _ in self.answer(Document(id="warm-up", request=request), self.cells):
            pass

    @torch.inference_mode()
    def answer(self, document: Document, cells: Sequence[Cell]) -> Iterator[Measurement | Failure]:
        """Compute the document's contexts once, then answer with each of ``cells``, in their order.

        Cells that fail come last and do not stop the others. What all share is the failure of all.
        """
        answered = set()
        failed: _Failed = {}
        try:
            for measured in self._measure(document.request, cells, failed):
                answered.add(measured.cell.key)
                yield measured
        except FAILURES as error:
            for cell in cells:
                if cell.key not in answered:
                    failed.setdefault(cell.key, Failure(cell=cell, error=_said(error)))
        yield from failed.values()

    def _measure(self, request: Request, cells: Sequence[Cell], failed: _Failed) -> Iterator[Measurement]:
        if isinstance(request, Generate):
            prefill = self._prefill(request.prompt_ids)
            for cell in cells:
                with _noting(failed, cell):
                    yield self._generate(cell, request, prefill)
        elif isinstance(request, LogLikelihood):
            yield from self._log_likelihoods(request, cells, failed)
        elif isinstance(request, Compare):
            yield from self._compare(request, cells, failed)
        else:
            yield from self._rolling(request, cells, failed)

    # --- The steps that every kind of request is made of ---

    def _ids(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """[B, T] of rows of token ids, padded on the right, where nothing that comes before can see it."""
        longest = max(map(len, rows))
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self.device)

    def _prefill(self, ids: Sequence[int]) -> _Prefill:
        """Compute a context."""
        if not ids:
            return _Prefill(ids=())
        cache = PrefillCache(self.model, self.window_size)
        clock = Stopwatch(self.device)
        with attach(self.model), clock:
            for chunk in self._ids([ids]).split(self.prefill_chunk or len(ids), dim=1):
                logits = self.model(chunk, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        return _Prefill(ids=tuple(ids), cache=cache, logits=logits, seconds=clock.seconds)

    def _compress(self, cell: Cell, prefill: _Prefill) -> _Compressed:
        """The cell's own cache of a context, which may be empty."""
        reset_peak_memory(self.device)
        if cell.peer is not None:
            return self._compress_peer(cell.peer, prefill)
        cache: Cache
        clock = Stopwatch(self.device)
        with clock:
            if cell.config is None:
                cache = DynamicCache(config=self.model.config) if prefill.cache is None else prefill.cache.to_dynamic()
            elif prefill.cache is None:
                cache = TriStateCache(self.model, cell.config)
            else:
                cache = TriStateCache.from_prefill(prefill.cache, cell.config)
        return _Compressed(
            cache=cache,
            logits=prefill.logits,
            prefill_s=prefill.seconds,
            compress_s=clock.seconds,
            kv_bytes=storage_bytes(cache),
        )

    def _compress_peer(self, peer: peers.Peer, prefill: _Prefill) -> _Compressed:
        """Raises :class:`UserError` for an empty context: peers compress nothing that comes later."""
        if prefill.cache is None or prefill.logits is None:
            raise UserError(f"{peer.name} compresses a prompt, and here there is none before the tokens to be scored")
        shared = peers.Shared(prefill.cache, prefill.logits, prefill.seconds)
        done = peers.prefill(self.model, self._ids([prefill.ids]), peer, shared)
        return _Compressed(
            cache=done.cache,
            logits=done.logits,
            prefill_s=done.prefill_s,
            compress_s=done.compress_s,
            kv_bytes=storage_bytes(done.cache),
        )

    def _attention(self, cell: Cell, cache: Cache) -> contextlib.AbstractContextManager[Any]:
        """Under this, the model can read the cell's cache and copies of it."""
        return peers.decoding(self.model, cache, cell.peer) if cell.config is None else attach(self.model)

    @staticmethod
    def _fork(cache: Cache) -> Cache:
        """A copy that can go its own way."""
        if isinstance(cache, TriStateCache):
            return cache.fork()
        twin = copy.copy(cache)
        # Layers of transformers, and those that presses leave, replace their tensors and never write into them.
        twin.layers = [copy.copy(layer) for layer in cache.layers]
        return twin

    @staticmethod
    def _held(cell: Cell, cache: Cache, prefill: _Prefill) -> _Held:
        seen = cache.get_seq_length()
        if prefill.cache is None or not seen:
            return _Held()
        counts, ratios = {"original": float(seen), "quantized": 0.0, "evicted": 0.0}, []
        if isinstance(cache, TriStateCache):
            counts, ratios = cache.token_counts(), cache.oq_ratios() if cell.config and cell.config.uses_oq else []
        elif cell.peer is not None:
            counts = peers.token_counts(cache, cell.peer)
        return _Held(
            **counts, kv_bytes=storage_bytes(cache), full_kv_bytes=prefill.cache.full_bytes(seen), oq_ratios=ratios
        )

    def _read(self, cache: Cache, ids: torch.Tensor, chunk: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Feed ``ids`` [B, T] in chunks: the place of each one's first token, and its log-probabilities [B, t, V]."""
        for start in range(0, ids.shape[1], chunk):
            logits = self.model(ids[:, start : start + chunk], past_key_values=cache).logits
            yield start, logits.float().log_softmax(dim=-1)

    # --- Generation ---

    def _generate(self, cell: Cell, request: Generate, prefill: _Prefill) -> Measurement:
        compressed = self._compress(cell, prefill)
        cache = compressed.cache
        assert compressed.logits is not None
        with self._attention(cell, cache):
            tokens, first, decode = self._decode(cache, compressed.logits, request)
        held = self._held(cell, cache, prefill)
        return Measurement(
            cell=cell,
            answer=Generated(text=self._text(tokens, request), token_ids=tuple(tokens)),
            prompt_tokens=request.prompt_tokens,
            generated_tokens=len(tokens),
            tokens_original=held.original,
            tokens_quantized=held.quantized,
            tokens_evicted=held.evicted,
            kv_bytes=held.kv_bytes,
            kv_bytes_peak=max(compressed.kv_bytes, held.kv_bytes),
            full_kv_bytes=held.full_kv_bytes,
            prefill_s=compressed.prefill_s,
            compress_s=compressed.compress_s,
            ttft_ms=1000.0 * (compressed.prefill_s + (compressed.compress_s or 0.0) + first.seconds),
            decode_s=decode.seconds,
            tpot_ms=1000.0 * decode.seconds / (len(tokens) - 1) if len(tokens) > 1 else None,
            peak_memory_bytes=peak_memory_bytes(self.device),
            oq_ratios=held.oq_ratios,
        )

    def _decode(self, cache: Cache, logits: torch.Tensor, request: Generate) -> tuple[list[int], Stopwatch, Stopwatch]:
        """Greedy decoding. Returns the tokens, the clock of the first one and that of the others."""
        first, rest = Stopwatch(self.device), Stopwatch(self.device)
        with first:
            tokens = [int(self._answerable(logits, request).argmax(dim=-1))]
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

    def _answerable(self, logits: torch.Tensor, request: Generate) -> torch.Tensor:
        """Logits [1, V] of the first token, of which some cannot begin an answer."""
        if not request.end_ids:
            return logits
        ends = torch.tensor([*self.end_ids, *request.end_ids], device=logits.device)
        return logits.index_fill(-1, ends, -torch.inf)

    def _ended(self, tokens: list[int], begin: int | None, request: Generate) -> bool:
        if len(tokens) >= request.max_new_tokens or tokens[-1] in self.end_ids:
            return True
        if tokens[-1] in request.end_ids:
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

    def _log_likelihoods(self, request: LogLikelihood, cells: Sequence[Cell], failed: _Failed) -> Iterator[Measurement]:
        by_context: dict[tuple[int, ...], list[int]] = {}
        for place, item in enumerate(request.continuations):
            by_context.setdefault(item.context_ids, []).append(place)
        readings = {cell.key: _Reading() for cell in cells}
        for context, places in by_context.items():
            # The last token is read from the cache, so that even the first one of a continuation is predicted from it.
            prefill = self._prefill(context[:-1])
            continuations = {place: request.continuations[place].token_ids for place in places}
            for cell in cells:
                if cell.key in failed:
                    continue
                with _noting(failed, cell):
                    compressed = self._compress(cell, prefill)
                    held = self._held(cell, compressed.cache, prefill)
                    clock = Stopwatch(self.device)
                    reading = readings[cell.key]
                    with self._attention(cell, compressed.cache), clock:
                        reading.scored |= self._choices(cell, compressed.cache, context[-1], continuations)
                    reading.add(compressed, held, clock.seconds, peak_memory_bytes(self.device))
        scored_tokens = sum(len(item.token_ids) for item in request.continuations)
        for cell in cells:
            if cell.key not in failed:
                yield readings[cell.key].measurement(cell, request, scored_tokens)

    def _choices(
        self, cell: Cell, cache: Cache, first: int, continuations: dict[int, tuple[int, ...]]
    ) -> dict[int, Scored]:
        """Score continuations behind the token ``first``. ``cache`` is used up.

        ``first`` is read once for all of them and predicts their first tokens. The others are read in one forward from
        copies of the cache, token by token where it is a peer's; continuations that differ in their last token only
        share theirs.
        """
        ((_, log_probabilities),) = self._read(cache, self._ids([[first]]), chunk=1)
        parts = {place: [_score(log_probabilities[0], tokens[:1])] for place, tokens in continuations.items()}
        sharing: dict[tuple[int, ...], list[int]] = {}
        for place, tokens in continuations.items():
            if len(tokens) > 1:
                sharing.setdefault(tokens[:-1], []).append(place)
        batch_size, chunk = (1, 1) if cell.peer is not None else (self.batch_size, _BLOCK)
        for batch in self._batches(list(sharing), batch_size, storage_bytes(cache)):
            twin = self._fork(cache)
            if len(batch) > 1:
                twin.batch_repeat_interleave(len(batch))
            for begin, log_probabilities in self._read(twin, self._ids(batch), chunk):
                for row, shared in zip(log_probabilities, batch, strict=True):
                    for place in sharing[shared]:
                        if targets := continuations[place][1 + begin : 1 + begin + row.shape[0]]:
                            parts[place].append(_score(row, targets))
        return {place: _sum(scores) for place, scores in parts.items()}

    def _batches(
        self, rows: Sequence[tuple[int, ...]], batch_size: int | None, cache_bytes: int
    ) -> Iterator[Sequence[tuple[int, ...]]]:
        """Rows of ids that are read in one forward: neighbours in length, for little padding.

        A single token is decoded, where several are read as a block: one must not stand beside the other.
        """
        for single in (True, False):
            mine = sorted((row for row in rows if (len(row) == 1) == single), key=len)
            size = batch_size
            if size is None and mine:
                vocabulary = self.model.get_output_embeddings().weight.shape[0]
                logits_bytes = min(len(mine[-1]), _BLOCK) * vocabulary * torch.float32.itemsize
                size = max(1, _AUTO_BYTES // (logits_bytes + cache_bytes))
            for start in range(0, len(mine), size or 1):
                yield mine[start : start + (size or 1)]

    # --- Whole texts ---

    def _rolling(self, request: Rolling, cells: Sequence[Cell], failed: _Failed) -> Iterator[Measurement]:
        readings = {cell.key: _Reading() for cell in cells}
        for place, window in enumerate(request.windows):
            inputs = window.context_ids + window.token_ids[:-1]
            # Something to compress where there is more than one token, and something to read from it.
            prompt = min(max(1, int(request.prefill_share * len(inputs))), len(inputs) - 1)
            prefill, parts = self._scored_prefill(window, inputs[:prompt])
            rest = self._ids([inputs[prompt:]])
            for cell in cells:
                if cell.key in failed:
                    continue
                with _noting(failed, cell):
                    compressed = self._compress(cell, prefill)
                    # Peers can be read as they decode, and in no other way.
                    chunk = 1 if cell.peer is not None else request.chunk
                    clock = Stopwatch(self.device)
                    mine = list(parts)
                    with self._attention(cell, compressed.cache), clock:
                        for begin, log_probabilities in self._read(compressed.cache, rest, chunk):
                            mine += _window_score(window, prompt + begin, log_probabilities[0])
                    held = self._held(cell, compressed.cache, prefill)
                    reading = readings[cell.key]
                    reading.scored[place] = _sum(mine)
                    reading.add(compressed, held, clock.seconds, peak_memory_bytes(self.device))
        for cell in cells:
            if cell.key not in failed:
                yield readings[cell.key].measurement(cell, request, request.prompt_tokens)

    def _scored_prefill(self, window: Continuation, ids: tuple[int, ...]) -> tuple[_Prefill, list[Scored]]:
        """Compute the first tokens of a window, and score those that they predict."""
        if not ids:
            return _Prefill(ids=()), []
        cache = PrefillCache(self.model, self.window_size)
        clock = Stopwatch(self.device)
        parts: list[Scored] = []
        with attach(self.model), clock:
            for begin, log_probabilities in self._read(cache, self._ids([ids]), _BLOCK):
                parts += _window_score(window, begin, log_probabilities[0])
        return _Prefill(ids=ids, cache=cache, logits=log_probabilities[:, -1], seconds=clock.seconds), parts

    # --- Distributions ---

    def _compare(self, request: Compare, cells: Sequence[Cell], failed: _Failed) -> Iterator[Measurement]:
        prefill = self._prefill(request.context_ids[:-1])
        # The full cache is read first, whether it is asked for or not; every other cell is compared with it.
        reference: list[_Step] = []
        full = self._compared(Cell(FULL), request, prefill, reference)
        for cell in cells:
            if cell.method == FULL:
                yield full
                continue
            with _noting(failed, cell):
                yield self._compared(cell, request, prefill, reference)

    def _compared(self, cell: Cell, request: Compare, prefill: _Prefill, reference: list[_Step]) -> Measurement:
        """Read token by token; ``full`` leaves its steps in ``reference``."""
        inputs = self._ids([request.context_ids[-1:] + request.continuation_ids[:-1]])
        compressed = self._compress(cell, prefill)
        clock = Stopwatch(self.device)
        steps: list[tuple[float, bool, float]] = []
        errors: list[torch.Tensor] = []
        watching: contextlib.AbstractContextManager[list[torch.Tensor]] = (
            self._attention_outputs() if request.per_layer else contextlib.nullcontext([])
        )
        with self._attention(cell, compressed.cache), watching as outputs, clock:
            for place, log_probabilities in self._read(compressed.cache, inputs, chunk=1):
                mine = _Step(log_probabilities[0, 0], tuple(outputs))
                outputs.clear()
                if cell.method == FULL:
                    reference.append(mine)
                full = reference[place]
                steps.append(
                    _difference(full.log_probabilities, mine.log_probabilities, request.continuation_ids[place])
                )
                if request.per_layer:
                    errors.append(_relative_errors(full.attention, mine.attention))
        held = self._held(cell, compressed.cache, prefill)
        kl, agrees, delta_nll = zip(*steps, strict=True)
        return Measurement(
            cell=cell,
            answer=Compared(
                kl=kl,
                agrees=agrees,
                delta_nll=delta_nll,
                attention_error=tuple(torch.stack(errors).mean(dim=0).tolist()) if errors else (),
            ),
            prompt_tokens=request.prompt_tokens,
            scored_tokens=len(request.continuation_ids),
            tokens_original=held.original,
            tokens_quantized=held.quantized,
            tokens_evicted=held.evicted,
            kv_bytes=held.kv_bytes,
            kv_bytes_peak=max(compressed.kv_bytes, held.kv_bytes),
            full_kv_bytes=held.full_kv_bytes,
            prefill_s=compressed.prefill_s,
            compress_s=compressed.compress_s,
            decode_s=clock.seconds,
            peak_memory_bytes=peak_memory_bytes(self.device),
            oq_ratios=held.oq_ratios,
        )

    @contextlib.contextmanager
    def _attention_outputs(self) -> Iterator[list[torch.Tensor]]:
        """Under this, the list takes up what the attention of each layer gives for the last token, [hidden size]."""
        outputs: list[torch.Tensor] = []
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0][0, -1]))
            for module in peers.attention_modules(self.model)
        ]
        try:
            yield outputs
        finally:
            for hook in hooks:
                hook.remove()


class _Step(NamedTuple):
    """What the model makes of one token."""

    log_probabilities: torch.Tensor
    """Of the next token, [V]."""
    attention: tuple[torch.Tensor, ...]
    """Output of each layer's attention, [hidden size], if asked for."""


@contextlib.contextmanager
def _noting(failed: _Failed, cell: Cell) -> Iterator[None]:
    """Note in ``failed`` that the cell could not do what is under this."""
    try:
        yield
    except FAILURES as error:
        failed[cell.key] = Failure(cell=cell, error=_said(error))


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if isinstance(error, RuntimeError | MemoryError) else text


def _difference(full: torch.Tensor, mine: torch.Tensor, target: int) -> tuple[float, bool, float]:
    """KL full || mine of log-probabilities [V], whether they agree on the likeliest, and the change of NLL."""
    kl = (full.exp() * (full - mine)).sum()
    return float(kl), bool(full.argmax() == mine.argmax()), float(full[target] - mine[target])


def _relative_errors(full: Sequence[torch.Tensor], mine: Sequence[torch.Tensor]) -> torch.Tensor:
    """Distance over the norm of ``full``, of vectors one per layer: [L]."""
    pairs = [(one.float(), other.float()) for one, other in zip(full, mine, strict=True)]
    smallest = torch.finfo(torch.float32).tiny
    return torch.stack([(other - one).norm() / one.norm().clamp_min(smallest) for one, other in pairs]).cpu()


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
