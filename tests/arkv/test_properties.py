"""What must hold for any settings and any numbers, tried on many that hypothesis thinks of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from arkv import FORMATS, CacheConfig, ConfigError, kernels
from arkv.budget import ByteBudget, Geometry, byte_slots, token_slots
from arkv.formats import Layout
from arkv.formats.base import CENTER_DTYPE
from arkv.formats.rotation import rotation
from arkv.kernels import twin
from arkv.pools import Part, Plane, Pool
from arkv.scores import Prompt, needs_moments, oq_ratios, oq_score, score
from arkv.scores.pooling import average
from arkv.store import Store
from tests.arkv.conftest import Driver, held_sets

few = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
many = settings(few, max_examples=80)


# -- number formats ----------------------------------------------------------------------------------------------------


LAYOUTS = [(name, part) for name in sorted(FORMATS) for part in ("key", "value")]


def in_code_space(layout: Layout, x: torch.Tensor, center: torch.Tensor | None) -> torch.Tensor:
    """The numbers [n, D] that codes stand for, in float64."""
    x = x.double() if center is None else x.double() - center.double()
    return x @ rotation(x.shape[-1], x.device).double() if layout.rotated else x


def half_step(layout: Layout, x: torch.Tensor) -> torch.Tensor:
    """Half a quantization step at each number of :func:`in_code_space`, from the numbers alone."""
    if layout.floating:
        scale = (x.abs().amax(-1, keepdim=True) / 448).clamp_min(torch.finfo(torch.float32).tiny)
        exponent = torch.floor(torch.log2((x.abs() / scale).clamp_min(2.0**-6)))
        return scale * 2.0 ** (exponent - 4)
    if not layout.rotated:
        scale = (x.abs().amax(-1, keepdim=True) / (2 ** (layout.bits - 1) - 1)).clamp_min(
            torch.finfo(torch.float32).tiny
        )
        return (scale / 2).expand_as(x)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    # The range is rounded outwards to bfloat16: its lower end, and then the step.
    step = (high - low + low.abs() / 128) / (2**layout.bits - 1) * (1 + 1 / 128)
    return (step.clamp_min(torch.finfo(torch.bfloat16).tiny) / 2).expand_as(x)


magnitudes = st.sampled_from([0.0, 1e-38, 1e-30, 1e-6, 1e-3, 1.0, 30.0, 1e4, 1e30])


@pytest.mark.parametrize("name, part", LAYOUTS)
@given(
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=magnitudes,
    offset=magnitudes,
    outlier=st.sampled_from([0.0, 1.0, 100.0]),
    zeros=st.booleans(),
)
@few
def test_a_round_trip_moves_a_number_by_half_a_step_at_most(
    name: str, part: str, seed: int, dtype: torch.dtype, scale: float, offset: float, outlier: float, zeros: bool
) -> None:
    layout: Layout = getattr(FORMATS[name], part)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 64, 64, generator=generator) * scale
    x += offset * torch.randn(64, generator=generator).sign()
    x[0, 5, 7] += outlier * scale
    if zeros:
        x[:, 3] = 0
        x[1, :, 9] = 0
    x = x.to(dtype)
    assume(bool(x.isfinite().all()))
    # The mean of each of two heads.
    mean = x.float().mean(dim=1, keepdim=True).to(CENTER_DTYPE).expand(x.shape).flatten(0, 1)
    center, x = mean if layout.centered else None, x.flatten(0, 1)
    back = layout.decode(layout.encode(x, center), center)
    assert back.isfinite().all()
    target = in_code_space(layout, x, center)
    error = (in_code_space(layout, back, center) - target).abs()
    # Arithmetic in float32 adds roundings of the numbers themselves, turned back and forth.
    rounding = x.double().norm(dim=-1, keepdim=True) * 2.0**-21
    assert (error <= half_step(layout, target) * (1 + 1e-5) + rounding).all()


@given(
    seed=st.integers(0, 2**16),
    scale=magnitudes,
    name=st.sampled_from(sorted(FORMATS)),
    fused=st.booleans(),
    group=st.integers(1, 4),
)
@example(seed=0, scale=0.0, name="int2", fused=True, group=1)
@example(seed=0, scale=1e-38, name="k4v3", fused=True, group=3)
@example(seed=0, scale=1e30, name="int4", fused=True, group=3)
@few
def test_attention_to_codes_is_attention_to_values(seed: int, scale: float, name: str, fused: bool, group: int) -> None:
    """Kernels may fold scales, zero points, centers and the rotation in after the product.

    Two rows that hold one new token, and 64 Quantized ones each.
    """
    count, dim = 64, 32
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 2, count, dim, generator=generator) * scale
    planes = []
    for layout, numbers in zip((FORMATS[name].key, FORMATS[name].value), x, strict=True):
        center = numbers.mean(dim=1).to(CENTER_DTYPE) if layout.centered else None
        each = None if center is None else center.repeat_interleave(count, dim=0)
        planes.append(Plane(*layout.encode(numbers.flatten(0, 1), each), center, layout))
    every = torch.arange(2 * count)
    keys, values = (plane.read(every, every // count).view(2, count, dim) for plane in planes)
    position = (torch.arange(2 * count) % count).int()
    stored = Pool(torch.zeros(2 * count), position, *planes)
    new = Plane(torch.zeros(2, dim))
    original = Pool(torch.zeros(2), torch.full((2,), count).int(), new, Plane(torch.zeros(2, dim)))
    part = Part([original, stored], [torch.tensor([1, 1]), torch.tensor([count, count])])
    seen, none = np.array([count + 1] * 2), np.array([0, 0])
    store = Store([part], seen, none, [np.array([1, 1]), np.array([count, count])])
    query = torch.randn(1, 2 * group, 1, dim, generator=generator)
    key, value = torch.randn(2, 1, 2, 1, dim, generator=generator) * scale
    # So that logits are of the same size, whatever the keys.
    scaling = min(0.3 / scale, 1e30) if scale else 1.0
    importance = [torch.zeros_like(pool.score) for pool in store.pools]
    told = (0, 1, scaling, 0.0, None, importance)
    if fused:
        output = kernels.attend(query, key, value, store.rows, 0, store.tensors(), [name], *told)
    else:
        output = twin.attend(query, key, value, store.rows, 0, store.pools, *told)
    keys, values = torch.cat([key[0], keys], dim=1), torch.cat([value[0], values], dim=1)
    grouped = query.view(2, group, dim).double()
    probabilities = ((grouped * scaling) @ keys.double().mT).softmax(dim=-1)
    expected = (probabilities @ values.double()).view(1, 1, 2 * group, dim)
    assert torch.allclose(output.double(), expected, rtol=1e-4, atol=1e-4 * scale)
    mean = probabilities.mean(dim=1)
    assert torch.allclose(importance[0].double(), mean[:, 0], rtol=1e-4, atol=1e-7)
    assert torch.allclose(importance[1].view(2, count).double(), mean[:, 1:], rtol=1e-4, atol=1e-7)


# -- scores and budgets ------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**16),
    past=st.integers(0, 20),
    window=st.integers(1, 6),
    groups=st.integers(1, 3),
    sharpness=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    importance=st.sampled_from(["mean_var", "mean_max"]),
    fused=st.booleans(),
)
@many
def test_scores_are_finite_and_not_negative(
    seed: int, past: int, window: int, groups: int, sharpness: float, importance: Any, fused: bool
) -> None:
    """Also for uniform attention, for attention to a single token, and without an evictable region."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 2 * groups, window, 8, generator=generator) * sharpness
    key = torch.randn(2, 2, past + window, 8, generator=generator) * 5
    config = CacheConfig(cache_size=64, window_size=window, importance=importance)
    told: dict[str, Any] = {"new": past + window, "window": window, "scaling": 1.0, "moments": needs_moments(config)}
    sinks = torch.zeros(2, 1, past + window, dtype=torch.bool)
    prompt = Prompt(query, key, key, sinks=sinks, fused=fused, **told)
    statistics = score(prompt, config)
    assert statistics.importance.shape == (2, 2, past + window)
    assert statistics.importance.isfinite().all()
    assert (statistics.importance >= 0).all()
    assert prompt.near.layer is not None
    for tau in (0.5, 1.0, 7.0):
        oq = oq_score(prompt.near.layer, tau, tau, tau)
        assert oq.isfinite().all()
        assert (oq >= 0).all()
        if not past:
            assert (oq == 0).all()
    ratios = oq_ratios(oq.tolist())
    assert max(ratios) == 1.0


@given(st.lists(st.floats(0, 100, width=32), min_size=0, max_size=30), st.sampled_from([1, 3, 5, 9]))
@many
def test_pooling_keeps_size_and_mass(values: list[float], width: int) -> None:
    x = torch.tensor(values).view(1, 1, -1)
    pooled = average(x, width)
    assert pooled.shape == x.shape
    assert float(pooled.sum()) <= float(x.sum()) * (1 + 1e-5) + 1e-5
    assert (pooled >= 0).all()


@given(
    scores=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    past=st.integers(1, 3000),
    share=st.none() | st.floats(0, 1),
)
@many
def test_token_slots_add_up(scores: list[float], past: int, share: float | None) -> None:
    config = CacheConfig(cache_size=past + 4, window_size=4, original_share=share)
    for slots in (token_slots(config, past + 4, ratio) for ratio in oq_ratios(scores)):
        assert slots.original + slots.quantized == past
        assert min(slots) >= 0


@given(
    scores=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    size=st.integers(80, 3000),
    share=st.floats(0, 1),
    name=st.sampled_from(sorted(FORMATS)),
    window=st.integers(1, 16),
    sinks=st.integers(0, 8),
    tokens=st.integers(1, 20_000),
    layer_budgets=st.sampled_from(["equal", "oq"]),
    geometry=st.sampled_from(
        [
            Geometry(64, 64, torch.bfloat16, 8),
            Geometry(128, 128, torch.float16, 4, 40),
            Geometry(32, 32, torch.float32, 6, 64),
            Geometry(192, 128, torch.bfloat16, 6, 64),
        ]
    ),
)
@many
def test_byte_slots_cost_no_more_than_there_is(
    scores: list[float],
    size: int,
    share: float,
    name: str,
    window: int,
    sinks: int,
    tokens: int,
    layer_budgets: Any,
    geometry: Geometry,
) -> None:
    config = CacheConfig(
        cache_size=size,
        budget_unit="bytes",
        original_share=share,
        quant_format=name,
        window_size=window,
        n_sink=sinks,
        layer_budgets=layer_budgets,
    )
    try:
        budget = ByteBudget(config, geometry, len(scores), tokens)
    except ConfigError:
        return
    total = 0
    for number in scores:
        granted = budget.next_layer(number)
        slots = byte_slots(config, geometry, granted, tokens)
        assert slots.original >= sinks
        assert slots.quantized >= 0
        full = (geometry.key_dim + geometry.value_dim) * geometry.dtype.itemsize
        quantized = FORMATS[name].bytes_per_token(geometry.key_dim, geometry.value_dim) + geometry.slot_bytes
        cost = (window + slots.original) * (full + geometry.slot_bytes) + geometry.row_bytes
        if share < 1.0:
            cost += FORMATS[name].bytes_per_head(geometry.key_dim)
        assert cost + slots.quantized * quantized <= granted
        total += granted
    assert total <= size * full * len(scores)


# -- the cache ---------------------------------------------------------------------------------------------------------


@st.composite
def configs(draw: Any, units: tuple[str, ...] = ("tokens", "bytes")) -> CacheConfig:
    window = draw(st.integers(1, 7))
    past = draw(st.integers(2, 24))
    unit = draw(st.sampled_from(units))
    sinks = draw(st.integers(0, min(past, 3)))
    share = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0] + ([None] if unit == "tokens" else [])))
    if share in (0.0, 0.3, None):
        # Whether sinks win over a share that leaves no room for them is tested elsewhere.
        sinks = 0
    return CacheConfig(
        cache_size=window + past + (40 if unit == "bytes" else 0),
        budget_unit=unit,
        window_size=window,
        n_sink=sinks,
        ranking=draw(st.sampled_from(["heavy_hitter", "heavy_hitter", "recency"])),
        original_share=share,
        quant_format=draw(st.sampled_from(sorted(FORMATS))),
        importance=draw(st.sampled_from(["mean_var", "mean_max"])),
        pool_width=draw(st.sampled_from([1, 5])),
        decode_importance=draw(st.sampled_from(["latest", "mean", "largest"])),
        value_norm=draw(st.booleans()),
        tau1=draw(st.sampled_from([0.5, 7.0])),
        attention=draw(st.sampled_from(["fused", "reconstruct"])),
    )


sequences = st.lists(st.sampled_from([1, 1, 1, 1, 1, 1, 2, 3, 7, 20, 50]), min_size=2, max_size=14)
"""Lengths of the forwards that a cache sees one after the other."""


@given(config=configs(), parts=sequences, seed=st.integers(0, 2**16))
@settings(few, max_examples=40)
def test_budget_window_and_one_way_states(config: CacheConfig, parts: list[int], seed: int) -> None:
    """For prompts, blocks and single steps in any order."""
    driver = Driver(config, layers=2, dim=32)
    inputs = [driver.random(sum(parts), seed + layer, batch=2, scale=0.2 + layer) for layer in range(2)]
    before: dict[tuple[int, int, int], tuple[set[int], set[int]]] = {}
    seen = 0
    for part in parts:
        for layer in range(2):
            output = driver.feed(*(tensor[:, :, seen : seen + part] for tensor in inputs[layer]), layer=layer)
            assert output.isfinite().all()
        first, seen = seen, seen + part
        assert driver.cache.get_seq_length() == seen
        for layer in range(2):
            for sample in range(2):
                slots = driver.layer(layer).slots[sample]
                limit = driver.layer(layer).limits[sample]
                for head, (high, low) in enumerate(held_sets(driver.layer(layer), sample)):
                    held = high | low
                    assert set(range(max(seen - config.window_size, 0), seen)) <= high
                    if config.budget_unit == "tokens":
                        assert len(held) == min(seen, config.tokens_worth(0))
                    if seen <= limit:
                        assert not low
                        assert len(high) == seen
                    else:
                        assert len(high) <= config.window_size + slots.original
                        assert len(low) <= slots.quantized
                    assert set(range(min(config.n_sink, seen))) <= high
                    old_high, old_low = before.get((layer, sample, head), (set(), set()))
                    new = set(range(first, seen))
                    assert high <= old_high | new
                    assert low <= old_high | old_low | new
                    before[layer, sample, head] = (high, low)
        if config.budget_unit == "bytes":
            assert driver.cache.nbytes() <= 2 * 2 * 2 * config.tokens_worth(0) * 2 * 32 * 4


@given(config=configs(), parts=sequences, seed=st.integers(0, 2**16))
@few
def test_a_sample_is_the_same_in_a_batch_and_alone(config: CacheConfig, parts: list[int], seed: int) -> None:
    together, alone = Driver(config, layers=2, dim=32), Driver(config, layers=2, dim=32)
    inputs = [together.random(sum(parts), seed + layer, batch=3, scale=0.2 + layer) for layer in range(2)]
    seen = 0
    for part in parts:
        for layer in range(2):
            step = [tensor[:, :, seen : seen + part] for tensor in inputs[layer]]
            output = together.feed(*step, layer=layer)
            own = alone.feed(*(tensor[1:2] for tensor in step), layer=layer)
            assert (output[1] - own[0]).abs().max() < 1e-4
            assert held_sets(together.layer(layer), 1) == held_sets(alone.layer(layer), 0)
            assert together.layer(layer).slots[1] == alone.layer(layer).slots[0]
        seen += part


@given(config=configs(), parts=sequences, seed=st.integers(0, 2**16))
@few
def test_every_output_is_attention_over_what_is_held(config: CacheConfig, parts: list[int], seed: int) -> None:
    """Worked out from the reconstructed cache before a forward and the forward's own tokens, causally.

    In a single step the token that it displaces leaves before the attention is taken; a block is read first.
    """
    driver = Driver(config, dim=32)
    query, key, value = driver.random(sum(parts), seed, scale=0.3)
    seen = 0
    for part in parts:
        where = slice(seen, seen + part)
        stored = driver.layer().reconstruct() if seen and part > 1 else None
        output = driver.feed(query[:, :, where], key[:, :, where], value[:, :, where])
        if part == 1:
            stored = driver.layer().reconstruct()
        for head in range(2):
            keys, values = key[0, head, where], value[0, head, where]
            old = 0
            if stored is not None:
                real = stored.position[0, head] >= 0
                places = stored.position[0, head][real]
                assert (places[1:] > places[:-1]).all()
                old = int(real.sum()) - (1 if part == 1 else 0)
                keys = torch.cat([stored.key[0, head][real], keys])[: old + part]
                values = torch.cat([stored.value[0, head][real], values])[: old + part]
            for group in range(2):
                for place in range(part):
                    row = query[0, head * 2 + group, seen + place]
                    weights = (keys[: old + place + 1] @ row * driver.scaling).softmax(0)
                    expected = weights @ values[: old + place + 1]
                    assert (output[0, place, head * 2 + group] - expected).abs().max() < 1e-4
        seen += part


@given(
    config=configs(),
    parts=sequences,
    order=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
)
@few
def test_picked_samples_go_on_as_themselves(config: CacheConfig, parts: list[int], order: list[int], seed: int) -> None:
    driver = Driver(config, dim=32)
    inputs = driver.random(sum(parts) + 8, seed, batch=3)
    alone = []
    for sample in range(3):
        own = Driver(config, dim=32)
        seen = 0
        for part in [*parts, *[1] * 8]:
            output = own.feed(*(tensor[sample : sample + 1, :, seen : seen + part] for tensor in inputs))
            seen += part
        alone.append((held_sets(own.layer()), output))
    seen = 0
    for part in parts:
        driver.feed(*(tensor[:, :, seen : seen + part] for tensor in inputs))
        seen += part
    driver.cache.batch_select_indices(torch.tensor(order))
    for place in range(seen, seen + 8):
        output = driver.feed(*(tensor[order, :, place : place + 1] for tensor in inputs))
    for row, source in enumerate(order):
        assert held_sets(driver.layer(), row) == alone[source][0]
        assert (output[row] - alone[source][1][0]).abs().max() < 1e-4
