"""Importance from a second reading, against transformers' own attention weights."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import arkv.rereading
from arkv import CacheConfig, ConfigError, PrefillCache, TriStateCache, attach, replay
from tests.arkv.conftest import forward, held_sets, left_padded, prompt

CONFIG = CacheConfig.for_method(
    "mix", budget_unit="bytes", cache_ratio=0.15, window_size=8, n_recent=4, importance="replay", head_budgets="all"
)


def prefilled(model: Any, ids: torch.Tensor, **kw: Any) -> PrefillCache:
    cache = PrefillCache(model, 128)
    with attach(model):
        forward(model, cache, ids, **kw)
    return cache


@torch.no_grad()
def largest(model: Any, ids: torch.Tensor, chunk: int) -> list[torch.Tensor]:
    """Of every layer the largest attention [B, H, N] that the prompt gets while it is read again."""
    model.set_attn_implementation("eager")
    found: list[torch.Tensor] = []
    for part in ids.split(chunk, dim=1):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        layers = model(part, past_key_values=cache, output_attentions=True).attentions
        heads = model.config.num_key_value_heads
        now = [item[..., : ids.shape[1]].unflatten(1, (heads, -1)).amax(dim=(2, 3)) for item in layers]
        found = [torch.maximum(*pair) for pair in zip(found, now, strict=True)] if found else now
    model.set_attn_implementation("sdpa")
    return found


@pytest.mark.parametrize("chunk", [512, 32])
@pytest.mark.parametrize("attention", ["fused", "reconstruct"])
def test_importance_is_the_largest_attention_of_a_second_reading(
    model: Any, chunk: int, attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arkv.rereading, "CHUNK", chunk)
    ids = prompt(80, seed=3, batch=2)
    prefill = prefilled(model, ids)
    before = [layer.keys.clone() for layer in prefill.layers]
    config = CacheConfig.for_method(
        "mix", budget_unit="bytes", cache_ratio=0.5, window_size=8, importance="replay", attention=attention
    )
    replay(model, ids, prefill, config)
    own = [place for place, layer in enumerate(prefill.layers) if hasattr(layer, "scores")]
    expected = largest(model, ids, chunk)
    for place in own:
        mine = prefill.layers[place].scores[config.scoring].importance
        assert (mine - expected[place]).abs().max() < 1e-5
    assert all(torch.equal(layer.keys, was) for layer, was in zip(prefill.layers, before, strict=True))


@pytest.mark.parametrize("chunk", [512, 32])
def test_layers_with_large_hidden_states_win_less(wide_llama: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of what a layer reads is that of transformers' hidden states; by it a layer's scores are divided."""
    monkeypatch.setattr(arkv.rereading, "CHUNK", chunk)
    ids = prompt(200, seed=5)
    prefill = prefilled(wide_llama, ids)
    settings = CacheConfig(**{**vars(CONFIG), "sure_share": 0.0, "original_share": 0.0, "stream_norm": True})
    replay(wide_llama, ids, prefill, settings)
    assert settings.scoring == CONFIG.scoring
    with torch.no_grad():
        again = [
            wide_llama(torch.cat([ids, part], dim=1), output_hidden_states=True).hidden_states
            for part in ids.split(chunk, 1)
        ]
    read = [torch.cat([part[layer][0, 200:] for part in again]).norm(dim=-1).median() for layer in range(2)]
    found = [layer.scores[settings.scoring].stream[0] for layer in prefill.layers]
    assert found == pytest.approx([float(norm) for norm in read], rel=1e-4)

    cache = TriStateCache.from_prefill(prefill, settings)
    kept, lost = [], []
    for source, layer, norm in zip(prefill.layers, cache.own_layers, found, strict=True):
        importance = source.scores[settings.scoring].importance[0] / norm
        for head, (high, low) in enumerate(held_sets(layer)):
            past = range(settings.n_sink, 200 - settings.recent)
            kept += [float(importance[head, place]) for place in past if place in high | low]
            lost += [float(importance[head, place]) for place in past if place not in high | low]
    assert min(kept) >= max(lost)
    even = TriStateCache.from_prefill(prefill, CacheConfig(**{**vars(settings), "stream_norm": False}))
    counts = [[int(sum(layer.counts()).sum()) for layer in each.own_layers] for each in (cache, even)]
    assert counts[0] != counts[1]


def test_a_model_that_does_not_show_its_layers_is_refused_by_name(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(100, seed=1)
    prefill = prefilled(llama, ids)
    settings = CacheConfig(**{**vars(CONFIG), "stream_norm": True})
    monkeypatch.setattr(arkv.rereading, "_stream_norms", lambda model: contextlib.nullcontext({}))
    replay(llama, ids, prefill, settings)
    TriStateCache.from_prefill(prefill, CONFIG)
    with pytest.raises(ConfigError, match="stream_norm=True: this model"):
        TriStateCache.from_prefill(prefill, settings)
    with pytest.raises(ConfigError, match="use stream_norm=False"):
        CacheConfig(**{**vars(settings), "importance": "mean_max"})


def test_it_is_read_again_once_for_all_budgets(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(100, seed=1)
    prefill = prefilled(llama, ids)
    replay(llama, ids, prefill, CONFIG)
    monkeypatch.setattr(llama.model, "forward", lambda *args, **kw: pytest.fail("read again"))
    replay(llama, ids, prefill, CacheConfig(**{**vars(CONFIG), "cache_ratio": 0.2}))


def test_a_question_is_read_through_what_was_kept(wide_llama: Any) -> None:
    """The cache goes on behind the prompt by blocks and by steps, within its bytes, fused as by the readable twin."""
    ids, question = prompt(100, seed=1), prompt(12, seed=2)
    logits = []
    for attention in ("fused", "reconstruct"):
        config = CacheConfig(**{**vars(CONFIG), "attention": attention})
        prefill = prefilled(wide_llama, ids)
        replay(wide_llama, ids, prefill, config)
        cache = TriStateCache.from_prefill(prefill, config)
        held = cache.nbytes()
        with attach(wide_llama):
            found = [forward(wide_llama, cache, question)]
            found += [forward(wide_llama, cache, prompt(1, seed=seed)) for seed in range(20)]
        assert cache.nbytes() <= held
        logits.append(torch.cat(found, dim=1))
    assert (logits[0] - logits[1]).abs().max() < 1e-3


def test_a_prompt_that_was_read_once_is_refused(llama: Any) -> None:
    with attach(llama), pytest.raises(ConfigError, match="read twice"):
        forward(llama, TriStateCache(llama, CONFIG), prompt(60))
    with pytest.raises(ConfigError, match="read twice"):
        TriStateCache.from_prefill(prefilled(llama, prompt(60)), CONFIG)


def test_what_cannot_be_read_again_is_refused(llama: Any) -> None:
    ids = prompt(40)
    with pytest.raises(ConfigError, match="importance='mean_max'"):
        replay(llama, ids, prefilled(llama, ids), CacheConfig(cache_size=24, importance="mean_max", window_size=8))
    with pytest.raises(ConfigError, match="39 tokens and the prefill 40"):
        replay(llama, ids[:, 1:], prefilled(llama, ids), CONFIG)
    both, mask = left_padded([prompt(40), prompt(30)])
    with pytest.raises(ConfigError, match="padding"):
        replay(llama, both, prefilled(llama, both, attention_mask=mask), CONFIG)
    context = llama.config.max_position_embeddings
    whole = prompt(context)
    with pytest.raises(ConfigError, match=f"context of {context}"):
        replay(llama, whole, prefilled(llama, whole), CONFIG)
