r"""What the attention of the prompt's last queries says: the OQ score of a layer, the importance of its tokens.

Letters: ``B`` batch, ``Hq`` query heads, ``H`` KV heads, ``G = Hq / H``, ``N`` prompt tokens, ``W`` window, ``D`` head
dim. With the last ``W`` queries (ARKV, arXiv 2603.08727)::

    A        = softmax(Q_W K^T / sqrt(D)), causal                                   [B, Hq, W, N]
    P        = A[..., : N - W]                   the window never competes
    entropy  = -sum P log P                      over query heads, window queries and keys
    variance = sum Var_q(P)                      over the window queries, summed over query heads and keys
    kurtosis = sum m4_q(P) / m2_q(P)^2           central moments over the window queries, summed likewise
    OQ       = entropy^(1/tau1) variance^(1/tau2) kurtosis^(1/tau3)                 [B]
    hh       = avg_pool1d(mean_g(mean_q(P) + gamma Var_q(P)), 5)                    [B, H, N - W]

The alternative importance ``mean_max`` is the mean of ``avg_pool1d(mean_gq(P), 5)`` and ``max_pool1d(max_gq(P), 15)``,
scaled to the same sum per head: a token that one query of one head needs badly counts like one that all use a little.
What a longer span of queries says (``query_span``) may be added with less weight: the window's queries tell what is
asked for now, older ones what a text like this needs again.

Variances are the unbiased ones and ``m2`` is held above 1e-8, as in the setting that the published taus were fitted to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from arkv.config import CacheConfig

MIN_SECOND_MOMENT = 1e-8
TINY = torch.finfo(torch.float32).tiny


class PrefillStatistics(NamedTuple):
    """``importance`` [B, H, N] (higher stays longer; the window's part counts once its tokens leave it) and the layer
    statistics ``entropy``, ``variance``, ``kurtosis`` [B], zero where the method does not use them."""

    importance: torch.Tensor
    entropy: torch.Tensor
    variance: torch.Tensor
    kurtosis: torch.Tensor

    def oq_score(self, tau1: float, tau2: float, tau3: float) -> torch.Tensor:
        """OQ score of the layer for each sample, [B]; 0 where there is no evictable region."""
        return (
            self.entropy.clamp_min(0) ** (1 / tau1)
            * self.variance.clamp_min(0) ** (1 / tau2)
            * self.kurtosis.clamp_min(0) ** (1 / tau3)
        )


class Summary(NamedTuple):
    """What the keys of a layer get from a number of queries."""

    mean: torch.Tensor
    """Attention, mean over the queries and the query heads of a KV head, [B, H, N] like the next two."""
    largest: torch.Tensor
    """The largest attention."""
    spread: torch.Tensor | None
    """Variance over the queries, mean over the query heads; None where it is not wanted."""
    layer: torch.Tensor | None
    """Entropy, variance and kurtosis of the layer, [B, 3]; None where they are not wanted."""


def causal_visibility(length: int, window: int, padding: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Which keys the last ``window`` of ``length`` tokens may see: bool [1 or B, 1, W, N].

    Args:
        padding: [B, N], False where a token is padding.
    """
    index = torch.arange(length, device=device)
    visible = (index[None, :] <= index[length - window :, None])[None, None]
    if padding is not None:
        visible = visible & padding[:, None, None, :] & padding[:, None, length - window :, None]
    return visible


def window_attention(query: torch.Tensor, key: torch.Tensor, scaling: float, visible: torch.Tensor) -> torch.Tensor:
    """Attention of the last W queries over all keys.

    Args:
        query: the last W queries after RoPE, [B, Hq, W, D].
        key: all keys, [B, H, N, D].
        scaling: factor of the logits, usually ``1 / sqrt(D)``.
        visible: bool, broadcastable to [B, H, W, n]: which of the newest n keys a query may see; it sees all others.

    Returns:
        Probabilities [B, Hq, W, N] in float32; a query that sees nothing (padding) has a row of zeros.
    """
    batch, query_heads, window, dim = query.shape
    heads, length = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, heads, query_heads // heads * window, dim)
    logits = (grouped.float() * scaling) @ key.float().transpose(-1, -2)
    logits = logits.view(batch, heads, query_heads // heads, window, length)
    newest = slice(length - visible.shape[-1], None)
    hidden = ~visible.unsqueeze(2)
    # Lowest number instead of -inf: the softmax of a row that sees nothing must not become NaN.
    logits[..., newest].masked_fill_(hidden, torch.finfo(torch.float32).min)
    # In place: at long context a fresh tensor of this size costs more than the softmax itself.
    probabilities = torch.softmax(logits, dim=-1, out=logits)
    probabilities[..., newest].masked_fill_(hidden, 0.0)
    return probabilities.view(batch, query_heads, window, length)


def pool(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Average pooling over neighbouring tokens, [..., S]; beyond the ends counts as zero."""
    if width == 1 or scores.shape[-1] == 0:
        return scores
    # A sum of shifted views takes a fourth of the time of avg_pool1d on CPU.
    count = scores.shape[-1]
    padded = F.pad(scores, (width // 2, width // 2))
    total = padded[..., :count] + padded[..., 1 : 1 + count]
    for shift in range(2, width):
        total += padded[..., shift : shift + count]
    return total.mul_(1.0 / width)


def max_pool(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Maximum over neighbouring tokens, [..., S]."""
    if width == 1 or scores.shape[-1] == 0:
        return scores
    flat = scores.reshape(-1, 1, scores.shape[-1])
    return F.max_pool1d(flat, width, stride=1, padding=width // 2).view(scores.shape)


def prefill_statistics(
    attention: torch.Tensor,
    heads: int,
    config: CacheConfig,
    visible: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> PrefillStatistics:
    """Layer statistics and token importance from :func:`window_attention`.

    Args:
        attention: [B, Hq, W, N].
        heads: number of KV heads H.
        config: how importance is scored.
        visible: as for :func:`window_attention`. A query that sees nothing (padding) does not count, so that a sample
            that is shorter than the window has the scores that it would have alone. None: wherever there is attention.
        sinks: bool [B, H, N], True for tokens that stay whatever their score, which takes no part in its scale. None:
            there are none.
    """
    if visible is None:
        visible = attention.unflatten(1, (heads, -1)).amax(dim=2) > 0
    if sinks is None:
        sinks = torch.zeros(attention.shape[0], 1, attention.shape[3], dtype=torch.bool, device=attention.device)
    real = visible.any(dim=-1)[:, 0].sum(dim=-1).clamp_min(1).tolist()
    if min(real) < attention.shape[2]:
        alone = [
            _statistics(attention[b : b + 1, :, -n:], heads, config, visible[b : b + 1, :, -n:], sinks[b : b + 1])
            for b, n in enumerate(int(count) for count in real)
        ]
        return PrefillStatistics(*(torch.cat(parts) for parts in zip(*alone, strict=True)))
    return _statistics(attention, heads, config, visible, sinks)


def _statistics(
    attention: torch.Tensor, heads: int, config: CacheConfig, visible: torch.Tensor, sinks: torch.Tensor
) -> PrefillStatistics:
    """:func:`prefill_statistics` of samples whose queries are all real."""
    past = attention.shape[3] - attention.shape[2]
    return judge(summarize(attention, heads, past, config), ~visible.any(dim=2), sinks[..., :past], config)


def summarize(attention: torch.Tensor, heads: int, past: int, config: CacheConfig) -> Summary:
    """The summary of :func:`window_attention` [B, Hq, W, N], as far as ``config`` has a use for it.

    Args:
        heads: number of KV heads H.
        past: tokens, from the first on, that the statistics of the layer are of.
    """
    window = attention.shape[2]
    grouped = attention.unflatten(1, (heads, -1))
    mean = attention.mean(dim=2)
    mean_of_group = mean.unflatten(1, (heads, -1)).mean(dim=2)
    largest = mean_of_group if config.importance == "mean_var" else grouped.amax(dim=(2, 3))
    if not needs_moments(config):
        return Summary(mean_of_group, largest, None, None)
    # Central moments in passes of their own: torch.var_mean over this dimension takes 20 times as long on CPU.
    deviation = (attention - mean.unsqueeze(2)).square_()
    m2 = deviation.mean(dim=2)
    # A single query has no spread.
    variance = m2 * (window / max(window - 1, 1))
    spread = variance.unflatten(1, (heads, -1)).mean(dim=2)
    if not config.uses_oq:
        return Summary(mean_of_group, largest, spread, None)
    m4 = deviation.square_()[..., :past].mean(dim=2)
    m2 = m2[..., :past].clamp_min(MIN_SECOND_MOMENT)
    # p log p by hand likewise; a probability of 0 gives 0 * log(tiny) = 0.
    surprise = torch.clamp(attention, min=TINY, out=deviation).log_().mul_(attention)
    entropy = -surprise[..., :past].sum(dim=(1, 2, 3))
    layer = torch.stack([entropy, variance[..., :past].sum(dim=(1, 2)), (m4 / (m2 * m2)).sum(dim=(1, 2))], dim=-1)
    return Summary(mean_of_group, largest, spread, layer)


def needs_moments(config: CacheConfig) -> bool:
    """Whether anything depends on the variance of attention over the queries."""
    return config.uses_oq or config.importance == "mean_var"


def judge(summary: Summary, nothing: torch.Tensor, sinks: torch.Tensor, config: CacheConfig) -> PrefillStatistics:
    """Layer statistics and token importance from what the window's queries see.

    Args:
        nothing: bool, [B, 1 or H, n]: which of the newest n slots hold no token.
        sinks: bool, [B, 1 or H, N - W]: tokens before the window that stay whatever their score.
    """
    past = sinks.shape[-1]
    if config.importance == "mean_var":
        assert summary.spread is not None
        importance = _pool_parts(summary.mean + config.gamma * summary.spread, past, pool, config.pool_width)
        # Pooling spreads attention onto neighbouring padding and empty slots, where nothing is.
        importance[..., importance.shape[-1] - nothing.shape[-1] :].masked_fill_(nothing, 0.0)
    else:
        importance = _mean_max(summary, nothing, sinks, config)
    unused = torch.zeros(importance.shape[0], 3, device=importance.device)
    layer = summary.layer if config.uses_oq and summary.layer is not None else unused
    return PrefillStatistics(importance, *layer.unbind(dim=-1))


def _mean_max(summary: Summary, nothing: torch.Tensor, sinks: torch.Tensor, config: CacheConfig) -> torch.Tensor:
    """Importance ``mean_max`` [B, H, N]; ``nothing`` and ``sinks`` as for :func:`judge`."""
    past = sinks.shape[-1]
    average = _pool_parts(summary.mean, past, pool, config.pool_width)
    largest = _pool_parts(summary.largest, past, max_pool, config.max_pool_width)
    for part in (average, largest):
        part[..., part.shape[-1] - nothing.shape[-1] :].masked_fill_(nothing, 0.0)
    return _weighted(average, largest, 1.0, sinks)


def _weighted(one: torch.Tensor, other: torch.Tensor, weight: float, sinks: torch.Tensor) -> torch.Tensor:
    """Mean of two scores [B, H, N], the other one weighted, once their sums over the tokens that compete are the same.

    Attention sinks, which get most of the attention and never leave, would otherwise set the scale.
    """
    mine, others = (score[..., : sinks.shape[-1]].masked_fill(sinks, 0.0) for score in (one, other))
    size = mine.sum(dim=-1, keepdim=True) / others.sum(dim=-1, keepdim=True)
    # Without an evictable region there is nothing to scale by.
    return (one + other * (weight * size.nan_to_num(1.0, posinf=1.0))) / (1 + weight)


def summarize_span(
    attention: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    visible: torch.Tensor,
    config: CacheConfig,
) -> Summary:
    """The same of a longer span of queries, without moments.

    Args:
        attention: of the window's queries, [B, Hq, W, N].
        query: every ``query_stride``-th of the span's queries after RoPE, the newest among them, [B, Hq, Q, D]; those
            that see nothing (padding) do not count.
        key, scaling, visible: as for :func:`window_attention`.
    """
    batch, heads, length, _ = key.shape
    window = attention.shape[2]
    # The newest of them are the window's.
    inside = attention[:, :, (window - 1) % config.query_stride :: config.query_stride]
    older = query.shape[2] - inside.shape[2]
    inside = inside.unflatten(1, (heads, -1))
    total, largest = inside.sum(dim=(2, 3)), inside.amax(dim=(2, 3))
    # No more attention at a time than that of the window's queries: it sets the peak of memory.
    for few, seen in zip(
        query[:, :, :older].split(window, dim=2), visible[:, :, :older].split(window, dim=2), strict=True
    ):
        outside = window_attention(few, key, scaling, seen).view(batch, heads, -1, length)
        total += outside.sum(dim=2)
        largest = torch.maximum(largest, outside.amax(dim=2))
    real = visible.any(dim=-1).sum(dim=-1, keepdim=True).clamp_min(1) * (query.shape[1] // heads)
    return Summary(total / real, largest, None, None)


def with_span(
    importance: torch.Tensor, span: Summary, nothing: torch.Tensor, sinks: torch.Tensor, config: CacheConfig
) -> torch.Tensor:
    """``importance`` [B, H, N] of the window's queries, and with less weight that of a longer span of them.

    Args:
        nothing, sinks: as for :func:`judge`.
    """
    return _weighted(importance, _mean_max(span, nothing, sinks, config), config.span_weight, sinks)


def _pool_parts(
    scores: torch.Tensor, past: int, function: Callable[[torch.Tensor, int], torch.Tensor], width: int
) -> torch.Tensor:
    """Pool the evictable region and the window each for itself: the window's scores count once its tokens leave it."""
    return torch.cat([function(scores[..., :past], width), function(scores[..., past:], width)], dim=-1)


def update_scores(
    scores: list[torch.Tensor], newest: list[torch.Tensor], config: CacheConfig, steps: int, finite: bool
) -> None:
    """Bring stored scores up to date, in place, with the attention that ``steps`` new queries gave.

    Args:
        scores, newest: lists of tensors of the same shapes.
        finite: no score is infinite. Infinite ones mark sinks, empty and closed slots, and stay.
    """
    keep = (1.0 - config.decode_rate) ** steps if config.decode_importance == "mean" else 0.0
    # Of less than that float32 makes 0, and infinity times 0 is no number: then nothing of the old scores is left.
    if keep >= TINY:
        torch._foreach_mul_(scores, keep)
        torch._foreach_add_(scores, newest, alpha=1.0 - keep)
        return
    if not finite:
        newest = [torch.where(score.isinf(), score, new) for score, new in zip(scores, newest, strict=True)]
    torch._foreach_copy_(scores, newest)
