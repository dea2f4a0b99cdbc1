"""A decoding step on CPUs by C functions: the twins of :mod:`arkv.kernels.twin`'s.

``attend.c`` and ``rows.c`` say how they work. Pools come as a table (:mod:`arkv.kernels.cpu.pools`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from arkv.kernels.cpu.building import NUMBER_TYPES, library
from arkv.kernels.cpu.pools import Table

MAX_GROUP = 64
"""As in ``attend.c``."""


def _functions() -> Any:
    functions = library()
    assert functions is not None, "the C functions have not been built"
    return functions


def make_room(rows: torch.Tensor, table: Table, n_sink: int, window: int, recency: bool) -> None:
    """:func:`arkv.kernels.twin.make_room`."""
    count, columns = rows.shape
    _functions().arkv_make_room(
        *(table.address, table.pools, rows.data_ptr(), columns, count),
        *(n_sink, window, recency, torch.get_num_threads()),
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    begin: int,
    table: Table,
    n_sink: int,
    window: int,
    scaling: float,
    softcap: float,
    sinks: torch.Tensor | None,
    importance: Sequence[torch.Tensor],
) -> torch.Tensor:
    """:func:`arkv.kernels.twin.attend`."""
    batch, query_heads = query.shape[:2]
    heads = key.shape[1]
    # Channels follow one another in C; the rest may lie as the model's projections left it.
    query, key, value = _plain(query, query.dtype), _plain(key, table.dtype), _plain(value, table.dtype)
    output = query.new_empty((batch, 1, query_heads, table.value_dim), requires_grad=False)
    sinks_type = 0
    if sinks is not None:
        sinks = (sinks if sinks.dtype in NUMBER_TYPES else sinks.float()).contiguous()
        sinks_type = NUMBER_TYPES[sinks.dtype]
    query_strides, key_strides, value_strides = query.stride(), key.stride(), value.stride()
    fine = _functions().arkv_attend(
        *(table.address, table.pools, rows.data_ptr(), rows.shape[1], begin, batch * heads, heads),
        *(query_heads // heads, query.data_ptr(), NUMBER_TYPES[query.dtype], query_strides[0], query_strides[1]),
        *(key.data_ptr(), key_strides[0], key_strides[1], value.data_ptr(), value_strides[0], value_strides[1]),
        *(n_sink, window, scaling, softcap, None if sinks is None else sinks.data_ptr(), sinks_type),
        *(_addresses(importance), output.data_ptr(), torch.get_num_threads()),
    )
    _check(fine)
    return output


def remember(
    rows: torch.Tensor,
    table: Table,
    scores: Sequence[torch.Tensor],
    importance: Sequence[torch.Tensor],
    window: int,
    rate: float,
    pool_width: int,
    largest: bool,
) -> None:
    """:func:`arkv.kernels.twin.remember`; ``scores``: those of every pool."""
    functions, threads = _functions(), torch.get_num_threads()
    if rate or largest:
        update = functions.arkv_largest if largest else functions.arkv_average
        for score, new in zip(scores, importance, strict=True):
            update(score.data_ptr(), new.data_ptr(), score.shape[0], rate, threads)
        return
    count, columns = rows.shape
    fine = functions.arkv_smooth(
        *(table.address, table.pools, rows.data_ptr(), columns, count),
        *(_addresses(importance), window, pool_width, threads),
    )
    _check(fine)


def _plain(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.stride(3) == 1 else x.contiguous()


def _addresses(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p] | None:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors]) if tensors else None


def _check(fine: int) -> None:
    if not fine:
        raise MemoryError("no memory for a decoding step")
