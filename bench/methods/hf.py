"""transformers' ``QuantizedCache``: ``hf:quanto-int4``, ``hf:quanto-int2``, ``hf:hqq-int4``, ``hf:hqq-int2`` and
``hf:fp8``.

It quantizes the keys and values of the one prefill that all methods share, as it would those of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import Cache, QuantizedCache

from bench.errors import UserError
from bench.methods.base import Method, Sizes
from bench.methods.names import BACKENDS, limits_of
from bench.methods.prompt import Asked, Budget, Prompt
from bench.methods.states import ORIGINAL, QUANTIZED
from bench.methods.versions import installed_version
from bench.names import HF
from tasks.errors import nearest

FP8_LAYER = "Fp8QuantizedLayer"
"""Where transformers has it, its ``fp8`` backend is there: one scale per tensor, fixed by the prompt."""
GROUP_SIZE = 64
"""Values that share a scale and a zero point, transformers' default."""
RESIDUAL_LENGTH = 128
"""Newest tokens that are gathered at model precision before all is quantized again, transformers' default."""


class HfQuantized(Method):
    """One of the backends. It has one size, whatever the budget."""

    has_budget = False
    queries = 1

    def __init__(self, name: str) -> None:
        self.name = name
        self.limits = limits_of(name)
        self.backend, self.bits = BACKENDS[name.partition(":")[2]]
        self.quant_format = "fp8" if self.backend == "fp8" else name.rpartition("-")[2]

    def compress(self, model: PreTrainedModel, prompt: Prompt, budget: Budget) -> Cache:
        """All of the prompt, quantized.

        Raises:
            UserError: layers that the library's cache does not know, or a prompt shorter than a group.
        """
        config = model.config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if any(getattr(layer, "is_sliding", False) for layer in prompt.cache.layers):
            kinds.add("sliding_attention")
        if kinds:
            raise UserError(f"{self.name}: transformers' QuantizedCache knows no layers of type {min(kinds)!r}")
        settings = {} if self.backend == "fp8" else {"nbits": self.bits, **layer_settings(self.backend)}
        cache = QuantizedCache(self.backend, model.config, **settings)
        for layer, stored in zip(prompt.cache.layers, cache.layers, strict=True):
            assert layer.keys is not None
            assert layer.values is not None
            try:
                fill(stored, layer.keys, layer.values, self.backend, self.bits)
            except ValueError as error:
                raise UserError(f"{self.name}: a prompt {error}") from None
        return cache

    def planned_bytes(self, sizes: Sizes, tokens: int, asked: Asked) -> int | None:
        """Codes of all tokens, with a scale and a zero point for each group; fp8 has a byte for each number."""
        if self.backend == "fp8":
            return sizes.layers * sizes.kv_heads * sizes.head_dim * 2 * tokens
        each = (self.backend, self.bits, sizes.kv_heads, sizes.head_dim, sizes.itemsize)
        return sizes.layers * stored_bytes(*each, tokens)

    def reads_blocks(self, cache: Cache) -> bool:
        """Token by token, as it decodes: a block would be quantized together."""
        return False

    def batches(self, caches: Sequence[Cache]) -> bool:
        """Each row has its own cache, which gives back all its tokens."""
        return True

    def repeated(self, cache: Cache, rows: int) -> Cache | None:
        """As transformers would hold a batch. Not known of ``fp8``, which has a scale for a whole tensor."""
        return None if self.backend == "fp8" else repeat_quantized(self.fork(cache), rows)

    def token_counts(self, cache: Cache) -> dict[str, float]:
        """Quantized, but for the newest, which wait at model precision."""
        newest = sum(map(waiting, cache.layers)) / len(cache.layers)
        return {"original": newest, "quantized": self.tokens_seen(cache) - newest, "evicted": 0.0}

    def states(self, cache: Cache) -> Mapping[int, torch.Tensor] | None:
        """The newest are Original, all others Quantized: one head stands for all, int8 [1, N]."""
        found = {}
        for place, layer in enumerate(cache.layers):
            seen, newest = layer.get_seq_length(), waiting(layer)
            codes = torch.full((1, seen), QUANTIZED, dtype=torch.int8)
            codes[:, seen - newest :] = ORIGINAL
            found[place] = codes
        return found


def layer_settings(backend: str) -> dict[str, int]:
    """What a layer of ``QuantizedCache`` is made with, beside its bits."""
    # The axes that transformers' documentation recommends for each backend.
    axis = 1 if backend == "hqq" else 0
    return {"axis_key": axis, "axis_value": axis, "q_group_size": GROUP_SIZE, "residual_length": RESIDUAL_LENGTH}


def fill(layer: Any, keys: torch.Tensor, values: torch.Tensor, backend: str, bits: int) -> None:
    """Put ``keys`` and ``values`` [1, H, n, D] into an empty layer of ``QuantizedCache``.

    Raises:
        ValueError: fewer tokens than a whole group.
    """
    tokens = keys.shape[2]
    multiple = 1 if backend == "fp8" else whole_groups(backend, bits, keys.shape[1], keys.shape[3], values.shape[3])
    whole = tokens - tokens % multiple
    if not whole:
        raise ValueError(f"of {tokens} tokens is shorter than the {multiple} of a whole group")
    if backend == "quanto" and keys.device.type == "cpu":
        _announce_compiling()
    # What does not fill a group waits at model precision, as the tokens to come do: hqq fails on parts of groups.
    for part in (slice(whole), slice(whole, None)):
        if keys[:, :, part].shape[2]:
            layer.update(keys[:, :, part], values[:, :, part])


@cache
def _announce_compiling() -> None:
    """Say that quanto is about to compile its kernels, as it does silently when they are first used."""
    from optimum.quanto.library.extensions import get_extension
    from rich.console import Console

    if not (Path(get_extension("quanto_cpp").build_directory) / "pytorch_version.txt").is_file():
        line = "Compiling quanto's kernels, once for this environment: half a minute ..."
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)


def whole_groups(backend: str, bits: int, heads: int, *dims: int) -> int:
    """The least number of tokens of H heads whose groups, of keys and of values, fill whole bytes."""
    group = GROUP_SIZE * (8 // bits if backend == "hqq" else 1)
    return math.lcm(*(group // math.gcd(group, heads * dim) for dim in dims))


def stored_bytes(backend: str, bits: int, heads: int, dim: int, itemsize: int, tokens: int) -> int:
    """Bytes of ``tokens`` tokens of H heads of head dim D in one layer, keys and values: codes, a scale and a zero
    point to each group, and at model precision what does not fill a group."""
    over = tokens % whole_groups(backend, bits, heads, dim)
    values = heads * dim * (tokens - over)
    each = values * bits // 8 + 2 * itemsize * values // GROUP_SIZE + itemsize * heads * dim * over
    return 2 * each


def repeat_quantized(cache: Cache, rows: int) -> Cache:
    """``cache``, which is a copy, with ``rows`` of its only sample: no group spans two samples."""
    layers: list[Any] = cache.layers
    for layer in layers:
        for name, axis in (("keys", layer.axis_key), ("values", layer.axis_value)):
            stored = layer._dequantize(getattr(layer, f"_quantized_{name}")).repeat_interleave(rows, dim=0)
            setattr(layer, f"_quantized_{name}", layer._quantize(stored.contiguous(), axis))
            if waiting(layer):
                setattr(layer, name, getattr(layer, name).repeat_interleave(rows, dim=0))
    return cache


def waiting(layer: Any) -> int:
    """Tokens of a layer that are not quantized yet."""
    assert layer.keys is not None
    return int(layer.keys.shape[-2]) if layer.keys.dim() == 4 else 0


def make_hf(name: str) -> tuple[HfQuantized, str]:
    """The method and the version of the library behind it, once it is certain that it can be had.

    Raises:
        UserError: unknown name (the nearest known one is named), or a library that is not installed (the extra is).
    """
    method = name.partition(":")[2]
    if method not in BACKENDS:
        known = [f"{HF}:{backend}" for backend in BACKENDS]
        raise UserError(f"unknown method {name!r}: {nearest(name, known)}", exit_code=2)
    backend, _ = BACKENDS[method]
    if backend != "fp8":
        return HfQuantized(name), installed_version(name, backend)
    version = metadata.version("transformers")
    if not hasattr(cache_utils, FP8_LAYER):
        raise UserError(
            f"{name}: transformers {version} has no fp8 backend for its QuantizedCache, which newer versions "
            f"have (5.23 does); {HF}:quanto-int4, or --methods quant --quant-format fp8, do with this one",
            exit_code=2,
        )
    return HfQuantized(name), version
