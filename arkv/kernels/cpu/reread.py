"""Attention of tokens that are read behind a prompt on CPUs by a C function, with the largest that each token of the
prompt gets: the twin of :func:`arkv.blocks.plain_attention` and
:func:`arkv.rereading.largest_attention` at once.

``reread.c`` says how it works: logits are computed once for both, and are never in memory.
"""

from __future__ import annotations

import ctypes

import torch

from arkv.kernels.cpu.building import NUMBER_TYPES, library

_ALIGNED = 16
"""Numbers of float32 that vectors lie at multiples of."""


class _Reread(ctypes.Structure):
    """``struct reread``."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "group", "queries", "keys", "prompt", "dim", "value_dim")
        ),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("type", "threads")),
        ("scaling", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("largest", "output", "space")),
    ]


def supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`reread` can serve queries, keys and values of ``dtype``."""
    return device.type == "cpu" and dtype in NUMBER_TYPES and library() is not None


def reread(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, largest: torch.Tensor
) -> torch.Tensor:
    """Causal attention output [B, T, Hq, E] of the newest T tokens.

    Args:
        query: after RoPE, [B, Hq, T, D].
        key, value: of the prompt and of the new tokens, [B, H, N + T, D] and [B, H, N + T, E], of the same dtype.
        scaling: factor of the logits.
        largest: [B, H, N] float32, contiguous: raised to the attention that any of the queries, of any head that
            shares the KV head, gives to a token of the prompt.
    """
    output: torch.Tensor = torch.ops.arkv.reread(query, key, value, scaling, largest)
    return output


def attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, largest: torch.Tensor
) -> torch.Tensor:
    """:func:`reread` by the C function, which the operator calls."""
    functions = library()
    assert functions is not None
    assert largest.is_contiguous()
    batch, query_heads, queries, dim = query.shape
    heads, keys = key.shape[1], key.shape[2]
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    output = query.new_empty(batch, queries, query_heads, value.shape[3])
    call = _Reread(
        *(batch, heads, query_heads // heads, queries, keys, largest.shape[2], dim, value.shape[3]),
        *(query.data_ptr(), key.data_ptr(), value.data_ptr()),
        *(NUMBER_TYPES[query.dtype], torch.get_num_threads(), scaling, largest.data_ptr(), output.data_ptr()),
    )
    space = torch.empty(functions.arkv_reread_space(ctypes.byref(call)) + _ALIGNED)
    call.space = space.data_ptr() + -space.data_ptr() % (4 * _ALIGNED)
    functions.arkv_reread(ctypes.byref(call))
    return output
