"""A prompt that the model has read, the budget that is asked for it, and what a method makes of the two.

Letters: ``H`` KV heads, ``Hq`` query heads, ``N`` tokens of the prompt, ``W`` newest queries, ``D`` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from arkv import PrefillCache
from arkv.config import CacheConfig, NotCompressible
from arkv.memory import storage_bytes
from arkv.prefill import PrefillLayer
from arkv.watched import copy_stock
from bench.names import budget_text
from bench.telemetry import peak_memory_bytes


def stand_in_question(tokens: int) -> int:
    """How many of the newest tokens stand for the question where a prompt of so many ``tokens`` is only timed."""
    return min(32, tokens // 2)


class StockPrefill(PrefillCache):
    """A prompt in transformers' own full cache: all that there is of a model that no compressed cache serves. Methods
    that need no more than keys and values go on from it; the others are told why there is nothing for them.

    Args:
        cache: what the model made of the prompt.
        refused: why it is not in a :class:`PrefillCache`.
    """

    def __init__(self, cache: DynamicCache, refused: NotCompressible) -> None:
        # Not initialized as the base class, which would refuse the model again.
        Cache.__init__(self, layers=cache.layers)
        self.stock, self.refused = cache, refused

    def check(self, config: CacheConfig) -> None:
        """Raises :class:`NotCompressible`."""
        raise self.refused

    def to_dynamic(self) -> DynamicCache:
        """A copy that continues from here."""
        return copy_stock(self.stock)

    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return storage_bytes(self.stock)

    def full_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of ``tokens`` tokens."""
        total = 0
        for layer in self.layers:
            if layer.keys is None:
                continue
            now = layer.keys.shape[-2]
            # Whatever else it keeps of each token, such as the keys of an indexer, lies beside keys and values.
            states = [item for item in vars(layer).values() if isinstance(item, torch.Tensor) and now in item.shape]
            window = getattr(layer, "sliding_window", None)
            held = tokens if window is None else min(tokens, window - 1)
            total += held * sum(item.numel() // now * item.element_size() for item in states)
        return total


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt that the model has read once for all methods. Nothing in it may be written to."""

    ids: torch.Tensor
    """Its tokens, [1, N]."""
    cache: PrefillCache
    """What the model made of it. Layers with a sliding window of their own are transformers' own."""
    logits: torch.Tensor | None = None
    """Of the token that follows, [1, vocabulary]."""
    question: int = 0
    """How many of its last tokens are the question, told to a method that needs it; 0 where none is, or is told."""
    seconds: float = 0.0
    """That reading it took."""
    shared_s: dict[Any, float] = field(default_factory=dict)
    """Seconds that took what several methods share, by what it is."""
    waiting: dict[str, Compressed | Exception] = field(default_factory=dict)
    """Caches that were made beside another's, or why they could not be, until they are asked for; by the key of the
    cell."""

    @property
    def tokens(self) -> int:
        """N."""
        return self.ids.shape[1]

    @property
    def layers(self) -> list[PrefillLayer]:
        """The layers with full attention: ``keys`` and ``values`` [1, H, N, D], the newest ``queries`` [1, Hq, W, D],
        all after rotation, and the ``scaling`` of the attention's logits.

        Raises :class:`arkv.config.NotCompressible` where the model has none that can be compressed.
        """
        if isinstance(self.cache, StockPrefill):
            raise self.cache.refused
        return [layer for layer in self.cache.layers if isinstance(layer, PrefillLayer)]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a method may keep of a prompt."""

    tokens: int
    """Tokens of each layer, or their worth in bytes: from 1 to N."""
    nbytes: int
    """Keys and values of so many tokens at model precision, in all layers together."""
    unit: str
    """``tokens``: no more of them than that, whatever each takes. ``bytes``: no more bytes than that, so that a method
    that quantizes may keep more tokens."""


@dataclass(frozen=True)
class Asked:
    """A budget as it is asked for: for all prompts alike, or a share of each. Without either, everything is kept."""

    unit: str | None = None
    """``tokens`` or ``bytes``; None where there is no budget."""
    cache_size: int | None = None
    """Tokens per layer, or their worth in bytes."""
    cache_ratio: float | None = None
    """Share of each prompt."""

    def kept(self, tokens: int) -> int:
        """Tokens of a prompt that the budget holds. At model precision both units ask for the same number."""
        if self.cache_ratio is not None:
            # 0.29 * 100 is 28.999999999999996.
            return max(1, int(self.cache_ratio * tokens + 1e-9))
        return tokens if self.cache_size is None else min(self.cache_size, tokens)

    def of(self, prompt: Prompt) -> Budget:
        """For a prompt."""
        tokens = self.kept(prompt.tokens)
        return Budget(tokens=tokens, nbytes=prompt.cache.full_bytes(tokens), unit=self.unit or "tokens")

    def __str__(self) -> str:
        return budget_text(self.unit, self.cache_size, self.cache_ratio)


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A method's own cache of a context."""

    cache: Cache
    logits: torch.Tensor | None
    """Of the token that follows, [1, vocabulary]; None for an empty context."""
    prefill_s: float
    compress_s: float | None
    """None where compression is a part of a prefill of the method's own."""
    kv_bytes: int
    """All storage of the cache."""
    peak_bytes: int | None = None
    """Most device memory while it was made beside others; None where it was made for itself, and where memory is not
    counted."""

    def peak_memory_bytes(self, device: torch.device) -> int | None:
        """Most device memory since the last reset, and while the cache was made; None where it is not counted."""
        now = peak_memory_bytes(device)
        return now if now is None or self.peak_bytes is None else max(now, self.peak_bytes)
