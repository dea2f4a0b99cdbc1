"""From a budget to slots: what it buys one KV head, and how layers share its bytes.

Letters: ``L`` layers, ``N`` prompt tokens, ``C`` cache size, ``W`` newest tokens that stay (``CacheConfig.recent``).

In token units every layer holds ``C`` tokens, and a Quantized one costs as much as an Original one (ARKV, arXiv
2603.08727). In byte units a budget is what ``C`` tokens take at model precision; positions, scores and quantization
ranges are paid from it, and what quantization saves buys more tokens.

An :class:`~arkv.allocators.Allocator` turns scores and the budget into a :class:`~arkv.grant.Grant` for every layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from arkv.config import CacheConfig, ConfigError
from arkv.formats import Format


class Slots(NamedTuple):
    """Slots of one layer and sample, per KV head: ``original`` without the window, ``quantized``."""

    original: int
    quantized: int


@dataclass(frozen=True)
class Geometry:
    """What a token costs: one KV head of one layer."""

    key_dim: int
    value_dim: int
    dtype: torch.dtype
    slot_bytes: int
    """Position and score of a slot."""
    row_bytes: int = 0
    """What a row takes whatever it holds: its entry in the row table."""

    @property
    def full_bytes(self) -> int:
        """Key and value of a token at model precision, as a stock cache holds them."""
        return (self.key_dim + self.value_dim) * self.dtype.itemsize

    @property
    def original_bytes(self) -> int:
        """An Original slot, position and score included."""
        return self.full_bytes + self.slot_bytes

    def quantized_bytes(self, number_format: Format) -> float:
        """A Quantized slot, position and score included."""
        return number_format.bytes_per_token(self.key_dim, self.value_dim) + self.slot_bytes


def token_limit(config: CacheConfig, tokens: int) -> int:
    """C in token units for a prompt of ``tokens`` tokens; a ratio gives at least the window, the sinks and one."""
    if config.cache_ratio is None:
        return config.tokens_worth(tokens)
    return max(config.tokens_worth(tokens), config.recent + config.n_sink + 1)


def token_slots(config: CacheConfig, limit: int, ratio: float) -> Slots:
    """Token budgets: of ``limit - W`` past tokens, ``round(r_l (C - W))`` stay Original and the others are Quantized.

    Args:
        limit: C of the sample, from :func:`token_limit`.
        ratio: OQ ratio of the layer, which counts where ``original_share`` is None.
    """
    past = limit - config.recent
    original = round((ratio if config.original_share is None else config.original_share) * past)
    original = min(max(original, config.n_sink), past)
    return Slots(original, past - original)


def minimal_bytes(config: CacheConfig, geometry: Geometry) -> int:
    """The least that one KV head of a layer needs: the window, the sinks, and one token more in each state."""
    quantized = 0
    if config.quantizes:
        per_token = math.ceil(geometry.quantized_bytes(config.number_format))
        quantized = per_token + config.number_format.bytes_per_head(geometry.key_dim)
    return geometry.row_bytes + (config.recent + config.n_sink + 1) * geometry.original_bytes + quantized


class ByteBudget:
    """Shares one sample's bytes among the layers, in the order in which they are computed.

    A layer gets the share of what is left that its OQ score has among the layers to come, which are expected to be like
    the mean of those seen. So each layer is compressed once, right after it was computed, and never again, and the sum
    is what was asked for. The price is that equal scores get unequal shares where the layers before them differ: the
    first layer always gets the mean, the last one what is left.

    Args:
        config: settings; ``layer_budgets`` says whether the OQ scores count at all.
        geometry: sizes of one KV head.
        layers: number of compressible layers L.
        tokens: prompt length N of the sample.

    Raises:
        ConfigError: the budget does not hold the window and the sinks of every layer.
    """

    def __init__(self, config: CacheConfig, geometry: Geometry, layers: int, tokens: int) -> None:
        self.config, self.geometry, self.layers = config, geometry, layers
        self.minimum = minimal_bytes(config, geometry)
        each = config.tokens_worth(tokens) * geometry.full_bytes
        if each < self.minimum:
            if config.cache_size is not None:
                raise ConfigError(
                    f"cache_size={config.cache_size} in bytes is too small for {config.recent_setting}, "
                    f"n_sink={config.n_sink} and one token more: "
                    f"use cache_size >= {-(-self.minimum // geometry.full_bytes)}"
                )
            each = self.minimum
        self.left = each * layers
        self.scores: list[float] = []

    def next_layer(self, score: float) -> int:
        """Bytes of one KV head of the next layer, which has OQ score ``score``."""
        self.scores.append(score)
        remaining = self.layers - len(self.scores) + 1
        share = 1.0 / remaining
        expected = score + (remaining - 1) * sum(self.scores) / len(self.scores)
        if self.config.layer_budgets == "oq" and expected > 0:
            share = score / expected
        # Every layer to come keeps its minimum.
        most = self.left - (remaining - 1) * self.minimum
        granted = max(min(round(self.left * share), most), self.minimum)
        self.left -= granted
        return granted


def byte_slots(config: CacheConfig, geometry: Geometry, budget: int, tokens: int) -> Slots:
    """Slots that ``budget`` bytes of one KV head buy beside the window.

    ``original_share`` of the past bytes stays Original, the rest is Quantized; where more could be quantized than there
    are tokens, and any share stays Original, the bytes left over keep more of them so.

    Args:
        tokens: how many the split is for: those of the prompt, or those soon to have been seen.
    """
    past_bytes = budget - geometry.row_bytes - config.recent * geometry.original_bytes
    most_original = past_bytes // geometry.original_bytes
    if not config.quantizes:
        return Slots(most_original, 0)
    assert config.original_share is not None
    past_bytes -= config.number_format.bytes_per_head(geometry.key_dim)
    per_token = geometry.quantized_bytes(config.number_format)
    original = max(int(config.original_share * past_bytes) // geometry.original_bytes, config.n_sink)
    quantized = int((past_bytes - original * geometry.original_bytes) / per_token)
    if config.original_share > 0:
        # Beyond the tokens there are, Quantized slots would stay empty for long.
        quantized = min(quantized, max(tokens - config.recent - original, 0))
        original = int((past_bytes - quantized * per_token) // geometry.original_bytes)
    return Slots(original, quantized)
