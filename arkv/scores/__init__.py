"""Scores of a prompt: the importance of its tokens, one file per kind, and the OQ score of a layer.

A scorer is a class as in :mod:`arkv.scores.mean_var`: it sees a :class:`~arkv.scores.prompt.Prompt` and gives an
importance [B, H, N] that is not negative. ``SCORERS`` has them by the name that ``CacheConfig.importance`` takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from arkv.config import CacheConfig, ConfigError, ScoreSettings
from arkv.scores.mean_max import MeanMax
from arkv.scores.mean_var import MeanVar
from arkv.scores.oq import oq_ratios, oq_score
from arkv.scores.prompt import Prompt
from arkv.scores.replay import Replay


class Scorer(Protocol):
    """How important each token of a prompt is."""

    moments: bool
    """Whether it needs the variance over the window's queries."""
    settings: tuple[str, ...]
    """The fields of ``CacheConfig`` that its numbers depend on, beside ``window_size`` and ``n_sink``."""

    def queries(self, settings: ScoreSettings) -> int:
        """Newest queries of a prompt that it looks at."""

    def __call__(self, prompt: Prompt, settings: ScoreSettings) -> torch.Tensor:
        """Importance [B, H, N], not negative; higher stays longer."""


SCORERS: dict[str, Scorer] = {"mean_var": MeanVar(), "mean_max": MeanMax(), "replay": Replay()}


class PromptScores(NamedTuple):
    """What a layer makes of a prompt before it decides what stays."""

    importance: torch.Tensor
    """Of every token, [B, H, N] float32."""
    oq: list[float]
    """OQ score of the layer for each sample."""
    stream: Sequence[float] = ()
    """Norm of the hidden states that the layer reads, for each sample; none where it is not known."""


def recorded_queries(config: CacheConfig) -> int:
    """Newest queries of a prompt that the scores are taken from."""
    settings = config.scoring
    return config.window_size if settings is None else SCORERS[settings.importance].queries(settings)


def needs_moments(settings: ScoreSettings) -> bool:
    """Whether anything depends on the variance of attention over the queries."""
    return settings.uses_oq or SCORERS[settings.importance].moments


def score(prompt: Prompt, settings: ScoreSettings) -> PromptScores:
    """Importance and OQ score by the attention of the prompt's newest queries.

    Raises:
        ConfigError: a scorer gave something else than one number from 0 for every token.
    """
    real = None if prompt.padding is None else prompt.padding[:, -prompt.window :].sum(dim=1).clamp_min(1)
    if real is not None and int(real.min()) < prompt.window:
        # A sample that is shorter than the window has the scores that it would have alone.
        alone = [score(prompt.sample(b, int(count)), settings) for b, count in enumerate(real.tolist())]
        return PromptScores(torch.cat([one.importance for one in alone]), [one.oq[0] for one in alone])
    importance = SCORERS[settings.importance](prompt, settings)
    if importance.shape != prompt.key.shape[:3]:
        raise ConfigError(
            f"importance={settings.importance!r}: the scorer gave numbers of shape {tuple(importance.shape)}, "
            f"not {tuple(prompt.key.shape[:3])}: one for every sample, KV head and token"
        )
    if settings.value_norm:
        importance = importance * prompt.value.float().norm(dim=-1)
    # One look at the device, for both.
    if not bool((importance >= 0).all()):
        raise ConfigError(f"importance={settings.importance!r}: the scorer gave a number that is negative or NaN")
    oq = [0.0] * importance.shape[0]
    if settings.uses_oq:
        layer = prompt.near.layer
        assert layer is not None
        oq = oq_score(layer, settings.tau1, settings.tau2, settings.tau3).tolist()
    return PromptScores(importance.float(), oq)


__all__ = [
    "SCORERS",
    "Prompt",
    "PromptScores",
    "Scorer",
    "needs_moments",
    "oq_ratios",
    "oq_score",
    "recorded_queries",
    "score",
]
