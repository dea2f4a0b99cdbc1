"""``generate`` with a model that drops its cache on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from arkv import CacheConfig, TriStateCache, attach

ORIGINAL = 32
OPTIONS: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def long_rope() -> Any:
    """Its rotary factors change beyond 32 tokens."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": ORIGINAL}
    config = AutoConfig.for_model(
        "phi3",
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=ORIGINAL,
        pad_token_id=0,
        rope_scaling={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


def cache_of(model: Any) -> TriStateCache:
    return TriStateCache(model, CacheConfig.for_method("mix", cache_size=24, window_size=8, quant_format="int8"))


def ids(length: int) -> torch.Tensor:
    return torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(length))


def test_a_cache_that_would_be_dropped_reads_the_text_anew(long_rope: Any) -> None:
    """As a greedy loop without a cache does for every token, where all are kept; else compressed anew."""
    ids_ = ids(ORIGINAL - 4)
    text = ids_
    with torch.inference_mode():
        for _ in range(10):
            text = torch.cat([text, long_rope(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    roomy = CacheConfig.for_method("origin", cache_size=100, window_size=8)
    for config in (roomy, cache_of(long_rope).config):
        cache = TriStateCache(long_rope, config)
        with attach(long_rope):
            found = long_rope.generate(
                ids_, max_new_tokens=10, past_key_values=cache, return_dict_in_generate=True, **OPTIONS
            )
        assert found.past_key_values is cache
        assert cache.get_seq_length() == ORIGINAL + 5
        if config is roomy:
            assert found.sequences.tolist() == text.tolist()
        else:
            counts = cache.token_counts()
            assert counts["original"] + counts["quantized"] == pytest.approx(24)
        assert "prepare_inputs_for_generation" not in vars(long_rope)


@pytest.mark.parametrize(("length", "new"), [(ORIGINAL - 12, 10), (ORIGINAL + 8, 10)])
def test_on_one_side_of_that_length(long_rope: Any, length: int, new: int) -> None:
    cache = cache_of(long_rope)
    with attach(long_rope), attach(long_rope):
        long_rope.generate(ids(length), max_new_tokens=new, past_key_values=cache, **OPTIONS)
        assert "prepare_inputs_for_generation" in vars(long_rope)
    assert cache.get_seq_length() == length + new - 1
    assert "prepare_inputs_for_generation" not in vars(long_rope)


def test_caches_of_transformers_are_its_own_business(long_rope: Any) -> None:
    with attach(long_rope):
        out = long_rope.generate(
            ids(ORIGINAL - 4), max_new_tokens=10, past_key_values=DynamicCache(config=long_rope.config), **OPTIONS
        )
    assert out.shape[1] == ORIGINAL + 6
