"""Distributions: what the model makes of given tokens with a cell's cache, against the full cache, token by token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from bench.engine.jobs import Job, noting, waiting_cells
from bench.engine.measurement import Measurement
from bench.engine.steps import Steps
from bench.methods.cell import Cell
from bench.methods.grid import full_cell
from bench.methods.modules import attention_modules
from bench.methods.prompt import Prompt
from bench.methods.reading import kl_divergence, read
from bench.methods.rope import factors_for
from bench.names import FULL
from bench.telemetry import Stopwatch, reset_peak_memory
from tasks.base import Compare, Compared


class _Step(NamedTuple):
    """What the model makes of one token."""

    log_probabilities: torch.Tensor
    """Of the next token, [V]."""
    attention: tuple[torch.Tensor, ...]
    """Output of each layer's attention, [hidden size], if asked for."""


def answer(steps: Steps, jobs: Sequence[Job]) -> Iterator[tuple[Job, Measurement]]:
    """Answer documents that ask for a comparison with the full cache, one after the other."""
    for job in jobs:
        with noting([job], job.cells):
            yield from _compare(steps, job)


def _compare(steps: Steps, job: Job) -> Iterator[tuple[Job, Measurement]]:
    request = job.request(Compare)
    with factors_for(steps.model, _length(request)):
        (prompt,) = steps.prefill([request.context_ids[:-1]])
    # The full cache is read first, whether it is asked for or not; every other cell is compared with it.
    reference: list[_Step] = []
    full = _compared(steps, full_cell(), request, prompt, reference)
    for cell in job.cells:
        if cell.method == FULL:
            yield job, full
            continue
        with noting([job], [cell]):
            yield job, _compared(steps, cell, request, prompt, reference, waiting_cells([job]))


def _length(request: Compare) -> int:
    """Tokens that are read of the text."""
    return len(request.context_ids) + len(request.continuation_ids) - 1


def _compared(
    steps: Steps,
    cell: Cell,
    request: Compare,
    prompt: Prompt | None,
    reference: list[_Step],
    beside: Sequence[Cell] = (),
) -> Measurement:
    """Read token by token; ``full`` leaves its steps in ``reference``."""
    reset_peak_memory(steps.device)
    inputs = request.context_ids[-1:] + request.continuation_ids[:-1]
    compressed = steps.compress(cell, prompt, beside)
    clock = Stopwatch(steps.device)
    differences: list[tuple[float, bool, float]] = []
    errors: list[torch.Tensor] = []
    watching: contextlib.AbstractContextManager[list[torch.Tensor]] = (
        _attention_outputs(steps) if request.per_layer else contextlib.nullcontext([])
    )
    factors = factors_for(steps.model, _length(request))
    with steps.attention(cell, [compressed.cache]), watching as outputs, factors, clock:
        for place, (log_probabilities,) in read(steps.model, [compressed.cache], [inputs], chunk=1):
            steps.watch(f"{cell.label}: {place + 1} of {len(inputs)} tokens")
            mine = _Step(log_probabilities[0], tuple(outputs))
            outputs.clear()
            if cell.method == FULL:
                reference.append(mine)
            full = reference[place]
            differences.append(
                _difference(full.log_probabilities, mine.log_probabilities, request.continuation_ids[place])
            )
            if request.per_layer:
                errors.append(_relative_errors(full.attention, mine.attention))
    held = cell.held(compressed.cache, prompt)
    kl, agrees, delta_nll = zip(*differences, strict=True)
    return Measurement.of_one(
        cell,
        compressed,
        held,
        answer=Compared(
            kl=kl,
            agrees=agrees,
            delta_nll=delta_nll,
            attention_error=tuple(torch.stack(errors).mean(dim=0).tolist()) if errors else (),
        ),
        prompt_tokens=request.prompt_tokens,
        context_tokens=request.prompt_tokens,
        scored_tokens=len(request.continuation_ids),
        decode_s=clock.seconds,
        peak_memory_bytes=compressed.peak_memory_bytes(steps.device),
    )


@contextlib.contextmanager
def _attention_outputs(steps: Steps) -> Iterator[list[torch.Tensor]]:
    """Under this, the list takes up what the attention of each layer gives for the last token, [hidden size]."""
    outputs: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0][0, -1]))
        for module in attention_modules(steps.model)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _difference(full: torch.Tensor, mine: torch.Tensor, target: int) -> tuple[float, bool, float]:
    """KL full || mine of log-probabilities [V], whether they agree on the likeliest, and the change of NLL."""
    kl = kl_divergence(full, mine)
    return float(kl), bool(full.argmax() == mine.argmax()), float(full[target] - mine[target])


def _relative_errors(full: Sequence[torch.Tensor], mine: Sequence[torch.Tensor]) -> torch.Tensor:
    """Distance over the norm of ``full``, of vectors one per layer: [L]."""
    pairs = [(one.float(), other.float()) for one, other in zip(full, mine, strict=True)]
    smallest = torch.finfo(torch.float32).tiny
    return torch.stack([(other - one).norm() / one.norm().clamp_min(smallest) for one, other in pairs]).cpu()
