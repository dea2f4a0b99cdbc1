"""Divergence from the full cache: each prompt is computed once, then every trial compresses its own copy.

Recorded prefills and the full cache's distributions are kept for all trials, as far as the memory granted holds them,
and computed anew for each trial beyond that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.methods.cell import Cell
from bench.methods.prompt import Prompt
from bench.methods.reading import kl_divergence, read, record
from tasks.base import Compare


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """A context that was computed once, and what the full cache makes of its continuation."""

    prompt: Prompt
    inputs: tuple[int, ...]
    """Token ids that are read behind it, T of them."""
    reference: torch.Tensor
    """Log-probabilities of the full cache, [T, V]."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.prompt.cache.nbytes() + self.reference.nbytes


class FidelityBench:
    """KL divergence of caches to the full cache over given continuations.

    Args:
        model: a transformers causal language model in eval mode.
        queries: the most that any cache takes scores from.
        chunk: tokens that are read at once; None for the whole continuation.
        keep_bytes: memory for recorded contexts; one that no longer fits is computed anew each time.
        prefill_chunk: tokens of a prompt that are read in one forward; None for all.
    """

    def __init__(
        self,
        model: Any,
        *,
        queries: int,
        chunk: int | None = None,
        keep_bytes: float = float("inf"),
        prefill_chunk: int | None = None,
    ) -> None:
        self.model = model
        self.queries = queries
        self.chunk = chunk
        self.keep_bytes = keep_bytes
        self.prefill_chunk = prefill_chunk
        self.not_kept: set[tuple[int, ...]] = set()
        """Contexts and continuations that did not fit."""
        self._kept: dict[tuple[int, ...], _Recorded] = {}

    @torch.inference_mode()
    def divergences(self, request: Compare, cells: Sequence[Cell]) -> list[float]:
        """Mean KL divergence over the continuation, in nats, of each cell's cache."""
        recorded = self._record(request)
        found = []
        for cell in cells:
            cache = cell.compress(self.model, recorded.prompt).cache
            chunk = self.chunk if cell.reads_blocks(cache) else 1
            with cell.decoding(self.model, [cache]):
                mine = self._read(cache, recorded.inputs, chunk)
            found.append(float(kl_divergence(recorded.reference, mine).mean()))
        return found

    def _record(self, request: Compare) -> _Recorded:
        key = request.context_ids + request.continuation_ids
        if key in self._kept:
            return self._kept[key]
        (prompt,) = record(self.model, [request.context_ids[:-1]], self.queries, self.prefill_chunk)
        inputs = request.context_ids[-1:] + request.continuation_ids[:-1]
        reference = self._read(prompt.cache.to_dynamic(), inputs, self.chunk)
        recorded = _Recorded(prompt=prompt, inputs=inputs, reference=reference)
        if sum(item.nbytes for item in self._kept.values()) + recorded.nbytes <= self.keep_bytes:
            self._kept[key] = recorded
        else:
            self.not_kept.add(key)
        return recorded

    def _read(self, cache: Any, inputs: Sequence[int], chunk: int | None) -> torch.Tensor:
        """Log-probabilities [T, V] of what follows each of ``inputs``."""
        return torch.cat([row for _, (row,) in read(self.model, [cache], [inputs], chunk)])
