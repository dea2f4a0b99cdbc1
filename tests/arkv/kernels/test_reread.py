"""Attention behind a prompt in C, with the largest that each of its tokens gets: that it agrees with its twin, and that
a second reading takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from arkv import CacheConfig, PrefillCache, attach
from arkv.blocks import plain_attention
from arkv.kernels.cpu import reread
from arkv.rereading import largest_attention, replay
from tests.arkv.conftest import prompt
from tests.arkv.kernels.conftest import needs_compiler
from tests.arkv.kernels.test_score import random

pytestmark = [needs_compiler, pytest.mark.usefixtures("built")]


def compare(
    *,
    batch: int = 1,
    heads: int = 2,
    group: int = 3,
    new: int = 40,
    length: int = 200,
    dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.bfloat16,
    size: float = 2.0,
) -> None:
    """Against attention in float64."""
    query = random(batch, heads * group, new, dims[0], seed=1, dtype=dtype) * size
    key = random(batch, heads, length + new, dims[0], seed=2, dtype=dtype)
    value = random(batch, heads, length + new, dims[1], seed=3, dtype=dtype)
    logits = query.double().unflatten(1, (heads, group)) @ key.double().unsqueeze(2).transpose(-1, -2) * 0.1
    hidden = torch.ones(new, length + new, dtype=torch.bool).triu(length + 1)
    attention = logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    expected = (attention @ value.double().unsqueeze(2)).flatten(1, 2).transpose(1, 2)
    found = attention.amax(dim=(2, 3))[..., :length]
    # What another chunk has given is kept where it is more.
    before = torch.rand(batch, heads, length, generator=torch.Generator().manual_seed(4)) * 2 * found.float().mean()
    largest = before.clone()
    output = reread.reread(query, key, value, 0.1, largest)
    assert output.dtype == dtype
    # A half of the last digit of bfloat16, in probabilities and in the output.
    digit = 2**-8 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(output.double(), expected, rtol=digit, atol=digit * float(value.abs().max()))
    assert torch.allclose(largest.double(), torch.maximum(before.double(), found), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (80, 80), (6, 6), (7, 5), (64, 40), (16, 96)], ids=str)
def test_dims_and_dtypes(dims: tuple[int, int], dtype: torch.dtype) -> None:
    compare(dims=dims, dtype=dtype)


@pytest.mark.parametrize("length", [1, 7, 8, 47, 48, 49, 500])
@pytest.mark.parametrize("new", [1, 2, 8, 9, 100])
def test_lengths(length: int, new: int) -> None:
    compare(length=length, new=new)


@pytest.mark.parametrize(("batch", "heads", "group"), [(1, 1, 1), (3, 1, 2), (2, 4, 7), (1, 2, 16)])
def test_batches_and_groups(batch: int, heads: int, group: int) -> None:
    compare(batch=batch, heads=heads, group=group)


@pytest.mark.parametrize("size", [0.0, 1e-3, 50.0])
def test_logits_small_and_large(size: float) -> None:
    compare(size=size)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_give_the_same_to_the_bit(threads: int) -> None:
    query, key, value = (random(2, heads, 90, 64, seed=heads, dtype=torch.bfloat16) for heads in (6, 2, 2))
    query, before, found = query[:, :, -20:], torch.get_num_threads(), []
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            largest = torch.zeros(2, 2, 70)
            found.append((reread.reread(query, key, value, 0.1, largest), largest))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_it_agrees_with_its_twin() -> None:
    query, key, value = (random(1, heads, 90, 64, seed=heads, dtype=torch.float32) for heads in (6, 2, 2))
    query = query[:, :, -20:]
    visible = torch.ones(20, 90, dtype=torch.bool).tril(70)[None, None]
    module = nn.Module()
    module.num_key_value_groups = 3
    expected = plain_attention(module, query, key, value, visible, 0.1)
    found = largest_attention(query, key, value, 0.1, fused=False)[..., :70]
    largest = torch.zeros(1, 2, 70)
    assert torch.allclose(reread.reread(query, key, value, 0.1, largest), expected, atol=1e-5)
    assert torch.allclose(largest, found, rtol=2e-5)


def test_a_second_reading_takes_it(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(60)

    def importance(attention: str) -> list[torch.Tensor]:
        prefill = PrefillCache(llama.config)
        with attach(llama):
            llama(ids, past_key_values=prefill)
        config = CacheConfig.for_method("mix-replay", cache_size=40, attention=attention)
        replay(llama, ids, prefill, config)
        assert config.scoring is not None
        return [layer.scores[config.scoring].importance for layer in prefill.layers]

    expected = importance("reconstruct")
    calls = []
    original = reread.attended
    monkeypatch.setattr(reread, "attended", lambda *args: calls.append(1) or original(*args))
    monkeypatch.setattr(reread, "reread", lambda *args: reread.attended(*args))
    for found, right in zip(importance("fused"), expected, strict=True):
        assert torch.allclose(found, right, rtol=1e-4, atol=1e-6)
    assert len(calls) == llama.config.num_hidden_layers
