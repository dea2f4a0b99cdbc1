"""Importance ``mean_max``: the mean of ``avg_pool1d(mean_gq(P), 5)`` and ``max_pool1d(max_gq(P), 15)``, scaled to the
same sum per head. A token that one query of one head needs badly counts like one that all use a little.

What a longer span of queries says (``query_span``) may be added with less weight: the window's queries tell what is
asked for now, older ones what a text like this needs again.
"""

from __future__ import annotations

import torch

from arkv.config import ScoreSettings
from arkv.scores.attention import Summary
from arkv.scores.pooling import average, by_region, maximum
from arkv.scores.prompt import Prompt


class MeanMax:
    """See the module."""

    moments = False
    settings: tuple[str, ...] = ("pool_width", "max_pool_width", "query_span", "query_stride", "span_weight")

    def queries(self, settings: ScoreSettings) -> int:
        """Newest queries of a prompt that it looks at."""
        return max(settings.window_size, settings.query_span or 0)

    def __call__(self, prompt: Prompt, settings: ScoreSettings) -> torch.Tensor:
        """Importance [B, H, N]: higher stays longer; the window's part counts once its tokens leave it."""
        importance = self._of(prompt.near, prompt, settings)
        span = min(self.queries(settings), prompt.new)
        if span <= prompt.window:
            return importance
        longer = self._of(prompt.far(span, settings.query_stride), prompt, settings)
        both = weighted(importance, longer, settings.span_weight, prompt)
        if prompt.padding is None:
            return both
        # A sample that is no longer than the window has no older queries, though others of its batch have.
        has_older = prompt.padding.sum(dim=1) > prompt.window
        return torch.where(has_older[:, None, None], both, importance)

    @staticmethod
    def _of(summary: Summary, prompt: Prompt, settings: ScoreSettings) -> torch.Tensor:
        mean = by_region(summary.mean, prompt.past, average, settings.pool_width)
        largest = by_region(summary.largest, prompt.past, maximum, settings.max_pool_width)
        return weighted(prompt.only_tokens(mean), prompt.only_tokens(largest), 1.0, prompt)


def weighted(one: torch.Tensor, other: torch.Tensor, weight: float, prompt: Prompt) -> torch.Tensor:
    """Mean of two scores [B, H, N], the other one weighted, once their sums over the tokens that compete are the same.

    Attention sinks, which get most of the attention and never leave, would otherwise set the scale.
    """
    sinks = prompt.sinks[..., : prompt.past]
    mine, others = (score[..., : prompt.past].masked_fill(sinks, 0.0) for score in (one, other))
    size = mine.sum(dim=-1, keepdim=True) / others.sum(dim=-1, keepdim=True)
    # Without an evictable region there is nothing to scale by.
    return (one + other * (weight * size.nan_to_num(1.0, posinf=1.0))) / (1 + weight)
