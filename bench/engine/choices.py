"""Given continuations: each context is compressed once, and what may follow it is read from copies of the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from arkv import storage_bytes
from bench.engine.jobs import Job, cells_of, noting
from bench.engine.measurement import Measurement, Reading
from bench.engine.scored import score, total
from bench.engine.steps import AUTO_BYTES, BLOCK, Steps
from bench.methods.cell import Cell, Held
from bench.methods.prompt import Compressed, Prompt
from bench.methods.reading import read
from bench.telemetry import Stopwatch, peak_memory_bytes, reset_peak_memory
from tasks.base import LogLikelihood, Scored


@dataclass(kw_only=True, eq=False)
class Context:
    """A context of a job and what is asked behind it: continuations by their place in the request."""

    job: Job
    ids: tuple[int, ...]
    continuations: dict[int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A context that has been compressed, and nothing read behind it."""

    context: Context
    compressed: Compressed
    held: Held


def answer(steps: Steps, jobs: Sequence[Job]) -> Iterator[tuple[Job, Measurement]]:
    """Answer documents that ask for the log-likelihoods of continuations."""
    contexts: list[Context] = []
    for job in jobs:
        request = job.request(LogLikelihood)
        mine: dict[tuple[int, ...], Context] = {}
        for place, item in enumerate(request.continuations):
            ids = item.context_ids
            mine.setdefault(ids, Context(job=job, ids=ids, continuations={})).continuations[place] = item.token_ids
        contexts += mine.values()
    readings = {(job, cell.key): Reading() for job in jobs for cell in job.cells}
    size = steps.batch_size or len(jobs)
    for start in range(0, len(contexts), size):
        _read_contexts(steps, contexts[start : start + size], readings)
    for job in jobs:
        request = job.request(LogLikelihood)
        scored_tokens = sum(len(item.token_ids) for item in request.continuations)
        for cell in job.cells:
            if job.waits_for(cell):
                yield job, readings[job, cell.key].measurement(cell, request, scored_tokens)


def _read_contexts(steps: Steps, contexts: Sequence[Context], readings: Mapping[tuple[Job, str], Reading]) -> None:
    """Score what is asked behind ``contexts``, with all cells."""
    # The last token is read from the cache, so that even the first one of a continuation is predicted from it.
    prompts = steps.prefills([(context.job, context.ids[:-1]) for context in contexts])
    for cell in cells_of(context.job for context in contexts):
        waiting = [place for place, context in enumerate(contexts) if context.job.waits_for(cell)]
        for group in steps.groups(cell, waiting):
            reset_peak_memory(steps.device)
            begun: list[_Begun] = []
            for place in group:
                with noting([contexts[place].job], [cell]):
                    begun.append(_begin(steps, cell, contexts[place], prompts[place]))
            together: Sequence[Sequence[_Begun]] = []
            with noting([item.context.job for item in begun], [cell]):
                together = list(steps.together(cell, begun, [item.compressed.cache for item in begun]))
            for mine in together:
                with noting([item.context.job for item in mine], [cell]):
                    _read_group(steps, cell, mine, readings)


def _begin(steps: Steps, cell: Cell, context: Context, prompt: Prompt | None) -> _Begun:
    compressed = steps.compress(cell, prompt)
    return _Begun(context=context, compressed=compressed, held=cell.held(compressed.cache, prompt))


def _read_group(steps: Steps, cell: Cell, begun: Sequence[_Begun], readings: Mapping[tuple[Job, str], Reading]) -> None:
    caches = [item.compressed.cache for item in begun]
    clock = Stopwatch(steps.device)
    with steps.attention(cell, caches), clock:
        scored = _choices(steps, cell, caches, [item.context for item in begun])
    seconds, peak = clock.seconds / len(begun), peak_memory_bytes(steps.device)
    for item, found in zip(begun, scored, strict=True):
        reading = readings[item.context.job, cell.key]
        reading.scored |= found
        reading.add(item.compressed, item.held, seconds, peak)


def _choices(steps: Steps, cell: Cell, caches: Sequence[Cache], contexts: Sequence[Context]) -> list[dict[int, Scored]]:
    """Score the continuations of each context, of whose last token alone is not in its cache yet.

    That token is read once for all of them and predicts their first tokens. The others are read from copies of the
    cache, several in one forward where the method can; continuations that differ in their last token only share
    theirs. ``caches`` are used up.
    """
    ((_, first),) = read(steps.model, caches, [context.ids[-1:] for context in contexts])
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
    chunk = BLOCK if all(map(cell.reads_blocks, caches)) else 1
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
