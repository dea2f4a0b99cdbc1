"""One prefill, many methods: each context is computed once, then every cell of the grid compresses its own copy of the
cache and answers from it.

The stock full cache is read with the model's own attention function, as it would be without this suite. All cells go
through the same steps: decode greedily, token by token, or read given tokens and score them. Several documents can be
answered side by side, from caches of their own (:class:`arkv.CacheBatch`): then that function is SDPA for all.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import torch
from transformers.cache_utils import Cache, DynamicCache

from arkv import CacheBatch, ConfigError, PrefillCache, TriStateCache, attach, storage_bytes
from arkv.models import copy_layer
from bench.errors import UserError, show_traceback
from bench.methods import peers
from bench.methods.grid import Cell
from bench.names import FULL
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

_T = TypeVar("_T")

_BLOCK = 512
"""Most tokens of a row whose logits over the whole vocabulary are held at once."""

_AUTO_BYTES = 1 << 30
"""What the logits of an automatic batch, and its copies of the cache, take at most, if it has more than one row."""

AUTO_DOCUMENTS = 32
"""Most documents of an automatic batch, which is what a killed run has to measure again."""

_PREFILL_TOKENS = 512
"""Most tokens, with padding, of prompts that are computed in one forward: longer ones keep a device busy alone."""


FAILURES = (ConfigError, UserError, RuntimeError, MemoryError)
"""What a cell may meet in a document: a prompt or a model that its method cannot do, or no memory left."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A cell that could not answer a document."""

    cell: Cell
    error: str
    """In one line."""


@dataclass(eq=False)
class _Job:
    """A document and the cells that are to answer it."""

    document: Document
    cells: Sequence[Cell]
    answered: set[str] = field(default_factory=set)
    """Keys of cells."""
    failed: dict[str, Failure] = field(default_factory=dict)
    """By the key of the cell."""

    def request(self, kind: type[_T]) -> _T:
        """The document's request, which is of this kind."""
        request = self.document.request
        assert isinstance(request, kind)
        return request

    def waits_for(self, cell: Cell) -> bool:
        """The cell is asked for, and has neither answered nor failed."""
        return cell in self.cells and cell.key not in self.answered and cell.key not in self.failed


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
    """While the cell answered the document and those beside it."""
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
    score_s: dict[Any, float] = field(default_factory=dict)
    """Seconds that the scores which several cells share have taken, by ``CacheConfig.scoring``."""


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


@dataclass(kw_only=True, eq=False)
class _Answering:
    """A cell's answer to a generation request in the making."""

    job: _Job
    request: Generate
    prefill: _Prefill
    compressed: _Compressed
    tokens: list[int] = field(default_factory=list)
    begin: int | None = None
    """Where the answer begins; None while the model is thinking."""
    first_s: float = 0.0
    decode_s: float = 0.0


class _SideBySide:
    """Rows that are decoded together: where their caches allow it, in one cache, so that attention is one call."""

    def __init__(self, rows: Sequence[_Answering]) -> None:
        self.rows = list(rows)
        caches = [row.compressed.cache for row in rows]
        self.whole: TriStateCache | None = None
        if len(rows) > 1 and TriStateCache.can_stack(caches):
            self.whole = TriStateCache.stack([cache for cache in caches if isinstance(cache, TriStateCache)])
            # So that what they hold is not there twice.
            self._give([(row, self.whole) for row in rows])

    def keep(self, rows: Sequence[_Answering]) -> None:
        """Go on with ``rows`` only; each of the others gets its own cache back."""
        if len(rows) == len(self.rows):
            return
        if self.whole is not None:
            kept = {id(row) for row in rows}
            ended = [(place, row) for place, row in enumerate(self.rows) if id(row) not in kept]
            self._give([(row, self.whole.fork(place)) for place, row in ended])
            places = [place for place, row in enumerate(self.rows) if id(row) in kept]
            if places:
                self.whole.batch_select_indices(torch.tensor(places))
        self.rows = list(rows)

    @staticmethod
    def _give(pairs: Sequence[tuple[_Answering, Cache]]) -> None:
        for row, cache in pairs:
            row.compressed = dataclasses.replace(row.compressed, cache=cache)


@dataclass(kw_only=True, eq=False)
class _Context:
    """A context of a job and what is asked behind it: continuations by their place in the request."""

    job: _Job
    ids: tuple[int, ...]
    continuations: dict[int, tuple[int, ...]]


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
        batch_size: documents that are answered side by side, and continuations that are read in one forward, each from
            a cache of its own; None for as many as take a gibibyte. Methods of others answer one by one, and so do all
            where a text is read as a whole or distributions are compared.
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
        config = model.config.get_text_config(decoder=True)
        kinds = {*(getattr(config, "layer_types", None) or ())}
        # Other attention is not known to CacheBatch.
        self.batch_size = batch_size if kinds <= {"full_attention", "sliding_attention"} else 1
        self.prefill_chunk = prefill_chunk
        self.device = model.device
        end = model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        self.end_ids = {token for token in [*ends, tokenizer.eos_token_id] if token is not None}
        self.recorded_queries = max((cell.recorded_queries for cell in cells), default=1)

    def warm_up(self) -> None:
        """Run a few tokens through every cell, so that one-time costs do not count for the first document."""
        request = Generate(prompt_ids=(0,) * max(2 * self.recorded_queries, 64), max_new_tokens=3)
        for _ in self.answer(Document(id="warm-up", request=request), self.cells):
            pass

    def answer(self, document: Document, cells: Sequence[Cell]) -> Iterator[Measurement | Failure]:
        """Compute the document's contexts once, then answer with each of ``cells``, in their order.

        Cells that fail come last and do not stop the others. What all share is the failure of all.
        """
        for _, outcome in self.answer_batch([(document, cells)]):
            yield outcome

    @torch.inference_mode()
    def answer_batch(
        self, work: Sequence[tuple[Document, Sequence[Cell]]]
    ) -> Iterator[tuple[Document, Measurement | Failure]]:
        """Answer any number of documents with the cells of each, ``batch_size`` of them side by side.

        There is one outcome for each document and cell. Batches come in the order of ``work`` and each one's failures
        come last. What the documents of a batch share, such as the memory of a forward, is the failure of all.
        """
        for jobs in self._side_by_side([_Job(document, cells) for document, cells in work]):
            for job, measured in self._measure(jobs):
                job.answered.add(measured.cell.key)
                yield job.document, measured
            for job in jobs:
                for failure in job.failed.values():
                    yield job.document, failure

    def _measure(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, Measurement]]:
        """Answer jobs whose requests are of one kind."""
        kind = type(jobs[0].document.request)
        if kind is Generate:
            yield from self._generate(jobs)
        elif kind is LogLikelihood:
            yield from self._log_likelihoods(jobs)
        else:
            for job in jobs:
                with _noting([job], job.cells):
                    yield from self._compare(job) if kind is Compare else self._rolling(job)

    # --- What is done side by side ---

    def _side_by_side(self, jobs: Iterable[_Job]) -> Iterator[list[_Job]]:
        """Batches of jobs in their order, each of requests of one kind."""
        batch: list[_Job] = []
        held = 0
        for job in jobs:
            request = job.document.request
            needed = self._bytes_needed(request)
            full = len(batch) >= (self.batch_size or AUTO_DOCUMENTS)
            if self.batch_size is None:
                full = full or held + needed > _AUTO_BYTES
            if batch and (full or type(request) is not type(batch[0].document.request)):
                yield batch
                batch, held = [], 0
            batch.append(job)
            held += needed
        if batch:
            yield batch

    def _bytes_needed(self, request: Request) -> int:
        """About what a document takes while a cell answers it: its prefill, and a cache as large as the full one."""
        config = self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token: int = 2 * config.num_hidden_layers * heads * head_dim * self.model.dtype.itemsize
        new = request.max_new_tokens if isinstance(request, Generate) else 0
        return per_token * (2 * request.prompt_tokens + new)

    @staticmethod
    def _cells_of(jobs: Iterable[_Job]) -> list[Cell]:
        """The cells of all jobs, each once."""
        return list({cell.key: cell for job in jobs for cell in job.cells}.values())

    @staticmethod
    def _groups(cell: Cell, waiting: Sequence[_T]) -> Iterator[Sequence[_T]]:
        """What waits for the cell: all at once, or one by one where it is a method of others."""
        size = len(waiting) if cell.peer is None else 1
        for start in range(0, len(waiting), size or 1):
            yield waiting[start : start + size]

    # --- The steps that every kind of request is made of ---

    def _ids(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """[B, T] of rows of token ids, padded on the left."""
        longest = max(map(len, rows))
        return torch.tensor([[*[0] * (longest - len(row)), *row] for row in rows], device=self.device)

    def _forward(self, caches: Sequence[Cache], rows: Sequence[Sequence[int]], **options: Any) -> torch.Tensor:
        """Logits [B, T, V] of new tokens behind each of the caches; rows are padded on the left."""
        ids = self._ids(rows)
        logits: torch.Tensor
        if len(caches) == 1:
            logits = self.model(ids, past_key_values=caches[0], **options).logits
        else:
            batch = CacheBatch(caches, [len(row) for row in rows])
            positions = batch.position_ids(self.device)
            logits = self.model(ids, position_ids=positions, past_key_values=batch, **options).logits
        return logits

    def _prefills(self, wanted: Sequence[tuple[_Job, tuple[int, ...]]]) -> dict[int, _Prefill]:
        """Contexts by their place in ``wanted``; one that cannot be computed fails all cells of its job."""
        prefills: dict[int, _Prefill] = {}
        for places in self._prefill_batches([ids for _, ids in wanted]):
            with _noting([wanted[place][0] for place in places], self._cells_of(wanted[place][0] for place in places)):
                done = self._prefill([wanted[place][1] for place in places])
                prefills.update(zip(places, done, strict=True))
        return prefills

    def _prefill_batches(self, contexts: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
        """Places of contexts that are computed in one forward: short ones, neighbours in length."""
        batch: list[int] = []
        for place in sorted(range(len(contexts)), key=lambda place: len(contexts[place])):
            length = len(contexts[place])
            # An empty context takes part in no forward.
            alone = self.prefill_chunk is not None or (batch and not contexts[batch[0]])
            if batch and (alone or length * (len(batch) + 1) > _PREFILL_TOKENS):
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    def _prefill(self, contexts: Sequence[tuple[int, ...]]) -> list[_Prefill]:
        """Compute contexts in one forward, or a single one in chunks."""
        if not all(contexts):
            return [_Prefill(ids=()) for _ in contexts]
        caches = [PrefillCache(self.model, self.recorded_queries) for _ in contexts]
        chunk = self.prefill_chunk or max(map(len, contexts))
        clock = Stopwatch(self.device)
        with attach(self.model), clock:
            for start in range(0, max(map(len, contexts)), chunk):
                rows = [ids[start : start + chunk] for ids in contexts]
                logits = self._forward(caches, rows, logits_to_keep=1)[:, -1]
        return [
            _Prefill(ids=ids, cache=cache, logits=row, seconds=clock.seconds / len(contexts))
            for ids, cache, row in zip(contexts, caches, logits.split(1), strict=True)
        ]

    def _compress(self, cell: Cell, prefill: _Prefill) -> _Compressed:
        """The cell's own cache of a context, which may be empty."""
        if cell.peer is not None:
            return self._compress_peer(cell.peer, prefill)
        cache: Cache
        scoring_s = 0.0
        if cell.config is not None and prefill.cache is not None:
            clock = Stopwatch(self.device)
            with clock:
                prefill.cache.score(cell.config)
            # Each cell's time is what it would take by itself.
            scoring_s = prefill.score_s.setdefault(cell.config.scoring, clock.seconds)
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
            compress_s=scoring_s + clock.seconds,
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

    def _attention(self, cell: Cell, caches: Sequence[Cache]) -> contextlib.AbstractContextManager[Any]:
        """Under this, the model can read the cell's caches and copies of them."""
        if cell.peer is not None or (cell.config is None and self.batch_size == 1):
            return peers.decoding(self.model, caches[0], cell.peer)
        return attach(self.model)

    @staticmethod
    def _fork(cache: Cache) -> Cache:
        """A copy that can go its own way."""
        if isinstance(cache, TriStateCache):
            return cache.fork()
        twin = copy.copy(cache)
        twin.layers = [copy_layer(layer) for layer in cache.layers]
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

    def _read(
        self, caches: Sequence[Cache], rows: Sequence[Sequence[int]], chunk: int
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """Feed each of the caches its row of token ids in chunks.

        Yields the place of a chunk's first token in the rows, and the log-probabilities [t, V] behind each row's tokens
        in it, of which there may be none.
        """
        for begin in range(0, max(map(len, rows)), chunk):
            parts = [row[begin : begin + chunk] for row in rows]
            going = [place for place, part in enumerate(parts) if part]
            logits = self._forward([caches[place] for place in going], [parts[place] for place in going])
            log_probabilities = logits.float().log_softmax(dim=-1)
            found = [log_probabilities[0, :0]] * len(rows)
            for place, mine in zip(going, log_probabilities, strict=True):
                found[place] = mine[-len(parts[place]) :]
            yield begin, found

    # --- Generation ---

    def _generate(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, Measurement]]:
        requests = [job.request(Generate) for job in jobs]
        prefills = self._prefills([(job, request.prompt_ids) for job, request in zip(jobs, requests, strict=True)])
        for cell in self._cells_of(jobs):
            waiting = [place for place, job in enumerate(jobs) if job.waits_for(cell)]
            for group in self._groups(cell, waiting):
                reset_peak_memory(self.device)
                rows = []
                for place in group:
                    job, request, prefill = jobs[place], requests[place], prefills[place]
                    with _noting([job], [cell]):
                        compressed = self._compress(cell, prefill)
                        rows.append(_Answering(job=job, request=request, prefill=prefill, compressed=compressed))
                with _noting([row.job for row in rows], [cell]):
                    self._decode(cell, rows)
                    yield from [(row.job, self._generated(cell, row)) for row in rows]

    def _generated(self, cell: Cell, row: _Answering) -> Measurement:
        compressed, tokens = row.compressed, row.tokens
        held = self._held(cell, compressed.cache, row.prefill)
        return Measurement(
            cell=cell,
            answer=Generated(text=self._text(tokens, row.request), token_ids=tuple(tokens)),
            prompt_tokens=row.request.prompt_tokens,
            generated_tokens=len(tokens),
            tokens_original=held.original,
            tokens_quantized=held.quantized,
            tokens_evicted=held.evicted,
            kv_bytes=held.kv_bytes,
            kv_bytes_peak=max(compressed.kv_bytes, held.kv_bytes),
            full_kv_bytes=held.full_kv_bytes,
            prefill_s=compressed.prefill_s,
            compress_s=compressed.compress_s,
            ttft_ms=1000.0 * (compressed.prefill_s + (compressed.compress_s or 0.0) + row.first_s),
            decode_s=row.decode_s,
            tpot_ms=1000.0 * row.decode_s / (len(tokens) - 1) if len(tokens) > 1 else None,
            peak_memory_bytes=peak_memory_bytes(self.device),
            oq_ratios=held.oq_ratios,
        )

    def _decode(self, cell: Cell, rows: Sequence[_Answering]) -> None:
        """Greedy decoding, side by side; a row that has ended takes no further part."""
        if not rows:
            return
        for row in rows:
            clock = Stopwatch(self.device)
            assert row.compressed.logits is not None
            with clock:
                row.tokens.append(int(self._answerable(row.compressed.logits, row.request).argmax(dim=-1)))
            row.first_s = clock.seconds
        with self._attention(cell, [row.compressed.cache for row in rows]):
            side_by_side = _SideBySide([row for row in rows if not self._ended(row)])
            while rows := side_by_side.rows:
                clock = Stopwatch(self.device)
                with clock:
                    logits = self._step(side_by_side)
                    tokens = logits[:, -1].argmax(dim=-1).tolist()
                for row, token in zip(rows, tokens, strict=True):
                    row.tokens.append(token)
                    row.decode_s += clock.seconds / len(rows)
                side_by_side.keep([row for row in rows if not self._ended(row)])

    def _step(self, side_by_side: _SideBySide) -> torch.Tensor:
        """Logits [B, 1, V] behind the newest token of every row."""
        rows, whole = side_by_side.rows, side_by_side.whole
        if whole is None:
            return self._forward([row.compressed.cache for row in rows], [row.tokens[-1:] for row in rows])
        ids, positions = self._ids([row.tokens[-1:] for row in rows]), whole.position_ids().to(self.device)
        logits: torch.Tensor = self.model(ids, position_ids=positions, past_key_values=whole).logits
        return logits

    def _answerable(self, logits: torch.Tensor, request: Generate) -> torch.Tensor:
        """Logits [1, V] of the first token, of which some cannot begin an answer."""
        if not request.end_ids:
            return logits
        ends = torch.tensor([*self.end_ids, *request.end_ids], device=logits.device)
        return logits.index_fill(-1, ends, -torch.inf)

    def _ended(self, row: _Answering) -> bool:
        request, tokens = row.request, row.tokens
        if request.think_end is None:
            row.begin = 0
        elif row.begin is None and self._ends_in(tokens, (request.think_end,)):
            row.begin = len(tokens)
        if len(tokens) >= request.max_new_tokens or tokens[-1] in self.end_ids or tokens[-1] in request.end_ids:
            return True
        return row.begin is not None and self._ends_in(tokens[row.begin :], request.stop)

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

    def _log_likelihoods(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, Measurement]]:
        contexts: list[_Context] = []
        for job in jobs:
            request = job.request(LogLikelihood)
            mine: dict[tuple[int, ...], _Context] = {}
            for place, item in enumerate(request.continuations):
                ids = item.context_ids
                mine.setdefault(ids, _Context(job=job, ids=ids, continuations={})).continuations[place] = item.token_ids
            contexts += mine.values()
        readings = {(job, cell.key): _Reading() for job in jobs for cell in job.cells}
        size = self.batch_size or len(jobs)
        for start in range(0, len(contexts), size):
            self._read_contexts(contexts[start : start + size], readings)
        for job in jobs:
            request = job.request(LogLikelihood)
            scored_tokens = sum(len(item.token_ids) for item in request.continuations)
            for cell in job.cells:
                if job.waits_for(cell):
                    yield job, readings[job, cell.key].measurement(cell, request, scored_tokens)

    def _read_contexts(self, contexts: Sequence[_Context], readings: Mapping[tuple[_Job, str], _Reading]) -> None:
        """Score what is asked behind ``contexts``, with all cells."""
        # The last token is read from the cache, so that even the first one of a continuation is predicted from it.
        prefills = self._prefills([(context.job, context.ids[:-1]) for context in contexts])
        for cell in self._cells_of(context.job for context in contexts):
            waiting = [place for place, context in enumerate(contexts) if context.job.waits_for(cell)]
            for group in self._groups(cell, waiting):
                reset_peak_memory(self.device)
                mine: list[_Context] = []
                compressed: list[_Compressed] = []
                held: list[_Held] = []
                for place in group:
                    with _noting([contexts[place].job], [cell]):
                        done = self._compress(cell, prefills[place])
                        held.append(self._held(cell, done.cache, prefills[place]))
                        compressed.append(done)
                        mine.append(contexts[place])
                if not mine:
                    continue
                with _noting([context.job for context in mine], [cell]):
                    caches = [item.cache for item in compressed]
                    clock = Stopwatch(self.device)
                    with self._attention(cell, caches), clock:
                        scored = self._choices(cell, caches, mine)
                    seconds, peak = clock.seconds / len(mine), peak_memory_bytes(self.device)
                    for context, before, now, found in zip(mine, compressed, held, scored, strict=True):
                        reading = readings[context.job, cell.key]
                        reading.scored |= found
                        reading.add(before, now, seconds, peak)

    def _choices(self, cell: Cell, caches: Sequence[Cache], contexts: Sequence[_Context]) -> list[dict[int, Scored]]:
        """Score the continuations of each context, of whose last token alone is not in its cache yet.

        That token is read once for all of them and predicts their first tokens. The others are read from copies of the
        cache, several in one forward, token by token where it is a peer's; continuations that differ in their last
        token only share theirs. ``caches`` are used up.
        """
        ((_, first),) = self._read(caches, [context.ids[-1:] for context in contexts], chunk=1)
        parts = [
            {place: [_score(row, tokens[:1])] for place, tokens in context.continuations.items()}
            for row, context in zip(first, contexts, strict=True)
        ]
        sharing: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for number, context in enumerate(contexts):
            for place, tokens in context.continuations.items():
                if len(tokens) > 1:
                    sharing.setdefault((number, tokens[:-1]), []).append(place)
        batch_size, chunk = (1, 1) if cell.peer is not None else (self.batch_size, _BLOCK)
        for batch in self._row_batches(list(sharing), batch_size, max(map(storage_bytes, caches))):
            twins = [self._fork(caches[number]) for number, _ in batch]
            for begin, log_probabilities in self._read(twins, [tokens for _, tokens in batch], chunk):
                for shared, row in zip(batch, log_probabilities, strict=True):
                    number = shared[0]
                    for place in sharing[shared]:
                        tokens = contexts[number].continuations[place]
                        if targets := tokens[1 + begin : 1 + begin + row.shape[0]]:
                            parts[number][place].append(_score(row, targets))
        return [{place: _sum(scores) for place, scores in mine.items()} for mine in parts]

    def _row_batches(
        self, rows: Sequence[tuple[int, tuple[int, ...]]], batch_size: int | None, cache_bytes: int
    ) -> Iterator[Sequence[tuple[int, tuple[int, ...]]]]:
        """Numbered rows of ids that are read in one forward: neighbours in length, for little padding."""
        rows = sorted(rows, key=lambda row: len(row[1]))
        size = batch_size
        if size is None and rows:
            vocabulary = self.model.get_output_embeddings().weight.shape[0]
            logits_bytes = min(len(rows[-1][1]), _BLOCK) * vocabulary * torch.float32.itemsize
            size = max(1, _AUTO_BYTES // (logits_bytes + cache_bytes))
        for start in range(0, len(rows), size or 1):
            yield rows[start : start + (size or 1)]

    # --- Whole texts ---

    def _rolling(self, job: _Job) -> Iterator[tuple[_Job, Measurement]]:
        request = job.request(Rolling)
        readings = {cell.key: _Reading() for cell in job.cells}
        for place, window in enumerate(request.windows):
            inputs = window.context_ids + window.token_ids[:-1]
            # Something to compress where there is more than one token, and something to read from it.
            prompt = min(max(1, int(request.prefill_share * len(inputs))), len(inputs) - 1)
            prefill, parts = self._scored_prefill(window, inputs[:prompt])
            for cell in filter(job.waits_for, job.cells):
                reset_peak_memory(self.device)
                with _noting([job], [cell]):
                    compressed = self._compress(cell, prefill)
                    # Peers can be read as they decode, and in no other way.
                    chunk = 1 if cell.peer is not None else request.chunk
                    clock = Stopwatch(self.device)
                    mine = list(parts)
                    with self._attention(cell, [compressed.cache]), clock:
                        for begin, (row,) in self._read([compressed.cache], [inputs[prompt:]], chunk):
                            mine += _window_score(window, prompt + begin, row)
                    held = self._held(cell, compressed.cache, prefill)
                    reading = readings[cell.key]
                    reading.scored[place] = _sum(mine)
                    reading.add(compressed, held, clock.seconds, peak_memory_bytes(self.device))
        for cell in filter(job.waits_for, job.cells):
            yield job, readings[cell.key].measurement(cell, request, request.prompt_tokens)

    def _scored_prefill(self, window: Continuation, ids: tuple[int, ...]) -> tuple[_Prefill, list[Scored]]:
        """Compute the first tokens of a window, and score those that they predict."""
        if not ids:
            return _Prefill(ids=()), []
        cache = PrefillCache(self.model, self.recorded_queries)
        clock = Stopwatch(self.device)
        parts: list[Scored] = []
        with attach(self.model), clock:
            for begin, (row,) in self._read([cache], [ids], _BLOCK):
                parts += _window_score(window, begin, row)
        return _Prefill(ids=ids, cache=cache, logits=row[-1:], seconds=clock.seconds), parts

    # --- Distributions ---

    def _compare(self, job: _Job) -> Iterator[tuple[_Job, Measurement]]:
        request = job.request(Compare)
        (prefill,) = self._prefill([request.context_ids[:-1]])
        # The full cache is read first, whether it is asked for or not; every other cell is compared with it.
        reference: list[_Step] = []
        full = self._compared(Cell(FULL), request, prefill, reference)
        for cell in job.cells:
            if cell.method == FULL:
                yield job, full
                continue
            with _noting([job], [cell]):
                yield job, self._compared(cell, request, prefill, reference)

    def _compared(self, cell: Cell, request: Compare, prefill: _Prefill, reference: list[_Step]) -> Measurement:
        """Read token by token; ``full`` leaves its steps in ``reference``."""
        reset_peak_memory(self.device)
        inputs = request.context_ids[-1:] + request.continuation_ids[:-1]
        compressed = self._compress(cell, prefill)
        clock = Stopwatch(self.device)
        steps: list[tuple[float, bool, float]] = []
        errors: list[torch.Tensor] = []
        watching: contextlib.AbstractContextManager[list[torch.Tensor]] = (
            self._attention_outputs() if request.per_layer else contextlib.nullcontext([])
        )
        with self._attention(cell, [compressed.cache]), watching as outputs, clock:
            for place, (log_probabilities,) in self._read([compressed.cache], [inputs], chunk=1):
                mine = _Step(log_probabilities[0], tuple(outputs))
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
def _noting(jobs: Sequence[_Job], cells: Sequence[Cell]) -> Iterator[None]:
    """Note in ``jobs`` that ``cells`` could not do what is under this, as far as they have not done it."""
    try:
        yield
    except FAILURES as error:
        show_traceback(error)
        for job in jobs:
            for cell in filter(job.waits_for, cells):
                job.failed[cell.key] = Failure(cell=cell, error=_said(error))


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
