"""Random stores for tests of kernels, and the comparison of a kernel's step with its twin's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from arkv.formats import FORMATS, Format, Layout
from arkv.formats.base import CENTER_DTYPE
from arkv.kernels import twin
from arkv.pools import Plane, Pool
from arkv.store import CAPACITY, COUNT, START, column, place_of, slots_of

NF4 = Format(
    "nf4",
    Layout(
        *(4, (0.0, 0.3, 0.47, 0.6, 0.71, 0.81, 0.91, 1.0, 1.08, 1.16, 1.25, 1.34, 1.44, 1.56, 1.72, 2.0)),
        rotated=True,
        centered=True,
    ),
    Layout(3, (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
)
"""Levels at unequal distances, which none of the formats that come along has."""


@dataclass
class Case:
    """Rows of a few layers and their pools, and what a step is told beside them."""

    rows: torch.Tensor
    pools: list[Pool]
    formats: list[str]
    layers: int
    batch: int
    heads: int
    n_sink: int = 2
    window: int = 8

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for pool in self.pools for tensor in pool.tensors()]

    def clone(self) -> Case:
        return Case(
            *(self.rows.clone(), [pool.map(torch.clone) for pool in self.pools], self.formats),
            *(self.layers, self.batch, self.heads, self.n_sink, self.window),
        )

    def to(self, device: str) -> Case:
        return Case(
            *(self.rows.to(device), [pool.map(lambda tensor: tensor.to(device)) for pool in self.pools], self.formats),
            *(self.layers, self.batch, self.heads, self.n_sink, self.window),
        )

    def importance(self) -> list[torch.Tensor]:
        return [torch.zeros_like(pool.score) for pool in self.pools]

    def held(self, number: int) -> torch.Tensor:
        """Slots of a pool that hold tokens."""
        return slots_of(self.rows[:, column(number, START)], self.rows[:, column(number, COUNT)]).slots


def case(
    quant_format: str | None,
    *,
    dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    batch: int = 2,
    heads: int = 3,
    original: int = 200,
    quantized: int = 300,
    positions: torch.dtype = torch.int32,
    ties: bool = False,
    n_sink: int = 2,
    window: int = 8,
    seed: int = 0,
) -> Case:
    """Rows with up to so many Original and Quantized slots. Some are full, some are not; some are shorter than sinks
    and window; some have no Quantized slot, some no Quantized token.

    Args:
        ties: many scores are equal.
    """
    random = torch.Generator().manual_seed(seed)
    count = layers * batch * heads

    def number(low: int, high: int) -> int:
        """From low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=random))

    fixed = n_sink + window
    table, held = [], []
    for row in range(count):
        first = number(0, 5) if row % 2 else 0
        short = row % 5 == 4
        if short:
            past, relative = [0, 0], number(1, fixed)
        else:
            past = [number(0, max(original - fixed, 0)), number(0, quantized) if row % 4 != 1 else 0]
            relative = fixed + sum(past) + number(0, 50)
        capacities = [fixed + past[0] + (number(1, 9) if row % 3 == 0 else 0), past[1]]
        if row % 4 != 1 and row % 3 != 1:
            capacities[1] += number(1, 5)
        between = n_sink + first + torch.randperm(max(relative - fixed, 0), generator=random)
        newest = torch.arange(min(relative, fixed))
        if relative > fixed:
            newest[n_sink:] = torch.arange(relative - window, relative)
        ring = torch.empty_like(newest)
        ring[place_of(newest, n_sink, window)] = newest + first
        held.append([torch.cat([ring, between[: past[0]]]), between[past[0] : sum(past)]])
        table.append([relative + first, first, [len(part) for part in held[-1]], capacities])
    pools, columns = [], [torch.tensor([row[0] for row in table]), torch.tensor([row[1] for row in table])]
    names = [None] if quant_format is None else [None, quant_format]
    for place in range(len(names)):
        capacity = torch.tensor([row[3][place] for row in table])
        columns += [capacity.cumsum(0) - capacity, torch.tensor([row[2][place] for row in table]), capacity]
    rows = torch.stack(columns, dim=1).contiguous()
    for place, name in enumerate(names):
        slots = int(rows[:, column(place, CAPACITY)].sum())
        score = torch.rand(slots, generator=random)
        if ties:
            score = (score * 3).round()
        position = torch.zeros(slots, dtype=positions)
        used = slots_of(rows[:, column(place, START)], rows[:, column(place, COUNT)])
        position[used.slots] = torch.cat([parts[place] for parts in held]).to(positions)
        planes = []
        for dim, layout in zip(dims, _layouts(name), strict=True):
            plane = _empty_plane(slots, count, dim, dtype, layout, random)
            plane.write(used.slots, used.rows, torch.randn(len(used.slots), dim, generator=random))
            planes.append(plane)
        pools.append(Pool(score, position, *planes))
    return Case(rows, pools, [] if quant_format is None else [quant_format], layers, batch, heads, n_sink, window)


def _layouts(name: str | None) -> tuple[Layout | None, Layout | None]:
    return (None, None) if name is None else (FORMATS[name].key, FORMATS[name].value)


def _empty_plane(
    slots: int, rows: int, dim: int, dtype: torch.dtype, layout: Layout | None, random: torch.Generator
) -> Plane:
    if layout is None:
        return Plane(torch.zeros(slots, dim, dtype=dtype))
    codes = torch.zeros(slots, dim * layout.bits // 8, dtype=torch.uint8)
    scale, zero = (torch.zeros(slots, dtype=layout.range_dtype) for _ in range(2))
    center = torch.randn(rows, dim, generator=random).to(CENTER_DTYPE) if layout.centered else None
    return Plane(codes, scale, zero if layout.levels else None, center, layout)


@dataclass
class Step:
    """What a model brings to one step, and how scores are kept."""

    group: int = 3
    softcap: float = 0.0
    sinks: bool = False
    recency: bool = False
    rate: float = 0.0
    pool_width: int = 5
    largest: bool = False


def states(mine: Case, step: Step, layer: int, seed: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Query, key and value of a layer's new tokens, as views of projections that lie token by token; and sinks."""
    random = torch.Generator().manual_seed(1000 * seed + layer)
    dims, dtype = (mine.pools[0].key.dim, mine.pools[0].value.dim), mine.pools[0].key.codes.dtype

    def some(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(mine.batch, 1, heads, dim, generator=random).to(device, dtype).transpose(1, 2)

    query_heads = mine.heads * step.group
    sinks = torch.randn(query_heads, generator=random).to(device, dtype)
    return some(query_heads, dims[0]) * 2, some(mine.heads, dims[0]), some(mine.heads, dims[1]), sinks


def compare(
    mine: Case,
    step: Step,
    make_room: Callable[..., None],
    attend: Callable[..., torch.Tensor],
    remember: Callable[..., None],
    steps: int = 20,
    device: str = "cpu",
) -> None:
    """Kernels, called like the twins with tensors and formats in the place of pools, against their twins: steps from
    the same state."""
    mine = mine.to(device)
    for number in range(steps):
        its = mine.clone()
        ahead = (mine.rows, mine.tensors(), mine.formats)
        make_room(*ahead, mine.n_sink, mine.window, step.recency)
        twin.make_room(its.rows, its.pools, its.n_sink, its.window, step.recency)
        same_tokens(mine, its)
        # Codes at the middle of two levels may differ.
        for one, other in zip(mine.tensors(), its.tensors(), strict=True):
            one.copy_(other)
        found, expected = mine.importance(), its.importance()
        layer_rows = mine.batch * mine.heads
        for layer in range(mine.layers):
            query, key, value, sinks = states(mine, step, layer, number, device)
            told = (mine.n_sink, mine.window, query.shape[-1] ** -0.5, step.softcap, sinks if step.sinks else None)
            begin = layer * layer_rows
            got = attend(query, key, value, mine.rows, begin, *ahead[1:], *told, found)
            right = twin.attend(query, key, value, its.rows, begin, its.pools, *told, expected)
            close(got, right, 1e-5)
            assert got.dtype == query.dtype
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            close(one[mine.held(place)], other[mine.held(place)], 2e-5)
        same_tokens(mine, its)
        for one, other in zip(found, expected, strict=True):
            one.copy_(other)
        remember(*ahead, found, mine.window, step.rate, step.pool_width, step.largest)
        twin.remember(its.rows, its.pools, expected, its.window, step.rate, step.pool_width, step.largest)
        for place, (one, other) in enumerate(zip(mine.pools, its.pools, strict=True)):
            held = mine.held(place)
            torch.testing.assert_close(one.score[held], other.score[held], rtol=1e-6, atol=1e-12)


def close(got: torch.Tensor, right: torch.Tensor, tolerance: float) -> None:
    if got.dtype != torch.float32:
        # The same number rounded to a few bits.
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, right, rtol=2 * eps, atol=1e-3 * float(right.abs().max()))
        return
    assert got.shape == right.shape
    if got.numel():
        assert float((got - right).abs().max()) <= tolerance * float(right.abs().max())


def same_tokens(mine: Case, its: Case) -> None:
    """The same tokens in the same slots; what codes stand for within a step."""
    assert torch.equal(mine.rows, its.rows)
    for number, (one, other) in enumerate(zip(mine.pools, its.pools, strict=True)):
        held = slots_of(mine.rows[:, column(number, START)], mine.rows[:, column(number, COUNT)])
        assert torch.equal(one.position[held.slots], other.position[held.slots])
        assert torch.equal(one.score[held.slots], other.score[held.slots])
        for plane, twins in ((one.key, other.key), (one.value, other.value)):
            if plane.layout is None:
                assert torch.equal(plane.codes[held.slots], twins.codes[held.slots])
                continue
            got, right = plane.read(*held), twins.read(*held)
            assert plane.scale is not None
            allowed = 1.01 * _widest_step(plane.layout) * plane.scale[held.slots].float()
            assert bool(((got - right).norm(dim=-1) <= allowed).all())
            # And nearly all alike.
            assert float((plane.codes != twins.codes)[held.slots].float().mean()) < 1e-3


def _widest_step(layout: Layout) -> float:
    """Between two codes, in units of the scale."""
    if layout.levels:
        return max(high - low for low, high in itertools.pairwise(layout.levels))
    return 32.0 if layout.floating else 1.0
