"""The tri-state cache: each token is Original, Quantized or Evicted, per layer and KV head.

Letters: ``B`` batch, ``Hq`` query heads, ``H`` KV heads, ``T`` tokens of one forward, ``D`` head dim, ``W`` window,
``C`` cache size. :mod:`arkv.store` says how tokens are stored, :mod:`arkv.states` which state each gets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from arkv.allocators import Allocator, JointAllocator, LayerScores
from arkv.attention import Handle, attach, dense_of, padding_of, refuse_gradients
from arkv.blocks import attend_block
from arkv.budget import Geometry
from arkv.config import CacheConfig, ConfigError
from arkv.layer import TriStateLayer
from arkv.memory import storage_bytes
from arkv.misuse import check_config, check_samples
from arkv.models import keeps_state, text_config
from arkv.parts import Block
from arkv.prefill import PrefillCache, PrefillLayer, check_prefill
from arkv.scores import PromptScores, oq_ratios
from arkv.steps import Group, join_stores
from arkv.store import Store, row_table_bytes
from arkv.threshold import allocator_of
from arkv.watched import WatchedCache, copy_stock


class LayerHandle(Handle):
    """The handle of one layer of a :class:`TriStateCache`."""

    def __init__(self, cache: TriStateCache, layer_idx: int) -> None:
        self.cache = cache
        self.config = cache.model_config
        self.layer_idx = layer_idx

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> torch.Tensor:
        """Attention output [B, T, Hq, D] of ``query`` [B, Hq, T, D]."""
        output: torch.Tensor = self.cache.attend(self.layer_idx, module, query, mask, scaling, **kwargs)
        return output


class TriStateCache(WatchedCache):
    """A KV cache in which each token is Original, Quantized or Evicted (ARKV, arXiv 2603.08727).

    >>> config = CacheConfig.for_method("mix", cache_size=512)
    >>> with attach(model):                                                     # doctest: +SKIP
    ...     model.generate(**inputs, past_key_values=TriStateCache(model, config))

    Layers without full attention (a sliding window of their own, a recurrence, a convolution) keep transformers' layer.

    Args:
        model: the model, or its config.
        config: settings, see :class:`CacheConfig`.
        allocator: what shares the budget among layers and KV heads; None: as ``config`` says.

    Raises:
        ConfigError: the model's layers cannot be compressed.
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        config: CacheConfig,
        allocator: Allocator | JointAllocator | None = None,
    ) -> None:
        check_config(config)
        self.config = config
        context = getattr(text_config(model), "max_position_embeddings", None)
        super().__init__(model, lambda: TriStateLayer(config, context))
        self._own = [index for index, layer in enumerate(self.layers) if isinstance(layer, TriStateLayer)]
        """Layers that are compressed, in the order in which they are computed."""
        self._given = allocator
        self._start_over()

    def _start_over(self) -> None:
        self.allocator = self._given
        if self.allocator is None:
            self.allocator = allocator_of(self.config, len(self._own))
        self._groups: list[Group] = []
        self._group_of: dict[int, tuple[Group, int]] = {}
        self._incoming: tuple[torch.Tensor, torch.Tensor] | None = None
        """Keys and values that wait for their queries."""
        self._blocks: list[tuple[TriStateLayer, Block, LayerScores]] = []
        """Layers of a prompt that wait for others to be computed."""

    @property
    def own_layers(self) -> list[TriStateLayer]:
        """The layers that are compressed."""
        return [layer for layer in self.layers if isinstance(layer, TriStateLayer)]

    def _own_layer(self, layer_idx: int) -> TriStateLayer:
        layer = self.layers[layer_idx]
        assert isinstance(layer, TriStateLayer)
        return layer

    @property
    def is_compileable(self) -> bool:
        """Whether steps go on as they are: with the same shapes, and without a look at what the device has computed."""
        return bool(self._groups) and all(group.is_steady for group in self._groups)

    # -- a forward, as the model sees it -------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Take the new keys and values [B, H, T, D] of a layer; returns what the attention function needs, twice.

        Raises:
            RuntimeError: the forward before this one did not reach all layers.
            ConfigError: the cache is of another model, or of other samples.
        """
        self.check_whole(layer_idx)
        self.check_place(layer_idx)
        layer = self.layers[layer_idx]
        if not isinstance(layer, TriStateLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        self.check_fits(layer_idx, key_states, value_states)
        self._incoming, self.waiting = (key_states, value_states), True
        handle = LayerHandle(self, layer_idx)
        return handle, handle

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(
        self,
        layer_idx: int,
        module: torch.nn.Module,
        query: torch.Tensor,
        mask: Any,
        scaling: float,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention output [B, T, Hq, D] of layer ``layer_idx`` for ``query`` [B, Hq, T, D]."""
        assert self._incoming is not None
        key, value = self._incoming
        layer = self._own_layer(layer_idx)
        if self._groups and key.shape[2] == 1:
            output = self._step(layer_idx, query, key, value, scaling, softcap or 0.0, s_aux)
            if layer.cut or query.requires_grad:
                output = refuse_gradients(output, query)
        else:
            padding = padding_of(mask, key.shape[2])
            stored = None if layer.is_empty else layer.reconstruct()
            output = attend_block(
                *(module, query, key, value, stored, padding),
                lambda: dense_of(mask),
                *(scaling, softcap, s_aux),
                **kwargs,
            )
            if layer.cut:
                output = refuse_gradients(output)
            layer.cut |= key.requires_grad
            with torch.no_grad():
                # What is stored and scored takes no part in gradients.
                self._absorb(layer_idx, key.detach(), value.detach(), query.detach(), scaling, padding, stored)
        self._incoming, self.waiting = None, False
        return output

    def _step(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """One new token of a layer."""
        group, index = self._group_of[layer_idx]
        with torch.no_grad():
            if index == 0:
                group.begin()
            return group.attend(index, query, key, value, scaling, softcap, sinks)

    def _absorb(
        self,
        layer_idx: int,
        key: torch.Tensor,
        value: torch.Tensor,
        query: torch.Tensor,
        scaling: float,
        padding: torch.Tensor | None,
        stored: Any,
        scores: PromptScores | None = None,
    ) -> None:
        """Compress layer ``layer_idx`` as soon as it has been computed."""
        layer = self._own_layer(layer_idx)
        assert self.allocator is not None
        first, last = layer.is_empty, layer_idx == self._own[-1]
        if not first:
            layer.take_out()
        block = layer.measure(key, value, query, scaling, padding, stored, scores)
        ready = [(layer, block)]
        if first:
            ready = self._granted(layer, block, last)
        for each, tokens in ready:
            each.absorb(tokens)
        if last:
            self._pack(first)

    def _granted(self, layer: TriStateLayer, block: Block, last: bool) -> list[tuple[TriStateLayer, Block]]:
        """The layers whose budget is known now that ``layer`` has been computed, with their prompts."""
        if layer is self.own_layers[0]:
            self._blocks = []
        lengths = [block.key.shape[2] - padded for padded in layer.padded]
        importance = block.tokens.score.view(block.key.shape[:3])
        geometry = self._geometry(layer, block.key, block.value)
        known = LayerScores(importance, layer.oq, lengths, layer.heads, geometry, block.stream)
        self._blocks.append((layer, block, known))
        if not isinstance(self.allocator, JointAllocator):
            assert self.allocator is not None
            grants = [self.allocator.layer(known)]
        elif last:
            grants = self.allocator.grants([scores for _, _, scores in self._blocks])
        else:
            return []
        ready, self._blocks = self._blocks, []
        for (each, tokens, _), grant in zip(ready, grants, strict=True):
            each.grant = grant
            each.begin(tokens)
        return [(each, tokens) for each, tokens, _ in ready]

    def _geometry(self, layer: TriStateLayer, key: torch.Tensor, value: torch.Tensor) -> Geometry:
        """Sizes of one KV head, which the format must be able to store."""
        if self.config.quantizes:
            try:
                self.config.number_format.check(key.shape[-1], value.shape[-1])
            except ValueError as error:
                raise ConfigError(f"quant_format={self.config.quant_format!r}: {error}") from None
        slot_bytes = layer.position_dtype.itemsize + torch.float32.itemsize
        row_bytes = row_table_bytes(2 if self.config.quantizes else 1)
        return Geometry(key.shape[-1], value.shape[-1], key.dtype, slot_bytes, row_bytes)

    def _pack(self, first: bool) -> None:
        """All layers have been computed: bring what they hold together."""
        layers = self.own_layers
        assert self.allocator is not None
        if first and self.allocator.settle(
            [layer.oq for layer in layers], [layer.grant for layer in layers if layer.grant is not None]
        ):
            for layer in layers:
                if layer.grant is not None and any(map(any, layer.grant.outgrown)):
                    layer.assign()
        self._groups, self._group_of = [], {}
        alike: dict[Any, list[int]] = {}
        for index in self._own:
            part = self._own_layer(index).part
            assert part is not None
            pool = part.pools[0]
            codes = (pool.key.codes, pool.value.codes)
            kind = (codes[0].device, *((item.dtype, item.shape[1]) for item in codes), len(part.counts[0]))
            alike.setdefault(kind, []).append(index)
        for members in alike.values():
            group = Group(self.config, [self._own_layer(index) for index in members])
            self._groups.append(group)
            self._group_of.update({index: (group, place) for place, index in enumerate(members)})

    # -- samples and copies --------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything."""
        self._start_over()
        super().reset()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep samples ``indices``, in that order."""
        super().batch_select_indices(indices)
        for group in self._groups:
            group.take(group.picked(indices.tolist()))

    def fork(self, sample: int | None = None) -> TriStateCache:
        """A copy that can go its own way: several continuations of one prefill. ``sample``: a copy of this one only.

        Raises:
            ValueError: there is no such sample.
        """
        twin = object.__new__(TriStateCache)
        twin.__dict__.update(self.__dict__)
        twin.layers = [layer.fork() if isinstance(layer, TriStateLayer) else layer for layer in self.layers]
        twin._take_stock(copy_stock(self.stock))
        twin._asked, twin._held_as = set(self._asked), dict(self._held_as)
        if sample is None:
            twin._regroup([group.store.clone() for group in self._groups])
            return twin
        WatchedCache.batch_select_indices(twin, torch.tensor([sample]))
        twin._regroup([group.picked([sample]) for group in self._groups])
        return twin

    @staticmethod
    def can_stack(caches: Sequence[Cache]) -> bool:
        """Whether :meth:`stack` takes them: of equal settings, behind prompts, of layers with full attention only."""
        alike = {cache._stacked_as() if isinstance(cache, TriStateCache) else None for cache in caches}
        return len(alike) == 1 and None not in alike

    def _stacked_as(self) -> tuple[Any, ...] | None:
        """What caches that can be stacked have in common; None: this one cannot be."""
        if not self._groups or len(self._own) < len(self.layers) or any(map(keeps_state, self.stock.layers)):
            return None
        # While a cache has not outgrown its budget it has fewer pools.
        return (self.config, *self._held_as.values(), *(len(group.store.pools) for group in self._groups))

    @classmethod
    def stack(cls, caches: Sequence[TriStateCache]) -> TriStateCache:
        """One cache of the samples of all ``caches``, which stay as they are: then a step is one call a layer for all.
        Samples may have seen different numbers of tokens: see :meth:`position_ids`.

        Raises:
            ValueError: not :meth:`can_stack`.
        """
        if not cls.can_stack(caches):
            raise ValueError(
                "caches can be stacked behind prompts, of equal settings, and where all layers have full attention"
            )
        whole = object.__new__(TriStateCache)
        whole.__dict__.update(caches[0].__dict__)
        whole.layers = [TriStateLayer.join(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)]
        stores = zip(*([group.store for group in cache._groups] for cache in caches), strict=True)
        whole._regroup([join_stores(each) for each in stores])
        return whole

    def position_ids(self) -> torch.Tensor:
        """Position [B, 1] of the next token of every sample."""
        layer = self.own_layers[0]
        return torch.tensor([[seen - padded] for seen, padded in zip(layer.seen, layer.padded, strict=True)])

    def _regroup(self, stores: Sequence[Store]) -> None:
        """Groups as there are, of the layers that this cache has now, with other stores."""
        before, places = self._groups, {id(group): group for group in self._groups}
        members: dict[int, list[int]] = {key: [] for key in places}
        for index, (group, _) in self._group_of.items():
            members[id(group)].append(index)
        self._groups, self._group_of = [], {}
        for old, store in zip(before, stores, strict=True):
            indices = members[id(old)]
            group = old.with_store(store, [self._own_layer(index) for index in indices])
            self._groups.append(group)
            self._group_of.update({index: (group, place) for place, index in enumerate(indices)})

    @classmethod
    def from_prefill(
        cls, prefill: PrefillCache, config: CacheConfig, allocator: Allocator | JointAllocator | None = None
    ) -> TriStateCache:
        """Compress what ``prefill`` holds, which stays as it is: one prefill serves any number of caches.

        Raises:
            ConfigError: it is of another kind, or the scores need more queries than it recorded.
        """
        check_prefill(prefill)
        prefill.check(config)
        cache = cls(prefill.model_config, config, allocator)
        cache._take_stock(copy_stock(prefill.stock))
        cache._asked, cache._held_as = set(prefill._asked), dict(prefill._held_as)
        for layer_idx, (source, layer) in enumerate(zip(prefill.layers, cache.layers, strict=True)):
            if isinstance(source, PrefillLayer) and isinstance(layer, TriStateLayer):
                key, value = source.states()
                scores = source.scores.get(config.scoring)
                recorded = (source.queries, source.scaling, source.padding)
                cache._absorb(layer_idx, key, value, *recorded, None, scores)
        return cache

    # -- what is held --------------------------------------------------------------------------------------------------

    def nbytes(self) -> int:
        """Bytes of all storage that the cache holds: keys, values, scales, positions and scores."""
        return storage_bytes(self)

    def oq_ratios(self, sample: int = 0) -> list[float]:
        """OQ ratio of each compressible layer for one sample, as far as layers have been computed. Raises
        :class:`ValueError` for a sample that is not there."""
        layers = [layer for layer in self.own_layers if layer.oq]
        for layer in layers[:1]:
            check_samples([sample], len(layer.oq))
        scores = [layer.oq[sample] for layer in layers]
        return oq_ratios(scores) if scores else []

    def token_counts(self, sample: int = 0) -> dict[str, float]:
        """Tokens ``original``, ``quantized``, ``evicted`` of a sample, mean over compressible layers and KV heads.
        Raises :class:`ValueError` for a sample that is not there."""
        layers = [layer for layer in self.own_layers if not layer.is_empty]
        if not layers:
            return {"original": 0.0, "quantized": 0.0, "evicted": 0.0}
        check_samples([sample], len(layers[0].seen))
        seen = layers[0].seen[sample] - layers[0].padded[sample]
        found = dict.fromkeys(("original", "quantized", "evicted"), 0.0)
        for layer in layers:
            original, *rungs = (int(pool.sum()) for pool in layer.counts(sample))
            # Whole numbers as long as can be: what nobody has evicted is 0 to the last digit.
            counts = (original, sum(rungs), seen * layer.heads - original - sum(rungs))
            for state, count in zip(found, counts, strict=True):
                found[state] += count / layer.heads
        return {state: count / len(layers) for state, count in found.items()}


@contextlib.contextmanager
def compress(model: PreTrainedModel, config: CacheConfig) -> Iterator[TriStateCache]:
    """A new cache for ``model``, which can read it until the end of the block.

    >>> with compress(model, config) as cache:                                  # doctest: +SKIP
    ...     model.generate(**inputs, past_key_values=cache)
    """
    with attach(model):
        yield TriStateCache(model, config)
