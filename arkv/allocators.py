"""What shares a budget: scores of layers to a :class:`~arkv.grant.Grant` for each of them.

Letters: ``L`` layers, ``B`` batch, ``H`` KV heads, ``N`` prompt tokens, ``C`` cache size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from arkv.budget import ByteBudget, Geometry, Slots, byte_slots, token_limit, token_slots
from arkv.config import CacheConfig, ConfigError
from arkv.grant import Counts, Grant
from arkv.scores.oq import oq_ratios


class LayerScores(NamedTuple):
    """What an allocator sees of a layer that has been computed."""

    importance: torch.Tensor
    """Of every prompt token, padding included, [B, H, N] float32."""
    oq: Sequence[float]
    """OQ score, for every sample."""
    lengths: Sequence[int]
    """Prompt tokens of every sample, without padding."""
    heads: int
    geometry: Geometry
    stream: Sequence[float] = ()
    """Norm of the hidden states that the layer reads, for every sample; none where it is not known."""


class Allocator(Protocol):
    """Scores and a budget to slots. One object serves one cache, from its first forward on."""

    def layer(self, scores: LayerScores) -> Grant:
        """The grant of the next layer, as soon as it has been computed."""

    def settle(self, oq: Sequence[Sequence[float]], grants: Sequence[Grant]) -> bool:
        """Once all layers have been computed: change grants where they depend on other layers' scores ([L][B]); returns
        whether any has been changed."""


class JointAllocator(ABC):
    """An allocator that must have seen all layers before it can grant one of them anything: until then the cache holds
    the whole prompt, as a full cache does."""

    @abstractmethod
    def grants(self, layers: Sequence[LayerScores]) -> list[Grant]:
        """Of all layers, once the prompt has been computed."""

    def settle(self, oq: Sequence[Sequence[float]], grants: Sequence[Grant]) -> bool:
        """See :class:`Allocator`: nothing is left to be settled."""
        return False


class TokenAllocator:
    """``C`` tokens in every layer, all Original until the OQ score of every layer is known."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config

    def layer(self, scores: LayerScores) -> Grant:
        """See :class:`Allocator`."""
        limits = [token_limit(self.config, length) for length in scores.lengths]
        if self.config.original_share is None:
            slots = [Slots(limit - self.config.recent, 0) for limit in limits]
        else:
            slots = [token_slots(self.config, limit, 1.0) for limit in limits]
        return Grant(self.config, _per_head(limits, scores.heads), *_per_head_slots(slots, scores.heads))

    def settle(self, oq: Sequence[Sequence[float]], grants: Sequence[Grant]) -> bool:
        """See :class:`Allocator`."""
        if self.config.original_share is not None:
            return False
        for sample, of_layers in enumerate(zip(*oq, strict=True)):
            for grant, ratio in zip(grants, oq_ratios(of_layers), strict=True):
                slots, heads = token_slots(self.config, grant.limit[sample][0], ratio), len(grant.limit[sample])
                grant.original[sample], grant.quantized[sample] = [slots.original] * heads, [slots.quantized] * heads
        return True


class ByteAllocator:
    """The bytes of ``C`` tokens in every layer, or more of them the higher a layer's OQ score is."""

    def __init__(self, config: CacheConfig, layers: int) -> None:
        self.config, self.layers = config, layers
        self.budgets: list[ByteBudget] = []

    def layer(self, scores: LayerScores) -> Grant:
        """See :class:`Allocator`."""
        config, (_, oq, lengths, heads, geometry, _) = self.config, scores
        if not self.budgets:
            self.budgets = [ByteBudget(config, geometry, self.layers, length) for length in lengths]
        granted = [budget.next_layer(score) for budget, score in zip(self.budgets, oq, strict=True)]
        once = geometry.row_bytes
        if config.quantizes:
            once += config.number_format.bytes_per_head(geometry.key_dim)
        limits = [(budget - once) // geometry.original_bytes for budget in granted]
        slots = [byte_slots(config, geometry, *pair) for pair in zip(granted, lengths, strict=True)]
        counts = (_per_head(limits, heads), *_per_head_slots(slots, heads), _per_head(granted, heads))
        return Grant(config, *counts, geometry)

    def settle(self, oq: Sequence[Sequence[float]], grants: Sequence[Grant]) -> bool:
        """See :class:`Allocator`."""
        return False


class GivenCounts:
    """Slots beside the window as they are given, integers [B, H] for every layer: as far apart as one likes.

    Raises:
        ConfigError: a row has no room for the sinks.
    """

    def __init__(
        self, config: CacheConfig, original: Sequence[torch.Tensor], quantized: Sequence[torch.Tensor]
    ) -> None:
        self.config = config
        self.left = [(one.tolist(), other.tolist()) for one, other in zip(original, quantized, strict=True)]
        least = min(count for counts, _ in self.left for row in counts for count in row)
        if least < config.n_sink:
            raise ConfigError(
                f"{least} Original slots beside the window, but n_sink={config.n_sink} tokens always stay: "
                f"give every KV head at least {config.n_sink}"
            )
        if not config.quantizes and any(count for _, counts in self.left for row in counts for count in row):
            raise ConfigError("Quantized slots, but original_share=1.0 quantizes nothing: use original_share=0.0")

    def layer(self, scores: LayerScores) -> Grant:
        """See :class:`Allocator`."""
        if not self.left:
            raise ConfigError(
                "these counts have been given to a cache already: make new GivenCounts for another one, and for one "
                "that was reset"
            )
        original, quantized = self.left.pop(0)
        limit = [
            [self.config.recent + high + low for high, low in zip(*rows, strict=True)]
            for rows in zip(original, quantized, strict=True)
        ]
        grant = Grant(self.config, limit, original, quantized)
        # A row that has not outgrown its limit would hold more Original tokens than it was given slots for.
        grant.outgrown = [[True] * len(row) for row in limit]
        return grant

    def settle(self, oq: Sequence[Sequence[float]], grants: Sequence[Grant]) -> bool:
        """See :class:`Allocator`."""
        return False


def _per_head(numbers: Sequence[int], heads: int) -> Counts:
    """[B] numbers as [B][H]."""
    return [[number] * heads for number in numbers]


def _per_head_slots(slots: Sequence[Slots], heads: int) -> tuple[Counts, Counts]:
    """Original and Quantized slots of every sample, alike for all heads."""
    return _per_head([each.original for each in slots], heads), _per_head([each.quantized for each in slots], heads)
