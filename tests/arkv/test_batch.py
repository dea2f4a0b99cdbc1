"""Rows with caches of their own: each gets the logits, states and bytes that it gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache

from arkv import CacheBatch, CacheConfig, PrefillCache, TriStateCache, attach
from tests.arkv.conftest import MODELS_AND_METHODS, forward, gemma3, held_sets, prompt

W = 8
LENGTHS = (60, 1, 25, 12)
"""Of prompts: longer and shorter than the cache and the window, and a single token."""

FORWARDS = ((1, 1, 1, 1), (7, 1, 3, 30), (1, 2, 1, 1), *[(1, 1, 1, 1)] * 6)
"""New tokens of each row: decoding, and blocks beside single tokens."""


def together(model: Any, caches: Sequence[Cache], rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits [T, vocabulary] of each row [1, T] in one forward."""
    lengths = [row.shape[1] for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for target, row in zip(ids, rows, strict=True):
        target[len(target) - row.shape[1] :] = row[0]
    batch = CacheBatch(caches, lengths)
    logits = forward(model, batch, ids, position_ids=batch.position_ids())
    return [mine[-length:] for mine, length in zip(logits, lengths, strict=True)]


def assert_as_alone(model: Any, batch: Sequence[Cache], alone: Sequence[Cache]) -> None:
    """Feed prompts of unlike lengths and what follows them to the rows of a batch, and to caches on their own."""
    with attach(model):
        for number, lengths in enumerate((LENGTHS, *FORWARDS)):
            rows = [prompt(length, seed=100 * number + row) for row, length in enumerate(lengths)]
            for row, (mine, logits) in enumerate(zip(rows, together(model, batch, rows), strict=True)):
                assert (logits - forward(model, alone[row], mine)[0]).abs().max() < 1e-4, f"forward {number}, row {row}"
    for one, other in zip(batch, alone, strict=True):
        assert one.get_seq_length() == other.get_seq_length()


@pytest.mark.parametrize("model, method", MODELS_AND_METHODS, indirect=["model"])
def test_rows_of_tri_state_caches_are_as_alone(model: Any, method: str) -> None:
    config = CacheConfig.for_method(method, cache_size=20, window_size=W)
    batch, alone = ([TriStateCache(model, config) for _ in LENGTHS] for _ in range(2))
    assert_as_alone(model, batch, alone)
    for one, other in zip(batch, alone, strict=True):
        assert one.nbytes() == other.nbytes()
        assert one.token_counts() == other.token_counts()
        for layer, own in zip(one.layers, other.layers, strict=True):
            assert held_sets(layer) == held_sets(own)


def test_rows_may_be_of_different_kinds(llama: Any) -> None:
    def caches() -> list[Cache]:
        bytes_ = CacheConfig.for_method("mix", cache_size=30, window_size=W, budget_unit="bytes", quant_format="int8")
        return [
            DynamicCache(config=llama.config),
            TriStateCache(llama, CacheConfig.for_method("window", cache_size=20, window_size=W)),
            PrefillCache(llama, W),
            TriStateCache(llama, bytes_),
        ]

    assert_as_alone(llama, caches(), caches())


def test_layers_with_a_sliding_window() -> None:
    """Longer prompts than the window, and blocks behind them."""
    gemma = gemma3(10)
    config = CacheConfig.for_method("mix", cache_size=20, window_size=W)
    assert_as_alone(gemma, *([TriStateCache(gemma, config) for _ in LENGTHS] for _ in range(2)))


def test_a_prefill_in_a_batch_serves_as_one_alone(llama: Any) -> None:
    rows = [prompt(length, seed=length) for length in (30, 50)]
    batch = [PrefillCache(llama, W) for _ in rows]
    with attach(llama):
        together(llama, batch, rows)
        for row, prefill in zip(rows, batch, strict=True):
            own = PrefillCache(llama, W)
            forward(llama, own, row)
            assert prefill.nbytes() == own.nbytes()
            for one, other in zip(prefill.layers, own.layers, strict=True):
                assert torch.allclose(one.queries, other.queries, atol=1e-5)
                assert torch.allclose(one.keys, other.keys, atol=1e-5)


def test_each_row_has_a_cache_and_a_token(llama: Any) -> None:
    cache = DynamicCache(config=llama.config)
    for lengths in ([1], [1, 0], []):
        with pytest.raises(ValueError, match="each needs one token or more"):
            CacheBatch([cache] * 2, lengths)
