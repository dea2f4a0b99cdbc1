"""Decode attention by kernels: Triton's on GPUs, imported by need, and one in C on CPUs, where it has been built."""

from __future__ import annotations

from collections.abc import Callable

import torch

from arkv.kernels import native
from arkv.kernels.decode import MAX_GROUP, MAX_HEAD_DIM, decode_attention, supported
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


__all__ = ["MAX_GROUP", "MAX_HEAD_DIM", "Kernel", "decode_attention", "find", "native", "supported"]
