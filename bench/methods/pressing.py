"""Presses of any budgets in one prefill: each makes of a prompt what it would make of it alone.

A press that compresses in a hook of the attention changes nothing of what the model computes, since a layer's output is
there before its keys and values are compressed. So each press is handed the full ones in a cache of its own, draws
numbers of its own, and sets on modules what only it sees. KVzip's, which reads the prompt a second time, does so once
for all budgets: only the last step depends on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from arkv.models import copy_layer
from bench.errors import OthersCode, UserError
from bench.methods.base import drawing_the_same
from bench.methods.presses import library, patched, quiet, traceless
from bench.names import KVPRESS
from bench.telemetry import Stopwatch


def works_in_hooks(kind: Any) -> bool:
    """Whether presses of this class do no more than to compress in kvpress' own hook of the attention. Finch's own
    context adds what finds a delimiter, of which there is none here."""
    base, finch = library(KVPRESS).BasePress, library(KVPRESS).FinchPress
    return kind.__call__ in (base.__call__, finch.__call__) and kind.forward_hook is base.forward_hook


def reads_twice(kind: Any) -> bool:
    """Whether presses of this class are KVzip's, whose second reading does not depend on the budget."""
    return kind is library(KVPRESS).KVzipPress


@contextmanager
def telling(name: str, tokens: int) -> Iterator[None]:
    """What a press raises under this is a :class:`UserError` that begins with ``name``: in the press's own words where
    it says what it cannot do, otherwise with the kind of the error and its place."""
    said_by_presses = (AssertionError, KeyError, OSError, ValueError)
    try:
        with OthersCode(name, *said_by_presses, placed=True):
            yield
    except said_by_presses as error:
        words = " ".join(str(error).split()) or type(error).__name__
        said = f"kvpress cannot do a prompt of {tokens} tokens with this model: {words}"
        raise UserError(f"{name}: {said}" if name else said) from error


class Pressing:
    """A press at work on a prompt beside others.

    Args:
        name: of the method.
        tokens: of the prompt.
        make: gives the press, of a class that :func:`works_in_hooks` or :func:`reads_twice`.
    """

    def __init__(self, model: PreTrainedModel, name: str, tokens: int, make: Callable[[], Any]) -> None:
        self.model, self.name, self.tokens = model, name, tokens
        self.cache = DynamicCache(config=model.config)
        """What the press leaves."""
        self.masks: list[Any] = [None] * len(self.cache.layers)
        """Of each layer the tokens that it masks, or None."""
        self.error: UserError | None = None
        """Why it has made nothing."""
        self.clock = Stopwatch(model.device)
        """Of its own work."""
        self._draws: list[torch.Tensor] | None = None
        self.press: Any = None
        with self.at_work([]):
            self.press = make()

    @contextmanager
    def at_work(self, modules: Sequence[Any]) -> Iterator[None]:
        """Under this the press has random numbers of its own. What it sets on ``modules`` is taken off again, its masks
        are kept, and what it raises is its own :attr:`error`."""
        before = [dict(vars(module)) for module in modules]
        try:
            with self.clock, self._drawing(), telling(self.name, self.tokens):
                yield
        except UserError as error:
            self.error = error
        finally:
            for module, attributes in zip(modules, before, strict=True):
                self.masks[module.layer_idx] = getattr(module, "masked_key_indices", None)
                vars(module).clear()
                vars(module).update(attributes)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Draws go on where this press has stopped."""
        cuda = self.model.device if self.model.device.type == "cuda" else None
        with drawing_the_same(self.model):
            if self._draws is not None:
                torch.set_rng_state(self._draws[0])
                if cuda is not None:
                    torch.cuda.set_rng_state(self._draws[1], cuda)
            yield
            self._draws = [torch.get_rng_state()]
            if cuda is not None:
                self._draws.append(torch.cuda.get_rng_state(cuda))

    def begin(self, stack: ExitStack) -> None:
        """Enter the press's own context, whose hooks compress copies of a layer."""
        compress = self.press.forward_hook

        def hook(module: Any, inputs: Any, options: Any, output: Any) -> Any:
            cache, place = options["past_key_values"], module.layer_idx
            if self.error is None and not cache.is_sliding[place]:
                self.cache.layers[place] = copy_layer(cache.layers[place])
                with self.at_work([module]):
                    compress(module, inputs, {**options, "past_key_values": self.cache}, output)
            return output

        self.press.forward_hook = hook
        with self.at_work([]):
            stack.enter_context(self.press(self.model))


@contextmanager
def _for_all(pressings: Sequence[Pressing]) -> Iterator[None]:
    """What fails under this fails for all of them."""
    try:
        with telling("", pressings[0].tokens):
            yield
    except UserError as error:
        for each in pressings:
            each.error = UserError(f"{each.name}: {error}")
            each.error.__cause__ = error


def press_together(
    model: PreTrainedModel, ids: torch.Tensor, pressings: Sequence[Pressing]
) -> tuple[torch.Tensor | None, float]:
    """Read a prompt [1, N] once for all ``pressings``, of which there are some and none has an error; then each has
    done its work, or has.

    Returns:
        Logits [1, vocabulary] of the token that follows, None where the model failed, and the seconds that the prefill
        took without the presses.
    """
    logits = None
    twice = [each for each in pressings if reads_twice(type(each.press))]
    hooked = [each for each in pressings if each not in twice]
    cache = DynamicCache(config=model.config)

    def hand_out(module: Any, inputs: Any, output: Any) -> None:
        """Whoever needs a layer whole has it, and nobody needs it here any more. Layers with a window are few."""
        place = module.layer_idx
        for each in pressings if cache.is_sliding[place] else twice:
            each.cache.layers[place] = copy_layer(cache.layers[place])
        if not cache.is_sliding[place]:
            cache.layers[place] = DynamicLayer()

    clock, own = Stopwatch(model.device), 0.0
    with _for_all(pressings), traceless(model) as modules, patched(model), quiet():
        with ExitStack() as stack:
            for each in hooked:
                each.begin(stack)
            for module in modules:
                # Behind the presses' own.
                stack.callback(module.register_forward_hook(hand_out).remove)
            before = sum(each.clock.seconds for each in hooked)
            with clock:
                logits = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            own = sum(each.clock.seconds for each in hooked) - before
        for alike in _alike(twice):
            _read_again(model, ids, alike, modules)
    return logits, max(clock.seconds - own, 0.0)


def _alike(pressings: Sequence[Pressing]) -> list[list[Pressing]]:
    """Those whose presses differ in nothing but the ratio together."""
    found: dict[tuple[Any, ...], list[Pressing]] = {}
    for each in pressings:
        fields = [field.name for field in dataclasses.fields(each.press) if field.name != "compression_ratio"]
        found.setdefault(tuple(getattr(each.press, name) for name in fields), []).append(each)
    return list(found.values())


def _read_again(model: PreTrainedModel, ids: torch.Tensor, alike: Sequence[Pressing], modules: Sequence[Any]) -> None:
    """KVzip's own context, once: it scores all tokens, and masks them for each ratio."""
    press = max((each.press for each in alike), key=lambda press: press.compression_ratio)
    ratios = [each.press.compression_ratio for each in alike]
    mask, forward = press.compress_post, model.model.forward
    unread = [ids]
    cache = DynamicCache(config=model.config)
    cache.layers = [copy_layer(layer) for layer in alike[0].cache.layers]

    def mask_for_each(scored: PreTrainedModel) -> None:
        scores = press.score_val
        for each, ratio in zip(alike, ratios, strict=True):
            # The sinks' scores are written over.
            press.compression_ratio, press.score_val = ratio, scores.clone()
            with each.at_work(modules):
                mask(scored)

    def reading(*inputs: Any, **options: Any) -> Any:
        """The model's, but for the prompt, which it has read."""
        return forward(*inputs, **options) if not unread else unread.clear()

    clock = Stopwatch(model.device)
    try:
        with clock, drawing_the_same(model), _for_all(alike):
            press.compress_post, model.model.forward = mask_for_each, reading
            with press(model):
                model.model.forward(input_ids=ids, past_key_values=cache)
    finally:
        model.model.forward = forward
    own = sum(each.clock.seconds for each in alike)
    for each in alike:
        each.clock.seconds += max(clock.seconds - own, 0.0)
