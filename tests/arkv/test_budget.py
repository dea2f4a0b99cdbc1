"""OQ ratios, and the slots that a budget, in tokens or in bytes, leaves each layer."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from arkv import FORMATS, CacheConfig, ConfigError
from arkv.budget import (
    ByteBudget,
    Geometry,
    Slots,
    byte_slots,
    minimal_bytes,
    oq_ratios,
    token_limit,
    token_slots,
)

BF16 = Geometry(64, torch.bfloat16, slot_bytes=8)
LONG = 10**6


def test_the_best_layer_has_ratio_one_and_the_others_their_share() -> None:
    assert oq_ratios([2.0, 8.0, 4.0]) == [0.25, 1.0, 0.5]
    assert oq_ratios([3.0]) == [1.0]


def test_without_an_evictable_region_all_layers_are_equal() -> None:
    assert oq_ratios([0.0, 0.0, 0.0]) == [1.0, 1.0, 1.0]


def test_a_layer_of_score_zero_beside_others_has_ratio_zero() -> None:
    assert oq_ratios([0.0, 5.0]) == [0.0, 1.0]


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_original_budget_is_the_rounded_share_and_the_rest_is_quantized() -> None:
    config = CacheConfig(cache_size=132, window_size=32)
    slots = [token_slots(config, 132, ratio) for ratio in oq_ratios([10.0, 5.0, 2.56, 0.0])]
    assert slots == [Slots(100, 0), Slots(50, 50), Slots(26, 74), Slots(0, 100)]


@pytest.mark.parametrize("share, original", [(0.0, 0), (0.05, 5), (0.5, 50), (1.0, 100)])
def test_a_fixed_share_ignores_the_scores(share: float, original: int) -> None:
    config = CacheConfig(cache_size=132, window_size=32, original_share=share)
    for ratio in (0.0, 0.3, 1.0):
        assert token_slots(config, 132, ratio) == Slots(original, 100 - original)


def test_slots_never_exceed_the_past() -> None:
    for cache_size, window in [(2, 1), (33, 32), (64, 7), (513, 32)]:
        config = CacheConfig(cache_size=cache_size, window_size=window)
        for scores in ([1.0, 0.3333, 0.77], [1e-30, 1e30], [0.0]):
            for ratio in oq_ratios(scores):
                slots = token_slots(config, cache_size, ratio)
                assert slots.original + slots.quantized == cache_size - window
                assert slots.original >= 0
                assert slots.quantized >= 0


def test_c_tokens_or_a_share_of_the_prompt() -> None:
    """A share gives at least the window, the sinks and one."""
    assert token_limit(CacheConfig(cache_size=512), 100) == 512
    config = CacheConfig(cache_ratio=0.1, window_size=32, n_sink=4, original_share=1.0)
    assert token_limit(config, 1000) == 100
    assert token_limit(config, 50) == 37


# -- bytes -------------------------------------------------------------------------------------------------------------


def in_bytes(method: str = "mix", **settings: Any) -> CacheConfig:
    fixed = {"cache_size": 256, "budget_unit": "bytes", "quant_format": "int4"}
    return CacheConfig.for_method(method, **{**fixed, **settings})


def cost(config: CacheConfig, slots: Slots, geometry: Geometry = BF16) -> float:
    """Bytes of the window and of all slots of one KV head, worked out from what is stored."""
    original = 2 * geometry.head_dim * geometry.dtype.itemsize + geometry.slot_bytes
    quantized = FORMATS[config.quant_format].bytes_per_token(geometry.head_dim) + geometry.slot_bytes
    once = FORMATS[config.quant_format].bytes_per_head(geometry.head_dim) if config.quantizes else 0
    return (config.window_size + slots.original) * original + slots.quantized * quantized + once


@pytest.mark.parametrize(
    "scores", [[1.0] * 6, [5.0, 1.0, 3.0, 0.5, 8.0, 2.0], [0.0] * 6, [1e-9, 1e9, 1.0, 1.0, 1.0, 1.0]]
)
@pytest.mark.parametrize("layer_budgets", ["equal", "oq"])
def test_layers_share_exactly_what_there_is(layer_budgets: str, scores: list[float]) -> None:
    config = in_bytes(layer_budgets=layer_budgets)
    budget = ByteBudget(config, BF16, layers=6, tokens=4000)
    granted = [budget.next_layer(score) for score in scores]
    total = 256 * BF16.full_bytes * 6
    assert sum(granted) <= total
    assert sum(granted) >= total - 6
    assert min(granted) >= minimal_bytes(config, BF16)
    if layer_budgets == "equal" or len(set(scores)) == 1:
        assert max(granted) - min(granted) <= 1


def test_bytes_follow_the_scores() -> None:
    """A layer with twice the score of another that comes in the same place gets more."""
    config = in_bytes(cache_size=4096)
    low, high = (ByteBudget(config, BF16, layers=4, tokens=9000) for _ in range(2))
    for budget in (low, high):
        budget.next_layer(2.0)
    assert high.next_layer(4.0) > 1.15 * low.next_layer(2.0)


@pytest.mark.parametrize("scores", [[3.0, 0.0], [0.0, 3.0], [0.0, 0.0], [3.0, 0.0, 0.0]])
def test_a_layer_of_score_zero_gets_a_budget_too(scores: list[float]) -> None:
    """A layer that attends to nothing but its window has entropy 0, be it the last one."""
    config = in_bytes()
    budget = ByteBudget(config, BF16, layers=len(scores), tokens=4000)
    granted = [budget.next_layer(score) for score in scores]
    assert min(granted) >= minimal_bytes(config, BF16)
    assert sum(granted) <= 256 * BF16.full_bytes * len(scores)


def test_a_budget_below_the_least_says_what_works() -> None:
    config = in_bytes(cache_size=36)
    with pytest.raises(ConfigError, match="cache_size=36") as error:
        ByteBudget(config, BF16, layers=2, tokens=4000)
    (works,) = re.findall(r"cache_size >= (\d+)", str(error.value))
    ByteBudget(in_bytes(cache_size=int(works)), BF16, layers=2, tokens=4000)
    with pytest.raises(ConfigError):
        ByteBudget(in_bytes(cache_size=int(works) - 1), BF16, layers=2, tokens=4000)


@pytest.mark.parametrize("number_format", sorted(FORMATS))
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("tokens", [LONG, 400, 40, 5])
def test_slots_cost_no_more_than_the_budget(number_format: str, share: float, tokens: int) -> None:
    for size in (128, 200, 1000):
        config = in_bytes(cache_size=size, quant_format=number_format, original_share=share)
        budget = size * BF16.full_bytes
        slots = byte_slots(config, BF16, budget, tokens)
        assert cost(config, slots) <= budget
        assert slots.original >= config.n_sink, "room for the sinks"


@pytest.mark.parametrize("number_format", sorted(FORMATS))
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [LONG, 400, 40, 5])
def test_slots_use_up_the_budget(number_format: str, share: float, tokens: int) -> None:
    """Whatever the prompt's length: what is generated after a short prompt fills the cache all the same."""
    config = in_bytes(cache_size=1000, quant_format=number_format, original_share=share)
    budget = 1000 * BF16.full_bytes
    slots = byte_slots(config, BF16, budget, tokens)
    spare = BF16.original_bytes + (FORMATS[number_format].bytes_per_token(64) + 8 if share < 1.0 else 0)
    assert budget - cost(config, slots) <= spare


@pytest.mark.parametrize("number_format, more", [("fp8", 1.6), ("int8", 1.6), ("int4", 2.5), ("int2", 3.5)])
def test_quantization_buys_more_tokens(number_format: str, more: float) -> None:
    config = in_bytes(cache_size=1000, quant_format=number_format, original_share=0.05)
    slots = byte_slots(config, BF16, 1000 * BF16.full_bytes, LONG)
    assert slots.original + slots.quantized + config.window_size > more * 1000


def test_original_share_is_a_share_of_the_past_bytes() -> None:
    config = in_bytes(cache_size=2000, original_share=0.25)
    slots = byte_slots(config, BF16, 2000 * BF16.full_bytes, LONG)
    past = 2000 * BF16.full_bytes - config.window_size * BF16.original_bytes
    assert slots.original * BF16.original_bytes / past == pytest.approx(0.25, abs=0.02)
