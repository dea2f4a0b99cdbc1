"""The tri-state cache: each token is Original, Quantized or Evicted, per layer and KV head.

Letters: ``B`` batch, ``Hq`` query heads, ``H`` KV heads, ``G = Hq / H``, ``T`` tokens of one forward, ``S`` slots,
``D`` head dim, ``W`` window, ``C`` cache size.

A layer stores two pools of slots. The Original pool begins with the window, a ring in which the token at position ``p``
sits in slot ``p mod W``; the other slots hold past tokens in no order. Slots are allocated once; a decoding step writes
only the entries that change: the new token takes the slot of the one that leaves the window, that one takes the place
of the least important Original token, which is quantized into the place of the least important Quantized token, which is
gone. Attention does not depend on the order of keys, so no entry ever moves; :meth:`TriStateLayer.reconstruct` gives the
contiguous cache in sequence order.

A slot without a token has position -1 and the score -inf (the next token may take it) or +inf (it is closed, since
another sample of the batch has the larger budget). Attention sinks have the score +inf and a position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from arkv.attention import LazyMask
from arkv.budget import Slots, token_slots
from arkv.config import CacheConfig, ConfigError
from arkv.memory import storage_bytes
from arkv.quantization import FORMATS, Format, Quantized
from arkv.scoring import causal_visibility, pool, prefill_statistics, window_attention

GROWTH = 64
"""Slots that an Original pool below its budget grows by."""


class Tokens(NamedTuple):
    """Original tokens: ``key`` and ``value`` [B, H, S, D], ``position`` (int32, -1 is none) and ``score`` [B, H, S]."""

    key: torch.Tensor
    value: torch.Tensor
    position: torch.Tensor
    score: torch.Tensor

    def __getitem__(self, index: Any) -> Tokens:  # type: ignore[override]
        """The tokens of a slice of slots."""
        return Tokens(*(tensor[:, :, index] for tensor in self.tensors()))

    def tensors(self) -> Iterator[torch.Tensor]:
        """The four tensors."""
        return tuple.__iter__(self)

    def take(self, index: torch.Tensor) -> Tokens:
        """Gather slots ``index`` [B, H, n]."""
        wide = index.unsqueeze(-1).expand(-1, -1, -1, self.key.shape[-1])
        return Tokens(
            self.key.gather(2, wide),
            self.value.gather(2, wide),
            self.position.gather(2, index),
            self.score.gather(2, index),
        )

    def put(self, index: torch.Tensor, tokens: Tokens) -> None:
        """Write ``tokens`` into slots ``index`` [B, H, n], in place."""
        wide = index.unsqueeze(-1).expand(-1, -1, -1, self.key.shape[-1])
        self.key.scatter_(2, wide, tokens.key)
        self.value.scatter_(2, wide, tokens.value)
        self.position.scatter_(2, index, tokens.position)
        self.score.scatter_(2, index, tokens.score)

    def where(self, condition: torch.Tensor, other: Tokens) -> Tokens:
        """These tokens where ``condition`` [B, H, S] holds, else ``other``."""
        wide = condition.unsqueeze(-1)
        return Tokens(
            torch.where(wide, self.key, other.key),
            torch.where(wide, self.value, other.value),
            torch.where(condition, self.position, other.position),
            torch.where(condition, self.score, other.score),
        )

    def empty(self, slots: int) -> Tokens:
        """As many empty slots of the same kind."""
        batch, heads, _, dim = self.key.shape
        return Tokens(
            self.key.new_zeros(batch, heads, slots, dim),
            self.value.new_zeros(batch, heads, slots, dim),
            self.position.new_full((batch, heads, slots), -1),
            self.score.new_full((batch, heads, slots), float("-inf")),
        )

    @staticmethod
    def concat(*parts: Tokens) -> Tokens:
        """One after the other, always in new storage."""
        return Tokens(*(torch.cat(tensors, dim=2) for tensors in zip(*(p.tensors() for p in parts), strict=True)))


class QuantizedPool:
    """Slots of Quantized tokens. A token is quantized when it is written, and its codes stay until it is evicted."""

    def __init__(self, number_format: Format, slots: int, like: Tokens) -> None:
        self.format = number_format
        empty = like.empty(slots)
        self.key: Quantized = number_format.quantize(empty.key)
        self.value: Quantized = number_format.quantize(empty.value)
        self.position = empty.position
        self.score = empty.score

    @property
    def slots(self) -> int:
        """Number of slots, taken or not."""
        return self.position.shape[-1]

    def extend(self, slots: int, like: Tokens) -> None:
        """Add empty slots until there are ``slots``."""
        more = QuantizedPool(self.format, slots - self.slots, like)
        self.key = Quantized(*(torch.cat(pair, dim=2) for pair in zip(self.key, more.key, strict=True)))
        self.value = Quantized(*(torch.cat(pair, dim=2) for pair in zip(self.value, more.value, strict=True)))
        self.position = torch.cat([self.position, more.position], dim=2)
        self.score = torch.cat([self.score, more.score], dim=2)

    def write(self, index: torch.Tensor, tokens: Tokens, valid: torch.Tensor) -> None:
        """Quantize ``tokens`` into slots ``index`` where ``valid``; both [B, H, n], distinct slots per head."""
        for store, new in ((self.key, tokens.key), (self.value, tokens.value)):
            for stored, fresh in zip(store, self.format.quantize(new), strict=True):
                wide = index.unsqueeze(-1).expand(-1, -1, -1, stored.shape[-1])
                # float8 has no gather and scatter on every device; its bytes do.
                if stored.dtype.itemsize == 1:
                    stored, fresh = stored.view(torch.uint8), fresh.view(torch.uint8)
                stored.scatter_(2, wide, torch.where(valid.unsqueeze(-1), fresh, stored.gather(2, wide)))
        self.position.scatter_(2, index, torch.where(valid, tokens.position, self.position.gather(2, index)))
        self.score.scatter_(2, index, torch.where(valid, tokens.score, self.score.gather(2, index)))

    def dequantized(self, dtype: torch.dtype) -> Tokens:
        """All slots as they would stand in a cache of ``dtype``."""
        return Tokens(
            self.format.dequantize(self.key, dtype),
            self.format.dequantize(self.value, dtype),
            self.position,
            self.score,
        )


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

    def __init__(self, config: CacheConfig) -> None:
        super().__init__()
        self.config = config
        self.format = FORMATS[config.quant_format]
        self.seen = 0
        self.padded: list[int] = []
        """Padding tokens before each sample."""
        self.oq: list[float] | None = None
        """OQ score of each sample, from the first forward."""
        self.slots: list[Slots] = []
        """Budget of each sample beside the window, in force once the sample has outgrown the cache."""
        self.outgrown: list[bool] = []
        self.tokens: Tokens | None = None
        self.quantized: QuantizedPool | None = None
        self.used = 0
        """Slots of the past in use, counted from the end of the window."""
        self.gaps = False
        """Some slots in use may be without a token, so that attention needs a mask."""
        self.incoming: tuple[torch.Tensor, torch.Tensor] | None = None

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
        key, value = key_states, value_states
        if self.tokens is not None and key.shape[2] == 1:
            self._join(key, value)
        else:
            self.incoming = (key, value)
        return key, value

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(self.config)  # type: ignore[misc]

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
        self.oq = None if self.oq is None else [self.oq[i] for i in picked]
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

    def _map(self, function: Any) -> None:
        """Apply ``function`` to every stored tensor."""
        assert self.tokens is not None
        self.tokens = Tokens(*map(function, self.tokens.tensors()))
        if self.quantized is not None:
            self.quantized.key = Quantized(*map(function, self.quantized.key))
            self.quantized.value = Quantized(*map(function, self.quantized.value))
            self.quantized.position = function(self.quantized.position)
            self.quantized.score = function(self.quantized.score)

    # -- what is held --------------------------------------------------------------------------------------------------

    def held(self) -> Tokens:
        """Slots of the Original pool in use: the window, then the past."""
        assert self.tokens is not None
        return self.tokens[: min(self.seen, self.config.window_size) + self.used]

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
        return States(position, (order >= original.shape[-1]) & (position >= 0))

    # -- a forward of several tokens -----------------------------------------------------------------------------------

    def attend_block(
        self, module: torch.nn.Module, query: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> torch.Tensor:
        """Attention of a prompt, or of a further block of tokens: over all that is held and, causally, itself.

        The tokens stay in ``incoming`` until :meth:`measure` has scored them and :meth:`absorb` taken them in.
        """
        assert self.incoming is not None
        key, value = self.incoming
        length = key.shape[2]
        padding = mask.padding if isinstance(mask, LazyMask) else None
        if self.tokens is None:
            dense = mask.dense if isinstance(mask, LazyMask) else mask
            output, _ = sdpa_attention_forward(module, query, key, value, dense, scaling=scaling, **kwargs)
        else:
            stored, _ = self.reconstruct()
            key, value = torch.cat([stored.key, key], dim=2), torch.cat([stored.value, value], dim=2)
            visible = self._visible(stored, length, length, padding).repeat_interleave(
                query.shape[1] // key.shape[1], dim=1
            )
            output, _ = sdpa_attention_forward(module, query, key, value, visible, scaling=scaling, **kwargs)
        return output

    def _visible(
        self, stored: Tokens | None, length: int, window: int, padding: torch.Tensor | None
    ) -> torch.Tensor:
        """What the last ``window`` of ``length`` new tokens may see, stored tokens first: bool [B, 1 or H, W, S + T]."""
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
        position = torch.arange(self.seen, self.seen + length, dtype=torch.int32, device=device)
        position = position.expand(batch, heads, length)
        if self.tokens is None:
            self.padded = [0] * batch if padding is None else (~padding).sum(dim=1).tolist()
            self.outgrown = [False] * batch
        if padding is not None:
            position = position.masked_fill(~padding[:, None, -length:], -1)

        window = min(config.window_size, length)
        stored, order = (None, None) if self.tokens is None else self.reconstruct()
        if config.ranking == "heavy_hitter":
            keys = key if stored is None else torch.cat([stored.key, key], dim=2)
            visible = self._visible(stored, length, window, padding)
            attention = window_attention(query[:, :, -window:], keys, scaling, visible)
            statistics = prefill_statistics(attention, heads, config.gamma, config.pool_width)
            if self.oq is None:
                self.oq = statistics.oq_score(config.tau1, config.tau2, config.tau3).tolist()
            score = statistics.importance
        else:
            if self.oq is None:
                self.oq = [0.0] * batch
            places = position if stored is None else torch.cat([stored.position, position], dim=2)
            score = places.float()
        if stored is not None and order is not None:
            slots = stored.position.shape[-1]
            self._update_scores(torch.empty_like(score[..., :slots]).scatter_(2, order, score[..., :slots]), length)
            score = score[..., slots:]
        self.incoming = None
        return Tokens(key, value, position, self._pin(score, position))

    def _pin(self, score: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Scores of new tokens, with attention sinks at +inf and padding at -inf."""
        if self.config.n_sink and self.seen < max(self.padded) + self.config.n_sink:
            first = torch.tensor(self.padded, device=score.device)[:, None, None]
            score = score.masked_fill(position < first + self.config.n_sink, float("inf"))
        return score.masked_fill(position < 0, float("-inf")) if any(self.padded) else score

    def absorb(self, new: Tokens) -> None:
        """Fit the new tokens into the window and the budget."""
        length = new.key.shape[2]
        ring = self.config.window_size
        self.is_initialized = True
        before, self.seen = self.seen, self.seen + length
        first_in_window = max(self.seen - ring, 0)
        if self.tokens is None:
            self.tokens = new.empty(ring)
        # Positions that leave the window: of the old ring, and of the new tokens themselves.
        leaving = [place % ring for place in range(max(before - ring, 0), min(before, first_in_window))]
        overflow = max(first_in_window - before, 0)
        past = Tokens.concat(
            self.tokens[ring : ring + self.used],
            self.tokens[torch.tensor(leaving, dtype=torch.long, device=new.key.device)],
            new[:overflow],
        )
        window = self.tokens[:ring]
        if overflow or leaving or before:
            window = Tokens.concat(window)
        places = torch.arange(before + overflow, self.seen, device=new.key.device) % ring
        for target, source in zip(window.tensors(), new[overflow:].tensors(), strict=True):
            target[:, :, places] = source
        self._assign(window, past)

    def _assign(self, window: Tokens, past: Tokens) -> None:
        """Choose the state of every past token: the most important stay Original, the next ones are quantized.

        Tokens that are Quantized already stay so or are evicted.
        """
        config = self.config
        device = past.key.device
        for sample, padded in enumerate(self.padded):
            self.outgrown[sample] |= self.seen - padded > config.cache_size
        slots = [
            self.slots[sample] if outgrown else Slots(config.past_size, 0)
            for sample, outgrown in enumerate(self.outgrown)
        ]
        originals = torch.tensor([s.original for s in slots], device=device)[:, None, None]
        total = torch.tensor([s.original + s.quantized for s in slots], device=device)[:, None, None]
        most_original, most_quantized = max(s.original for s in slots), max(s.quantized for s in slots)

        count = past.position.shape[-1]
        score = past.score.masked_fill(past.position < 0, float("-inf"))
        score, order = score.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(count, device=device)
        joint = rank.expand_as(order)
        pool_ = self.quantized
        if pool_ is not None:
            # Rank among both pools: Quantized tokens with a higher score stand before.
            taken = pool_.position >= 0
            stored = pool_.score.masked_fill(~taken, float("-inf"))
            ascending = stored.sort(dim=-1).values
            joint = joint + pool_.slots - torch.searchsorted(ascending, score.contiguous(), right=True)
            better = count - torch.searchsorted(score.flip(-1).contiguous(), stored.contiguous())
            stays = taken & (stored.argsort(dim=-1, descending=True).argsort(dim=-1) + better < total)
            pool_.position.masked_fill_(~stays, -1)
        valid = score > float("-inf")
        kept = valid & (joint < total)

        size = min(most_original, count)
        index = order[..., :size]
        chosen = past.take(index)
        is_original = kept[..., :size] & (rank[:size] < originals)
        chosen = chosen._replace(
            position=chosen.position.masked_fill(~is_original, -1),
            score=chosen.score.masked_fill(~is_original, float("-inf")),
        )
        whole = bool(is_original.all())
        capacity = min(most_original, size + GROWTH)
        room = past.empty(capacity - size)
        closed = torch.arange(capacity, device=device) >= originals
        self.tokens = Tokens.concat(window, chosen, room)
        self.tokens.score[:, :, config.window_size :].masked_fill_(closed, float("inf"))
        self.gaps = not whole or any(self.padded)
        self.used = size

        if most_quantized:
            if pool_ is None:
                pool_ = self.quantized = QuantizedPool(self.format, most_quantized, past)
            elif pool_.slots < most_quantized:
                pool_.extend(most_quantized, past)
            here = torch.arange(pool_.slots, device=device)
            shut = here >= total - originals
            free = (pool_.position < 0) & ~shut
            pool_.score.masked_fill_(pool_.position < 0, float("-inf")).masked_fill_(shut, float("inf"))
            steps = min(most_quantized, count)
            target = free.int().sort(dim=-1, descending=True, stable=True).indices[..., :steps]
            nth = originals + rank[:steps]
            pick = order.gather(2, nth.clamp(max=max(count - 1, 0)).expand_as(target)) if steps else target
            demoted = kept.gather(2, nth.clamp(max=max(count - 1, 0)).expand_as(target)) if steps else target.bool()
            demoted = demoted & (nth < count) & (rank[:steps] < free.sum(dim=-1, keepdim=True))
            pool_.write(target, past.take(pick), demoted)

    def rebalance(self, slots: list[Slots]) -> None:
        """Take a new budget, at most as many Original slots as before."""
        if slots == self.slots:
            return
        self.slots = slots
        if self.tokens is not None and any(self.outgrown):
            ring = self.config.window_size
            self._assign(self.tokens[:ring], self.tokens[ring : ring + self.used])

    # -- a decoding step -----------------------------------------------------------------------------------------------

    def _join(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write one new token [B, H, 1, D] into the window, after the token whose slot it takes has found its place."""
        config = self.config
        ring = config.window_size
        slot = self.seen % ring
        if self.seen >= ring:
            grown = [self.seen - padded >= config.cache_size for padded in self.padded]
            if grown != self.outgrown:
                budget_changes = any(
                    now and not was and budget.quantized
                    for now, was, budget in zip(grown, self.outgrown, self.slots, strict=True)
                )
                self.outgrown = grown
                if budget_changes:
                    assert self.tokens is not None
                    self._assign(self.tokens[:ring], self.tokens[ring : ring + self.used])
            self._leave(slot)
        assert self.tokens is not None
        position = self.tokens.position.new_full((key.shape[0], key.shape[1], 1), self.seen)
        score = position.float() if config.ranking == "recency" else torch.zeros_like(position, dtype=torch.float32)
        new = Tokens(key, value, position, self._pin(score, position))
        for target, source in zip(self.tokens.tensors(), new.tensors(), strict=True):
            target[:, :, slot : slot + 1] = source
        self.seen += 1

    def _leave(self, slot: int) -> None:
        """Find a place for the token in window slot ``slot``: Original, Quantized or none."""
        assert self.tokens is not None
        ring = self.config.window_size
        leaving = self.tokens[slot : slot + 1]
        limits = [s.original if outgrown else self.config.past_size for s, outgrown in self._budgets()]
        if self.used < max(limits):
            if ring + self.used == self.tokens.position.shape[-1]:
                self.tokens = Tokens.concat(self.tokens, self.tokens.empty(GROWTH))
            slot = ring + self.used
            self.used += 1
            if min(limits) == max(limits) and not self.gaps:
                for target, source in zip(self.tokens.tensors(), leaving.tensors(), strict=True):
                    target[:, :, slot : slot + 1] = source
                return
            closed = [limit < self.used for limit in limits]
            self.tokens.score[:, :, slot].masked_fill_(
                torch.tensor(closed, device=self.tokens.score.device)[:, None], float("inf")
            )
        if self.used:
            least, index = self.tokens.score[:, :, ring : ring + self.used].min(dim=-1, keepdim=True)
            index = index + ring
            stays = leaving.score > least
            displaced = self.tokens.take(index)
            demoted = displaced.where(stays, leaving)
            self.tokens.put(index, leaving.where(stays, displaced))
        else:
            demoted = leaving
        if self.quantized is not None:
            least, index = self.quantized.score.min(dim=-1, keepdim=True)
            self.quantized.write(index, demoted, (demoted.score > least) & (demoted.position >= 0))

    def _budgets(self) -> Iterator[tuple[Slots, bool]]:
        return zip(self.slots, self.outgrown, strict=True)

    def attend_step(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Attention of one new token [B, Hq, 1, D] over all that is held; its probabilities are the new scores.

        Returns:
            Output [B, 1, Hq, D].
        """
        attend = self._attend_fused if self.config.attention == "fused" else self._attend_reconstructed
        batch, query_heads, _, dim = query.shape
        heads = self.held().key.shape[1]
        grouped = query.view(batch, heads, query_heads // heads, dim)
        output, probabilities = attend(grouped, scaling)
        if self.config.ranking == "heavy_hitter":
            self._update_scores(self._pooled(probabilities.mean(dim=2)), 1)
        return output.to(query.dtype).view(batch, 1, query_heads, dim)

    def _attend_fused(self, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [B, H, G, D] and probabilities [B, H, G, S] of ``query`` [B, H, G, D], on the storage as it is.

        Products are taken in float32: a bfloat16 product would round the logits to 8 bits.
        """
        held, pool_ = self.held(), self.quantized
        query = query.float() * scaling
        logits = query @ held.key.float().transpose(-1, -2)
        if self.gaps:
            logits = logits.masked_fill((held.position < 0).unsqueeze(2), float("-inf"))
        if pool_ is None:
            probabilities = logits.softmax(dim=-1)
            return probabilities @ held.value.float(), probabilities
        key, value = pool_.key, pool_.value
        low = (query @ pool_.format.expand(key.codes).transpose(-1, -2)) * key.scale.transpose(-1, -2)
        low = low.masked_fill((pool_.position < 0).unsqueeze(2), float("-inf"))
        probabilities = torch.cat([logits, low], dim=-1).softmax(dim=-1)
        high_part, low_part = probabilities.split([logits.shape[-1], low.shape[-1]], dim=-1)
        output = high_part @ held.value.float()
        output += (low_part * value.scale.transpose(-1, -2)) @ pool_.format.expand(value.codes)
        return output, probabilities

    def _attend_reconstructed(self, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as :meth:`_attend_fused` on the reconstructed contiguous cache: slower, and easy to believe."""
        tokens, order = self.reconstruct()
        logits = (query.float() @ tokens.key.float().transpose(-1, -2)) * scaling
        probabilities = logits.masked_fill((tokens.position < 0).unsqueeze(2), float("-inf")).softmax(dim=-1)
        output = probabilities @ tokens.value.float()
        order = order.unsqueeze(2).expand_as(probabilities)
        return output, torch.empty_like(probabilities).scatter_(3, order, probabilities)

    def _pooled(self, importance: torch.Tensor) -> torch.Tensor:
        """Pool the newest attention [B, H, S] over neighbouring tokens of the evictable region, as at prefill.

        The region is what can leave at the next step: all but the window, and the token that leaves it next.
        """
        config = self.config
        ring = config.window_size
        if config.decode_importance != "latest" or config.pool_width == 1 or self.seen < ring:
            return importance
        position = self.held().position
        if self.quantized is not None:
            position = torch.cat([position, self.quantized.position], dim=-1)
        nxt = self.seen % ring
        region = torch.cat([position[..., nxt : nxt + 1], position[..., ring:]], dim=-1)
        values = torch.cat([importance[..., nxt : nxt + 1], importance[..., ring:]], dim=-1)
        order = region.argsort(dim=-1)
        smooth = torch.empty_like(values).scatter_(2, order, pool(values.gather(2, order), config.pool_width))
        importance = importance.clone()
        importance[..., nxt : nxt + 1] = smooth[..., :1]
        importance[..., ring:] = smooth[..., 1:]
        return importance

    def _update_scores(self, importance: torch.Tensor, steps: int) -> None:
        """Bring the scores of all stored tokens up to date with ``importance`` [B, H, S] of ``steps`` new queries."""
        held = self.held()
        stores = [(held.score, importance[..., : held.score.shape[-1]])]
        if self.quantized is not None:
            stores.append((self.quantized.score, importance[..., held.score.shape[-1] :]))
        weight = 1.0 - (1.0 - 1.0 / self.config.window_size) ** steps
        for score, new in stores:
            if self.config.decode_importance == "mean":
                new = torch.lerp(score, new, weight)
            # Infinite scores mark sinks, empty and closed slots, and stay.
            score.copy_(torch.where(score.isinf(), score, new))


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
        super().__init__(layers=_layers(model, lambda: TriStateLayer(config)))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
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
        """Compress layer ``layer_idx``, and give the layers before it the budget that its OQ score leaves them."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, TriStateLayer)
        first = layer.tokens is None
        tokens = layer.measure(query, scaling, padding)
        if first:
            done = [item for item in self.layers[: layer_idx + 1] if isinstance(item, TriStateLayer)]
            assert layer.oq is not None
            samples = [
                token_slots(self.config, [item.oq[sample] for item in done if item.oq is not None])
                for sample in range(len(layer.oq))
            ]
            for index, item in enumerate(done[:-1]):
                item.rebalance([sample[index] for sample in samples])
            layer.slots = [sample[-1] for sample in samples]
        layer.absorb(tokens)

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
                layer.update(source.keys, source.values)
                cache._absorb(layer_idx, source.queries, source.scaling, source.padding)
            else:
                cache.layers[layer_idx] = _copy_layer(source)
        return cache

    def nbytes(self) -> int:
        """Bytes of all storage that the cache holds: keys, values, scales, positions and scores."""
        return storage_bytes(self.layers)

    def token_counts(self, sample: int = 0) -> dict[str, float]:
        """Tokens ``original``, ``quantized`` and ``evicted`` of one sample, mean over compressible layers and KV heads."""
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
        super().__init__()
        self.window_size = window_size
        self.queries: torch.Tensor = torch.empty(0)
        self.scaling = 1.0
        self.padding: torch.Tensor | None = None


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
        output, _ = sdpa_attention_forward(module, query, layer.keys, layer.values, dense, scaling=scaling, **kwargs)
        return output


class PrefillCache(Cache):
    """Everything that a prompt leaves, kept once and compressed by any number of methods.

    A prompt may come in chunks. ``window_size`` is the largest window that a method may use.
    """

    def __init__(self, model: PreTrainedModel | PreTrainedConfig, window_size: int = 32) -> None:
        self.model_config = getattr(model, "config", model)
        self.window_size = window_size
        super().__init__(layers=_layers(model, lambda: PrefillLayer(window_size)))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
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
                cache.update(layer.keys, layer.values, layer_idx)
            else:
                cache.layers[layer_idx] = _copy_layer(layer)
        return cache

    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return storage_bytes([(layer.keys, layer.values) for layer in self.layers])


def _copy_layer(layer: Any) -> Any:
    """A stock layer that can go its own way: stock layers replace their tensors and never write into them."""
    twin = object.__new__(type(layer))
    twin.__dict__.update(layer.__dict__)
    return twin


def _layers(model: PreTrainedModel | PreTrainedConfig, make: Any) -> list[Any]:
    """One layer per layer of the model: ours where attention is full, transformers' own where it slides."""
    config = getattr(model, "config", model)
    stock = DynamicCache(config=config).layers
    if not stock:
        raise ConfigError(f"model {config.model_type!r} does not say how many layers it has (num_hidden_layers)")
    layers = []
    for layer in stock:
        if type(layer) is DynamicLayer:
            layers.append(make())
        elif getattr(layer, "is_sliding", False):
            layers.append(layer)
        else:
            raise ConfigError(f"model {config.model_type!r} has {type(layer).__name__}s, which hold no keys and values")
    return layers
