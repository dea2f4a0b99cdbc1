"""Decoding steps of all layers of a kind at once.

A step is one call for all rows before the first layer computes, one call a layer, and one after the last layer:
:mod:`arkv.kernels.twin` says what each does. Between them only the attention's importance is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arkv import kernels
from arkv.config import CacheConfig
from arkv.grant import NEVER
from arkv.kernels import twin
from arkv.layer import TriStateLayer
from arkv.store import Store

SHORT = torch.iinfo(torch.int16).max
"""Tokens that can be seen until a position takes more than 16 bits."""


class Group:
    """Layers of one shape on one device, in the order in which they are computed, and the store of what they hold.

    Args:
        config: the settings of their cache.
        layers: layers that each hold a part, which goes into the store.
    """

    def __init__(self, config: CacheConfig, layers: Sequence[TriStateLayer]) -> None:
        self.config = config
        self.layers = list(layers)
        self.fused = config.attention == "fused"
        self.importance: list[torch.Tensor] = []
        self.pack()

    # -- a step --------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make room for one more token in all rows."""
        seen = self.layers[0].seen
        if any(now >= until for now, until in zip(seen, self.until, strict=True)):
            self.follow()
        rows, pools, tensors = self.store.rows, self.store.pools, self.store.tensors()
        recency = self.config.ranking == "recency"
        if self.fused:
            kernels.make_room(rows, tensors, self.formats, self.config.n_sink, self.config.recent, recency)
        else:
            twin.make_room(rows, pools, self.config.n_sink, self.config.recent, recency)
        self.importance = [] if recency else [torch.empty_like(pool.score) for pool in pools]

    def attend(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention output [B, 1, Hq, D] of the new token of layer ``index`` of the group."""
        rows, pools, layer = self.store.rows, self.store.pools, self.layers[index]
        first = index * self.store.layer_rows
        sizes = (self.config.n_sink, self.config.recent)
        if self.fused:
            output: torch.Tensor = kernels.attend(
                *(query, key, value, rows, first, self.store.tensors(), self.formats),
                *(*sizes, scaling, softcap, sinks, self.importance, self.store.widths),
            )
        else:
            output = twin.attend(
                query, key, value, rows, first, pools, *sizes, scaling, softcap, sinks, self.importance
            )
        layer.seen = [seen + 1 for seen in layer.seen]
        if index + 1 == len(self.layers) and self.importance:
            self._remember()
        return output

    def _remember(self) -> None:
        """Turn the attention of the step into scores."""
        kind = self.config.decode_importance
        rate = 0.0 if kind == "latest" else self.config.decode_rate
        sizes = (self.config.recent, rate, self.config.pool_width, kind == "largest")
        if self.fused:
            kernels.remember(self.store.rows, self.store.tensors(), self.formats, self.importance, *sizes)
        else:
            twin.remember(self.store.rows, self.store.pools, self.importance, *sizes)
        self.importance = []

    # -- what is held --------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Room has run out for the next token: give rows more slots, or other ones, as their budget has them."""
        for layer in self.layers:
            assert layer.grant is not None
            layer.take_out()
            if max(layer.seen) >= SHORT:
                layer.position_dtype = torch.int32
                layer.held().set_positions(torch.int32)
            if layer.grant.follow([seen + 1 for seen in layer.tokens_seen()]):
                layer.assign()
        self.pack()

    def pack(self) -> None:
        """Bring what all layers hold into one store, with as many slots as they will soon need."""
        parts, capacities = [], []
        for layer in self.layers:
            assert layer.part is not None
            parts.append(layer.part)
            assert layer.grant is not None
            capacities.append(layer.grant.capacities(layer.tokens_seen()))
            layer.part = None
        if not any(any(pools[1]) for pools in capacities):
            # Nothing becomes Quantized before room runs out: until then that pool would be empty.
            for part in parts:
                del part.pools[1:], part.counts[1:]
            capacities = [pools[:1] for pools in capacities]
        # So that steps can write in place, with and without inference mode.
        with torch.inference_mode(False), torch.no_grad():
            whole = [[slots for part in pool for slots in part] for pool in zip(*capacities, strict=True)]
            store = Store(parts, *self.layers[0].rows_seen(), whole)
        self.take(store)

    def take(self, store: Store) -> None:
        """Go on with ``store``."""
        self.store = store
        self.samples = len(self.layers[0].seen)
        self.formats = [self.config.quant_format] * (len(store.pools) - 1)
        for index, layer in enumerate(self.layers):
            layer.store, layer.index = store, index
        self.is_steady = all(min(self._holds(layer)) == NEVER for layer in self.layers)
        """No row will need other slots, however many tokens follow."""
        self.until = [min(each) for each in zip(*(self._until(layer) for layer in self.layers), strict=True)]

    def with_store(self, store: Store, layers: Sequence[TriStateLayer]) -> Group:
        """The same group of other layers, which ``store`` holds the tokens of."""
        twin = object.__new__(Group)
        twin.config, twin.layers, twin.fused, twin.importance = self.config, list(layers), self.fused, []
        twin.take(store)
        return twin

    def picked(self, samples: Sequence[int]) -> Store:
        """A store of only ``samples``, in that order."""
        heads = self.store.layer_rows // self.samples
        rows = [sample * heads + head for sample in samples for head in range(heads)]
        with torch.inference_mode(False), torch.no_grad():
            return self.store.select(rows)

    def _until(self, layer: TriStateLayer) -> list[int]:
        """Tokens that every sample of ``layer`` may have seen until its rows need other slots, padding included."""
        found = [tokens + padded for tokens, padded in zip(self._holds(layer), layer.padded, strict=True)]
        # Beyond the model's context a position can outgrow its number type, at the price of more bytes.
        return [min(tokens, SHORT) for tokens in found] if layer.position_dtype == torch.int16 else found

    def _holds(self, layer: TriStateLayer) -> list[int]:
        """The same without padding, whatever positions take."""
        assert layer.grant is not None
        begin = layer.index * self.store.layer_rows
        return layer.grant.until(self.store.capacities[0][begin : begin + self.store.layer_rows])


def join_stores(stores: Sequence[Store]) -> Store:
    """The rows of all ``stores`` in one."""
    with torch.inference_mode(False), torch.no_grad():
        return Store.join(stores)
