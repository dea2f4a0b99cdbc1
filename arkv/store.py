"""The flat store: all tokens that a cache holds, of all layers, samples and KV heads.

Letters: ``R`` rows, ``S`` slots of a pool, ``n`` slots of one access.

A *row* is one KV head of one sample in one layer. It has a run of neighbouring slots in every *pool*: pool 0 holds
Original tokens, those behind it Quantized ones. The pools' tensors are flat over slots. So rows may have any number of
slots, a batch is more rows, and nothing is padded.

What a slot is follows from its place in its row and is stored nowhere else. In pool 0, with S attention sinks and a
window of the W newest tokens (``CacheConfig.recent``)::

    [ sinks: S | window: W, a ring | past: the other Original tokens, in no order | free ]
                                                              count ^      capacity ^

In the other pools all slots up to the row's count hold tokens. No token ever moves but the one that leaves the window:
it takes the place of the token that gives up its slot (:mod:`arkv.states`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from arkv.pools import Part, Pool, at, pool_with

SEEN, FIRST = 0, 1
"""Columns of the row table: tokens seen, padding included, and how many of them are padding."""

START, COUNT, CAPACITY = 0, 1, 2
"""Columns of each pool in the row table, see :func:`column`."""


def column(pool: int, which: int) -> int:
    """Column of the row table: ``START``, ``COUNT`` or ``CAPACITY`` of a pool."""
    return 2 + 3 * pool + which


def row_table_bytes(pools: int) -> int:
    """Bytes of a row's entry in the row table."""
    return column(pools, START) * torch.long.itemsize


def place_of(relative: torch.Tensor, n_sink: int, window: int) -> torch.Tensor:
    """The place in its row that a token has while it is a sink or in the window; ``relative``: tokens before it."""
    return torch.where(relative < n_sink + window, relative, n_sink + (relative - n_sink) % window)


class Slots(NamedTuple):
    """Some slots of a pool: ``slots`` [n] and the ``rows`` [n] that they belong to, row by row."""

    slots: torch.Tensor
    rows: torch.Tensor


def slots_of(starts: torch.Tensor, counts: torch.Tensor) -> Slots:
    """The first ``counts`` [R] slots of rows that start at ``starts`` [R]."""
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    within = torch.arange(len(rows), device=counts.device) - (counts.cumsum(0) - counts)[rows]
    return Slots(starts[rows] + within, rows)


class Store:
    """All pools, and the row table: int64 [R, 2 + 3 * pools] with the columns of :func:`column`.

    Args:
        parts: what each layer holds; consumed.
        seen, first: tokens seen of every row of a layer, and how many of them are padding, [rows].
        capacities: of every pool, slots of all rows, [R].
    """

    def __init__(
        self,
        parts: list[Part],
        seen: Sequence[int],
        first: Sequence[int],
        capacities: Sequence[Sequence[int]],
    ) -> None:
        device = parts[0].pools[0].score.device
        self.layers = len(parts)
        self.capacities = [list(map(int, capacity)) for capacity in capacities]
        """Slots of all rows, for every pool."""
        self.widths = [max(capacity) for capacity in self.capacities]
        """Slots of the largest row of every pool."""
        columns = [torch.tensor(list(item) * self.layers) for item in (seen, first)]
        for counts, slots in zip(zip(*(part.counts for part in parts), strict=True), self.capacities, strict=True):
            count, capacity = torch.cat(counts).cpu(), torch.tensor(slots)
            assert bool((count <= capacity).all()), "a row has more tokens than slots"
            columns += [capacity.cumsum(0) - capacity, count, capacity]
        table = torch.stack(columns, dim=1)
        # Not the same memory: the table changes in place.
        self.rows = table.clone().to(device)
        self.pools: list[Pool] = []
        self._tensors: list[torch.Tensor] | None = None
        for number, slots in enumerate(self.capacities):
            self.pools.append(_packed([part.pools.pop(0) for part in parts], table, number, sum(slots)))

    @property
    def layer_rows(self) -> int:
        """Rows of a layer: samples times KV heads."""
        return self.rows.shape[0] // self.layers

    def part(self, layer: int, rows: torch.Tensor | None = None) -> Part:
        """What ``layer`` holds, or only ``rows`` of it, copied."""
        if rows is None:
            rows = torch.arange(self.layer_rows, device=self.rows.device)
        rows = layer * self.layer_rows + rows
        pools, counts = [], []
        for number, pool in enumerate(self.pools):
            start, count = (self.rows[rows, column(number, which)] for which in (START, COUNT))
            pools.append(pool.map(at(slots_of(start, count).slots), at(rows)))
            counts.append(count)
        return Part(pools, counts)

    def select(self, rows: Sequence[int]) -> Store:
        """The same with only ``rows`` of every layer, in that order."""
        index = torch.tensor(rows, dtype=torch.long, device=self.rows.device)
        table = self.rows[index].cpu()
        every = [layer * self.layer_rows + row for layer in range(self.layers) for row in rows]
        return Store(
            [self.part(layer, index) for layer in range(self.layers)],
            table[:, SEEN].tolist(),
            table[:, FIRST].tolist(),
            [[capacity[row] for row in every] for capacity in self.capacities],
        )

    @staticmethod
    def join(stores: Sequence[Store]) -> Store:
        """The rows of all ``stores``, which are of the same layers, side by side in every layer."""
        parts = []
        capacities: list[list[int]] = [[] for _ in stores[0].pools]
        for layer in range(stores[0].layers):
            parts.append(Part.beside([store.part(layer) for store in stores]))
            for number, whole in enumerate(capacities):
                for store in stores:
                    whole += store.capacities[number][layer * store.layer_rows : (layer + 1) * store.layer_rows]
        table = torch.cat([store.rows[: store.layer_rows].cpu() for store in stores])
        return Store(parts, table[:, SEEN].tolist(), table[:, FIRST].tolist(), capacities)

    def clone(self) -> Store:
        """A copy that can go its own way."""
        twin = object.__new__(Store)
        twin.__dict__.update(self.__dict__)
        twin.rows = self.rows.clone()
        twin.pools = [pool.map(torch.clone) for pool in self.pools]
        twin._tensors = None
        return twin

    def tensors(self) -> list[torch.Tensor]:
        """The pools' tensors one after the other, as operators take them."""
        if self._tensors is None:
            self._tensors = [tensor for pool in self.pools for tensor in pool.tensors()]
        return self._tensors


def _packed(pools: list[Pool], table: torch.Tensor, number: int, slots: int) -> Pool:
    """One pool of all layers. Takes the layers' tensors one by one and lets go of each, so that little stands twice."""
    layouts = pools[0].layouts
    by_row = [index for index, tensor in enumerate(pools[0].tensors()) if tensor is pools[0].key.center]
    parts = [pool.tensors() for pool in pools]
    pools.clear()
    start, count = table[:, column(number, START)], table[:, column(number, COUNT)]
    index = slots_of(start, count).slots.to(parts[0][0].device)
    is_full = len(index) == slots
    found = []
    for kind in range(len(parts[0])):
        if kind in by_row:
            found.append(torch.cat([part[kind] for part in parts]))
            continue
        shape, place = (slots, *parts[0][kind].shape[1:]), 0
        whole = parts[0][kind].new_empty(shape) if is_full else parts[0][kind].new_zeros(shape)
        for part in parts:
            tokens, part[kind] = part[kind], part[kind].new_empty(0)
            end = place + tokens.shape[0]
            if is_full:
                whole[place:end] = tokens
            else:
                whole.index_copy_(0, index[place:end], tokens)
            place = end
        found.append(whole)
    return pool_with(found, layouts)
