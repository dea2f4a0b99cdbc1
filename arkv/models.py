"""What a model family is, decided by what it does: which layers are compressed, which are left as they are, and which
models are refused."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from arkv.config import ConfigError, NotCompressible
from arkv.misuse import check_model


def text_config(model: PreTrainedModel | PreTrainedConfig) -> Any:
    """The config of the model's decoder. Raises :class:`ConfigError` for what is no model, or one without attention."""
    check_model(model)
    config: Any = getattr(model, "config", model)
    config = config.get_text_config(decoder=True)
    if getattr(config, "num_attention_heads", None) is None:
        raise ConfigError(f"model {config.model_type!r} has no attention heads, so no keys and values to compress")
    return config


def keeps_state(layer: Any) -> bool:
    """Whether a stock layer keeps more than keys and values: the state of a recurrence or of a convolution."""
    return hasattr(layer, "conv_states")


def copy_layer(layer: Any) -> Any:
    """A stock layer that can go its own way: keys and values are replaced and never written into, but states are."""
    twin = object.__new__(type(layer))
    twin.__dict__.update({name: _copied(item) for name, item in layer.__dict__.items()})
    return twin


def _copied(item: Any) -> Any:
    if not isinstance(item, dict):
        return item
    return {key: each.clone() if isinstance(each, torch.Tensor) else each for key, each in item.items()}


def select_samples(layer: Any, indices: torch.Tensor) -> None:
    """Keep samples ``indices`` of a stock layer, in that order."""
    if keeps_state(layer):
        for states in (layer.conv_states, layer.recurrent_states):
            picked = {
                key: each.index_select(0, indices.to(each.device)) for key, each in states.items() if each is not None
            }
            states.update(picked)
    if hasattr(layer, "batch_select_indices"):
        layer.batch_select_indices(indices)


def layers_of(
    model: PreTrainedModel | PreTrainedConfig, make: Callable[[], CacheLayerMixin]
) -> tuple[list[Any], DynamicCache]:
    """One layer per layer of the model, ours where attention is full; and transformers' full cache for the model, whose
    layers are the others, and keep what ours do not: the states of layers that are hybrids by themselves.

    Raises:
        NotCompressible: nothing can be compressed.
        ConfigError: only a cache of another kind than transformers' full one could serve the model.
    """
    config = text_config(model)
    name = f"model {config.model_type!r}"
    if not _takes_cache(model):
        raise ConfigError(f"{name} takes no cache of keys and values (past_key_values)")
    own = _own_cache(model)
    if own is not None:
        raise ConfigError(f"{name} works with a cache of its own kind only ({own}), which no other can replace")
    sharing = getattr(config, "num_kv_shared_layers", None) or "reuse" in (
        getattr(config, "kv_sharing_modes", ()) or ()
    )
    if sharing:
        raise NotCompressible(f"{name} has layers that share keys and values, which is not supported")
    try:
        stock = DynamicCache(config=config)
    except KeyError as error:
        raise ConfigError(f"{name} has layers of type {error}, which no cache of transformers serves") from None
    if not stock.layers:
        raise ConfigError(f"{name} does not say how many layers it has (num_hidden_layers)")
    kinds = getattr(config, "layer_types", None) or [None] * len(stock.layers)
    layers: list[Any] = []
    for kind, layer in zip(kinds, stock.layers, strict=True):
        # transformers 5.2 takes layers of any type for full attention.
        if type(layer) is DynamicLayer and kind not in (None, "full_attention"):
            raise ConfigError(f"{name} has layers of type {kind!r}, which only a cache of its own kind serves")
        if isinstance(layer, CacheLayerMixin) and type(layer).__module__ != DynamicCache.__module__:
            raise NotCompressible(f"{name} has {type(layer).__name__}s, which cannot be compressed")
        if _is_full(layer, kind, config):
            layers.append(make())
        elif getattr(layer, "is_sliding", False) or not isinstance(layer, CacheLayerMixin):
            layers.append(layer)
        else:
            raise NotCompressible(f"{name} has {type(layer).__name__}s, which cannot be compressed")
    if all(mine is layer for mine, layer in zip(layers, stock.layers, strict=True)):
        why = "sliding windows in all layers" if any(stock.is_sliding) else "full attention in no layer"
        raise NotCompressible(f"{name} has {why}: there is nothing to compress")
    return layers, stock


def _is_full(layer: Any, kind: str | None, config: Any) -> bool:
    """Whether a stock layer keeps the keys and values of all tokens."""
    if not getattr(layer, "is_sliding", False):
        return type(layer) is DynamicLayer or (isinstance(layer, DynamicLayer) and keeps_state(layer))
    # A window as wide as the context never slides. Chunks have one too.
    context = getattr(config, "max_position_embeddings", None)
    never = context is not None and layer.sliding_window >= context
    return (
        never
        and not keeps_state(layer)
        and kind != "chunked_attention"
        and bool(getattr(config, "sliding_window", None))
    )


def _takes_cache(model: PreTrainedModel | PreTrainedConfig) -> bool:
    """Whether the model looks at a cache that it is given; some leave it alone without a word."""
    if not isinstance(model, PreTrainedModel):
        return True
    # Of the class: on an instance others may have put a function of their own around it.
    parameters = inspect.signature(type(model).forward).parameters
    return "past_key_values" in parameters or any(item.kind is item.VAR_POSITIONAL for item in parameters.values())


def _own_cache(model: PreTrainedModel | PreTrainedConfig) -> str | None:
    """The class of the cache that the model's code brings along, if it does."""
    module = type(model).__module__
    found = [
        name
        for name, item in vars(sys.modules[module]).items()
        if isinstance(item, type) and item.__module__ == module and name.endswith("Cache")
        # Others of such names are for streaming audio.
        if hasattr(item, "get_seq_length")
    ]
    return min(found, default=None)
