"""Given continuations: each context is compressed once, and what may follow it is read from copies of the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import Cache

from arkv import storage_bytes
from bench.engine.jobs import Job, cells_of, noting, waiting_cells
from bench.engine.measurement import Measurement, Reading
from bench.engine.scored import score, total
from bench.engine.shared import Source
from bench.engine.steps import AUTO_BYTES, BLOCK, Steps, block_of, count
from bench.methods.cell import Cell, Held
from bench.methods.prompt import Prompt
from bench.methods.reading import read, read_on
from bench.methods.rope import factors_for
from bench.telemetry import Stopwatch, reset_peak_memory
from tasks.base import LogLikelihood, Scored


@dataclass(kw_only=True, eq=False)
class Context:
    """A context of a job and what is asked behind it: continuations by their place in the request."""

    job: Job
    ids: tuple[int, ...]
    """Those that are prefilled."""
    question: tuple[int, ...]
    """Those that are read from the cache before a continuation: a question, or the last token of the context."""
    is_shared: bool
    """Others may have the same context: it ends where the question begins."""
    asking: int
    """Of the last tokens that are prefilled those of a question, where a method has to know."""
    continuations: dict[int, tuple[int, ...]]

    @property
    def length(self) -> int:
        """Tokens that are read of it with its longest continuation."""
        return len(self.ids) + len(self.question) + max(map(len, self.continuations.values())) - 1


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A context that has been compressed, and nothing read behind it."""

    context: Context
    source: Source
    held: Held


def answer(steps: Steps, jobs: Sequence[Job]) -> Iterator[tuple[Job, Measurement]]:
    """Answer documents that ask for the log-likelihoods of continuations."""
    contexts: list[Context] = []
    for job in jobs:
        contexts += _contexts(job)
    readings = {(job, cell.key): Reading() for job in jobs for cell in job.cells}
    size = steps.batch_size or len(jobs)
    prefilled = _prefilled(contexts)
    for start in range(0, len(prefilled), size):
        group = prefilled[start : start + size]
        # Of several, where the factors of positions do not depend on it.
        longest = max(context.length for same in group for context in same)
        with factors_for(steps.model, longest):
            _read_contexts(steps, group, readings)
    for job in jobs:
        request = job.request(LogLikelihood)
        scored_tokens = sum(len(item.token_ids) for item in request.continuations)
        mine = {context.ids for context in contexts if context.job is job}
        for cell in job.cells:
            if job.waits_for(cell):
                reading = readings[job, cell.key]
                yield job, reading.measurement(cell, request, scored_tokens, max(map(len, mine)), len(mine))


def _contexts(job: Job) -> list[Context]:
    found: dict[tuple[tuple[int, ...], ...], Context] = {}
    for place, item in enumerate(job.request(LogLikelihood).continuations):
        # Without a question the last token is read from the cache, so that even the first one of a continuation is
        # predicted from it.
        is_shared = bool(item.question_ids)
        ids, question = (
            (item.context_ids, item.question_ids) if is_shared else (item.context_ids[:-1], item.context_ids[-1:])
        )
        asking = max(0, item.question_tokens - len(question))
        mine = Context(job=job, ids=ids, question=question, is_shared=is_shared, asking=asking, continuations={})
        found.setdefault((ids, question), mine).continuations[place] = item.token_ids
    return list(found.values())


def _prefilled(contexts: Sequence[Context]) -> list[list[Context]]:
    """The contexts by what is prefilled once: those of several questions stand together."""
    found: dict[object, list[Context]] = {}
    for context in contexts:
        found.setdefault(context.ids if context.is_shared else context, []).append(context)
    return list(found.values())


def _read_contexts(
    steps: Steps, prefilled: Sequence[Sequence[Context]], readings: Mapping[tuple[Job, str], Reading]
) -> None:
    """Score what is asked behind contexts, with all cells."""
    prompts = steps.prefills([([context.job for context in same], same[0].ids) for same in prefilled])

    def waiting(cell: Cell) -> list[int]:
        return [place for place, same in enumerate(prefilled) if any(context.job.waits_for(cell) for context in same)]

    for cell, group in steps.turns(cells_of(context.job for same in prefilled for context in same), waiting):
        reset_peak_memory(steps.device)
        begun: list[_Begun] = []
        for place in group:
            same = [context for context in prefilled[place] if context.job.waits_for(cell)]
            with noting([context.job for context in same], [cell]):
                begun += _begin(steps, cell, same, prompts[place], len(prefilled[place]))
        together: Sequence[Sequence[_Begun]] = []
        with noting([item.context.job for item in begun], [cell]):
            together = list(steps.together(cell, begun, [item.source.compressed.cache for item in begun]))
        for mine in together:
            with noting([item.context.job for item in mine], [cell]):
                _read_group(steps, cell, mine, readings)


def _begin(
    steps: Steps, cell: Cell, contexts: Sequence[Context], prompt: Prompt | None, prefilled_for: int
) -> list[_Begun]:
    """Compress what ``contexts`` have in common."""
    if prompt is not None:
        prompt = replace(prompt, question=contexts[0].asking)
    compressed = steps.compress(cell, prompt, waiting_cells([context.job for context in contexts]))
    source = Source.of(cell, compressed, len(contexts), prefilled_for)
    held = cell.held(source.compressed.cache, prompt)
    return [_Begun(context=context, source=source, held=held) for context in contexts]


def _read_group(steps: Steps, cell: Cell, begun: Sequence[_Begun], readings: Mapping[tuple[Job, str], Reading]) -> None:
    steps.watch(f"{cell.label}: choices of {count(len(begun), 'context')}")
    taken = [item.source.take() for item in begun]
    caches = [compressed.cache for compressed in taken]
    clock = Stopwatch(steps.device)
    with steps.attention(cell, caches), clock:
        scored = _choices(steps, cell, caches, [item.context for item in begun])
    seconds = clock.seconds / len(begun)
    for item, compressed, found in zip(begun, taken, scored, strict=True):
        reading = readings[item.context.job, cell.key]
        reading.scored |= found
        reading.add(compressed, item.held, seconds, compressed.peak_memory_bytes(steps.device))


def _choices(steps: Steps, cell: Cell, caches: Sequence[Cache], contexts: Sequence[Context]) -> list[dict[int, Scored]]:
    """Score the continuations of each context, whose question, or last token, alone is not in its cache yet.

    It is read once for all of them and predicts their first tokens. The others are read from copies of the cache,
    several in one forward where the method can; continuations that differ in their last token only share theirs.
    ``caches`` are used up.
    """
    logits = read_on(steps.model, caches, [context.question for context in contexts], block_of(cell, caches))
    first = logits.float().log_softmax(dim=-1).split(1)
    parts = [
        {place: [score(row, tokens[:1])] for place, tokens in context.continuations.items()}
        for row, context in zip(first, contexts, strict=True)
    ]
    sharing: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for number, context in enumerate(contexts):
        for place, tokens in context.continuations.items():
            if len(tokens) > 1:
                sharing.setdefault((number, tokens[:-1]), []).append(place)
    batch_size = steps.batch_size if cell.batches(caches) else 1
    chunk = block_of(cell, caches)
    for batch in row_batches(steps, list(sharing), batch_size, max(map(storage_bytes, caches))):
        twins = [cell.fork(caches[number]) for number, _ in batch]
        for begin, log_probabilities in read(steps.model, twins, [tokens for _, tokens in batch], chunk):
            for shared, row in zip(batch, log_probabilities, strict=True):
                number = shared[0]
                for place in sharing[shared]:
                    tokens = contexts[number].continuations[place]
                    if targets := tokens[1 + begin : 1 + begin + row.shape[0]]:
                        parts[number][place].append(score(row, targets))
    return [{place: total(scores) for place, scores in mine.items()} for mine in parts]


def row_batches(
    steps: Steps, rows: Sequence[tuple[int, tuple[int, ...]]], batch_size: int | None, cache_bytes: int
) -> Iterator[Sequence[tuple[int, tuple[int, ...]]]]:
    """Numbered rows of ids that are read in one forward: neighbours in length, for little padding."""
    rows = sorted(rows, key=lambda row: len(row[1]))
    size = batch_size
    if size is None and rows:
        vocabulary = steps.model.get_output_embeddings().weight.shape[0]
        logits_bytes = min(len(rows[-1][1]), BLOCK) * vocabulary * torch.float32.itemsize
        size = max(1, AUTO_BYTES // (logits_bytes + cache_bytes))
    for start in range(0, len(rows), size or 1):
        yield rows[start : start + (size or 1)]
