"""A decoding step on GPUs by Triton kernels, which agree with :mod:`arkv.kernels.twin` and take the same arguments.

No GPU has run them so far: they have been compared with their twin in Triton's interpreter on a CPU and compiled for
NVIDIA's sm_80 and sm_90, and no timings exist.

Letters: ``R`` rows, ``H`` KV heads, ``G`` query heads per KV head, ``S`` slots of a pool, ``D`` head dim, ``n`` rows of
a layer.

What a row holds is read from the row table where the kernels run, so that no call waits for the device, and every
call launches the same work for the same store. :func:`make_room` is one kernel, a row to a program. :func:`attend`
splits each row's slots among programs (flash-decoding): a program reads its keys and values once, as they are stored,
and leaves logits, an output and their softmax's maximum and sum; a second kernel combines these and turns the logits
into the importance of the tokens. Triton is imported when the first step is taken.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from arkv.formats.rotation import rotation
from arkv.pools import Plane, Pool
from arkv.store import CAPACITY, COUNT, SEEN, START, column

MAX_HEAD_DIM, MAX_GROUP = 256, 16
"""Within these the kernels take no more shared memory than the smallest GPUs of their generation have, 99 KiB."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

BLOCK = 64
"""Slots that a program attends to at a time; fewer of heads of more than 128 channels."""

IMPORTANCE_BLOCK, SCORE_BLOCK = 256, 1024
"""Slots that get their importance from one program, and that a search for the lowest score takes at a time."""


def supported(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int, group: int) -> bool:
    """Whether the kernels serve a store: on NVIDIA GPUs since Ampere where Triton is installed; with the environment's
    ``TRITON_INTERPRET=1`` on CPUs, very slowly.

    Args:
        dtype: of the Original tokens.
        group: query heads per KV head.
    """
    if device.type == "cuda":
        here = torch.version.hip is None and _has_triton() and _capability(device) >= (8, 0)
    else:
        here = device.type == "cpu" and _interpreted() and _has_triton()
    return here and dtype in DTYPES and max(key_dim, value_dim) <= MAX_HEAD_DIM and group <= MAX_GROUP


def make_room(rows: torch.Tensor, pools: Sequence[Pool], n_sink: int, window: int, recency: bool) -> None:
    """As :func:`arkv.kernels.twin.make_room`."""
    from arkv.kernels.gpu.rule import make_room_rows

    original, stored = pools[0], _stored(pools)
    key, value = (None, None) if stored is None else (stored.key, stored.value)
    value_arguments = _arguments(value)
    # Triton launches on the current device, which need not be the one that the store is on.
    with torch.cuda.device_of(rows):
        make_room_rows[(rows.shape[0],)](
            *(rows, original.score, original.position, original.key.codes, original.value.codes),
            *((None, None) if stored is None else (stored.score, stored.position)),
            *_arguments(key),
            # Values have no center.
            *(*value_arguments[:3], *value_arguments[4:]),
            *(n_sink, window),
            COLUMNS=rows.shape[1],
            **_shape("KEY", original.key, key),
            **_shape("VALUE", original.value, value),
            RECENCY=recency,
            BLOCK=SCORE_BLOCK,
        )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    begin: int,
    pools: Sequence[Pool],
    n_sink: int,
    window: int,
    scaling: float,
    softcap: float,
    sinks: torch.Tensor | None,
    importance: Sequence[torch.Tensor],
    *,
    widths: Sequence[int] | None = None,
    slots_per_split: int | None = None,
) -> torch.Tensor:
    """As :func:`arkv.kernels.twin.attend`, without gradients.

    Args:
        widths: of every pool, at least as many slots as any row of the layer has; None reads them from the row table,
            and waits for the device.
        slots_per_split: a multiple of ``BLOCK``; None shares the slots among the device's processors.
    """
    from arkv.kernels.gpu.attention import attend_splits
    from arkv.kernels.gpu.combining import combine_splits

    batch, query_heads, _, key_dim = query.shape
    heads, value_dim = key.shape[1], value.shape[-1]
    count, group = batch * heads, query_heads // heads
    original, stored = pools[0], _stored(pools)
    stored_key, stored_value = (None, None) if stored is None else (stored.key, stored.value)
    if widths is None:
        columns = [column(number, CAPACITY) for number in range(len(pools))]
        widths = rows[begin : begin + count, columns].amax(dim=0).tolist()
    original_width, stored_width = widths[0], 0 if stored is None else widths[1]
    width = original_width + stored_width
    if slots_per_split is None:
        slots_per_split = _slots_per_split(width, count, query.device)
    assert slots_per_split % BLOCK == 0
    original_splits = -(-original_width // slots_per_split)
    splits = original_splits + -(-stored_width // slots_per_split)

    dtype = original.key.codes.dtype
    query = query.contiguous()
    empty = torch.empty(0, dtype=torch.float32, device=query.device).new_empty
    output = query.new_empty(batch, 1, query_heads, value_dim)
    logits = empty(count, group, width) if importance else None
    partial = empty(count, splits, group, value_dim)
    peaks, totals = empty(count, splits, group), empty(count, splits, group)
    key_arguments, value_arguments = _arguments(stored_key), _arguments(stored_value)
    turned = value_arguments[4]
    wide = max(key_dim, value_dim)
    # The interpreter cannot multiply numbers of half precision.
    half = dtype != torch.float32 and query.dtype == dtype and not _interpreted()
    # Tiles of levels from a table stay float32.
    small = half and key_arguments[5] is None and value_arguments[5] is None
    padded = {"PADDED_GROUP": _padded(group), **_shape("VALUE", original.value, stored_value)}
    chunk = min(32, _padded(value_dim))
    blocks = [-(-slots // IMPORTANCE_BLOCK) for slots in (original_width, stored_width)] if importance else [0, 0]
    with torch.cuda.device_of(query):
        attend_splits[(count, splits)](
            *(query, key.to(dtype).contiguous(), value.to(dtype).contiguous()),
            *(rows, begin, original.key.codes, original.value.codes),
            *key_arguments,
            # Values have no center, and are turned back when all splits are one.
            *(*value_arguments[:3], value_arguments[5]),
            *(logits, partial, peaks, totals),
            *(n_sink, window, scaling, softcap),
            *(width, original_width, original_splits, slots_per_split),
            COLUMNS=rows.shape[1],
            GROUP=group,
            BLOCK=BLOCK if wide <= 128 else BLOCK // 2 if small else BLOCK // 4,
            **padded,
            **_shape("KEY", original.key, stored_key),
            CAPPED=softcap > 0,
            HALF=half,
            EXACT=key_arguments[4] is None and query.dtype == torch.bfloat16,
            num_warps=4 if wide <= 64 else 8,
            num_stages=2,
        )
        combine_splits[(count, -(-value_dim // chunk) + sum(blocks))](
            *(rows, begin, heads, sinks, turned, logits, partial, peaks, totals, output),
            *(importance[0] if importance else None, importance[1] if importance and stored is not None else None),
            *(width, original_width, splits, original_splits, slots_per_split, blocks[0]),
            COLUMNS=rows.shape[1],
            STORED=stored is not None,
            GROUP=group,
            VALUE_DIM=value_dim,
            PADDED_GROUP=padded["PADDED_GROUP"],
            PADDED_VALUE_DIM=padded["PADDED_VALUE_DIM"],
            CHUNK=chunk,
            BLOCK=IMPORTANCE_BLOCK,
        )
    return output


def remember(
    rows: torch.Tensor,
    pools: Sequence[Pool],
    importance: Sequence[torch.Tensor],
    window: int,
    rate: float,
    pool_width: int,
    largest: bool = False,
) -> None:
    """As :func:`arkv.kernels.twin.remember`, in torch operations whose sizes do not depend on what rows hold."""
    if largest:
        for stored, new in zip(pools, importance, strict=True):
            torch.maximum(stored.score.mul_(1.0 - rate), new, out=stored.score)
        return
    if rate:
        for stored, new in zip(pools, importance, strict=True):
            stored.score.mul_(1.0 - rate).add_(new, alpha=rate)
        return
    owners, taken = zip(*(_owners(rows, number, pool.slots) for number, pool in enumerate(pools)), strict=True)
    row, held = torch.cat(owners), torch.cat(taken)
    position = torch.cat([pool.position for pool in pools]).long()
    newest = torch.cat(list(importance))
    # All but the window, and the token that leaves it next, row by row in sequence order; what is left out comes last,
    # as if it were a row behind all others.
    averaged = held & (position <= rows[row, SEEN] - window)
    key, order = torch.where(averaged, (row << 32) | position, rows.shape[0] << 32).sort()
    alone, row = newest[order], key >> 32
    total = alone.clone()
    for distance in range(1, pool_width // 2 + 1):
        near = row[distance:] == row[:-distance]
        total[distance:] += alone[:-distance] * near
        total[:-distance] += alone[distance:] * near
    new = torch.where(averaged, torch.empty_like(total).index_copy_(0, order, total / pool_width), newest)
    # Free slots take what their importance is, which nothing reads.
    for pool, part in zip(pools, new.split([pool.slots for pool in pools]), strict=True):
        pool.score.copy_(part)


def _owners(rows: torch.Tensor, pool: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every slot of a pool, [S]: its row, and whether it holds a token."""
    start, count, capacity = (rows[:, column(pool, which)].contiguous() for which in (START, COUNT, CAPACITY))
    slot = torch.arange(slots, device=rows.device)
    row = torch.searchsorted(start + capacity, slot, right=True)
    return row, slot < (start + count)[row]


def _stored(pools: Sequence[Pool]) -> Pool | None:
    """The Quantized pool; None where it has no slots."""
    return pools[1] if len(pools) > 1 and pools[1].slots else None


def _arguments(plane: Plane | None) -> tuple[torch.Tensor | None, ...]:
    """Codes, scale, zero point and center of a plane, the matrix that it is turned by, and its levels where these are
    not 0, 1, 2, ...; all as far as there are any."""
    if plane is None:
        return (None,) * 6
    layout, device = plane.layout, plane.codes.device
    assert layout is not None
    turned = rotation(plane.dim, device) if layout.rotated else None
    levels = _levels(layout.levels, device) if layout.levels and not layout.uniform else None
    return *plane[:4], turned, levels


def _shape(name: str, original: Plane, stored: Plane | None) -> dict[str, Any]:
    """What kernels are compiled for: head dim and codes of the keys, or of the values."""
    layout = None if stored is None else stored.layout
    bits = 0 if layout is None else layout.bits
    return {
        f"{name}_DIM": original.dim,
        f"PADDED_{name}_DIM": _padded(original.dim),
        f"{name}_BITS": bits,
        f"{name}_RUNS": {2: 4, 3: 8, 4: 2}.get(bits, 1),
        f"{name}_FLOATING": layout is not None and layout.floating,
    }


def _padded(size: int) -> int:
    """The power of two that holds ``size``, and at least the 16 that a product of tiles takes."""
    return max(1 << (size - 1).bit_length(), 16)


def _slots_per_split(slots: int, rows: int, device: torch.device) -> int:
    """Two programs for each processor, or as many as there are blocks."""
    splits = max(2 * _processors(device) // rows, 1)
    return -(-slots // (splits * BLOCK)) * BLOCK


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _levels(levels: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(levels, device=device)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
