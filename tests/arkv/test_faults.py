"""What once went wrong in silence, or failed without a word about why."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

from arkv import CacheBatch, CacheConfig, ConfigError, PrefillCache, TriStateCache, attach
from tests.arkv.conftest import SHAPE, Driver, feed, forward, gemma3, held_sets, left_padded, prompt, spread

# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate, length", [(0.5, 150), (1.0, 1), (1.0, 20)])
@pytest.mark.parametrize("method, importance", [("origin", "mean"), ("quant", "mean"), ("quant", "largest")])
def test_sinks_stay_whatever_is_forgotten(llama: Any, method: str, importance: str, rate: float, length: int) -> None:
    settings = {"cache_size": 32, "window_size": 8, "n_sink": 4, "decode_importance": importance, "decode_rate": rate}
    cache = TriStateCache(llama, CacheConfig.for_method(method, **settings))
    with attach(llama):
        forward(llama, cache, prompt(40, seed=1))
        forward(llama, cache, prompt(length, seed=2))
        for logits in feed(llama, cache, prompt(30, seed=3)):
            assert logits.isfinite().all()
    for layer in cache.layers:
        for original, quantized in held_sets(layer):
            assert original >= {0, 1, 2, 3}
            assert len(original | quantized) == 32


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [[40], [100], [40, 300], [40, 20, 20]], ids=str)
def test_behind_a_short_prompt_an_answer_is_quantized(parts: list[int]) -> None:
    """In byte units: a long answer is held as a long prompt is, within the bytes at every step, and one way."""
    drivers = {}
    for method in ("mix", "quant"):
        config = CacheConfig.for_method(method, budget_unit="bytes", cache_size=48, window_size=8)
        driver = drivers[method] = Driver(config, dim=64)
        inputs = driver.random(sum(parts) + 280, seed=1)
        quantized: list[set[int]] = [set(), set()]
        seen = 0
        for part in [*parts, *[1] * 280]:
            output = driver.feed(*(tensor[:, :, seen : seen + part] for tensor in inputs))
            assert output.isfinite().all()
            seen += part
            assert driver.cache.nbytes() <= driver.heads * 48 * 2 * 64 * 4
            for head, (high, low) in enumerate(held_sets(driver.layer())):
                assert high >= {0, 1, 2, 3, *range(seen - 8, seen)}
                assert not high & quantized[head], "back from Quantized"
                quantized[head] |= low
    mix, quant = (drivers[method].cache.token_counts() for method in ("mix", "quant"))
    assert mix["quantized"] > 150
    assert mix["original"] + mix["quantized"] > 0.85 * (quant["original"] + quant["quantized"])


def test_in_a_batch_slots_follow_what_each_sample_has_seen(llama: Any) -> None:
    """A sample holds there what it holds alone, also once samples have been picked."""
    config = CacheConfig.for_method(
        "mix", budget_unit="bytes", cache_size=32, window_size=8, n_sink=2, quant_format="int8", layer_budgets="equal"
    )
    prompts = [prompt(60, seed=1), prompt(12, seed=2)]
    ids, mask = left_padded(prompts)
    places = (mask.cumsum(dim=1) - 1).clamp_min(0)
    answers = prompt(60, seed=3, batch=2)
    batch, alone = TriStateCache(llama, config), [TriStateCache(llama, config) for _ in prompts]
    with attach(llama):
        forward(llama, batch, ids, attention_mask=mask, position_ids=places)
        for cache, own in zip(alone, prompts, strict=True):
            forward(llama, cache, own)
        rows = [0, 1]
        for step in range(60):
            if step == 10:
                rows = [1, 0]
                batch.batch_select_indices(torch.tensor(rows))
            new = answers[:, step : step + 1]
            places = torch.tensor([[prompts[row].shape[1] + step] for row in rows])
            forward(llama, batch, new[rows], position_ids=places)
            for row, cache in enumerate(alone):
                forward(llama, cache, new[row : row + 1])
            for place, row in enumerate(rows):
                for layer, own in zip(batch.layers, alone[row].layers, strict=True):
                    assert held_sets(layer, place, shift=(0, 48)[row]) == held_sets(own)
    assert alone[1].token_counts()["quantized"] > 25


# -- forwards that were broken off -------------------------------------------------------------------------------------


def caches_of(model: Any) -> list[Any]:
    return [TriStateCache(model, CacheConfig.for_method("mix", cache_size=32, window_size=8)), PrefillCache(model, 8)]


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [0, 1], ids=["tri-state", "prefill"])
@pytest.mark.parametrize("broken", ["never attached", "behind a layer", "attached too briefly"])
@pytest.mark.parametrize("length", [1, 5])
def test_after_a_broken_forward_the_next_one_says_so(llama: Any, length: int, broken: str, kind: int) -> None:
    """Once it has been reset, the cache serves again."""
    cache, ids, new = caches_of(llama)[kind], prompt(40, seed=1), prompt(length, seed=2)
    with attach(llama):
        expected = forward(llama, cache, ids)
    attached = attach(llama)
    if broken == "never attached":
        attached.detach()
    module, hook = (
        (llama.model.layers[0].mlp, stop)
        if broken == "behind a layer"
        else (llama.model.layers[1], lambda *_: attached.detach())
    )
    handle = module.register_forward_pre_hook(hook)
    try:
        with pytest.raises((ConfigError, KeyboardInterrupt)):
            forward(llama, cache, new)
    finally:
        handle.remove()
        attached.detach()
    with attach(llama):
        for more in (new, prompt(1, seed=3), prompt(7, seed=4)):
            with pytest.raises(RuntimeError, match="was interrupted"):
                forward(llama, cache, more)
        cache.reset()
        assert torch.equal(forward(llama, cache, ids), expected)


def test_a_cache_that_has_seen_nothing_serves_once_the_model_is_attached(llama: Any) -> None:
    used, fresh = (caches_of(llama)[0] for _ in range(2))
    ids = prompt(40, seed=1)
    with pytest.raises(ConfigError, match=r"with attach\(model\)"):
        forward(llama, used, ids)
    with attach(llama):
        assert torch.equal(forward(llama, used, ids), forward(llama, fresh, ids))
        assert torch.equal(forward(llama, used, ids[:, :1]), forward(llama, fresh, ids[:, :1]))


@pytest.mark.parametrize("kind", [0, 1], ids=["tri-state", "prefill"])
def test_reset_also_empties_sliding_layers(kind: int) -> None:
    gemma = gemma3(10)
    used, fresh = (caches_of(gemma)[kind] for _ in range(2))
    new = fresh.nbytes()
    ids = prompt(30, seed=2)
    with attach(gemma):
        forward(gemma, used, prompt(40, seed=1))
        used.reset()
        assert used.get_seq_length() == 0
        assert used.nbytes() == new
        assert torch.equal(forward(gemma, used, ids), forward(gemma, fresh, ids))
        if kind == 0:
            assert torch.equal(forward(gemma, used, ids[:, :1]), forward(gemma, fresh, ids[:, :1]))


# -- modes of torch ----------------------------------------------------------------------------------------------------

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
PARTS = (40, 1, 1, 6, 1, 1, 70, 1, 1)


@pytest.mark.parametrize(
    "unit, method", [("tokens", "mix"), ("tokens", "origin"), ("bytes", "mix"), ("bytes", "quant")]
)
@pytest.mark.parametrize(
    "modes",
    [
        ["inference", "no_grad"],
        ["inference", "grad"],
        ["no_grad", "inference", "no_grad"],
        ["inference", "inference", "inference", "no_grad", "inference", "grad"],
    ],
    ids=" ".join,
)
def test_forwards_under_any_mode_follow_one_another(llama: Any, modes: list[str], unit: Any, method: str) -> None:
    """Prompts, steps, blocks and forks; the last mode goes on to the end."""
    config = CacheConfig.for_method(
        method, budget_unit=unit, cache_size=32, window_size=8, quant_format="int8", n_sink=2
    )
    used, plain = TriStateCache(llama, config), TriStateCache(llama, config)
    with attach(llama):
        for number, part in enumerate(PARTS):
            ids = prompt(part, seed=number)
            with MODES[modes[min(number, len(modes) - 1)]]():
                got = llama(ids, past_key_values=used).logits
                fork = used.fork()
            assert (got - forward(llama, plain, ids)).abs().max() < 1e-4
            more = prompt(2, seed=99)
            expected = torch.cat(list(feed(llama, plain.fork(), more)), dim=1)
            assert (torch.cat(list(feed(llama, fork, more)), dim=1) - expected).abs().max() < 1e-4


def test_a_prefill_under_inference_mode_serves_outside_of_it(llama: Any) -> None:
    ids, more = prompt(60, seed=1), prompt(5, seed=2)
    config = CacheConfig.for_method("mix", cache_size=32, window_size=8)
    found = []
    for mode in MODES.values():
        prefill = PrefillCache(llama, 8)
        with attach(llama):
            with mode():
                llama(ids[:, :40], past_key_values=prefill)
            forward(llama, prefill, ids[:, 40:])
            prefill.score(config)
            found.append(torch.cat(list(feed(llama, TriStateCache.from_prefill(prefill, config), more)), dim=1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_copies_made_under_inference_mode_go_on_outside_of_it(llama: Any) -> None:
    cache = TriStateCache(llama, CacheConfig.for_method("mix", cache_size=32, window_size=8))
    more = prompt(5, seed=2)
    with attach(llama):
        forward(llama, cache, prompt(60, seed=1))
        with torch.inference_mode():
            copies = [cache.fork(), copy.deepcopy(cache)]
        expected = torch.cat(list(feed(llama, cache, more)), dim=1)
        for other in copies:
            assert torch.equal(torch.cat(list(feed(llama, other, more)), dim=1), expected)


# -- attach and detach -------------------------------------------------------------------------------------------------


def serves(model: Any) -> bool:
    """Whether the model attends through this library now."""
    try:
        return bool(forward(model, caches_of(model)[0], prompt(4)).isfinite().all())
    except ConfigError:
        return False


def test_attachments_end_in_any_order(llama: Any) -> None:
    own = llama.config._attn_implementation
    for order in itertools.permutations(range(3)):
        attached = [attach(llama), attach(llama.model), attach(llama)]
        for place, number in enumerate(order):
            assert serves(llama)
            attached[number].detach()
            attached[number].detach()
            assert serves(llama) == (place < 2)
        assert llama.config._attn_implementation == own


def test_attach_within_attach_may_end_later(llama: Any) -> None:
    own = llama.config._attn_implementation
    with attach(llama):
        longer = attach(llama)
    assert serves(llama)
    with attach(llama), attach(llama):
        pass
    assert serves(llama)
    longer.detach()
    assert not serves(llama)
    assert llama.config._attn_implementation == own


def test_attention_that_is_set_by_hand_meanwhile_is_the_models_own(llama: Any) -> None:
    own = llama.config._attn_implementation
    forgotten = attach(llama)
    try:
        llama.set_attn_implementation("eager")
        with attach(llama):
            assert serves(llama)
            forgotten.detach()
            assert serves(llama)
        assert llama.config._attn_implementation == "eager"
    finally:
        llama.set_attn_implementation(own)


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 1], ids=["tri-state", "prefill"])
def test_a_mask_of_four_dimensions_is_refused(llama: Any, kind: int) -> None:
    ids = prompt(40, seed=1)
    causal = torch.ones(40, 40).tril().bool()[None, None]
    with attach(llama):
        for first, new in ((0, 40), (38, 2), (39, 1)):
            cache = caches_of(llama)[kind]
            if first:
                forward(llama, cache, ids[:, :first])
            with pytest.raises(ConfigError, match=r"attention_mask has 4 dimensions.*\[batch, tokens\]"):
                forward(llama, cache, ids[:, first : first + new], attention_mask=causal[:, :, first : first + new])
        # Full caches take it as ever.
        expected = forward(llama, DynamicCache(config=llama.config), ids)
        full = forward(llama, DynamicCache(config=llama.config), ids, attention_mask=causal)
    assert (full - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [0, 1], ids=["tri-state", "prefill"])
def test_padding_behind_tokens_is_refused(llama: Any, kind: int) -> None:
    ids = prompt(40, seed=1, batch=2)
    with attach(llama):
        for zeros in (slice(35, 40), slice(10, 12)):
            mask = torch.ones(2, 40, dtype=torch.long)
            mask[1, zeros] = 0
            cache = caches_of(llama)[kind]
            with pytest.raises(ConfigError, match="padding on the left only"):
                forward(llama, cache, ids, attention_mask=mask)
        # A block whose rows are of different lengths would have padding between its tokens and the prompt's.
        mask = torch.ones(2, 44, dtype=torch.long)
        mask[1, 40:42] = 0
        cache = caches_of(llama)[kind]
        forward(llama, cache, ids)
        with pytest.raises(ConfigError, match="padding on the left only"):
            forward(llama, cache, prompt(4, seed=2, batch=2), attention_mask=mask)


# -- batches of caches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tri-state", "prefill", "full"])
def test_a_batch_refuses_layers_with_chunked_attention(kind: str) -> None:
    """Their caches are those of sliding windows, which see other tokens."""
    settings = {"num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 96}
    layers = {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
    model = spread(Llama4ForCausalLM(Llama4TextConfig(**{**SHAPE, **settings, **layers})))
    config = CacheConfig.for_method("mix", cache_size=32, window_size=8)
    make = {
        "tri-state": lambda: TriStateCache(model, config),
        "prefill": lambda: PrefillCache(model, 8),
        "full": lambda: DynamicCache(config=model.config),
    }[kind]
    with attach(model):
        forward(model, make(), prompt(12))
        batch = CacheBatch([make(), make()], [12, 12])
        with pytest.raises(ConfigError, match=r"llama4.*chunked_attention.*CacheBatch"):
            forward(model, batch, prompt(12, batch=2), position_ids=batch.position_ids())


def test_positions_of_a_batch_may_be_made_on_any_device(llama: Any) -> None:
    batch = CacheBatch([caches_of(llama)[0] for _ in range(2)], [3, 1])
    assert batch.position_ids().tolist() == [[0, 1, 2], [0, 0, 0]]
    assert torch.equal(batch.position_ids("cpu"), batch.position_ids())
    assert batch.position_ids(device=torch.device("meta")).device.type == "meta"


# -- numbers of slots --------------------------------------------------------------------------------------------------


def test_slots_may_be_more_than_the_context_has_tokens() -> None:
    """More of them than 16 bits can number, though positions fit into these."""
    size = 5000
    config = CacheConfig.for_method(
        "quant",
        budget_unit="bytes",
        cache_size=size,
        decode_importance="latest",
        importance="mean_var",
        query_span=None,
    )
    driver = Driver(config, heads=1, groups=1, dim=64)
    inputs = driver.random(size + 4, seed=1)
    seen = 0
    for part in (size, 1, 1, 2):
        assert driver.feed(*(tensor[:, :, seen : seen + part] for tensor in inputs)).isfinite().all()
        seen += part
        assert driver.cache.nbytes() <= size * 2 * 64 * 4
    counts = driver.cache.token_counts()
    assert counts["quantized"] > 4900
    assert counts["evicted"] == 0


# -- gradients ---------------------------------------------------------------------------------------------------------


def small(model: Any, **settings: Any) -> TriStateCache:
    return TriStateCache(model, CacheConfig.for_method("mix", cache_size=32, window_size=8, **settings))


def gradients_of(model: Any, logits: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(logits.square().sum(), list(model.parameters())))


@pytest.mark.parametrize("attention", ["fused", "reconstruct"])
def test_a_step_has_logits_but_no_gradients(llama: Any, attention: Any) -> None:
    ids, new = prompt(40, seed=1), prompt(3, seed=2)
    cache, plain = (small(llama, attention=attention) for _ in range(2))
    with attach(llama):
        forward(llama, plain, ids)
        logits = [llama(ids, past_key_values=cache).logits]
        for expected in feed(llama, plain, new):
            logits.append(llama(new[:, len(logits) - 1 : len(logits)], past_key_values=cache).logits)
            assert (logits[-1] - expected).abs().max() < 1e-4
        with pytest.raises(ConfigError, match="no gradients through decoding steps of a compressed cache"):
            gradients_of(llama, torch.cat(logits, dim=1))
        # The prompt's own are those that there are without a cache.
        expected = gradients_of(llama, llama(ids).logits)
        got = gradients_of(llama, llama(ids, past_key_values=small(llama)).logits)
    for mine, other in zip(got, expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj", "nothing but the prompt"])
@pytest.mark.parametrize("length", [1, 5])
def test_no_gradient_is_lost_in_silence(trained: str, length: int) -> None:
    """Whatever it would have to reach: in a step, or in a block whose graph ends where the stored tokens begin."""
    model = spread(LlamaForCausalLM(LlamaConfig(**SHAPE)), seed=1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"layers.0.self_attn.{trained}" in name)
    embedded = model.get_input_embeddings()(prompt(40, seed=1)).detach().requires_grad_("prompt" in trained)
    cache = small(model)
    with attach(model):
        model(inputs_embeds=embedded, past_key_values=cache)
        logits = model(prompt(length, seed=2), past_key_values=cache).logits
        with pytest.raises(ConfigError, match="no gradients through"):
            logits.sum().backward()


def test_a_block_behind_a_prompt_without_gradients_has_its_own(llama: Any) -> None:
    ids, block = prompt(20, seed=1), prompt(5, seed=2)
    found = []
    with attach(llama):
        for cache in (small(llama), DynamicCache(config=llama.config)):
            forward(llama, cache, ids)
            found.append(gradients_of(llama, llama(block, past_key_values=cache).logits))
    for mine, other in zip(*found, strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-3)


# -- another model -----------------------------------------------------------------------------------------------------


def test_a_cache_used_with_another_model_says_so(llama: Any) -> None:
    config = CacheConfig.for_method("mix", cache_size=24, window_size=8)
    deeper = spread(LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 3})), seed=5)
    wider = spread(LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_key_value_heads": 4})), seed=6)
    cache = TriStateCache(llama, config)
    with attach(llama), attach(deeper), attach(wider):
        with pytest.raises(ConfigError, match="made for a model of 2 layers"):
            forward(deeper, cache, prompt(40, seed=1))
        cache.reset()
        forward(llama, cache, prompt(40, seed=1))
        with pytest.raises(ConfigError, match=r"1 samples with 2 KV heads, .* 1 samples with 4"):
            forward(wider, cache, prompt(1, seed=2))
        with pytest.raises(ConfigError, match=r"1 samples with 2 KV heads, .* 2 samples with 2"):
            forward(llama, cache, prompt(1, seed=2, batch=2))
        # Nothing was taken from either.
        assert forward(llama, cache, prompt(1, seed=2)).isfinite().all()
