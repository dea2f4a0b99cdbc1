"""One prefill, many caches: the recorded prompt compressed by any method, and left as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from arkv import CacheConfig, ConfigError, PrefillCache, TriStateCache, attach, storage_bytes
from arkv.memory import tensors_of
from tests.arkv.conftest import (
    PUBLISHED,
    decode,
    feed,
    forward,
    held_sets,
    left_padded,
    prompt,
    stock,
)

W = 8
SMALL: dict[str, Any] = {"cache_size": 24, "window_size": W}


def contents(prefill: PrefillCache) -> list[torch.Tensor]:
    """Everything that a prefill holds, copied."""
    found = []
    for layer in prefill.layers:
        for item in (layer.keys, layer.values, layer.queries, layer.padding):
            if item is not None:
                found.append(item.clone())
    return found


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def tensors_in(layer: Any) -> list[torch.Tensor]:
    """Everything that a layer of a compressed cache holds: counts of its rows, and all slots with a token."""
    part = layer.held()
    return [*part.counts, *(tensor for pool in part.pools for tensor in pool.tensors())]


def prefilled(model: Any, ids: torch.Tensor, queries: int = 128, **kw: Any) -> PrefillCache:
    prefill = PrefillCache(model, queries)
    with attach(model):
        forward(model, prefill, ids, **kw)
    return prefill


@pytest.mark.parametrize("length", [W, 24, 60])
@pytest.mark.parametrize("method", PUBLISHED)
def test_from_prefill_equals_direct_prefill(llama: Any, method: str, length: int) -> None:
    model = llama
    config = CacheConfig.for_method(method, **SMALL)
    ids, more = prompt(length, seed=length), prompt(18, seed=1)
    direct, later = TriStateCache(model, config), TriStateCache.from_prefill(prefilled(model, ids), config)
    with attach(model):
        forward(model, direct, ids)
        for step in range(19):
            for one, other in zip(direct.layers, later.layers, strict=True):
                assert held_sets(one) == held_sets(other)
                assert one.oq == other.oq
                assert one.slots == other.slots
            if step < 18:
                token = more[:, step : step + 1]
                assert torch.equal(forward(model, direct, token), forward(model, later, token))
    assert direct.nbytes() == later.nbytes()


@pytest.mark.parametrize("method", PUBLISHED)
def test_from_prefill_of_a_padded_batch(llama: Any, method: str) -> None:
    config = CacheConfig.for_method(method, **SMALL)
    ids, mask = left_padded([prompt(length, seed=length) for length in (40, 20, 5)])
    prefill = prefilled(llama, ids, attention_mask=mask)
    direct = TriStateCache(llama, config)
    with attach(llama):
        forward(llama, direct, ids, attention_mask=mask)
        later = TriStateCache.from_prefill(prefill, config)
        for token in prompt(20, seed=3, batch=3).split(1, dim=1):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            one, other = (forward(llama, cache, token, attention_mask=mask) for cache in (direct, later))
            assert torch.equal(one, other)
    for sample in range(3):
        for one, other in zip(direct.layers, later.layers, strict=True):
            assert held_sets(one, sample) == held_sets(other, sample)


def test_one_prefill_serves_many_caches_and_stays_as_it_was(llama: Any) -> None:
    ids, more = prompt(50, seed=1, batch=2), prompt(10, seed=2, batch=2)
    prefill = prefilled(llama, ids)
    before = contents(prefill)
    configs = [
        CacheConfig.for_method(method, **settings)
        for method in PUBLISHED
        # With room for everything the new storage could most easily be the old one.
        for settings in (SMALL, {"cache_size": 80, "window_size": 3})
    ]
    first = {}
    with attach(llama):
        for round_ in range(2):
            for number, config in enumerate(configs):
                cache = TriStateCache.from_prefill(prefill, config)
                logits = torch.cat(list(feed(llama, cache, more)), dim=1)
                if round_:
                    assert torch.equal(logits, first[number]), "a later cache feels an earlier one"
                first[number] = logits
                assert same(contents(prefill), before)
        full = prefill.to_dynamic()
        logits = torch.cat(list(feed(llama, full, more)), dim=1)
    assert same(contents(prefill), before)
    assert prefill.get_seq_length() == 50
    expected = DynamicCache(config=llama.config)
    forward(llama, expected, ids)
    assert (logits - torch.cat(list(feed(llama, expected, more)), dim=1)).abs().max() < 1e-5


def test_to_dynamic_equals_stock(model: Any) -> None:
    ids = prompt(40, seed=1, batch=2)
    prefill = prefilled(model, ids)
    full, dynamic = DynamicCache(config=model.config), prefill.to_dynamic()
    expected = forward(model, full, ids)
    assert type(dynamic) is DynamicCache
    assert dynamic.get_seq_length() == 40
    for one, other in zip(dynamic.layers, full.layers, strict=True):
        assert (one.keys - other.keys).abs().max() < 1e-5
        assert (one.values - other.values).abs().max() < 1e-5
    # It goes on under either attention.
    more = prompt(5, seed=2, batch=2)
    logits = forward(model, dynamic, more)
    assert (logits - forward(model, full, more)).abs().max() < 1e-4
    with attach(model):
        again = forward(model, prefill.to_dynamic(), more)
    assert (again - logits).abs().max() < 1e-5
    assert expected.shape[1] == 40


def test_the_prompt_itself_is_read_as_by_the_stock_cache(model: Any) -> None:
    ids, mask = left_padded([prompt(length, seed=length) for length in (30, 9)])
    expected = forward(model, DynamicCache(config=model.config), ids, attention_mask=mask)
    with attach(model):
        got = forward(model, PrefillCache(model), ids, attention_mask=mask)
    real = mask.bool()
    assert (got - expected)[real].abs().max() < 1e-5


@pytest.mark.parametrize("chunks", [[20, 20, 10], [49, 1], [3] * 16 + [2], [10, 1, 2, 37]])
def test_a_prompt_may_come_in_chunks(llama: Any, chunks: list[int]) -> None:
    ids, more = prompt(50, seed=1), prompt(4, seed=2)
    whole, parts = prefilled(llama, ids), PrefillCache(llama)
    with attach(llama):
        for part in ids.split(chunks, dim=1):
            logits = forward(llama, parts, part)
        assert (logits[:, -1] - forward(llama, PrefillCache(llama), ids)[:, -1]).abs().max() < 1e-5
        for one, other in zip(contents(parts), contents(whole), strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() < 1e-5
        for method in PUBLISHED:
            config = CacheConfig.for_method(method, **SMALL)
            one, other = (TriStateCache.from_prefill(prefill, config) for prefill in (parts, whole))
            for layer, twin in zip(one.layers, other.layers, strict=True):
                assert held_sets(layer) == held_sets(twin)
                assert layer.oq == pytest.approx(twin.oq, rel=1e-4)
            got, expected = (torch.cat(list(feed(llama, cache, more)), dim=1) for cache in (one, other))
            assert (got - expected).abs().max() < 1e-4


def test_a_padded_prompt_in_chunks(llama: Any) -> None:
    ids, mask = left_padded([prompt(40, seed=1), prompt(7, seed=2)])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    whole = prefilled(llama, ids, attention_mask=mask, position_ids=positions)
    parts = PrefillCache(llama)
    with attach(llama):
        for start in range(0, 40, 10):
            part = slice(start, start + 10)
            forward(llama, parts, ids[:, part], attention_mask=mask[:, : start + 10], position_ids=positions[:, part])
    config = CacheConfig(**SMALL, original_share=0.5)
    one, other = (TriStateCache.from_prefill(prefill, config) for prefill in (parts, whole))
    for sample in range(2):
        assert one.token_counts(sample) == other.token_counts(sample)
        for layer, twin in zip(one.layers, other.layers, strict=True):
            assert held_sets(layer, sample) == held_sets(twin, sample)


@pytest.mark.parametrize("recorded, used", [(W, W), (32, W), (32, 1), (100, W)])
def test_a_smaller_window_than_recorded(llama: Any, recorded: int, used: int) -> None:
    ids = prompt(50, seed=1)
    config = CacheConfig(cache_size=24, window_size=used)
    direct, later = TriStateCache(llama, config), TriStateCache.from_prefill(prefilled(llama, ids, recorded), config)
    with attach(llama):
        forward(llama, direct, ids)
    for one, other in zip(direct.layers, later.layers, strict=True):
        assert held_sets(one) == held_sets(other)
        assert one.oq == other.oq


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"window_size": 9}, "window_size=9"), ({"importance": "mean_max", "query_span": 12}, "query_span=12")],
)
def test_more_queries_than_recorded_are_refused(llama: Any, settings: dict[str, Any], named: str) -> None:
    prefill = prefilled(llama, prompt(50, seed=1), queries=8)
    with pytest.raises(ConfigError, match=named):
        TriStateCache.from_prefill(prefill, CacheConfig(cache_size=24, **{"window_size": 8, **settings}))


MANY: dict[str, CacheConfig] = {
    f"{method} {size} {unit}": CacheConfig.for_method(
        method,
        budget_unit=unit,
        cache_size=size,
        window_size=W,
        **({"quant_format": "int8"} if method in ("quant", "mix") else {}),
    )
    for method in PUBLISHED
    for unit in ("tokens", "bytes")
    for size in (24, 36)
}


@pytest.mark.parametrize("padded", [False, True])
def test_scores_are_computed_once_for_all_that_share_them(
    llama: Any, monkeypatch: pytest.MonkeyPatch, padded: bool
) -> None:
    ids, kw = prompt(60, seed=1), {}
    if padded:
        ids, mask = left_padded([prompt(60, seed=1), prompt(45, seed=2)])
        kw = {"attention_mask": mask}
    prefill = prefilled(llama, ids, **kw)
    apart = {name: TriStateCache.from_prefill(prefill, config) for name, config in MANY.items()}
    for config in MANY.values():
        prefill.score(config)
    scorings = {config.scoring for config in MANY.values()} - {None}
    # In tokens and in bytes, with the layers' OQ scores and without.
    assert len(scorings) == 4
    assert all(set(layer.scores) == scorings for layer in prefill.layers)
    monkeypatch.setattr("arkv.measure.score", lambda *_: pytest.fail("scored again"))
    for name, config in MANY.items():
        shared = TriStateCache.from_prefill(prefill, config)
        for one, other in zip(apart[name].layers, shared.layers, strict=True):
            assert one.oq == other.oq
            assert one.slots == other.slots
            assert same(tensors_in(one), tensors_in(other)), name


def test_scores_are_those_of_all_that_has_been_read(llama: Any) -> None:
    config = MANY["mix 24 bytes"]
    ids = prompt(60, seed=1)
    parts = prefilled(llama, ids[:, :40])
    parts.score(config)
    with attach(llama):
        forward(llama, parts, ids[:, 40:])
    late, whole = TriStateCache.from_prefill(parts, config), TriStateCache.from_prefill(prefilled(llama, ids), config)
    assert [held_sets(layer) for layer in late.layers] == [held_sets(layer) for layer in whole.layers]


OTHERS: dict[str, Any] = {
    "cache_size": 36,
    "budget_unit": "tokens",
    "layer_budgets": "equal",
    "head_budgets": "all",
    "sure_share": 0.5,
    "window_size": 6,
    "n_recent": 3,
    "n_sink": 2,
    "ranking": "recency",
    "original_share": 0.5,
    "quant_format": "int8",
    "tau1": 3.0,
    "tau2": 3.0,
    "tau3": 3.0,
    "importance": "mean_var",
    "gamma": 2.0,
    "query_span": 30,
    "query_stride": 3,
    "span_weight": 1.0,
    "value_norm": True,
    "pool_width": 3,
    "max_pool_width": 3,
    "decode_importance": "latest",
    "decode_rate": 0.5,
    "attention": "reconstruct",
}


@pytest.mark.parametrize("importance", ["mean_max", "mean_var"])
# ``stream_norm`` is for prompts that are read twice: see test_replay.
@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(CacheConfig) if field.name != "stream_norm"]
)
def test_what_scores_depend_on_is_all_named(wide_llama: Any, name: str, importance: Any) -> None:
    """Whatever setting changes: if ``CacheConfig.scoring`` stays the same, so do the scores."""
    # Heads that compete are refused beside some of the other settings.
    base = CacheConfig.for_method(
        "mix", budget_unit="bytes", cache_size=40, window_size=W, importance=importance, head_budgets="equal"
    )
    changes = {"cache_size": None, "cache_ratio": 0.7} if name == "cache_ratio" else {name: OTHERS[name]}
    changed = dataclasses.replace(base, **changes)
    prefill = prefilled(wide_llama, prompt(60, seed=1))
    for config in (base, changed):
        prefill.score(config)
    if changed.scoring == base.scoring:
        twin = prefilled(wide_llama, prompt(60, seed=1))
        twin.score(changed)
        for one, other in zip(prefill.layers, twin.layers, strict=True):
            assert torch.equal(one.scores[base.scoring].importance, other.scores[base.scoring].importance)
            assert one.scores[base.scoring].oq == other.scores[base.scoring].oq


def test_nothing_prefilled_yet_is_said(llama: Any) -> None:
    with pytest.raises(ValueError, match="prefill"):
        TriStateCache.from_prefill(PrefillCache(llama), CacheConfig(cache_size=64))
    with pytest.raises(ValueError, match="prefill"):
        PrefillCache(llama).to_dynamic()


@pytest.mark.parametrize("change", ["repeat", "select", "reorder"])
def test_samples_of_a_prefill_are_picked_with_their_queries(llama: Any, change: str) -> None:
    """Two prompts, repeated or picked, then compressed: each row is compressed by its own queries."""
    prompts = [prompt(50, seed=1), prompt(30, seed=2)]
    ids, mask = left_padded(prompts)
    prefill = prefilled(llama, ids, attention_mask=mask)
    if change == "repeat":
        rows = [0, 0, 1, 1]
        prefill.batch_repeat_interleave(2)
    elif change == "select":
        rows = [1]
        prefill.batch_select_indices(torch.tensor([1]))
    else:
        rows = [1, 0]
        prefill.reorder_cache(torch.tensor([1, 0]))
    config = CacheConfig(**SMALL, original_share=0.5)
    cache = TriStateCache.from_prefill(prefill, config)
    for row, source in enumerate(rows):
        own = TriStateCache.from_prefill(prefilled(llama, prompts[source]), config)
        shift = 50 - prompts[source].shape[1]
        for layer, own_layer in zip(cache.layers, own.layers, strict=True):
            assert held_sets(layer, row, shift) == held_sets(own_layer)


def test_generation_goes_on_from_a_prefill(model: Any) -> None:
    """With all ids and at least one that the cache has not seen, as transformers wants it."""
    ids = prompt(40, seed=1)
    expected = stock(model, ids, 10)
    prefill = prefilled(model, ids[:, :-1])
    with attach(model):
        for cache in (
            prefill.to_dynamic(),
            *(
                TriStateCache.from_prefill(prefill, CacheConfig.for_method(method, cache_size=60, window_size=W))
                for method in PUBLISHED
            ),
        ):
            got = decode(model, ids, cache, 10)
            assert torch.equal(got.tokens, expected.tokens)
            assert (got.logits - expected.logits).abs().max() < 1e-4


# -- forks -------------------------------------------------------------------------------------------------------------


IN_BYTES: dict[str, Any] = {"budget_unit": "bytes", "cache_size": 44}


@pytest.mark.parametrize(
    "method, settings", [("origin", {}), ("mix", {}), ("quant", IN_BYTES), ("mix", IN_BYTES)], ids=str
)
def test_a_fork_goes_its_own_way(wide_llama: Any, method: str, settings: dict[str, Any]) -> None:
    config = CacheConfig.for_method(method, **{**SMALL, **settings})
    ids, left, right = prompt(70, seed=1, batch=2), prompt(15, seed=2, batch=2), prompt(15, seed=3, batch=2)
    cache, untouched = (TriStateCache.from_prefill(prefilled(wide_llama, ids), config) for _ in range(2))
    with attach(wide_llama):
        for _ in feed(wide_llama, cache, prompt(3, seed=4, batch=2)):
            pass
        for _ in feed(wide_llama, untouched, prompt(3, seed=4, batch=2)):
            pass
        twin = cache.fork()
        assert storage_bytes(twin.layers) == storage_bytes(cache.layers)
        pointers = [{tensor.data_ptr() for tensor in tensors_of(item) if tensor.numel()} for item in (cache, twin)]
        assert len(pointers[0]) >= 5
        assert not pointers[0] & pointers[1]
        one = torch.cat(list(feed(wide_llama, twin, left)), dim=1)
        block = forward(wide_llama, twin, left)
        other = torch.cat(list(feed(wide_llama, cache, right)), dim=1)
        assert torch.equal(other, torch.cat(list(feed(wide_llama, untouched, right)), dim=1))
        assert not torch.equal(one, other)
        assert block.isfinite().all()
        assert cache.get_seq_length() == 88
        assert twin.get_seq_length() == 103


def test_a_fork_before_the_first_forward(llama: Any) -> None:
    config = CacheConfig(**SMALL)
    cache = TriStateCache(llama, config)
    twin = cache.fork()
    with attach(llama):
        assert torch.equal(forward(llama, twin, prompt(40)), forward(llama, cache, prompt(40)))
        assert twin.token_counts() == cache.token_counts()
