"""What a cache method is, whoever wrote it: the one protocol through which everything else uses methods.

A method is given a prompt that the model has read, and makes a cache of it within a budget. It also says what it needs
before the prompt is read, how its cache is decoded with, copied and put side by side with others, what the cache holds,
and what it cannot do. Everything but the name and :meth:`Method.compress` has a default that suits a cache of stock
layers, of :class:`KeptLayer` s, or an :class:`arkv.TriStateCache`.

Letters: ``H`` KV heads, ``Hq`` query heads, ``N`` tokens of the prompt, ``W`` newest queries, ``D`` head dim.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from arkv import CacheConfig, TriStateCache, attach, storage_bytes
from arkv.models import copy_layer
from bench.errors import UserError
from bench.methods.kept import KeptLayer
from bench.methods.prompt import Asked, Budget, Compressed, Prompt
from bench.methods.reading import record
from bench.methods.states import state_codes
from bench.telemetry import Stopwatch


class Sizes(Protocol):
    """A model's geometry, as far as a method says from it what its cache will take."""

    @property
    def layers(self) -> int:
        """That can be compressed."""

    @property
    def kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def itemsize(self) -> int:
        """Bytes of a number at model precision."""

    @property
    def context(self) -> int | None: ...

    @property
    def layer_bytes(self) -> int:
        """Key and value of one token in one layer at model precision."""

    def full_bytes(self, tokens: int) -> int:
        """The full cache of so many tokens."""


class Method(ABC):
    """A cache method. Subclasses give ``name`` and :meth:`compress`; those of plugins are made without arguments."""

    name: str
    """As in ``--methods``: no comma, colon or space, and no other method's name."""
    description: str = ""
    """One line for ``arkv-bench list methods``."""
    limits: str = ""
    """What the method cannot do, or where it does not keep to its budget, in words."""
    quant_format: str | None = None
    """Number format of the tokens that the method quantizes, such as ``int4``; None where it quantizes nothing."""
    window_size: int | None = None
    """Newest tokens that always stay at model precision, where the method has such a setting."""
    cache_config: CacheConfig | None = None
    """Settings of the tri-state cache, where the method is one with settings that can be searched."""
    settings_space: Mapping[str, tuple[Any, ...]] = {}
    """Settings that variants and ``tune`` may change, each an attribute: ``(low, high)`` of numbers, with ``"log"`` or
    the step of whole numbers behind them, or the choices, as text."""
    has_budget: bool = True
    """False for a method of one size: it is measured once, whatever budgets are asked for."""

    knows_states: bool = True
    """False for a method whose caches never know which tokens they hold, so that nobody asks for :meth:`states`."""

    # --- Before the prompt is read ---

    queries: int = 32
    """W, how many of the newest queries the prompt's layers keep for :meth:`compress`."""
    needs_question: bool = False
    """The method compresses prompts that their questions stand in, and is told which tokens these are
    (:attr:`Prompt.question`): a run that asks any question otherwise is refused."""
    one_by_one: bool = False
    """Documents are answered one after the other, even where others go side by side."""
    prefill_group: str | None = None
    """Methods with the same word here make their caches of a prompt in one prefill, which is not the prompt's, by
    :meth:`make_all` of any of them, one prompt after the other; None where a method needs none or has its own."""

    def resized(self, asked: Asked) -> Method:
        """The method with another budget, where the budget is among its own settings."""
        return self

    def with_settings(self, **values: Any) -> Method:
        """A copy with other values of settings of :attr:`settings_space`."""
        twin = copy.copy(self)
        for name, value in values.items():
            setattr(twin, name, value)
        return twin

    # --- What it makes of a prompt ---

    @abstractmethod
    def compress(self, model: PreTrainedModel, prompt: Prompt, budget: Budget) -> Cache:
        """A cache that has seen the N tokens of the prompt, from which ``model`` goes on token by token.

        :func:`bench.extend.keep_tokens` makes one of the tokens that stay, and an ``arkv.TriStateCache`` is one too. A
        cache class of your own may compress while decoding as well. It must not hold slices of the prompt's tensors: a
        slice holds on to the whole, and the whole is what is counted. Its layers replace their tensors and never write
        into them, as transformers' own do: choices of a question are read from shallow copies.

        Numbers drawn with torch are the same in every run.
        """

    def make(self, model: PreTrainedModel, prompt: Prompt, asked: Asked) -> Compressed:
        """:meth:`compress` within the budget asked for, and what it took."""
        budget = asked.of(prompt)
        clock = Stopwatch(model.device)
        with drawing_the_same(model), clock:
            cache = self.compress(model, prompt, budget)
        return Compressed(
            cache=cache,
            logits=prompt.logits,
            prefill_s=prompt.seconds,
            compress_s=clock.seconds,
            kv_bytes=storage_bytes(cache),
        )

    def make_all(
        self, model: PreTrainedModel, prompt: Prompt, wanted: Sequence[tuple[Method, Asked]]
    ) -> Sequence[Compressed | Exception]:
        """What :meth:`make` of each of ``wanted``, which have one :attr:`prefill_group`, gives within its budget: the
        same, in one prefill, whose time counts for each. An exception stands for a method that could not."""
        raise NotImplementedError(f"{self.name} says that it shares a prefill, and has no make_all")

    def empty(self, model: PreTrainedModel) -> Cache:
        """A cache without a context, which compresses what is read through it.

        Raises:
            UserError: the method compresses prompts only.
        """
        raise UserError(f"{self.name} compresses a prompt, and here there is none before the tokens to be scored")

    def prefill(self, model: PreTrainedModel, ids: torch.Tensor, asked: Asked) -> tuple[Cache, torch.Tensor]:
        """Read a prompt [1, N] and compress it, as where the method is all that is used: the cache, and the logits
        [1, vocabulary] of the token that follows. It is what ``speed`` times."""
        (prompt,) = record(model, ids.tolist(), self.queries)
        assert prompt.logits is not None
        return self.compress(model, prompt, asked.of(prompt)), prompt.logits

    # --- How its cache is used ---

    def decoding(self, model: PreTrainedModel, cache: Cache) -> contextlib.AbstractContextManager[Any]:
        """What ``model`` needs around it while it decodes with a cache of :meth:`compress`."""
        return attach(model) if isinstance(cache, TriStateCache) else contextlib.nullcontext()

    def fork(self, cache: Cache) -> Cache:
        """A copy that can go its own way."""
        if isinstance(cache, TriStateCache):
            return cache.fork()
        twin = copy.copy(cache)
        twin.layers = [copy_layer(layer) for layer in cache.layers]
        return twin

    def reads_blocks(self, cache: Cache) -> bool:
        """Whether several tokens can be read through the cache in one forward, with the same outcome as one by one.

        True where its layers are known to be able to; other caches are read as they decode.
        """
        return is_plain(cache)

    def batches(self, caches: Sequence[Cache]) -> bool:
        """Whether rows of several documents, each with a cache of its own, can go through the model side by side.

        Not by default where the method needs something of its own around the model while it decodes.
        """
        own = type(self).decoding is not Method.decoding
        return not (self.one_by_one or own) and all(map(is_plain, caches))

    def repeated(self, cache: Cache, rows: int) -> Cache | None:
        """One cache of ``rows`` samples, each of which holds, in storage of its own, what the only one of ``cache``
        does: what a batch of so many equal prompts would leave, which a forward decodes at once. ``speed`` times it.

        None where rows are decoded one after the other.
        """
        return repeat(self.fork(cache), rows) if self.batches([cache]) else None

    # --- What its cache holds ---

    def tokens_seen(self, cache: Cache) -> int:
        """Tokens that have gone into the cache, whatever became of them: the position of the next one, except where
        tokens that stay were turned to new positions."""
        return cache.get_seq_length()

    def token_counts(self, cache: Cache) -> dict[str, float]:
        """Tokens ``original``, ``quantized`` and ``evicted`` of a cache, mean over layers and KV heads.

        As it is: what a layer's ``keys`` [1, H, n, D] hold is there, the rest of the tokens seen is evicted.
        """
        if isinstance(cache, TriStateCache):
            return cache.token_counts()
        layers = [layer for layer in cache.layers if not getattr(layer, "is_sliding", False)]
        # Where every layer has a window, what it leaves behind is the model's doing, and no method's.
        held = (
            fmean(0 if layer.keys is None else layer.keys.shape[-2] for layer in layers)
            if layers
            else self.tokens_seen(cache)
        )
        state = "original" if self.quant_format is None else "quantized"
        return {"original": 0.0, "quantized": 0.0, state: held, "evicted": self.tokens_seen(cache) - held}

    def ragged_bytes(self, cache: Cache) -> int | None:
        """What a cache that masks tokens of single heads would take if each head stored only what it attends to; None
        where bytes are what they are."""
        return None

    def oq_ratios(self, cache: Cache) -> list[float]:
        """Share of Original tokens among those kept, per compressible layer, where layers differ in it."""
        return cache.oq_ratios() if isinstance(cache, TriStateCache) and cache.config.uses_oq else []

    def states(self, cache: Cache) -> Mapping[int, torch.Tensor] | None:
        """State of every token seen, int8 [H, N] by the place of each compressible layer (codes are those of
        :mod:`bench.methods.states`); None where the cache does not know which tokens it holds."""
        return None if self.quant_format is not None and not isinstance(cache, TriStateCache) else state_codes(cache)

    @property
    def reads_twice(self) -> bool:
        """Whether a prompt is read again before it is compressed, which is as long again before the first token."""
        return False

    def reading_bytes(self, sizes: Sizes, tokens: int) -> int:
        """Keys, values and scores that there are beside the compressed cache while a prompt is read: of one layer,
        where each is compressed as soon as it has been computed."""
        return sizes.layer_bytes * tokens

    def planned_bytes(self, sizes: Sizes, tokens: int, asked: Asked) -> int | None:
        """What the cache of a prompt of so many tokens takes at most, once compressed; None where it cannot be said."""
        return None if self.quant_format is not None else sizes.full_bytes(asked.kept(tokens))

    # --- What makes it another cell of the grid ---

    def settings(self) -> dict[str, Any] | None:
        """All that changes its answers, where that is more than its name, the version of its code and the budget."""
        return None

    def named_settings(self) -> tuple[str, ...]:
        """Of the settings those that a cell's key spells out."""
        return ()

    def shown_settings(self) -> tuple[str, ...]:
        """Of the settings those that a cell's label shows."""
        return ()


@contextlib.contextmanager
def drawing_the_same(model: Any) -> Iterator[None]:
    """What draws numbers under this draws the same for the same prompt, and leaves no trace."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def repeat(cache: Cache, rows: int) -> Cache:
    """``cache``, which is a copy, with ``rows`` of its only sample."""
    cache.batch_repeat_interleave(rows)
    return cache


def is_plain(cache: Cache) -> bool:
    """Whether a cache is known to give attention all that it holds, in order, so that rows of it can stand beside
    others, and blocks of tokens be read: a tri-state cache, or one of stock or :class:`KeptLayer` layers."""
    if isinstance(cache, TriStateCache):
        return True
    if type(cache).update is not Cache.update:
        return False
    known = (DynamicLayer, DynamicSlidingWindowLayer, KeptLayer)
    updates, masks = ({getattr(kind, name) for kind in known} for name in ("update", "get_mask_sizes"))
    return all(type(layer).update in updates and type(layer).get_mask_sizes in masks for layer in cache.layers)
