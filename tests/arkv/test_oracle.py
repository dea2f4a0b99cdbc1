"""The method written again, one token and one head at a time, and run beside the cache.

Nothing here is fast or shares code with the library: a dictionary per head says which tokens are held and in which
state, and every decision is a sort of a short list. The cache must hold the same tokens in the same states, and attend
to the same numbers, at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from arkv import CacheConfig
from tests.arkv.conftest import Driver, held_sets

ORIGINAL, QUANTIZED = "original", "quantized"

E4M3 = np.array(
    [m / 8 * 2.0**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
)


def round_trip(vector: np.ndarray, number_format: str) -> np.ndarray:
    """A token's key or value after quantization with a scale of its own."""
    size = np.abs(vector)
    if number_format == "int8":
        scale = size.max() / 127.0
        return np.array([round(float(x) / scale) * scale for x in vector])
    scale = size.max() / 448.0
    nearest = np.abs(E4M3[None] - size[:, None] / scale).argmin(axis=1)
    return np.sign(vector) * E4M3[nearest] * scale


def smooth(values: list[float], width: int) -> list[float]:
    """Average over neighbours; what lies beyond the ends counts as zero."""
    reach = width // 2
    return [
        sum(values[j] for j in range(max(i - reach, 0), min(i + reach + 1, len(values)))) / width
        for i in range(len(values))
    ]


@dataclass
class Token:
    key: np.ndarray
    value: np.ndarray
    score: float
    state: str = ORIGINAL


@dataclass
class Head:
    """One KV head of one layer and sample: what it holds, by position."""

    tokens: dict[int, Token] = field(default_factory=dict)

    def sets(self) -> tuple[set[int], set[int]]:
        return (
            {place for place, token in self.tokens.items() if token.state == ORIGINAL},
            {place for place, token in self.tokens.items() if token.state == QUANTIZED},
        )


class Oracle:
    """One sample through all layers."""

    def __init__(self, config: CacheConfig, layers: int, heads: int, groups: int, dim: int) -> None:
        self.config, self.groups, self.scaling = config, groups, dim**-0.5
        self.layers = [[Head() for _ in range(heads)] for _ in range(layers)]
        self.limits: list[int] = []
        self.originals: list[int] = []
        self.totals: list[int] = []
        self.seen = 0

    # -- prompt --------------------------------------------------------------------------------------------------------

    def prefill(self, inputs: list[tuple[np.ndarray, np.ndarray, np.ndarray]], cache: list[Any], sample: int) -> None:
        """Queries [Hq, N, D], keys and values [H, N, D] of every layer.

        In token units the slots follow from the OQ scores; in byte units they are taken over from the layers of
        ``cache``, since what bytes buy is tested elsewhere.
        """
        config = self.config
        length = inputs[0][1].shape[1]
        oq = []
        for heads, (query, key, value) in zip(self.layers, inputs, strict=True):
            window = min(config.window_size, length)
            past = length - window
            entropy = variance = kurtosis = 0.0
            for h, head in enumerate(heads):
                scores = np.zeros(length)
                mean_of_group, max_of_group = np.zeros(length), np.zeros(length)
                for g in range(self.groups):
                    rows = self._rows(query[h * self.groups + g], key[h], window)
                    mean_of_group += rows.mean(axis=0) / self.groups
                    max_of_group = np.maximum(max_of_group, rows.max(axis=0))
                    mean = rows.mean(axis=0)
                    spread = ((rows - mean) ** 2).sum(axis=0) / max(window - 1, 1)
                    entropy -= sum(p * math.log(p) for p in rows[:, :past].ravel() if p > 0)
                    variance += spread[:past].sum()
                    for n in range(past):
                        m2 = ((rows[:, n] - mean[n]) ** 2).mean()
                        m4 = ((rows[:, n] - mean[n]) ** 4).mean()
                        kurtosis += m4 / max(m2, 1e-8) ** 2
                    hh = list(mean + config.gamma * spread)
                    # The window never competes: its part is pooled on its own.
                    pooled = smooth(hh[:past], config.pool_width) + smooth(hh[past:], config.pool_width)
                    scores += np.array(pooled) / self.groups
                if config.importance == "mean_max":
                    scores = self._mean_max(mean_of_group, max_of_group, past)
                span = min(config.query_span or 0, length)
                if config.importance == "mean_max" and span > window:
                    few = [
                        self._rows(query[h * self.groups + g], key[h], span)[:: -config.query_stride]
                        for g in range(self.groups)
                    ]
                    wide = self._mean_max(np.mean(few, axis=(0, 1)), np.max(few, axis=(0, 1)), past)
                    wide *= config.span_weight * (scores[:past].sum() / wide[:past].sum() if past else 1.0)
                    scores = (scores + wide) / (1 + config.span_weight)
                for n in range(length):
                    head.tokens[n] = Token(key[h, n], value[h, n], self._fixed(n, float(scores[n])))
            oq.append(entropy ** (1 / config.tau1) * variance ** (1 / config.tau2) * kurtosis ** (1 / config.tau3))
        self.seen = length
        if config.budget_unit == "bytes":
            slots = [layer.slots[sample] for layer in cache]
            self.limits = [layer.limits[sample] for layer in cache]
            self.originals = [original for original, _ in slots]
            self.totals = [original + quantized for original, quantized in slots]
        else:
            if config.original_share is not None:
                ratios = [config.original_share] * len(oq)
            elif max(oq) > 0:
                ratios = [score / max(oq) for score in oq]
            else:
                ratios = [1.0] * len(oq)
            size = config.cache_size or max(int(config.cache_ratio * length), config.window_size + config.n_sink + 1)
            self.limits = [size] * len(oq)
            self.totals = [size - config.window_size] * len(oq)
            self.originals = [round(ratio * (size - config.window_size)) for ratio in ratios]
        for layer in range(len(self.layers)):
            self._fit(layer)

    def _mean_max(self, mean: np.ndarray, largest: np.ndarray, past: int) -> np.ndarray:
        """The mean and the maximum, each pooled, brought to the same sum over the evictable region, and averaged."""
        width, reach = self.config.pool_width, self.config.max_pool_width // 2
        average, peak = np.zeros_like(mean), np.zeros_like(mean)
        for start, stop in ((0, past), (past, len(mean))):
            average[start:stop] = smooth(list(mean[start:stop]), width)
            for n in range(start, stop):
                peak[n] = largest[max(n - reach, start) : min(n + reach + 1, stop)].max()
        return (average + peak * (average[:past].sum() / peak[:past].sum() if past else 1.0)) / 2

    def _rows(self, query: np.ndarray, key: np.ndarray, window: int) -> np.ndarray:
        """Causal attention of the last ``window`` queries."""
        length = key.shape[0]
        rows = np.zeros((window, length))
        for w in range(window):
            place = length - window + w
            rows[w, : place + 1] = self._softmax(key[: place + 1] @ query[place])
        return rows

    def _softmax(self, products: np.ndarray) -> np.ndarray:
        weights = np.exp((products - products.max()) * self.scaling)
        return weights / weights.sum()

    def _fixed(self, place: int, score: float) -> float:
        """Sinks never leave; by recency only age counts."""
        if place < self.config.n_sink:
            return math.inf
        return float(place) if self.config.ranking == "recency" else score

    # -- states --------------------------------------------------------------------------------------------------------

    def _fit(self, layer: int) -> None:
        """Nothing leaves before more tokens than C have been seen. Then, of the tokens outside the window, the best
        C - W stay, and of those still Original all but the best O are quantized."""
        config = self.config
        if self.seen <= self.limits[layer]:
            return
        for head in self.layers[layer]:
            past = [place for place in head.tokens if place < self.seen - config.window_size]
            past.sort(key=lambda place: -head.tokens[place].score)
            for place in past[self.totals[layer] :]:
                del head.tokens[place]
            high = [place for place in past[: self.totals[layer]] if head.tokens[place].state == ORIGINAL]
            for place in high[self.originals[layer] :]:
                token = head.tokens[place]
                token.state = QUANTIZED
                token.key = round_trip(token.key, config.quant_format)
                token.value = round_trip(token.value, config.quant_format)

    # -- decoding ------------------------------------------------------------------------------------------------------

    def step(self, inputs: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        """Queries [Hq, D], keys and values [H, D] of every layer; returns the outputs [Hq, D].

        The state of every token is decided when the next token arrives, before that one joins.
        """
        place = self.seen
        self.seen += 1
        outputs = []
        for layer, (query, key, value) in enumerate(inputs):
            self._fit(layer)
            output = np.zeros_like(query)
            for h, head in enumerate(self.layers[layer]):
                head.tokens[place] = Token(key[h], value[h], self._fixed(place, 0.0))
                held = sorted(head.tokens)
                newest = dict.fromkeys(held, 0.0)
                keys = np.stack([head.tokens[n].key for n in held])
                values = np.stack([head.tokens[n].value for n in held])
                for row in range(h * self.groups, (h + 1) * self.groups):
                    weights = self._softmax(keys @ query[row])
                    output[row] = weights @ values
                    for n, weight in zip(held, weights.tolist(), strict=True):
                        newest[n] += weight / self.groups
                self._remember(head, newest)
            outputs.append(output)
        return outputs

    def _remember(self, head: Head, newest: dict[int, float]) -> None:
        """Scores from the attention just computed, by neighbours among the tokens that can leave at the next step."""
        config = self.config
        if config.ranking == "recency":
            return
        if config.decode_importance == "latest":
            region = [n for n in newest if n <= self.seen - config.window_size]
            pooled = smooth([newest[n] for n in region], config.pool_width)
            newest = {**newest, **dict(zip(region, pooled, strict=True))}
        for n, score in newest.items():
            token = head.tokens[n]
            if config.decode_importance == "mean":
                score = token.score + (score - token.score) * config.decode_rate
            elif config.decode_importance == "largest":
                score = max(token.score * (1.0 - config.decode_rate), score)
            token.score = self._fixed(n, score)


def run(config: CacheConfig, length: int, steps: int, layers: int, batch: int, seed: int) -> dict[str, int]:
    """Cache and oracle side by side; returns how many transitions of each kind were seen."""
    heads, groups, dim = 2, 2, 8
    driver = Driver(config, layers=layers, heads=heads, groups=groups, dim=dim)
    oracles = [Oracle(config, layers, heads, groups, dim) for _ in range(batch)]
    # Layers of different sharpness have different OQ scores.
    inputs = [driver.random(length + steps, seed * 100 + n, batch, scale=0.3 + 0.5 * n) for n in range(layers)]
    counts = {"evicted": 0, "quantized at once": 0, "quantized later": 0}

    def part(layer: int, sample: int, start: int, stop: int | None) -> Any:
        """One sample's numbers of one layer as float64, [heads, tokens, D], or [heads, D] of a single token."""
        where = start if stop is None else slice(start, stop)
        return tuple(tensor[sample, :, where].double().numpy() for tensor in inputs[layer])

    def compare(when: str) -> None:
        for sample, oracle in enumerate(oracles):
            for layer in range(layers):
                got = held_sets(driver.layer(layer), sample)
                expected = [head.sets() for head in oracle.layers[layer]]
                assert got == expected, f"{when}, sample {sample}, layer {layer}"

    for layer in range(layers):
        driver.feed(*(tensor[:, :, :length] for tensor in inputs[layer]), layer=layer)
    for sample, oracle in enumerate(oracles):
        oracle.prefill([part(layer, sample, 0, length) for layer in range(layers)], driver.cache.layers, sample)
        counts["quantized at once"] += sum(len(head.sets()[1]) for heads_ in oracle.layers for head in heads_)
    compare("after the prompt")

    for step in range(steps):
        place = length + step
        outputs = [
            driver.feed(*(tensor[:, :, place : place + 1] for tensor in inputs[layer]), layer=layer)
            for layer in range(layers)
        ]
        for sample, oracle in enumerate(oracles):
            before = [head.sets() for heads_ in oracle.layers for head in heads_]
            expected = oracle.step([part(layer, sample, place, None) for layer in range(layers)])
            after = [head.sets() for heads_ in oracle.layers for head in heads_]
            for (high, low), (new_high, new_low) in zip(before, after, strict=True):
                counts["quantized later"] += len(high & new_low)
                counts["evicted"] += len((high | low) - (new_high | new_low))
                assert not low & new_high
            for layer in range(layers):
                got = outputs[layer][sample, 0].double().numpy()
                assert np.abs(got - expected[layer]).max() < 1e-4, f"step {step}, sample {sample}, layer {layer}"
        compare(f"step {step}")
    return counts


SIZES: dict[str, Any] = {"cache_size": 24, "window_size": 6}
CASES = {
    "window": {"ranking": "recency", "original_share": 1.0, "n_sink": 3},
    "recency, quantized": {"ranking": "recency", "original_share": 0.5},
    "origin": {"original_share": 1.0},
    "origin, mean": {"original_share": 1.0, "decode_importance": "mean", "decode_rate": 0.2},
    "origin, largest": {"original_share": 1.0, "decode_importance": "largest", "decode_rate": 0.2},
    "quant": {"original_share": 0.0},
    "quant, mean": {"original_share": 0.0, "decode_importance": "mean"},
    "mix": {},
    "mix, mean": {"decode_importance": "mean", "decode_rate": 0.2},
    "mix, largest": {"decode_importance": "largest", "decode_rate": 0.05},
    "mix, int8": {"quant_format": "int8"},
    "mix, sinks": {"n_sink": 3},
    "mix, no pooling": {"pool_width": 1},
    "mix, wide pooling": {"pool_width": 7},
    "mix, no variance": {"gamma": 0.0},
    "half": {"original_share": 0.5},
    "half, mean, int8": {"original_share": 0.5, "decode_importance": "mean", "quant_format": "int8"},
    "mix, other taus": {"tau1": 1.0, "tau2": 2.0, "tau3": 0.7},
    "mix, mean and maximum": {"importance": "mean_max"},
    "mix, a span of queries": {"importance": "mean_max", "query_span": 16, "query_stride": 3},
    "half, ratio": {"cache_size": None, "cache_ratio": 0.5, "original_share": 0.5},
    # In byte units scores of heavy hitters are rounded to bfloat16, and ties are frequent: recency has neither.
    "recency, bytes": {"budget_unit": "bytes", "original_share": 0.4, "quant_format": "int8", "ranking": "recency"},
    "recency, bytes, sinks": {"budget_unit": "bytes", "original_share": 0.7, "n_sink": 2, "ranking": "recency"},
}


@pytest.mark.parametrize(
    "name, attention",
    [(name, "fused") for name in CASES] + [(name, "reconstruct") for name in ("mix, mean", "half")],
)
def test_the_cache_holds_what_the_method_says(name: str, attention: str) -> None:
    config = CacheConfig(**{**SIZES, **CASES[name], "attention": attention})
    counts = run(config, length=50, steps=60, layers=2, batch=1, seed=1)
    assert counts["evicted"] > 100
    if config.original_share != 1.0:
        assert counts["quantized at once"] > 0
        assert counts["quantized later"] > 4


@pytest.mark.parametrize(
    "name, length",
    [("mix", length) for length in (1, 5, 6, 7, 23, 24, 25, 31)]
    + [(name, length) for name in ("window", "quant, mean") for length in (3, 7, 24, 25)],
)
def test_prompts_of_any_length(name: str, length: int) -> None:
    """Shorter than the window, as long, and around the size of the cache, which is outgrown while decoding."""
    config = CacheConfig(**{**SIZES, **CASES[name]})
    counts = run(config, length=length, steps=40, layers=2, batch=1, seed=2)
    assert counts["evicted"] > 0


@pytest.mark.parametrize("cache_size, window_size", [(2, 1), (3, 1), (8, 7), (9, 4), (40, 2)])
def test_caches_of_any_size(cache_size: int, window_size: int) -> None:
    config = CacheConfig(cache_size=cache_size, window_size=window_size, original_share=0.5)
    run(config, length=20, steps=40, layers=1, batch=1, seed=3)


@pytest.mark.parametrize("name", ["window", "mix", "half, mean, int8", "recency, bytes"])
def test_a_batch_of_samples(name: str) -> None:
    run(CacheConfig(**{**SIZES, **CASES[name]}), length=50, steps=30, layers=2, batch=3, seed=6)


@pytest.mark.parametrize("seed", [4, 5])
def test_further_random_numbers(seed: int) -> None:
    run(CacheConfig(cache_size=20, window_size=4), length=30, steps=60, layers=3, batch=1, seed=seed)


def test_as_many_sinks_as_there_is_room_for() -> None:
    run(CacheConfig(**SIZES, ranking="recency", original_share=1.0, n_sink=18), 40, 40, layers=1, batch=1, seed=1)
    run(CacheConfig(**SIZES, ranking="recency", original_share=1.0, n_sink=18), 3, 40, layers=1, batch=1, seed=1)
