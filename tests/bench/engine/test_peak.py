"""Memory during the prefill of a real model: the budget, and no more than two layers' keys and values beside it."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
import torch
from transformers import DynamicCache

from arkv import CacheConfig, TriStateCache, attach
from bench.models.loading import load
from tests.arkv.test_peak import peak_bytes

TOKENS, BUDGET = 7900, 1024


@pytest.mark.slow
def test_a_long_prompt_never_stands_in_memory_whole() -> None:
    loaded = load("smollm2-135m")
    model, text = loaded.model, "\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor([loaded.tokenizer(text[: 8 * TOKENS]).input_ids[:TOKENS]])
    assert ids.shape == (1, TOKENS)
    shape = model.config
    token = 2 * shape.num_key_value_heads * shape.head_dim * torch.bfloat16.itemsize
    budget = shape.num_hidden_layers * BUDGET * token
    with attach(model):
        model(ids[:, :8])
        full = peak_bytes(model, ids, past_key_values=DynamicCache(config=shape))
        # A stock prefill holds all of its keys and values at the end: what else it takes, any prefill does.
        without = full - shape.num_hidden_layers * TOKENS * token
        for unit in ("tokens", "bytes"):
            config = CacheConfig.for_method("mix", cache_size=BUDGET, budget_unit=unit, quant_format="int8")
            compressed = peak_bytes(model, ids, past_key_values=TriStateCache(model, config))
            assert compressed - without <= budget + 2 * TOKENS * token, unit
