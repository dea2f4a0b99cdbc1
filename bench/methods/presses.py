"""kvpress itself: its presses by name, with their options, and what it sets on models and transformers taken back."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench.errors import UserError
from bench.methods.modules import attention_modules
from bench.methods.names import BACKENDS, EXTRA, PRESSES, usable_presses
from bench.methods.press_names import PressName, PressPart, parse_press
from bench.methods.versions import installed_version
from bench.names import KVPRESS
from tasks.errors import nearest

_GIVEN = {"compression_ratio": "the budget says it", "target_size": "the budget says it"}
"""Parameters that are not open to options, and why."""


@dataclasses.dataclass(frozen=True)
class PressPlan:
    """What a name asks for, once it is certain that it can be had."""

    name: str
    asked: PressName
    options: tuple[Mapping[str, Any], ...]
    """Of every part, as its class takes them."""

    @property
    def kind(self) -> Any:
        """The class of the press, of the outer one where it wraps another."""
        return getattr(library(self.name), PRESSES[self.asked.names[0]].class_name)

    @property
    def decodes(self) -> bool:
        """Whether it compresses while tokens are read and written, beside the prefill or in its place."""
        return PRESSES[self.asked.names[0]].decodes is not None

    @property
    def masks(self) -> bool:
        """Whether tokens stay stored and are masked."""
        return any(PRESSES[name].masks for name in self.asked.names)

    @property
    def needs_question(self) -> bool:
        """Whether it has to know where in a prompt the question begins."""
        return any(PRESSES[name].divides for name in self.asked.names)

    def press(self, tokens: int, kept: int, size: int | None = None, question: int = 0) -> Any:
        """A press that keeps ``kept`` of ``tokens`` tokens of a prompt, and ``size`` (as many, if None) of all tokens
        while decoding where it decodes; the last ``question`` tokens of the prompt are its question."""
        kvpress = library(self.name)
        outer, inner = self.kind, [getattr(kvpress, PRESSES[part.name].class_name) for part in self.asked.parts[1:]]
        own, *others = self.options
        # Presses truncate or round the number that the ratio gives: a quarter above a whole one is safe for both.
        ratio = 0.0 if kept >= tokens else 1.0 - (kept + 0.25) / tokens

        def wrapped() -> Any:
            return inner[0](**others[0]) if inner else kvpress.SnapKVPress()

        if self.decodes:
            decoding = kvpress.DecodingPress(base_press=wrapped(), target_size=size or kept, **own)
            if outer is kvpress.DecodingPress:
                return decoding
            before = wrapped()
            before.compression_ratio = ratio
            return outer(prefilling_press=before, decoding_press=decoding)
        press = outer(wrapped(), **own) if _wraps(outer) else outer(**own)
        press.compression_ratio = ratio
        if self.needs_question:
            # A delimiter in the prompt would tell it no more than this number, and its hook takes the delimiter out
            # again. No token is -1, so that the hook finds none.
            press.window_size, press.delimiter_token_id = question, -1
        return press


def plan_press(name: str) -> PressPlan:
    """Take a method's name apart, and look for what it asks for.

    Raises:
        UserError: it is not written as such names are; an unknown press or option (the nearest known one is named); a
            press that cannot be compared, or that wraps no other; kvpress is not installed (the extra is named).
    """
    kvpress = library(name)
    asked = parse_press(name, BACKENDS)
    if asked.backend == "fp8":
        raise UserError(f"{name}: {asked.backend} takes one scale for a whole layer: use quanto or hqq", exit_code=2)
    classes = [_class(kvpress, name, part.name) for part in asked.parts]
    outer, *inner = classes
    if len(inner) > 1 or (inner and not _wraps(outer)):
        raise UserError(f"{name}: {outer.__name__} wraps no other press", exit_code=2)
    if inner and not issubclass(inner[0], kvpress.ScorerPress):
        raise UserError(f"{name}: {inner[0].__name__} gives tokens no score that could be used", exit_code=2)
    if asked.backend is not None and PRESSES[asked.names[0]].decodes is not None:
        raise UserError(
            f"{name}: what is compressed while decoding would be quantized anew each time: leave {asked.backend} out",
            exit_code=2,
        )
    # The decoding itself has the settings, whichever of the two presses is asked for.
    taking = [kvpress.DecodingPress if PRESSES[asked.names[0]].decodes is not None else outer, *inner]
    options = tuple(_options(name, part, kind) for part, kind in zip(asked.parts, taking, strict=True))
    return PressPlan(name, asked, options)


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


def _class(kvpress: Any, name: str, part: str) -> Any:
    """The class of one press of a name. Raises :class:`UserError`."""
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
    return getattr(kvpress, press.class_name)


def _wraps(kind: Any) -> bool:
    """Whether a press is made with another one."""
    return not {"press", "base_press", "decoding_press"}.isdisjoint(inspect.signature(kind).parameters)


def _options(method: str, part: PressPart, kind: Any) -> dict[str, Any]:
    """The options of one press as its class takes them. Raises :class:`UserError`."""
    hints = typing.get_type_hints(kind.__init__)
    known = {
        name: hints.get(name, type(parameter.default))
        for name, parameter in inspect.signature(kind).parameters.items()
        if not (name == "press" or name.endswith("_press"))
    }
    found = {}
    for name, text in part.options.items():
        if name in _GIVEN:
            raise UserError(f"{method}: {name} is not an option: {_GIVEN[name]}", exit_code=2)
        if name not in known:
            open_ones = [item for item in known if item not in _GIVEN]
            said = nearest(name, open_ones) if open_ones else "it has none"
            raise UserError(f"{method}: {part.name} has no option {name!r}: {said}", exit_code=2)
        found[name] = _read(method, name, text, known[name])
    return found


def _read(method: str, name: str, text: str, kind: Any) -> Any:
    """An option's value. Raises :class:`UserError` for one of another type than the press takes."""
    kinds = [item for item in (typing.get_args(kind) or (kind,)) if item is not type(None)]
    if text == "none" and type(None) in typing.get_args(kind):
        return None
    for each in kinds:
        if each is bool and text in ("true", "false"):
            return text == "true"
        if each is str:
            return text
        if each in (int, float):
            try:
                return each(text)
            except ValueError:
                continue
    wanted = " or ".join({bool: "true or false", int: "an integer", float: "a number"}.get(each, "") for each in kinds)
    if not wanted.strip(" or"):
        raise UserError(f"{method}: {name} cannot be given in a name", exit_code=2)
    raise UserError(f"{method}: {name} is {wanted}, not {text!r}", exit_code=2)


def least_prompt(press: Any) -> int:
    """The longest prompt that a press cannot score, because its window or its sinks are all there is."""
    own = max(getattr(press, "window_size", 0) or 0, getattr(press, "n_sink", 0) or 0)
    inner = (getattr(press, name, None) for name in ("press", "prefilling_press"))
    return max([own, *(least_prompt(item) for item in inner if item is not None)])


@contextmanager
def quiet() -> Iterator[None]:
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
