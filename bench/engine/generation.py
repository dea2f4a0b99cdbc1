"""Generation: decoding, token by token, of one document or of several side by side.

A question that stands behind its context is read through what a cell has kept of that, before the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache

from arkv import TriStateCache
from bench.engine.decoding import Decoder, check, choose_all
from bench.engine.jobs import Job, cells_of, noting, waiting_cells
from bench.engine.measurement import Measurement
from bench.engine.shared import Source, context_of
from bench.engine.steps import Steps, block_of, count
from bench.errors import UserError
from bench.methods.cell import Cell
from bench.methods.prompt import Compressed, Prompt
from bench.methods.reading import forward, padded, read_on
from bench.methods.rope import factors_for
from bench.telemetry import Stopwatch, reset_peak_memory
from tasks.base import Generate, Generated


@dataclass(kw_only=True, eq=False)
class Context:
    """What is prefilled: a prompt, or the context of several questions."""

    ids: tuple[int, ...]
    jobs: list[Job] = field(default_factory=list)
    """The documents that it is of."""


@dataclass(kw_only=True, eq=False)
class Answering:
    """A cell's answer to a generation request in the making."""

    job: Job
    request: Generate
    prompt: Prompt
    source: Source
    compressed: Compressed
    """The source's own until the answer begins."""
    decoder: Decoder
    reading: tuple[int, ...]
    """What is to be read through the cache before the answer."""
    said: tuple[int, ...]
    """All that was read and answered before the newest question, and that question."""
    answers: list[list[int]] = field(default_factory=list)
    """Those to earlier questions."""
    tokens: list[int] = field(default_factory=list)
    """The answer to the newest question."""
    begin: int | None = None
    """Where the answer begins; None while the model is thinking."""
    questions_s: list[float] = field(default_factory=list)
    """Of each turn the reading of its question."""
    first_s: float = 0.0
    """The choice of the first token of all."""
    decode_s: float = 0.0

    @property
    def text(self) -> tuple[int, ...]:
        """All that was read and answered so far."""
        return (*self.said, *self.tokens)


class SideBySide:
    """Rows that are decoded together: where their caches allow it, in one cache, so that attention is one call."""

    def __init__(self, rows: Sequence[Answering]) -> None:
        self.rows = list(rows)
        caches = [row.compressed.cache for row in rows]
        self.whole: TriStateCache | None = None
        if len(rows) > 1 and TriStateCache.can_stack(caches):
            self.whole = TriStateCache.stack([cache for cache in caches if isinstance(cache, TriStateCache)])
            # So that what they hold is not there twice.
            self._give([(row, self.whole) for row in rows])

    def keep(self, rows: Sequence[Answering]) -> None:
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
    def _give(pairs: Sequence[tuple[Answering, Cache]]) -> None:
        for row, cache in pairs:
            row.compressed = dataclasses.replace(row.compressed, cache=cache)


def answer(steps: Steps, jobs: Sequence[Job]) -> Iterator[tuple[Job, Measurement]]:
    """Answer documents that ask for a generation."""
    for job in jobs:
        with noting([job], job.cells):
            check(steps.model, job.request(Generate))
    jobs = [job for job in jobs if any(map(job.waits_for, job.cells))]
    # Of several, where the factors of positions do not depend on it.
    with factors_for(steps.model, max((job.request(Generate).prompt_tokens for job in jobs), default=0)):
        yield from _answers(steps, jobs)


def _answers(steps: Steps, jobs: Sequence[Job]) -> Iterator[tuple[Job, Measurement]]:
    contexts = _contexts(jobs)
    prompts = steps.prefills([(context.jobs, context.ids) for context in contexts])

    def waiting(cell: Cell) -> list[int]:
        return [place for place, context in enumerate(contexts) if any(job.waits_for(cell) for job in context.jobs)]

    for cell, group in steps.turns(cells_of(jobs), waiting):
        reset_peak_memory(steps.device)
        rows: list[Answering] = []
        for place in group:
            mine = [job for job in contexts[place].jobs if job.waits_for(cell)]
            with noting(mine, [cell]):
                rows += _begin(steps, cell, contexts[place], mine, prompts[place])
        with noting([row.job for row in rows], [cell]):
            together = list(steps.together(cell, rows, [row.compressed.cache for row in rows]))
        for side_by_side in together if rows else ():
            with noting([row.job for row in side_by_side], [cell]):
                for row in side_by_side:
                    row.compressed = row.source.take()
                decode(steps, cell, side_by_side)
                while further := [row for row in side_by_side if len(row.answers) < len(row.request.turns)]:
                    for row in further:
                        _next_turn(steps, row)
                    decode(steps, cell, further)
                yield from [(row.job, _measured(steps, cell, row)) for row in side_by_side]


def _contexts(jobs: Sequence[Job]) -> list[Context]:
    """What is to be prefilled, each context of several questions once."""
    found: dict[object, Context] = {}
    for job in jobs:
        context = context_of(job.document)
        key = job if context is None else context
        found.setdefault(key, Context(ids=job.request(Generate).prompt_ids)).jobs.append(job)
    return list(found.values())


def _begin(steps: Steps, cell: Cell, context: Context, jobs: Sequence[Job], prompt: Prompt | None) -> list[Answering]:
    """Compress a context for the answers to ``jobs``."""
    if prompt is None:
        raise UserError("an empty prompt: there is nothing to go on from")
    requests = [job.request(Generate) for job in jobs]
    prompt = dataclasses.replace(prompt, question=requests[0].question_tokens)
    decoders = [Decoder(steps.model, steps.tokenizer, request) for request in requests]
    compressed = steps.compress(cell, prompt, waiting_cells(context.jobs))
    source = Source.of(cell, compressed, len(jobs), len(context.jobs))
    return [
        Answering(
            job=job,
            request=request,
            prompt=prompt,
            source=source,
            compressed=source.compressed,
            decoder=decoder,
            reading=request.question_ids,
            said=request.input_ids,
        )
        for job, request, decoder in zip(jobs, requests, decoders, strict=True)
    ]


def _next_turn(steps: Steps, row: Answering) -> None:
    """The answer stays in the cache, and the next question is to be read. An end-of-sequence token does not: what ends
    a turn is a part of the next question."""
    tokens, turn = row.tokens, row.request.turns[len(row.answers)]
    ended = tokens[-1] in row.decoder.end_ids
    row.answers.append(tokens)
    row.said += tuple(tokens[:-1] if ended else tokens) + turn
    # The newest token is the only one that has not been read.
    row.reading = (() if ended else (tokens[-1],)) + turn
    request = dataclasses.replace(row.request, prompt_ids=row.said, question_ids=(), turns=())
    row.decoder = Decoder(steps.model, steps.tokenizer, request, row.decoder.draws)
    row.tokens, row.begin = [], None


def _measured(steps: Steps, cell: Cell, row: Answering) -> Measurement:
    compressed, answers = row.compressed, [*row.answers, row.tokens]
    tokens = [token for answer in answers for token in answer]
    later = len(tokens) - len(answers)
    texts = [_text(steps, answer, row.request) for answer in answers]
    has_questions = bool(row.request.question_ids or row.request.turns)
    held = cell.held(compressed.cache, row.prompt)
    return Measurement.of_one(
        cell,
        compressed,
        held,
        answer=Generated(
            text="\n".join(texts), token_ids=tuple(tokens), turns=tuple(texts) if row.request.turns else ()
        ),
        prompt_tokens=row.request.prompt_tokens,
        context_tokens=len(row.request.prompt_ids),
        generated_tokens=len(tokens),
        answers=len(answers),
        ttft_ms=1000.0 * (compressed.prefill_s + (compressed.compress_s or 0.0) + row.questions_s[0] + row.first_s),
        question_s=sum(row.questions_s) if has_questions else None,
        decode_s=row.decode_s,
        tpot_ms=1000.0 * row.decode_s / later if later else None,
        peak_memory_bytes=compressed.peak_memory_bytes(steps.device),
    )


def decode(steps: Steps, cell: Cell, rows: Sequence[Answering]) -> None:
    """Decoding, side by side; a row that has ended takes no further part."""
    with steps.attention(cell, [row.compressed.cache for row in rows]):
        _ask(steps, cell, rows)
        for row in rows:
            clock = Stopwatch(steps.device)
            assert row.compressed.logits is not None
            with clock:
                row.tokens.append(row.decoder.choose(row.compressed.logits, first=True))
            if not row.answers:
                row.first_s = clock.seconds
        _go_on(steps, cell, rows)
    while rows := [row for row in rows if not _ended(steps, row)]:
        for row in rows:
            _read_anew(steps, cell, row)
        with steps.attention(cell, [row.compressed.cache for row in rows]):
            _go_on(steps, cell, rows)


def _go_on(steps: Steps, cell: Cell, rows: Sequence[Answering]) -> None:
    """Token by token, until each row has ended or is to be read anew."""
    going = [row for row in rows if _goes_on(steps, row)]
    clock = Stopwatch(steps.device)
    # Decoding side by side is also to bring caches together, and to take one out.
    with clock:
        side_by_side = SideBySide(going)
    while rows := side_by_side.rows:
        written = max(len(row.tokens) for row in rows)
        steps.watch(f"{cell.label}: {count(written, 'token')} of {count(len(rows), 'answer')}")
        with clock:
            logits = step(steps, side_by_side)
            tokens = choose_all([row.decoder for row in rows], logits[:, -1])
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
        going = [row for row in rows if _goes_on(steps, row)]
        with clock:
            side_by_side.keep(going)
        for row in rows:
            row.decode_s += clock.seconds / len(rows)
        clock = Stopwatch(steps.device)


def _goes_on(steps: Steps, row: Answering) -> bool:
    """Not where the text has just grown beyond the length at which ``generate`` drops its cache."""
    return not _ended(steps, row) and len(row.text) - 1 != steps.rereads_beyond


def _read_anew(steps: Steps, cell: Cell, row: Answering) -> None:
    """The text so far is read as a prompt, with the factors of its length, and compressed anew, or of a question behind
    its context that context alone; one more token is chosen behind it."""
    prompt_ids = row.request.prompt_ids
    is_behind = bool(row.request.question_ids or row.answers)
    ids, behind = (prompt_ids, row.text[len(prompt_ids) :]) if is_behind else (row.text, ())
    clock = Stopwatch(steps.device)
    with clock, factors_for(steps.model, len(row.text)):
        (prompt,) = steps.prefill([ids])
        assert prompt is not None
        if asked := row.request.question_tokens:
            prompt = dataclasses.replace(prompt, question=asked + len(ids) - len(prompt_ids))
        again = steps.compress(cell, prompt)
        logits = again.logits
        if behind:
            caches = [again.cache]
            with steps.attention(cell, caches):
                logits = read_on(steps.model, caches, [behind], block_of(cell, caches))
        assert logits is not None
        row.tokens.append(row.decoder.choose(logits))
    row.decode_s += clock.seconds
    row.prompt = prompt
    row.compressed = dataclasses.replace(
        row.compressed, cache=again.cache, kv_bytes=max(row.compressed.kv_bytes, again.kv_bytes)
    )


def _ask(steps: Steps, cell: Cell, rows: Sequence[Answering]) -> None:
    """Read the questions of rows, where they have any, through what their cell has kept of the contexts."""
    asking = [row for row in rows if row.reading]
    for row in rows:
        row.questions_s.append(0.0)
    if not asking:
        return
    clock = Stopwatch(steps.device)
    caches = [row.compressed.cache for row in asking]
    with clock:
        found = read_on(steps.model, caches, [row.reading for row in asking], block_of(cell, caches))
    for row, logits in zip(asking, found.split(1), strict=True):
        row.compressed = dataclasses.replace(row.compressed, logits=logits)
        row.questions_s[-1] = clock.seconds / len(asking)


def step(steps: Steps, side_by_side: SideBySide) -> torch.Tensor:
    """Logits [B, 1, V] behind the newest token of every row."""
    rows, whole = side_by_side.rows, side_by_side.whole
    newest = [row.tokens[-1:] for row in rows]
    if whole is None:
        return forward(steps.model, [row.compressed.cache for row in rows], newest)
    ids, positions = padded(newest, steps.device), whole.position_ids().to(steps.device)
    logits: torch.Tensor = steps.model(ids, position_ids=positions, past_key_values=whole).logits
    return logits


def _ended(steps: Steps, row: Answering) -> bool:
    request, tokens = row.request, row.tokens
    if request.think_end is None:
        row.begin = 0
    elif row.begin is None and _ends_in(steps, tokens, (request.think_end,)):
        row.begin = len(tokens)
    if len(tokens) >= request.max_new_tokens or row.decoder.ends_with(tokens):
        return True
    return row.begin is not None and _ends_in(steps, tokens[row.begin :], request.stop)


def _ends_in(steps: Steps, tokens: list[int], strings: tuple[str, ...]) -> bool:
    """One of ``strings`` has just been completed."""
    if not strings or not tokens:
        return False
    # Long enough for any of the strings to lie in it, short enough to be decoded at every step.
    tail = steps.tokenizer.decode(tokens[-max(16, 2 * max(map(len, strings))) :])
    return any(string in tail for string in strings)


def _text(steps: Steps, tokens: list[int], request: Generate) -> str:
    text: str = steps.tokenizer.decode(tokens, skip_special_tokens=True)
    if request.think_end is not None:
        # As lm-eval has it: all of a thought that never ended.
        text = text.split(request.think_end)[-1].lstrip()
    for stop in filter(None, request.stop):
        text = text.split(stop)[0]
    return text
