"""What the cache holds, step by step: budgets, states, positions, samples of a batch, blocks, beams."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from arkv import CacheConfig, TriStateCache, attach
from arkv.store import SEEN
from tests.arkv.conftest import (
    MODELS_AND_METHODS,
    PUBLISHED,
    Driver,
    compressed,
    decode,
    feed,
    forward,
    held_sets,
    left_padded,
    prompt,
    quantized_bytes,
    stock,
    stored_token,
)

W = 8
SMALL: dict[str, Any] = {"cache_size": 24, "window_size": W}


def config_of(method: str, **settings: Any) -> CacheConfig:
    """A small cache. ARKV's taus are lower than the published ones: so the layers of a tiny model differ widely."""
    taus = {"tau1": 1.0, "tau2": 1.0, "tau3": 1.0} if method == "mix" else {}
    return CacheConfig.for_method(method, **{**SMALL, **taus, **settings})


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Position ids of a left-padded batch, as ``generate`` makes them."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def last_window(seen: int) -> set[int]:
    return set(range(max(seen - W, 0), seen))


# -- a budget that is large enough -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, W - 1, W, W + 1, 30])
@pytest.mark.parametrize("model, method", MODELS_AND_METHODS, indirect=["model"])
def test_a_large_budget_changes_nothing(model: Any, method: str, length: int) -> None:
    new = 10
    ids = prompt(length, seed=length)
    expected = stock(model, ids, new)
    got, cache = compressed(model, ids, config_of(method, cache_size=max(length + new, W + 5)), new)
    assert torch.equal(got.tokens, expected.tokens)
    assert (got.logits - expected.logits).abs().max() < 1e-4
    # The last token is never fed back.
    assert cache.token_counts() == {"original": length + new - 1, "quantized": 0, "evicted": 0}


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_prompt_as_long_as_the_cache_is_kept_whole(llama: Any, method: str) -> None:
    size = SMALL["cache_size"]
    ids = prompt(size, seed=3)
    cache, full = TriStateCache(llama, config_of(method)), DynamicCache(config=llama.config)
    with attach(llama):
        logits = forward(llama, cache, ids)
    assert (logits - forward(llama, full, ids)).abs().max() < 1e-4
    assert cache.token_counts() == {"original": size, "quantized": 0, "evicted": 0}
    # One more token is one too many: a token leaves before the new one joins.
    with attach(llama):
        forward(llama, cache, prompt(1, seed=4))
    counts = cache.token_counts()
    assert counts["evicted"] == pytest.approx(1)
    assert counts["original"] + counts["quantized"] == pytest.approx(size)
    assert (counts["quantized"] > 0) == (method in ("quant", "mix"))


@pytest.mark.parametrize("method", PUBLISHED)
def test_one_token_more_than_the_cache_loses_one(llama: Any, method: str) -> None:
    size = SMALL["cache_size"]
    ids = prompt(size + 1, seed=3)
    cache = TriStateCache(llama, config_of(method))
    with attach(llama):
        logits = forward(llama, cache, ids)
    # The prompt itself is always read in full.
    assert (logits - forward(llama, DynamicCache(config=llama.config), ids)).abs().max() < 1e-4
    counts = cache.token_counts()
    assert counts["evicted"] == pytest.approx(1)
    assert counts["original"] + counts["quantized"] == pytest.approx(size)
    if method == "window":
        for layer in cache.layers:
            assert all(held == (set(range(25)) - {4}, set()) for held in held_sets(layer))


def test_where_nothing_is_evicted_the_mean_over_many_layers_is_exactly_0() -> None:
    """Heads that compete hold another number of Original tokens in each layer."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for _ in range(28):
        original = torch.randint(0, 48, (3,), generator=generator)
        layers.append(
            SimpleNamespace(
                is_empty=False, heads=3, seen=[47], padded=[0], counts=lambda _, own=original: [own, 47 - own]
            )
        )
    counts = TriStateCache.token_counts(SimpleNamespace(own_layers=layers))  # type: ignore[arg-type]
    assert counts["evicted"] == 0.0
    assert counts["original"] + counts["quantized"] == pytest.approx(47)


# -- budgets and states, at every step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method, length", [*((name, 60) for name in (*PUBLISHED, "mean", "sinks")), ("mean", 5)])
def test_states_over_a_hundred_steps(llama: Any, method: str, length: int) -> None:
    """The budget holds after every forward, the window is Original, and no token ever comes back."""
    special: dict[str, Any] = {
        "mean": {"decode_importance": "mean", "original_share": 0.5},
        "sinks": {"n_sink": 3, "original_share": 0.4},
    }
    config = config_of(method) if method in PUBLISHED else CacheConfig(**SMALL, **special[method])
    cache = TriStateCache(llama, config)
    before: list[list[tuple[set[int], set[int]]]] = []
    changes = {"quantized": 0, "evicted": 0}
    ids = prompt(length + 110, seed=7)
    with attach(llama):
        forward(llama, cache, ids[:, :length])
        steps = feed(llama, cache, ids[:, length:])
        for seen in range(length, length + 111):
            assert cache.get_seq_length() == seen
            now = [held_sets(layer) for layer in cache.layers]
            for number, (layer, heads) in enumerate(zip(cache.layers, now, strict=True)):
                for head, (high, low) in enumerate(heads):
                    assert len(high) + len(low) == min(seen, config.cache_size), "a budget is there to be used"
                    assert last_window(seen) <= high
                    assert max(high | low) == seen - 1
                    assert set(range(min(config.n_sink, seen))) <= high, "sinks stay Original"
                    if seen > config.cache_size:
                        assert len(high) <= layer.slots[0].original + W
                        assert len(low) <= layer.slots[0].quantized
                    if before:
                        old_high, old_low = before[number][head]
                        assert high <= old_high | {seen - 1}, "back from Quantized or Evicted"
                        assert low <= old_high | old_low, "back from Evicted"
                        changes["quantized"] += len(low & old_high)
                        changes["evicted"] += len((old_high | old_low) - (high | low))
            before = now
            next(steps, None)
    assert changes["evicted"] > 100
    assert (changes["quantized"] > 0) == (config.original_share != 1.0 and (length > W or method != "mix"))


@pytest.mark.parametrize("share", [0.0, 0.1, None])
def test_sinks_stay_original_whatever_the_share(share: float | None) -> None:
    """``n_sink`` promises that the first tokens are always kept Original: also where few or no slots are Original."""
    driver = Driver(CacheConfig(**SMALL, n_sink=4, original_share=share), layers=2)
    inputs = [driver.random(100, seed=1 + number, scale=0.2 + number) for number in range(2)]
    for layer in range(2):
        driver.feed(*(tensor[:, :, :40] for tensor in inputs[layer]), layer=layer)
    for place in range(40, 100):
        for layer in range(2):
            driver.feed(*(tensor[:, :, place : place + 1] for tensor in inputs[layer]), layer=layer)
            for high, low in held_sets(driver.layer(layer)):
                assert set(range(4)) <= high
                assert len(high) + len(low) <= SMALL["cache_size"]


def test_window_keeps_sinks_and_the_newest(llama: Any) -> None:
    config = config_of("window")
    cache = TriStateCache(llama, config)
    ids = prompt(90, seed=5)
    with attach(llama):
        forward(llama, cache, ids[:, :40])
        for seen, _ in enumerate(feed(llama, cache, ids[:, 40:]), start=41):
            expected = set(range(config.n_sink)) | set(range(seen - config.cache_size + config.n_sink, seen))
            for layer in cache.layers:
                assert held_sets(layer) == [(expected, set())] * 2


def test_layers_differ_under_oq_ratios(llama: Any) -> None:
    """The layer with the highest score keeps all its past Original; the budgets of the others are lower."""
    cache = TriStateCache(llama, config_of("mix", cache_size=40))
    with attach(llama):
        forward(llama, cache, prompt(80, seed=1))
    shares = []
    for layer in cache.layers:
        (slots,) = layer.slots
        assert slots.original + slots.quantized == 32
        for high, low in held_sets(layer):
            assert (len(high) - W, len(low)) == slots
        shares.append(slots.original / 32)
    assert max(shares) == 1.0
    assert len(set(shares)) > 1
    assert [layer.oq[0] / max(item.oq[0] for item in cache.layers) for layer in cache.layers] == pytest.approx(
        shares, abs=0.5 / 32 + 1e-6
    )


@pytest.mark.parametrize("model, method", MODELS_AND_METHODS, indirect=["model"])
def test_positions_go_on_counting_every_token(model: Any, method: str) -> None:
    """What the rotary embedding receives is what it receives with the full cache."""
    received: list[torch.Tensor] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        received.append((kwargs["position_ids"] if "position_ids" in kwargs else args[1]).clone())

    handle = model.model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    try:
        ids, mask = left_padded([prompt(40, seed=1), prompt(33, seed=2)])
        stock(model, ids, 20, mask)
        expected, received[:] = list(received), []
        compressed(model, ids, config_of(method), 20, mask)
    finally:
        handle.remove()
    assert len(received) == len(expected) == 20
    assert all(torch.equal(a, b) for a, b in zip(received, expected, strict=True))
    assert expected[-1].tolist() == [[58], [51]]


# -- what is stored stays ----------------------------------------------------------------------------------------------


def quantized_and_loud(when: str) -> tuple[Driver, list[torch.Tensor], int]:
    """A layer in which one token, which every query looks at, has just become Quantized.

    Returns the layer, further inputs for 50 steps, and the token's position.
    """
    driver = Driver(CacheConfig.for_method("quant", **SMALL))
    place = 11 if when == "prefill" else 41
    direction = torch.randn(1, 2, 1, driver.dim, generator=torch.Generator().manual_seed(0))
    query, key, value = driver.random(120, seed=3, scale=0.3)
    query = query + direction.repeat_interleave(2, dim=1)
    key[:, :, place] = direction[:, :, 0] * 1.5
    inputs = [query, key, value]
    start = 40
    driver.feed(*(tensor[:, :, :start] for tensor in inputs))
    while not all(place in low for _, low in held_sets(driver.layer())):
        assert start < 60, "never quantized"
        driver.feed(*(tensor[:, :, start : start + 1] for tensor in inputs))
        start += 1
    assert start == (40 if when == "prefill" else place + W + 1)
    return driver, [tensor[:, :, start:] for tensor in inputs], place


@pytest.mark.parametrize("when", ["prefill", "decoding"])
def test_a_quantized_token_is_still_attended_to_and_unchanged_fifty_steps_later(when: str) -> None:
    driver, inputs, place = quantized_and_loud(when)
    layer = driver.layer()
    stored = [quantized_bytes(layer, place, head) for head in range(2)]
    for step in range(50):
        driver.feed(*(tensor[:, :, step : step + 1] for tensor in inputs))
    assert all(place in low for _, low in held_sets(layer))
    assert [quantized_bytes(layer, place, head) for head in range(2)] == stored

    # The same step again: on the cache as it is, by hand on what the cache says that it holds, and without the token.
    query, key, value = (tensor[:, :, 50:51] for tensor in inputs)
    silenced = copy.deepcopy(driver)
    for head in range(2):
        # The scale of its value.
        stored_token(silenced.layer(), place, head)[3].zero_()
    output = driver.feed(query, key, value)
    tokens = layer.reconstruct()
    logits = query.view(1, 2, 2, driver.dim) @ tokens.key.mT * driver.scaling
    logits = logits.masked_fill((tokens.position < 0).unsqueeze(2), -torch.inf)
    by_hand = logits.softmax(-1) @ tokens.value
    dropped = logits.masked_fill((tokens.position == place).unsqueeze(2), -torch.inf).softmax(-1) @ tokens.value
    assert torch.allclose(output.view(1, 2, 2, -1), by_hand, atol=1e-5)
    assert (output.view(1, 2, 2, -1) - dropped).abs().amax(-1).min() > 0.05
    assert (output - silenced.feed(query, key, value)).abs().amax(-1).min() > 0.05


@pytest.mark.parametrize("number_format", ["fp8", "int8"])
def test_quantized_once_from_the_original_value(number_format: str) -> None:
    """What is held of a token is its original, bit for bit, or one round trip of the original: at every step."""
    driver = Driver(CacheConfig(**SMALL, original_share=0.5, quant_format=number_format))
    query, key, value = driver.random(110, seed=9)
    driver.feed(query[:, :, :50], key[:, :, :50], value[:, :, :50])
    first_seen: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    for place in range(50, 110):
        driver.feed(query[:, :, place : place + 1], key[:, :, place : place + 1], value[:, :, place : place + 1])
        tokens = driver.layer().reconstruct()
        for head, (high, low) in enumerate(held_sets(driver.layer())):
            where = {int(p): i for i, p in enumerate(tokens.position[0, head]) if p >= 0}
            assert set(where) == high | low
            for item in high:
                assert torch.equal(tokens.key[0, head, where[item]], key[0, head, item])
                assert torch.equal(tokens.value[0, head, where[item]], value[0, head, item])
            for item in low:
                pair = (tokens.key[0, head, where[item]], tokens.value[0, head, where[item]])
                for got, original in zip(pair, (key[0, head, item], value[0, head, item]), strict=True):
                    error = (got - original).abs()
                    step = original.abs().max() / 127 if number_format == "int8" else original.abs() / 8 + 1e-3
                    assert (error <= 0.51 * step).all()
                old = first_seen.setdefault((head, item), pair)
                assert torch.equal(old[0], pair[0])
                assert torch.equal(old[1], pair[1])
    assert len(first_seen) > 30


def relative_error(driver: Driver, key: torch.Tensor, value: torch.Tensor, sample: int = 0) -> tuple[float, float, int]:
    """Of the Quantized keys and values of the first layer against the originals [B, H, N, D]; and their number."""
    tokens = driver.layer().reconstruct()
    wrong = torch.zeros(2)
    whole = torch.zeros(2)
    count = 0
    for head, (_, low) in enumerate(held_sets(driver.layer(), sample)):
        slots = {int(place): slot for slot, place in enumerate(tokens.position[sample, head])}
        for place in low:
            for number, (got, original) in enumerate(((tokens.key, key), (tokens.value, value))):
                wrong[number] += (got[sample, head, slots[place]] - original[sample, head, place]).square().sum()
                whole[number] += original[sample, head, place].square().sum()
            count += 1
    error = (wrong / whole.clamp_min(1e-9)).sqrt()
    return float(error[0]), float(error[1]), count


TOLERATED = {"fp8": 0.05, "int8": 0.02, "int4": 0.2, "int2": 0.7}
"""Relative error of Quantized keys and values of normally distributed numbers."""


@pytest.mark.parametrize("number_format", ["fp8", "int4"])
@pytest.mark.parametrize(
    "settings, length",
    [
        ({"cache_size": 48, "original_share": 0.3}, 60),
        ({"cache_size": 48, "original_share": 0.3}, 20),
        ({"cache_size": 48, "original_share": 0.9}, 49),
        ({"cache_size": 48, "original_share": 0.3, "budget_unit": "bytes"}, 400),
        ({"cache_size": 48, "original_share": 0.3, "budget_unit": "bytes"}, 49),
        ({"cache_size": 48, "original_share": 0.3, "budget_unit": "bytes"}, 60),
        ({"cache_size": 48, "original_share": 0.05, "budget_unit": "bytes"}, 44),
        ({"cache_size": 48, "original_share": 0.0, "budget_unit": "bytes"}, 100),
    ],
    ids=str,
)
def test_quantized_tokens_stay_close_to_their_originals(
    number_format: str, settings: dict[str, Any], length: int
) -> None:
    """All of them, those that came in one at a time long after the prompt too."""
    driver = Driver(CacheConfig(window_size=W, quant_format=number_format, **settings), heads=2, groups=2, dim=64)
    query, key, value = driver.random(length + 80, seed=5, scale=0.2)
    driver.feed(query[:, :, :length], key[:, :, :length], value[:, :, :length])
    for place in range(length, length + 80):
        driver.feed(*(tensor[:, :, place : place + 1] for tensor in (query, key, value)))
    key_error, value_error, count = relative_error(driver, key, value)
    assert count > 0
    assert key_error < TOLERATED[number_format]
    assert value_error < TOLERATED[number_format]


@pytest.mark.parametrize("number_format", sorted(TOLERATED))
def test_oq_ratios_keep_quantized_tokens_close(number_format: str) -> None:
    """The ratios are known when every layer has been computed: then the others are quantized."""
    config = CacheConfig(cache_size=160, window_size=W, quant_format=number_format, tau1=1.0, tau2=1.0, tau3=1.0)
    driver = Driver(config, layers=4, dim=64)
    first = driver.random(200, seed=1, scale=0.05)
    driver.feed(*first)
    for layer in range(1, 4):
        driver.feed(*driver.random(200, seed=1 + layer, scale=0.05 + 0.05 * layer), layer=layer)
    key_error, value_error, count = relative_error(driver, first[1], first[2])
    assert count > 100
    assert key_error < TOLERATED[number_format]
    assert value_error < TOLERATED[number_format]
    for layer in range(4):
        for high, low in held_sets(driver.layer(layer)):
            assert (len(high) - W, len(low)) == driver.layer(layer).slots[0]


def test_reconstruct_is_in_sequence_order(llama: Any) -> None:
    cache = TriStateCache(llama, config_of("mix"))
    ids = prompt(100, seed=2)
    with attach(llama):
        forward(llama, cache, ids[:, :50])
        for _ in feed(llama, cache, ids[:, 50:]):
            pass
    for layer in cache.layers:
        tokens = layer.reconstruct()
        for head in range(2):
            places = [place for place in tokens.position[0, head].tolist() if place >= 0]
            assert places == sorted(set(places))
            assert places[-W:] == list(range(92, 100))


# -- samples of a batch ------------------------------------------------------------------------------------------------


def assert_as_alone(
    model: Any, prompts: list[torch.Tensor], config: CacheConfig, new: int, scores: bool = True
) -> None:
    """Every sample gets the tokens, logits, scores and states that it gets alone."""
    ids, mask = left_padded(prompts)
    together, cache = compressed(model, ids, config, new, mask)
    for sample, item in enumerate(prompts):
        alone, own = compressed(model, item, config, new)
        assert torch.equal(together.tokens[sample, -new:], alone.tokens[0, -new:]), f"sample {sample}"
        assert (together.logits[sample] - alone.logits[0]).abs().max() < 1e-3, f"sample {sample}"
        shift = ids.shape[1] - item.shape[1]
        for layer, own_layer in zip(cache.layers, own.layers, strict=True):
            assert held_sets(layer, sample, shift) == held_sets(own_layer), f"sample {sample}"
            if scores:
                assert layer.oq[sample] == pytest.approx(own_layer.oq[0], rel=1e-3)
                assert layer.slots[sample] == own_layer.slots[0]
        assert cache.token_counts(sample) == own.token_counts()


@pytest.mark.parametrize("model, method", MODELS_AND_METHODS, indirect=["model"])
def test_two_samples_of_the_same_length_are_independent(model: Any, method: str) -> None:
    assert_as_alone(model, [prompt(50, seed=1), prompt(50, seed=2)], config_of(method), 16)


@pytest.mark.parametrize(
    "method, importance", [*((name, "latest") for name in PUBLISHED), ("mix", "mean"), ("mix", "largest")]
)
def test_left_padded_samples_are_independent(llama: Any, method: str, importance: str) -> None:
    """Longer than the cache, shorter than the cache, as long as the window, and shorter: all outgrow the cache."""
    prompts = [prompt(length, seed=10 + length) for length in (50, 18, W, W - 3)]
    assert_as_alone(llama, prompts, config_of(method, decode_importance=importance), 21)


@pytest.mark.parametrize(
    "method, number_format",
    [("window", "int4"), ("origin", "int4"), ("quant", "fp8"), ("quant", "int4"), ("mix", "int8"), ("mix", "int4")],
)
def test_left_padded_samples_are_independent_in_byte_units(wide_llama: Any, method: str, number_format: str) -> None:
    size: dict[str, Any] = {"cache_size": None, "cache_ratio": 0.6} if method == "mix" else {"cache_size": 40}
    config = CacheConfig.for_method(method, window_size=W, budget_unit="bytes", quant_format=number_format, **size)
    prompts = [prompt(length, seed=10 + length) for length in (110, 50, 32)]
    assert_as_alone(wide_llama, prompts, config, 18)


def test_a_sample_shorter_than_the_window_keeps_its_scores_beside_a_longer_one(llama: Any) -> None:
    """Queries of padding are no queries: they must not thin out what the sample's own queries say."""
    config = CacheConfig(cache_size=20, window_size=16, original_share=1.0, decode_importance="mean", gamma=0.0)
    assert_as_alone(llama, [prompt(30, seed=1), prompt(6, seed=2)], config, 24)


def test_left_padded_samples_with_room_equal_the_stock_cache(model: Any) -> None:
    ids, mask = left_padded([prompt(length, seed=length) for length in (30, 12, 3)])
    expected = stock(model, ids, 12, mask)
    for method in PUBLISHED:
        got, _ = compressed(model, ids, config_of(method, cache_size=60), 12, mask)
        assert torch.equal(got.tokens, expected.tokens)
        assert (got.logits - expected.logits).abs().max() < 1e-4


def test_budgets_hold_for_every_sample_of_a_padded_batch(llama: Any) -> None:
    prompts = [prompt(length, seed=20 + length) for length in (60, 26, 10, 4)]
    ids, mask = left_padded(prompts)
    cache = TriStateCache(llama, config_of("mix"))
    steps = prompt(60, seed=9, batch=4)
    before: list[Any] = []
    with attach(llama):
        forward(llama, cache, ids, attention_mask=mask, position_ids=positions_of(mask))
        for step in range(60):
            mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=1)
            new = {"attention_mask": mask, "position_ids": positions_of(mask)[:, -1:]}
            forward(llama, cache, steps[:, step : step + 1], **new)
            now = []
            for sample, item in enumerate(prompts):
                shift = 60 - item.shape[1]
                seen = item.shape[1] + step + 1
                for layer in cache.layers:
                    for high, low in held_sets(layer, sample, shift):
                        assert len(high) + len(low) == min(seen, SMALL["cache_size"])
                        assert last_window(seen) <= high
                        assert min(high | low) >= 0, "padding is never held"
                        now.append((high, low))
            for (high, low), (old_high, old_low) in zip(now, before, strict=False):
                assert not (high & old_low)
                assert (high | low) - (old_high | old_low) <= {max(high)}
            before = now


def test_a_loud_sample_does_not_touch_another() -> None:
    """Bit for bit in the states and codes, whatever the other sample's numbers are."""
    config = CacheConfig(**SMALL, original_share=0.3)
    twins = [Driver(config), Driver(config)]
    inputs = [list(driver.random(90, seed=4, batch=2)) for driver in twins]
    for tensor in inputs[1]:
        tensor[1] *= 50
    for driver, (query, key, value) in zip(twins, inputs, strict=True):
        driver.feed(query[:, :, :50], key[:, :, :50], value[:, :, :50])
        for place in range(50, 90):
            driver.feed(query[:, :, place : place + 1], key[:, :, place : place + 1], value[:, :, place : place + 1])
    quiet, loud = (driver.layer() for driver in twins)
    assert held_sets(quiet, 0) == held_sets(loud, 0)
    for head, (_, low) in enumerate(held_sets(quiet, 0)):
        for place in low:
            assert quantized_bytes(quiet, place, head) == quantized_bytes(loud, place, head)
    assert held_sets(quiet, 1) != held_sets(loud, 1)


# -- several tokens at once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("length, block", [(50, 5), (50, W), (50, W + 3), (50, 40), (3, 2), (3, 12), (20, 5), (1, 40)])
def test_a_block_attends_to_what_is_held_and_causally_to_itself(method: str, length: int, block: int) -> None:
    driver = Driver(config_of(method))
    inputs = driver.random(length + 10 + block, seed=length + block)
    driver.feed(*(tensor[:, :, :length] for tensor in inputs))
    for place in range(length, length + 10):
        driver.feed(*(tensor[:, :, place : place + 1] for tensor in inputs))
    layer = driver.layer()
    stored = layer.reconstruct()
    before = held_sets(layer)
    query, key, value = (tensor[:, :, length + 10 :] for tensor in inputs)
    output = driver.feed(query, key, value)

    for head in range(2):
        real = stored.position[0, head] >= 0
        keys = torch.cat([stored.key[0, head][real], key[0, head]])
        values = torch.cat([stored.value[0, head][real], value[0, head]])
        for group in range(2):
            for place in range(block):
                visible = int(real.sum()) + place + 1
                weights = (keys[:visible] @ query[0, head * 2 + group, place] * driver.scaling).softmax(0)
                assert torch.allclose(output[0, place, head * 2 + group], weights @ values[:visible], atol=1e-5)

    seen = length + 10 + block
    for (high, low), (old_high, old_low) in zip(held_sets(layer), before, strict=True):
        assert len(high) + len(low) == min(seen, SMALL["cache_size"])
        assert last_window(seen) <= high
        assert high <= old_high | set(range(length + 10, seen))
        assert low <= old_high | old_low | set(range(length + 10, seen))
        if method in ("window", "origin"):
            assert not low
    # And on it goes, one by one.
    further = driver.random(30, seed=77)
    for step in range(30):
        driver.feed(*(tensor[:, :, step : step + 1] for tensor in further))
        for high, low in held_sets(layer):
            assert len(high) + len(low) == min(seen + step + 1, SMALL["cache_size"])
            assert last_window(seen + step + 1) <= high


def test_window_keeps_the_newest_of_a_block_and_its_sinks(llama: Any) -> None:
    config = config_of("window")
    for sizes in ([50, 13, 1, 30, 1, 1], [2, 1, 30, 5], [2, 3, 1, 1, 40], [30, 2, 2, 2]):
        cache = TriStateCache(llama, config)
        seen = 0
        with attach(llama):
            for size in sizes:
                forward(llama, cache, prompt(size, seed=seen))
                seen += size
                oldest = max(seen - config.cache_size + config.n_sink, 0)
                expected = set(range(min(config.n_sink, seen))) | set(range(oldest, seen))
                for layer in cache.layers:
                    assert held_sets(layer) == [(expected, set())] * 2


@pytest.mark.parametrize("model, method", MODELS_AND_METHODS, indirect=["model"])
def test_a_block_equals_single_steps_while_nothing_has_to_leave(model: Any, method: str) -> None:
    config = config_of(method, cache_size=80)
    ids = prompt(60, seed=8)
    blocks, single = TriStateCache(model, config), TriStateCache(model, config)
    with attach(model):
        forward(model, blocks, ids[:, :30])
        forward(model, single, ids[:, :30])
        logits = torch.cat([forward(model, blocks, part) for part in ids[:, 30:].split([1, 4, 20, 5], dim=1)], dim=1)
        expected = torch.cat(list(feed(model, single, ids[:, 30:])), dim=1)
    assert (logits - expected).abs().max() < 1e-4
    full = forward(model, DynamicCache(config=model.config), ids)[:, 30:]
    assert (logits - full).abs().max() < 1e-4


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_block_is_causal_in_a_compressed_cache(llama: Any, method: str) -> None:
    ids, other = prompt(60, seed=8), prompt(60, seed=8)
    other[:, -3:] = prompt(3, seed=99)
    logits = []
    for item in (ids, other):
        cache = TriStateCache(llama, config_of(method))
        with attach(llama):
            forward(llama, cache, item[:, :50])
            logits.append(forward(llama, cache, item[:, 50:]))
    assert torch.allclose(logits[0][:, :-3], logits[1][:, :-3], atol=1e-6)
    assert not torch.allclose(logits[0][:, -3:], logits[1][:, -3:], atol=1e-2)


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_block_of_a_padded_batch_is_independent(llama: Any, method: str) -> None:
    """A second turn: the samples have different lengths, the new block is the same length for all."""
    prompts = [prompt(length, seed=30 + length) for length in (50, 20, 5)]
    turn = prompt(10, seed=3, batch=3)
    ids, mask = left_padded(prompts)
    config = config_of(method)
    cache = TriStateCache(llama, config)
    with attach(llama):
        forward(llama, cache, ids, attention_mask=mask, position_ids=positions_of(mask))
        mask = torch.cat([mask, torch.ones(3, 10, dtype=torch.long)], dim=1)
        together = forward(llama, cache, turn, attention_mask=mask, position_ids=positions_of(mask)[:, -10:])
        for sample, item in enumerate(prompts):
            own = TriStateCache(llama, config)
            forward(llama, own, item)
            alone = forward(llama, own, turn[sample : sample + 1])
            assert (together[sample] - alone[0]).abs().max() < 1e-3
            shift = 50 - item.shape[1]
            for layer, own_layer in zip(cache.layers, own.layers, strict=True):
                assert held_sets(layer, sample, shift) == held_sets(own_layer)


def test_a_padded_prompt_may_come_in_chunks(llama: Any) -> None:
    """The first chunk may be nothing but padding for the short sample; with room for all this is the stock cache."""
    ids, mask = left_padded([prompt(40, seed=1), prompt(9, seed=2)])
    positions = positions_of(mask)
    for method, size in (("origin", 60), ("window", 60), ("window", 24), ("origin", 24)):
        config = config_of(method, cache_size=size)
        cache, own = TriStateCache(llama, config), TriStateCache(llama, config)
        with attach(llama):
            for start in range(0, 40, 10):
                part = slice(start, start + 10)
                logits = forward(
                    llama, cache, ids[:, part], attention_mask=mask[:, : start + 10], position_ids=positions[:, part]
                )
            alone = forward(llama, own, ids[1:, -9:])
        assert (logits[1, -9:] - alone[0]).abs().max() < 1e-3
        assert cache.token_counts(1) == own.token_counts()
        for layer, own_layer in zip(cache.layers, own.layers, strict=True):
            assert held_sets(layer, 1, 31) == held_sets(own_layer)


# -- beams, samples picked and repeated, conversations -----------------------------------------------------------------


@pytest.mark.parametrize("model, method", MODELS_AND_METHODS, indirect=["model"])
def test_beam_search_with_room_equals_the_stock_cache(model: Any, method: str) -> None:
    ids = prompt(20, seed=4)
    keywords: dict[str, Any] = {"max_new_tokens": 15, "attention_mask": torch.ones_like(ids), "num_beams": 3}
    expected = model.generate(ids, past_key_values=DynamicCache(config=model.config), **keywords)
    with attach(model):
        got = model.generate(ids, past_key_values=TriStateCache(model, config_of(method, cache_size=40)), **keywords)
    assert torch.equal(got, expected)


def test_beam_search_in_a_small_cache_keeps_the_budget(llama: Any) -> None:
    ids = prompt(50, seed=4)
    cache = TriStateCache(llama, config_of("mix"))
    with attach(llama):
        llama.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=20)
    for layer in cache.layers:
        for sample in range(3):
            assert all(len(high) + len(low) == SMALL["cache_size"] for high, low in held_sets(layer, sample))


@pytest.mark.parametrize("method", PUBLISHED)
def test_reordering_keeps_samples_apart(llama: Any, method: str) -> None:
    """After reordering, each row continues as the sample that it now holds."""
    ids, more = prompt(50, seed=1, batch=3), prompt(12, seed=2, batch=3)
    order = torch.tensor([2, 0, 0])
    cache = TriStateCache(llama, config_of(method))
    with attach(llama):
        forward(llama, cache, ids)
        forward(llama, cache, prompt(1, seed=5, batch=3))
        cache.reorder_cache(order)
        got = torch.cat(list(feed(llama, cache, more)), dim=1)
        for row, source in enumerate(order.tolist()):
            own = TriStateCache(llama, config_of(method))
            forward(llama, own, ids[source : source + 1])
            forward(llama, own, prompt(1, seed=5, batch=3)[source : source + 1])
            expected = torch.cat(list(feed(llama, own, more[row : row + 1])), dim=1)
            assert (got[row] - expected[0]).abs().max() < 1e-3
            for layer, own_layer in zip(cache.layers, own.layers, strict=True):
                assert held_sets(layer, row) == held_sets(own_layer)


def test_samples_of_a_padded_batch_are_picked_before_and_after_they_outgrow_the_cache(llama: Any) -> None:
    prompts = [prompt(length, seed=40 + length) for length in (45, 22, 6)]
    ids, mask = left_padded(prompts)
    more = prompt(22, seed=6, batch=2)
    config = config_of("mix")
    for picked in ([2, 1], [0, 2], [1, 1]):
        cache = TriStateCache(llama, config)
        with attach(llama):
            forward(llama, cache, ids, attention_mask=mask, position_ids=positions_of(mask))
            cache.batch_select_indices(torch.tensor(picked))
            running = mask[picked]
            for step in range(22):
                running = torch.cat([running, torch.ones(2, 1, dtype=torch.long)], dim=1)
                position = positions_of(running)[:, -1:]
                logits = forward(llama, cache, more[:, step : step + 1], attention_mask=running, position_ids=position)
            for row, source in enumerate(picked):
                own = TriStateCache(llama, config)
                forward(llama, own, prompts[source])
                *_, expected = feed(llama, own, more[row : row + 1])
                assert (logits[row] - expected[0]).abs().max() < 1e-3
                shift = 45 - prompts[source].shape[1]
                for layer, own_layer in zip(cache.layers, own.layers, strict=True):
                    assert held_sets(layer, row, shift) == held_sets(own_layer)


def test_repeating_samples(llama: Any) -> None:
    ids, more = prompt(50, seed=1, batch=2), prompt(12, seed=2, batch=4)
    cache = TriStateCache(llama, config_of("mix"))
    with attach(llama):
        forward(llama, cache, ids)
        cache.batch_repeat_interleave(2)
        assert cache.layers[0].max_batch_size == 4
        got = torch.cat(list(feed(llama, cache, more)), dim=1)
        for row, source in enumerate([0, 0, 1, 1]):
            own = TriStateCache(llama, config_of("mix"))
            forward(llama, own, ids[source : source + 1])
            expected = torch.cat(list(feed(llama, own, more[row : row + 1])), dim=1)
            assert (got[row] - expected[0]).abs().max() < 1e-3


@pytest.mark.parametrize("model, method", MODELS_AND_METHODS, indirect=["model"])
def test_a_conversation_goes_on(model: Any, method: str) -> None:
    """A second generation with all ids so far continues in the same cache."""
    first, question = prompt(30, seed=1), prompt(9, seed=2)
    full = DynamicCache(config=model.config)
    answer = decode(model, first, full, 8).tokens
    second = torch.cat([answer, question], dim=1)
    expected = decode(model, second, full, 8)
    cache = TriStateCache(model, config_of(method, cache_size=80))
    with attach(model):
        assert torch.equal(decode(model, first, cache, 8).tokens, answer)
        got = decode(model, second, cache, 8)
    assert torch.equal(got.tokens, expected.tokens)
    assert (got.logits - expected.logits).abs().max() < 1e-4
    assert cache.get_seq_length() == 30 + 8 + 9 + 8 - 1

    small = TriStateCache(model, config_of(method))
    with attach(model):
        answer = decode(model, first, small, 8).tokens
        decode(model, torch.cat([answer, question], dim=1), small, 8)
    for layer in small.layers:
        assert all(len(high) + len(low) == SMALL["cache_size"] for high, low in held_sets(layer))


# -- the rest of transformers' interface -------------------------------------------------------------------------------


def test_reset_forgets_everything(llama: Any) -> None:
    config = config_of("mix")
    used, fresh = TriStateCache(llama, config), TriStateCache(llama, config)
    ids = prompt(40, seed=2)
    with attach(llama):
        forward(llama, used, prompt(60, seed=1))
        for _ in feed(llama, used, prompt(5, seed=3)):
            pass
        used.reset()
        assert used.get_seq_length() == 0
        assert used.token_counts() == {"original": 0.0, "quantized": 0.0, "evicted": 0.0}
        assert used.nbytes() == 0
        assert torch.equal(forward(llama, used, ids), forward(llama, fresh, ids))


def test_cropping_is_refused_with_a_reason(llama: Any) -> None:
    cache = TriStateCache(llama, config_of("mix"))
    with attach(llama):
        forward(llama, cache, prompt(40))
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


def test_positions_beyond_the_range_of_a_short_integer() -> None:
    """Positions are stored in 16 bits as long as they fit; a long run must not wrap around."""
    # In token units, where slots do not follow the number of tokens seen.
    config = CacheConfig(cache_size=44, window_size=W, original_share=0.3, quant_format="k4v3")
    near, far = Driver(config, dim=64), Driver(config, dim=64)
    inputs = near.random(120, seed=4, scale=0.3)
    shift = 32704
    assert shift % W == 0
    for driver in (near, far):
        driver.feed(*(tensor[:, :, :60] for tensor in inputs))
    layer = far.layer()
    layer.seen = [seen + shift for seen in layer.seen]
    layer.store.rows[:, SEEN] += shift
    for pool in layer.store.pools:
        pool.position.add_(shift)
    far.cache._groups[0].take(layer.store)
    for place in range(60, 100):
        step = [tensor[:, :, place : place + 1] for tensor in inputs]
        assert torch.equal(near.feed(*step), far.feed(*step))
        assert held_sets(near.layer()) == held_sets(layer, 0, shift)
    block = [tensor[:, :, 100:] for tensor in inputs]
    assert torch.equal(near.feed(*block), far.feed(*block))
    assert held_sets(near.layer()) == held_sets(layer, 0, shift)


def test_a_deep_copy_goes_its_own_way(llama: Any) -> None:
    cache = TriStateCache(llama, config_of("mix"))
    more = prompt(20, seed=3)
    with attach(llama):
        forward(llama, cache, prompt(50, seed=1))
        twin = copy.deepcopy(cache)
        first = torch.cat(list(feed(llama, twin, prompt(20, seed=4))), dim=1)
        logits = torch.cat(list(feed(llama, cache, more)), dim=1)
        other = TriStateCache(llama, config_of("mix"))
        forward(llama, other, prompt(50, seed=1))
        assert torch.equal(logits, torch.cat(list(feed(llama, other, more)), dim=1))
    assert not torch.equal(first, logits)


def test_before_the_first_forward(llama: Any) -> None:
    cache = TriStateCache(llama, config_of("mix"))
    assert len(cache) == 2
    assert cache.get_seq_length() == 0
    assert cache.is_compileable is False
    assert cache.is_initialized is False
    assert cache.is_sliding == [False] * 2
    assert cache.nbytes() == 0
    assert cache.layers[0].states().position.numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", PUBLISHED)
def test_half_precision_models(llama: Any, method: str, dtype: torch.dtype) -> None:
    half = copy.deepcopy(llama).to(dtype)
    ids = prompt(50, seed=1)
    cache = TriStateCache(half, config_of(method))
    with attach(half):
        output = decode(half, ids, cache, 20)
    assert output.logits.isfinite().all()
    for layer in cache.layers:
        tokens = layer.reconstruct()
        assert tokens.key.dtype == dtype
        assert all(len(high) + len(low) == SMALL["cache_size"] for high, low in held_sets(layer))
