"""The kernels as operators of torch, ``torch.ops.arkv``: one door for all devices, which compilers can see through.

Each does what its twin in :mod:`arkv.kernels.twin` (or beside it, for prompts) says, by the kernel that serves device
and number types, else by the twin itself. None of them has gradients. ``tensors`` are ``Store.tensors()``, and
``formats`` the number formats of the Quantized pools.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from arkv.formats import Layout
from arkv.kernels import twin
from arkv.kernels.cpu import quantize as cpu_quantize
from arkv.kernels.cpu import reread as cpu_reread
from arkv.kernels.cpu import score as cpu_score
from arkv.kernels.cpu import steps
from arkv.kernels.cpu.building import NUMBER_TYPES, library
from arkv.kernels.cpu.pools import Table, pools_of, table_of

LIBRARY = torch.library.Library("arkv", "DEF")


def _register(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """An operator of all devices; ``fake`` makes outputs of the right shape."""
    LIBRARY.define(schema)
    name = schema.partition("(")[0]
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    # Inputs may require gradients, outputs never do.
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"arkv::{name}", fake, lib=LIBRARY)


def _nothing(*_: Any) -> None:
    return None


def _table(
    rows: torch.Tensor, tensors: Sequence[torch.Tensor], formats: Sequence[str], group: int, dtype: torch.dtype
) -> Table | None:
    """Of the pools, where the C functions serve."""
    serves = rows.is_cpu and group <= steps.MAX_GROUP and dtype in NUMBER_TYPES and rows.is_contiguous()
    return table_of(tensors, formats) if serves and library() is not None else None


def _gpu(rows: torch.Tensor, tensors: Sequence[torch.Tensor], group: int) -> Any:
    """The module with the kernels for GPUs, where they serve."""
    if not rows.is_cuda:
        return None
    from arkv.kernels import gpu

    key, value = tensors[2], tensors[3]
    return gpu if gpu.supported(rows.device, key.dtype, key.shape[1], value.shape[1], group) else None


def _make_room(
    rows: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    formats: Sequence[str],
    n_sink: int,
    window: int,
    recency: bool,
) -> None:
    table = _table(rows, tensors, formats, 1, tensors[2].dtype)
    if table is not None:
        steps.make_room(rows, table, n_sink, window, recency)
        return
    # Storage may be an inference tensor, which changes in this mode alone.
    with torch.inference_mode():
        pools = pools_of(tensors, formats)
        (_gpu(rows, tensors, 1) or twin).make_room(rows, pools, n_sink, window, recency)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    begin: int,
    tensors: Sequence[torch.Tensor],
    formats: Sequence[str],
    n_sink: int,
    window: int,
    scaling: float,
    softcap: float,
    sinks: torch.Tensor | None,
    importance: Sequence[torch.Tensor],
    widths: Sequence[int] = (),
) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    table = _table(rows, tensors, formats, group, query.dtype)
    if table is not None:
        return steps.attend(query, key, value, rows, begin, table, n_sink, window, scaling, softcap, sinks, importance)
    output = _attend_fake(query, key, value, rows, begin, tensors)
    with torch.inference_mode():
        pools, gpu = pools_of(tensors, formats), _gpu(rows, tensors, group)
        function = twin.attend if gpu is None else functools.partial(gpu.attend, widths=widths or None)
        output.copy_(
            function(query, key, value, rows, begin, pools, n_sink, window, scaling, softcap, sinks, importance)
        )
    return output


def _attend_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    begin: int,
    tensors: Sequence[torch.Tensor],
    *_: Any,
) -> torch.Tensor:
    return query.new_empty((query.shape[0], 1, query.shape[1], tensors[3].shape[1]))


def _remember(
    rows: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    formats: Sequence[str],
    importance: Sequence[torch.Tensor],
    window: int,
    rate: float,
    pool_width: int,
    largest: bool = False,
) -> None:
    table = _table(rows, tensors, formats, 1, tensors[2].dtype)
    if table is not None:
        scores = [pool.score for pool in pools_of(tensors, formats)] if rate or largest else []
        steps.remember(rows, table, scores, importance, window, rate, pool_width, largest)
        return
    with torch.inference_mode():
        pools = pools_of(tensors, formats)
        (_gpu(rows, tensors, 1) or twin).remember(rows, pools, importance, window, rate, pool_width, largest)


def _quantize(x: torch.Tensor, bits: int, levels: Sequence[float], floating: bool) -> list[torch.Tensor]:
    layout = Layout(bits, tuple(levels), floating)
    with torch.no_grad():
        codes = cpu_quantize.encode(x, layout) if cpu_quantize.supported(x, layout) else layout.encode_rotated(x)
    return [tensor for tensor in codes if tensor is not None]


def _quantize_fake(x: torch.Tensor, bits: int, levels: Sequence[float], floating: bool) -> list[torch.Tensor]:
    layout = Layout(bits, tuple(levels), floating)
    count, dim = x.shape
    ranges = [x.new_empty(count, dtype=layout.range_dtype) for _ in range(2 if levels else 1)]
    return [x.new_empty((count, dim * bits // 8), dtype=torch.uint8), *ranges]


def _summarize_fake(
    query: torch.Tensor, key: torch.Tensor, scaling: float, stride: int, past: int, moments: bool, tiles: bool | None
) -> list[torch.Tensor]:
    found = [key.new_empty(key.shape[:3], dtype=torch.float32) for _ in range(3 if moments else 2)]
    return [*found, key.new_empty((key.shape[0], 3), dtype=torch.float32)] if moments else found


def _reread_fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, largest: torch.Tensor
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


_register(
    "make_room(Tensor(a!) rows, Tensor(b!)[] tensors, str[] formats, int n_sink, int window, bool recency) -> ()",
    _make_room,
    _nothing,
)
_register(
    "attend(Tensor query, Tensor key, Tensor value, Tensor rows, int begin, Tensor(a!)[] tensors, str[] formats, "
    "int n_sink, int window, float scaling, float softcap, Tensor? sinks, Tensor(b!)[] importance, int[] widths=[]) "
    "-> Tensor",
    _attend,
    _attend_fake,
)
_register(
    "remember(Tensor rows, Tensor(a!)[] tensors, str[] formats, Tensor[] importance, int window, float rate, "
    "int pool_width, bool largest=False) -> ()",
    _remember,
    _nothing,
)
_register("quantize(Tensor x, int bits, float[] levels, bool floating) -> Tensor[]", _quantize, _quantize_fake)
_register(
    "summarize(Tensor query, Tensor key, float scaling, int stride, int past, bool moments, bool? tiles) -> Tensor[]",
    cpu_score.sums,
    _summarize_fake,
)
_register(
    "reread(Tensor query, Tensor key, Tensor value, float scaling, Tensor(a!) largest) -> Tensor",
    cpu_reread.attended,
    _reread_fake,
)
