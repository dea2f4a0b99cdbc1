"""The tri-state cache: each token is Original, Quantized or Evicted, per layer and KV head.

Letters: ``B`` batch, ``Hq`` query heads, ``H`` KV heads, ``T`` tokens of one forward, ``D`` head dim, ``W`` window,
``C`` cache size. :mod:`arkv.layer` says what a layer stores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from arkv.attention import LazyMask
from arkv.budget import ByteBudget, Geometry, Slots, oq_ratios, token_limit, token_slots
from arkv.config import CacheConfig, ConfigError
from arkv.layer import PromptScores, TriStateLayer
from arkv.memory import storage_bytes
from arkv.stepping import LayerGroup
from arkv.storage import Tokens


class NotAttached(ConfigError, AttributeError):
    """A model used keys and values itself that only this library's attention function can read."""


class Handle:
    """What a model receives in the place of keys and values, to pass it on to the attention function."""

    def __getattr__(self, name: str) -> Any:
        raise NotAttached(_NOT_ATTACHED)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotAttached(_NOT_ATTACHED)


_NOT_ATTACHED = (
    "the model's own attention cannot read this cache: put `with attach(model):` (from arkv) around the model's call"
)


class WatchedCache(Cache):
    """A cache that notices when a forward through it has been broken off half-way."""

    waiting = False
    """A layer has been handed keys and values, and their attention is still to come."""

    def check_whole(self) -> None:
        """Raises :class:`RuntimeError` where some layers have seen tokens that others have not."""
        lengths = {layer.get_seq_length() for layer in self.layers}
        # Into a cache that is still empty, nothing has been taken.
        if len(lengths) > 1 or (self.waiting and lengths != {0}):
            raise RuntimeError(
                "the last forward through this cache was interrupted, so that not all of its layers have seen the same "
                "tokens: reset() the cache, or make it anew, and begin with the prompt"
            )

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[no-untyped-call]
        self.waiting = False
        # transformers' layers put zeros in the place of their tokens, and go on from these.
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False


class LayerHandle(Handle):
    """The handle of one layer of a :class:`TriStateCache`."""

    def __init__(self, cache: TriStateCache, layer_idx: int) -> None:
        self.cache = cache
        self.layer_idx = layer_idx

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> torch.Tensor:
        """Attention output [B, T, Hq, D] of ``query`` [B, Hq, T, D]."""
        return self.cache.attend(self.layer_idx, module, query, mask, scaling, **kwargs)


class TriStateCache(WatchedCache):
    """A KV cache in which each token is Original, Quantized or Evicted (ARKV, arXiv 2603.08727).

    >>> config = CacheConfig.for_method("mix", cache_size=512)
    >>> with attach(model):                                                     # doctest: +SKIP
    ...     model.generate(**inputs, past_key_values=TriStateCache(model, config))

    Layers with a sliding window of their own keep transformers' layer for it.

    Args:
        model: the model, or its config.
        config: settings, see :class:`CacheConfig`.

    Raises:
        ConfigError: the model's layers cannot be compressed.
    """

    def __init__(self, model: PreTrainedModel | PreTrainedConfig, config: CacheConfig) -> None:
        self.config = config
        self._budgets: list[ByteBudget] | None = None
        model_config = _text_config(model)
        if config.quantizes:
            head_dim = getattr(model_config, "head_dim", None)
            try:
                config.number_format.check(head_dim or model_config.hidden_size // model_config.num_attention_heads)
            except ValueError as error:
                raise ConfigError(f"quant_format={config.quant_format!r}: {error}") from None
        context = getattr(model_config, "max_position_embeddings", None)
        super().__init__(layers=_layers(model, lambda: TriStateLayer(config, context)))
        self._groups: dict[int, tuple[LayerGroup, int]] = {}
        """The group that each layer decodes in and its place there, known from the first decoding step."""
        self._last = max(index for index, layer in enumerate(self.layers) if isinstance(layer, TriStateLayer))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Take the new keys and values [B, H, T, D] of a layer; returns what the attention function needs, twice."""
        if layer_idx == 0:
            self.check_whole()
        layer = self.layers[layer_idx]
        if not isinstance(layer, TriStateLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        if layer.tokens is not None and key_states.shape[2] == 1:
            group, index = self._group(layer_idx)
            group.join(index, key_states, value_states)
        else:
            self._groups = {}
            layer.update(key_states, value_states)
        self.waiting = True
        handle = LayerHandle(self, layer_idx)
        return handle, handle

    def attend(
        self, layer_idx: int, module: torch.nn.Module, query: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> torch.Tensor:
        """Attention output [B, T, Hq, D] of layer ``layer_idx`` for ``query`` [B, Hq, T, D]."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, TriStateLayer)
        if layer.incoming is None:
            group, index = self._group(layer_idx)
            output = group.attend(index, query, scaling)
        else:
            output = layer.attend_block(module, query, mask, scaling, **kwargs)
            self._absorb(layer_idx, query, scaling, mask.padding if isinstance(mask, LazyMask) else None)
        self.waiting = False
        return output

    def _group(self, layer_idx: int) -> tuple[LayerGroup, int]:
        """The layers that step together: those whose tensors can be parts of one, on one device."""
        if layer_idx not in self._groups:
            alike: dict[Any, list[tuple[int, TriStateLayer]]] = {}
            for index, layer in enumerate(self.layers):
                if isinstance(layer, TriStateLayer) and layer.tokens is not None:
                    key, value = layer.tokens.key, layer.tokens.value
                    kind = (key.device, key.dtype, key.shape[1], key.shape[3], value.shape[3])
                    alike.setdefault(kind, []).append((index, layer))
            for members in alike.values():
                group = LayerGroup(self.config, [layer for _, layer in members])
                self._groups.update({index: (group, place) for place, (index, _) in enumerate(members)})
        return self._groups[layer_idx]

    def _absorb(
        self,
        layer_idx: int,
        query: torch.Tensor,
        scaling: float,
        padding: torch.Tensor | None,
        scores: PromptScores | None = None,
    ) -> None:
        """Compress layer ``layer_idx`` as soon as it has been computed."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, TriStateLayer)
        first = layer.tokens is None
        tokens = layer.measure(query, scaling, padding, scores)
        if first and self.config.budget_unit == "tokens":
            self._share_tokens(layer, tokens)
        elif first:
            self._share_bytes(layer, tokens)
        layer.absorb(tokens)
        if first and self.config.original_share is None and layer_idx == self._last:
            self._settle()

    def _share_tokens(self, layer: TriStateLayer, tokens: Tokens) -> None:
        """Token budgets: C tokens, all Original until the OQ score of every layer is known."""
        lengths = [tokens.slots - padded for padded in layer.padded]
        layer.limits = [token_limit(self.config, length) for length in lengths]
        if self.config.original_share is None:
            layer.slots = [Slots(limit - self.config.window_size, 0) for limit in layer.limits]
        else:
            layer.slots = [token_slots(self.config, limit, 1.0) for limit in layer.limits]

    def _settle(self) -> None:
        """Token budgets by OQ ratio: now that every layer has its score, quantize what does not stay Original."""
        layers = [layer for layer in self.layers if isinstance(layer, TriStateLayer)]
        ratios = [oq_ratios(scores) for scores in zip(*(layer.oq for layer in layers), strict=True)]
        for index, layer in enumerate(layers):
            pairs = zip(layer.limits, ratios, strict=True)
            layer.settle([token_slots(self.config, limit, sample[index]) for limit, sample in pairs])

    def _share_bytes(self, layer: TriStateLayer, tokens: Tokens) -> None:
        """Byte budgets: the layer gets its share of what the layers before it have left."""
        slot_bytes = tokens.position.element_size() + tokens.score.element_size()
        if self.config.pools_steps:
            slot_bytes += tokens.position.element_size()
        if tokens.value.shape[-1] != tokens.key.shape[-1]:
            raise ConfigError("budget_unit='bytes': keys and values of different width are not counted; use 'tokens'")
        geometry = Geometry(tokens.key.shape[-1], tokens.key.dtype, slot_bytes)
        lengths = [tokens.slots - padded for padded in layer.padded]
        if self._budgets is None:
            count = sum(isinstance(item, TriStateLayer) for item in self.layers)
            self._budgets = [ByteBudget(self.config, geometry, count, length) for length in lengths]
        granted = [budget.next_layer(score) for budget, score in zip(self._budgets, layer.oq, strict=True)]
        layer.share_bytes(geometry, granted, lengths)

    def reset(self) -> None:
        """Forget everything."""
        self._budgets = None
        self._groups = {}
        super().reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep samples ``beam_idx`` [B], in that order (beam search)."""
        self._groups = {}
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep samples ``indices``, in that order."""
        self._groups = {}
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample ``repeats`` times."""
        self._groups = {}
        super().batch_repeat_interleave(repeats)

    def fork(self) -> TriStateCache:
        """A copy that can go its own way: several continuations of one prefill."""
        twin = TriStateCache.__new__(TriStateCache)
        twin.__dict__.update(self.__dict__)
        twin._groups = {}
        twin.layers = [
            layer.fork() if isinstance(layer, TriStateLayer) else _copy_layer(layer) for layer in self.layers
        ]
        return twin

    @classmethod
    def from_prefill(cls, prefill: PrefillCache, config: CacheConfig) -> TriStateCache:
        """Compress what ``prefill`` holds, which stays as it is: one prefill serves any number of caches.

        Raises:
            ConfigError: the scores need more queries than ``prefill`` recorded.
        """
        prefill.check(config)
        cache = cls(prefill.model_config, config)
        for layer_idx, (source, layer) in enumerate(zip(prefill.layers, cache.layers, strict=True)):
            if isinstance(source, PrefillLayer):
                layer.update(*source.states())
                scores = source.scores.get(config.scoring)
                cache._absorb(layer_idx, source.queries, source.scaling, source.padding, scores)
            else:
                cache.layers[layer_idx] = _copy_layer(source)
        return cache

    def nbytes(self) -> int:
        """Bytes of all storage that the cache holds: keys, values, scales, positions and scores."""
        return storage_bytes(self)

    def oq_ratios(self, sample: int = 0) -> list[float]:
        """OQ ratio of each compressible layer for one sample, as far as layers have been computed."""
        scores = [layer.oq[sample] for layer in self.layers if isinstance(layer, TriStateLayer) and layer.oq]
        return oq_ratios(scores) if scores else []

    def token_counts(self, sample: int = 0) -> dict[str, float]:
        """Tokens ``original``, ``quantized``, ``evicted`` of a sample, mean over compressible layers and KV heads."""
        layers = [layer for layer in self.layers if isinstance(layer, TriStateLayer) and layer.is_initialized]
        if not layers:
            return {"original": 0.0, "quantized": 0.0, "evicted": 0.0}
        original = quantized = 0.0
        for layer in layers:
            states = layer.states(sample)
            heads = states.position.shape[0]
            low = int(states.quantized.sum())
            original += (int((states.position >= 0).sum()) - low) / heads
            quantized += low / heads
        original, quantized = original / len(layers), quantized / len(layers)
        seen = layers[0].seen - layers[0].padded[sample]
        return {"original": original, "quantized": quantized, "evicted": seen - original - quantized}


class PrefillLayer(DynamicLayer):
    """A full layer that also keeps the newest queries, so that it can be compressed later."""

    def __init__(self, recorded: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorded = recorded
        self.queries: torch.Tensor = torch.empty(0)
        self.scaling = 1.0
        self.padding: torch.Tensor | None = None
        self.scores: dict[Any, PromptScores] = {}
        """By ``CacheConfig.scoring``, as far as :meth:`PrefillCache.score` has been asked for them."""

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.recorded)  # type: ignore[misc]

    def _pick(self, indices: torch.Tensor) -> None:
        """The queries and padding of samples ``indices``."""
        self.scores = {}
        if self.queries.numel():
            self.queries = self.queries.index_select(0, indices.to(self.queries.device))
        if self.padding is not None:
            self.padding = self.padding.index_select(0, indices.to(self.padding.device))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep samples ``beam_idx`` [B], in that order."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._pick(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep samples ``indices``, in that order."""
        super().batch_select_indices(indices)
        self._pick(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample ``repeats`` times."""
        self._pick(torch.arange(self.queries.shape[0]).repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H, N, D]. Raises :class:`ValueError` before the prefill."""
        if self.keys is None or self.values is None:
            raise ValueError("nothing has been prefilled yet: run the model on a prompt with this cache first")
        return self.keys, self.values


class _PrefillHandle(Handle):
    """The handle of one layer of a :class:`PrefillCache`."""

    def __init__(self, cache: PrefillCache, layer: PrefillLayer) -> None:
        self.cache = cache
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
        layer.padding = mask.padding if isinstance(mask, LazyMask) else None
        dense = mask.dense if isinstance(mask, LazyMask) else mask
        output, _ = sdpa_attention_forward(module, query, *layer.states(), dense, scaling=scaling, **kwargs)
        self.cache.waiting = False
        return output


class PrefillCache(WatchedCache):
    """Everything that a prompt leaves, kept once and compressed by any number of methods.

    A prompt may come in chunks. ``queries`` is how many of the newest queries stay for scoring: the most
    ``CacheConfig.recorded_queries`` of the methods to come.
    """

    def __init__(self, model: PreTrainedModel | PreTrainedConfig, queries: int = 128) -> None:
        self.model_config: Any = getattr(model, "config", model)
        self.queries = queries
        super().__init__(layers=_layers(model, lambda: PrefillLayer(queries)))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Take the new keys and values of a layer; returns what the attention function needs, twice."""
        if layer_idx == 0:
            self.check_whole()
        layer = self.layers[layer_idx]
        plain = layer.update(key_states, value_states, *args, **kwargs)
        if not isinstance(layer, PrefillLayer):
            return plain
        self.waiting = True
        handle = _PrefillHandle(self, layer)
        return handle, handle

    def check(self, config: CacheConfig) -> None:
        """Raises :class:`ConfigError` where ``config`` needs more queries than have been recorded."""
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
                layer.update(*source.states())
                scored = layer.measure(source.queries, source.scaling, source.padding).score
                source.scores[config.scoring] = PromptScores(scored, layer.oq)

    def to_dynamic(self) -> DynamicCache:
        """A stock full cache that continues from here; this one stays as it is."""
        cache = DynamicCache(config=self.model_config)
        for layer_idx, layer in enumerate(self.layers):
            if isinstance(layer, PrefillLayer):
                cache.update(*layer.states(), layer_idx)
            else:
                cache.layers[layer_idx] = _copy_layer(layer)
        return cache

    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return storage_bytes([(layer.keys, layer.values) for layer in self.layers])

    def full_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of ``tokens`` tokens at model precision, as a stock full cache holds them."""
        total = 0
        for layer in self.layers:
            keys, values = layer.keys, layer.values
            per_token = sum(item[:, :, :1].numel() * item.element_size() for item in (keys, values) if item is not None)
            # A stock sliding layer keeps the tokens that the next query still sees.
            held = (
                tokens if isinstance(layer, PrefillLayer) else min(tokens, getattr(layer, "sliding_window", tokens) - 1)
            )
            total += per_token * held
        return total


def _text_config(model: PreTrainedModel | PreTrainedConfig) -> Any:
    """The config of the model's decoder. Raises :class:`ConfigError` for a model without attention."""
    config: Any = getattr(model, "config", model)
    config = config.get_text_config(decoder=True)
    if getattr(config, "num_attention_heads", None) is None:
        raise ConfigError(f"model {config.model_type!r} has no attention heads, so no keys and values to compress")
    return config


def _copy_layer(layer: Any) -> Any:
    """A stock layer that can go its own way: stock layers replace their tensors and never write into them."""
    twin = object.__new__(type(layer))
    twin.__dict__.update(layer.__dict__)
    return twin


def _layers(model: PreTrainedModel | PreTrainedConfig, make: Callable[[], CacheLayerMixin]) -> list[Any]:
    """One layer per layer of the model: ours where attention is full, transformers' own where it slides."""
    config = _text_config(model)
    kinds = {*(getattr(config, "layer_types", None) or ())}
    strange = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if strange:
        raise ConfigError(
            f"model {config.model_type!r} has layers of type {min(strange)!r}, which cannot be compressed"
        )
    if getattr(config, "kv_lora_rank", None):
        raise ConfigError(f"model {config.model_type!r} caches latents instead of keys and values, not supported")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ConfigError(f"model {config.model_type!r} has layers that share keys and values, which is not supported")
    stock = DynamicCache(config=config).layers
    if not stock:
        raise ConfigError(f"model {config.model_type!r} does not say how many layers it has (num_hidden_layers)")
    if all(getattr(layer, "is_sliding", False) for layer in stock):
        raise ConfigError(
            f"model {config.model_type!r} has sliding windows in all layers: there is nothing to compress"
        )
    layers = []
    for layer in stock:
        if type(layer) is DynamicLayer:
            layers.append(make())
        elif getattr(layer, "is_sliding", False):
            layers.append(layer)
        else:
            raise ConfigError(f"model {config.model_type!r} has {type(layer).__name__}s, which hold no keys and values")
    return layers
