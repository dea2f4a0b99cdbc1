"""Summing up the attention of a prompt's newest queries on CPUs by a C function: the twin of
``arkv.scores.attention.summarize``.

``score.c`` says how it works: the attention, which takes more memory than the keys, is never written there.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

import torch

from arkv.kernels.cpu.building import NUMBER_TYPES, library

if TYPE_CHECKING:
    from arkv.scores.attention import Summary

_TILE_CHANNELS = 32
"""As in ``score.c``."""


class _Summary(ctypes.Structure):
    """``struct summary``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "heads", "group", "queries", "keys", "dim")),
        ("query", ctypes.c_void_p),
        ("query_type", ctypes.c_int64),
        ("key", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("key_type", "key_batch", "key_head", "key_token")),
        ("scaling", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("stride", "past", "threads", "tiles")),
        *((name, ctypes.c_void_p) for name in ("mean", "largest", "spread", "layer", "space")),
    ]


def supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`summarize` can serve queries and keys of ``dtype``."""
    return device.type == "cpu" and dtype in NUMBER_TYPES and library() is not None


@cache
def has_tiles() -> bool:
    """Whether the processor multiplies tiles of bfloat16, and the system lets it."""
    functions = library()
    return functions is not None and bool(functions.arkv_has_tiles())


def summarize(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    stride: int,
    past: int,
    moments: bool,
    tiles: bool | None = None,
) -> Summary:
    """What the keys of a prompt get from its newest queries, each of which sees all keys up to its own.

    Args:
        query: after RoPE, [B, Hq, Q, D]: every ``stride``-th one, the newest last.
        key: all keys, [B, H, N, D], of the same dtype.
        scaling: factor of the logits.
        past: tokens, from the first on, that the statistics of the layer are of.
        moments: whether variances and the statistics of the layer are wanted.
        tiles: whether to multiply by tiles; None: wherever that can be done.
    """
    from arkv.scores.attention import Summary

    mean, largest, *others = torch.ops.arkv.summarize(query, key, scaling, stride, past, moments, tiles)
    return Summary(mean, largest, *(others or (None, None)))


def sums(
    query: torch.Tensor, key: torch.Tensor, scaling: float, stride: int, past: int, moments: bool, tiles: bool | None
) -> list[torch.Tensor]:
    """The fields of the summary by the C function, which the operator calls."""
    functions = library()
    assert functions is not None
    batch, query_heads, queries, dim = query.shape
    heads, length = key.shape[1], key.shape[2]
    query = query.contiguous()
    if key.stride(3) != 1:
        key = key.contiguous()
    if tiles is None:
        tiles = query.dtype == torch.bfloat16 and dim % _TILE_CHANNELS == 0 and has_tiles()
    mean, largest = (torch.empty(batch, heads, length) for _ in range(2))
    spread = torch.empty(batch, heads, length) if moments else None
    layer = torch.empty(batch, heads, 3, dtype=torch.float64) if moments else None
    call = _Summary(
        *(batch * heads, heads, query_heads // heads, queries, length, dim),
        *(query.data_ptr(), NUMBER_TYPES[query.dtype], key.data_ptr(), NUMBER_TYPES[key.dtype]),
        *key.stride()[:3],
        *(scaling, stride, past, torch.get_num_threads(), tiles),
        *(None if tensor is None else tensor.data_ptr() for tensor in (mean, largest, spread, layer)),
    )
    space = torch.empty(functions.arkv_summary_space(ctypes.byref(call)))
    call.space = space.data_ptr()
    functions.arkv_summarize(ctypes.byref(call))
    if spread is None or layer is None:
        return [mean, largest]
    return [mean, largest, spread, layer.sum(dim=1).float()]
