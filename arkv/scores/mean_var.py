r"""Importance ``mean_var``, the published one (ARKV, arXiv 2603.08727)::

    hh = avg_pool1d(mean_g(mean_q(P) + gamma Var_q(P)), 5)                          [B, H, N - W]

where q runs over the window's queries and g over the query heads of a KV head.
"""

from __future__ import annotations

import torch

from arkv.config import ScoreSettings
from arkv.scores.pooling import average, by_region
from arkv.scores.prompt import Prompt


class MeanVar:
    """See the module."""

    moments = True
    settings: tuple[str, ...] = ("gamma", "pool_width")

    def queries(self, settings: ScoreSettings) -> int:
        """Newest queries of a prompt that it looks at."""
        return settings.window_size

    def __call__(self, prompt: Prompt, settings: ScoreSettings) -> torch.Tensor:
        """Importance [B, H, N]: higher stays longer; the window's part counts once its tokens leave it."""
        near = prompt.near
        assert near.spread is not None
        importance = by_region(near.mean + settings.gamma * near.spread, prompt.past, average, settings.pool_width)
        # Pooling spreads attention onto neighbouring padding, where nothing is.
        return prompt.only_tokens(importance)
