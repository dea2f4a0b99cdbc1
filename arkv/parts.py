"""A layer's tokens, taken out of the store and put together anew: the choice of :mod:`arkv.states` carried out.

Letters: ``B`` batch, ``H`` KV heads, ``n = B * H`` rows of a layer, ``T`` new tokens, ``m`` places of a padded row,
``D`` head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from arkv.formats import Format
from arkv.formats.base import CENTER_DTYPE
from arkv.pools import Part, Plane, Pool
from arkv.states import Choice, Tokens
from arkv.store import slots_of


class Block(NamedTuple):
    """New tokens of a layer: ``key`` and ``value`` [B, H, T, D], ``score`` and ``position`` [n, T], ``taken`` [n, T]
    False where a token is padding; ``stream`` as in :class:`~arkv.scores.PromptScores`."""

    key: torch.Tensor
    value: torch.Tensor
    tokens: Tokens
    stream: Sequence[float] = ()


def no_tokens(part: Part) -> Block:
    """A block of no tokens behind what ``part`` holds."""
    rows, pool = len(part.counts[0]), part.pools[0]
    none = pool.score.new_empty(rows, 0)
    nothing = Tokens(none, none.long(), none.bool())
    key, value = (plane.codes.new_empty(1, rows, 0, plane.dim) for plane in (pool.key, pool.value))
    return Block(key, value, nothing)


def padded(part: Part, pool: int) -> Tokens:
    """The tokens of one pool, row beside row, [n, m]."""
    stored, counts = part.pools[pool], part.counts[pool]
    width = int(counts.max()) if len(counts) else 0
    taken = torch.arange(width, device=counts.device) < counts[:, None]
    score = stored.score.new_zeros(taken.shape)
    position = torch.zeros(taken.shape, dtype=torch.long, device=counts.device)
    score[taken], position[taken] = stored.score, stored.position.long()
    return Tokens(score, position, taken)


class States(NamedTuple):
    """What a layer holds of one sample: ``position`` [H, n] int32 (-1 where a head holds fewer) in ascending order and
    ``quantized`` [H, n] bool."""

    position: torch.Tensor
    quantized: torch.Tensor


def states_of(part: Part, rows: slice) -> States:
    """What ``rows`` of a layer hold."""
    found, low = [], []
    for number in range(len(part.pools)):
        tokens = padded(part, number)
        found.append(tokens.position[rows].masked_fill(~tokens.taken[rows], -1))
        low.append(torch.full_like(found[-1], number > 0, dtype=torch.bool))
    position, order = torch.cat(found, dim=1).sort(dim=1, stable=True)
    width = int((position >= 0).sum(dim=1).max())
    position, order = position[:, position.shape[1] - width :], order[:, order.shape[1] - width :]
    return States(position.int(), torch.cat(low, dim=1).gather(1, order) & (position >= 0))


class InOrder(NamedTuple):
    """The contiguous cache in sequence order: ``key`` and ``value`` [B, H, m, D]; places without a token come first."""

    key: torch.Tensor
    value: torch.Tensor
    position: torch.Tensor
    """[B, H, m] int64, -1 where there is no token."""
    order: torch.Tensor
    """[B, H, m]: which place of the padded pools, one beside the other, each one has."""


def reconstruct(part: Part, heads: int) -> InOrder:
    """Put Quantized tokens, dequantized, in their order among the Original ones; ``heads``: KV heads H."""
    dtype = part.pools[0].key.codes.dtype
    held = [padded(part, number) for number in range(len(part.pools))]
    taken = torch.cat([tokens.taken for tokens in held], dim=1)
    position = torch.cat([tokens.position for tokens in held], dim=1).masked_fill(~taken, -1)
    order = position.argsort(dim=1, stable=True)
    planes = []
    for name in ("key", "value"):
        pieces = []
        for pool, counts, tokens in zip(part.pools, part.counts, held, strict=True):
            plane: Plane = getattr(pool, name)
            item = slots_of(counts.cumsum(0) - counts, counts)
            numbers = torch.zeros(*tokens.taken.shape, plane.dim, dtype=dtype, device=counts.device)
            numbers[tokens.taken] = plane.read(item.slots, item.rows).to(dtype)
            pieces.append(numbers)
        joined = torch.cat(pieces, dim=1)
        planes.append(joined.gather(1, order.unsqueeze(2).expand_as(joined)))
    found = (planes[0], planes[1], position.gather(1, order), order)
    return InOrder(*(item.unflatten(0, (-1, heads)) for item in found))


def first_part(block: Block, position_dtype: torch.dtype) -> Part:
    """A part without any tokens, of the kind that will hold ``block``."""
    rows, device = len(block.tokens.score), block.key.device
    score = torch.empty(0, device=device)
    position = torch.empty(0, dtype=position_dtype, device=device)
    planes = (Plane(item.new_empty(0, item.shape[-1])) for item in (block.key, block.value))
    return Part([Pool(score, position, *planes)], [torch.zeros(rows, dtype=torch.long, device=device)])


def add_quantized(part: Part, number_format: Format) -> None:
    """Give ``part`` a pool of Quantized tokens, without any yet."""
    original, rows = part.pools[0], len(part.counts[0])
    planes = []
    for layout, plane in ((number_format.key, original.key), (number_format.value, original.value)):
        codes = layout.encode(plane.codes.new_empty(0, plane.dim))
        center = plane.codes.new_zeros(rows, plane.dim, dtype=CENTER_DTYPE) if layout.centered else None
        planes.append(Plane(*codes, center, layout))
    part.pools.append(Pool(original.score[:0].clone(), original.position[:0].clone(), *planes))
    part.counts.append(torch.zeros_like(part.counts[0]))


def rebuilt(part: Part, block: Block, choice: Choice, position_dtype: torch.dtype, quantizes: bool) -> Part:
    """What the layer holds once every token has the place that ``choice`` gives it.

    Args:
        quantizes: any token is Quantized, or becomes so.
    """
    source = _Source(part, block)
    counts = [(choice.original >= 0).sum(dim=1)]
    order = source.find(choice.original).in_order(counts[0]).flat
    planes = (Plane(source.numbers(name, order)) for name in ("key", "value"))
    pools = [Pool(source.score.take(order), source.position.take(order).to(position_dtype), *planes)]
    if len(part.pools) > 1 and not quantizes:
        pools.append(part.pools[1])
        counts.append(part.counts[1])
    elif len(part.pools) > 1:
        counts.append((choice.quantized >= 0).sum(dim=1) + (choice.demoted >= 0).sum(dim=1))
        pools.append(_requantized(part, source, choice, counts[1], position_dtype))
    return Part(pools, counts)


def _requantized(
    part: Part, source: _Source, choice: Choice, counts: torch.Tensor, position_dtype: torch.dtype
) -> Pool:
    """The Quantized tokens that stay, as they are, and those that become so."""
    stored, before = part.pools[1], part.counts[1]
    stays, falls = _Found.of(choice.quantized), source.find(choice.demoted)
    is_first = not len(stays.flat)
    if is_first:
        falls = falls.in_order(counts)
    places = [stays.target(counts), falls.target(counts)]
    old = (before.cumsum(0) - before)[stays.rows] + stays.columns
    total = int(counts.sum())

    def put(kept: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        if is_first:
            return fresh.to(kept.dtype)
        whole = kept.new_empty(total, *kept.shape[1:])
        whole.index_copy_(0, places[0], kept.index_select(0, old))
        return whole.index_copy_(0, places[1], fresh.to(kept.dtype))

    planes = []
    for name in ("key", "value"):
        plane: Plane = getattr(stored, name)
        assert plane.layout is not None
        center = plane.center
        if center is not None:
            # Rows have a center from the first time on that they hold a Quantized token.
            center = torch.where((before > 0)[:, None], center, source.mean(name).to(center.dtype))
        codes = plane.layout.encode(
            source.numbers(name, falls.flat), None if center is None else center.index_select(0, falls.rows)
        )
        scale, zero = (
            None if kept is None or new is None else put(kept, new)
            for kept, new in ((plane.scale, codes.scale), (plane.zero, codes.zero))
        )
        planes.append(Plane(put(plane.codes, codes.codes), scale, zero, center, plane.layout))
    score = put(stored.score, source.score.take(falls.flat))
    position = put(stored.position.to(position_dtype), source.position.take(falls.flat))
    return Pool(score, position, *planes)


class _Found(NamedTuple):
    """Tokens that have a place: where they stand in a padded rectangle, and their places."""

    rows: torch.Tensor
    columns: torch.Tensor
    flat: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, choice: torch.Tensor) -> _Found:
        """All tokens of ``choice`` [n, m] that have a place."""
        rows, columns = (choice >= 0).nonzero(as_tuple=True)
        return cls(rows, columns, rows * choice.shape[1] + columns, choice[rows, columns])

    def target(self, counts: torch.Tensor) -> torch.Tensor:
        """Slots of these places, where rows have ``counts`` [n] slots and follow one another."""
        return (counts.cumsum(0) - counts)[self.rows] + self.places

    def in_order(self, counts: torch.Tensor) -> _Found:
        """The same tokens in the order of their slots, of which they fill all."""
        order = torch.empty_like(self.flat)
        order[self.target(counts)] = torch.arange(len(order), device=order.device)
        return _Found(*(item.index_select(0, order) for item in self))


class _Source:
    """The Original tokens held and the new ones, as one padded rectangle [n, m]: those held come first."""

    def __init__(self, part: Part, block: Block) -> None:
        self.part, self.block = part, block
        held = padded(part, 0)
        self.held = held.score.shape[1]
        self.score = torch.cat([held.score, block.tokens.score], dim=1)
        self.position = torch.cat([held.position, block.tokens.position], dim=1)
        self.starts = part.counts[0].cumsum(0) - part.counts[0]

    find = staticmethod(_Found.of)

    def numbers(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """Keys or values [k, D] of the tokens at ``index`` [k] of the flattened rectangle."""
        plane: Plane = getattr(self.part.pools[0], name)
        new: torch.Tensor = getattr(self.block, name)
        width = self.score.shape[1]
        rows, columns = index // width, index % width
        if not self.held:
            return _rows_of(new, rows, columns)
        if not new.shape[2]:
            return plane.codes.index_select(0, self.starts[rows] + columns)
        numbers = plane.codes.new_empty(len(index), plane.dim)
        is_new = columns >= self.held
        old, fresh = (~is_new).nonzero().squeeze(1), is_new.nonzero().squeeze(1)
        numbers.index_copy_(0, old, plane.codes.index_select(0, self.starts[rows[old]] + columns[old]))
        taken = _rows_of(new, rows[fresh], columns[fresh] - self.held)
        return numbers.index_copy_(0, fresh, taken.to(numbers.dtype))

    def mean(self, name: str) -> torch.Tensor:
        """Mean [n, D] of the keys or values of every row. In float64, so that a sample of a padded batch has the mean
        that it has alone."""
        plane: Plane = getattr(self.part.pools[0], name)
        new: torch.Tensor = getattr(self.block, name)
        counts, taken = self.part.counts[0], self.block.tokens.taken
        known = new.flatten(0, 1) if bool(taken.all()) else new.flatten(0, 1).masked_fill(~taken.unsqueeze(2), 0.0)
        total = known.sum(dim=1, dtype=torch.float64)
        total.index_add_(0, slots_of(self.starts, counts).rows, plane.codes.double())
        return total / (counts + taken.sum(dim=1)).clamp_min(1)[:, None]


def _rows_of(x: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``x`` [B, H, T, D] at ``tokens`` [k] of ``rows`` [k], which count heads through all samples: [k, D]."""
    heads, dim = x.shape[1], x.shape[3]
    if x.stride(3) != 1 or any(stride % dim for stride in x.stride()[:3]):
        x = x.contiguous()
    # As a list of rows, wherever they lie: the models' tensors are often transposed, and parts of longer ones. On CPUs
    # whole rows by one flat index are read faster than by `gather` over the head dim.
    batch, head, slot = (stride // dim for stride in x.stride()[:3])
    count = 1 + sum((size - 1) * step for size, step in zip(x.shape[:3], (batch, head, slot), strict=True))
    flat = x.as_strided((count, dim), (dim, 1))
    return flat.index_select(0, rows // heads * batch + rows % heads * head + tokens * slot)
