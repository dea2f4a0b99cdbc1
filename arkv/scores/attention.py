"""The attention that a prompt's newest queries give to its keys, and what of it scores are made of.

Letters: ``B`` batch, ``Hq`` query heads, ``H`` KV heads, ``G = Hq / H``, ``N`` keys, ``W`` window, ``D`` head dim.

With the last ``W`` queries (ARKV, arXiv 2603.08727)::

    A = softmax(Q_W K^T / sqrt(D)), causal                                          [B, Hq, W, N]
    P = A[..., : N - W]                          the window never competes
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MIN_SECOND_MOMENT = 1e-8
"""``m2`` is held above this, as in the setting that the published taus were fitted to."""

TINY = torch.finfo(torch.float32).tiny


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


def summarize(attention: torch.Tensor, heads: int, past: int, moments: bool = False) -> Summary:
    """The summary of :func:`window_attention` [B, Hq, W, N].

    Args:
        heads: number of KV heads H.
        past: tokens, from the first on, that the statistics of the layer are of.
        moments: whether variances and the statistics of the layer are wanted.
    """
    window = attention.shape[2]
    grouped = attention.unflatten(1, (heads, -1))
    mean = attention.mean(dim=2)
    mean_of_group = mean.unflatten(1, (heads, -1)).mean(dim=2)
    largest = grouped.amax(dim=(2, 3))
    if not moments:
        return Summary(mean_of_group, largest, None, None)
    # Central moments in passes of their own: torch.var_mean over this dimension takes 20 times as long on CPU.
    deviation = (attention - mean.unsqueeze(2)).square_()
    m2 = deviation.mean(dim=2)
    # The unbiased variance; a single query has no spread.
    variance = m2 * (window / max(window - 1, 1))
    spread = variance.unflatten(1, (heads, -1)).mean(dim=2)
    m4 = deviation.square_()[..., :past].mean(dim=2)
    m2 = m2[..., :past].clamp_min(MIN_SECOND_MOMENT)
    # p log p by hand likewise; a probability of 0 gives 0 * log(tiny) = 0.
    surprise = torch.clamp(attention, min=TINY, out=deviation).log_().mul_(attention)
    entropy = -surprise[..., :past].sum(dim=(1, 2, 3))
    layer = torch.stack([entropy, variance[..., :past].sum(dim=(1, 2)), (m4 / (m2 * m2)).sum(dim=(1, 2))], dim=-1)
    return Summary(mean_of_group, largest, spread, layer)


def summarize_span(
    attention: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    visible: torch.Tensor,
    stride: int,
) -> Summary:
    """The same of a longer span of queries, without moments.

    Args:
        attention: of the window's queries, [B, Hq, W, N].
        query: every ``stride``-th of the span's queries after RoPE, the newest among them, [B, Hq, Q, D]; those
            that see nothing (padding) do not count.
        key, scaling, visible: as for :func:`window_attention`.
    """
    batch, heads, length, _ = key.shape
    window = attention.shape[2]
    # The newest of them are the window's.
    inside = attention[:, :, (window - 1) % stride :: stride]
    older = query.shape[2] - inside.shape[2]
    inside = inside.unflatten(1, (heads, -1))
    total, largest = inside.sum(dim=(2, 3)), inside.amax(dim=(2, 3))
    # No more attention at a time than that of the window's queries: it sets the peak of memory.
    for start in range(0, older, window):
        few = slice(start, min(start + window, older))
        outside = window_attention(query[:, :, few], key, scaling, visible[:, :, few]).view(batch, heads, -1, length)
        total += outside.sum(dim=2)
        largest = torch.maximum(largest, outside.amax(dim=2))
    real = visible.any(dim=-1).sum(dim=-1, keepdim=True).clamp_min(1) * (query.shape[1] // heads)
    return Summary(total / real, largest, None, None)
