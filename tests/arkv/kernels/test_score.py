"""Scoring prompts in C: that it agrees with its twin, when it is chosen, and that caches come out the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from arkv import CacheConfig, TriStateCache, attach
from arkv.kernels.cpu import score
from arkv.scores.attention import Summary, causal_visibility, summarize, window_attention
from tests.arkv.conftest import prompt
from tests.arkv.kernels.conftest import needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("built")]


def random(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(
    *,
    batch: int = 1,
    heads: int = 2,
    group: int = 3,
    queries: int = 32,
    length: int = 500,
    dim: int = 64,
    stride: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    size: float = 2.0,
    tiles: bool | None = None,
) -> None:
    """Against the summary of the attention in float64."""
    query = random(batch, heads * group, queries, dim, seed=1, dtype=dtype) * size
    # As models leave it: tokens, then heads.
    key = random(batch, length, heads, dim, seed=2, dtype=dtype).transpose(1, 2)
    past = max(length - queries * stride, 0)
    visible = causal_visibility(length, (queries - 1) * stride + 1, None, query.device)[:, :, ::stride]
    logits = query.double().unflatten(1, (heads, group)) @ key.double().unsqueeze(2).transpose(-1, -2) * dim**-0.5
    attention = logits.masked_fill(~visible.unsqueeze(2), float("-inf")).softmax(dim=-1).flatten(1, 2)
    expected = summarize(attention, heads, past, True)
    got = score.summarize(query, key, dim**-0.5, stride, past, True, tiles)
    for mine, right in zip(got, expected, strict=True):
        assert mine is not None
        assert right is not None
        assert mine.dtype == torch.float32
        assert torch.allclose(mine.double(), right, rtol=2e-5, atol=1e-6)
    plain = score.summarize(query, key, dim**-0.5, stride, past, False, tiles)
    assert torch.equal(plain.mean, got.mean)
    assert torch.equal(plain.largest, got.largest)
    assert plain.spread is None
    assert plain.layer is None


# -- against its twin --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 80, 6])
@pytest.mark.parametrize("tiles", [False, None])
def test_dims_and_dtypes(dim: int, dtype: torch.dtype, tiles: bool | None) -> None:
    compare(dim=dim, dtype=dtype, tiles=tiles)


@pytest.mark.parametrize("length", [32, 33, 47, 48, 49, 384, 385, 1200])
def test_lengths(length: int) -> None:
    compare(length=length)


@pytest.mark.parametrize(("group", "queries", "stride"), [(1, 1, 1), (1, 5, 2), (7, 3, 4), (4, 64, 2), (2, 100, 1)])
@pytest.mark.parametrize("batch", [1, 3])
def test_groups_and_spans(group: int, queries: int, stride: int, batch: int) -> None:
    compare(batch=batch, group=group, queries=queries, stride=stride)


@pytest.mark.parametrize("tiles", [False, None])
def test_attention_on_few_keys(tiles: bool | None) -> None:
    """Logits in the hundreds: most weights are zeros, none is NaN."""
    compare(size=60.0, tiles=tiles)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    query = random(1, 6, 32, 64, seed=1, dtype=torch.bfloat16)
    key = random(1, 2, 1500, 64, seed=2, dtype=torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            found.append(score.summarize(query, key, 0.125, 1, 1468, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# -- when it is chosen -------------------------------------------------------------------------------------------------


def test_supported() -> None:
    assert score.supported(torch.device("cpu"), torch.bfloat16)
    assert not score.supported(torch.device("cpu"), torch.float16)
    assert not score.supported(torch.device("meta"), torch.bfloat16)


@pytest.mark.parametrize("method", ["origin", "quant", "mix"])
@pytest.mark.parametrize("unit", ["tokens", "bytes"])
def test_a_model_is_compressed_as_with_its_twin(
    llama: Any, method: str, unit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = score.summarize

    def counted(*given: Any) -> Summary:
        calls.append(1)
        return original(*given)

    monkeypatch.setattr(score, "summarize", counted)
    ids, found = prompt(300, seed=1), {}
    for attention in ("fused", "reconstruct"):
        config = CacheConfig.for_method(
            method, budget_unit=unit, cache_size=64, window_size=16, quant_format="int8", attention=attention
        )
        cache = TriStateCache(llama, config)
        with torch.inference_mode(), attach(llama):
            llama(ids, past_key_values=cache)
        # In bytes the scores are of the window and of a longer span.
        assert len(calls) == len(llama.model.layers) * (2 if unit == "bytes" else 1)
        found[attention] = cache
    for one, other in zip(found["fused"].layers, found["reconstruct"].layers, strict=True):
        assert all(torch.equal(mine, its) for mine, its in zip(one.states(), other.states(), strict=True))
        assert one.oq == pytest.approx(other.oq, rel=1e-5)
        for mine, its in zip(one.held().pools, other.held().pools, strict=True):
            assert torch.allclose(mine.score, its.score, atol=1e-6)


def test_the_twin_serves_batches_with_padding(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: Any) -> Summary:
        raise AssertionError("queries of a padded batch do not see all keys")

    monkeypatch.setattr(score, "summarize", never)
    ids = torch.cat([prompt(40, seed=1), prompt(40, seed=2)])
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    config = CacheConfig.for_method("mix", cache_size=32, window_size=8, quant_format="int8")
    with torch.inference_mode(), attach(llama):
        llama(ids, attention_mask=mask, past_key_values=TriStateCache(llama, config))


def test_window_attention_is_what_is_summed_up() -> None:
    query = random(2, 4, 8, 16, seed=1, dtype=torch.float32)
    key = random(2, 2, 60, 16, seed=2, dtype=torch.float32)
    attention = window_attention(query, key, 0.25, causal_visibility(60, 8, None, query.device))
    expected = summarize(attention, 2, 52, True)
    got = score.summarize(query, key, 0.25, 1, 52, True)
    for mine, right in zip(got, expected, strict=True):
        assert mine is not None
        assert right is not None
        assert torch.allclose(mine, right, rtol=1e-4, atol=1e-6)
