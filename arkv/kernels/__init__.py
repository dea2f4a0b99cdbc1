"""Kernels: on GPUs decode attention by Triton, imported by need; on CPUs, where they have been built, decode attention,
the scoring of prompts and quantizing in C."""

from __future__ import annotations

from collections.abc import Callable

import torch

from arkv.kernels import native, quantize, score
from arkv.kernels.decode import MAX_GROUP, MAX_HEAD_DIM, decode_attention, supported
from arkv.scoring import Summary
from arkv.storage import QuantizedPool, Tokens

Kernel = Callable[[torch.Tensor, Tokens, QuantizedPool | None, float, bool], tuple[torch.Tensor, torch.Tensor]]
"""Query [B, H, G, D], the Original slots in use, the Quantized ones, scaling, and whether Original slots may be without
a token; returns output [B, H, G, D] and probabilities [B, H, G, S], Original slots first, both float32."""


def find(device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> Kernel | None:
    """The kernel that serves a layer; None where torch's operations do.

    Args:
        dtype: of the Original tokens.
        head_dim: the larger one, where keys and values differ.
        group: query heads per KV head.
    """
    if supported(device, dtype, head_dim, group):
        return decode_attention
    if native.supported(device, dtype, head_dim, group):
        return native.decode_attention
    return None


Summarize = Callable[[torch.Tensor, torch.Tensor, float, int, int, bool], Summary]
"""As :func:`arkv.kernels.score.summarize`."""


def find_summarize(device: torch.device, dtype: torch.dtype) -> Summarize | None:
    """The kernel that sums up the attention of a prompt's newest queries; None where torch's operations do."""
    return score.summarize if score.supported(device, dtype) else None


__all__ = [
    "MAX_GROUP",
    "MAX_HEAD_DIM",
    "Kernel",
    "Summarize",
    "decode_attention",
    "find",
    "find_summarize",
    "native",
    "quantize",
    "score",
    "supported",
]
