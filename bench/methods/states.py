"""Which state every token has in a cache, layer by layer and KV head by KV head.

Letters: ``H`` KV heads, ``N`` tokens seen, ``n`` tokens held.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from arkv.layer import TriStateLayer
from bench.methods.kept import KeptLayer

EVICTED, QUANTIZED, ORIGINAL = 0, 1, 2
"""Codes of the states in tensors."""


def state_codes(cache: Cache) -> dict[int, torch.Tensor] | None:
    """State of every token seen, int8 [H, N], by the place of each layer that can be compressed.

    None where a layer does not know which tokens it holds.
    """
    found = {}
    for place, layer in enumerate(cache.layers):
        if not getattr(layer, "is_sliding", False):
            codes = layer_codes(layer)
            if codes is None:
                return None
            found[place] = codes
    return found


def layer_codes(layer: Any) -> torch.Tensor | None:
    """State of every token that a layer has seen, int8 [H, N]; None where it does not know which tokens it holds."""
    if isinstance(layer, TriStateLayer):
        states = layer.states()
        return place_codes(states.position, torch.where(states.quantized, QUANTIZED, ORIGINAL), layer.get_seq_length())
    if isinstance(layer, KeptLayer):
        positions = layer.positions()
        if positions is None:
            return None
        # Tokens that came later follow one another.
        seen, held = layer.get_seq_length(), layer.get_seq_length() - layer.removed
        first = seen - (held - positions.shape[1])
        later = torch.arange(first, seen, device=positions.device).expand(positions.shape[0], -1)
        positions = torch.cat([positions, later], dim=1)
        return place_codes(positions, torch.full_like(positions, ORIGINAL), seen)
    if type(layer) is DynamicLayer and layer.keys is not None:
        return torch.full((layer.keys.shape[1], layer.keys.shape[2]), ORIGINAL, dtype=torch.int8)
    return None


def place_codes(positions: torch.Tensor, codes: torch.Tensor, seen: int) -> torch.Tensor:
    """Put ``codes`` [H, n] of the tokens held at their ``positions`` among the tokens seen, int8 [H, N] on the CPU.

    A position outside of them is that of a slot without a token.
    """
    # One place more, at the end, for such slots.
    found = torch.full((positions.shape[0], seen + 1), EVICTED, dtype=torch.int8)
    found.scatter_(1, positions.long().remainder(seen + 1).cpu(), codes.to(torch.int8).cpu())
    return found[:, :-1]
