"""Memory during prefill: the budget, and no more than two layers' keys and values beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from arkv import CacheConfig, TriStateCache, attach
from tests.arkv.conftest import SHAPE, Driver, prompt, spread

LAYERS, HEADS, DIM, TOKENS, BUDGET = 8, 4, 32, 1500, 160
LAYER_BYTES = 2 * TOKENS * HEADS * DIM * 2
"""Keys and values of a whole layer."""


def peak_bytes(model: Any, ids: torch.Tensor, **settings: Any) -> int:
    """The most that a prefill has allocated at a time, by the trace of all allocations and releases."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        model(ids, logits_to_keep=1, **settings)
    return most_bytes(trace)


def most_bytes(trace: Any) -> int:
    """The most that was allocated at a time while ``trace`` was taken."""
    changes = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.fixture(scope="module")
def deep() -> Any:
    """Many layers and a wide feed-forward part, as real models have them."""
    shape = {
        **SHAPE,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": DIM,
    }
    return spread(LlamaForCausalLM(LlamaConfig(**shape)), seed=9, deviation=0.05).to(torch.bfloat16)


@pytest.fixture(scope="module")
def without(deep: Any) -> int:
    """The most that a prefill without any cache allocates, which is not all that a full cache does."""
    ids = prompt(TOKENS, seed=1)
    with attach(deep):
        # Once for what is allocated for good at the first forward.
        deep(ids[:, :8])
        found = peak_bytes(deep, ids, use_cache=False)
        full = peak_bytes(deep, ids, past_key_values=DynamicCache(config=deep.config))
    assert full - found > (LAYERS - 2) * LAYER_BYTES, "the trace must see a full cache"
    return found


@pytest.mark.parametrize("settings", [{}, {"budget_unit": "bytes"}], ids=["tokens", "bytes"])
def test_each_layer_is_compressed_as_soon_as_it_is_computed(deep: Any, without: int, settings: dict[str, Any]) -> None:
    config = CacheConfig.for_method("mix", cache_size=BUDGET, window_size=16, **settings)
    budget = LAYERS * 2 * BUDGET * HEADS * DIM * 2
    with attach(deep):
        compressed = peak_bytes(deep, prompt(TOKENS, seed=1), past_key_values=TriStateCache(deep, config))
    assert compressed - without <= budget + 2 * LAYER_BYTES


def test_a_further_block_takes_little_more_memory_than_its_output() -> None:
    """No mask of all new tokens by all tokens, for every head."""
    config = CacheConfig.for_method("origin", cache_size=256, window_size=32)
    driver = Driver(config, layers=1, heads=8, groups=4, dim=64)
    first, second = ([tensor.bfloat16() for tensor in driver.random(count, seed=count)] for count in (400, 4096))
    driver.feed(*first)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        output = driver.feed(*second)
    peak = most_bytes(trace)
    assert peak > output.nbytes, "the trace must see the output"
    assert peak - output.nbytes <= output.nbytes
