"""Model families beside the two that every test of the cache runs on: the same promises on tiny random models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from arkv import CacheConfig, TriStateCache, attach
from tests.arkv.conftest import PUBLISHED, SHAPE, compressed, feed, forward, held_sets, prompt, spread, stock

FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Any:
    config, model, settings = FAMILIES[request.param]
    return spread(model(config(**{**SHAPE, **settings})), seed=6)


@pytest.mark.parametrize("method", ["window", "origin"])
def test_a_cache_that_holds_everything_changes_nothing(family: Any, method: str) -> None:
    ids = prompt(40, seed=1)
    expected = stock(family, ids, 12)
    got, _ = compressed(family, ids, CacheConfig.for_method(method, cache_size=64, window_size=8), 12)
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.allclose(got.logits, expected.logits, atol=1e-4)


@pytest.mark.parametrize("method", PUBLISHED)
def test_budgets_hold_while_decoding(family: Any, method: str) -> None:
    config = CacheConfig.for_method(method, cache_size=24, window_size=8)
    cache = TriStateCache(family, config)
    with attach(family):
        forward(family, cache, prompt(50, seed=2))
        for step, logits in enumerate(feed(family, cache, prompt(20, seed=3))):
            assert logits.isfinite().all()
            assert cache.get_seq_length() == 51 + step
            for layer in cache.layers:
                for high, low in held_sets(layer):
                    assert len(high | low) == 24
