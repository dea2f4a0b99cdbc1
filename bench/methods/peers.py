"""Methods that others maintain, on the same prompts and with the same accounting of bytes.

``hf:quanto-int4``, ``hf:quanto-int2``, ``hf:hqq-int4``, ``hf:hqq-int2``, ``hf:fp8``
    transformers' ``QuantizedCache``. It quantizes the keys and values of the one prefill that all methods share, as it
    would those of its own.
``kvpress:NAME``
    A press of kvpress, such as ``kvpress:snapkv``. It runs inside kvpress' own context manager during a prefill of its
    own, since it may look at anything there. A press that wraps another one, such as ``chunkkv``, wraps ``snapkv``;
    ``kvpress:chunkkv+tova`` names another.

A method of the user's own (:class:`bench.extend.Method`) is a peer too, by its plain name.

What cannot be met is in :data:`bench.names.LIMITS`. Neither leaves a trace in transformers or in the model.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arkv import PrefillCache, attach
from bench.errors import UserError
from bench.extend import Budget, KeptLayer, Method, OthersCode, Prompt
from bench.names import HF, KVPRESS, LIMITS
from bench.telemetry import Stopwatch
from tasks.base import nearest

EXTRA = "pip install 'arkv-bench[peers]'"

BACKENDS: Mapping[str, tuple[str, int]] = {
    "quanto-int4": ("quanto", 4),
    "quanto-int2": ("quanto", 2),
    "hqq-int4": ("hqq", 4),
    "hqq-int2": ("hqq", 2),
    "fp8": ("fp8", 8),
}
"""Backend of transformers and bits of each ``hf:`` method."""
FP8_LAYER = "Fp8QuantizedLayer"
"""Where transformers has it, its ``fp8`` backend is there: one scale per tensor, fixed by the prompt."""
DISTRIBUTIONS = {"quanto": "optimum-quanto", "hqq": "hqq", KVPRESS: "kvpress"}
GROUP_SIZE = 64
"""Values that share a scale and a zero point, transformers' default."""
RESIDUAL_LENGTH = 128
"""Newest tokens that an ``hf:`` method gathers at model precision before it quantizes again, transformers' default."""

UNUSABLE = {
    "base": "it is the base class of all presses",
    "scorer": "it is the base class of presses that score",
    "composed": "it needs a list of presses",
    "per_layer_compression": "it needs a ratio for every layer",
    "decoding": "it compresses while decoding, to a size of its own",
    "cam": "it compresses while decoding, to a size of its own",
    "compression_ratio_decoding": "it compresses while decoding, to a size of its own",
    "prefill_decoding": "it compresses while decoding, to a size of its own",
    "finch": "it needs a delimiter between context and question",
    "observed_attention": "it needs eager attention over the whole prompt",
    "think": "it removes channels, not tokens",
    "simlayerkv": "it has a threshold in the place of a ratio",
    "dms": "it has a threshold in the place of a ratio",
    "duo_attention": "its heads, not a budget, say what is kept",
}
"""Presses that cannot be asked for a share of the tokens of one prompt, and why."""


@dataclass(frozen=True)
class Peer:
    """A method of others with its budget. One of one size has none."""

    name: str
    budget_unit: str | None = None
    cache_size: int | None = None
    cache_ratio: float | None = None
    version: str | None = None
    """Of the library or the user's own code, which changes answers as a setting would."""
    method: Method | None = field(default=None, compare=False, repr=False)
    """A method of the user's own; no setting."""

    @property
    def library(self) -> str | None:
        """``hf``, ``kvpress``, or None for a method of the user's own."""
        return None if self.method is not None else self.name.partition(":")[0]

    @property
    def quant_format(self) -> str | None:
        """Number format of quantized tokens, or None."""
        if self.method is not None:
            return self.method.quant_format
        if self.name == f"{HF}:fp8":
            return "fp8"
        return self.name.rpartition("-")[2] if self.library == HF else None

    def kept(self, tokens: int) -> int:
        """Tokens of a prompt that the budget holds. At model precision both units ask for the same number."""
        if self.cache_ratio is not None:
            # 0.29 * 100 is 28.999999999999996.
            return max(1, int(self.cache_ratio * tokens + 1e-9))
        return tokens if self.cache_size is None else min(self.cache_size, tokens)


class Shared(NamedTuple):
    """The prefill that all methods share."""

    cache: PrefillCache
    """Layers with ``keys`` and ``values`` [1, H, N, D] at model precision, and the newest queries."""
    logits: torch.Tensor
    """Of the prompt's last token, [1, vocabulary]."""
    seconds: float


@dataclass(frozen=True)
class Prefilled:
    """A compressed prompt, ready for greedy decoding token by token inside :func:`decoding`."""

    cache: Cache
    logits: torch.Tensor
    """Of the prompt's last token, [1, vocabulary]."""
    prefill_s: float
    compress_s: float | None
    """None where compression is a part of the prefill."""


# --- Names ---


def descriptions() -> list[tuple[str, str]]:
    """Names of the methods and what is special about them, for a list that a person reads."""
    found = [
        (f"{HF}:{name}", f"transformers' QuantizedCache, {name}: {LIMITS.get(f'{HF}:{name}', LIMITS[HF])}")
        for name in BACKENDS
    ]
    try:
        known = [name for name in sorted(press_names()) if name not in UNUSABLE]
    except UserError:
        return [*found, (f"{KVPRESS}:NAME", f"a press of kvpress, which needs {EXTRA}")]
    return [*found, (f"{KVPRESS}:NAME", f"a press of kvpress: {LIMITS[KVPRESS]}. NAME: {', '.join(known)}")]


def is_peer(name: str) -> bool:
    """Whether ``name`` asks for a method of others."""
    return ":" in name


def make_peer(name: str, **budget: Any) -> Peer:
    """The method ``name`` with its budget, once it is certain that it can be had.

    Args:
        budget: ``budget_unit`` and either ``cache_size`` or ``cache_ratio``; an ``hf:`` method ignores it.

    Raises:
        UserError: unknown name (the nearest known one is named), or a library that is not installed (the extra is).
    """
    library, _, method = name.partition(":")
    if library == HF:
        if method not in BACKENDS:
            known = [f"{HF}:{backend}" for backend in BACKENDS]
            raise UserError(f"unknown method {name!r}: {nearest(name, known)}", exit_code=2)
        backend, _ = BACKENDS[method]
        if backend == "fp8":
            version = metadata.version("transformers")
            if not hasattr(cache_utils, FP8_LAYER):
                raise UserError(
                    f"{name}: transformers {version} has no fp8 backend for its QuantizedCache, which newer versions "
                    f"have (5.23 does); {HF}:quanto-int4, or --quant-type quant --quant-format fp8, do with this one",
                    exit_code=2,
                )
            return Peer(name, version=version)
        return Peer(name, version=_version(name, backend))
    if library == KVPRESS:
        version = _version(name, KVPRESS)
        _press_classes(name)
        return Peer(name, version=version, **budget)
    raise UserError(f"unknown method {name!r}: methods of others begin with {HF}: or {KVPRESS}:", exit_code=2)


class OwnMethod(NamedTuple):
    """A method of the user's own and the version of its code."""

    method: Method
    version: str

    def peer(self, **budget: Any) -> Peer:
        """With a budget, as for :func:`make_peer`, if it has one."""
        given = budget if self.method.has_budget else {}
        return Peer(self.method.name, version=self.version, method=self.method, **given)


def _version(name: str, library: str) -> str:
    try:
        return metadata.version(DISTRIBUTIONS[library])
    except metadata.PackageNotFoundError:
        raise UserError(f"{name}: {DISTRIBUTIONS[library]} is not installed: {EXTRA}", exit_code=2) from None


def _kvpress(name: str) -> Any:
    """The package. Importing it wraps every attention function of transformers; that is undone here."""
    version = _version(name, KVPRESS)
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        return importlib.import_module("kvpress")
    except ImportError as error:
        versions = f"kvpress {version} with transformers {metadata.version('transformers')}"
        raise UserError(f"{name}: {versions} cannot be imported ({error}); see {EXTRA}", exit_code=2) from None
    finally:
        for key, function in before.items():
            ALL_ATTENTION_FUNCTIONS[key] = function


@lru_cache(maxsize=1)
def press_names() -> Mapping[str, str]:
    """Class of every usable press by name: that of its module, or of its class where a module has several."""
    kvpress = _kvpress(KVPRESS)
    classes = [item for item in vars(kvpress).values() if inspect.isclass(item) and issubclass(item, kvpress.BasePress)]
    modules = Counter(item.__module__ for item in classes)
    names = {}
    for item in classes:
        module = item.__module__.rpartition(".")[2].removesuffix("_press")
        names[module if modules[item.__module__] == 1 else item.__name__.lower().removesuffix("press")] = item.__name__
    return names


def _press_classes(name: str) -> list[Any]:
    """The class of the press and that of the one it wraps, if named. Raises :class:`UserError`."""
    kvpress = _kvpress(name)
    known = press_names()
    found = []
    for part in name.partition(":")[2].split("+"):
        if part in UNUSABLE:
            raise UserError(f"{name}: {part} cannot be compared at a budget: {UNUSABLE[part]}", exit_code=2)
        if part not in known:
            usable = [f"{KVPRESS}:{press}" for press in known if press not in UNUSABLE]
            raise UserError(f"unknown method {name!r}: {nearest(f'{KVPRESS}:{part}', usable)}", exit_code=2)
        found.append(getattr(kvpress, known[part]))
    outer, *inner = found
    if len(inner) > 1 or (inner and "press" not in inspect.signature(outer).parameters):
        raise UserError(f"{name}: {outer.__name__} wraps no other press", exit_code=2)
    if inner and not issubclass(inner[0], kvpress.ScorerPress):
        raise UserError(f"{name}: {inner[0].__name__} gives tokens no score that could be used", exit_code=2)
    return found


def make_press(peer: Peer, tokens: int) -> Any:
    """A kvpress press that keeps :meth:`Peer.kept` of ``tokens`` tokens."""
    outer, *inner = _press_classes(peer.name)
    if "press" in inspect.signature(outer).parameters:
        press = outer(inner[0]() if inner else _kvpress(peer.name).SnapKVPress())
    else:
        press = outer()
    kept = peer.kept(tokens)
    # Presses truncate or round the number that the ratio gives: a quarter above a whole one is safe for both.
    press.compression_ratio = 0.0 if kept >= tokens else 1.0 - (kept + 0.25) / tokens
    return press


def _least_prompt(press: Any) -> int:
    """The longest prompt that a press cannot score, because its window or its sinks are all there is."""
    own = max(getattr(press, "window_size", 0) or 0, getattr(press, "n_sink", 0) or 0)
    wrapped = getattr(press, "press", None)
    return own if wrapped is None else max(own, _least_prompt(wrapped))


# --- Prefill and decoding ---


class PressedLayer(KeptLayer):
    """What a press left of a layer."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, seen: int, masked: Any) -> None:
        super().__init__(keys, values, seen)
        self.masked = masked
        """Indices (sample, head, token) of tokens that are stored and never attended to, or None."""

    def held(self) -> float:
        """Tokens that can be attended to, mean over KV heads."""
        assert self.keys is not None
        masked = 0 if self.masked is None else len(self.masked[0])
        return self.keys.shape[-2] - masked / (self.keys.shape[0] * self.keys.shape[1])


@torch.inference_mode()
def prefill(model: PreTrainedModel, prompt: torch.Tensor, peer: Peer, shared: Shared | None = None) -> Prefilled:
    """Process ``prompt`` [1, N] and compress it.

    Args:
        shared: the prefill of this prompt that all methods share; made here where none is given. A press needs none.

    Raises:
        UserError: the model or the prompt is not one that the method can do, or the user's own code has failed.
    """
    if peer.library == KVPRESS:
        return _prefill_pressed(model, prompt, peer)
    if shared is None:
        clock, cache = Stopwatch(model.device), PrefillCache(model, peer.method.queries if peer.method else 1)
        with attach(model), clock:
            logits = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        shared = Shared(cache, logits, clock.seconds)
    compress = Stopwatch(model.device)
    with compress:
        compressed = (
            _quantized(model, peer, shared.cache)
            if peer.method is None
            else _own(model, Prompt(ids=prompt, cache=shared.cache), peer, peer.method)
        )
    return Prefilled(compressed, shared.logits, shared.seconds, compress.seconds)


def _own(model: PreTrainedModel, prompt: Prompt, peer: Peer, method: Method) -> Cache:
    """What a method of the user's own makes of a prompt."""
    tokens = peer.kept(prompt.tokens)
    budget = Budget(tokens=tokens, nbytes=prompt.cache.full_bytes(tokens), unit=peer.budget_unit or "tokens")
    with OthersCode(peer.name), torch.random.fork_rng():
        # What draws numbers keeps the same tokens of the same prompt.
        torch.manual_seed(0)
        cache = method.compress(model, prompt, budget)
        seen = cache.get_seq_length()
    if seen != prompt.tokens:
        raise UserError(
            f"{peer.name}: its cache of a prompt of {prompt.tokens} tokens says that it has seen {seen}, so that the "
            "positions of later tokens would be wrong (get_seq_length; bench.extend.KeptLayer has it right)"
        )
    return cache


def _quantized(model: PreTrainedModel, peer: Peer, stock: Cache) -> QuantizedCache:
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise UserError(f"{peer.name}: transformers' QuantizedCache knows no layers of type {min(kinds)!r}")
    backend, bits = BACKENDS[peer.name.partition(":")[2]]
    # The axes that transformers' documentation recommends for each backend; fp8 has nothing to set.
    axis = 1 if backend == "hqq" else 0
    settings = {
        "nbits": bits,
        "axis_key": axis,
        "axis_value": axis,
        "q_group_size": GROUP_SIZE,
        "residual_length": RESIDUAL_LENGTH,
    }
    cache = QuantizedCache(backend, model.config, **({} if backend == "fp8" else settings))
    for layer_idx, layer in enumerate(stock.layers):
        assert layer.keys is not None
        assert layer.values is not None
        tokens = layer.keys.shape[2]
        grouped = () if backend == "fp8" else (layer.keys, layer.values)
        multiple = math.lcm(*(_whole_groups(states, backend, bits) for states in grouped))
        whole = tokens - tokens % multiple
        if not whole:
            raise UserError(f"{peer.name}: a prompt of {tokens} tokens is shorter than the {multiple} of a whole group")
        # What does not fill a group waits at model precision, as the tokens to come do: hqq fails on parts of groups.
        for part in (slice(whole), slice(whole, None)):
            if layer.keys[:, :, part].shape[2]:
                cache.update(layer.keys[:, :, part], layer.values[:, :, part], layer_idx)
    return cache


def _whole_groups(states: torch.Tensor, backend: str, bits: int) -> int:
    """The least number of tokens of ``states`` [1, H, N, D] whose groups fill whole bytes."""
    values = GROUP_SIZE * (8 // bits if backend == "hqq" else 1)
    return values // math.gcd(values, states.shape[1] * states.shape[3])


def _prefill_pressed(model: PreTrainedModel, prompt: torch.Tensor, peer: Peer) -> Prefilled:
    tokens = prompt.shape[1]
    press = make_press(peer, tokens)
    if tokens <= _least_prompt(press):
        press.compression_ratio = 0.0
    kvpress = _kvpress(peer.name)
    cache, clock = DynamicCache(config=model.config), Stopwatch(model.device)
    try:
        # Some presses draw numbers: the same prompt keeps the same tokens.
        with _traceless(model) as modules, _patched(model), torch.random.fork_rng(), clock, press(model):
            torch.manual_seed(0)
            logits = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            masks = [getattr(module, "masked_key_indices", None) for module in modules]
    except (AssertionError, KeyError, OSError, ValueError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{peer.name}: kvpress cannot do a prompt of {tokens} tokens with this model: {said}"
        ) from error
    # Where a press turns the kept keys to new positions, these are counted on.
    turned = isinstance(press, kvpress.KeyRerotationPress)
    layers: list[Any] = []
    for layer, masked in zip(cache.layers, masks, strict=True):
        assert layer.keys is not None
        assert layer.values is not None
        layers.append(PressedLayer(layer.keys, layer.values, layer.keys.shape[2] if turned else tokens, masked))
    return Prefilled(Cache(layers=layers), logits, clock.seconds, None)


@contextmanager
def decoding(model: PreTrainedModel, cache: Cache, peer: Peer | None = None) -> Iterator[None]:
    """What a cache of :func:`prefill` needs while ``model`` decodes with it, one token at a time.

    Raises:
        UserError: the user's own code, named by ``peer``, has failed.
    """
    if peer is not None and peer.method is not None:
        with OthersCode(peer.name), peer.method.decoding(model, cache):
            yield
        return
    masks = [layer.masked for layer in cache.layers if isinstance(layer, PressedLayer)]
    if all(masked is None for masked in masks):
        yield
        return
    with _traceless(model) as modules, _patched(model):
        for module, masked in zip(modules, masks, strict=True):
            module.masked_key_indices = masked
        yield


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """The attention module of every layer. What it returns first is its output [B, T, hidden size].

    Raises:
        UserError: a layer of the model has none, or it stands elsewhere.
    """
    try:
        decoder = getattr(model.model, "language_model", model.model)
        return [layer.self_attn for layer in decoder.layers]
    except AttributeError as error:
        raise UserError(
            f"{type(model).__name__} has no attention in every model.layers[i].self_attn: {error}"
        ) from None


@contextmanager
def _traceless(model: PreTrainedModel) -> Iterator[list[Any]]:
    """The attention modules of ``model``; what kvpress sets on them is gone afterwards."""
    modules = attention_modules(model)
    before = [{*vars(module), *module._modules} for module in modules]
    try:
        yield modules
    finally:
        for module, known in zip(modules, before, strict=True):
            for name in {*vars(module), *module._modules} - known:
                delattr(module, name)


@contextmanager
def _patched(model: PreTrainedModel) -> Iterator[None]:
    """The model's attention function as kvpress wraps it, which lets its presses mask tokens of single heads.

    Eager attention is no registered function: presses that mask refuse it themselves.
    """
    _kvpress(KVPRESS)
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


def token_counts(cache: Cache, peer: Peer | None = None) -> dict[str, float]:
    """Original, Quantized and Evicted tokens of a cache of :func:`prefill`, mean over layers and KV heads.

    Raises:
        UserError: the user's own code, named by ``peer``, has failed.
    """
    if peer is not None and peer.method is not None:
        with OthersCode(peer.name):
            counts = peer.method.token_counts(cache)
            return {state: float(counts[state]) for state in ("original", "quantized", "evicted")}
    original = quantized = 0.0
    for layer in cache.layers:
        if isinstance(layer, PressedLayer):
            original += layer.held()
            continue
        assert layer.keys is not None
        waiting = layer.keys.shape[-2] if layer.keys.dim() == 4 else 0
        original += waiting
        quantized += layer.get_seq_length() - waiting
    original, quantized = original / len(cache.layers), quantized / len(cache.layers)
    return {
        "original": original,
        "quantized": quantized,
        "evicted": cache.get_seq_length() - original - quantized,
    }
