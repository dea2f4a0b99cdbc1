"""OQ ratios, and the slots that a budget, in tokens or in bytes, leaves each layer."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from arkv import FORMATS, CacheConfig, ConfigError
from arkv.allocators import ByteAllocator, GivenCounts, LayerScores, TokenAllocator
from arkv.budget import ByteBudget, Geometry, Slots, byte_slots, minimal_bytes, token_limit, token_slots
from arkv.grant import NEVER, Grant
from arkv.scores import oq_ratios
from arkv.store import row_table_bytes

ROW = 64
"""Tokens seen, padding, and three numbers of each of two pools, of 8 bytes each."""
BF16 = Geometry(64, 64, torch.bfloat16, slot_bytes=8, row_bytes=ROW)
WIDE_KEYS = Geometry(96, 64, torch.bfloat16, slot_bytes=6, row_bytes=ROW)
"""As of latent attention: keys wider than values."""
LONG = 10**6


def known(oq: list[float], lengths: list[int], geometry: Geometry) -> LayerScores:
    """A layer of two KV heads, of whose tokens none is looked at."""
    return LayerScores(torch.zeros(len(lengths), 2, max(lengths)), oq, lengths, 2, geometry)


def test_a_row_of_the_row_table_is_paid_for() -> None:
    assert row_table_bytes(2) == ROW
    assert row_table_bytes(1) == 40
    for budget in (60_000, 60_001):
        with_table, without = (
            byte_slots(in_bytes("origin"), item, budget, LONG) for item in (BF16, replace(BF16, row_bytes=0))
        )
        assert with_table.original == (budget - ROW) // 264 - 32
        assert without.original == budget // 264 - 32


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
    fixed = {"cache_size": 256, "budget_unit": "bytes", "quant_format": "int4", "n_recent": None}
    return CacheConfig.for_method(method, **{**fixed, **settings})


def cost(config: CacheConfig, slots: Slots, geometry: Geometry = BF16) -> float:
    """Bytes of the window and of all slots of one KV head, worked out from what is stored."""
    number_format = FORMATS[config.quant_format]
    original = (geometry.key_dim + geometry.value_dim) * geometry.dtype.itemsize + geometry.slot_bytes
    quantized = number_format.bytes_per_token(geometry.key_dim, geometry.value_dim) + geometry.slot_bytes
    once = geometry.row_bytes + (number_format.bytes_per_head(geometry.key_dim) if config.quantizes else 0)
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
@pytest.mark.parametrize("geometry", [BF16, WIDE_KEYS], ids=["alike", "wide keys"])
def test_slots_cost_no_more_than_the_budget(number_format: str, share: float, tokens: int, geometry: Geometry) -> None:
    for size in (128, 200, 1000):
        config = in_bytes(cache_size=size, quant_format=number_format, original_share=share)
        budget = size * geometry.full_bytes
        slots = byte_slots(config, geometry, budget, tokens)
        assert cost(config, slots, geometry) <= budget
        assert slots.original >= config.n_sink, "room for the sinks"


@pytest.mark.parametrize("number_format", sorted(FORMATS))
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("tokens", [LONG, 400, 40, 5])
@pytest.mark.parametrize("geometry", [BF16, WIDE_KEYS], ids=["alike", "wide keys"])
def test_slots_use_up_the_budget(number_format: str, share: float, tokens: int, geometry: Geometry) -> None:
    """Whatever the prompt's length: what is generated after a short prompt fills the cache all the same."""
    config = in_bytes(cache_size=1000, quant_format=number_format, original_share=share)
    budget = 1000 * geometry.full_bytes
    slots = byte_slots(config, geometry, budget, tokens)
    per_token = FORMATS[number_format].bytes_per_token(geometry.key_dim, geometry.value_dim) + geometry.slot_bytes
    spare = geometry.original_bytes + (per_token if share < 1.0 else 0)
    assert budget - cost(config, slots, geometry) <= spare


@pytest.mark.parametrize("number_format, more", [("fp8", 1.6), ("int8", 1.6), ("int4", 2.5), ("int2", 3.5)])
def test_quantization_buys_more_tokens(number_format: str, more: float) -> None:
    config = in_bytes(cache_size=1000, quant_format=number_format, original_share=0.05)
    slots = byte_slots(config, BF16, 1000 * BF16.full_bytes, LONG)
    assert slots.original + slots.quantized + config.window_size > more * 1000


def test_original_share_is_a_share_of_the_past_bytes() -> None:
    config = in_bytes(cache_size=2000, original_share=0.25)
    slots = byte_slots(config, BF16, 2000 * BF16.full_bytes, LONG)
    past = 2000 * BF16.full_bytes - config.window_size * BF16.original_bytes - ROW
    assert slots.original * BF16.original_bytes / past == pytest.approx(0.25, abs=0.02)


# -- what rows may hold ------------------------------------------------------------------------------------------------


def per_head(*numbers: int) -> Any:
    return torch.tensor(numbers)[:, None].repeat(1, 2)


def test_a_layer_holds_c_tokens_all_original_until_it_has_seen_more() -> None:
    config = CacheConfig(cache_size=132, window_size=32, original_share=0.25)
    grant = TokenAllocator(config).layer(known([0.0, 0.0], [10, 500], BF16))
    assert grant.limit == [[132, 132]] * 2
    assert grant.follow([10, 500])
    original, quantized = grant.now()
    assert original == [[100, 100], [25, 25]]
    assert quantized == [[0, 0], [75, 75]]
    assert grant.holds() == [132, NEVER]
    assert not grant.follow([132, 600])
    assert grant.follow([133, 601])
    assert grant.now()[0] == [[25, 25]] * 2
    assert grant.holds() == [NEVER] * 2


def test_oq_ratios_settle_what_stays_original_once_all_layers_are_known() -> None:
    config = CacheConfig(cache_size=132, window_size=32)
    allocator = TokenAllocator(config)
    scores = [[2.0, 3.0], [8.0, 3.0], [4.0, 0.0]]
    grants = [allocator.layer(known(layer, [500, 600], BF16)) for layer in scores]
    assert all(grant.original == [[100] * 2] * 2 and grant.quantized == [[0] * 2] * 2 for grant in grants)
    assert allocator.settle(scores, grants)
    assert [[row[0] for row in grant.original] for grant in grants] == [[25, 100], [100, 100], [50, 0]]
    for grant in grants:
        for original, quantized in zip(grant.original, grant.quantized, strict=True):
            assert [sum(pair) for pair in zip(original, quantized, strict=True)] == [100, 100]
    # A share of its own asks nobody.
    fixed = TokenAllocator(CacheConfig(cache_size=132, window_size=32, original_share=0.5))
    grant = fixed.layer(known([1.0], [500], BF16))
    assert not fixed.settle([[1.0]], [grant])
    assert grant.original == [[50, 50]]


@pytest.mark.parametrize("method", ["origin", "quant", "mix"])
@pytest.mark.parametrize("number_format", ["int8", "k4v3"])
@pytest.mark.parametrize("geometry", [BF16, WIDE_KEYS], ids=["alike", "wide keys"])
def test_in_bytes_the_split_follows_the_tokens_seen(method: str, number_format: str, geometry: Geometry) -> None:
    """A grant for a prompt of 40 tokens: at every number of tokens seen it costs no more than the budget, it holds all
    tokens or as many as a grant for that number would, and it never holds fewer than before."""
    config = in_bytes(method, quant_format=number_format)
    grant = ByteAllocator(config, 1).layer(known([1.0], [40], geometry))
    budget = 256 * geometry.full_bytes
    assert list(grant.nbytes) == [[budget] * 2]
    until, before, changes = 0, 0, 0
    for seen in range(40, 1500):
        changed = grant.follow([seen])
        assert changed <= (seen > until or seen == 40), "slots change only where it was said that they may"
        changes += changed
        (original, *_), (quantized, *_) = (part[0] for part in grant.now())
        slots = Slots(original, quantized)
        assert cost(config, slots, geometry) <= budget
        held = config.window_size + sum(slots)
        if seen <= grant.limit[0][0]:
            assert quantized == 0
        elif held < seen:
            best = byte_slots(config, geometry, budget, 10**9)
            assert held >= config.window_size + sum(best) - 1
        assert held >= min(before, seen)
        before = held
        (until,) = grant.holds()
        assert until >= seen
    assert until == NEVER
    assert changes <= 12, "and they change seldom"
    if method == "mix":
        assert changes > 1


def test_samples_of_a_grant_go_their_own_way() -> None:
    config = in_bytes("mix")
    grant = ByteAllocator(config, 1).layer(known([1.0, 1.0], [40, 2000], BF16))
    grant.follow([40, 2000])
    picked, whole = grant.select([1, 0, 1]), copy.deepcopy([*grant.now(), grant.limit])
    assert [row[0] for row in picked.outgrown] == [True, False, True]
    assert picked.now()[1][1] == [0, 0]
    picked.follow([2000, 900, 2000])
    assert picked.now()[1][1][0] > 0
    for part, old in zip((*grant.now(), grant.limit), whole, strict=True):
        assert part == old
    joined = Grant.join([grant, picked])
    assert [len(row) for row in joined.limit] == [2] * 5
    for part, one, other in zip(joined.now(), grant.now(), picked.now(), strict=True):
        assert part == [*one, *other]
    assert joined.holds() == [*grant.holds(), *picked.holds()]


def test_given_counts_are_what_a_layer_gets() -> None:
    config = CacheConfig(cache_size=64, window_size=8, n_sink=3, original_share=0.5)
    original = [torch.tensor([[3, 10]]), torch.tensor([[4, 3]])]
    quantized = [torch.tensor([[0, 70]]), torch.tensor([[9, 0]])]
    allocator = GivenCounts(config, original, quantized)
    for index in range(2):
        grant = allocator.layer(known([0.0], [500], BF16))
        assert grant.now() == (original[index].tolist(), quantized[index].tolist())
        assert grant.limit == (8 + original[index] + quantized[index]).tolist()
        assert grant.holds() == [NEVER]
        assert not grant.follow([10**6])
    with pytest.raises(ConfigError, match="given to a cache already"):
        allocator.layer(known([0.0], [500], BF16))


def test_given_counts_without_room_for_the_sinks_are_refused() -> None:
    config = CacheConfig(cache_size=64, window_size=8, n_sink=3, original_share=0.5)
    with pytest.raises(ConfigError, match=r"2 Original slots.*n_sink=3"):
        GivenCounts(config, [per_head(5), per_head(2)], [per_head(0), per_head(0)])
    config = CacheConfig(cache_size=64, window_size=8, original_share=1.0)
    GivenCounts(config, [per_head(5)], [per_head(0)])
    with pytest.raises(ConfigError, match=r"original_share=1\.0"):
        GivenCounts(config, [per_head(5)], [per_head(1)])
