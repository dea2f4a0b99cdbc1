"""Model families beside the two that every test of the cache runs on: the same promises on tiny random models."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

from arkv import CacheBatch, CacheConfig, ConfigError, PrefillCache, TriStateCache, attach
from arkv.attention import attention_forward
from arkv.models import keeps_state
from tests.arkv.conftest import PUBLISHED, compressed, feed, forward, held_sets, left_padded, prompt, spread, stock
from tests.arkv.families import ABSENT, FAMILIES, HYBRID, SHAPE, Family, table

PROMPT, MORE = 50, 6
WHOLE = {"cache_size": 128, "window_size": 8}


def build(family: Family) -> Any:
    """The tiny model, with eager attention: transformers' SDPA leaves caps and sinks out."""
    if family.name not in CONFIG_MAPPING:
        assert family.verdict == ABSENT
        pytest.skip(f"{family.name} is not in this version of transformers")
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    return spread(AutoModelForCausalLM.from_config(family.config(), **options), seed=1)


def read(model: Any, cache: Any, *parts: torch.Tensor) -> torch.Tensor:
    """The logits of the last :data:`MORE` tokens, of all that is read through ``cache``, one forward per part."""
    named = "position_ids" in inspect.signature(model.forward).parameters
    logits = []
    for part in parts:
        start = cache.get_seq_length()
        # Without them, some models count every forward from 0.
        places = {"position_ids": torch.arange(start, start + part.shape[1])[None]} if named else {}
        logits.append(forward(model, cache, part, **places))
    return torch.cat(logits, dim=1)[:, -MORE:]


def steps(ids: torch.Tensor, *blocks: int) -> list[torch.Tensor]:
    """``ids`` in blocks of tokens, and one by one from there."""
    return list(ids.split([*blocks, *[1] * (ids.shape[1] - sum(blocks))], dim=1))


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_a_family_is_exact_or_refused_by_name(family: Family) -> None:
    model, ids = build(family), prompt(PROMPT + MORE, seed=1)
    if family.refused is not None:
        for make in (lambda: TriStateCache(model, CacheConfig(**WHOLE)), lambda: PrefillCache(model)):
            with pytest.raises(ConfigError, match=family.refused):
                with attach(model):
                    forward(model, make(), ids)
        return
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, -MORE:]

    def check(got: torch.Tensor) -> None:
        assert (got - expected).abs().max() < 1e-3 * max(float(expected.std()), 1.0)

    cache = TriStateCache(model, CacheConfig.for_method("origin", **WHOLE))
    in_bytes = TriStateCache(model, CacheConfig.for_method("mix", **WHOLE, budget_unit="bytes"))
    prefill = PrefillCache(model)
    hybrid = any(map(keeps_state, cache.stock.layers))
    assert hybrid == (family.verdict == HYBRID)
    with attach(model):
        check(read(model, cache, *steps(ids, PROMPT)))
        assert cache.get_seq_length() == PROMPT + MORE
        assert cache.token_counts() == {"original": PROMPT + MORE, "quantized": 0, "evicted": 0}
        blocks = (PROMPT,) if family.name == "jamba" else (30, 20)
        check(read(model, in_bytes, *steps(ids, *blocks)))
        read(model, prefill, *steps(ids[:, :PROMPT], *blocks))
        # What goes on from the prompt leaves it as it was.
        for make in (prefill.to_dynamic, lambda: TriStateCache.from_prefill(prefill, cache.config)):
            for _ in range(2):
                check(read(model, make(), *steps(ids[:, PROMPT:])))
        copies = TriStateCache.from_prefill(prefill, cache.config)
        check(read(model, copies.fork(), *steps(ids[:, PROMPT:])))
        check(read(model, copies.fork(0), *steps(ids[:, PROMPT:])))
        check(read(model, copies, *steps(ids[:, PROMPT:])))
        cache.reset()
        check(read(model, cache, *steps(ids, PROMPT)))
        check(read(model, DynamicCache(config=model.config), *steps(ids, PROMPT)))
        side_by_side(model, family, ids, check, hybrid)
    fused_equals_reconstructed(model, ids)


def side_by_side(model: Any, family: Family, ids: torch.Tensor, check: Any, hybrid: bool) -> None:
    """A row in a :class:`CacheBatch`, beside a shorter one in a stock cache."""
    caches = [TriStateCache(model, CacheConfig.for_method("origin", **WHOLE)), DynamicCache(config=model.config)]
    lengths = [PROMPT + MORE, 20]
    if hybrid:
        with pytest.raises(ConfigError, match="CacheBatch cannot serve"):
            CacheBatch(caches, lengths)
        return
    batch = CacheBatch(caches, lengths)
    named = "position_ids" in inspect.signature(model.forward).parameters
    if "chunked_attention" in (getattr(model.config, "layer_types", None) or ()) or not named:
        return
    both, _ = left_padded([ids, ids[:, :20]])
    check(forward(model, batch, both, position_ids=batch.position_ids())[:1, -MORE:])


def fused_equals_reconstructed(model: Any, ids: torch.Tensor) -> None:
    """With a budget that is too small."""
    settings = {"cache_size": 24, "window_size": 8, "tau1": 1.0, "tau2": 1.0}
    found = []
    with attach(model):
        for way in ("fused", "reconstruct"):
            cache = TriStateCache(model, CacheConfig.for_method("mix", **settings, attention=way))
            found.append((read(model, cache, *steps(ids, PROMPT)), cache))
            assert cache.token_counts()["evicted"] > 0
    (fused, one), (reconstructed, other) = found
    assert (fused - reconstructed).abs().max() < 1e-3 * max(float(fused.std()), 1.0)
    for layer, twin in zip(one.own_layers, other.own_layers, strict=True):
        assert held_sets(layer) == held_sets(twin)


def of(name: str) -> Any:
    """The tiny model of a family that this version of transformers has, and that is not refused."""
    found = next(family for family in FAMILIES if family.name == name)
    if found.refused is not None:
        pytest.skip(f"{name} is refused in this version of transformers")
    return build(found)


@pytest.mark.parametrize("name", ["bloom", "falcon", "gptj"])
def test_a_model_without_the_interface_stays_as_it_was(name: str) -> None:
    model = build(next(family for family in FAMILIES if family.name == name))
    with pytest.raises(ConfigError, match=f"'{name}' has no attention interface.*full cache serves it"):
        attach(model)
    assert model.config._attn_implementation == "eager"
    forward(model, DynamicCache(config=model.config), prompt(12))


@pytest.mark.parametrize("kind", [TriStateCache, PrefillCache])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_hybrid_notices_a_broken_forward(kind: Any, broken: int) -> None:
    """Also one that was broken off where only states have been changed, which count no tokens."""
    model, ids = of("granitemoehybrid"), prompt(40, seed=1)
    cache = kind(model, CacheConfig(**WHOLE)) if kind is TriStateCache else kind(model)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with attach(model):
        expected = forward(model, cache, ids)
        handle = model.model.layers[broken].post_attention_layernorm.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            forward(model, cache, ids[:, :1])
        handle.remove()
        if broken == 0:
            for more in (1, 5):
                with pytest.raises(RuntimeError, match="was interrupted"):
                    forward(model, cache, ids[:, :more])
        # Behind the last attention all layers have seen the token.
        cache.reset()
        assert torch.equal(forward(model, cache, ids), expected)


def test_a_hybrid_in_a_batch_gives_each_sample_what_it_gives_alone() -> None:
    model = of("granitemoehybrid")
    ids, new = torch.cat([prompt(40, seed=1), prompt(40, seed=2)]), prompt(5, seed=3, batch=2)
    cache = TriStateCache(model, CacheConfig.for_method("origin", **WHOLE))
    prefill = PrefillCache(model)
    with attach(model):
        forward(model, cache, ids)
        forward(model, prefill, ids)
        prefill.reorder_cache(torch.tensor([1, 0]))
        prefill.batch_repeat_interleave(2)
        assert prefill.nbytes() == prefill.full_bytes(40)
        again = TriStateCache.from_prefill(prefill, cache.config)
        again.batch_select_indices(torch.tensor([2]))
        for one in (cache.fork(0), again):
            alone = TriStateCache(model, cache.config)
            forward(model, alone, ids[:1])
            assert (read(model, one, *steps(new[:1])) - read(model, alone, *steps(new[:1]))).abs().max() < 1e-4


def test_the_cache_of_a_config_alone_is_refused_in_the_first_forward() -> None:
    """Only the model's code tells that it needs a cache of its own kind."""
    family = next(family for family in FAMILIES if family.name == "falcon_h1")
    model = build(family)
    if family.refused is None:
        pytest.skip("this version of transformers has no such cache")
    with pytest.raises(ConfigError, match=r"falcon_h1.*cache of the model's own kind"), attach(model):
        forward(model, TriStateCache(model.config, CacheConfig(**WHOLE)), prompt(12))


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"position_bias": torch.zeros(1)}, "'llama' hands 'position_bias'"),
        ({"indices": torch.zeros(1)}, "'llama' hands 'indices'"),
        ({"is_causal": False}, "'llama' has attention that is not causal"),
        ({"sliding_window": 16}, "'llama' has a sliding window of 16"),
        ({"dropout": 0.1}, "'llama' drops attention out"),
    ],
)
@pytest.mark.parametrize("kind", [TriStateCache, PrefillCache])
def test_arguments_that_change_attention_are_refused(kind: Any, arguments: dict[str, Any], named: str) -> None:
    config = CONFIG_MAPPING["llama"](**SHAPE)
    cache = kind(config, CacheConfig(**WHOLE)) if kind is TriStateCache else kind(config)
    module = SimpleNamespace(layer_idx=0, num_key_value_groups=2, is_causal=True, training=False, config=config)
    query, key, value = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    handles = cache.update(key, value, 0)
    with pytest.raises(ConfigError, match=named):
        attention_forward(module, query, *handles, None, scaling=0.25, **arguments)
    harmless = {"position_ids": torch.arange(5), "sliding_window": 512, "indices": None, "dropout": 0.0}
    attention_forward(module, query, *handles, None, scaling=0.25, **harmless)


def test_a_model_reads_a_static_cache_while_it_is_attached() -> None:
    model, ids = of("llama"), prompt(20, seed=1)
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with attach(model):
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), expected)


@pytest.mark.parametrize("name", ["mistral", "phi3", "qwen2"])
def test_a_window_as_wide_as_the_context_never_slides(name: str) -> None:
    def layers(window: int) -> set[str]:
        settings = {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
        cache = TriStateCache(CONFIG_MAPPING[name](**{**SHAPE, **settings}), CacheConfig(**WHOLE))
        return {type(layer).__name__ for layer in cache.layers}

    assert layers(512) == layers(1024) == {"TriStateLayer"}
    with pytest.raises(ConfigError, match=f"'{name}' has sliding windows in all layers"):
        layers(511)


def test_the_documentation_has_the_same_table() -> None:
    text = Path(__file__).parents[2].joinpath("docs", "families.md").read_text(encoding="utf-8")
    assert table() in text, "python scripts/families.py writes it anew"


@pytest.fixture(
    scope="module", params=["deepseek_v3", "falcon_h1", "gemma2", "gpt_oss", "mistral", "phi3", "qwen2", "qwen3_next"]
)
def family(request: pytest.FixtureRequest) -> Any:
    """Some of them, of every kind."""
    return of(request.param)


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
            for layer in cache.own_layers:
                for high, low in held_sets(layer):
                    assert len(high | low) == 24


@pytest.mark.parametrize("method", PUBLISHED)
def test_fused_equals_reconstructed(family: Any, method: str) -> None:
    settings = {"cache_size": 24, "window_size": 8, "tau1": 1.0, "tau2": 1.0}
    ids, mask = left_padded([prompt(50, seed=2), prompt(31, seed=3)])
    (fused, one), (reconstructed, other) = (
        compressed(family, ids, CacheConfig.for_method(method, **settings, attention=way), 20, mask)
        for way in ("fused", "reconstruct")
    )
    assert torch.equal(fused.tokens, reconstructed.tokens)
    assert (fused.logits - reconstructed.logits).abs().max() < 1e-3
    for layer, twin in zip(one.own_layers, other.own_layers, strict=True):
        for sample in range(2):
            assert held_sets(layer, sample) == held_sets(twin, sample)


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_block_behind_a_prompt_is_read_as_by_the_stock_cache(family: Any, method: str) -> None:
    """With room for everything; in a batch with padding."""
    ids, mask = left_padded([prompt(40, seed=1), prompt(25, seed=2)])
    full, cache = (
        DynamicCache(config=family.config),
        TriStateCache(family, CacheConfig.for_method(method, cache_size=64, window_size=8)),
    )
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    parts = [slice(0, 30), slice(30, 37), slice(37, 38), slice(38, 40)]

    def read(target: Any) -> list[torch.Tensor]:
        return [
            forward(family, target, ids[:, part], attention_mask=mask[:, : part.stop], position_ids=positions[:, part])
            for part in parts
        ]

    expected = read(full)
    with attach(family):
        got = read(cache)
    real = mask.bool()
    for part, one, other in zip(parts, got, expected, strict=True):
        assert (one - other)[real[:, part]].abs().max() < 1e-4
