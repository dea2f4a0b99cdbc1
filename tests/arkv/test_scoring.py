"""The formulas of the OQ score and of the heavy hitters, against loops over single numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from arkv import CacheConfig
from arkv.scoring import (
    MIN_SECOND_MOMENT,
    causal_visibility,
    pool,
    prefill_statistics,
    summarize_span,
    window_attention,
    with_span,
)

B, HQ, H, N, W, D = 2, 4, 2, 19, 5, 8
TAUS = (7.774380648611771, 5.407015096778621, 5.527702582901318)


def settings(gamma: float = 100.0, width: int = 5, **others: Any) -> CacheConfig:
    return CacheConfig(cache_size=64, gamma=gamma, pool_width=width, **others)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_attention(query: torch.Tensor, key: torch.Tensor, scaling: float, padded: list[int]) -> list:
    """softmax(Q_W K^T scaling), causal, as nested lists [B][Hq][W][N]; padding neither sees nor is seen."""
    batch, query_heads, window, dim = query.shape
    heads, length = key.shape[1], key.shape[2]
    result = []
    for b in range(batch):
        rows_of_heads = []
        for h in range(query_heads):
            rows = []
            for w in range(window):
                place = length - window + w
                visible = range(padded[b], place + 1)
                keys = key[b, h // (query_heads // heads)]
                logits = {
                    n: scaling * sum(float(query[b, h, w, d]) * float(keys[n, d]) for d in range(dim)) for n in visible
                }
                top = max(logits.values(), default=0.0)
                total = sum(math.exp(value - top) for value in logits.values())
                rows.append([math.exp(logits[n] - top) / total if n in logits else 0.0 for n in range(length)])
            rows_of_heads.append(rows)
        result.append(rows_of_heads)
    return result


def naive_moments(values: list[float]) -> tuple[float, float, float, float]:
    """Mean, unbiased variance, second and fourth central moment."""
    mean = sum(values) / len(values)
    square = [(value - mean) ** 2 for value in values]
    m2, m4 = sum(square) / len(values), sum(s * s for s in square) / len(values)
    return mean, sum(square) / max(len(values) - 1, 1), m2, m4


def naive_statistics(rows: list, past: int) -> tuple[float, float, float]:
    """Entropy, variance and kurtosis of one sample's attention [Hq][W][N] over its first ``past`` keys."""
    entropy = variance = kurtosis = 0.0
    for head in rows:
        for n in range(past):
            column = [row[n] for row in head]
            entropy -= sum(p * math.log(p) for p in column if p > 0)
            _, spread, m2, m4 = naive_moments(column)
            variance += spread
            kurtosis += m4 / max(m2, MIN_SECOND_MOMENT) ** 2
    return entropy, variance, kurtosis


def naive_pool(values: list[float], width: int) -> list[float]:
    reach = width // 2
    return [
        sum(values[j] for j in range(i - reach, i + reach + 1) if 0 <= j < len(values)) / width
        for i in range(len(values))
    ]


def naive_importance(rows: list, heads: int, past: int, gamma: float, width: int) -> list[list[float]]:
    """``hh`` [H][N - W] of one sample."""
    groups = len(rows) // heads
    result = []
    for h in range(heads):
        pooled = []
        for g in range(groups):
            head = rows[h * groups + g]
            scores = []
            for n in range(past):
                mean, spread, _, _ = naive_moments([row[n] for row in head])
                scores.append(mean + gamma * spread)
            pooled.append(naive_pool(scores, width))
        result.append([sum(column) / groups for column in zip(*pooled, strict=True)])
    return result


@pytest.fixture(scope="module")
def attention() -> torch.Tensor:
    query, key = random(B, HQ, W, D, seed=1) * 2, random(B, H, N, D, seed=2)
    return window_attention(query, key, D**-0.5, causal_visibility(N, W, None, query.device))


def test_visibility_is_causal() -> None:
    visible = causal_visibility(5, 3, None, torch.device("cpu"))
    assert visible[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_padding_neither_sees_nor_is_seen() -> None:
    padding = torch.tensor([[False, False, False, True, True], [True] * 5])
    visible = causal_visibility(5, 3, padding, torch.device("cpu"))
    assert visible[0, 0].int().tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert torch.equal(visible[1], causal_visibility(5, 3, None, torch.device("cpu"))[0])


@pytest.mark.parametrize("padded", [[0, 0], [4, 0], [0, 16]], ids=str)
def test_window_attention_is_the_softmax(padded: list[int]) -> None:
    query, key = random(B, HQ, W, D, seed=1) * 2, random(B, H, N, D, seed=2)
    padding = torch.arange(N)[None] >= torch.tensor(padded)[:, None]
    visible = causal_visibility(N, W, padding if any(padded) else None, query.device)
    got = window_attention(query, key, D**-0.5, visible)
    expected = torch.tensor(naive_attention(query, key, D**-0.5, padded))
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected, atol=1e-6)
    real = (torch.arange(N - W, N)[None] >= torch.tensor(padded)[:, None])[:, None].expand(B, HQ, W)
    assert torch.allclose(got.sum(-1)[real], torch.ones(int(real.sum())), atol=1e-5)
    assert (got.sum(-1)[~real] == 0).all()


def test_window_attention_does_not_write_into_its_input() -> None:
    query, key = random(B, HQ, W, D, seed=1), random(B, H, N, D, seed=2)
    before = query.clone(), key.clone()
    window_attention(query, key, 1.0, causal_visibility(N, W, None, query.device))
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])


def test_half_precision_input_is_scored_in_float32() -> None:
    query, key = random(B, HQ, W, D, seed=1).bfloat16(), random(B, H, N, D, seed=2).bfloat16()
    visible = causal_visibility(N, W, None, query.device)
    assert torch.equal(
        window_attention(query, key, 1.0, visible), window_attention(query.float(), key.float(), 1.0, visible)
    )


@pytest.mark.parametrize("width", [1, 3, 5, 7])
@pytest.mark.parametrize("length", [0, 1, 2, 4, 20])
def test_pool(width: int, length: int) -> None:
    x = random(2, 3, length)
    got = pool(x, width)
    assert got.shape == x.shape
    for b in range(2):
        for h in range(3):
            assert got[b, h].tolist() == pytest.approx(naive_pool(x[b, h].tolist(), width), abs=1e-6)


def test_statistics_are_the_formulas(attention: torch.Tensor) -> None:
    statistics = prefill_statistics(attention, H, settings(263.8))
    for b in range(B):
        entropy, variance, kurtosis = naive_statistics(attention[b].tolist(), N - W)
        assert float(statistics.entropy[b]) == pytest.approx(entropy, rel=1e-4)
        assert float(statistics.variance[b]) == pytest.approx(variance, rel=1e-4)
        assert float(statistics.kurtosis[b]) == pytest.approx(kurtosis, rel=1e-4)
        expected = entropy ** (1 / TAUS[0]) * variance ** (1 / TAUS[1]) * kurtosis ** (1 / TAUS[2])
        assert float(statistics.oq_score(*TAUS)[b]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("gamma, width", [(263.8108280337562, 5), (0.0, 5), (10.0, 1), (1e4, 7)])
def test_importance_is_the_formula(attention: torch.Tensor, gamma: float, width: int) -> None:
    importance = prefill_statistics(attention, H, settings(gamma, width)).importance
    assert importance.shape == (B, H, N)
    for b in range(B):
        expected = torch.tensor(naive_importance(attention[b].tolist(), H, N - W, gamma, width))
        assert torch.allclose(importance[b, :, : N - W], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("width, max_width", [(5, 7), (1, 1), (3, 1)])
def test_mean_and_maximum_is_the_formula(attention: torch.Tensor, width: int, max_width: int) -> None:
    """Both pooled over neighbours, brought to the same sum over the evictable region, and averaged."""
    past, reach = N - W, max_width // 2
    config = settings(width=width, max_pool_width=max_width, importance="mean_max")
    importance = prefill_statistics(attention, H, config).importance
    for b in range(B):
        for h in range(H):
            columns = [[attention[b, h * 2 + g, w, n].item() for g in range(2) for w in range(W)] for n in range(past)]
            average = naive_pool([sum(column) / len(column) for column in columns], width)
            top = [max(column) for column in columns]
            largest = [max(top[max(n - reach, 0) : n + reach + 1]) for n in range(past)]
            size = sum(average) / sum(largest)
            expected = [(a + m * size) / 2 for a, m in zip(average, largest, strict=True)]
            assert importance[b, h, :past].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("importance", ["mean_var", "mean_max"])
def test_the_window_never_competes(attention: torch.Tensor, importance: str) -> None:
    """Neither the layer's statistics nor the importance of earlier tokens depend on attention inside the window."""
    other = attention.clone()
    other[..., N - W :] = torch.rand(B, HQ, W, W, generator=torch.Generator().manual_seed(9))
    one, two = (prefill_statistics(item, H, settings(importance=importance)) for item in (attention, other))
    assert torch.equal(one.entropy, two.entropy)
    assert torch.equal(one.variance, two.variance)
    assert torch.equal(one.kurtosis, two.kurtosis)
    assert torch.equal(one.importance[..., : N - W], two.importance[..., : N - W])


@pytest.mark.parametrize("importance", ["mean_var", "mean_max"])
def test_a_sample_scores_as_if_it_were_alone(attention: torch.Tensor, importance: str) -> None:
    together = prefill_statistics(attention, H, settings(importance=importance))
    for b in range(B):
        alone = prefill_statistics(attention[b : b + 1], H, settings(importance=importance))
        for whole, one in zip(together, alone, strict=True):
            assert torch.allclose(whole[b], one[0], rtol=1e-6)


@pytest.mark.parametrize("importance", ["mean_var", "mean_max"])
def test_left_padding_changes_no_score(importance: str) -> None:
    config = settings(importance=importance)
    query, key = random(1, HQ, W, D, seed=1) * 2, random(1, H, N, D, seed=2)
    device = query.device
    alone = prefill_statistics(window_attention(query, key, 1.0, causal_visibility(N, W, None, device)), H, config)
    padded_key = torch.cat([random(1, H, 7, D, seed=3), key], dim=2)
    padding = torch.arange(N + 7)[None] >= 7
    visible = causal_visibility(N + 7, W, padding, device)
    padded = prefill_statistics(window_attention(query, padded_key, 1.0, visible), H, config)
    assert torch.allclose(padded.oq_score(*TAUS), alone.oq_score(*TAUS), rtol=1e-5)
    assert torch.allclose(padded.importance[..., 7:], alone.importance, rtol=1e-5, atol=1e-9)


def test_uniform_attention_has_no_variance_and_a_finite_score() -> None:
    attention = torch.full((1, HQ, W, N), 1.0 / N)
    statistics = prefill_statistics(attention, H, settings())
    assert float(statistics.variance) == pytest.approx(0, abs=1e-12)
    assert float(statistics.entropy) == pytest.approx(HQ * W * (N - W) * math.log(N) / N, rel=1e-4)
    assert float(statistics.oq_score(*TAUS)) == pytest.approx(0, abs=1e-3)


def test_one_query_has_no_spread() -> None:
    query, key = random(1, HQ, 1, D), random(1, H, N, D)
    attention = window_attention(query, key, 1.0, causal_visibility(N, 1, None, query.device))
    statistics = prefill_statistics(attention, H, settings(width=1))
    assert float(statistics.variance) == 0
    assert all(item.isfinite().all() for item in statistics)
    expected = attention.view(1, H, HQ // H, N).mean(2)
    assert torch.allclose(statistics.importance, expected, atol=1e-6)


def test_without_an_evictable_region_the_score_is_zero() -> None:
    query, key = random(B, HQ, W, D), random(B, H, W, D)
    attention = window_attention(query, key, 1.0, causal_visibility(W, W, None, query.device))
    statistics = prefill_statistics(attention, H, settings())
    assert statistics.oq_score(*TAUS).tolist() == [0.0] * B
    assert statistics.importance.shape == (B, H, W)
    assert statistics.importance.isfinite().all()


def test_a_span_of_queries_is_averaged_with_the_window() -> None:
    """Importances of the window's queries and of the span's, brought to the same sum over the evictable region."""
    config = settings(importance="mean_max", max_pool_width=7, query_span=13, query_stride=3, span_weight=0.5)
    past = N - W
    query, key = random(1, HQ, 13, D, seed=1) * 2, random(1, H, N, D, seed=2)
    seen = causal_visibility(N, 13, None, query.device)
    whole = window_attention(query, key, D**-0.5, seen)
    near = prefill_statistics(whole[:, :, -W:], H, config).importance
    few = slice(0, None, 3)
    far = window_attention(query[:, :, few], key, D**-0.5, seen[:, :, few])
    sinks = torch.zeros(1, 1, past, dtype=torch.bool)
    span = summarize_span(whole[:, :, -W:], query[:, :, few], key, D**-0.5, seen[:, :, few], config)
    got = with_span(near, span, ~seen.any(dim=2), sinks, config)
    for h in range(H):
        columns = [[far[0, h * 2 + g, w, n].item() for g in range(2) for w in range(5)] for n in range(past)]
        average = naive_pool([sum(column) / len(column) for column in columns], 5)
        top = [max(column) for column in columns]
        largest = [max(top[max(n - 3, 0) : n + 4]) for n in range(past)]
        size = sum(average) / sum(largest)
        wide = [(a + m * size) / 2 for a, m in zip(average, largest, strict=True)]
        size = float(near[0, h, :past].sum()) / sum(wide)
        expected = [(a + 0.5 * b * size) / 1.5 for a, b in zip(near[0, h, :past].tolist(), wide, strict=True)]
        assert got[0, h, :past].tolist() == pytest.approx(expected, rel=1e-4)


def test_padding_in_the_span_changes_no_score() -> None:
    config = settings(importance="mean_max", query_span=N, query_stride=1)
    query, key = random(1, HQ, N, D, seed=1) * 2, random(1, H, N, D, seed=2)
    near = random(1, H, N, seed=3).abs()
    sinks = torch.zeros(1, 1, N - W, dtype=torch.bool)
    seen = causal_visibility(N, N, None, query.device)
    attention = window_attention(query[:, :, -W:], key, 1.0, seen[:, :, -W:])
    span = summarize_span(attention, query, key, 1.0, seen, config)
    alone = with_span(near, span, ~seen.any(dim=2), sinks, config)
    padded_query, padded_key = (torch.cat([random(1, x.shape[1], 7, D, seed=4), x], dim=2) for x in (query, key))
    seen = causal_visibility(N + 7, N + 7, torch.arange(N + 7)[None] >= 7, query.device)
    near, sinks = torch.cat([torch.zeros(1, H, 7), near], -1), torch.nn.functional.pad(sinks, (7, 0), value=True)
    attention = window_attention(query[:, :, -W:], padded_key, 1.0, seen[:, :, -W:])
    span = summarize_span(attention, padded_query, padded_key, 1.0, seen, config)
    padded = with_span(near, span, ~seen.any(dim=2), sinks, config)
    assert torch.allclose(padded[..., 7:], alone, rtol=1e-5, atol=1e-9)
