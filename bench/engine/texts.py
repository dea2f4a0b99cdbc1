"""Whole texts: of each window the first tokens are the prompt, and the others are read from what a cell keeps of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers.cache_utils import Cache

from bench.engine.jobs import Job, noting, waiting_cells
from bench.engine.measurement import Measurement, Reading
from bench.engine.scored import score, total
from bench.engine.steps import BLOCK, Steps
from bench.methods.prompt import Prompt
from bench.methods.reading import read, recorded
from bench.methods.rope import factors_for
from bench.telemetry import Stopwatch, reset_peak_memory
from tasks.base import Continuation, Rolling, Scored


def answer(steps: Steps, jobs: Sequence[Job]) -> Iterator[tuple[Job, Measurement]]:
    """Answer documents that ask for the log-likelihood of a text, one after the other."""
    for job in jobs:
        with noting([job], job.cells):
            yield from _text(steps, job)


def _text(steps: Steps, job: Job) -> Iterator[tuple[Job, Measurement]]:
    request = job.request(Rolling)
    readings = {cell.key: Reading() for cell in job.cells}
    for place, window in enumerate(request.windows):
        with factors_for(steps.model, len(window.context_ids) + len(window.token_ids) - 1):
            _window(steps, job, readings, place, window)
    for cell in filter(job.waits_for, job.cells):
        yield (
            job,
            readings[cell.key].measurement(
                cell, request, request.prompt_tokens, request.prompt_tokens, len(request.windows)
            ),
        )


def _window(steps: Steps, job: Job, readings: Mapping[str, Reading], place: int, window: Continuation) -> None:
    """Read a window with every cell. ``readings``, by the key of a cell, take up what it gave and cost."""
    request = job.request(Rolling)
    inputs = window.context_ids + window.token_ids[:-1]
    # Something to compress where there is more than one token, and something to read from it.
    length = min(max(1, int(request.prefill_share * len(inputs))), len(inputs) - 1)
    prompt, parts = _scored_prefill(steps, window, inputs[:length])
    for cell in filter(job.waits_for, job.cells):
        steps.watch(f"{cell.label}: text {place + 1} of {len(request.windows)}")
        reset_peak_memory(steps.device)
        with noting([job], [cell]):
            compressed = steps.compress(cell, prompt, waiting_cells([job]))
            # Some caches can be read as they decode, and in no other way.
            chunk = request.chunk if cell.reads_blocks(compressed.cache) else 1
            clock = Stopwatch(steps.device)
            mine = list(parts)
            with steps.attention(cell, [compressed.cache]), clock:
                for begin, (row,) in read(steps.model, [compressed.cache], [inputs[length:]], chunk):
                    mine += _window_score(window, length + begin, row)
            held = cell.held(compressed.cache, prompt)
            reading = readings[cell.key]
            reading.scored[place] = total(mine)
            reading.add(compressed, held, clock.seconds, compressed.peak_memory_bytes(steps.device))


def _scored_prefill(steps: Steps, window: Continuation, ids: tuple[int, ...]) -> tuple[Prompt | None, list[Scored]]:
    """Compute the first tokens of a window, and score those that they predict."""
    if not ids:
        return None, []

    def reading(caches: Sequence[Cache], rows: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, list[Scored]]]:
        parts: list[Scored] = []
        for begin, (row,) in read(steps.model, caches, rows, BLOCK):
            parts += _window_score(window, begin, row)
        return [(row[-1:], parts)]

    clock = Stopwatch(steps.device)
    with clock:
        ((cache, (logits, parts)),) = recorded(steps.model, [ids], steps.recorded_queries, reading)
    prompt = Prompt(ids=torch.tensor([ids], device=steps.device), cache=cache, logits=logits, seconds=clock.seconds)
    return prompt, parts


def _window_score(window: Continuation, begin: int, log_probabilities: torch.Tensor) -> list[Scored]:
    """Of the targets that the inputs from place ``begin`` on predict; the first ones of a window may predict none."""
    skip = max(len(window.context_ids) - 1 - begin, 0)
    first = begin + skip - (len(window.context_ids) - 1)
    targets = window.token_ids[first : first + max(log_probabilities.shape[0] - skip, 0)]
    return [score(log_probabilities[skip:], targets)] if targets else []
