"""KV heads that compete for the same bytes, and the newest tokens apart from the window's queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arkv import CacheConfig, ConfigError, PrefillCache, TriStateCache, attach
from arkv.threshold import compete
from tests.arkv.conftest import compressed, decode, feed, forward, held_sets, left_padded, prompt


def config(head_budgets: Any = "all", method: str = "mix", **settings: Any) -> CacheConfig:
    settings = {"cache_ratio": 0.12, "window_size": 8, "n_sink": 2, "n_recent": 4, **settings}
    return CacheConfig.for_method(method, budget_unit="bytes", head_budgets=head_budgets, **settings)


@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 60), st.integers(0, 60), st.integers(0, 9), st.integers())
def test_the_best_of_all_stay(heads: int, count: int, original: int, quantized: int, sure: int, seed: int) -> None:
    scores = torch.rand(heads, count, generator=torch.Generator().manual_seed(seed % 1000))
    won = compete(scores, original, quantized, sure)
    kept = won.original + won.quantized
    total = min(original + quantized, heads * count)
    assert int(kept.sum()) == total
    assert bool((won.original >= 0).all())
    assert bool((won.quantized >= 0).all())
    assert int(won.original.sum()) <= original
    assert quantized or not won.quantized.any()
    sure = min(sure, count, total // heads)
    assert int(kept.min()) >= sure
    if 0 < total < heads * count:
        # Whatever a head is not sure of is no worse than the best token that any head has lost.
        ranked = scores.sort(dim=1, descending=True).values
        lost = max((float(row[n]) for row, n in zip(ranked, kept.tolist(), strict=True) if n < count), default=0.0)
        worst = [float(row[n - 1]) for row, n in zip(ranked, kept.tolist(), strict=True) if n > sure]
        assert min(worst, default=1.0) >= lost


@pytest.mark.parametrize("method", ["origin", "quant", "mix"])
@pytest.mark.parametrize("head_budgets", ["layer", "all"])
def test_heads_hold_different_numbers_within_the_same_bytes(wide_llama: Any, head_budgets: str, method: str) -> None:
    caches = {}
    for which in ("equal", head_budgets):
        caches[which] = compressed(wide_llama, prompt(200, seed=5), config(which, method), 1)[1]
    bytes_of = {which: cache.nbytes() for which, cache in caches.items()}
    budget = 4 * int(0.12 * 200) * 2 * 64 * 4
    # What is left over holds no further token in any head: of Original ones a token is 4 % of a head's bytes.
    least = budget - 4 * (2 * 64 * 4 + 6) if method == "origin" else 0.99 * budget
    assert all(least < held <= budget for held in bytes_of.values())
    totals = [sum(layer.counts()) for layer in caches[head_budgets].own_layers]
    assert any(len(set(total.tolist())) > 1 for total in totals)
    sums = {int(total.sum()) for total in totals}
    assert (len(sums) > 1) == (head_budgets == "all")


def test_the_tokens_above_the_threshold_are_those_that_are_held(wide_llama: Any) -> None:
    """Nothing that a head has lost has a higher score than what any head keeps beyond its sure share."""
    settings = config(sure_share=0.0, original_share=0.0)
    prefill = PrefillCache(wide_llama, 128)
    with attach(wide_llama):
        forward(wide_llama, prefill, prompt(200, seed=5))
    prefill.score(settings)
    cache = TriStateCache.from_prefill(prefill, settings)
    kept, lost = [], []
    for source, layer in zip(prefill.layers, cache.own_layers, strict=True):
        importance = source.scores[settings.scoring].importance[0]
        for head, (high, low) in enumerate(held_sets(layer)):
            past = range(settings.n_sink, 200 - settings.recent)
            kept += [float(importance[head, place]) for place in past if place in high | low]
            lost += [float(importance[head, place]) for place in past if place not in high | low]
    assert min(kept) >= max(lost)


@pytest.mark.parametrize("head_budgets", ["layer", "all"])
def test_steps_and_blocks_go_on_as_by_the_readable_twin(wide_llama: Any, head_budgets: str) -> None:
    ids, more = prompt(120, seed=1), prompt(30, seed=2)
    logits, sizes = [], []
    for attention in ("fused", "reconstruct"):
        cache = TriStateCache(wide_llama, config(head_budgets, attention=attention))
        with attach(wide_llama):
            forward(wide_llama, cache, ids)
            held = cache.nbytes()
            found = [forward(wide_llama, cache, more[:, :10]), *feed(wide_llama, cache, more[:, 10:])]
        sizes.append((held, cache.nbytes()))
        logits.append(torch.cat(found, dim=1))
    assert (logits[0] - logits[1]).abs().max() < 1e-3
    assert all(after <= before for before, after in sizes)


@pytest.mark.parametrize("head_budgets", ["layer", "all"])
def test_a_prefill_and_a_padded_batch_are_as_one_alone(llama: Any, head_budgets: str) -> None:
    settings = config(head_budgets)
    prompts = [prompt(140, seed=1), prompt(100, seed=2)]
    alone = [compressed(llama, ids, settings, 6)[0].tokens[0, -6:].tolist() for ids in prompts]
    ids, mask = left_padded(prompts)
    together = compressed(llama, ids, settings, 6, mask)[0].tokens[:, -6:].tolist()
    assert together == alone
    for ids, expected in zip(prompts, alone, strict=True):
        prefill = PrefillCache(llama, 128)
        with attach(llama):
            first = forward(llama, prefill, ids)[:, -1:].argmax(dim=-1)
            cache, tokens = TriStateCache.from_prefill(prefill, settings), [first]
            for _ in range(5):
                tokens.append(forward(llama, cache, tokens[-1]).argmax(dim=-1))
        assert torch.cat(tokens, dim=1)[0].tolist() == expected


def test_a_prompt_that_fits_is_shared_evenly_and_grows_as_ever(llama: Any) -> None:
    one, other = (
        compressed(llama, prompt(40, seed=1), config(which, cache_ratio=None, cache_size=100), 120)
        for which in ("equal", "all")
    )
    assert torch.equal(one[0].tokens, other[0].tokens)
    assert one[1].token_counts() == other[1].token_counts()


def test_a_prompt_that_was_interrupted_leaves_nothing(llama: Any) -> None:
    settings, ids = config("all"), prompt(200, seed=2)
    expected, alone = compressed(llama, ids, settings, 6)
    cache = TriStateCache(llama, settings)
    with attach(llama):
        hook = llama.model.layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward(llama, cache, prompt(150, seed=1))
        hook.remove()
        assert torch.equal(decode(llama, ids, cache, 6).tokens, expected.tokens)
    assert [held_sets(layer) for layer in cache.own_layers] == [held_sets(layer) for layer in alone.own_layers]


def test_the_newest_tokens_are_original_whatever_the_window(llama: Any) -> None:
    ids = prompt(80, seed=1)
    settings = CacheConfig(cache_size=40, window_size=16, n_recent=3, original_share=0.0, pool_width=1)
    cache = TriStateCache(llama, settings)
    with attach(llama):
        forward(llama, cache, ids)
        for length, _ in enumerate(feed(llama, cache, prompt(10, seed=2)), start=81):
            for layer in cache.own_layers:
                for high, low in held_sets(layer):
                    assert high == {length - 3, length - 2, length - 1}
                    assert len(low) == 37


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n_recent": 0, "cache_size": 40}, "n_recent=0: give at least 1"),
        ({"n_recent": 40, "cache_size": 40}, "n_recent=40 is not smaller than cache_size=40: use n_recent <= 39"),
        ({"head_budgets": "all", "cache_size": 40}, "head_budgets='all' is for budget_unit='bytes'"),
        ({"head_budgets": "heads", "cache_size": 40}, "head_budgets='heads'"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheConfig(window_size=8, **settings)
    with pytest.raises(ConfigError, match=r"sure_share=1.5"):
        config(sure_share=1.5)
