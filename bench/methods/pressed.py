"""What presses leave of a prompt, as layers of a cache.

Letters: ``H`` KV heads, ``n`` tokens stored, ``N`` tokens seen, ``D`` head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, HQQQuantizedLayer, QuantoQuantizedLayer

from arkv.memory import storage_bytes
from bench.methods.hf import fill, layer_settings, waiting
from bench.methods.kept import KeptLayer
from bench.methods.states import EVICTED, ORIGINAL, QUANTIZED


class Pressed(ABC):
    """What all layers that a press has compressed know of themselves; the layer itself is the other base class."""

    turned: int = 0
    """Tokens seen that the next position does not count, since tokens that stay were turned to new positions."""
    masked: Any = None
    """Indices (sample, head, token) of tokens that are stored and never attended to, or None."""
    heads: int
    """H."""

    @property
    @abstractmethod
    def tokens_seen(self) -> int:
        """N."""

    @property
    @abstractmethod
    def stored(self) -> int:
        """n."""

    @property
    def quantized(self) -> int:
        """Of the tokens stored those, from the first on, that are quantized."""
        return 0

    def held(self) -> tuple[float, float]:
        """Tokens that can be attended to, mean over KV heads: at model precision, and quantized."""
        low = self.quantized
        masked = masked_low = 0.0
        if self.masked is not None:
            token = self.masked[2]
            masked_low = int((token < low).sum()) / self.heads
            masked = len(token) / self.heads - masked_low
        return self.stored - low - masked, low - masked_low

    def codes(self) -> torch.Tensor | None:
        """State of every token, int8 [H, N]; None where tokens were removed, which leaves no sign of which."""
        if self.tokens_seen != self.stored:
            return None
        codes = torch.full((self.heads, self.stored), ORIGINAL, dtype=torch.int8)
        codes[:, : self.quantized] = QUANTIZED
        if self.masked is not None:
            _, heads, tokens = self.masked
            codes[heads.cpu(), tokens.cpu()] = EVICTED
        return codes

    def ragged_bytes(self) -> int:
        """Bytes as they would be if heads stored only what they can attend to: those of all tokens stored, times the
        share that is not masked. Without the mask itself, which would not be needed."""
        mask = 0 if self.masked is None else storage_bytes(self.masked)
        high, low = self.held()
        return round((storage_bytes(self) - mask) * (high + low) / self.stored)


class PressedLayer(Pressed, KeptLayer):
    """At model precision.

    Args:
        keys, values: [1, H, n, D].
        seen: N.
        counted: how many of them the next position counts.
        masked: see :class:`Pressed`.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, seen: int, counted: int, masked: Any) -> None:
        super().__init__(keys, values, counted)
        self.turned, self.masked, self.heads = seen - counted, masked, keys.shape[1]

    @property
    def tokens_seen(self) -> int:
        """N."""
        return self.get_seq_length() + self.turned

    @property
    def stored(self) -> int:
        """n."""
        return DynamicLayer.get_seq_length(self)


class ShrinkingLayer(PressedLayer):
    """At model precision, and compressed further while tokens are read: the press puts fewer keys and values there."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
        super().__init__(keys, values, seen, seen, None)
        self.seen = seen

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As any layer does; tokens are counted, since what is stored does not tell their number."""
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        """N."""
        return self.seen

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:  # type: ignore[override]
        """As :meth:`KeptLayer.get_mask_sizes`."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.stored + new, self.seen - self.stored


class _Quantized(Pressed):
    """In a layer of transformers' ``QuantizedCache``; positions go on counting the tokens seen."""

    removed: int
    cumulative_length: int

    @property
    def tokens_seen(self) -> int:
        """N."""
        return self.stored + self.removed + self.turned

    @property
    def stored(self) -> int:
        """n."""
        return self.cumulative_length

    @property
    def quantized(self) -> int:
        """All but the newest, which wait at model precision."""
        return self.stored - waiting(self)

    def get_seq_length(self) -> int:
        """Tokens that the next position counts."""
        return self.stored + self.removed

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """As :meth:`KeptLayer.get_mask_sizes`."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.stored + new, self.removed


class QuantoPressedLayer(_Quantized, QuantoQuantizedLayer):
    """By quanto."""


class HqqPressedLayer(_Quantized, HQQQuantizedLayer):
    """By hqq."""


def quantized(layer: PressedLayer, backend: str, bits: int) -> Pressed:
    """What ``layer`` holds, quantized as ``QuantizedCache`` does it.

    Raises:
        ValueError: fewer tokens than a whole group.
    """
    assert layer.keys is not None
    assert layer.values is not None
    kind: Any = {"quanto": QuantoPressedLayer, "hqq": HqqPressedLayer}[backend]
    made: QuantoPressedLayer | HqqPressedLayer = kind(bits, **layer_settings(backend))
    fill(made, layer.keys, layer.values, backend, bits)
    made.removed, made.turned, made.masked, made.heads = layer.removed, layer.turned, layer.masked, layer.heads
    return made
