"""A pool: slots of one kind, Original or Quantized, flat over the slots of all rows; and the pools of one layer.

Letters: ``R`` rows, ``S`` slots of a pool, ``D`` head dim, ``n`` slots of one access.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from arkv.formats import Codes, Format, Layout


class Plane(NamedTuple):
    """The keys, or the values, of a pool."""

    codes: torch.Tensor
    """[S, D] of the model's dtype; in Quantized pools packed codes, [S, bytes] uint8."""
    scale: torch.Tensor | None = None
    """[S]; ``scale``, ``zero`` and ``center`` as far as the layout has them."""
    zero: torch.Tensor | None = None
    """[S]."""
    center: torch.Tensor | None = None
    """[R, D]; of keys only."""
    layout: Layout | None = None
    """None: numbers of the model's dtype."""

    @property
    def dim(self) -> int:
        """Head dim D."""
        width = self.codes.shape[1]
        return width if self.layout is None else width * 8 // self.layout.bits

    def read(self, slots: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What ``slots`` [n] of ``rows`` [n] stand for, float32 [n, D]."""
        codes = self.codes.index_select(0, slots)
        if self.layout is None:
            return codes.float()
        assert self.scale is not None
        stored = Codes(codes, self.scale[slots], None if self.zero is None else self.zero[slots])
        return self.layout.decode(stored, None if self.center is None else self.center[rows])

    def write(self, slots: torch.Tensor, rows: torch.Tensor, x: torch.Tensor) -> None:
        """Store ``x`` [n, D] in the distinct ``slots`` [n] of ``rows`` [n]."""
        if self.layout is None:
            self.codes.index_copy_(0, slots, x.to(self.codes.dtype))
            return
        new = self.layout.encode(x, None if self.center is None else self.center[rows])
        self.codes.index_copy_(0, slots, new.codes)
        if self.scale is not None:
            self.scale.index_copy_(0, slots, new.scale)
        if self.zero is not None and new.zero is not None:
            self.zero.index_copy_(0, slots, new.zero)


class Pool(NamedTuple):
    """Slots of one kind."""

    score: torch.Tensor
    """[S] float32: higher stays longer."""
    position: torch.Tensor
    """[S]: tokens before this one in its sequence, padding included."""
    key: Plane
    value: Plane

    @property
    def slots(self) -> int:
        """Number of slots of all rows."""
        return self.score.shape[0]

    def tensors(self) -> list[torch.Tensor]:
        """All that is stored, in the order of the fields."""
        parts = (self.score, self.position, *self.key[:4], *self.value[:4])
        return [part for part in parts if part is not None]

    @property
    def layouts(self) -> tuple[Layout | None, Layout | None]:
        """How keys and how values are stored."""
        return self.key.layout, self.value.layout

    def map(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        of_rows: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Pool:
        """``function`` of every tensor by slot; ``of_rows`` (the same, unless given) of those by row."""
        of_rows = function if of_rows is None else of_rows
        by_row = self.key.center
        return pool_with([(of_rows if item is by_row else function)(item) for item in self.tensors()], self.layouts)


def pool_of(tensors: Sequence[torch.Tensor], number_format: Format | None) -> Pool:
    """The pool that has these :meth:`Pool.tensors`; ``number_format`` None: Original tokens."""
    return pool_with(tensors, (None, None) if number_format is None else (number_format.key, number_format.value))


def pool_with(tensors: Sequence[torch.Tensor], layouts: tuple[Layout | None, Layout | None]) -> Pool:
    """The same by the layouts of keys and of values; None: numbers of the model's dtype."""
    score, position, *rest = tensors
    planes = []
    for layout in layouts:
        codes, scale, zero, center = rest.pop(0), None, None, None
        if layout is not None:
            scale = rest.pop(0)
            zero = rest.pop(0) if layout.levels else None
            center = rest.pop(0) if layout.centered else None
        planes.append(Plane(codes, scale, zero, center, layout))
    assert not rest
    return Pool(score, position, *planes)


@dataclass
class Part:
    """What one layer holds, without free slots: pools of its own rows, and their counts [rows] int64."""

    pools: list[Pool]
    counts: list[torch.Tensor]

    def set_positions(self, dtype: torch.dtype) -> None:
        """Store positions as another number type."""
        self.pools = [pool._replace(position=pool.position.to(dtype)) for pool in self.pools]

    @staticmethod
    def beside(parts: Sequence[Part]) -> Part:
        """The rows of all ``parts``, one after the other."""
        pools = []
        for each in zip(*(part.pools for part in parts), strict=True):
            joined = [torch.cat(tensors) for tensors in zip(*(pool.tensors() for pool in each), strict=True)]
            pools.append(pool_with(joined, each[0].layouts))
        return Part(pools, [torch.cat(counts) for counts in zip(*(part.counts for part in parts), strict=True)])


def at(index: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What takes ``index`` [n] of a tensor."""
    return lambda tensor: tensor.index_select(0, index)
