"""Presses of kvpress: ``kvpress:snapkv``, with options ``kvpress:kvzip[kvzip_plus_normalization=true]``. One that wraps
another, such as ``chunkkv``, wraps ``snapkv``; ``kvpress:chunkkv+tova`` names another. Behind ``+quanto-int4`` (or
another backend) what the press leaves goes into transformers' ``QuantizedCache``.

A press runs inside kvpress' own context manager. Those that work in hooks of the attention, and KVzip's, share one
prefill (:mod:`bench.methods.pressing`); another one has a prefill of its own, since it may look at anything there, and
act as late as where that is left. Neither transformers nor the model keeps a trace of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from arkv import storage_bytes
from bench.errors import UserError
from bench.methods.base import Method, Sizes, drawing_the_same, repeat
from bench.methods.hf import repeat_quantized, stored_bytes
from bench.methods.names import BACKENDS, limits_of
from bench.methods.pressed import Pressed, PressedLayer, ShrinkingLayer, quantized
from bench.methods.presses import least_prompt, library, patched, plan_press, quiet, traceless
from bench.methods.pressing import Pressing, press_together, reads_twice, telling, works_in_hooks
from bench.methods.prompt import Asked, Budget, Compressed, Prompt, stand_in_question
from bench.methods.versions import installed_version
from bench.names import KVPRESS
from bench.telemetry import Stopwatch


class PressedCache(Cache):
    """A cache whose layers ``press`` goes on compressing while tokens are read; it keeps what it has seen of them."""

    def __init__(self, layers: list[Any], press: Any) -> None:
        super().__init__(layers=layers)
        self.press = press


class Press(Method):
    """A press, asked for by ``name``. Raises :class:`UserError` for one that is not there, or cannot be compared."""

    queries = 1
    one_by_one = True

    def __init__(self, name: str) -> None:
        self.plan = plan_press(name)
        self.name = name
        self.limits = limits_of(name)
        # What is removed leaves no sign of which tokens these were.
        self.knows_states = self.plan.masks
        self.needs_question = self.plan.needs_question
        if works_in_hooks(self.plan.kind) or reads_twice(self.plan.kind):
            self.prefill_group = KVPRESS
        self.backend: str | None = None
        """What quantizes the tokens that stay."""
        self.bits = 0
        if self.plan.asked.backend is not None:
            self.backend, self.bits = BACKENDS[self.plan.asked.backend]
            self.quant_format = self.plan.asked.backend.rpartition("-")[2]

    def compress(self, model: PreTrainedModel, prompt: Prompt, budget: Budget) -> Cache:
        """The cache alone."""
        return self._made(model, prompt.ids, Asked(budget.unit, cache_size=budget.tokens), prompt.question).cache

    def make(self, model: PreTrainedModel, prompt: Prompt, asked: Asked) -> Compressed:
        """In a prefill that is not the prompt's."""
        return self._made(model, prompt.ids, asked, prompt.question)

    def make_all(
        self, model: PreTrainedModel, prompt: Prompt, wanted: Sequence[tuple[Method, Asked]]
    ) -> Sequence[Compressed | Exception]:
        """In one prefill that is not the prompt's."""
        presses = [(method, asked) for method, asked in wanted if isinstance(method, Press)]
        return in_one_prefill(model, prompt.ids, presses, prompt.question)

    def prefill(self, model: PreTrainedModel, ids: torch.Tensor, asked: Asked) -> tuple[Cache, torch.Tensor]:
        """As :meth:`make` does; a prompt that is only timed has no question, for which its newest tokens stand."""
        made = self._made(model, ids, asked, stand_in_question(ids.shape[1]))
        assert made.logits is not None
        return made.cache, made.logits

    def _made(self, model: PreTrainedModel, ids: torch.Tensor, asked: Asked, question: int = 0) -> Compressed:
        """Of a prompt [1, N] that ends with so many tokens of a question.

        Raises :class:`UserError` for a model or a prompt that the press cannot do.
        """
        if self.prefill_group is None:
            return self._by_itself(model, ids, asked, question)
        (made,) = in_one_prefill(model, ids, [(self, asked)], question)
        if isinstance(made, UserError):
            raise made
        return made

    def _by_itself(self, model: PreTrainedModel, ids: torch.Tensor, asked: Asked, question: int = 0) -> Compressed:
        """Under the press's own context, which may do anything. Raises as :meth:`_made`."""
        tokens = ids.shape[1]
        press = self.press(model, tokens, asked, question)
        cache, clock = DynamicCache(config=model.config), Stopwatch(model.device)
        with (
            telling(self.name, tokens),
            traceless(model) as modules,
            patched(model),
            drawing_the_same(model),
            quiet(),
        ):
            with clock, press(model):
                logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            # Some presses choose only when their own context is left.
            masks = [getattr(module, "masked_key_indices", None) for module in modules]
        with clock:
            left = self.left(press, cache, masks, tokens)
        return Compressed(
            cache=left, logits=logits, prefill_s=clock.seconds, compress_s=None, kv_bytes=storage_bytes(left)
        )

    def press(self, model: PreTrainedModel, tokens: int, asked: Asked, question: int = 0) -> Any:
        """kvpress' own, for a prompt of so many tokens that ends with a question of so many.

        Raises :class:`UserError` for a model that it cannot do, and where it has to know of a question and does not.
        """
        if self.needs_question and not question:
            raise UserError(
                f"{self.name} has to be told where in the prompt that it compresses the question begins: give "
                "--question before, and tasks whose prompts are a context and a question"
            )
        with quiet():
            press = self.plan.press(tokens, self._kept(model, tokens, asked), asked.cache_size, question)
        if tokens <= least_prompt(press) and not self.plan.decodes:
            press.compression_ratio = 0.0
        self._check_windows(press, DynamicCache(config=model.config).is_sliding)
        return press

    def left(self, press: Any, cache: DynamicCache, masks: Sequence[Any], tokens: int) -> Cache:
        """The cache that decoding goes on from."""
        turned = _turns(press, self.name)
        layers: list[Any] = []
        for layer, masked in zip(cache.layers, masks, strict=True):
            assert layer.keys is not None
            assert layer.values is not None
            if getattr(layer, "is_sliding", False):
                layers.append(layer)
                continue
            if self.plan.decodes:
                layers.append(ShrinkingLayer(layer.keys, layer.values, tokens))
                continue
            counted = layer.keys.shape[2] if turned else tokens
            own = None if masked is None else tuple(map(_own, masked))
            left = PressedLayer(_own(layer.keys), _own(layer.values), tokens, counted, own)
            if self.backend is None:
                layers.append(left)
                continue
            try:
                layers.append(quantized(left, self.backend, self.bits))
            except ValueError as error:
                raise UserError(f"{self.name}: what the press leaves {error}") from None
        return PressedCache(layers, press) if self.plan.decodes else Cache(layers=layers)

    def _kept(self, model: PreTrainedModel, tokens: int, asked: Asked) -> int:
        """How many of a prompt's tokens stay. In bytes quantized tokens are more than the same bytes hold at model
        precision; those of presses that mask are counted as if heads stored only what they attend to."""
        kept = asked.kept(tokens)
        if self.backend is None or asked.unit != "bytes":
            return kept
        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return self._affordable(heads, dim, model.dtype.itemsize, tokens, kept)

    def _affordable(self, heads: int, dim: int, itemsize: int, tokens: int, kept: int) -> int:
        """The most quantized tokens that take no more than ``kept`` ones do at model precision, in one layer."""
        assert self.backend is not None
        budget = kept * 2 * heads * dim * itemsize
        most = tokens
        while most > 1 and stored_bytes(self.backend, self.bits, heads, dim, itemsize, most) > budget:
            most -= 1
        return most

    def _check_windows(self, press: Any, is_sliding: Sequence[bool]) -> None:
        """Presses are kept away from layers with a sliding window.

        Raises:
            UserError: no other layer is left, or the press works on the cache as a whole.
        """
        if not any(is_sliding):
            return
        if all(is_sliding):
            raise UserError(f"{self.name}: the model has a sliding window in all layers: there is nothing to compress")
        if not works_in_hooks(self.plan.kind):
            raise UserError(
                f"{self.name}: the model has layers with a sliding window, and this press works on the cache as a whole"
            )
        if _turns(press, self.name):
            raise UserError(
                f"{self.name}: the model has layers with a sliding window, whose tokens keep their positions, and this "
                "press turns what it keeps to new positions"
            )

    def decoding(self, model: PreTrainedModel, cache: Cache) -> AbstractContextManager[Any]:
        """Where tokens of single heads are masked, kvpress' attention, which knows of masks; a press that compresses
        while decoding is at work."""
        if isinstance(cache, PressedCache):
            return _pressing(model, cache)
        return _masking(model, [layer.masked for layer in cache.layers if isinstance(layer, Pressed)])

    def fork(self, cache: Cache) -> Cache:
        """A copy that can go its own way, with what its press has seen so far."""
        twin = super().fork(cache)
        if isinstance(twin, PressedCache):
            twin.press = copy.deepcopy(twin.press)
        return twin

    def reads_blocks(self, cache: Cache) -> bool:
        """As kvpress' pipeline reads a question. Not what compresses, or quantizes, what it reads on its way; nor where
        layers hold unequally many tokens, since a block has one mask for all; nor where tokens of single heads are
        masked: kvpress hides them by one key that no query of the block may see, and of many there need be none."""
        layers = [layer for layer in cache.layers if isinstance(layer, Pressed)]
        if self.plan.decodes or self.backend is not None or any(layer.masked is not None for layer in layers):
            return False
        return len({layer.stored for layer in layers}) == 1

    def batches(self, caches: Sequence[Cache]) -> bool:
        """One by one."""
        return False

    def repeated(self, cache: Cache, rows: int) -> Cache | None:
        """Of equal prompts a press leaves equally many tokens. Not where it masks some, or goes on compressing."""
        if self.plan.masks or self.plan.decodes:
            return None
        return (repeat if self.backend is None else repeat_quantized)(self.fork(cache), rows)

    def tokens_seen(self, cache: Cache) -> int:
        """Those of its layers, which may count fewer positions."""
        return max(layer.tokens_seen for layer in cache.layers if isinstance(layer, Pressed))

    def token_counts(self, cache: Cache) -> dict[str, float]:
        """Masked tokens are evicted, if also stored."""
        held = [layer.held() for layer in cache.layers if isinstance(layer, Pressed)]
        original, low = (sum(counts) / len(held) for counts in zip(*held, strict=True))
        # Means of heads add up but for rounding.
        evicted = max(0.0, self.tokens_seen(cache) - original - low)
        return {"original": original, "quantized": low, "evicted": evicted}

    def ragged_bytes(self, cache: Cache) -> int | None:
        """Of presses that mask: bytes as they would be if every head stored only what it attends to."""
        if not self.plan.masks:
            return None
        return sum(
            layer.ragged_bytes() if isinstance(layer, Pressed) else storage_bytes(layer) for layer in cache.layers
        )

    def states(self, cache: Cache) -> Mapping[int, torch.Tensor] | None:
        """Known where nothing was removed, or tokens were masked."""
        found = {place: layer.codes() for place, layer in enumerate(cache.layers) if isinstance(layer, Pressed)}
        known = {place: codes for place, codes in found.items() if codes is not None}
        return known if len(known) == len(found) else None

    @property
    def reads_twice(self) -> bool:
        """KVzip's does; what it masks is in the cache that it reads."""
        return reads_twice(self.plan.kind)

    def planned_bytes(self, sizes: Sizes, tokens: int, asked: Asked) -> int | None:
        """Of all tokens, and the places of those that are masked, where a press only masks them."""
        kept = asked.kept(tokens)

        def stored(count: int) -> int:
            if self.backend is None:
                return sizes.full_bytes(count)
            each = (self.backend, self.bits, sizes.kv_heads, sizes.head_dim, sizes.itemsize)
            return sizes.layers * stored_bytes(*each, count)

        if self.backend is not None and asked.unit == "bytes":
            kept = self._affordable(sizes.kv_heads, sizes.head_dim, sizes.itemsize, tokens, kept)
        if self.plan.asked.names[0] == "decoding":
            return stored(tokens)
        if not self.plan.masks:
            return stored(kept)
        place = 3 * torch.int64.itemsize
        return stored(tokens) + sizes.layers * sizes.kv_heads * (tokens - kept) * place


def make_press(name: str) -> tuple[Press, str]:
    """The press and the version of kvpress, and of what quantizes, once it is certain that it can be had.

    Raises:
        UserError: unknown name (the nearest known one is named), a press that cannot be compared, or a library that is
            not installed (the extra is named).
    """
    version = installed_version(name, KVPRESS)
    press = Press(name)
    if press.backend is not None:
        version += f", {press.backend} {installed_version(name, press.backend)}"
    return press, version


def in_one_prefill(
    model: PreTrainedModel, ids: torch.Tensor, wanted: Sequence[tuple[Press, Asked]], question: int = 0
) -> list[Compressed | UserError]:
    """What presses that share a prefill make of a prompt [1, N] that ends with so many tokens of a question, each
    within the budget asked for; an error stands for one that could not."""
    tokens, logits, seconds = ids.shape[1], None, 0.0
    pressings = [
        Pressing(model, press.name, tokens, partial(press.press, model, tokens, asked, question))
        for press, asked in wanted
    ]
    if able := [pressing for pressing in pressings if pressing.error is None]:
        logits, seconds = press_together(model, ids, able)
    found: list[Compressed | UserError] = []
    for (press, _), pressing in zip(wanted, pressings, strict=True):
        if pressing.error is None:
            with pressing.at_work([]):
                left = press.left(pressing.press, pressing.cache, pressing.masks, tokens)
        if pressing.error is not None:
            found.append(pressing.error)
            continue
        found.append(
            Compressed(
                cache=left,
                logits=logits,
                prefill_s=seconds,
                compress_s=pressing.clock.seconds,
                kv_bytes=storage_bytes(left),
            )
        )
    return found


def _turns(press: Any, name: str) -> bool:
    """Whether a press turns what it keeps to new positions."""
    kvpress = library(name)
    return isinstance(press, kvpress.KeyRerotationPress) or (
        isinstance(press, kvpress.FinchPress) and press.rerotate_keys
    )


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The same without the larger tensor that it may be a view of: presses that read a prompt twice leave such."""
    whole = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
    return tensor.clone(memory_format=torch.contiguous_format) if whole else tensor


@contextmanager
def _masking(model: PreTrainedModel, masks: Sequence[Any]) -> Iterator[None]:
    """Under this, each layer leaves out its masked tokens."""
    if all(masked is None for masked in masks):
        yield
        return
    with traceless(model) as modules, patched(model):
        for module, masked in zip(modules, masks, strict=True):
            module.masked_key_indices = masked
        yield


@contextmanager
def _pressing(model: PreTrainedModel, cache: PressedCache) -> Iterator[None]:
    """Under this, every :class:`PressedCache` that is read is compressed by its own press; all are copies of one."""

    def hook(module: Any, inputs: Any, options: Any, output: Any) -> Any:
        with quiet():
            return options["past_key_values"].press.forward_hook(module, inputs, options, output)

    # Leaving a press's context resets it: a copy takes its place, so that each goes on where it stopped.
    stand_in = copy.copy(cache.press)
    stand_in.forward_hook = hook
    if (decoding := getattr(stand_in, "decoding_press", None)) is not None:
        stand_in.decoding_press = copy.copy(decoding)
    with traceless(model), stand_in(model):
        yield
