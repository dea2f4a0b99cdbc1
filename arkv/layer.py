"""One layer of the tri-state cache: what it stores, which state each token gets, and attention over it.

Letters: ``B`` batch, ``Hq`` query heads, ``H`` KV heads, ``G = Hq / H``, ``T`` tokens of one forward, ``S`` slots,
``D`` head dim, ``W`` window, ``C`` cache size.

A layer stores two pools of slots, each in no order. Slots are allocated once; a decoding step writes only the entries
that change: of the Original tokens outside the window, the least important is quantized into the place of the least
important Quantized token, which is gone, and the new token takes its slot (:mod:`arkv.stepping`). Attention does not
depend on the order of keys, so no entry ever moves; :meth:`TriStateLayer.reconstruct` gives the contiguous cache in
sequence order.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from arkv import kernels
from arkv.attention import LazyMask, refuse_gradients
from arkv.budget import Geometry, Slots, byte_slots, wider_slots
from arkv.config import CacheConfig
from arkv.scoring import (
    PrefillStatistics,
    causal_visibility,
    judge,
    needs_moments,
    prefill_statistics,
    summarize_span,
    update_scores,
    window_attention,
    with_span,
)
from arkv.storage import CLOSED, EMPTY, QuantizedPool, Tokens, best

GROWTH = 64
"""Slots that an Original pool below its budget grows by."""


class States(NamedTuple):
    """What a layer holds of one sample: ``position`` [H, n] int32 (-1 where a head holds fewer) in ascending order and
    ``quantized`` [H, n] bool."""

    position: torch.Tensor
    quantized: torch.Tensor


class PromptScores(NamedTuple):
    """What a layer makes of a prompt before it decides what stays."""

    importance: torch.Tensor
    """Of every token, [B, H, N]; infinite for attention sinks."""
    oq: list[float]
    """OQ score of the layer for each sample."""


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
        self.granted: list[int] = []
        """Bytes of each sample for one KV head; none in token units."""
        self.widest: list[Slots] = []
        """Slots that these buy for any number of tokens."""
        self.geometry: Geometry | None = None
        """What a token costs, in byte units."""
        self.outgrown: list[bool] = []
        self.tokens: Tokens | None = None
        self.quantized: QuantizedPool | None = None
        self.used = 0
        """Original slots in use, counted from the first."""
        self.gaps = False
        """Some slots in use may be without a token, so that attention needs a mask."""
        self.bound = False
        """The tensors are parts of those that :class:`~arkv.stepping.LayerGroup` steps all layers with."""
        self.inference = False
        """Some tensors may have been made under ``torch.inference_mode``."""
        self.cut = False
        """Tokens have been stored that gradients would have to reach, which they cannot."""
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
        """Take the keys and values [B, H, T, D] of several tokens, which wait for their queries to decide what stays.

        A single token of a running sequence joins by :meth:`~arkv.stepping.LayerGroup.join`.
        """
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
        if self.granted:
            self.granted, self.widest = [self.granted[i] for i in picked], [self.widest[i] for i in picked]
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
        self.bound = False
        self.inference = torch.is_inference_mode_enabled()

    def _make_writable(self) -> None:
        """Copy what was made under ``torch.inference_mode``, since outside of it nothing can be written there."""
        here = torch.is_inference_mode_enabled()
        # A deep copy may have been made under another mode than all forwards.
        if not here and self.tokens is not None and (self.inference or self.tokens.key.is_inference()):
            self._map(torch.clone)
        self.inference = self.inference or here

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

    def scores(self) -> list[torch.Tensor]:
        """Scores of the slots in use, of the Original and of the Quantized ones, [B, H, n] each."""
        assert self.tokens is not None
        original = self.tokens.score[:, :, : self.used]
        return [original] if self.quantized is None else [original, self.quantized.score]

    def split(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """``numbers`` [B, H, S] of all slots in use, likewise in parts."""
        if self.quantized is None:
            return [numbers]
        return [numbers[..., : self.used], numbers[..., self.used :]]

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
        return refuse_gradients(output) if self.cut else output

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

    def measure(
        self, query: torch.Tensor, scaling: float, padding: torch.Tensor | None, scores: PromptScores | None = None
    ) -> Tokens:
        """Score all tokens by the attention of the newest queries, and the layer by its first forward.

        Args:
            query: at least the newest queries of the incoming tokens that the scores are taken from
                (``CacheConfig.recorded_queries``), or all if there are fewer, [B, Hq, n, D].
            padding: [B, tokens seen and incoming], False where a token is padding.
            scores: what this made of the same first forward before, to be taken over.

        Returns:
            The incoming tokens with their scores.
        """
        assert self.incoming is not None
        self._make_writable()
        config = self.config
        # What is stored and scored takes no part in gradients.
        self.note_gradients(*self.incoming)
        key, value = (tensor.detach() for tensor in self.incoming)
        query = query.detach()
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
        if scores is not None:
            self.incoming = None
            self.oq = list(scores.oq)
            return Tokens(key, value, position, scores.importance)

        window = min(config.window_size, length)
        stored, order = (None, None) if self.tokens is None else self.reconstruct()
        if config.ranking == "heavy_hitter":
            keys = key if stored is None else torch.cat([stored.key, key], dim=2)
            sinks = self._sinks(position if stored is None else torch.cat([stored.position, position], dim=2))
            # Without padding and stored tokens, queries see all keys up to their own.
            alone = stored is None and padding is None
            kernel = None
            if alone and config.attention == "fused" and query.dtype == key.dtype:
                kernel = kernels.find_summarize(device, key.dtype)
            if kernel is not None:
                statistics, score = self._score_alone(kernel, query, keys, scaling, sinks[..., :-window])
            else:
                statistics, score = self._score(query, keys, scaling, stored, padding, sinks)
            if not self.oq:
                self.oq = statistics.oq_score(config.tau1, config.tau2, config.tau3).tolist()
            if config.value_norm:
                values = value if stored is None else torch.cat([stored.value, value], dim=2)
                score = score * values.float().norm(dim=-1)
        else:
            self.oq = self.oq or [0.0] * batch
            score = (position if stored is None else torch.cat([stored.position, position], dim=2)).float()
        if stored is not None and order is not None:
            old, score = score.split([stored.slots, length], dim=-1)
            importance = torch.empty_like(old).scatter_(2, order, old)
            finite = not (self.gaps or config.n_sink) and (self.quantized is None or self.quantized.full)
            update_scores(self.scores(), self.split(importance), config, length, finite)
        self.incoming = None
        return Tokens(key, value, position, self._pin(score, position))

    def _score(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        scaling: float,
        stored: Tokens | None,
        padding: torch.Tensor | None,
        sinks: torch.Tensor,
    ) -> tuple[PrefillStatistics, torch.Tensor]:
        """Statistics and importance [B, H, S + T] of stored and incoming ``keys``."""
        config = self.config
        assert self.incoming is not None
        length = self.incoming[0].shape[2]
        window, span = min(config.window_size, length), min(config.recorded_queries, length)
        alone = stored is None and padding is None
        seen_by_span = self._visible(stored, span if alone else length, span, padding)
        visible = seen_by_span[:, :, -window:, -window:] if alone else seen_by_span[:, :, -window:]
        attention = window_attention(query[:, :, -window:], keys, scaling, visible)
        statistics = prefill_statistics(attention, keys.shape[1], config, visible, sinks)
        if span == window:
            return statistics, statistics.importance
        few = slice((span - 1) % config.query_stride, None, config.query_stride)
        queries, seen = query[:, :, -span:][:, :, few], seen_by_span[:, :, few]
        summary = summarize_span(attention, queries, keys, scaling, seen, config)
        nothing = ~seen.any(dim=2)
        return statistics, with_span(statistics.importance, summary, nothing, sinks[..., :-window], config)

    def _score_alone(
        self,
        summarize: kernels.Summarize,
        query: torch.Tensor,
        keys: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor,
    ) -> tuple[PrefillStatistics, torch.Tensor]:
        """The same for a prompt of its own, by a kernel; ``sinks`` are those before the window."""
        config, length, past = self.config, keys.shape[2], sinks.shape[-1]
        span = min(config.recorded_queries, length)
        nothing = torch.zeros(1, 1, 1, dtype=torch.bool, device=keys.device)
        near = summarize(query[:, :, past - length :], keys, scaling, 1, past, needs_moments(config))
        statistics = judge(near, nothing, sinks, config)
        if span == length - past:
            return statistics, statistics.importance
        few = query[:, :, -span:][:, :, (span - 1) % config.query_stride :: config.query_stride]
        far = summarize(few, keys, scaling, config.query_stride, past, False)
        return statistics, with_span(statistics.importance, far, nothing, sinks, config)

    def _pin(self, score: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Scores of new tokens, with attention sinks above all others and padding below."""
        if self.config.n_sink and self.seen < max(self.padded) + self.config.n_sink:
            score = score.masked_fill(self._sinks(position), float("inf"))
        return score.masked_fill(position < 0, EMPTY) if any(self.padded) else score

    def _sinks(self, position: torch.Tensor) -> torch.Tensor:
        """Which tokens at ``position`` [B, H, n] are attention sinks; padding counts among them."""
        first = torch.tensor(self.padded, device=position.device)[:, None, None]
        return position < first + self.config.n_sink

    def _check_positions(self, length: int) -> None:
        """Beyond the model's context a position can outgrow its number type, at the price of more bytes."""
        if self.position_dtype == torch.int16 and self.seen + length > torch.iinfo(torch.int16).max:
            self.position_dtype = torch.int32
            self.bound = False
            for store in (self.tokens, self.quantized):
                if store is not None:
                    store.position = store.position.int()

    def note_gradients(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Remember whether the graph of anything is cut off when ``key`` and ``value`` are stored."""
        self.cut = self.cut or key.requires_grad or value.requires_grad

    def absorb(self, new: Tokens) -> None:
        """Fit the new tokens into the window and the budget."""
        self.is_initialized = True
        self.seen += new.slots
        self._outgrow(self.seen)
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
        self.bound = False
        slots = self._slots_now()
        originals = torch.tensor([s.original for s in slots], device=device)[:, None, None]
        total = torch.tensor([s.original + s.quantized for s in slots], device=device)[:, None, None]
        most_original, most_quantized = max(s.original for s in slots), max(s.quantized for s in slots)

        # Everything below is in order of importance: rank 0 is the most important token outside the window.
        count = min(past.slots, max(s.original + s.quantized for s in slots))
        score, order = best(past.score.masked_fill(past.position < 0, EMPTY), count)
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
            pick = order.gather(2, pick)
            chosen = past.take(pick).only(demoted)
            self._demote(chosen, total - originals, most_quantized, [window, past])

    def share_bytes(self, geometry: Geometry, granted: list[int], lengths: list[int]) -> None:
        """Byte budgets: buy slots for prompts of ``lengths`` tokens with the bytes ``granted`` to each sample."""
        self.geometry, self.granted = geometry, granted
        self.limits = [budget // geometry.original_bytes for budget in granted]
        self.slots = [
            byte_slots(self.config, geometry, budget, length) for budget, length in zip(granted, lengths, strict=True)
        ]
        self.widest = [byte_slots(self.config, geometry, budget, math.inf) for budget in granted]

    def _outgrow(self, seen: int) -> bool:
        """Bring the slots of each sample up to date with ``seen`` tokens; returns whether those in force change.

        In byte units a prompt has as many Quantized slots as it can fill. Where more tokens follow than these hold,
        Original slots become Quantized ones: so a long answer is held as a long prompt is.
        """
        changed = False
        for sample, padded in enumerate(self.padded):
            real = seen - padded
            if not self.outgrown[sample] and real > self.limits[sample]:
                self.outgrown[sample] = changed = True
            if not self.granted or not self.outgrown[sample] or self.slots[sample] == self.widest[sample]:
                continue
            held = self.config.window_size + sum(self.slots[sample])
            if real > held:
                assert self.geometry is not None
                wider = wider_slots(self.config, self.geometry, self.granted[sample], real)
                if self.config.window_size + sum(wider) > held:
                    self.slots[sample] = wider
                    changed = True
        return changed

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

    def _demote(self, tokens: Tokens, budget: torch.Tensor, slots: int, like: list[Tokens]) -> None:
        """Quantize ``tokens`` (position -1 is none) into free slots.

        Args:
            budget: Quantized slots of each sample, [B, 1, 1].
            slots: the largest of them.
            like: tokens that the coming ones will resemble.
        """
        number_format = self.config.number_format
        here = torch.arange(slots, device=budget.device)
        filled = Tokens.concat(tokens, tokens.empty(slots - tokens.slots)) if slots > tokens.slots else tokens
        fresh = QuantizedPool(number_format, filled, like)
        if self.quantized is None:
            self.quantized = fresh
        else:
            if self.quantized.slots < slots:
                self.quantized.grow(slots - self.quantized.slots)
            # A sample that has had no Quantized token yet gets a center of its own.
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

    def settle(self, slots: list[Slots]) -> None:
        """Choose states anew, with ``slots`` of each sample, right after a first forward has been absorbed."""
        self.slots = slots
        if not any(self.outgrown):
            return
        # Nothing has joined yet: the window comes first, in sequence order, then the others by importance.
        held, window = self.held(), min(self.seen, self.config.window_size)
        past = held.part(slice(window, None))
        original, quantized = slots[0]
        alike = all(self.outgrown) and len(set(slots)) == 1 and not self.gaps
        if not alike or past.slots != original + quantized:
            self._assign(held.part(slice(window)), past)
            return
        self.used = window + original
        self.tokens, self.bound = held.part(slice(self.used)).map(torch.clone), False
        if quantized:
            demoted = past.part(slice(original, None))
            # These two stay as they are, and must not keep alive what they were parts of.
            demoted.position, demoted.score = demoted.position.clone(), demoted.score.clone()
            self._demote(demoted, torch.tensor(quantized, device=past.key.device), quantized, [held])

    # -- a decoding step -----------------------------------------------------------------------------------------------

    def make_room(self) -> bool:
        """Prepare for one more token; returns whether one more slot has come into use that is free in all samples."""
        self._make_writable()
        if self._outgrow(self.seen + 1):
            self.reassign()
        self._check_positions(1)
        assert self.tokens is not None
        sizes = [self.config.window_size + slots.original for slots in self._slots_now()]
        if self.used >= max(sizes):
            return False
        if self.used == self.tokens.slots:
            self.tokens = Tokens.concat(self.tokens, self.tokens.empty(min(GROWTH, max(sizes) - self.used)))
            self.bound = False
        self.used += 1
        if min(sizes) == max(sizes) and not self.gaps:
            return True
        closed = torch.tensor([size < self.used for size in sizes], device=self.tokens.score.device)
        self.tokens.score[:, :, self.used - 1].masked_fill_(closed[:, None], CLOSED)
        self.gaps = True
        return False

    @property
    def holds_most(self) -> bool:
        """Whether every slot of the budget is taken: then each step gives one up."""
        most = self.config.window_size + max(slots.original for slots in self._slots_now())
        return self.used == most and not self.gaps and (self.quantized is None or self.quantized.full)

    def attend_step(self, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of one new token [B, Hq, 1, D] over all that is held, without gradients.

        Returns:
            output [B, 1, Hq, D]; probabilities [B, H, G, S], the Original slots in use first.
        """
        assert self.tokens is not None
        batch, query_heads, _, dim = query.shape
        heads = self.tokens.key.shape[1]
        grouped = query.detach().view(batch, heads, query_heads // heads, dim)
        stored = self.quantized
        widest = max(dim, self.tokens.value.shape[-1])
        kernel = None
        if self.config.attention == "fused":
            kernel = kernels.find(query.device, self.tokens.key.dtype, widest, grouped.shape[2])
        if self.config.attention == "reconstruct":
            output, probabilities = self._attend_reconstructed(grouped, scaling)
        elif kernel is not None:
            output, probabilities = kernel(grouped, self.held(), stored, scaling, self.gaps)
        else:
            output, probabilities = self._attend_folded(grouped, scaling)
        return output.to(query.dtype).view(batch, 1, query_heads, output.shape[-1]), probabilities

    def _attend_folded(self, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
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
        """The same as :meth:`_attend_folded` on the reconstructed contiguous cache: slower, and easy to believe."""
        tokens, order = self.reconstruct()
        logits = (query.float() @ tokens.key.float().transpose(-1, -2)) * scaling
        probabilities = logits.masked_fill((tokens.position < 0).unsqueeze(2), EMPTY).softmax(dim=-1)
        output = probabilities @ tokens.value.float()
        order = order.unsqueeze(2).expand_as(probabilities)
        return output, torch.empty_like(probabilities).scatter_(3, order, probabilities)
