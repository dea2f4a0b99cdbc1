"""Pools as the C functions take them: a table of numbers and addresses, whose fields are those of ``pools.h``."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cache

import torch

from arkv.formats import FORMATS, Layout
from arkv.formats.base import CENTER_DTYPE, MAX_LEVELS
from arkv.formats.rotation import rotation
from arkv.kernels.cpu.building import NUMBER_TYPES
from arkv.pools import Plane, Pool, pool_of

MAX_HEAD_DIM = 256
"""As in ``pools.h``."""

_CPU = torch.device("cpu")
_MAX_TABLES = 64


class Table:
    """The pools of a store. It holds addresses, so it serves while the tensors that it was made of live."""

    __slots__ = ("_numbers", "address", "dtype", "key_dim", "pools", "value_dim")

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._numbers = array("q", [number for pool in pools for number in _pool_fields(pool)])
        self.address: int = self._numbers.buffer_info()[0]
        self.pools = len(pools)
        self.dtype, self.key_dim, self.value_dim = pools[0].key.codes.dtype, pools[0].key.dim, pools[0].value.dim


def table_of(tensors: Sequence[torch.Tensor], formats: Sequence[str]) -> Table | None:
    """The table of the pools that ``tensors`` are, ``Store.tensors()``; None where the C functions do not serve them.

    Args:
        formats: the number formats of the Quantized pools.
    """
    # All that a table depends on; the tensors of a store differ in nothing else.
    key_codes, value_codes = tensors[2], tensors[3]
    key = (
        *[tensor.data_ptr() for tensor in tensors],
        *(key_codes.dtype, key_codes.shape[1], value_codes.shape[1], tensors[1].dtype, *formats),
    )
    try:
        return _TABLES[key]
    except KeyError:
        pass
    pools = pools_of(tensors, formats)
    if len(_TABLES) >= _MAX_TABLES:
        _TABLES.clear()
    _TABLES[key] = found = Table(pools) if all(_served(pool, pools[0]) for pool in pools) else None
    return found


_TABLES: dict[tuple[object, ...], Table | None] = {}


def pools_of(tensors: Sequence[torch.Tensor], formats: Sequence[str]) -> list[Pool]:
    """The pools that ``tensors`` are, one after the other: Original tokens, then Quantized ones of every format."""
    pools, place = [], 0
    for name in (None, *formats):
        number_format = None if name is None else FORMATS[name]
        size = 4
        if number_format is not None:
            for layout in (number_format.key, number_format.value):
                size += 1 + bool(layout.levels) + layout.centered
        pools.append(pool_of(tensors[place : place + size], number_format))
        place += size
    return pools


def _served(pool: Pool, original: Pool) -> bool:
    planes = ((pool.key, original.key), (pool.value, original.value))
    return (
        original.key.codes.dtype in NUMBER_TYPES
        and original.value.codes.dtype == original.key.codes.dtype
        and pool.position.dtype in (torch.int16, torch.int32)
        and pool.value.center is None
        and (pool.key.center is None or pool.key.center.dtype == CENTER_DTYPE)
        and all(mine.dim == its.dim <= MAX_HEAD_DIM for mine, its in planes)
        and all(tensor.is_contiguous() for tensor in pool.tensors())
    )


def _pool_fields(pool: Pool) -> list[int]:
    """``struct pool``."""
    return [
        *(pool.score.data_ptr(), pool.position.data_ptr(), pool.position.element_size()),
        *_plane_fields(pool.key),
        *_plane_fields(pool.value),
    ]


def _plane_fields(plane: Plane) -> list[int]:
    """``struct plane``."""
    layout = plane.layout
    return [
        *(0 if tensor is None else tensor.data_ptr() for tensor in plane[:4]),
        # Rotations live as long as the process, like levels.
        rotation(plane.dim, _CPU).data_ptr() if layout is not None and layout.rotated else 0,
        *((0, NUMBER_TYPES[plane.codes.dtype], 0) if layout is None else code_fields(layout)),
        plane.dim,
    ]


def code_fields(layout: Layout) -> tuple[int, int, int]:
    """``struct code``."""
    return (0 if layout.uniform or not layout.levels else _levels(layout).data_ptr(), layout.bits, layout.floating)


@cache
def _levels(layout: Layout) -> torch.Tensor:
    # As many as a register holds.
    unused = (0.0,) * (MAX_LEVELS - len(layout.levels))
    with torch.inference_mode(False):
        return torch.tensor(layout.levels + unused, dtype=torch.float32)
