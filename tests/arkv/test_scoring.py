"""The formulas of the OQ score and of the heavy hitters, against loops over single numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from arkv import CacheConfig, ConfigError
from arkv.scores import SCORERS, Prompt, PromptScores, needs_moments, oq_score, score
from arkv.scores.attention import (
    MIN_SECOND_MOMENT,
    Summary,
    causal_visibility,
    summarize,
    summarize_span,
    window_attention,
)
from arkv.scores.pooling import average, by_region, maximum

B, HQ, H, N, W, D = 2, 4, 2, 19, 5, 8
TAUS = (7.774380648611771, 5.407015096778621, 5.527702582901318)


def settings(gamma: float = 100.0, width: int = 5, **others: Any) -> CacheConfig:
    return CacheConfig(**{"cache_size": 64, "window_size": W, "gamma": gamma, "pool_width": width, **others})


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt_of(
    query: torch.Tensor,
    key: torch.Tensor,
    config: CacheConfig,
    scaling: float = 1.0,
    window: int = W,
    padding: torch.Tensor | None = None,
    fused: bool = False,
    **others: Any,
) -> Prompt:
    """The newest queries and all keys of a forward without sinks; padding is counted among these, as layers do."""
    sinks = torch.zeros(key.shape[0], 1, key.shape[2], dtype=torch.bool)
    if padding is not None:
        sinks |= ~padding.unsqueeze(1)
    plain: dict[str, Any] = {
        "value": random(*key.shape, seed=8),
        "new": key.shape[2],
        "window": window,
        "scaling": scaling,
        "sinks": sinks,
        "moments": needs_moments(config),
        "padding": padding,
        "fused": fused,
    }
    return Prompt(query, key, **{**plain, **others})


def of_attention(attention: torch.Tensor, config: CacheConfig) -> Prompt:
    """A prompt whose window's queries give this attention [B, Hq, W, N]."""
    batch, query_heads, window, length = attention.shape
    query, key = torch.zeros(batch, query_heads, window, D), torch.zeros(batch, H, length, D)
    prompt = prompt_of(query, key, config, window=window)
    prompt.attention = attention
    return prompt


def importance_of(prompt: Prompt, config: CacheConfig) -> torch.Tensor:
    return score(prompt, config).importance


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


QUERY_AND_KEY = random(B, HQ, W, D, seed=1) * 2, random(B, H, N, D, seed=2)


@pytest.fixture(scope="module")
def attention() -> torch.Tensor:
    query, key = QUERY_AND_KEY
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
def test_pooling(width: int, length: int) -> None:
    x = random(2, 3, length)
    reach = width // 2
    got, largest = average(x, width), maximum(x, width)
    assert got.shape == largest.shape == x.shape
    for b in range(2):
        for h in range(3):
            row = x[b, h].tolist()
            assert got[b, h].tolist() == pytest.approx(naive_pool(row, width), abs=1e-6)
            assert largest[b, h].tolist() == [max(row[max(n - reach, 0) : n + reach + 1]) for n in range(length)]


@pytest.mark.parametrize("function", [average, maximum])
def test_the_past_and_the_window_are_pooled_apart(function: Any) -> None:
    x = random(2, 3, N).abs()
    got = by_region(x, N - W, function, 5)
    assert torch.equal(got, torch.cat([function(x[..., : N - W], 5), function(x[..., N - W :], 5)], dim=-1))
    assert not torch.equal(got, function(x, 5))


@pytest.mark.parametrize("fused", [False, True])
def test_statistics_are_the_formulas(attention: torch.Tensor, fused: bool) -> None:
    config = settings(263.8)
    query, key = QUERY_AND_KEY
    prompt = prompt_of(query, key, config, D**-0.5, fused=fused)
    layer = prompt.near.layer
    assert layer is not None
    assert layer.shape == (B, 3)
    for b in range(B):
        entropy, variance, kurtosis = naive_statistics(attention[b].tolist(), N - W)
        assert layer[b].tolist() == pytest.approx([entropy, variance, kurtosis], rel=1e-4)
        expected = entropy ** (1 / TAUS[0]) * variance ** (1 / TAUS[1]) * kurtosis ** (1 / TAUS[2])
        assert float(oq_score(layer, *TAUS)[b]) == pytest.approx(expected, rel=1e-4)
        assert score(prompt, config).oq[b] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("gamma, width", [(263.8108280337562, 5), (0.0, 5), (10.0, 1), (1e4, 7)])
def test_importance_is_the_formula(attention: torch.Tensor, gamma: float, width: int, fused: bool) -> None:
    config = settings(gamma, width)
    importance = importance_of(prompt_of(*QUERY_AND_KEY, config, D**-0.5, fused=fused), config)
    assert importance.shape == (B, H, N)
    assert importance.dtype == torch.float32
    for b in range(B):
        expected = torch.tensor(naive_importance(attention[b].tolist(), H, N - W, gamma, width))
        assert torch.allclose(importance[b, :, : N - W], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("width, max_width", [(5, 7), (1, 1), (3, 1)])
def test_mean_and_maximum_is_the_formula(attention: torch.Tensor, width: int, max_width: int, fused: bool) -> None:
    """Both pooled over neighbours, brought to the same sum over the evictable region, and averaged."""
    past, reach = N - W, max_width // 2
    config = settings(width=width, max_pool_width=max_width, importance="mean_max")
    importance = importance_of(prompt_of(*QUERY_AND_KEY, config, D**-0.5, fused=fused), config)
    for b in range(B):
        for h in range(H):
            columns = [[attention[b, h * 2 + g, w, n].item() for g in range(2) for w in range(W)] for n in range(past)]
            mean = naive_pool([sum(column) / len(column) for column in columns], width)
            top = [max(column) for column in columns]
            largest = [max(top[max(n - reach, 0) : n + reach + 1]) for n in range(past)]
            size = sum(mean) / sum(largest)
            expected = [(a + m * size) / 2 for a, m in zip(mean, largest, strict=True)]
            assert importance[b, h, :past].tolist() == pytest.approx(expected, rel=1e-4)


def test_sinks_take_no_part_in_the_scale(attention: torch.Tensor) -> None:
    """They get most of the attention, and never leave."""
    config = settings(max_pool_width=7, importance="mean_max")
    sinks = torch.zeros(B, H, N, dtype=torch.bool)
    sinks[..., :3] = True
    importance = importance_of(prompt_of(*QUERY_AND_KEY, config, D**-0.5, sinks=sinks), config)
    for b in range(B):
        for h in range(H):
            columns = attention[b, h * 2 : h * 2 + 2, :, : N - W].flatten(0, 1)
            mean = naive_pool(columns.mean(0).tolist(), 5)
            top = columns.amax(0).tolist()
            largest = [max(top[max(n - 3, 0) : n + 4]) for n in range(N - W)]
            size = sum(mean[3:]) / sum(largest[3:])
            expected = [(a + m * size) / 2 for a, m in zip(mean, largest, strict=True)]
            assert importance[b, h, : N - W].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("importance", ["mean_var", "mean_max"])
def test_values_count_by_their_norm(importance: str) -> None:
    value = random(B, H, N, D, seed=8)
    plain, weighted = (settings(importance=importance, value_norm=flag) for flag in (False, True))
    one, other = (
        importance_of(prompt_of(*QUERY_AND_KEY, config, D**-0.5, value=value), config) for config in (plain, weighted)
    )
    assert torch.allclose(other, one * value.norm(dim=-1), rtol=1e-6)


@pytest.mark.parametrize("importance", ["mean_var", "mean_max"])
def test_the_window_never_competes(attention: torch.Tensor, importance: str) -> None:
    """Neither the layer's statistics nor the importance of earlier tokens depend on attention inside the window."""
    config = settings(importance=importance)
    other = attention.clone()
    other[..., N - W :] = torch.rand(B, HQ, W, W, generator=torch.Generator().manual_seed(9))
    one, two = (of_attention(item, config) for item in (attention, other))
    assert one.near.layer is not None
    assert two.near.layer is not None
    assert torch.equal(one.near.layer, two.near.layer)
    first, second = score(one, config), score(two, config)
    assert first.oq == second.oq
    assert torch.equal(first.importance[..., : N - W], second.importance[..., : N - W])
    assert not torch.equal(first.importance, second.importance)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("importance", ["mean_var", "mean_max"])
def test_a_sample_scores_as_if_it_were_alone(importance: str, fused: bool) -> None:
    config = settings(importance=importance)
    together = prompt_of(*QUERY_AND_KEY, config, D**-0.5, fused=fused)
    for b in range(B):
        alone = prompt_of(*(item[b : b + 1] for item in QUERY_AND_KEY), config, D**-0.5, fused=fused)
        for whole, one in zip(together.near, alone.near, strict=True):
            assert torch.allclose(whole[b], one[0], rtol=1e-6)
        assert torch.allclose(importance_of(together, config)[b], importance_of(alone, config)[0], rtol=1e-6)
        assert score(together, config).oq[b] == pytest.approx(score(alone, config).oq[0], rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("importance", ["mean_var", "mean_max"])
def test_left_padding_changes_no_score(importance: str, fused: bool) -> None:
    config = settings(importance=importance)
    query, key = random(1, HQ, W, D, seed=1) * 2, random(1, H, N, D, seed=2)
    alone = score(prompt_of(query, key, config, fused=fused), config)
    padded_key = torch.cat([random(1, H, 7, D, seed=3), key], dim=2)
    padding = torch.arange(N + 7)[None] >= 7
    padded = score(prompt_of(query, padded_key, config, padding=padding, fused=fused), config)
    assert padded.oq == pytest.approx(alone.oq, rel=1e-5)
    assert torch.allclose(padded.importance[..., 7:], alone.importance, rtol=1e-5, atol=1e-9)
    assert (padded.importance[..., :7] == 0).all()


@pytest.mark.parametrize("importance, span", [("mean_var", None), ("mean_max", None), ("mean_max", 12)])
@pytest.mark.parametrize("length", [1, 3, W - 1])
def test_a_sample_shorter_than_the_window_scores_as_if_it_were_alone(
    importance: str, span: int | None, length: int
) -> None:
    """Beside a longer one, whose padding in the window would otherwise count as queries without attention."""
    config = settings(importance=importance, query_span=span)
    query, key = random(B, HQ, N, D, seed=1) * 2, random(B, H, N, D, seed=2)
    padding = torch.stack([torch.ones(N, dtype=torch.bool), torch.arange(N) >= N - length])
    together = score(prompt_of(query, key, config, padding=padding), config)
    whole = score(prompt_of(query[:1], key[:1], config), config)
    short = score(prompt_of(query[1:, :, N - length :], key[1:, :, N - length :], config), config)
    assert together.oq == pytest.approx([*whole.oq, *short.oq], rel=1e-5)
    assert together.oq[1] == 0
    assert torch.allclose(together.importance[0], whole.importance[0], rtol=1e-5)
    assert torch.allclose(together.importance[1, :, N - length :], short.importance[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("importance", ["mean_var", "mean_max"])
def test_places_without_a_token_change_no_score(importance: str) -> None:
    """A later block of tokens behind those that the cache still holds, of which heads may hold different numbers."""
    config = settings(importance=importance, query_span=9 if importance == "mean_max" else None)
    query, key = random(1, HQ, 9, D, seed=1) * 2, random(1, H, N, D, seed=2)
    alone = score(prompt_of(query, key, config, new=9, held=torch.ones(1, H, N - 9, dtype=torch.bool)), config)
    more = torch.cat([random(1, H, 4, D, seed=3), key], dim=2)
    held = (torch.arange(N + 4 - 9) >= 4).expand(1, H, -1)
    sinks = torch.zeros(1, H, N + 4, dtype=torch.bool)
    sinks[..., :4] = True
    gaps = score(prompt_of(query, more, config, new=9, held=held, sinks=sinks), config)
    assert gaps.oq == pytest.approx(alone.oq, rel=1e-5)
    assert torch.allclose(gaps.importance[..., 4:], alone.importance, rtol=1e-5, atol=1e-9)
    assert (gaps.importance[..., :4] == 0).all()
    # They see all that is held, and their own block causally.
    plain = score(prompt_of(query, key, config), config)
    assert torch.allclose(plain.importance, alone.importance, rtol=1e-5, atol=1e-9)


def test_uniform_attention_has_no_variance_and_a_finite_score() -> None:
    config = settings()
    prompt = of_attention(torch.full((1, HQ, W, N), 1.0 / N), config)
    assert prompt.near.layer is not None
    entropy, variance, _ = prompt.near.layer[0].tolist()
    assert variance == pytest.approx(0, abs=1e-12)
    assert entropy == pytest.approx(HQ * W * (N - W) * math.log(N) / N, rel=1e-4)
    assert score(prompt, config).oq == pytest.approx([0], abs=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_one_query_has_no_spread(fused: bool) -> None:
    query, key = random(1, HQ, 1, D), random(1, H, N, D)
    attention = window_attention(query, key, 1.0, causal_visibility(N, 1, None, query.device))
    config = settings(width=1, window_size=1)
    prompt = prompt_of(query, key, config, window=1, fused=fused)
    assert all(item is not None and item.isfinite().all() for item in prompt.near)
    assert prompt.near.layer is not None
    assert float(prompt.near.layer[0, 1]) == 0
    expected = attention.view(1, H, HQ // H, N).mean(2)
    assert torch.allclose(importance_of(prompt, config), expected, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("importance", ["mean_var", "mean_max"])
def test_without_an_evictable_region_the_score_is_zero(importance: str, fused: bool) -> None:
    query, key = random(B, HQ, W, D), random(B, H, W, D)
    config = settings(importance=importance)
    got = score(prompt_of(query, key, config, fused=fused), config)
    assert got.oq == [0.0] * B
    assert got.importance.shape == (B, H, W)
    assert got.importance.isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_span_of_queries_is_averaged_with_the_window(fused: bool) -> None:
    """Importances of the window's queries and of the span's, brought to the same sum over the evictable region."""
    config = settings(importance="mean_max", max_pool_width=7, query_span=13, query_stride=3, span_weight=0.5)
    past = N - W
    query, key = random(1, HQ, 13, D, seed=1) * 2, random(1, H, N, D, seed=2)
    seen = causal_visibility(N, 13, None, query.device)
    alone = settings(importance="mean_max", max_pool_width=7)
    near = importance_of(prompt_of(query, key, alone, D**-0.5, fused=fused), alone)
    few = slice(0, None, 3)
    far = window_attention(query[:, :, few], key, D**-0.5, seen[:, :, few])
    got = importance_of(prompt_of(query, key, config, D**-0.5, fused=fused), config)
    for h in range(H):
        columns = [[far[0, h * 2 + g, w, n].item() for g in range(2) for w in range(5)] for n in range(past)]
        mean = naive_pool([sum(column) / len(column) for column in columns], 5)
        top = [max(column) for column in columns]
        largest = [max(top[max(n - 3, 0) : n + 4]) for n in range(past)]
        size = sum(mean) / sum(largest)
        wide = [(a + m * size) / 2 for a, m in zip(mean, largest, strict=True)]
        size = float(near[0, h, :past].sum()) / sum(wide)
        expected = [(a + 0.5 * b * size) / 1.5 for a, b in zip(near[0, h, :past].tolist(), wide, strict=True)]
        assert got[0, h, :past].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("span", [6, 13, N])
def test_a_span_is_summed_up_as_if_its_attention_were_there(span: int, stride: int) -> None:
    """With the attention of the window's queries taken over, and the others in pieces."""
    query, key = random(B, HQ, span, D, seed=1) * 2, random(B, H, N, D, seed=2)
    few = slice((span - 1) % stride, None, stride)
    seen = causal_visibility(N, span, None, query.device)
    whole = window_attention(query, key, D**-0.5, seen)
    got = summarize_span(whole[:, :, -W:], query[:, :, few], key, D**-0.5, seen[:, :, few], stride)
    expected = summarize(whole[:, :, few], H, N - W)
    assert torch.allclose(got.mean, expected.mean, rtol=1e-5, atol=1e-8)
    assert torch.allclose(got.largest, expected.largest, rtol=1e-6)
    assert got.spread is None
    assert got.layer is None


def test_padding_in_the_span_changes_no_score() -> None:
    """Whatever the window's queries say."""
    config = settings(importance="mean_max", query_span=N + 7, query_stride=1)
    query, key = random(1, HQ, N, D, seed=1) * 2, random(1, H, N, D, seed=2)
    mean, largest = random(2, 1, H, N, seed=3).abs()
    whole = prompt_of(query, key, config)
    whole.near = Summary(mean, largest, None, None)
    alone = importance_of(whole, settings_without_oq(config))
    padded_query, padded_key = (torch.cat([random(1, x.shape[1], 7, D, seed=4), x], dim=2) for x in (query, key))
    behind = prompt_of(padded_query, padded_key, config, padding=torch.arange(N + 7)[None] >= 7)
    behind.near = Summary(*(torch.nn.functional.pad(item, (7, 0)) for item in (mean, largest)), None, None)
    padded = importance_of(behind, settings_without_oq(config))
    assert torch.allclose(padded[..., 7:], alone, rtol=1e-5, atol=1e-9)
    assert (padded[..., :7] == 0).all()


def settings_without_oq(config: CacheConfig) -> CacheConfig:
    return dataclasses.replace(config, original_share=0.5)


def test_what_a_scorer_gives_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number from 0 for every token."""

    class Given:
        moments = False
        importance = torch.zeros(B, H, N)

        def queries(self, config: CacheConfig) -> int:
            return config.window_size

        def __call__(self, prompt: Prompt, config: CacheConfig) -> torch.Tensor:
            return self.importance

    given, config = Given(), settings(importance="mean_max", original_share=0.5)
    monkeypatch.setitem(SCORERS, "mean_max", given)
    assert score(prompt_of(*QUERY_AND_KEY, config), config) == PromptScores(given.importance, [0.0, 0.0])
    for wrong, message in (
        (torch.zeros(B, HQ, N), "shape"),
        (torch.zeros(B, H, N - 1), "shape"),
        (torch.full((B, H, N), -1e-9), "negative"),
        (torch.full((B, H, N), float("nan")), "NaN"),
    ):
        given.importance = wrong
        with pytest.raises(ConfigError, match=rf"importance='mean_max'.*{message}"):
            score(prompt_of(*QUERY_AND_KEY, config), config)
