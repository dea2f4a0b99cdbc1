"""A cell of the grid: one method with a budget. Everything else uses methods through it, whoever wrote them.

Whatever the code of a method raises is told in one line that names the method.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from arkv import CacheConfig, ConfigError, attach, storage_bytes
from bench.errors import OthersCode, UserError
from bench.methods.base import Method, Sizes
from bench.methods.prompt import Asked, Compressed, Prompt
from bench.telemetry import Stopwatch, peak_memory_bytes


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a cache holds at one moment. Tokens are means over layers and KV heads."""

    original: float = 0.0
    quantized: float = 0.0
    evicted: float = 0.0
    kv_bytes: int = 0
    """All storage of the cache."""
    full_kv_bytes: int = 0
    """Keys and values of the same tokens at model precision."""
    ragged_kv_bytes: int | None = None
    """Where tokens of single heads are masked: bytes as if each head stored only what it attends to."""
    oq_ratios: list[float] = field(default_factory=list)
    """Per compressible layer, where the method uses them."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One method with all its settings: a row of the table, a cell of the grid. Cells of one key are equal."""

    method: str
    """Its name."""
    impl: Method
    """The method itself."""
    asked: Asked = field(default_factory=Asked)
    """The budget."""
    version: str | None = None
    """Of the library or the user's own code, which changes answers as a setting would."""
    chosen: Mapping[str, Any] = field(default_factory=dict)
    """Settings of a user's own method that a variant gives it."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    # --- What it is ---

    @property
    def quantizes(self) -> bool:
        """Whether any token can become Quantized."""
        return self.quant_format is not None

    @property
    def quant_format(self) -> str | None:
        """Number format of Quantized tokens, None where nothing is quantized."""
        return self.impl.quant_format

    @property
    def budget_unit(self) -> str | None:
        """What the budget counts."""
        return self.asked.unit

    @property
    def cache_size(self) -> int | None:
        """C, tokens per layer, or their worth in bytes; None where the budget is a share of each prompt."""
        return self.asked.cache_size

    @property
    def cache_ratio(self) -> float | None:
        """The budget as a share of each prompt, or None."""
        return self.asked.cache_ratio

    @property
    def budget(self) -> str:
        """The budget for a person."""
        return str(self.asked)

    @property
    def window_size(self) -> int | None:
        """W, newest tokens that are always Original."""
        return self.impl.window_size

    @property
    def cache_config(self) -> CacheConfig | None:
        """Settings of the tri-state cache, where the method is one; None for all others."""
        return self.impl.cache_config

    @property
    def recorded_queries(self) -> int:
        """Newest queries of a prompt that the method looks at."""
        return self.impl.queries

    @cached_property
    def key(self) -> str:
        """Short and unique for the settings; equal settings have equal keys across runs."""
        settings = self.impl.settings()
        if settings is None:
            budget = {"cache_size": self.cache_size, "cache_ratio": self.cache_ratio, "budget_unit": self.budget_unit}
            settings = {"name": self.method, "version": self.version, **budget}
            settings |= {"settings": dict(self.chosen)} if self.chosen else {}
        if not settings:
            return self.method
        parts = [self.method]
        if self.budget_unit is not None:
            size = f"R{self.cache_ratio:g}" if self.cache_ratio is not None else f"C{self.cache_size}"
            parts.append(size + self.budget_unit[0])
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return "-".join(part for part in (*parts, *self.impl.named_settings(), digest) if part)

    @property
    def label(self) -> str:
        """For a person: the method, its budget and format."""
        return " ".join(part for part in (self.method, self.budget, *self.impl.shown_settings()) if part)

    def resized(self, cache_size: int) -> Cell:
        """The same with room for so many tokens; a method of one size, and one whose settings forbid it, stay."""
        if not self.impl.has_budget:
            return self
        asked = Asked(self.budget_unit, cache_size=cache_size)
        return replace(self, impl=self.impl.resized(asked), asked=asked)

    # --- What it does ---

    def _guard(self) -> OthersCode:
        module = type(self.impl).__module__
        own = module.partition(".")[0] not in ("bench", "arkv")
        file = getattr(sys.modules.get(module), "__file__", None) if own else None
        return OthersCode(self.method, ConfigError, placed=True, file=file)

    def compress(self, model: PreTrainedModel, prompt: Prompt | None, beside: Iterable[Cell] = ()) -> Compressed:
        """The cell's own cache of a prompt; None for an empty one.

        Args:
            beside: cells that are to be asked for the same prompt later. Those that can share a prefill with this one
                have their caches made with its.

        Raises:
            UserError, arkv.ConfigError: the model or the prompt is not one that the method can do, or its code failed.
        """
        with self._guard():
            if prompt is None:
                clock = Stopwatch(model.device)
                with clock:
                    cache = self.impl.empty(model)
                return Compressed(
                    cache=cache, logits=None, prefill_s=0.0, compress_s=clock.seconds, kv_bytes=storage_bytes(cache)
                )
            made = self._made(model, prompt, beside)
            seen = self.impl.tokens_seen(made.cache)
        if seen != prompt.tokens:
            raise UserError(
                f"{self.method}: its cache of a prompt of {prompt.tokens} tokens says that it has seen {seen}, so that "
                "the positions of later tokens would be wrong (get_seq_length; bench.extend.KeptLayer has it right)"
            )
        return made

    def _made(self, model: PreTrainedModel, prompt: Prompt, beside: Iterable[Cell]) -> Compressed:
        """In a prefill for all of the group, where the method shares one."""
        group = self.impl.prefill_group
        if group is None:
            return self.impl.make(model, prompt, self.asked)
        if self.key not in prompt.waiting:
            cells = [self, *(cell for cell in beside if cell.impl.prefill_group == group and cell != self)]
            found = self.impl.make_all(model, prompt, [(cell.impl, cell.asked) for cell in cells])
            peak = peak_memory_bytes(model.device)
            for cell, made in zip(cells, found, strict=True):
                prompt.waiting[cell.key] = made if isinstance(made, Exception) else replace(made, peak_bytes=peak)
        mine = prompt.waiting.pop(self.key)
        if isinstance(mine, Exception):
            raise mine
        return mine

    def prefill(self, model: PreTrainedModel, ids: torch.Tensor) -> tuple[Cache, torch.Tensor]:
        """Read a prompt [1, N] and compress it, as where the method is all that is used: the cache, and logits
        [1, vocabulary]. Raises as :meth:`compress`."""
        with self._guard():
            return self.impl.prefill(model, ids, self.asked)

    @contextmanager
    def decoding(
        self, model: PreTrainedModel, caches: Sequence[Cache], *, side_by_side: bool = False
    ) -> Iterator[None]:
        """Under this, the model can read the cell's caches and copies of them.

        Args:
            side_by_side: several rows may go through the model in one forward, if the caches can do that; then the
                attention function of stock caches is SDPA.
        """
        with self._guard():
            together = side_by_side and self.impl.batches(caches)
            with attach(model) if together else self.impl.decoding(model, caches[0]):
                yield

    def batches(self, caches: Sequence[Cache]) -> bool:
        """Whether rows with these caches can go through the model side by side."""
        with self._guard():
            return self.impl.batches(caches)

    def reads_blocks(self, cache: Cache) -> bool:
        """Whether several tokens can be read through the cache in one forward."""
        with self._guard():
            return self.impl.reads_blocks(cache)

    def fork(self, cache: Cache) -> Cache:
        """A copy that can go its own way."""
        with self._guard():
            return self.impl.fork(cache)

    def repeated(self, cache: Cache, rows: int) -> Cache | None:
        """See :meth:`bench.methods.base.Method.repeated`. Raises as :meth:`compress`."""
        with self._guard():
            return self.impl.repeated(cache, rows)

    def held(self, cache: Cache, prompt: Prompt | None) -> Held:
        """What a cache holds that began with ``prompt``. Raises as :meth:`compress`."""
        with self._guard():
            seen = self.impl.tokens_seen(cache)
            if prompt is None or not seen:
                return Held()
            counts = self.impl.token_counts(cache)
            return Held(
                original=float(counts["original"]),
                quantized=float(counts["quantized"]),
                evicted=float(counts["evicted"]),
                kv_bytes=storage_bytes(cache),
                full_kv_bytes=prompt.cache.full_bytes(seen),
                ragged_kv_bytes=self.impl.ragged_bytes(cache),
                oq_ratios=self.impl.oq_ratios(cache),
            )

    def states(self, cache: Cache) -> Mapping[int, torch.Tensor] | None:
        """See :meth:`bench.methods.base.Method.states`. Raises as :meth:`compress`."""
        with self._guard():
            return self.impl.states(cache)

    def planned_bytes(self, sizes: Sizes, tokens: int) -> int | None:
        """See :meth:`bench.methods.base.Method.planned_bytes`."""
        with self._guard():
            return self.impl.planned_bytes(sizes, tokens, self.asked)
