"""Importance ``replay``: the largest attention that a token gets while the prompt is read a second time, by
:func:`arkv.replay` (KVzip, arXiv 2505.23416). Behind the prompt it is the largest that new queries give."""

from __future__ import annotations

import torch

from arkv.config import ConfigError, ScoreSettings
from arkv.scores.prompt import Prompt


class Replay:
    """See the module."""

    moments = False
    settings: tuple[str, ...] = ()

    def queries(self, settings: ScoreSettings) -> int:
        """Newest queries of a block behind the prompt that it looks at."""
        return settings.window_size

    def __call__(self, prompt: Prompt, settings: ScoreSettings) -> torch.Tensor:
        """Importance [B, H, N] of what a block behind a prompt says: higher stays longer.

        Raises:
            ConfigError: the prompt has not been read again.
        """
        if prompt.new == prompt.key.shape[2]:
            raise ConfigError(
                "importance='replay' needs a prompt that has been read twice: read it into a PrefillCache, then "
                "arkv.replay(model, ids, prefill, config), then TriStateCache.from_prefill(prefill, config)"
            )
        return prompt.only_tokens(prompt.near.largest)
