"""The decode kernel against its twin, run by ``test_kernels.py`` in a process of its own: whether Triton interprets or
compiles is settled when it is imported."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from arkv import FORMATS, CacheConfig
from arkv.kernels import decode_attention
from arkv.layer import TriStateLayer
from tests.arkv.conftest import Driver, layer_with

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
EACH_FORMAT = pytest.mark.parametrize("quant_format", sorted(FORMATS))


def layer_of(quant_format: str | None, **settings: Any) -> TriStateLayer:
    return layer_with(quant_format, device=DEVICE, **settings)


def compare(layer: TriStateLayer, group: int = 3, slots_per_split: int | None = None) -> torch.Tensor:
    """The kernel's probabilities, once they and its output have been found to be those of its twin."""
    held = layer.held()
    batch, heads, _, dim = held.key.shape
    query = torch.randn(batch, heads, group, dim).to(held.key)
    expected = layer._attend_folded(query, dim**-0.5)
    got = decode_attention(query, held, layer.quantized, dim**-0.5, layer.gaps, slots_per_split)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    return got[1]


@EACH_FORMAT
def test_formats(quant_format: str) -> None:
    probabilities = compare(layer_of(quant_format))
    assert probabilities.shape == (1, 2, 3, 228)


@EACH_FORMAT
def test_gaps_in_several_splits(quant_format: str) -> None:
    layer = layer_of(quant_format, batch=2, gaps=0.3)
    probabilities = compare(layer, slots_per_split=64)
    assert layer.quantized is not None
    position = torch.cat([layer.held().position, layer.quantized.position], dim=-1)
    assert (probabilities.sum(dim=2)[position < 0] == 0).all()


@pytest.mark.parametrize("quant_format", [None, "fp8", "k4v3"])
@pytest.mark.parametrize("dim", [16, 96, 128])
def test_head_dims(quant_format: str | None, dim: int) -> None:
    compare(layer_of(quant_format, dims=(dim, dim)), slots_per_split=64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    compare(layer_of("int8", dtype=dtype))


@pytest.mark.parametrize("group", [1, 5, 16])
def test_query_heads_per_kv_head(group: int) -> None:
    compare(layer_of("int4"), group)


def test_values_narrower_than_keys() -> None:
    compare(layer_of("int2", dims=(128, 64)))


def test_slots_that_fill_no_block() -> None:
    compare(layer_of("int8", original=33, quantized=70), slots_per_split=128)


def test_no_original_slots() -> None:
    layer = layer_of("int4")
    layer.seen = layer.used = 0
    assert layer.held().slots == 0
    compare(layer)


def test_a_split_without_any_token() -> None:
    layer = layer_of("int8", original=200)
    assert layer.tokens is not None
    layer.tokens.position[:, :, 64:128] = -1
    layer.gaps = True
    probabilities = compare(layer, slots_per_split=64)
    assert (probabilities[..., 64:128] == 0).all()


def test_short_positions_and_large_logits() -> None:
    """Positions of 16 bits, and logits beyond what exp can take without its maximum."""
    layer = layer_of("int8", gaps=0.3)
    assert layer.tokens is not None
    assert layer.quantized is not None
    layer.tokens.key *= 100
    layer.tokens.position, layer.quantized.position = layer.tokens.position.short(), layer.quantized.position.short()
    compare(layer, slots_per_split=64)


@pytest.mark.parametrize("quant_format", ["fp8", "k4v3"])
def test_decoding_with_the_kernel(quant_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage as prefill and decoding leave it: tokens join, are demoted and evicted by the kernel's probabilities."""
    config = CacheConfig.for_method(
        "mix",
        cache_size=80,
        window_size=16,
        quant_format=quant_format,
        original_share=0.5,
        n_sink=2,
        attention="torch",
    )

    def decode() -> tuple[list[torch.Tensor], Any]:
        driver = Driver(config, dim=64)
        outputs = []
        for seed, tokens in enumerate([100, 1, 1, 1]):
            states = (tensor.to(DEVICE) for tensor in driver.random(tokens, seed, batch=2))
            outputs.append(driver.feed(*states))
        return outputs, driver.layer()

    expected, twin = decode()
    calls = []

    def attend(layer: TriStateLayer, query: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(query.shape)
        return decode_attention(query, layer.held(), layer.quantized, scaling, layer.gaps)

    monkeypatch.setattr(TriStateLayer, "_attend_folded", attend)
    got, layer = decode()
    assert len(calls) == 3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert layer.quantized.slots > 0
    assert all(torch.equal(mine, its) for mine, its in zip(layer.states(1), twin.states(1), strict=True))
