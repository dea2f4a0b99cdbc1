"""The stock full cache: everything at model precision, the baseline."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from bench.methods.base import Method, Sizes
from bench.methods.prompt import Asked, Budget, Prompt
from bench.names import DESCRIPTIONS, FULL


class Full(Method):
    """A stock transformers cache. It is read with the model's own attention function, as without this suite."""

    name = FULL
    description = DESCRIPTIONS[FULL]
    has_budget = False
    queries = 1

    def compress(self, model: PreTrainedModel, prompt: Prompt, budget: Budget) -> Cache:
        """A copy of the whole prompt."""
        return prompt.cache.to_dynamic()

    def empty(self, model: PreTrainedModel) -> Cache:
        """A cache without a context."""
        return DynamicCache(config=model.config)

    def prefill(self, model: PreTrainedModel, ids: torch.Tensor, asked: Asked) -> tuple[Cache, torch.Tensor]:
        """Read a prompt [1, N] as the model does by itself."""
        cache = self.empty(model)
        return cache, model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    def planned_bytes(self, sizes: Sizes, tokens: int, asked: Asked) -> int | None:
        """Of all tokens."""
        return sizes.full_bytes(tokens)

    def settings(self) -> dict[str, Any] | None:
        """There is nothing to be set."""
        return {}
