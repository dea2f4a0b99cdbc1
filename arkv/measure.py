"""What a forward of several tokens says of all tokens: the importance of the new ones, and newer scores of those held.

Letters: ``B`` batch, ``H`` KV heads, ``n = B * H`` rows of a layer, ``T`` new tokens, ``m`` held ones, ``D`` head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arkv.config import CacheConfig
from arkv.parts import InOrder, padded
from arkv.pools import Part
from arkv.scores import Prompt, PromptScores, needs_moments, score


def score_forward(
    key: torch.Tensor,
    value: torch.Tensor,
    query: torch.Tensor,
    scaling: float,
    padding: torch.Tensor | None,
    stored: InOrder | None,
    position: torch.Tensor,
    padded_before: Sequence[int],
    config: CacheConfig,
) -> PromptScores:
    """Scores of all tokens, those held first, in sequence order.

    Args:
        key, value: of the new tokens, [B, H, T, D].
        query: the newest queries, as for :class:`~arkv.scores.prompt.Prompt`.
        padding: bool [B, T], False where a new token is padding; None: none is.
        stored: the tokens held.
        position: of the new tokens, [B, H, T] int64.
        padded_before: padding before the first token of every sample.
    """
    batch, length, held = key.shape[0], key.shape[2], None
    if stored is not None:
        position, held = torch.cat([stored.position, position], dim=2), stored.position >= 0
        key, value = torch.cat([stored.key, key], dim=2), torch.cat([stored.value, value], dim=2)
    settings = config.scoring
    if settings is None:
        # By age.
        return PromptScores(position.clamp_min(0).float(), [0.0] * batch)
    first = torch.tensor(padded_before, device=key.device)[:, None, None]
    prompt = Prompt(
        query,
        key,
        value,
        new=length,
        window=settings.window_size,
        scaling=scaling,
        # Padding, and places without a token, are counted among the sinks: they do not compete.
        sinks=position < first + settings.n_sink,
        moments=needs_moments(settings),
        held=held,
        padding=padding,
        fused=settings.attention == "fused",
    )
    return score(prompt, settings)


def update_scores(part: Part, importance: torch.Tensor, order: torch.Tensor, steps: int, config: CacheConfig) -> None:
    """Bring the scores of the tokens that ``part`` holds up to date, in place, with the attention of ``steps`` new
    queries.

    Args:
        importance: [n, m], in sequence order.
        order: as in :class:`~arkv.parts.InOrder`, [n, m].
    """
    if config.ranking == "recency":
        return
    by_place = torch.empty_like(importance).scatter_(1, order, importance)
    keep = 0.0 if config.decode_importance == "latest" else (1.0 - config.decode_rate) ** steps
    place = 0
    for number, pool in enumerate(part.pools):
        taken = padded(part, number).taken
        newest = by_place[:, place : place + taken.shape[1]][taken]
        pool.score.mul_(keep)
        if config.decode_importance == "largest":
            torch.maximum(pool.score, newest, out=pool.score)
        else:
            pool.score.add_(newest, alpha=1.0 - keep)
        place += taken.shape[1]
