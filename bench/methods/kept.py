"""Caches of some of a prompt's tokens, at model precision.

Letters: ``H`` KV heads, ``n`` tokens kept, ``D`` head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from arkv.prefill import PrefillLayer
from bench.methods.prompt import Prompt


class KeptLayer(DynamicLayer):
    """Some tokens of a layer, at model precision. Positions go on counting the tokens seen.

    Args:
        keys: [1, H, n, D].
        values: same shape.
        seen: how many tokens have been seen.
        positions: gives those of the tokens kept, [H, n] in their order, or None where nobody knows. A function, since
            they are no part of what a cache stores: only who looks at a cache asks for them.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        seen: int,
        positions: Callable[[], torch.Tensor | None] = lambda: None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.removed = seen - keys.shape[-2]
        self.positions = positions

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return super().get_seq_length() + self.removed

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:  # type: ignore[override]
        """Tokens attended to, and how many positions before them are gone.

        transformers 5.2 passes the positions of the queries, later versions their number.
        """
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return super().get_seq_length() + new, self.removed


def _itself(positions: torch.Tensor) -> torch.Tensor:
    return positions


def keep_tokens(prompt: Prompt, kept: Sequence[torch.Tensor]) -> Cache:
    """A cache of some of the prompt's tokens, at model precision and in their order.

    Args:
        kept: for each of :attr:`Prompt.layers` the indices of the tokens that stay, [n] for all KV heads or [H, n] for
            each. Layers with a sliding window stay as they are.

    Raises:
        ValueError: not one tensor of indices per layer, or an index twice.
    """
    if len(kept) != len(prompt.layers):
        raise ValueError(f"indices for {len(kept)} layers, but {len(prompt.layers)} layers have full attention")
    rest = iter(kept)
    layers: list[Any] = []
    for layer in prompt.cache.layers:
        if not isinstance(layer, PrefillLayer):
            # Stock layers replace their tensors and never write into them.
            layers.append(copy.copy(layer))
            continue
        keys, values = layer.states()
        order = next(rest).to(keys.device).expand(keys.shape[1], -1).sort(dim=-1).values
        if bool((order[:, 1:] == order[:, :-1]).any()):
            raise ValueError("a token is to be kept twice")
        # Gathered: a slice would hold on to all tokens.
        index = order[None, :, :, None]
        gathered = [states.gather(2, index.expand(-1, -1, -1, states.shape[3])) for states in (keys, values)]
        layers.append(KeptLayer(gathered[0], gathered[1], prompt.tokens, partial(_itself, order)))
    return Cache(layers=layers)
