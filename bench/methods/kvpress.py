"""Presses of kvpress: ``kvpress:snapkv``. One that wraps another, such as ``chunkkv``, wraps ``snapkv``;
``kvpress:chunkkv+tova`` names another.

A press runs inside kvpress' own context manager during a prefill of its own, since it may look at anything there, and
act as late as where that is left. Neither transformers nor the model keeps a trace of it.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arkv import storage_bytes
from bench.errors import UserError
from bench.methods.base import Method, Sizes, drawing_the_same
from bench.methods.kept import KeptLayer
from bench.methods.modules import attention_modules
from bench.methods.names import EXTRA, PRESSES, limits_of, usable_presses
from bench.methods.prompt import Asked, Budget, Compressed, Prompt
from bench.methods.states import EVICTED, ORIGINAL
from bench.methods.versions import installed_version
from bench.names import KVPRESS
from bench.telemetry import Stopwatch
from tasks.base import nearest


class PressedLayer(KeptLayer):
    """What a press left of a layer.

    Args:
        seen: how many tokens have been seen.
        counted: how many of them the next position counts: fewer where tokens that stay were turned to new positions.
        masked: indices (sample, head, token) of tokens that are stored and never attended to, or None.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, seen: int, counted: int, masked: Any) -> None:
        super().__init__(keys, values, counted)
        self.turned = seen - counted
        self.masked = masked

    @property
    def tokens_seen(self) -> int:
        """Tokens that have gone in."""
        return self.get_seq_length() + self.turned

    def held(self) -> float:
        """Tokens that can be attended to, mean over KV heads."""
        assert self.keys is not None
        masked = 0 if self.masked is None else len(self.masked[0])
        return self.keys.shape[-2] - masked / (self.keys.shape[0] * self.keys.shape[1])

    def codes(self) -> torch.Tensor | None:
        """State of every token, int8 [H, N]; None where tokens were removed, which leaves no sign of which."""
        assert self.keys is not None
        if self.tokens_seen != self.keys.shape[2]:
            return None
        codes = torch.full((self.keys.shape[1], self.keys.shape[2]), ORIGINAL, dtype=torch.int8)
        if self.masked is not None:
            _, heads, tokens = self.masked
            codes[heads.cpu(), tokens.cpu()] = EVICTED
        return codes


class Press(Method):
    """A press, asked for by ``name``. Raises :class:`UserError` for one that is not there, or cannot be compared."""

    queries = 1
    one_by_one = True

    def __init__(self, name: str) -> None:
        _classes(name)
        self.name = name
        self.limits = limits_of(name)
        self.parts = name.partition(":")[2].split("+")
        # What is removed leaves no sign of which tokens these were.
        self.knows_states = self._masks

    @property
    def _masks(self) -> bool:
        """Whether tokens stay stored and are masked."""
        return any(PRESSES[part].masks for part in self.parts)

    def compress(self, model: PreTrainedModel, prompt: Prompt, budget: Budget) -> Cache:
        """The cache alone, of a prefill of the press's own."""
        return self._pressed(model, prompt.ids, budget.tokens, Stopwatch(model.device))[0]

    def make(self, model: PreTrainedModel, prompt: Prompt, asked: Asked) -> Compressed:
        """In a prefill of its own."""
        clock = Stopwatch(model.device)
        cache, logits = self._pressed(model, prompt.ids, asked.kept(prompt.tokens), clock)
        return Compressed(
            cache=cache,
            logits=logits,
            prefill_s=clock.seconds,
            compress_s=None,
            kv_bytes=storage_bytes(cache),
        )

    def prefill(self, model: PreTrainedModel, ids: torch.Tensor, asked: Asked) -> tuple[Cache, torch.Tensor]:
        """As :meth:`make` does."""
        return self._pressed(model, ids, asked.kept(ids.shape[1]), Stopwatch(model.device))

    def _pressed(
        self, model: PreTrainedModel, ids: torch.Tensor, kept: int, clock: Stopwatch
    ) -> tuple[Cache, torch.Tensor]:
        """Read a prompt [1, N] under the press: its cache, and logits [1, vocabulary] of the token that follows.

        Raises:
            UserError: the model or the prompt is not one that the press can do.
        """
        tokens = ids.shape[1]
        with _quiet():
            press = self.press(tokens, kept)
        if tokens <= _least_prompt(press):
            press.compression_ratio = 0.0
        cache = DynamicCache(config=model.config)
        if any(cache.is_sliding):
            self._spare_windows(press, cache)
        try:
            with traceless(model) as modules, patched(model), drawing_the_same(model), _quiet():
                with clock, press(model):
                    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
                # Some presses choose only when their own context is left.
                masks = [getattr(module, "masked_key_indices", None) for module in modules]
        except (AssertionError, KeyError, OSError, ValueError) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{self.name}: kvpress cannot do a prompt of {tokens} tokens with this model: {said}"
            ) from error
        turned = isinstance(press, library(self.name).KeyRerotationPress)
        layers: list[Any] = []
        for layer, masked in zip(cache.layers, masks, strict=True):
            assert layer.keys is not None
            assert layer.values is not None
            if getattr(layer, "is_sliding", False):
                layers.append(layer)
                continue
            counted = layer.keys.shape[2] if turned else tokens
            layers.append(PressedLayer(layer.keys, layer.values, tokens, counted, masked))
        return Cache(layers=layers), logits

    def _spare_windows(self, press: Any, cache: DynamicCache) -> None:
        """Keep ``press`` away from the layers of ``cache`` that have a sliding window.

        Raises:
            UserError: no layer is left for it, or it works on the cache as a whole.
        """
        if all(cache.is_sliding):
            raise UserError(f"{self.name}: the model has a sliding window in all layers: there is nothing to compress")
        if type(press).__call__ is not library(self.name).BasePress.__call__:
            raise UserError(
                f"{self.name}: the model has layers with a sliding window, and this press works on the cache as a whole"
            )
        if isinstance(press, library(self.name).KeyRerotationPress):
            raise UserError(
                f"{self.name}: the model has layers with a sliding window, whose tokens keep their positions, and this "
                "press turns what it keeps to new positions"
            )
        compress = press.forward_hook

        def hook(module: Any, inputs: Any, options: Any, output: Any) -> Any:
            return output if cache.is_sliding[module.layer_idx] else compress(module, inputs, options, output)

        press.forward_hook = hook

    def press(self, tokens: int, kept: int) -> Any:
        """A kvpress press that keeps ``kept`` of ``tokens`` tokens."""
        outer, *inner = _classes(self.name)
        if "press" in inspect.signature(outer).parameters:
            press = outer(inner[0]() if inner else library(self.name).SnapKVPress())
        else:
            press = outer()
        # Presses truncate or round the number that the ratio gives: a quarter above a whole one is safe for both.
        press.compression_ratio = 0.0 if kept >= tokens else 1.0 - (kept + 0.25) / tokens
        return press

    def decoding(self, model: PreTrainedModel, cache: Cache) -> AbstractContextManager[Any]:
        """Where tokens of single heads are masked, kvpress' attention, which knows of masks."""
        return _masking(model, [layer.masked for layer in cache.layers if isinstance(layer, PressedLayer)])

    def reads_blocks(self, cache: Cache) -> bool:
        """Token by token, as it decodes."""
        return False

    def batches(self, caches: Sequence[Cache]) -> bool:
        """One by one."""
        return False

    def tokens_seen(self, cache: Cache) -> int:
        """Those of its layers, which may count fewer positions."""
        return max(layer.tokens_seen for layer in cache.layers if isinstance(layer, PressedLayer))

    def token_counts(self, cache: Cache) -> dict[str, float]:
        """Masked tokens are evicted, if also stored."""
        held = [layer.held() for layer in cache.layers if isinstance(layer, PressedLayer)]
        original = sum(held) / len(held)
        return {"original": original, "quantized": 0.0, "evicted": self.tokens_seen(cache) - original}

    def states(self, cache: Cache) -> Mapping[int, torch.Tensor] | None:
        """Known where nothing was removed, or tokens were masked."""
        found = {place: layer.codes() for place, layer in enumerate(cache.layers) if isinstance(layer, PressedLayer)}
        known = {place: codes for place, codes in found.items() if codes is not None}
        return known if len(known) == len(found) else None

    def planned_bytes(self, sizes: Sizes, tokens: int, asked: Asked) -> int | None:
        """Of all tokens, and the places of those that are masked, where a press only masks them."""
        kept = asked.kept(tokens)
        if not self._masks:
            return sizes.full_bytes(kept)
        place = 3 * torch.int64.itemsize
        return sizes.full_bytes(tokens) + sizes.layers * sizes.kv_heads * (tokens - kept) * place


def make_press(name: str) -> tuple[Press, str]:
    """The press and the version of kvpress, once it is certain that it can be had.

    Raises:
        UserError: unknown name (the nearest known one is named), a press that cannot be compared, or kvpress is not
            installed (the extra is named).
    """
    version = installed_version(name, KVPRESS)
    return Press(name), version


def library(name: str) -> Any:
    """kvpress itself. Importing it wraps every attention function of transformers; that is undone here."""
    version = installed_version(name, KVPRESS)
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        return importlib.import_module("kvpress")
    except ImportError as error:
        versions = f"kvpress {version} with transformers {metadata.version('transformers')}"
        raise UserError(f"{name}: {versions} cannot be imported ({error}); see {EXTRA}", exit_code=2) from None
    finally:
        for key, function in before.items():
            ALL_ATTENTION_FUNCTIONS[key] = function


def _classes(name: str) -> list[Any]:
    """The class of the press and that of the one it wraps, if named. Raises :class:`UserError`."""
    kvpress = library(name)
    found = []
    for part in name.partition(":")[2].split("+"):
        press = PRESSES.get(part)
        if press is None:
            usable = [f"{KVPRESS}:{press}" for press in usable_presses()]
            raise UserError(f"unknown method {name!r}: {nearest(f'{KVPRESS}:{part}', usable)}", exit_code=2)
        if press.unusable is not None:
            raise UserError(f"{name}: {part} cannot be compared at a budget: {press.unusable}", exit_code=2)
        if press.needs is not None:
            raise UserError(f"{name}: {part} is not offered, since it needs {press.needs}", exit_code=2)
        if not hasattr(kvpress, press.class_name):
            raise UserError(f"{name}: this kvpress has no {press.class_name}: {EXTRA}", exit_code=2)
        found.append(getattr(kvpress, press.class_name))
    outer, *inner = found
    if len(inner) > 1 or (inner and "press" not in inspect.signature(outer).parameters):
        raise UserError(f"{name}: {outer.__name__} wraps no other press", exit_code=2)
    if inner and not issubclass(inner[0], kvpress.ScorerPress):
        raise UserError(f"{name}: {inner[0].__name__} gives tokens no score that could be used", exit_code=2)
    return found


def _least_prompt(press: Any) -> int:
    """The longest prompt that a press cannot score, because its window or its sinks are all there is."""
    own = max(getattr(press, "window_size", 0) or 0, getattr(press, "n_sink", 0) or 0)
    wrapped = getattr(press, "press", None)
    return own if wrapped is None else max(own, _least_prompt(wrapped))


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
def _quiet() -> Iterator[None]:
    """Without the library's warnings, the same for every prompt: what a press costs is measured."""
    logger = logging.getLogger("kvpress")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def traceless(model: PreTrainedModel) -> Iterator[list[Any]]:
    """The attention modules of ``model``; what kvpress sets on any of its modules is gone afterwards."""
    before = [(module, {*vars(module), *module._modules}) for module in model.modules()]
    try:
        yield attention_modules(model)
    finally:
        for module, known in before:
            for name in {*vars(module), *module._modules} - known:
                delattr(module, name)


@contextmanager
def patched(model: PreTrainedModel) -> Iterator[None]:
    """The model's attention function as kvpress wraps it, which lets its presses mask tokens of single heads.

    Eager attention is no registered function: presses that mask refuse it themselves.
    """
    library(KVPRESS)
    patch = importlib.import_module("kvpress.attention_patch").attention_patch
    name = model.config._attn_implementation
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    if name in before:
        ALL_ATTENTION_FUNCTIONS[name] = patch(before[name])
    try:
        yield
    finally:
        if name in before:
            ALL_ATTENTION_FUNCTIONS[name] = before[name]
