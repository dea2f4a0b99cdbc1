"""A prompt read a second time: what a token is needed for when the text is to be said again (KVzip, arXiv 2505.23416).

Letters: ``B`` batch, ``Hq`` query heads, ``H`` KV heads, ``N`` prompt tokens, ``m`` tokens of a chunk, ``D`` head dim.

The tokens of the prompt go through the model once more, a chunk at a time, each chunk right behind the whole prompt.
The importance of a token is the largest attention that any query of this second reading gives it. It knows no question,
so that one compressed cache serves any number of them. It costs another prefill, and the scores of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from arkv import kernels
from arkv.attention import Handle, attach, dense_of
from arkv.blocks import plain_attention
from arkv.config import CacheConfig, ConfigError
from arkv.misuse import check_config, check_ids
from arkv.prefill import PrefillCache, PrefillLayer, check_prefill
from arkv.scores import Prompt, PromptScores
from arkv.watched import WatchedCache, copy_stock

CHUNK = 512
"""Tokens that are read again at a time."""


class ReplayLayer(DynamicLayer):
    """The prompt of one layer, which stays as it is whatever is read behind it."""

    def __init__(self, source: PrefillLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = source.states()
        self.is_initialized = True
        self.importance = self.keys.new_zeros(self.keys.shape[:3], dtype=torch.float32)
        """The largest attention so far, [B, H, N]."""

    @property
    def max_batch_size(self) -> int:
        """Prompts that are read again."""
        return self.importance.shape[0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the prompt with new ones behind them, which are not kept."""
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)


class _ReplayHandle(Handle):
    """The handle of one layer of a :class:`_ReplayCache`, for one chunk."""

    def __init__(self, layer: ReplayLayer, key: torch.Tensor, value: torch.Tensor, fused: bool) -> None:
        self.layer, self.key, self.value, self.fused = layer, key, value, fused

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> torch.Tensor:
        """Plain attention, of which the largest that each token of the prompt gets is kept."""
        largest = self.layer.importance
        plain = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
        if self.fused and plain and kernels.reread.supported(query.device, query.dtype):
            return kernels.reread.reread(query, self.key, self.value, scaling, largest)
        found = largest_attention(query, self.key, self.value, scaling, self.fused)
        torch.maximum(largest, found[..., : largest.shape[2]], out=largest)
        return plain_attention(module, query, self.key, self.value, dense_of(mask), scaling, **kwargs)


def largest_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, fused: bool
) -> torch.Tensor:
    """The largest attention that any query of a chunk gives to each token, [B, H, N + m].

    Args:
        query: [B, Hq, m, D].
        key, value: of the prompt and of the chunk, [B, H, N + m, D].
        fused: whether a kernel may find it.
    """
    new = query.shape[2]
    none = torch.zeros(1, 1, 1, dtype=torch.bool, device=query.device)
    chunk = Prompt(query, key, value, new=new, window=new, scaling=scaling, sinks=none, fused=fused)
    return chunk.near.largest


class _ReplayCache(WatchedCache):
    """A prompt behind which chunks are read, none of which stays."""

    def __init__(self, prefill: PrefillCache, fused: bool) -> None:
        super().__init__(prefill.model_config, lambda: PrefillLayer(0))
        self.fused = fused
        self.layers = [ReplayLayer(layer) if isinstance(layer, PrefillLayer) else layer for layer in prefill.layers]
        self.stock = prefill.stock
        self._held_as = prefill._held_as

    def rewound(self, prefill: PrefillCache) -> _ReplayCache:
        """The same behind the prompt again: transformers' own layers have gone on."""
        self._take_stock(copy_stock(prefill.stock))
        self._asked = set()
        return self

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Take new keys and values of a layer; returns what the attention function needs, twice."""
        self.check_place(layer_idx)
        layer = self.layers[layer_idx]
        if isinstance(layer, ReplayLayer):
            self.check_fits(layer_idx, key_states, value_states)
        found = layer.update(key_states, value_states, *args, **kwargs)
        if not isinstance(layer, ReplayLayer):
            return found
        handle = _ReplayHandle(layer, *found, self.fused)
        return handle, handle


@torch.no_grad()
def replay(model: PreTrainedModel, ids: torch.Tensor, prefill: PrefillCache, config: CacheConfig) -> None:
    """Read a prompt again, and leave the importance of its tokens in ``prefill``, for every cache that is made of it
    with ``importance="replay"``; nothing is done where it is there already.

    Args:
        model: the one that has read it.
        ids: the prompt, [B, N], without padding.
        prefill: what it left.
        config: the settings of such a cache.

    Raises:
        ConfigError: other settings, another model or prompt, padding, or no room for a second reading in the model's
            context.
    """
    check_ids(ids)
    check_prefill(prefill)
    check_config(config)
    settings = config.scoring
    if settings is None or settings.importance != "replay":
        raise ConfigError(f"importance={config.importance!r}: only importance='replay' reads a prompt again")
    own = [layer for layer in prefill.layers if isinstance(layer, PrefillLayer)]
    if all(settings in layer.scores for layer in own):
        return
    length = prefill.get_seq_length()
    if ids.shape[1] != length:
        raise ConfigError(f"the prompt given has {ids.shape[1]} tokens and the prefill {length}: give the same one")
    if any(layer.padding is not None for layer in own):
        raise ConfigError("importance='replay': a batch with padding cannot be read again: prefill prompts one by one")
    context = getattr(prefill.model_config, "max_position_embeddings", None) or 2 * length
    room = min(CHUNK, length, context - length)
    if room < 1:
        raise ConfigError(
            f"importance='replay': a prompt of {length} tokens fills the model's context of {context}, behind which it "
            f"would be read again: use at most {context - CHUNK} tokens"
        )
    oq = [[0.0] * len(ids)] * len(own)
    if settings.uses_oq:
        by_window = dataclasses.replace(config, importance="mean_var")
        prefill.score(by_window)
        assert by_window.scoring is not None
        oq = [layer.scores[by_window.scoring].oq for layer in own]
    cache = _ReplayCache(prefill, settings.attention == "fused")
    with attach(model), _stream_norms(model) as norms:
        for chunk in ids.split(room, dim=1):
            # Logits are of no use here.
            model.base_model(chunk, past_key_values=cache.rewound(prefill))
    again = ((place, layer) for place, layer in enumerate(cache.layers) if isinstance(layer, ReplayLayer))
    for source, (place, layer), ratio in zip(own, again, oq, strict=True):
        read = norms.get(place)
        stream = torch.cat(read, dim=1).median(dim=1).values.tolist() if read else ()
        source.scores[settings] = PromptScores(layer.importance, ratio, stream)


@contextmanager
def _stream_norms(model: PreTrainedModel) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Norms of the hidden states that layers read meanwhile, [B, m] float32 of every forward, by the layer's number.

    ``output_hidden_states`` of transformers would leave its hooks in the model.
    """
    norms: dict[int, list[torch.Tensor]] = {}

    def hook(layer: int) -> Callable[..., None]:
        def take(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            norms.setdefault(layer, []).append(hidden.float().norm(dim=-1))

        return take

    # What holds the module that knows its number, the attention, is the layer.
    numbers = {
        name.rpartition(".")[0]: number
        for name, module in model.base_model.named_modules()
        if isinstance(number := getattr(module, "layer_idx", None), int)
    }
    handles = [
        model.base_model.get_submodule(name).register_forward_pre_hook(hook(number), with_kwargs=True)
        for name, number in numbers.items()
    ]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()
