"""What a caller gets wrong ends in one line that says what would work, before anything is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from arkv import CacheBatch, CacheConfig, ConfigError, PrefillCache, TriStateCache, attach, compress, replay
from tests.arkv.conftest import SHAPE, forward, prompt, spread

CONFIG = CacheConfig.for_method("mix", cache_size=24, window_size=8)
TWICE = CacheConfig.for_method("mix-replay", cache_size=24, window_size=8)


def other(**shape: Any) -> Any:
    return spread(LlamaForCausalLM(LlamaConfig(**{**SHAPE, **shape})), seed=5)


def read(model: Any, kind: type[Any] = TriStateCache, batch: int = 1) -> Any:
    """A cache behind a prompt."""
    cache = TriStateCache(model, CONFIG) if kind is TriStateCache else PrefillCache(model)
    with attach(model):
        forward(model, cache, prompt(40, seed=1, batch=batch))
    return cache


@pytest.mark.parametrize("wrong", ["org/name", 5, None, torch.nn.Linear(2, 2), CONFIG], ids=lambda item: str(item)[:9])
def test_what_is_no_model(wrong: Any) -> None:
    for make in (
        attach,
        PrefillCache,
        lambda model: TriStateCache(model, CONFIG),
        lambda model: compress(model, CONFIG),
    ):
        with pytest.raises(ConfigError, match=r"model is .*: give a model of transformers"), make(wrong):
            pass
    with pytest.raises(ConfigError, match="give the model itself"):
        attach(LlamaConfig(**SHAPE))


@pytest.mark.parametrize("wrong", ["mix", None, {"cache_size": 24}], ids=str)
def test_what_are_no_settings(llama: Any, wrong: Any) -> None:
    prefill = read(llama, PrefillCache)
    for call in (
        lambda: TriStateCache(llama, wrong),
        lambda: TriStateCache.from_prefill(prefill, wrong),
        lambda: prefill.score(wrong),
        lambda: replay(llama, prompt(40, seed=1), prefill, wrong),
    ):
        with pytest.raises(ConfigError, match=r"config is .*: give a CacheConfig, such as"):
            call()
    with pytest.raises(ConfigError, match="unknown method None"):
        CacheConfig.for_method(None, cache_size=24)  # type: ignore[arg-type]


@pytest.mark.parametrize("queries", [0, -1, "8"])
def test_a_prefill_that_records_nothing(llama: Any, queries: Any) -> None:
    with pytest.raises(ConfigError, match=r"queries=.*: give at least 1"):
        PrefillCache(llama, queries)


def test_what_is_no_prefill(llama: Any) -> None:
    for wrong in (DynamicCache(), read(llama)):
        with pytest.raises(ConfigError, match=f"prefill is a {type(wrong).__name__}: give a PrefillCache"):
            TriStateCache.from_prefill(wrong, CONFIG)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"prefill is a {type(wrong).__name__}: give a PrefillCache"):
            replay(llama, prompt(40, seed=1), wrong, TWICE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing has been prefilled yet"):
        TriStateCache.from_prefill(PrefillCache(llama), CONFIG)


CALLS: dict[str, Callable[[Any, int], Any]] = {
    "counts": lambda cache, sample: cache.token_counts(sample),
    "ratios": lambda cache, sample: cache.oq_ratios(sample),
    "fork": lambda cache, sample: cache.fork(sample),
    "select": lambda cache, sample: cache.batch_select_indices(torch.tensor([0, sample])),
    "reorder": lambda cache, sample: cache.reorder_cache(torch.tensor([sample])),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
@pytest.mark.parametrize("sample", [2, -1])
def test_a_sample_that_is_not_there(llama: Any, call: Callable[[Any, int], Any], sample: int) -> None:
    with pytest.raises(ValueError, match=f"sample {sample}: the cache holds 2, numbered from 0"):
        call(read(llama, batch=2), sample)


def test_before_any_prompt(llama: Any) -> None:
    empty = TriStateCache(llama, CONFIG)
    for name in ("fork", "select", "reorder"):
        with pytest.raises(ValueError, match="sample 0: the cache has read no prompt yet"):
            CALLS[name](empty, 0)
    assert empty.token_counts()["original"] == 0
    assert empty.fork().get_seq_length() == 0
    with pytest.raises(ValueError, match="repeats=0: give at least 1"):
        read(llama).batch_repeat_interleave(0)


@pytest.mark.parametrize("kind", [TriStateCache, PrefillCache])
@pytest.mark.parametrize("length", [1, 5])
def test_keys_of_another_kind(llama: Any, kind: type[Any], length: int) -> None:
    """And what it holds serves on."""
    cache, new = read(llama, kind), prompt(length, seed=2)
    half = copy.deepcopy(llama).to(torch.bfloat16)
    for model, ids, said in (
        (other(num_key_value_heads=4), new, r"1 samples with 2 KV heads, .* 1 samples with 4"),
        (llama, new.repeat(2, 1), r"1 samples with 2 KV heads, .* 2 samples with 2"),
        (other(head_dim=32), new, r"16 and 16 channels on cpu, .* 32 and 32 channels on cpu: make a cache for each"),
        (half, new, r"holds float32 keys .* gives it bfloat16 keys"),
    ):
        with attach(model), pytest.raises(ConfigError, match=said):
            forward(model, cache, ids)
    with attach(llama):
        assert forward(llama, cache, new).isfinite().all()


def test_another_number_of_layers(llama: Any) -> None:
    deeper, flatter = other(num_hidden_layers=3), other(num_hidden_layers=1)
    with attach(deeper), pytest.raises(ConfigError, match="made for a model of 2 layers"):
        forward(deeper, PrefillCache(llama), prompt(40, seed=1))
    cache = TriStateCache(llama, CONFIG)
    with attach(flatter):
        forward(flatter, cache, prompt(40, seed=1))
        with pytest.raises(RuntimeError, match="or was of a model with fewer layers"):
            forward(flatter, cache, prompt(1, seed=2))
    with pytest.raises(ValueError, match="caches can be stacked"):
        TriStateCache.stack([read(llama), read(deeper)])


def test_a_second_reading_of_something_else(llama: Any) -> None:
    prefill, ids = read(llama, PrefillCache), prompt(40, seed=1)
    for wrong in (ids[0], ids.tolist()):
        with pytest.raises(ConfigError, match=r"ids is .*: give token ids \[batch, tokens\]"):
            replay(llama, wrong, prefill, TWICE)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="made for a model of 2 layers"):
        replay(other(num_hidden_layers=3), ids, prefill, TWICE)
    with pytest.raises(ConfigError, match="2 samples with 2"):
        replay(llama, ids.repeat(2, 1), prefill, TWICE)


def test_a_used_cache_is_not_begun_with_another_prompt(llama: Any) -> None:
    ids = prompt(40, seed=1)
    with compress(llama, CONFIG) as cache:
        text = llama.generate(ids, past_key_values=cache, max_new_tokens=3)
        for again in (ids, ids[:, :30]):
            with pytest.raises(ConfigError, match=r"has read 42 tokens already, and generate is given \d+ in all"):
                llama.generate(again, past_key_values=cache, max_new_tokens=3)
        longer = llama.generate(text, past_key_values=cache, max_new_tokens=3)
        assert longer.shape[1] == 46
        cache.reset()
        assert torch.equal(llama.generate(ids, past_key_values=cache, max_new_tokens=3), text)


def test_a_prefill_that_is_reset_takes_another_batch_and_its_queries_alone(llama: Any) -> None:
    used, ids = read(llama, PrefillCache), prompt(20, seed=3, batch=2)
    used.reset()
    fresh = PrefillCache(llama)
    with attach(llama):
        for cache in (used, fresh):
            forward(llama, cache, ids)
    for mine, own in zip(used.layers, fresh.layers, strict=True):
        assert torch.equal(mine.queries, own.queries)


def test_rows_of_a_batch(llama: Any) -> None:
    first, second = read(llama), read(llama)
    with pytest.raises(ConfigError, match=r"stands in several rows .* fork\(\)"):
        CacheBatch([first, first], [1, 1])
    with pytest.raises(ConfigError, match="a row of a CacheBatch is a NoneType: give caches"):
        CacheBatch([first, None], [1, 1])  # type: ignore[list-item]
    with attach(llama):
        for ids, lengths in ((prompt(1, seed=2), [1, 1]), (prompt(1, seed=2, batch=2), [3, 2])):
            batch = CacheBatch([first, second], lengths)
            with pytest.raises(ConfigError, match=r"the model was given \[\d, 1\] token ids, and this CacheBatch has"):
                llama(ids, position_ids=batch.position_ids()[: len(ids), :1], past_key_values=batch)
