"""What the caches whose attention this library computes have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from arkv.config import ConfigError
from arkv.misuse import check_samples
from arkv.models import copy_layer, keeps_state, layers_of, select_samples, text_config


class OtherCacheNeeded(ConfigError, AttributeError):
    """A model asked its cache for something that only a cache of the model's own kind has."""


class HeldAs(NamedTuple):
    """What keys and values of a layer are like, whatever tokens and samples they are of."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} keys and values of {self.key_dim} and {self.value_dim} channels on {self.device}"


class WatchedCache(Cache):
    """Base of these caches: layers of our own where attention is full, transformers' everywhere else, and a look at
    whether every forward has reached all layers.

    Args:
        model: the model, or its config.
        make: makes a layer of our own.

    Raises:
        ConfigError: the model's layers cannot be compressed.
    """

    waiting = False
    """A layer has been handed keys and values, and their attention is still to come."""

    def __init__(self, model: PreTrainedModel | PreTrainedConfig, make: Callable[[], CacheLayerMixin]) -> None:
        self.model_config: Any = text_config(model)
        layers, stock = layers_of(model, make)
        super().__init__(layers=layers)
        self.stock = stock
        """transformers' cache of all that our layers do not keep."""
        self._counting = [index for index, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)]
        """Layers that count tokens: those with keys and values."""
        self._asked: set[tuple[str, int, int]] = set()
        """What the newest forward has come to: states, and layers with keys and values."""
        self._held_as: dict[int, HeldAs] = {}
        """Of each layer of our own that has taken keys and values."""

    def __getattr__(self, name: str) -> Any:
        # Not set yet in a cache that is being made.
        config = self.__dict__.get("model_config")
        raise OtherCacheNeeded(
            f"{type(self).__name__} has no {name!r}; if model {getattr(config, 'model_type', None)!r} asked for it, "
            "only a cache of the model's own kind serves it"
        )

    # -- samples, and what is transformers' ----------------------------------------------------------------------------

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep samples ``indices`` [B], in that order. Raises :class:`ValueError` for one that is not there."""
        check_samples(indices.tolist(), self._ours()[0].max_batch_size)
        for layer in self._ours():
            layer.batch_select_indices(indices)
        for layer in self.stock.layers:
            select_samples(layer, indices)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """The same (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample ``repeats`` times. Raises :class:`ValueError` for less than once."""
        if repeats < 1:
            raise ValueError(f"repeats={repeats}: give at least 1")
        batch = self._ours()[0].max_batch_size
        self.batch_select_indices(torch.arange(batch).repeat_interleave(repeats))

    def _ours(self) -> list[Any]:
        return [mine for mine, stock in zip(self.layers, self.stock.layers, strict=True) if mine is not stock]

    def _take_stock(self, stock: DynamicCache) -> None:
        """Go on with ``stock`` instead."""
        pairs = zip(self.layers, self.stock.layers, stock.layers, strict=True)
        self.layers = [new if mine is old else mine for mine, old, new in pairs]
        self.stock = stock

    def _of_stock(self, name: str) -> Any:
        """A method of :attr:`stock`; transformers 5.2 has none for states."""
        return getattr(self.stock, name, None) or self.__getattr__(name)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """State of a convolution."""
        self._ask("conv", layer_idx, state_idx)
        return self._of_stock("get_conv_state")(layer_idx, state_idx)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        """Go on with a convolution."""
        return self._of_stock("update_conv_state")(*args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        """State of a recurrence."""
        self._ask("recurrent", layer_idx, state_idx)
        return self._of_stock("get_recurrent_state")(layer_idx, state_idx)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        """Go on with a recurrence."""
        return self._of_stock("update_recurrent_state")(*args, **kwargs)

    def has_previous_state(self, *args: Any, **kwargs: Any) -> Any:
        """Whether a layer with a state has one."""
        return self._of_stock("has_previous_state")(*args, **kwargs)

    # -- keys and values that fit --------------------------------------------------------------------------------------

    def check_place(self, layer_idx: int) -> None:
        """To be called before layer ``layer_idx`` is looked at. Raises :class:`ConfigError` where there is none."""
        if layer_idx >= len(self.layers):
            raise ConfigError(
                f"this cache was made for a model of {len(self.layers)} layers, and the one that uses it has more: "
                "make a cache for each model"
            )

    def check_fits(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """To be called before a layer of our own takes keys and values [B, H, T, D].

        Raises:
            ConfigError: it holds those of another model, of other samples, of another precision or device.
        """
        layer: Any = self.layers[layer_idx]
        samples = layer.max_batch_size
        given = HeldAs(key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)
        if not samples:
            self._held_as[layer_idx] = given
            return
        held = self._held_as.setdefault(layer_idx, given)
        if (samples, held.heads) != key.shape[:2]:
            raise ConfigError(
                f"this cache holds {samples} samples with {held.heads} KV heads, and the model gives it keys of "
                f"{key.shape[0]} samples with {key.shape[1]}: make a cache for each model and batch"
            )
        if given != held:
            raise ConfigError(
                f"this cache holds {held}, and the model gives it {given}: make a cache for each model, precision and "
                "device"
            )

    # -- whole forwards ------------------------------------------------------------------------------------------------

    def check_whole(self, layer_idx: int) -> None:
        """To be called before layer ``layer_idx`` takes keys and values.

        Raises:
            RuntimeError: a forward begins, and some layers have seen tokens that others have not.
        """
        self._asked.add(("keys", layer_idx, 0))
        if layer_idx != self._counting[0]:
            return
        lengths = {self.layers[index].get_seq_length() for index in self._counting}
        # Into a cache that is still empty, nothing has been taken.
        if len(lengths) > 1 or (self.waiting and lengths != {0}):
            raise RuntimeError(_INTERRUPTED)

    def _ask(self, state: str, layer_idx: int, state_idx: int) -> None:
        """Note that a forward asks for a state, which it does once: states do not say how many tokens they have seen.

        Raises:
            RuntimeError: a forward begins, and the last one has not reached all layers.
        """
        asked = (state, layer_idx, state_idx)
        if asked in self._asked:
            states = (index for index, layer in enumerate(self.layers) if keeps_state(layer))
            last = max(*self._counting, *states)
            if max(index for _, index, _ in self._asked) < last:
                raise RuntimeError(_INTERRUPTED)
            self._asked = set()
        self._asked.add(asked)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[no-untyped-call]
        self.waiting, self._asked, self._held_as = False, set(), {}
        # transformers' layers put zeros in the place of what they hold, and go on from these.
        self._take_stock(DynamicCache(config=self.model_config))
        for index in self._counting:
            layer = self.layers[index]
            layer.keys = layer.values = None
            layer.is_initialized = False


def copy_stock(cache: DynamicCache) -> DynamicCache:
    """A copy of a cache of transformers that can go its own way."""
    twin: DynamicCache = object.__new__(type(cache))
    twin.__dict__.update(cache.__dict__, layers=[copy_layer(layer) for layer in cache.layers])
    return twin


_INTERRUPTED = (
    "the last forward through this cache was interrupted, or was of a model with fewer layers, so that not all of its "
    "layers have seen the same tokens: reset() the cache, or make it anew, and begin with the prompt"
)
