"""The tri-state cache: each token is Original, Quantized or Evicted, per layer and KV head.

Letters: ``B`` batch, ``Hq`` query heads, ``H`` KV heads, ``G = Hq / H``, ``T`` tokens of one forward, ``S`` slots,
``D`` head dim, ``W`` window, ``C`` cache size.

A layer stores two pools of slots, each in no order. Slots are allocated once; a decoding step writes only the entries
that change: of the Original tokens outside the window, the least important is quantized into the place of the least
important Quantized token, which is gone, and the new token takes its slot. Attention does not depend on the order of
keys, so no entry ever moves; :meth:`TriStateLayer.reconstruct` gives the contiguous cache in sequence order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from arkv.attention import LazyMask
from arkv.budget import ByteBudget, Geometry, Slots, byte_slots, oq_ratios, token_limit, token_slots
from arkv.config import CacheConfig, ConfigError
from arkv.memory import storage_bytes
from arkv.scoring import causal_visibility, pool, prefill_statistics, window_attention
from arkv.storage import CLOSED, EMPTY, QuantizedPool, Tokens

GROWTH = 64
"""Slots that an Original pool below its budget grows by."""


class States(NamedTuple):
    """What a layer holds of one sample: ``position`` [H, n] int32 (-1 where a head holds fewer) in ascending order and
    ``quantized`` [H, n] bool."""

    position: torch.Tensor
    quantized: torch.Tensor


class LayerHandle(NamedTuple):
    """What a model receives in the place of keys and values."""

    cache: TriStateCache
    layer_idx: int

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> torch.Tensor:
        """Attention output [B, T, Hq, D] of ``query`` [B, Hq, T, D]."""
        return self.cache.attend(self.layer_idx, module, query, mask, scaling, **kwargs)


class TriStateLayer(CacheLayerMixin):
    """One layer of a :class:`TriStateCache`, behind the layer interface of transformers' ``Cache``."""

    is_compileable = False
    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, config: CacheConfig, context_length: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.config = config
        self.context_length = context_length
        # Positions take as few bytes as do their work; short ones also sort faster.
        short = context_length is not None and context_length <= torch.iinfo(torch.int16).max
        self.position_dtype = torch.int16 if short else torch.int32
        self.seen = 0
        self.padded: list[int] = []
        """Padding tokens before each sample."""
        self.oq: list[float] = []
        """OQ score of each sample, from the first forward."""
        self.limits: list[int] = []
        """Tokens of each sample that the budget holds while all are Original."""
        self.slots: list[Slots] = []
        """Slots of each sample beside the window, in force once it has outgrown its limit."""
        self.outgrown: list[bool] = []
        self.tokens: Tokens | None = None
        self.quantized: QuantizedPool | None = None
        self.used = 0
        """Original slots in use, counted from the first."""
        self.gaps = False
        """Some slots in use may be without a token, so that attention needs a mask."""
        self.order: torch.Tensor | None = None
        """[B, H, S] all slots in sequence order, Quantized ones numbered after the Original ones; None: not known."""
        self.incoming: tuple[torch.Tensor, torch.Tensor] | None = None
        """Keys and values that wait for their queries."""

    # -- transformers' layer interface ---------------------------------------------------------------------------------

    @property
    def max_batch_size(self) -> int:
        """Batch size, 0 before the first forward."""
        return len(self.padded)

    batch_size = max_batch_size

    def get_seq_length(self) -> int:
        """Tokens seen, not tokens held: position ids go on counting every token."""
        return self.seen

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of the mask as of a cache that held everything; each layer makes its own from it.

        transformers 5.2 passes the positions of the queries, later versions their number.
        """
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + new, 0

    def get_max_length(self) -> int:
        """-1: any number of tokens can be seen."""
        return -1

    get_max_cache_shape = get_max_length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: storage is made by the first forward, which knows what has to be kept."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take the keys and values [B, H, T, D] of one forward. A single token of a running sequence joins the window
        at once; several wait for their queries, which decide what stays."""
        if self.tokens is not None and key_states.shape[2] == 1:
            self._join(key_states, value_states)
        else:
            self.incoming = (key_states, value_states)
        return key_states, value_states

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.config, self.context_length)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep samples ``beam_idx`` [B], in that order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep samples ``indices``, in that order."""
        if self.tokens is None:
            return
        picked = indices.tolist()
        self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))
        self.padded = [self.padded[i] for i in picked]
        self.oq = [self.oq[i] for i in picked]
        self.limits = [self.limits[i] for i in picked]
        self.slots = [self.slots[i] for i in picked]
        self.outgrown = [self.outgrown[i] for i in picked]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample ``repeats`` times."""
        if self.tokens is not None:
            index = torch.arange(self.max_batch_size).repeat_interleave(repeats)
            self.batch_select_indices(index)

    def crop(self, max_length: int) -> None:
        """Not possible: what has been evicted or quantized cannot be brought back."""
        raise ValueError(
            "a tri-state cache cannot be cropped, since evicted tokens are gone: assisted generation and contrastive "
            "search need a full cache"
        )

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every stored tensor by ``function`` of it."""
        assert self.tokens is not None
        self.tokens = self.tokens.map(function)
        if self.quantized is not None:
            self.quantized.map(function)
        if self.order is not None:
            self.order = function(self.order)

    def fork(self) -> TriStateLayer:
        """A copy that can go its own way."""
        twin = TriStateLayer(self.config, self.context_length)
        twin.__dict__.update({key: list(v) if isinstance(v, list) else v for key, v in self.__dict__.items()})
        if twin.quantized is not None:
            twin.quantized = copy.copy(twin.quantized)
            twin.quantized.key, twin.quantized.value = copy.copy(twin.quantized.key), copy.copy(twin.quantized.value)
        if twin.tokens is not None:
            twin._map(torch.clone)
        return twin

    # -- what is held --------------------------------------------------------------------------------------------------

    def held(self) -> Tokens:
        """Slots of the Original pool in use."""
        assert self.tokens is not None
        return self.tokens.part(slice(self.used))

    def reconstruct(self) -> tuple[Tokens, torch.Tensor]:
        """The contiguous cache in sequence order, and where its tokens are stored.

        Returns:
            tokens, sorted by position, slots without a token (position -1) first; ``order`` [B, H, S]: the index of
            each in the Original slots in use followed by the Quantized slots.
        """
        parts = [self.held()]
        if self.quantized is not None:
            parts.append(self.quantized.dequantized(parts[0].key.dtype))
        merged = Tokens.concat(*parts)
        order = merged.position.argsort(dim=-1, stable=True)
        return merged.take(order), order

    def states(self, sample: int = 0) -> States:
        """Positions held of one sample and which of them are Quantized."""
        if self.tokens is None:
            empty = torch.empty(0, 0)
            return States(empty.int(), empty.bool())
        original = self.held().position[sample]
        parts = [original]
        if self.quantized is not None:
            parts.append(self.quantized.position[sample])
        position, order = torch.cat(parts, dim=-1).sort(dim=-1, stable=True)
        return States(position.int(), (order >= original.shape[-1]) & (position >= 0))

    # -- a forward of several tokens -----------------------------------------------------------------------------------

    def attend_block(
        self, module: torch.nn.Module, query: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> torch.Tensor:
        """Attention of a prompt, or of a further block of tokens: over all that is held and, causally, itself.

        The tokens stay in ``incoming`` until :meth:`measure` has scored them and :meth:`absorb` taken them in.
        """
        assert self.incoming is not None
        key, value = self.incoming
        if self.tokens is None:
            visible = mask.dense if isinstance(mask, LazyMask) else mask
        else:
            length = key.shape[2]
            stored, _ = self.reconstruct()
            key, value = torch.cat([stored.key, key], dim=2), torch.cat([stored.value, value], dim=2)
            padding = mask.padding if isinstance(mask, LazyMask) else None
            visible = self._visible(stored, length, length, padding)
            visible = visible.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        output, _ = sdpa_attention_forward(module, query, key, value, visible, scaling=scaling, **kwargs)
        return output

    def _visible(self, stored: Tokens | None, length: int, window: int, padding: torch.Tensor | None) -> torch.Tensor:
        """What the last ``window`` of ``length`` new tokens may see, [B, 1 or H, W, S + T], stored tokens first."""
        assert self.incoming is not None
        device = self.incoming[0].device
        block = causal_visibility(length, window, None if padding is None else padding[:, -length:], device)
        if stored is None:
            return block
        held = (stored.position >= 0).unsqueeze(2)
        batch, heads, _, slots = held.shape
        return torch.cat([held.expand(-1, -1, window, slots), block.expand(batch, heads, window, length)], dim=-1)

    def measure(self, query: torch.Tensor, scaling: float, padding: torch.Tensor | None) -> Tokens:
        """Score all tokens by the attention of the newest queries, and the layer by its first forward.

        Args:
            query: at least the last W queries of the incoming tokens, or all if there are fewer, [B, Hq, >=w, D].
            padding: [B, tokens seen and incoming], False where a token is padding.

        Returns:
            The incoming tokens with their scores.
        """
        assert self.incoming is not None
        config = self.config
        key, value = self.incoming
        batch, heads, length, _ = key.shape
        device = key.device
        self._check_positions(length)
        position = torch.arange(self.seen, self.seen + length, dtype=self.position_dtype, device=device)
        position = position.expand(batch, heads, length)
        if self.tokens is None:
            self.padded = [0] * batch
            self.outgrown = [False] * batch
        if padding is not None:
            self.padded = (~padding).sum(dim=1).tolist()
            position = position.masked_fill(~padding[:, None, -length:], -1)

        window = min(config.window_size, length)
        stored, order = (None, None) if self.tokens is None else self.reconstruct()
        if config.ranking == "heavy_hitter":
            keys = key if stored is None else torch.cat([stored.key, key], dim=2)
            # Without padding and stored tokens, queries see all keys before the window.
            alone = stored is None and padding is None
            visible = self._visible(stored, window if alone else length, window, padding)
            attention = window_attention(query[:, :, -window:], keys, scaling, visible)
            statistics = prefill_statistics(attention, heads, config, visible)
            if not self.oq:
                self.oq = statistics.oq_score(config.tau1, config.tau2, config.tau3).tolist()
            score = statistics.importance
            if config.value_norm:
                values = value if stored is None else torch.cat([stored.value, value], dim=2)
                score = score * values.float().norm(dim=-1)
        else:
            self.oq = self.oq or [0.0] * batch
            score = (position if stored is None else torch.cat([stored.position, position], dim=2)).float()
        if stored is not None and order is not None:
            old, score = score.split([stored.slots, length], dim=-1)
            self._update_scores(torch.empty_like(old).scatter_(2, order, old), length)
        self.incoming = None
        return Tokens(key, value, position, self._pin(score, position))

    def _pin(self, score: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Scores of new tokens, with attention sinks above all others and padding below."""
        if self.config.n_sink and self.seen < max(self.padded) + self.config.n_sink:
            first = torch.tensor(self.padded, device=score.device)[:, None, None]
            score = score.masked_fill(position < first + self.config.n_sink, float("inf"))
        return score.masked_fill(position < 0, EMPTY) if any(self.padded) else score

    def _check_positions(self, length: int) -> None:
        """Beyond the model's context a position can outgrow its number type, at the price of more bytes."""
        if self.position_dtype == torch.int16 and self.seen + length > torch.iinfo(torch.int16).max:
            self.position_dtype = torch.int32
            for store in (self.tokens, self.quantized):
                if store is not None:
                    store.position = store.position.int()

    def absorb(self, new: Tokens) -> None:
        """Fit the new tokens into the window and the budget."""
        self.is_initialized = True
        self.seen += new.slots
        self._assign(*self._split(new if self.tokens is None else Tokens.concat(self.held(), new)))

    def _split(self, tokens: Tokens) -> tuple[Tokens, Tokens]:
        """The window and what is outside of it."""
        if self.tokens is not None:
            tokens = tokens.take(tokens.position.argsort(dim=-1, stable=True))
        past = tokens.slots - min(self.seen, self.config.window_size)
        return tokens.part(slice(past, None)), tokens.part(slice(past))

    def _assign(self, window: Tokens, past: Tokens) -> None:
        """Choose the state of every past token: the most important stay Original, the next ones are quantized.

        Tokens that are Quantized already stay so or are evicted.
        """
        device = past.key.device
        self.order = None
        for sample, padded in enumerate(self.padded):
            self.outgrown[sample] |= self.seen - padded > self.limits[sample]
        slots = self._slots_now()
        originals = torch.tensor([s.original for s in slots], device=device)[:, None, None]
        total = torch.tensor([s.original + s.quantized for s in slots], device=device)[:, None, None]
        most_original, most_quantized = max(s.original for s in slots), max(s.quantized for s in slots)

        # Everything below is in order of importance: rank 0 is the most important token outside the window.
        count = past.slots
        score, order = past.score.masked_fill(past.position < 0, EMPTY).sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(count, device=device)
        joint = rank.expand_as(order)
        if self.quantized is not None:
            joint = joint + self._evict(self.quantized, score, total)
        kept = (score > EMPTY) & (joint < total)

        size = min(most_original, count)
        is_original = kept[..., :size] & (rank[:size] < originals)
        self.used = window.slots + size
        room = past.empty(min(self.config.window_size + most_original - self.used, GROWTH))
        self.tokens = Tokens.concat(window, past.take(order[..., :size]).only(is_original), room)
        places = torch.arange(self.tokens.slots, device=device) - self.config.window_size
        self.tokens.score.masked_fill_(places >= originals, CLOSED)
        self.gaps = any(self.padded) or not bool(is_original.all())

        if most_quantized:
            # The tokens that follow the Original ones in rank, up to as many as there can be slots.
            steps = min(most_quantized, count)
            nth = originals + rank[:steps]
            pick = nth.clamp(max=max(count - 1, 0)).expand(*order.shape[:2], steps)
            demoted = kept.gather(2, pick) & (nth < count)
            chosen = past.take(order.gather(2, pick)).only(demoted)
            self._demote(chosen, total - originals, most_quantized, Tokens.concat(window, past))

    def _slots_now(self) -> list[Slots]:
        """Slots of each sample: its budget, or room for everything until it has outgrown its limit."""
        return [
            slots if outgrown else Slots(limit - self.config.window_size, 0)
            for slots, outgrown, limit in zip(self.slots, self.outgrown, self.limits, strict=True)
        ]

    @staticmethod
    def _evict(stored: QuantizedPool, score: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Evict Quantized tokens that fall out of the best ``total`` of both pools.

        Args:
            score: of the Original tokens, descending, [B, H, n].

        Returns:
            How many Quantized tokens stand before each Original one, [B, H, n].
        """
        taken = stored.position >= 0
        own = stored.score.masked_fill(~taken, EMPTY)
        before = stored.slots - torch.searchsorted(own.sort(dim=-1).values, score.contiguous(), right=True)
        better = score.shape[-1] - torch.searchsorted(score.flip(-1).contiguous(), own.contiguous())
        stays = taken & (own.argsort(dim=-1, descending=True).argsort(dim=-1) + better < total)
        stored.position.masked_fill_(~stays, -1)
        return before

    def _demote(self, tokens: Tokens, budget: torch.Tensor, slots: int, like: Tokens) -> None:
        """Quantize ``tokens`` (position -1 is none) into free slots.

        Args:
            budget: Quantized slots of each sample, [B, 1, 1].
            slots: the largest of them.
            like: tokens that the coming ones will resemble.
        """
        number_format = self.config.number_format
        slots = -(-slots // number_format.slot_multiple) * number_format.slot_multiple
        here = torch.arange(slots, device=budget.device)
        # In sequence order neighbours share a group, and neighbouring keys are alike.
        last = torch.iinfo(tokens.position.dtype).max
        tokens = tokens.take(tokens.position.masked_fill(tokens.position < 0, last).argsort(dim=-1))
        fresh = QuantizedPool(number_format, Tokens.concat(tokens, tokens.empty(slots - tokens.slots)), like)
        if self.quantized is None:
            self.quantized = fresh
        else:
            if self.quantized.slots < slots:
                self.quantized.append(tokens.empty(slots - self.quantized.slots), like)
            # A sample that has had no Quantized token yet gets groups with ranges of its own.
            new = (self.quantized.position < 0).all(dim=2).all(dim=1)
            free = (self.quantized.position < 0) & (here < budget)
            target = free.int().sort(dim=-1, descending=True, stable=True).indices[..., : tokens.slots]
            nth = torch.arange(tokens.slots, device=budget.device)
            self.quantized.write(target, tokens, (tokens.position >= 0) & (nth < free.sum(dim=-1, keepdim=True)))
            self.quantized.replace_samples(new.nonzero().squeeze(1), fresh)
        taken = self.quantized.position >= 0
        score = self.quantized.score.masked_fill(~taken, EMPTY)
        self.quantized.score = score.masked_fill(~taken & (here >= budget), CLOSED)
        self.quantized.full = bool(taken.all())

    def reassign(self) -> None:
        """Choose states anew after a change of budget."""
        self._assign(*self._split(self.held()))

    # -- a decoding step -----------------------------------------------------------------------------------------------

    def _join(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write one new token [B, H, 1, D] into a slot that is free or that another token has to leave."""
        grown = [
            was or self.seen - padded >= limit
            for was, padded, limit in zip(self.outgrown, self.padded, self.limits, strict=True)
        ]
        if grown != self.outgrown:
            self.outgrown = grown
            self.reassign()
        self._check_positions(1)
        assert self.tokens is not None
        position = torch.full_like(self.tokens.position[:, :, :1], self.seen)
        score = position.float() if self.config.ranking == "recency" else torch.zeros_like(position, dtype=torch.float32)
        new = Tokens(key, value, position, self._pin(score, position))
        if self._grow():
            self.tokens.set_part(slice(self.used - 1, self.used), new)
        else:
            place = self._vacate()
            self.tokens.put(place, new)
        self.seen += 1

    def _grow(self) -> bool:
        """Take one more slot into use; returns whether it is free for the new token in all samples."""
        assert self.tokens is not None
        sizes = [self.config.window_size + slots.original for slots in self._slots_now()]
        if self.used >= max(sizes):
            return False
        if self.used == self.tokens.slots:
            self.tokens = Tokens.concat(self.tokens, self.tokens.empty(min(GROWTH, max(sizes) - self.used)))
        self.used += 1
        self.order = None
        if min(sizes) == max(sizes) and not self.gaps:
            return True
        closed = torch.tensor([size < self.used for size in sizes], device=self.tokens.score.device)
        self.tokens.score[:, :, self.used - 1].masked_fill_(closed[:, None], CLOSED)
        self.gaps = True
        return False

    def _vacate(self) -> torch.Tensor:
        """Find the Original slot for the new token, [B, H, 1]: quantize or evict the least important token outside the
        window, unless there is a slot without one."""
        assert self.tokens is not None
        score, position = self.tokens.score[:, :, : self.used], self.tokens.position[:, :, : self.used]
        inside = position > self.seen - self.config.window_size
        place = score.masked_fill(inside, CLOSED).argmin(dim=-1, keepdim=True)
        target = None
        if self.quantized is not None:
            demoted = self.tokens.take(place)
            least, target = self.quantized.score.min(dim=-1, keepdim=True)
            valid = demoted.score > least
            self.quantized.write(target, demoted, valid & (demoted.position >= 0) if self.gaps else valid)
            target = torch.where(valid, target + self.used, -1)
        if self.order is not None:
            self._reorder(place, target)
        return place

    def _reorder(self, place: torch.Tensor, target: torch.Tensor | None) -> None:
        """Keep :attr:`order` up to date when the new token takes an Original slot.

        Args:
            place: that slot, [B, H, 1].
            target: number of the Quantized slot that its former token takes, -1 if it is evicted; None: there are none.
        """
        assert self.order is not None
        order = self.order
        if target is None:
            gone = order == place
        else:
            gone = order == torch.where(target >= 0, target, place)
            order = torch.where((order == place) & (target >= 0), target.to(order.dtype), order)
        shift = gone.cumsum(dim=-1) + torch.arange(order.shape[-1], device=order.device)
        self.order = torch.cat([order, place.to(order.dtype)], dim=-1).gather(2, shift)

    def attend_step(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of one new token [B, Hq, 1, D] over all that is held; its probabilities are the new scores.

        Returns:
            Output [B, 1, Hq, D].
        """
        attend = self._attend_fused if self.config.attention == "fused" else self._attend_reconstructed
        batch, query_heads, _, dim = query.shape
        assert self.tokens is not None
        heads = self.tokens.key.shape[1]
        grouped = query.view(batch, heads, query_heads // heads, dim)
        output, probabilities = attend(grouped, scaling)
        if self.config.ranking == "heavy_hitter":
            self._update_scores(self._pooled(probabilities.mean(dim=2)), 1)
        return output.to(query.dtype).view(batch, 1, query_heads, output.shape[-1])

    def _attend_fused(self, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, H, G, D] and probabilities [B, H, G, S] of ``query`` [B, H, G, D], on the storage as it is.

        Products are taken in float32: a bfloat16 product would round the logits to 8 bits.
        """
        assert self.tokens is not None
        batch, heads, group, _ = query.shape
        count = self.used
        query = (query.float() * scaling).flatten(0, 1)
        key, value = (tensor.flatten(0, 1)[:, :count].float() for tensor in (self.tokens.key, self.tokens.value))
        logits = torch.bmm(query, key.transpose(1, 2))
        if self.gaps:
            missing = self.tokens.position[:, :, :count].flatten(0, 1) < 0
            logits = logits.masked_fill(missing.unsqueeze(1), EMPTY)
        stored = self.quantized
        if stored is None:
            probabilities = logits.softmax(dim=-1)
            output = torch.bmm(probabilities, value)
        else:
            low = stored.key.dot(query)
            if not stored.full:
                low = low.masked_fill((stored.position < 0).flatten(0, 1).unsqueeze(1), EMPTY)
            probabilities = torch.cat([logits, low], dim=-1).softmax(dim=-1)
            output = torch.bmm(probabilities[..., :count], value) + stored.value.weigh(probabilities[..., count:])
        return output.view(batch, heads, group, -1), probabilities.view(batch, heads, group, -1)

    def _attend_reconstructed(self, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as :meth:`_attend_fused` on the reconstructed contiguous cache: slower, and easy to believe."""
        tokens, order = self.reconstruct()
        logits = (query.float() @ tokens.key.float().transpose(-1, -2)) * scaling
        probabilities = logits.masked_fill((tokens.position < 0).unsqueeze(2), EMPTY).softmax(dim=-1)
        output = probabilities @ tokens.value.float()
        order = order.unsqueeze(2).expand_as(probabilities)
        return output, torch.empty_like(probabilities).scatter_(3, order, probabilities)

    def _pooled(self, importance: torch.Tensor) -> torch.Tensor:
        """Pool the newest attention [B, H, S], in place, over neighbouring tokens of the evictable region, as at prefill.

        The region is what can leave at the next step: all but the window, and the token that leaves it next.
        """
        config = self.config
        inside = config.window_size - 1
        if config.decode_importance != "latest" or config.pool_width == 1 or self.seen <= inside:
            return importance
        order = self.order
        if order is None:
            assert self.tokens is not None
            parts = [self.tokens.position[:, :, : self.used]]
            if self.quantized is not None:
                parts.append(self.quantized.position)
            order = (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]).argsort(dim=-1)
            full = self.used == max(config.window_size + slots.original for slots in self._slots_now())
            if full and not self.gaps and (self.quantized is None or self.quantized.full):
                # From now on every slot is taken, and a step changes the order by one token.
                self.order = order.to(self.position_dtype)
        region = order[..., : order.shape[-1] - inside].long()
        return importance.scatter_(2, region, pool(importance.gather(2, region), config.pool_width))

    def _update_scores(self, importance: torch.Tensor, steps: int) -> None:
        """Bring the scores of all stored tokens up to date with ``importance`` [B, H, S] of ``steps`` new queries."""
        assert self.tokens is not None
        count = importance.shape[-1] - (0 if self.quantized is None else self.quantized.slots)
        stores = [(self.tokens.score[:, :, :count], importance[..., :count])]
        if self.quantized is not None:
            stores.append((self.quantized.score, importance[..., count:]))
        keep = (1.0 - self.config.decode_rate) ** steps
        # Infinite scores mark sinks, empty and closed slots, and stay.
        finite = not (self.gaps or self.config.n_sink) and (self.quantized is None or self.quantized.full)
        for score, new in stores:
            if self.config.decode_importance == "mean":
                score.mul_(keep).add_(new, alpha=1.0 - keep)
            else:
                score.copy_(new if finite else torch.where(score.isinf(), score, new))


class TriStateCache(Cache):
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
        self._last = max(index for index, layer in enumerate(self.layers) if isinstance(layer, TriStateLayer))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Take the new keys and values [B, H, T, D] of a layer; returns what the attention function needs, twice."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, TriStateLayer):
            return layer.update(key_states, value_states, *args, **kwargs)
        layer.update(key_states, value_states)
        handle = LayerHandle(self, layer_idx)
        return handle, handle

    def attend(
        self, layer_idx: int, module: torch.nn.Module, query: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> torch.Tensor:
        """Attention output [B, T, Hq, D] of layer ``layer_idx`` for ``query`` [B, Hq, T, D]."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, TriStateLayer)
        if layer.incoming is None:
            return layer.attend_step(query, scaling)
        output = layer.attend_block(module, query, mask, scaling, **kwargs)
        self._absorb(layer_idx, query, scaling, mask.padding if isinstance(mask, LazyMask) else None)
        return output

    def _absorb(self, layer_idx: int, query: torch.Tensor, scaling: float, padding: torch.Tensor | None) -> None:
        """Compress layer ``layer_idx`` as soon as it has been computed."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, TriStateLayer)
        first = layer.tokens is None
        tokens = layer.measure(query, scaling, padding)
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
            layer.slots = [
                token_slots(self.config, limit, sample[index])
                for limit, sample in zip(layer.limits, ratios, strict=True)
            ]
            if any(layer.outgrown):
                layer.reassign()

    def _share_bytes(self, layer: TriStateLayer, tokens: Tokens) -> None:
        """Byte budgets: the layer gets its share of what the layers before it have left."""
        slot_bytes = tokens.position.element_size() + tokens.score.element_size()
        if tokens.value.shape[-1] != tokens.key.shape[-1]:
            raise ConfigError("budget_unit='bytes': keys and values of different width are not counted; use 'tokens'")
        geometry = Geometry(tokens.key.shape[-1], tokens.key.dtype, slot_bytes)
        lengths = [tokens.slots - padded for padded in layer.padded]
        if self._budgets is None:
            count = sum(isinstance(item, TriStateLayer) for item in self.layers)
            self._budgets = [ByteBudget(self.config, geometry, count, length) for length in lengths]
        granted = [budget.next_layer(score) for budget, score in zip(self._budgets, layer.oq, strict=True)]
        layer.limits = [budget // geometry.original_bytes for budget in granted]
        layer.slots = [
            byte_slots(self.config, geometry, budget, length) for budget, length in zip(granted, lengths, strict=True)
        ]

    def reset(self) -> None:
        """Forget everything."""
        self._budgets = None
        super().reset()  # type: ignore[no-untyped-call]

    def fork(self) -> TriStateCache:
        """A copy that can go its own way: several continuations of one prefill."""
        twin = TriStateCache.__new__(TriStateCache)
        twin.__dict__.update(self.__dict__)
        twin.layers = [
            layer.fork() if isinstance(layer, TriStateLayer) else _copy_layer(layer) for layer in self.layers
        ]
        return twin

    @classmethod
    def from_prefill(cls, prefill: PrefillCache, config: CacheConfig) -> TriStateCache:
        """Compress what ``prefill`` holds, which stays as it is: one prefill serves any number of caches.

        Raises:
            ConfigError: the window is larger than the number of queries that ``prefill`` recorded.
        """
        if config.window_size > prefill.window_size:
            raise ConfigError(
                f"window_size={config.window_size}: the prefill recorded {prefill.window_size} queries; record as many"
            )
        cache = cls(prefill.model_config, config)
        for layer_idx, (source, layer) in enumerate(zip(prefill.layers, cache.layers, strict=True)):
            if isinstance(source, PrefillLayer):
                layer.update(*source.states())
                cache._absorb(layer_idx, source.queries, source.scaling, source.padding)
            else:
                cache.layers[layer_idx] = _copy_layer(source)
        return cache

    def nbytes(self) -> int:
        """Bytes of all storage that the cache holds: keys, values, scales, positions and scores."""
        return storage_bytes(self.layers)

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

    def __init__(self, window_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window_size = window_size
        self.queries: torch.Tensor = torch.empty(0)
        self.scaling = 1.0
        self.padding: torch.Tensor | None = None

    def _pick(self, indices: torch.Tensor) -> None:
        """The queries and padding of samples ``indices``."""
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


class _PrefillHandle(NamedTuple):
    """What a model receives in the place of keys and values during a recorded prefill."""

    layer: PrefillLayer

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> torch.Tensor:
        """Plain attention; the newest queries are kept."""
        layer = self.layer
        kept = query[:, :, -layer.window_size :]
        if layer.queries.numel() and kept.shape[2] < layer.window_size:
            kept = torch.cat([layer.queries, kept], dim=2)[:, :, -layer.window_size :]
        layer.queries = kept.clone()
        layer.scaling = scaling
        layer.padding = mask.padding if isinstance(mask, LazyMask) else None
        dense = mask.dense if isinstance(mask, LazyMask) else mask
        output, _ = sdpa_attention_forward(module, query, *layer.states(), dense, scaling=scaling, **kwargs)
        return output


class PrefillCache(Cache):
    """Everything that a prompt leaves, kept once and compressed by any number of methods.

    A prompt may come in chunks. ``window_size`` is the largest window that a method may use.
    """

    def __init__(self, model: PreTrainedModel | PreTrainedConfig, window_size: int = 32) -> None:
        self.model_config: Any = getattr(model, "config", model)
        self.window_size = window_size
        super().__init__(layers=_layers(model, lambda: PrefillLayer(window_size)))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Take the new keys and values of a layer; returns what the attention function needs, twice."""
        layer = self.layers[layer_idx]
        plain = layer.update(key_states, value_states, *args, **kwargs)
        if not isinstance(layer, PrefillLayer):
            return plain
        handle = _PrefillHandle(layer)
        return handle, handle

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
