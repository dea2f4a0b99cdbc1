"""The attention function: put in place and taken away again, two ways to decode that agree, other models and caches."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)
from transformers.masking_utils import AttentionMaskInterface

from arkv import FORMATS, CacheConfig, ConfigError, PrefillCache, TriStateCache, attach
from arkv.attention import NAME, LazyMask, attention_forward, attention_mask
from tests.arkv.conftest import (
    PUBLISHED,
    SHAPE,
    Driver,
    compressed,
    decode,
    feed,
    forward,
    gemma3,
    held_sets,
    left_padded,
    prompt,
    spread,
    stock,
)

W = 8
SMALL: dict[str, Any] = {"cache_size": 24, "window_size": W}


# -- attach and detach -------------------------------------------------------------------------------------------------


def implementations(model: Any) -> list[str]:
    """The attention implementation of every config in the model."""
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def test_attach_lasts_as_long_as_the_block(model: Any) -> None:
    before = implementations(model)
    assert NAME not in before
    with attach(model):
        assert set(implementations(model)) == {NAME}
    assert implementations(model) == before


def test_the_models_attention_comes_back_after_an_error(llama: Any) -> None:
    before = implementations(llama)
    with pytest.raises(RuntimeError, match="out of cheese"), attach(llama):
        raise RuntimeError("out of cheese")
    assert implementations(llama) == before
    with pytest.raises(KeyboardInterrupt), attach(llama):
        raise KeyboardInterrupt
    assert implementations(llama) == before


def test_detach_by_hand(llama: Any) -> None:
    before = implementations(llama)
    attached = attach(llama)
    assert set(implementations(llama)) == {NAME}
    attached.detach()
    assert implementations(llama) == before


def test_attach_within_attach(llama: Any) -> None:
    before = implementations(llama)
    with attach(llama):
        with attach(llama):
            pass
        assert set(implementations(llama)) == {NAME}, "the outer block still holds"
    assert implementations(llama) == before


def test_an_eager_model_is_eager_again() -> None:
    model = spread(LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation="eager"))
    with attach(model):
        pass
    assert set(implementations(model)) == {"eager"}


def test_parts_of_a_model_get_their_own_attention_back() -> None:
    """A model may run its image encoder with one implementation and its language model with another."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SHAPE), image_token_id=96)
    model = LlavaForConditionalGeneration._from_config(
        config, attn_implementation={"vision_config": "eager", "text_config": "sdpa"}
    )
    before = implementations(model)
    assert {"eager", "sdpa"} <= set(before)
    with attach(model):
        pass
    assert implementations(model) == before


@pytest.mark.slow
def test_nothing_but_two_names_is_added_to_transformers() -> None:
    """In a process of its own: every function, class and method of transformers is the same object before and after."""
    script = """
        import inspect, sys, torch
        from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.integrations import sdpa_attention

        config = LlamaConfig(vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, eos_token_id=None, pad_token_id=0)
        model = LlamaForCausalLM(config).eval()
        ids = torch.arange(1, 21)[None]
        model.generate(ids, max_new_tokens=3, do_sample=False)

        def snapshot():
            seen = {}
            for name, module in list(sys.modules.items()):
                if not name.startswith("transformers") or module is None:
                    continue
                for key, value in list(vars(module).items()):
                    if inspect.isfunction(value) or inspect.isclass(value):
                        seen[name, key] = id(value)
                    if inspect.isclass(value) and value.__module__.startswith("transformers"):
                        for attribute, item in list(vars(value).items()):
                            if inspect.isfunction(item) or isinstance(item, (property, classmethod, staticmethod)):
                                seen[name, key, attribute] = id(item)
            return seen

        tables = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
        before, names = snapshot(), [dict(table) for table in tables]
        forwards = [type(module).forward for module in model.modules()]
        hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]

        from arkv import CacheConfig, PrefillCache, TriStateCache, attach
        with attach(model):
            cache = TriStateCache(model, CacheConfig(cache_size=12, window_size=4))
            model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
            model(ids, past_key_values=PrefillCache(model, 4))

        after = snapshot()
        changed = [key for key in before if after.get(key) != before[key]]
        assert not changed, changed
        for table, old in zip(tables, names, strict=True):
            assert set(table) - set(old) == {"arkv"}, set(table) ^ set(old)
            assert all(table[name] is old[name] for name in old)
        assert [type(module).forward for module in model.modules()] == forwards
        assert not any("forward" in vars(module) for module in model.modules())
        assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
        assert "sdpa" == model.config._attn_implementation
    """
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_the_names_are_registered() -> None:
    assert AttentionInterface()[NAME] is attention_forward
    assert AttentionMaskInterface()[NAME] is attention_mask
    # transformers tells implementations apart by parts of their names.
    assert not any(part in NAME for part in ("flash", "sdpa", "flex_attention", "paged", "/"))


# -- stock caches under this attention ---------------------------------------------------------------------------------


def test_a_stock_cache_gives_stock_results(model: Any) -> None:
    ids = prompt(30, seed=1, batch=2)
    expected = stock(model, ids, 12)
    with attach(model):
        got = decode(model, ids, DynamicCache(config=model.config), 12)
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.logits, expected.logits)


def test_a_stock_cache_gives_stock_results_with_left_padding(model: Any) -> None:
    ids, mask = left_padded([prompt(length, seed=length) for length in (30, 11, 1)])
    expected = stock(model, ids, 12, mask)
    with attach(model):
        got = decode(model, ids, DynamicCache(config=model.config), 12, mask)
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.logits, expected.logits)


def test_plain_forwards_are_stock(llama: Any) -> None:
    """Without a cache, with padding on the right, and in several chunks."""
    ids = prompt(24, seed=5, batch=2)
    right = torch.ones_like(ids)
    right[1, 15:] = 0

    @torch.no_grad()
    def results() -> list[torch.Tensor]:
        full = DynamicCache(config=llama.config)
        out = [llama(ids, use_cache=False).logits, llama(ids, attention_mask=right, use_cache=False).logits[:, :15]]
        return out + [forward(llama, full, part) for part in ids.split([10, 1, 13], dim=1)]

    expected = results()
    with attach(llama):
        got = results()
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert torch.allclose(one, other, atol=1e-6), number


def test_a_static_cache_gives_stock_results(llama: Any) -> None:
    """Its layers count what they hold in a tensor that they write to, between the making of a mask and its use."""
    ids = prompt(24, seed=5, batch=2)
    expected = forward(llama, DynamicCache(config=llama.config), ids)[:, 20:]
    static = StaticCache(config=llama.config, max_cache_len=40)
    with attach(llama):
        forward(llama, static, ids[:, :20])
        got = torch.cat(list(feed(llama, static, ids[:, 20:])), dim=1)
    assert (got - expected).abs().max() < 1e-4


def test_a_mask_is_made_only_when_needed() -> None:
    made = []

    class Noted(LazyMask):
        @property
        def dense(self) -> None:  # type: ignore[override]
            made.append(1)

    assert Noted({"attention_mask": torch.ones(2, 5, dtype=torch.bool)}).padding is None
    assert Noted({"attention_mask": None}).padding is None
    padded = Noted({"attention_mask": torch.tensor([[0, 1], [1, 1]])}).padding
    assert padded is not None
    assert padded.dtype == torch.bool
    assert padded.tolist() == [[False, True], [True, True]]
    assert not made


# -- two ways to decode ------------------------------------------------------------------------------------------------


CASES: dict[str, dict[str, Any]] = {
    "window": {"method": "window"},
    "origin": {"method": "origin"},
    **{f"quant {name}": {"method": "quant", "quant_format": name} for name in sorted(FORMATS)},
    **{f"mix {name}": {"method": "mix", "quant_format": name, "tau1": 1.0, "tau2": 1.0} for name in sorted(FORMATS)},
    "mix bytes": {"method": "mix", "budget_unit": "bytes", "cache_size": 44},
    "quant bytes int2": {"method": "quant", "budget_unit": "bytes", "cache_size": 44, "quant_format": "int2"},
    "mix mean": {"method": "mix", "decode_importance": "mean", "original_share": 0.5},
    "mix largest": {"method": "mix", "decode_importance": "largest", "original_share": 0.5},
}


@pytest.mark.parametrize("name", CASES)
def test_fused_equals_reconstructed(name: str) -> None:
    settings = {**SMALL, **CASES[name]}
    drivers = [
        Driver(CacheConfig.for_method(**settings, attention=way), layers=2, dim=64) for way in ("fused", "reconstruct")
    ]
    inputs = [drivers[0].random(60 + 30, seed=3 + layer, batch=2, scale=0.1 + 0.2 * layer) for layer in range(2)]
    for start, stop in [(0, 60), *((place, place + 1) for place in range(60, 90))]:
        for layer in range(2):
            fused, reconstructed = (
                driver.feed(*(tensor[:, :, start:stop] for tensor in inputs[layer]), layer=layer) for driver in drivers
            )
            assert (fused - reconstructed).abs().max() < 1e-5
            for sample in range(2):
                one, other = (held_sets(driver.layer(layer), sample) for driver in drivers)
                assert one == other
    one, other = (driver.layer(0).reconstruct() for driver in drivers)
    assert torch.equal(one.position, other.position)
    assert torch.equal(one.key, other.key)
    assert torch.equal(one.value, other.value)


@pytest.mark.parametrize("method", PUBLISHED)
def test_fused_equals_reconstructed_in_a_padded_batch(llama: Any, method: str) -> None:
    ids, mask = left_padded([prompt(length, seed=length) for length in (40, 20, 4)])
    results = [
        compressed(llama, ids, CacheConfig.for_method(method, **SMALL, attention=way), 30, mask)
        for way in ("fused", "reconstruct")
    ]
    (fused, one), (reconstructed, other) = results
    assert torch.equal(fused.tokens, reconstructed.tokens)
    assert (fused.logits - reconstructed.logits).abs().max() < 1e-3
    for layer, twin in zip(one.layers, other.layers, strict=True):
        for sample in range(3):
            assert held_sets(layer, sample) == held_sets(twin, sample)


def test_a_scaling_of_the_models_own_is_used() -> None:
    """Some models scale by something else than the root of the head dim."""
    outputs = []
    for scaling in (1.0, 0.1):
        driver = Driver(CacheConfig(**SMALL, original_share=0.5))
        driver.scaling = scaling
        query, key, value = driver.random(61, seed=1, scale=0.5)
        driver.feed(query[:, :, :60], key[:, :, :60], value[:, :, :60])
        output = driver.feed(query[:, :, 60:], key[:, :, 60:], value[:, :, 60:])
        tokens = driver.layer().reconstruct()
        weights = (query[:, :, 60:].view(1, 2, 2, -1) @ tokens.key.mT * scaling).softmax(-1)
        assert torch.allclose(output.view(1, 2, 2, -1), weights @ tokens.value, atol=1e-5)
        outputs.append(output)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)


# -- models with a sliding window or other peculiarities ---------------------------------------------------------------


@pytest.mark.parametrize("method", PUBLISHED)
def test_sliding_layers_keep_their_stock_layer(method: str) -> None:
    model = gemma3(10)
    cache = TriStateCache(model, CacheConfig.for_method(method, **SMALL))
    expected = [type(layer) for layer in DynamicCache(config=model.config).layers]
    assert [type(layer) for layer in (cache.layers[0], cache.layers[2])] == [expected[0], expected[2]]
    assert cache.is_sliding == [True, False, True]

    ids, mask = left_padded([prompt(30, seed=1), prompt(7, seed=2)])
    full = stock(model, ids, 15, mask)
    got, _ = compressed(model, ids, CacheConfig.for_method(method, cache_size=60, window_size=W), 15, mask)
    assert torch.equal(got.tokens, full.tokens)
    assert (got.logits - full.logits).abs().max() < 1e-4

    small, cache = compressed(model, ids, CacheConfig.for_method(method, **SMALL), 15, mask)
    assert small.logits.isfinite().all()
    assert all(len(high) + len(low) == 24 for high, low in held_sets(cache.layers[1]))
    assert cache.get_seq_length() == 44


def test_a_prefill_of_a_model_with_sliding_layers() -> None:
    model = gemma3(10)
    ids, more = prompt(40, seed=1), prompt(6, seed=2)
    prefill = PrefillCache(model, queries=W)
    config = CacheConfig.for_method("mix", **SMALL)
    direct, full = TriStateCache(model, config), DynamicCache(config=model.config)
    expected = torch.cat([forward(model, full, ids), *feed(model, full, more)], dim=1)
    with attach(model):
        forward(model, prefill, ids)
        forward(model, direct, ids)
        one = torch.cat(list(feed(model, TriStateCache.from_prefill(prefill, config), more)), dim=1)
        again = torch.cat(list(feed(model, TriStateCache.from_prefill(prefill, config), more)), dim=1)
        other = torch.cat(list(feed(model, direct, more)), dim=1)
        dynamic = prefill.to_dynamic()
        whole = torch.cat(list(feed(model, dynamic, more)), dim=1)
    assert torch.equal(one, other)
    assert torch.equal(one, again)
    assert (whole - expected[:, 40:]).abs().max() < 1e-5


def test_mistral_with_and_without_a_sliding_window() -> None:
    """With one, every layer slides and there is nothing to compress: better said than silently left alone."""
    ids = prompt(30, seed=1)
    model = spread(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)), seed=5)
    expected = stock(model, ids, 10)
    for method in PUBLISHED:
        got, _ = compressed(model, ids, CacheConfig.for_method(method, cache_size=60, window_size=W), 10)
        assert torch.equal(got.tokens, expected.tokens)
        assert (got.logits - expected.logits).abs().max() < 1e-4
    with pytest.raises(ConfigError, match=r"mistral.*sliding"):
        TriStateCache(MistralConfig(**SHAPE, sliding_window=10), CacheConfig(cache_size=60))


SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": 16,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": None,
}
SINKS = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16}


@pytest.mark.parametrize(
    "config, model_class, settings, refused",
    [
        # A learned logit in every softmax: leaving it out changes every number.
        (GptOssConfig, GptOssForCausalLM, SINKS, None),
        # Logits that are capped; low, so that it shows.
        (Gemma2Config, Gemma2ForCausalLM, {"attn_logit_softcapping": 2.0, "sliding_window": 16}, None),
        # Layers that read the keys and values of another layer.
        (Gemma3nTextConfig, Gemma3nForCausalLM, SHARED, "gemma3n.*share"),
    ],
    ids=["learned sinks", "capped logits", "shared layers"],
)
def test_a_peculiar_model_is_right_or_refused(
    config: Any, model_class: Any, settings: dict[str, Any], refused: str | None
) -> None:
    # transformers' SDPA leaves caps and sinks out.
    model = spread(model_class._from_config(config(**{**SHAPE, **settings}), attn_implementation="eager"), seed=6)
    ids = prompt(20, seed=1)
    expected = stock(model, ids, 5)
    for kind in (TriStateCache, PrefillCache, DynamicCache):
        with attach(model):
            if kind is DynamicCache:
                got = decode(model, ids, DynamicCache(config=model.config), 5)
            else:
                argument = (CacheConfig(cache_size=60, window_size=W),) if kind is TriStateCache else ()
                if refused is not None:
                    with pytest.raises(ConfigError, match=refused):
                        kind(model, *argument)
                    continue
                got = decode(model, ids, kind(model, *argument), 5)
        assert (got.logits - expected.logits).abs().max() < 1e-3, kind.__name__


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["cache", "prefill"])
def test_a_model_that_is_not_attached_is_told_so(implementation: str, kind: str) -> None:
    model = spread(LlamaForCausalLM(LlamaConfig(**SHAPE)), seed=7)
    model.set_attn_implementation(implementation)
    cache = TriStateCache(model, CacheConfig(cache_size=60)) if kind == "cache" else PrefillCache(model)
    with pytest.raises(ConfigError, match=r"with attach\(model\)"):
        forward(model, cache, prompt(12))
