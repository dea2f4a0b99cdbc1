"""The state rule: as a sort of all tokens, as one victim a step, and with slots that differ from head to head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arkv import FORMATS, CacheConfig, PrefillCache, TriStateCache, attach, kernels
from arkv.allocators import GivenCounts
from arkv.formats.base import CENTER_DTYPE
from arkv.kernels import twin
from arkv.pools import Part, Plane, Pool
from arkv.states import Tokens, assign
from arkv.store import COUNT, SEEN, Store, column
from tests.arkv.conftest import feed, forward, held_sets, left_padded, prompt, table_bytes

many = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


# -- one step ----------------------------------------------------------------------------------------------------------


Held = tuple[dict[int, float], dict[int, float]]
"""Positions and scores of Original tokens, and of Quantized ones."""


@dataclass
class Row:
    """One row before a step: positions are counted from the first token that is no padding."""

    first: int
    seen: int
    slots: tuple[int, int]
    """Original ones beside the window, and Quantized ones."""
    original: list[int]
    """Positions in the order of their slots: sinks, the window's ring, the past."""
    quantized: list[int]
    scores: dict[int, float]


def random_row(random: Random, n_sink: int, window: int, ties: bool) -> Row:
    """A row that has seen so many tokens that sinks and window are full, or not yet."""
    slots = (n_sink + random.randint(0, 6), random.randint(0, 6))
    relative = random.randint(1, n_sink + window + 20)
    sinks = list(range(min(n_sink, relative)))
    newest = list(range(max(n_sink, relative - window), relative))
    ring: list[int] = [0] * len(newest)
    for position in newest:
        ring[(position - n_sink) % window] = position
    between = list(range(n_sink, max(relative - window, n_sink)))
    random.shuffle(between)

    def some(most: int) -> int:
        return random.randint(0, most) if random.random() < 0.2 else most

    high = between[: some(slots[0] - n_sink)]
    rest = between[len(high) :]
    low = rest[: some(slots[1])]
    held = [*sinks, *ring, *high, *low]
    scores = {place: random.choice((0.0, 0.25, 0.5, 1.0)) if ties else random.random() for place in held}
    return Row(random.randint(0, 3), relative, slots, [*sinks, *ring, *high], low, scores)


@st.composite
def layers(draw: Any) -> tuple[int, int, bool, list[Row]]:
    """Sinks, window, whether tokens are ranked by age, and rows."""
    n_sink, window, recency = draw(st.integers(0, 3)), draw(st.integers(1, 5)), draw(st.booleans())
    random, ties = Random(draw(st.integers(0, 2**32))), draw(st.booleans())
    found = [random_row(random, n_sink, window, ties) for _ in range(draw(st.integers(1, 20)))]
    for item in found:
        if recency:
            item.scores = {position: float(position + item.first) for position in item.scores}
    return n_sink, window, recency, found


def key_of(row: int, position: int) -> float:
    return 100.0 * row + position


def planes(rows: Sequence[int], positions: Sequence[int], count: int, name: str | None) -> list[Plane]:
    """Keys and values of so many channels that all are the same, by which a token is known."""
    numbers = torch.tensor([key_of(row, place) for row, place in zip(rows, positions, strict=True)])
    x = numbers.unsqueeze(1).repeat(1, 8)
    if name is None:
        return [Plane(x), Plane(-x)]
    index = torch.tensor(rows, dtype=torch.long)
    made = []
    for layout, these in ((FORMATS[name].key, x), (FORMATS[name].value, -x)):
        center = torch.zeros(count, 8, dtype=CENTER_DTYPE) if layout.centered else None
        codes = layout.encode(these, None if center is None else center[index])
        made.append(Plane(*codes, center, layout))
    return made


def store_of(found: list[Row], window: int, name: str) -> Store:
    pools, counts = [], []
    for number, quant_format in enumerate((None, name)):
        held = [item.quantized if number else item.original for item in found]
        owners = [row for row, part in enumerate(held) for _ in part]
        places = [place for part in held for place in part]
        score = torch.tensor([found[row].scores[place] for row, place in zip(owners, places, strict=True)])
        shifted = torch.tensor([found[row].first + place for row, place in zip(owners, places, strict=True)])
        pools.append(Pool(score.float(), shifted.int(), *planes(owners, places, len(found), quant_format)))
        counts.append(torch.tensor([len(part) for part in held]))
    capacities = [
        np.array([item.slots[0] + window for item in found]),
        np.array([item.slots[1] for item in found]),
    ]
    first = np.array([item.first for item in found])
    return Store([Part(pools, counts)], np.array([item.seen + item.first for item in found]), first, capacities)


def held_in(store: Store, found: list[Row]) -> list[Held]:
    """Positions and scores that every row holds, Original ones first; each with its own key and value."""
    result = []
    for row, item in enumerate(found):
        mine = []
        for number, pool in enumerate(store.pools):
            start, count = (int(store.rows[row, column(number, which)]) for which in (0, COUNT))
            slots = torch.arange(start, start + count)
            places = (pool.position[slots] - item.first).tolist()
            assert len(set(places)) == count
            numbers = pool.key.read(slots, torch.full_like(slots, row))
            expected = torch.tensor([key_of(row, place) for place in places])
            # The new token's own come later.
            old = torch.tensor(places, dtype=torch.long) < item.seen
            error = (numbers.mean(dim=1) - expected)[old].abs()
            assert (error <= 0.02 * expected[old].abs()).all(), "a slot has another token's key"
            values = pool.value.read(slots, torch.full_like(slots, row)).mean(dim=1)
            assert ((values + expected)[old].abs() <= 0.02 * expected[old].abs()).all(), "or value"
            mine.append(dict(zip(places, pool.score[slots].tolist(), strict=True)))
        result.append((mine[0], mine[1]))
    return result


def by_rule(found: list[Row], n_sink: int, window: int, recency: bool) -> list[Held]:
    """What :func:`arkv.states.assign` makes of the same rows and one new token in each."""

    def padded(held: list[list[int]]) -> Tokens:
        width = max(len(part) for part in held)
        score, position = torch.zeros(len(held), width), torch.zeros(len(held), width, dtype=torch.long)
        taken = torch.zeros(len(held), width, dtype=torch.bool)
        for row, part in enumerate(held):
            known = {**found[row].scores, found[row].seen: new[row]}
            score[row, : len(part)] = torch.tensor([known[place] for place in part])
            position[row, : len(part)] = torch.tensor(part, dtype=torch.long) + found[row].first
            taken[row, : len(part)] = True
        return Tokens(score, position, taken)

    new = [float(item.seen + item.first) if recency else 0.0 for item in found]
    candidates, quantized = [[*item.original, item.seen] for item in found], [item.quantized for item in found]
    tokens, stored = padded(candidates), padded(quantized)
    seen = torch.tensor([item.seen + item.first + 1 for item in found])
    first = torch.tensor([item.first for item in found])
    slots = [torch.tensor([item.slots[pool] for item in found]) for pool in range(2)]
    config = CacheConfig(cache_size=64, window_size=window, n_sink=n_sink, original_share=0.5)
    held = stored if any(quantized) else None
    choice = assign(tokens, held, seen, first, slots[0], slots[1], config)
    result = []
    for row, item in enumerate(found):
        known = {**item.scores, item.seen: new[row]}
        high: dict[int, int] = {}
        low: dict[int, int] = {}
        for index, place in enumerate(candidates[row]):
            original, demoted = int(choice.original[row, index]), int(choice.demoted[row, index])
            assert original < 0 or demoted < 0, "a token has one state"
            if original >= 0:
                high[place] = original
            if demoted >= 0:
                low[place] = demoted
        for index, place in enumerate(quantized[row]):
            if int(choice.quantized[row, index]) >= 0:
                low[place] = int(choice.quantized[row, index])
        # Places are all different, without a gap; sinks and window where steps look for them.
        for places in (high, low):
            assert sorted(places.values()) == list(range(len(places)))
        for place, where in high.items():
            if place < n_sink:
                assert where == place
            elif place > item.seen - window:
                assert where == n_sink + (place - n_sink) % window
            else:
                assert where >= n_sink + window
        result.append(({place: known[place] for place in high}, {place: known[place] for place in low}))
    return result


@given(case=layers(), fused=st.booleans(), name=st.sampled_from(["int8", "k4v3"]))
@many
def test_a_step_makes_room_as_the_rule_says(case: tuple[int, int, bool, list[Row]], fused: bool, name: str) -> None:
    n_sink, window, recency, found = case
    expected = by_rule(found, n_sink, window, recency)
    store = store_of(found, window, name)
    if fused:
        kernels.make_room(store.rows, store.tensors(), [name], n_sink, window, recency)
    else:
        twin.make_room(store.rows, store.pools, n_sink, window, recency)
    assert store.rows[:, SEEN].tolist() == [item.seen + item.first + 1 for item in found]
    for row, (got, right) in enumerate(zip(held_in(store, found), expected, strict=True)):
        for mine, theirs in zip(got, right, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-7), f"row {row}: {found[row]}"


@given(case=layers())
@many
def test_the_rule_is_a_sort(case: tuple[int, int, bool, list[Row]]) -> None:
    """Of all past tokens the best stay, of equal ones the older; of those still Original the best stay so."""
    n_sink, window, recency, found = case
    for item, (high, low) in zip(found, by_rule(found, n_sink, window, recency), strict=True):
        fixed = {place for place in [*item.original, item.seen] if place < n_sink or place > item.seen - window}
        past = [place for place in [*item.original, *item.quantized] if place not in fixed]
        past.sort(key=lambda place, scores=item.scores: (-scores[place], place))
        places = item.slots[0] - n_sink
        kept = past[: places + item.slots[1]]
        still = [place for place in kept if place in item.original]
        assert set(high) == fixed | set(still[:places])
        assert set(low) == set(kept) - set(still[:places])


# -- given counts ------------------------------------------------------------------------------------------------------

W, SINKS, HEADS, LAYERS = 8, 2, 2, 2


def unequal(batch: int, past: int) -> tuple[list[Any], list[Any]]:
    """Original slots beside the window and Quantized ones, [B, H] for every layer: no two heads have the same."""
    original = [np.array([[SINKS, 17]] * batch), np.array([[SINKS + 1, past]] * batch)]
    quantized = [np.array([[25, 0]] * batch), np.array([[0, 3]] * batch)]
    for layer in range(LAYERS):
        for sample in range(batch):
            original[layer][sample] += sample
            quantized[layer][sample] += 2 * sample * (quantized[layer][sample] > 0)
    return original, quantized


@pytest.mark.parametrize("method, settings", [("mix", {}), ("quant", {}), ("mix", {"ranking": "recency"})], ids=str)
@pytest.mark.parametrize("quant_format", ["fp8", "k4v3"])
@pytest.mark.parametrize("lengths", [(70,), (70, 55)], ids=str)
def test_heads_with_very_unequal_counts(
    wide_llama: Any, method: str, settings: dict[str, Any], quant_format: str, lengths: tuple[int, ...]
) -> None:
    fixed = {"cache_size": 40, "window_size": W, "n_sink": SINKS, "quant_format": quant_format, **settings}
    original, quantized = unequal(len(lengths), 30)
    ids, mask = left_padded([prompt(length, seed=length) for length in lengths])
    prefill = PrefillCache(wide_llama)
    caches = []
    with attach(wide_llama):
        forward(wide_llama, prefill, ids, attention_mask=mask)
    for way in ("fused", "reconstruct"):
        config = CacheConfig.for_method(method, **fixed, attention=way)
        allocator = GivenCounts(config, original, quantized)
        caches.append(TriStateCache.from_prefill(prefill, config, allocator=allocator))
    per_token = [64 * 2 * 4 + 6, FORMATS[quant_format].bytes_per_token(64, 64) + 6]

    def check() -> None:
        for cache in caches:
            total = 0.0
            for layer in range(LAYERS):
                for sample in range(len(lengths)):
                    counts = [part.tolist() for part in cache.layers[layer].counts(sample)]
                    wanted = [(original[layer][sample] + W).tolist(), quantized[layer][sample].tolist()]
                    assert counts == wanted
                    total += sum(count * size for part, size in zip(counts, per_token, strict=True) for count in part)
                    for head, (high, low) in enumerate(held_sets(cache.layers[layer], sample)):
                        assert [len(high), len(low)] == [wanted[0][head], wanted[1][head]]
                        padding = max(lengths) - lengths[sample]
                        assert set(range(padding, padding + SINKS)) <= high
            rows = LAYERS * len(lengths) * HEADS
            assert cache.nbytes() == total + rows * (table_bytes(2) + FORMATS[quant_format].bytes_per_head(64))
        for sample in range(len(lengths)):
            for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
                assert held_sets(one, sample) == held_sets(other, sample)

    check()
    with attach(wide_llama):
        for token in prompt(20, seed=9, batch=len(lengths)).split(1, dim=1):
            mask = torch.cat([mask, torch.ones(len(lengths), 1, dtype=torch.long)], dim=1)
            one, other = (forward(wide_llama, cache, token, attention_mask=mask) for cache in caches)
            assert one.isfinite().all()
            assert (one - other).abs().max() < 1e-4
            check()


def test_given_counts_of_a_prompt_that_is_shorter(wide_llama: Any) -> None:
    """Heads hold all tokens while there is room for them, and then as many as they were given."""
    config = CacheConfig(cache_size=40, window_size=W, n_sink=SINKS, original_share=0.5)
    original, quantized = unequal(1, 30)
    cache = TriStateCache(wide_llama, config, allocator=GivenCounts(config, original, quantized))
    seen = 5
    with attach(wide_llama):
        forward(wide_llama, cache, prompt(5, seed=1))
        for _ in feed(wide_llama, cache, prompt(60, seed=2)):
            seen += 1
            for layer in range(LAYERS):
                counts = [part.tolist() for part in cache.layers[layer].counts()]
                for head in range(HEADS):
                    high = min(seen, int(original[layer][0, head]) + W)
                    assert counts[0][head] == high
                    assert counts[1][head] == min(seen - high, int(quantized[layer][0, head]))


# -- stacked caches ----------------------------------------------------------------------------------------------------


STACKED: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "window": ("window", {"cache_size": 24}, (60, 9, 31)),
    "origin": ("origin", {"cache_size": 24}, (60, 9, 31)),
    "quant": ("quant", {"cache_size": 24}, (60, 40, 31)),
    "mix": ("mix", {"cache_size": 24, "tau1": 1.0, "tau2": 1.0}, (60, 40, 31)),
    "mix in bytes": ("mix", {"cache_size": 44, "budget_unit": "bytes"}, (90, 200, 120)),
    "quant in bytes": ("quant", {"cache_size": 44, "budget_unit": "bytes", "quant_format": "int2"}, (90, 200, 120)),
    "origin in bytes": ("origin", {"cache_size": 44, "budget_unit": "bytes"}, (90, 5, 43)),
}


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("way", ["fused", "reconstruct"])
def test_stacked_caches_decode_what_each_decodes_alone(wide_llama: Any, name: str, way: Any) -> None:
    method, fixed, lengths = STACKED[name]
    config = CacheConfig.for_method(method, window_size=W, attention=way, **fixed)
    caches, tokens = [], []
    with attach(wide_llama):
        for length in lengths:
            caches.append(TriStateCache(wide_llama, config))
            tokens.append(forward(wide_llama, caches[-1], prompt(length, seed=length))[0, -1].argmax())
        whole = TriStateCache.stack(caches)
        seen = torch.tensor(lengths)
        together = alone = torch.stack(tokens)
        for step in range(40):
            position = (seen + step).unsqueeze(1)
            logits = forward(wide_llama, whole, together.unsqueeze(1), position_ids=position)
            own = torch.cat(
                [
                    forward(wide_llama, cache, alone[row].view(1, 1), position_ids=position[row : row + 1])
                    for row, cache in enumerate(caches)
                ]
            )
            assert (logits - own).abs().max() < 1e-4
            together, alone = logits[:, 0].argmax(dim=-1), own[:, 0].argmax(dim=-1)
            assert torch.equal(together, alone)
            for row, cache in enumerate(caches):
                for one, other in zip(whole.layers, cache.layers, strict=True):
                    assert held_sets(one, row) == held_sets(other)
            # Nothing is padded.
            if min(lengths) > fixed["cache_size"]:
                assert whole.nbytes() == sum(cache.nbytes() for cache in caches)
    for row, cache in enumerate(caches):
        assert whole.token_counts(row) == cache.token_counts()
        assert whole.layers[0].seen[row] == lengths[row] + 40


def test_caches_stay_as_they_are_when_stacked(wide_llama: Any) -> None:
    config = CacheConfig(cache_size=24, window_size=W, original_share=0.3)
    with attach(wide_llama):
        caches = [TriStateCache(wide_llama, config) for _ in range(2)]
        for length, cache in zip((60, 40), caches, strict=True):
            forward(wide_llama, cache, prompt(length, seed=length))
        twins = [cache.fork() for cache in caches]
        whole = TriStateCache.stack(caches)
        for step in range(10):
            forward(wide_llama, whole, prompt(1, seed=step, batch=2), position_ids=torch.tensor([[60], [40]]) + step)
        for cache, twin_ in zip(caches, twins, strict=True):
            assert [held_sets(layer) for layer in cache.layers] == [held_sets(layer) for layer in twin_.layers]
            more = prompt(5, seed=3)
            for one, other in zip(feed(wide_llama, cache, more), feed(wide_llama, twin_, more), strict=True):
                assert torch.equal(one, other)


def test_caches_that_cannot_be_stacked_are_refused(wide_llama: Any) -> None:
    configs = [CacheConfig(cache_size=24, window_size=W, original_share=share) for share in (0.3, 0.4)]
    with attach(wide_llama):
        caches = [TriStateCache(wide_llama, config) for config in configs]
        with pytest.raises(ValueError, match="stacked"):
            TriStateCache.stack([caches[0], TriStateCache(wide_llama, configs[0])])
        for cache in caches:
            forward(wide_llama, cache, prompt(40, seed=1))
        with pytest.raises(ValueError, match="stacked"):
            TriStateCache.stack(caches)
        # One of them has no Quantized slots yet.
        short = TriStateCache(wide_llama, configs[0])
        forward(wide_llama, short, prompt(9, seed=1))
        with pytest.raises(ValueError, match="stacked"):
            TriStateCache.stack([caches[0], short])
