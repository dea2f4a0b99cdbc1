"""Divergence from the full cache: each prompt is computed once, then every trial compresses its own copy.

Recorded prefills and the full cache's distributions are kept for all trials, as far as the memory granted holds them,
and computed anew for each trial beyond that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from arkv import CacheConfig, PrefillCache, TriStateCache, attach
from tasks.base import Compare


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """A context that was computed once, and what the full cache makes of its continuation."""

    prefill: PrefillCache
    inputs: torch.Tensor
    """Token ids that are read behind it, [1, T]."""
    reference: torch.Tensor
    """Log-probabilities of the full cache, [T, V]."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.prefill.nbytes() + self.reference.nbytes


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
    def divergences(self, request: Compare, configs: Sequence[CacheConfig]) -> list[float]:
        """Mean KL divergence over the continuation, in nats, of each cache."""
        recorded = self._record(request)
        found = []
        for config in configs:
            cache = TriStateCache.from_prefill(recorded.prefill, config)
            with attach(self.model):
                mine = self._read(cache, recorded.inputs)
            full = recorded.reference
            found.append(float((full.exp() * (full - mine)).sum(dim=-1).mean()))
        return found

    def _record(self, request: Compare) -> _Recorded:
        key = request.context_ids + request.continuation_ids
        if key in self._kept:
            return self._kept[key]
        context = torch.tensor([request.context_ids[:-1]], device=self.model.device)
        inputs = torch.tensor([request.context_ids[-1:] + request.continuation_ids[:-1]], device=self.model.device)
        prefill = PrefillCache(self.model, self.queries)
        with attach(self.model):
            for part in context.split(self.prefill_chunk or context.shape[1], dim=1):
                self.model(part, past_key_values=prefill, logits_to_keep=1)
        recorded = _Recorded(prefill=prefill, inputs=inputs, reference=self._read(prefill.to_dynamic(), inputs))
        if sum(item.nbytes for item in self._kept.values()) + recorded.nbytes <= self.keep_bytes:
            self._kept[key] = recorded
        else:
            self.not_kept.add(key)
        return recorded

    def _read(self, cache: Any, inputs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [T, V] of what follows each of ``inputs`` [1, T]."""
        parts = inputs.split(self.chunk or inputs.shape[1], dim=1)
        rows = [self.model(part, past_key_values=cache).logits[0].float().log_softmax(dim=-1) for part in parts]
        return torch.cat(rows)
