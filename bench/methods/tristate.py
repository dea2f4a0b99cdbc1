"""The suite's own methods: the tri-state cache, with the settings that make it one of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from arkv import CacheConfig, ConfigError, TriStateCache, attach, replay, storage_bytes
from arkv.budget import Geometry, minimal_bytes, token_limit
from arkv.store import row_table_bytes
from bench.errors import UserError
from bench.methods.base import Method, Sizes
from bench.methods.prompt import Asked, Budget, Compressed, Prompt
from bench.methods.rope import factors_for
from bench.names import DESCRIPTIONS
from bench.telemetry import Stopwatch


class TriState(Method):
    """Each token is Original, Quantized or Evicted, as ``config`` says, which has the budget among its settings."""

    def __init__(self, name: str, config: CacheConfig) -> None:
        self.name, self.config = name, config
        self.description = DESCRIPTIONS.get(name, "")
        self.cache_config = config
        self.quant_format = config.quant_format if config.original_share != 1.0 else None
        self.window_size = config.recent
        self.queries = config.recorded_queries

    def resized(self, asked: Asked) -> Method:
        """With another budget; as it is where its other settings do not allow that one."""
        try:
            return TriState(
                self.name, dataclasses.replace(self.config, cache_size=asked.cache_size, cache_ratio=asked.cache_ratio)
            )
        except ConfigError:
            return self

    def compress(self, model: PreTrainedModel, prompt: Prompt, budget: Budget) -> Cache:
        """Of the prompt as it was recorded; ``budget`` is the one in the settings."""
        self._score(model, prompt)
        return TriStateCache.from_prefill(prompt.cache, self.config)

    def make(self, model: PreTrainedModel, prompt: Prompt, asked: Asked) -> Compressed:
        """The scores of tokens, which methods with the same settings share, count for each: as if it were alone."""
        clock = Stopwatch(model.device)
        with clock:
            self._score(model, prompt)
        scoring_s = prompt.shared_s.setdefault(self.config.scoring, clock.seconds)
        clock = Stopwatch(model.device)
        with clock:
            cache = TriStateCache.from_prefill(prompt.cache, self.config)
        return Compressed(
            cache=cache,
            logits=prompt.logits,
            prefill_s=prompt.seconds,
            compress_s=scoring_s + clock.seconds,
            kv_bytes=storage_bytes(cache),
        )

    def _score(self, model: PreTrainedModel, prompt: Prompt) -> None:
        """Give the prompt's tokens their scores, as far as they have none yet."""
        if self.reads_twice:
            with factors_for(model, prompt.tokens):
                replay(model, prompt.ids, prompt.cache, self.config)
        else:
            prompt.cache.score(self.config)

    @property
    def reads_twice(self) -> bool:
        """Whether a prompt is read again before it is compressed."""
        return self.config.importance == "replay" and self.config.ranking == "heavy_hitter"

    def empty(self, model: PreTrainedModel) -> Cache:
        """A cache that compresses whatever is read through it.

        Raises:
            UserError: the method reads prompts twice.
        """
        if self.reads_twice:
            raise UserError(f"{self.name} reads a prompt twice, and here there is none before the tokens to be scored")
        return TriStateCache(model, self.config)

    def prefill(self, model: PreTrainedModel, ids: torch.Tensor, asked: Asked) -> tuple[Cache, torch.Tensor]:
        """Read a prompt [1, N] straight into the cache, as the library does it; one that is read twice comes first
        into a full one."""
        if self.reads_twice:
            return super().prefill(model, ids, asked)
        cache = self.empty(model)
        with attach(model):
            return cache, model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    def reading_bytes(self, sizes: Sizes, tokens: int) -> int:
        """A prompt that is read twice is there whole until the end, with a layer once more and an importance of every
        token and head."""
        once = super().reading_bytes(sizes, tokens)
        if not self.reads_twice:
            return once
        importance = torch.float32.itemsize * sizes.layers * sizes.kv_heads * tokens
        return sizes.full_bytes(tokens) + once + importance

    def planned_bytes(self, sizes: Sizes, tokens: int, asked: Asked) -> int | None:
        """What the budget allows, with positions and scores of tokens, and tables of rows."""
        sliding = sizes.full_bytes(tokens) - sizes.layer_bytes * sizes.layers * tokens
        return sliding + sizes.layers * sizes.kv_heads * self._head_bytes(sizes, tokens)

    def _head_bytes(self, sizes: Sizes, tokens: int) -> int:
        """One KV head of one layer: of the tokens held, as many Original as the budget allows."""
        config = self.config
        position = 2 if sizes.context is not None and sizes.context <= torch.iinfo(torch.int16).max else 4
        slot = position + torch.float32.itemsize
        dtype = torch.float32 if sizes.itemsize == 4 else torch.bfloat16
        table = row_table_bytes(2 if config.quantizes else 1)
        geometry = Geometry(sizes.head_dim, sizes.head_dim, dtype, slot, table)
        if config.budget_unit == "bytes":
            worth = config.tokens_worth(tokens) * geometry.full_bytes
            return min(max(worth, minimal_bytes(config, geometry)), tokens * geometry.original_bytes)
        held = min(token_limit(config, tokens), tokens)
        if config.original_share is None:
            return held * geometry.original_bytes
        past = max(held - config.recent, 0)
        original = max(round(config.original_share * past), min(config.n_sink, past))
        quantized = geometry.quantized_bytes(config.number_format)
        return round((held - past + original) * geometry.original_bytes + (past - original) * quantized)

    def settings(self) -> dict[str, Any] | None:
        """Those of the cache."""
        return {
            field.name: value
            for field in dataclasses.fields(self.config)
            if field.compare
            and ((value := getattr(self.config, field.name)) != field.default or "sparse" not in field.metadata)
        }

    def named_settings(self) -> tuple[str, ...]:
        """Window and format."""
        return (f"W{self.config.window_size}", self.quant_format or "")

    def shown_settings(self) -> tuple[str, ...]:
        """The format."""
        return (self.quant_format or "",)
