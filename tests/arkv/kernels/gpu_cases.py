"""The Triton kernels against their twin, run by ``test_gpu.py`` in a process of its own: whether Triton interprets or
compiles is settled when it is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from arkv.formats import FORMATS, Format, Layout, uniform_levels
from arkv.kernels import gpu, twin
from arkv.pools import Part, Plane, Pool
from arkv.store import COUNT, START, Slots, Store, column, slots_of

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

BELOW = (-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911)
ABOVE = (0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1)
NF4 = Layout(4, tuple(1.0 + level for level in BELOW + ABOVE), rotated=True, centered=True)
TABLE = Format("table", NF4, Layout(3, (0.0, 0.5, 1.5, 2.0, 2.75, 3.0, 5.0, 6.0)))
"""Levels that are not uniform, of keys that are turned and of values that are not."""

PLAIN = Format("plain", Layout(4, uniform_levels(4), centered=True), Layout(2, uniform_levels(2)))
"""Codes of few bits of numbers that are not turned."""

ALL: dict[str, Format | None] = {**FORMATS, "table": TABLE, "plain": PLAIN, "none": None}
EACH_FORMAT = pytest.mark.parametrize("name", sorted(ALL))

SINKS, WINDOW = 2, 5


@dataclass
class Row:
    """What a row of a random store holds: tokens seen, and Original and Quantized ones held and slots of each."""

    seen: int
    original: int
    quantized: int
    slots: tuple[int, int]
    first: int = 0


ROWS = [
    # It evicts into a free Quantized slot, then into those of others.
    Row(60, 20, 9, (20, 10)),
    # It has free Original slots for a step.
    Row(41, 24, 12, (25, 12), first=3),
    # It has no Quantized slots, and no past.
    Row(30, 7, 0, (7, 0)),
    # It has not yet filled its window, and then has nothing but free slots.
    Row(6, 4, 0, (12, 4), first=2),
]
"""Rows of a layer, two heads of two samples."""


def random_part(
    rows: Sequence[Row], number_format: Format | None, key_dim: int, value_dim: int, dtype: torch.dtype
) -> Part:
    """A layer with random tokens; a few channels of the keys are large, as in real models."""
    held: list[list[int]] = [[], []]
    for row in rows:
        relative = row.seen - row.first
        fixed = min(relative, SINKS + WINDOW)
        place = torch.arange(fixed)
        if relative > SINKS + WINDOW:
            ring = torch.arange(relative - WINDOW, relative)
            place[SINKS + (ring - SINKS) % WINDOW] = ring
        past = SINKS + torch.randperm(max(relative - SINKS - WINDOW, 0))
        stays, falls, _ = past.split(
            [row.original - fixed, row.quantized, len(past) - (row.original - fixed) - row.quantized]
        )
        held[0] += (torch.cat([place, stays]) + row.first).tolist()
        held[1] += (falls + row.first).tolist()
    pools, counts = [], []
    for number, layouts in enumerate(
        [(None, None)] if number_format is None else [(None, None), (number_format.key, number_format.value)]
    ):
        position = torch.tensor(held[number], dtype=torch.int32)
        n = len(position)
        numbers = torch.tensor([row.original if number == 0 else row.quantized for row in rows])
        loud = 1 + 4 * (torch.rand(key_dim) > 0.9)
        key, value = (torch.randn(n, key_dim) * loud).to(dtype), torch.randn(n, value_dim).to(dtype)
        planes = []
        for x, layout in zip((key, value), layouts, strict=True):
            if layout is None:
                planes.append(Plane(x))
                continue
            center = torch.randn(len(rows), x.shape[1]).bfloat16() if layout.centered else None
            owner = torch.arange(len(rows)).repeat_interleave(numbers)
            codes = layout.encode(x, None if center is None else center[owner])
            planes.append(Plane(*codes, center, layout))
        pools.append(Pool(torch.rand(n), position, *planes))
        counts.append(numbers)
    return Part(pools, counts)


def store_of(
    name: str,
    dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float32,
    rows: Sequence[Row] = ROWS,
    layers: int = 2,
    seed: int = 0,
) -> Store:
    """A random store, of rows that are the same in every layer."""
    torch.manual_seed(seed)
    number_format = ALL[name]
    parts = [random_part(rows, number_format, *dims, dtype) for _ in range(layers)]
    capacities = [
        np.array([row.slots[number] for row in rows] * layers) for number in range(1 if number_format is None else 2)
    ]
    seen, first = np.array([row.seen for row in rows]), np.array([row.first for row in rows])
    store = Store(parts, seen, first, capacities)
    store.rows = store.rows.to(DEVICE)
    store.pools = [pool.map(lambda tensor: tensor.to(DEVICE)) for pool in store.pools]
    return store


def held(store: Store, number: int) -> Slots:
    start, count = (store.rows[:, column(number, which)] for which in (START, COUNT))
    return slots_of(start, count)


def compare(mine: Store, its: Store) -> None:
    """That the kernels' store is that of the twin, but that sums may round another way: a code then is the next one."""
    assert torch.equal(mine.rows, its.rows)
    for number, (got, expected) in enumerate(zip(mine.pools, its.pools, strict=True)):
        index = held(its, number)
        assert torch.equal(got.position[index.slots], expected.position[index.slots])
        torch.testing.assert_close(got.score[index.slots], expected.score[index.slots], rtol=1e-4, atol=1e-6)
        for one, other in ((got.key, expected.key), (got.value, expected.value)):
            if one.layout is None:
                assert torch.equal(one.codes[index.slots], other.codes[index.slots])
                continue
            assert one.scale is not None
            assert other.scale is not None
            torch.testing.assert_close(one.scale[index.slots], other.scale[index.slots], rtol=1 / 128, atol=0)
            if one.layout.rotated:
                # What turned numbers stand for is compared before they are turned back.
                one, other = (plane._replace(layout=_plain(plane.layout)) for plane in (one, other))
            a, b = (plane.read(index.slots, index.rows) for plane in (one, other))
            assert other.layout is not None
            assert other.scale is not None
            step = other.scale[index.slots].float()[:, None] * _widest_step(other.layout)
            assert ((a - b).abs() <= 1.1 * step).all()
            assert ((a - b).abs() > 0.1 * step).sum() <= 0.01 * a.numel()


def _plain(layout: Layout | None) -> Layout:
    assert layout is not None
    return Layout(layout.bits, layout.levels, layout.floating, centered=layout.centered)


def _widest_step(layout: Layout) -> float:
    if layout.levels:
        return max(b - a for a, b in zip(layout.levels, layout.levels[1:], strict=False))
    return 32.0 if layout.floating else 1.0


def incoming(store: Store, group: int, batch: int = 2) -> tuple[torch.Tensor, ...]:
    """A layer's random query [B, H * G, 1, D], key and value [B, H, 1, D]."""
    key, value = store.pools[0].key, store.pools[0].value
    heads, dtype = store.layer_rows // batch, key.codes.dtype
    shapes = (heads * group, key.dim), (heads, key.dim), (heads, value.dim)
    return tuple(torch.randn(batch, n, 1, dim).to(dtype).to(DEVICE) for n, dim in shapes)


def attend_both(
    mine: Store, its: Store, layer: int, group: int, softcap: float = 0.0, sinks: bool = False, **kw: Any
) -> list[list[torch.Tensor]]:
    """One layer by the kernels and by the twin, whose outputs and importance are found to be the same.

    Returns:
        Importance of both."""
    query, key, value = incoming(mine, group)
    extra = torch.randn(query.shape[1]).to(DEVICE) if sinks else None
    outputs, importance = [], []
    for store, attend, more in ((mine, gpu.attend, {"widths": mine.widths, **kw}), (its, twin.attend, {})):
        left = [torch.zeros_like(pool.score) for pool in store.pools]
        begin = layer * store.layer_rows
        arguments = query, key, value, store.rows, begin, store.pools, SINKS, WINDOW, query.shape[-1] ** -0.5
        outputs.append(attend(*arguments, softcap, extra, left, **more))  # type: ignore[operator]
        importance.append(left)
    assert outputs[0].dtype == query.dtype
    # The interpreter cuts bits off where bfloat16 numbers are stored.
    rough = {"rtol": 1e-2, "atol": 1e-3} if query.dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
    exact = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(*outputs, **(exact if query.dtype == torch.float32 else rough))
    torch.testing.assert_close(*importance, **exact)
    assert torch.equal(mine.pools[0].key.codes, its.pools[0].key.codes)
    assert torch.equal(mine.pools[0].value.codes, its.pools[0].value.codes)
    return importance


def step_both(
    mine: Store,
    its: Store,
    group: int,
    recency: bool = False,
    rate: float = 0.1,
    pool_width: int = 5,
    largest: bool = False,
    **kw: Any,
) -> None:
    """A step of all layers; the kernels then go on with the twin's store, so that differences do not add up."""
    for store, make_room in ((mine, gpu.make_room), (its, twin.make_room)):
        make_room(store.rows, store.pools, SINKS, WINDOW, recency)
    compare(mine, its)
    for pool, other in zip(mine.pools, its.pools, strict=True):
        for tensor, theirs in zip(pool.tensors(), other.tensors(), strict=True):
            tensor.copy_(theirs)
    found = [attend_both(mine, its, layer, group, **kw) for layer in range(its.layers)]
    for store, remember, which in ((mine, gpu.remember, 0), (its, twin.remember, 1)):
        # Each layer wrote to slots of its own.
        importance = [sum(parts[1:], parts[0]) for parts in zip(*(pair[which] for pair in found), strict=True)]
        if not recency:
            remember(store.rows, store.pools, importance, WINDOW, rate, pool_width, largest)
    compare(mine, its)


def both(store: Store) -> tuple[Store, Store]:
    return store.clone(), store


@EACH_FORMAT
def test_steps(name: str) -> None:
    mine, its = both(store_of(name))
    for _ in range(4):
        step_both(mine, its, group=3)


@pytest.mark.parametrize("name", ["fp8", "int8", "plain", "none"])
def test_steps_that_never_meet(name: str) -> None:
    """Where nothing is turned, kernel and twin make the same codes, and so the same choices for ever."""
    mine, its = both(store_of(name, layers=1))
    for _ in range(8):
        for store, functions in ((mine, gpu), (its, twin)):
            functions.make_room(store.rows, store.pools, SINKS, WINDOW, False)
        importance = attend_both(mine, its, 0, 2)
        for store, functions, left in ((mine, gpu, importance[0]), (its, twin, importance[1])):
            functions.remember(store.rows, store.pools, left, WINDOW, 0.2, 0)
        compare(mine, its)
        for pool, other in zip(mine.pools, its.pools, strict=True):
            assert torch.equal(pool.key.codes, other.key.codes)
            assert torch.equal(pool.value.codes, other.value.codes)


@pytest.mark.parametrize("recency", [False, True])
def test_equal_scores(recency: bool) -> None:
    """Of equal scores the newest token goes, Original or Quantized; ranked by age, the oldest."""
    store = store_of("int8", rows=[Row(60, 20, 10, (20, 10)), *ROWS[1:]], layers=1)
    for pool in store.pools:
        pool.score.copy_(pool.position.float() if recency else torch.zeros_like(pool.score))
    mine, its = both(store)
    for _ in range(3):
        step_both(mine, its, 1, recency, rate=0.0, pool_width=1)


def test_an_older_token_with_the_score_of_a_quantized_one() -> None:
    """It takes its place."""
    store = store_of("int8", rows=[Row(60, 20, 10, (20, 10)), *ROWS[1:]], layers=1)
    original, stored = store.pools
    past = slice(SINKS + WINDOW, 20)
    original.score.fill_(1.0)
    stored.score.zero_()
    oldest = int(original.position[past].min())
    assert oldest < int(stored.position[:10].max())
    original.score[past] = (original.position[past] != oldest).float()
    mine, its = both(store)
    step_both(mine, its, 1)
    assert oldest in its.pools[1].position[:10]


@pytest.mark.parametrize("pool_width", [1, 5, 7])
def test_scores_averaged_over_neighbours(pool_width: int) -> None:
    mine, its = both(store_of("int4"))
    for _ in range(2):
        step_both(mine, its, 2, rate=0.0, pool_width=pool_width)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_scores_of_the_largest_attention(rate: float) -> None:
    mine, its = both(store_of("int4"))
    for _ in range(2):
        step_both(mine, its, 2, rate=rate, largest=True)


@pytest.mark.parametrize("name", ["none", "fp8", "int4", "k4v3", "int2", "table"])
@pytest.mark.parametrize("dims", [(16, 16), (96, 96), (128, 64), (64, 128)])
def test_head_dims(name: str, dims: tuple[int, int]) -> None:
    step_both(*both(store_of(name, dims, layers=1)), group=2)


@pytest.mark.parametrize("name", ["int8", "k4v3"])
def test_wide_heads(name: str) -> None:
    step_both(*both(store_of(name, (256, 192), layers=1)), group=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    mine, its = both(store_of(name, dtype=dtype, layers=1))
    for _ in range(2):
        step_both(mine, its, group=2)


@pytest.mark.parametrize("group", [1, 5, 16])
def test_query_heads_per_kv_head(group: int) -> None:
    step_both(*both(store_of("int4", layers=1)), group=group)


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks(softcap: float, sinks: bool) -> None:
    step_both(*both(store_of("int4", layers=1)), group=3, softcap=softcap, sinks=sinks)


MANY = [
    Row(400, 200, 150, (200, 150)),
    Row(200, 30, 70, (30, 70)),
    Row(320, 129, 1, (130, 1)),
    Row(130, 128, 0, (128, 0), first=2),
]
"""Rows of several splits: full ones, ends in the first or at a block's end, and one whose new token starts a split."""


@pytest.mark.parametrize("name", ["int8", "k4v3", "none"])
@pytest.mark.parametrize("slots_per_split", [64, 128, None])
def test_several_splits(name: str, slots_per_split: int | None) -> None:
    step_both(*both(store_of(name, rows=MANY, layers=1)), group=2, slots_per_split=slots_per_split, sinks=True)


def test_more_splits_than_are_taken_at_a_time() -> None:
    rows = [Row(4400, 4300, 60, (4300, 64)), *ROWS[1:]]
    step_both(*both(store_of("int8", (16, 16), rows=rows, layers=1)), group=2, slots_per_split=64)


def test_the_new_token_alone_in_its_split() -> None:
    """It starts a split that holds nothing else, while the window fills up."""
    rows = [Row(64, 64, 0, (70, 4))] * 4
    torch.manual_seed(0)
    mine, its = both(store_of("int8", rows=rows, layers=1))
    for store in (mine, its):
        twin_window = 80
        gpu.make_room(store.rows, store.pools, SINKS, twin_window, False)
    query, key, value = incoming(mine, 2)
    left = [[torch.zeros_like(pool.score) for pool in store.pools] for store in (mine, its)]
    outputs = [
        function(query, key, value, store.rows, 0, store.pools, SINKS, twin_window, 0.125, 0.0, None, scores, **kw)  # type: ignore[operator]
        for function, store, scores, kw in (
            (gpu.attend, mine, left[0], {"slots_per_split": 64}),
            (twin.attend, its, left[1], {}),
        )
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*left, rtol=1e-4, atol=1e-6)


def test_widths_and_importance_are_optional() -> None:
    mine, its = both(store_of("int4"))
    for store in (mine, its):
        twin.make_room(store.rows, store.pools, SINKS, WINDOW, False)
    query, key, value = incoming(mine, 2)
    outputs = [
        function(query, key, value, store.rows, 4, store.pools, SINKS, WINDOW, 0.125, 0.0, None, [])
        for function, store in ((gpu.attend, mine), (twin.attend, its))
    ]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_numbers_that_show_how_codes_are_rounded() -> None:
    """Every e4m3 number, what lies halfway between two, and tokens of zeros."""
    codes = torch.arange(127, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    halves = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([448.0, 448.0, 448.0])])
    for name in ("fp8", "int8", "int4", "table"):
        store = store_of(name, (256, 256), rows=[Row(60, 20, 8, (20, 10))] * 2, layers=1)
        original = store.pools[0]
        lowest = original.score.view(2, 20)
        lowest[:, SINKS + WINDOW :] = torch.rand(2, 13).to(DEVICE) + 1
        lowest[:, 9] = 0.0
        original.key.codes.view(2, 20, 256)[0, 9] = (halves * torch.tensor([1.0, -1.0]).repeat(128)).to(DEVICE)
        original.value.codes.view(2, 20, 256)[1, 9] = 0.0
        mine, its = both(store)
        for each, make_room in ((mine, gpu.make_room), (its, twin.make_room)):
            make_room(each.rows, each.pools, SINKS, WINDOW, False)
        compare(mine, its)
        if name in ("fp8", "int8"):
            for one, other in zip(mine.pools[1].tensors(), its.pools[1].tensors(), strict=True):
                assert torch.equal(one, other)


def test_no_quantized_slots() -> None:
    """A pool that no row has any slots in."""
    rows = [Row(30, 7, 0, (7, 0)), Row(40, 20, 0, (20, 0))] * 2
    mine, its = both(store_of("int4", rows=rows, layers=1))
    for rate in (0.1, 0.0):
        step_both(mine, its, group=2, rate=rate)


class Unsynchronized(TorchDispatchMode):
    """Fails at operations of torch that wait for the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave"), name
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{name} with a mask"
        return function(*args, **(kwargs or {}))


def kernel_modules() -> dict[str, Any]:
    """The module of every kernel; only here is Triton imported."""
    from arkv.kernels.gpu import attention, combining, rule

    return {"make_room_rows": rule, "attend_splits": attention, "combine_splits": combining}


@pytest.mark.parametrize("rate, largest", [(0.0, False), (0.1, False), (0.1, True)])
def test_nothing_waits_for_the_device(rate: float, largest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of("int4", layers=1)
    importance = [torch.zeros_like(pool.score) for pool in store.pools]
    tensors = incoming(store, 2)
    if DEVICE == "cpu":
        # The interpreter itself looks at numbers.
        for name, module in kernel_modules().items():
            monkeypatch.setattr(module, name, _Nothing())
    with Unsynchronized():
        gpu.make_room(store.rows, store.pools, SINKS, WINDOW, False)
        settings = SINKS, WINDOW, 0.125, 0.0, None
        gpu.attend(*tensors, store.rows, 0, store.pools, *settings, importance, widths=store.widths)
        gpu.remember(store.rows, store.pools, importance, WINDOW, rate, 5, largest)


class _Nothing:
    """In place of a kernel."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kw: None


def test_tiles_of_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float16, which alone the interpreter can multiply."""
    monkeypatch.setattr(gpu, "_interpreted", lambda: False)
    step_both(*both(store_of("none", dtype=torch.float16, layers=1)), group=2)


def test_large_logits_and_short_positions() -> None:
    """Logits beyond what exp can take without its maximum; positions of 16 bits."""
    store = store_of("int8", layers=1)
    store.pools[0].key.codes.mul_(100)
    store.pools = [pool._replace(position=pool.position.short()) for pool in store.pools]
    mine, its = both(store)
    for _ in range(2):
        step_both(mine, its, group=2)
