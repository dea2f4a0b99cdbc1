"""A prompt kept whole, with the newest queries, so that any number of caches can be made of it.

Letters: ``B`` batch, ``Hq`` query heads, ``H`` KV heads, ``N`` tokens, ``T`` tokens of one forward, ``D`` head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from arkv.attention import Handle, dense_of, padding_of
from arkv.blocks import plain_attention
from arkv.config import CacheConfig, ConfigError
from arkv.layer import TriStateLayer
from arkv.memory import storage_bytes
from arkv.misuse import check_config
from arkv.models import keeps_state
from arkv.scores import PromptScores
from arkv.watched import WatchedCache, copy_stock


class PrefillLayer(DynamicLayer):
    """A full layer that also keeps the newest queries, so that it can be compressed later."""

    def __init__(self, recorded: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorded = recorded
        self._forget()

    def _forget(self) -> None:
        self.queries: torch.Tensor = torch.empty(0)
        self.scaling = 1.0
        self.padding: torch.Tensor | None = None
        self.scores: dict[Any, PromptScores] = {}
        """By ``CacheConfig.scoring``, as far as :meth:`PrefillCache.score` has been asked for them."""

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._forget()

    @property
    def max_batch_size(self) -> int:
        """Batch size, 0 before the first forward."""
        return self.queries.shape[0]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep samples ``indices``, in that order."""
        super().batch_select_indices(indices)
        self.scores = {}
        if self.queries.numel():
            self.queries = self.queries.index_select(0, indices.to(self.queries.device))
        if self.padding is not None:
            self.padding = self.padding.index_select(0, indices.to(self.padding.device))

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H, N, D]. Raises :class:`ValueError` before the prefill."""
        if self.keys is None or self.values is None:
            raise ValueError("nothing has been prefilled yet: run its model on a prompt with this cache first")
        return self.keys, self.values


class _PrefillHandle(Handle):
    """The handle of one layer of a :class:`PrefillCache`."""

    def __init__(self, cache: PrefillCache, layer: PrefillLayer) -> None:
        self.cache = cache
        self.config = cache.model_config
        self.layer = layer

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> torch.Tensor:
        """Plain attention; the newest queries are kept."""
        layer = self.layer
        kept = query[:, :, -layer.recorded :]
        if layer.queries.numel() and kept.shape[2] < layer.recorded:
            kept = torch.cat([layer.queries, kept], dim=2)[:, :, -layer.recorded :]
        layer.queries = kept.clone()
        layer.scores = {}
        layer.scaling = scaling
        self.cache.waiting = False
        layer.padding = padding_of(mask, layer.get_seq_length())
        return plain_attention(module, query, *layer.states(), dense_of(mask), scaling, **kwargs)


class PrefillCache(WatchedCache):
    """Everything that a prompt leaves, kept once and compressed by any number of methods.

    A prompt may come in chunks. ``queries`` is how many of the newest queries stay for scoring: the most
    ``CacheConfig.recorded_queries`` of the methods to come.

    Raises:
        ConfigError: none of them, or the model's layers cannot be compressed.
    """

    def __init__(self, model: PreTrainedModel | PreTrainedConfig, queries: int = 128) -> None:
        if not isinstance(queries, int) or queries < 1:
            raise ConfigError(f"queries={queries!r}: give at least 1, for example 128")
        self.queries = queries
        super().__init__(model, lambda: PrefillLayer(queries))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Take the new keys and values of a layer; returns what the attention function needs, twice."""
        self.check_whole(layer_idx)
        self.check_place(layer_idx)
        layer = self.layers[layer_idx]
        if isinstance(layer, PrefillLayer):
            self.check_fits(layer_idx, key_states, value_states)
        plain = layer.update(key_states, value_states, *args, **kwargs)
        if not isinstance(layer, PrefillLayer):
            return plain
        self.waiting = True
        handle = _PrefillHandle(self, layer)
        return handle, handle

    def check(self, config: CacheConfig) -> None:
        """Raises :class:`ConfigError` where ``config`` needs more queries than have been recorded, or is none."""
        check_config(config)
        if config.recorded_queries > self.queries:
            raise ConfigError(
                f"window_size={config.window_size} and query_span={config.query_span}: the prefill recorded "
                f"{self.queries} queries; record {config.recorded_queries}"
            )

    def score(self, config: CacheConfig) -> None:
        """Compute the scores of all tokens once for every cache that takes the same (``CacheConfig.scoring``), as far
        as they are not there yet: with several budgets or methods they are most of what compression costs.

        They take 4 bytes per token, layer and KV head as long as this cache lives.

        Raises:
            ConfigError: they need more queries than have been recorded.
        """
        self.check(config)
        if config.scoring is None:
            return
        for source in self.layers:
            if isinstance(source, PrefillLayer) and config.scoring not in source.scores:
                layer = TriStateLayer(config)
                block = layer.measure(*source.states(), source.queries, source.scaling, source.padding, None)
                importance = block.tokens.score.view(block.key.shape[:3])
                source.scores[config.scoring] = PromptScores(importance, layer.oq)

    def to_dynamic(self) -> DynamicCache:
        """A stock full cache that continues from here; this one stays as it is."""
        cache = copy_stock(self.stock)
        for layer_idx, layer in enumerate(self.layers):
            if isinstance(layer, PrefillLayer):
                cache.update(*layer.states(), layer_idx)
        return cache

    def nbytes(self) -> int:
        """Bytes of the keys and values, and of the states of layers that keep none."""
        layers = (self.layers[index] for index in self._counting)
        return storage_bytes(self._states(), [(layer.keys, layer.values) for layer in layers])

    def _states(self) -> list[Any]:
        states = [vars(layer) for layer in self.stock.layers if keeps_state(layer)]
        return [(state["conv_states"], state["recurrent_states"]) for state in states]

    def full_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of ``tokens`` tokens at model precision, as a stock full cache holds them."""
        total = storage_bytes(self._states())
        for index in self._counting:
            layer = self.layers[index]
            keys, values = layer.keys, layer.values
            per_token = sum(item[:, :, :1].numel() * item.element_size() for item in (keys, values) if item is not None)
            # A stock sliding layer keeps the tokens that the next query still sees.
            held = (
                tokens if isinstance(layer, PrefillLayer) else min(tokens, getattr(layer, "sliding_window", tokens) - 1)
            )
            total += per_token * held
        return total


def check_prefill(prefill: Any) -> None:
    """Raises :class:`ConfigError` for a cache of another kind."""
    if not isinstance(prefill, PrefillCache):
        raise ConfigError(
            f"prefill is a {type(prefill).__name__}: give a PrefillCache, with which the model has read the prompt"
        )
