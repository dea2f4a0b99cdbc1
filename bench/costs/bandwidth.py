"""What the memory of a device can do, and what a decoding step has to read of it."""

from __future__ import annotations

from typing import Any

import torch

from bench.telemetry import Stopwatch

BUFFER = {"cuda": 1 << 30, "cpu": 1 << 28}
"""Bytes that are read and copied: far more than any cache of a processor holds."""
TRIES = 3
_ROWS = 1 << 13


def measured_bandwidth(device: torch.device) -> float:
    """Bytes a second, the best of some readings (a product of a matrix with a vector) and copies (each byte of which is
    read and written)."""
    nbytes = BUFFER.get(device.type, BUFFER["cpu"])
    source = torch.ones(_ROWS, nbytes // 4 // _ROWS, device=device)
    target, vector = torch.empty_like(source), torch.ones(source.shape[1], device=device)
    found = []
    # One more than counts: the first touches memory that has no pages yet.
    for _ in range(TRIES + 1):
        for moved, work in (
            (nbytes, lambda: torch.mv(source, vector)),
            (2 * nbytes, lambda: target.copy_(source)),
        ):
            clock = Stopwatch(device)
            with clock:
                work()
            found.append(moved / clock.seconds)
    return max(found[2:])


def weight_bytes(model: Any) -> int | None:
    """Bytes of the parameters that every decoding step reads: all but a table of embeddings that is nothing else. None
    for a mixture of experts, of which a step reads what its tokens ask for."""
    config = model.config.get_text_config(decoder=True)
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    read = {id(parameter): parameter for parameter in model.parameters()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and embeddings.weight is not head.weight:
        del read[id(embeddings.weight)]
    return sum(parameter.numel() * parameter.element_size() for parameter in read.values())
