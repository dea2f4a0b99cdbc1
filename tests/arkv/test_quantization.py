"""Number formats: what a code stands for, how far a value moves, and what a token really costs."""

from __future__ import annotations

import pytest
import torch

from arkv.formats import FORMATS, Codes, Format, Layout, uniform_levels
from arkv.formats.base import CENTER_DTYPE, e4m3_to_float
from arkv.formats.packing import check_packing, pack, unpack
from arkv.formats.rotation import rotation
from arkv.pools import Part, Plane, Pool, pool_of
from arkv.store import CAPACITY, COUNT, START, Store, column, slots_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {f"{name} {part}": getattr(FORMATS[name], part) for name in sorted(FORMATS) for part in ("key", "value")}
SLOTS, DIM = 128, 64


def naive_e4m3(code: int) -> float:
    """The value of an e4m3 (fn) code, from its bits."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = torch.tensor([naive_e4m3(code) for code in range(256) if code & 0x7F != 0x7F])


@pytest.fixture(params=sorted(FORMATS))
def number_format(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


@pytest.fixture(params=sorted(LAYOUTS))
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def center_of(layout: Layout, x: torch.Tensor) -> torch.Tensor | None:
    """The mean of every head's tokens [B, H, S, D], as it is stored, for each token; None where there is none."""
    return x.float().mean(dim=2, keepdim=True).to(CENTER_DTYPE).expand(x.shape) if layout.centered else None


def flat(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1])


def encode(layout: Layout, x: torch.Tensor, center: torch.Tensor | None = None) -> Codes:
    """Codes of ``x`` [..., D], token by token."""
    return layout.encode(x.reshape(-1, x.shape[-1]), flat(center))


def decode(layout: Layout, stored: Codes, center: torch.Tensor | None = None) -> torch.Tensor:
    return layout.decode(stored, flat(center))


def round_trip(layout: Layout, x: torch.Tensor, center: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` [B, H, S, D] as it comes back; ``center`` (of the same shape) None: the mean of every head."""
    center = center_of(layout, x) if center is None and layout.centered else center
    return decode(layout, encode(layout, x, center), center).view(x.shape)


def in_code_space(layout: Layout, x: torch.Tensor, center: torch.Tensor | None) -> torch.Tensor:
    """The numbers [B, H, S, D] that codes stand for."""
    x = x.float() if center is None else x.float() - center.float()
    return x @ rotation(x.shape[-1], x.device) if layout.rotated else x


def half_step(layout: Layout, x: torch.Tensor) -> torch.Tensor:
    """Half a quantization step at each number of :func:`in_code_space`, worked out from the numbers alone.

    A step with a zero point may be wider by the rounding of its range to bfloat16, outwards and twice.
    """
    if layout.floating:
        scale = x.abs().amax(-1, keepdim=True) / 448
        exponent = torch.floor(torch.log2((x.abs() / scale).clamp_min(2.0**-6)))
        return scale * 2.0 ** (exponent - 4)
    if not layout.rotated:
        return (x.abs().amax(-1, keepdim=True) / (2 ** (layout.bits - 1) - 1) / 2).expand_as(x)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    width = (high - low) + low.abs() / 128
    return (width * (1 + 1 / 64) / (2**layout.bits - 1) / 2).expand_as(x)


@pytest.mark.parametrize("dim", [1, 2, 6, 16, 64, 80, 96, 128, 256])
def test_rotation_is_orthogonal_and_spreads_every_channel(dim: int) -> None:
    matrix = rotation(dim, torch.device("cpu")).double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64), atol=1e-6)
    assert matrix.abs().max() <= (2 / dim) ** 0.5 + 1e-6


def test_rotation_may_be_used_with_gradients_after_inference() -> None:
    with torch.inference_mode():
        rotation(24, torch.device("cpu"))
    x = torch.ones(2, 24, requires_grad=True)
    (x @ rotation(24, torch.device("cpu"))).sum().backward()
    assert x.grad is not None


def test_all_e4m3_codes_are_expanded_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = [code for code in range(256) if code & 0x7F != 0x7F]
    expanded = e4m3_to_float(codes)
    assert expanded.dtype == torch.float32
    assert torch.equal(expanded[numbers], E4M3)
    assert torch.equal(expanded[numbers], codes.float()[numbers])
    # -0.0 too, which torch.equal cannot tell from 0.0.
    assert torch.equal(expanded[numbers].signbit(), E4M3.signbit())


def test_expanding_e4m3_keeps_any_shape_and_stride() -> None:
    codes = random(2, 3, 8, 6).to(torch.float8_e4m3fn)
    assert torch.equal(e4m3_to_float(codes), codes.float())
    assert torch.equal(e4m3_to_float(codes[:, 1:, ::2]), codes[:, 1:, ::2].float())
    assert torch.equal(e4m3_to_float(codes.transpose(1, 2)), codes.transpose(1, 2).float())
    assert torch.equal(e4m3_to_float(codes.view(torch.uint8)), codes.float())
    assert e4m3_to_float(codes[:, :, :0]).shape == (2, 3, 0, 6)


@pytest.mark.parametrize("dim", [8, 64, 80, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_codes_come_back_in_as_few_bytes_as_they_need(bits: int, dim: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, dim), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 5, dim * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)
    # Any bytes are codes.
    some = torch.randint(0, 256, (7, dim * bits // 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    assert torch.equal(pack(unpack(some, bits), bits), some)


def test_where_codes_lie_in_bytes() -> None:
    """What kernels rely on: runs of neighbouring channels under one shift and mask."""
    for bits in (2, 4):
        codes = torch.arange(16).to(torch.uint8) % 2**bits
        packed = pack(codes, bits).tolist()
        for channel, code in enumerate(codes.tolist()):
            byte, place = channel % len(packed), channel // len(packed)
            assert packed[byte] >> (bits * place) & (2**bits - 1) == code
    codes = torch.randint(0, 8, (16,), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    packed, n = pack(codes, 3).tolist(), 2
    for j in range(n):
        for run in range(3):
            assert packed[run * n + j] & 7 == codes[j + 2 * run * n]
            assert packed[run * n + j] >> 3 & 7 == codes[j + (2 * run + 1) * n]
        first, second, third = (packed[run * n + j] >> 6 for run in range(3))
        assert first + 4 * (third & 1) == codes[j + 6 * n]
        assert second + 4 * (third >> 1) == codes[j + 7 * n]


@pytest.mark.parametrize("bits, works, fails", [(2, 84, 82), (3, 88, 84), (4, 82, 81), (8, 81, None)])
def test_head_dims_that_do_not_fill_bytes_are_refused(bits: int, works: int, fails: int | None) -> None:
    check_packing(bits, works)
    if fails is not None:
        with pytest.raises(ValueError, match=f"head dim {fails}.*int8"):
            check_packing(bits, fails)


def test_a_format_asks_for_keys_and_values_apart() -> None:
    FORMATS["k4v3"].check(82, 88)
    with pytest.raises(ValueError, match="84"):
        FORMATS["k4v3"].check(82, 84)
    with pytest.raises(ValueError, match="81"):
        FORMATS["k4v3"].check(81, 88)
    FORMATS["int8"].check(81, 83)


def test_every_value_of_a_symmetric_format_survives() -> None:
    """Numbers that lie on the grid, with the largest among them, come back exactly."""
    for name, grid in {"fp8": E4M3, "int8": torch.arange(-127, 128).float()}.items():
        x = grid[None, None, None, :] * 2.0**-5
        for layout in (FORMATS[name].key, FORMATS[name].value):
            assert torch.equal(round_trip(layout, x), x), name


@pytest.mark.parametrize("bits", [4, 2])
def test_every_value_of_a_format_with_zero_points_survives(bits: int) -> None:
    """So does, once turned, a grid of 16 (or 4) values whose ends are bfloat16 numbers."""
    grid = torch.arange(2**bits).float() * 0.25 - 1.0
    turned = grid.repeat(64 // len(grid)).expand(1, 1, 64, 64)
    x = turned @ rotation(64, turned.device).T
    assert torch.allclose(round_trip(FORMATS[f"int{bits}"].value, x), x, atol=1e-6)
    center = torch.full((1, 1, 64, 64), 3.0)
    keys = round_trip(FORMATS[f"int{bits}"].key, x + 3.0, center)
    assert torch.allclose(keys, x + 3.0, atol=1e-5)


def test_the_nearest_code_is_taken() -> None:
    """Against a search over all codes, which shares nothing with the implementation."""
    x = random(1, 2, 20, 16, seed=3)
    for name, grid in {"fp8": E4M3, "int8": torch.arange(-127, 128).float()}.items():
        scale = x.abs().amax(-1, keepdim=True) / grid.max()
        nearest = ((x / scale).unsqueeze(-1) - grid).abs().min(-1).values
        taken = ((x - round_trip(FORMATS[name].value, x)) / scale).abs()
        assert (taken <= nearest + 1e-4).all(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (1e-3, 5.0), (100.0, -300.0), (1e-4, 0.0)])
def test_the_error_is_half_a_step(layout: Layout, dtype: torch.dtype, scale: float, offset: float) -> None:
    x = (random(2, 2, SLOTS, DIM, seed=4) * scale + offset).to(dtype)
    center = center_of(layout, x)
    target = in_code_space(layout, x, center)
    error = (in_code_space(layout, round_trip(layout, x), center) - target).abs()
    assert (error <= half_step(layout, target) * 1.001 + abs(offset) * 3e-6).all()


def test_a_mean_that_all_keys_share_costs_nothing() -> None:
    """The reason for centers: a loud channel takes no codes from the others."""
    x = random(1, 2, SLOTS, DIM, seed=4)
    loud = torch.zeros(DIM)
    loud[5] = 100.0
    for name in ("int4", "int2", "k4v3"):
        quiet = (round_trip(FORMATS[name].key, x) - x).norm()
        assert (round_trip(FORMATS[name].key, x + loud) - (x + loud)).norm() < 1.1 * quiet


def test_zero_stays_zero(layout: Layout) -> None:
    x = random(1, 2, SLOTS, DIM)
    x[:, :, :64] = 0
    back = round_trip(layout, x, torch.zeros_like(x) if layout.centered else None)
    assert (back[:, :, :64] == 0).all()
    assert back.isfinite().all()
    assert (round_trip(layout, torch.zeros(1, 1, SLOTS, DIM)) == 0).all()


@pytest.mark.parametrize("value", [0.1, -3.3, 1e-30, 1e30])
def test_a_constant_stays_nearly_constant(layout: Layout, value: float) -> None:
    x = torch.full((1, 1, SLOTS, DIM), value)
    back = round_trip(layout, x)
    if layout.rotated:
        # All of it lies in one channel, and the roundings of a range in the others.
        assert ((back - x) / value).norm(dim=-1).max() < 0.05 * DIM**0.5
    else:
        assert torch.allclose(back, x, rtol=0.01, atol=0)


def test_the_largest_magnitude_is_kept_by_symmetric_formats() -> None:
    x = random(2, 2, 30, 16, seed=1)
    for name in ("fp8", "int8"):
        largest = round_trip(FORMATS[name].value, x).abs().amax(-1)
        assert torch.allclose(largest, x.abs().amax(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_of_what_comes_out(layout: Layout, dtype: torch.dtype) -> None:
    x = random(1, 2, SLOTS, DIM).to(dtype)
    center = center_of(layout, x)
    before = None if center is None else center.clone()
    stored = encode(layout, x, center)
    assert stored.codes.dtype == torch.uint8
    assert stored.codes.shape == (2 * SLOTS, DIM * layout.bits // 8)
    assert stored.scale.dtype == layout.range_dtype
    assert stored.scale.shape == (2 * SLOTS,)
    assert layout.rotated == bool(layout.levels)
    assert (stored.zero is not None) == bool(layout.levels)
    if stored.zero is not None:
        assert stored.zero.dtype == layout.range_dtype
        assert stored.zero.shape == (2 * SLOTS,)
    back = decode(layout, stored, center)
    assert back.dtype == torch.float32
    assert back.shape == (2 * SLOTS, DIM)
    assert torch.equal(x, random(1, 2, SLOTS, DIM).to(dtype)), "the input was written to"
    assert center is None or torch.equal(center, before), "the center was written to"
    # Tokens of no number at all have codes of the same kind.
    none = encode(layout, x[:, :, :0])
    for item, nothing in zip(stored, none, strict=True):
        assert (item is None) == (nothing is None)
        assert item is None or (nothing.dtype, nothing.shape) == (item.dtype, (0, *item.shape[1:]))


def test_codes_by_the_kernel_are_those_of_torch(layout: Layout) -> None:
    """To the last bit, where there is a kernel: so a token's codes do not depend on where it was quantized."""
    x = random(3, 50, DIM, seed=12).view(-1, DIM) * torch.logspace(-6, 4, 150).unsqueeze(1)
    x[7] = 0
    turned = x @ rotation(DIM, x.device) if layout.rotated else x
    for got, expected in zip(layout.encode(x), layout.encode_rotated(turned), strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.equal(got, expected)
    if layout.floating:
        assert torch.equal(
            e4m3_to_float(layout.encode(x).codes), layout.encode(x).codes.view(torch.float8_e4m3fn).float()
        )


def test_no_head_or_sample_changes_another(layout: Layout) -> None:
    x = random(3, 2, SLOTS, DIM, seed=5)
    whole = round_trip(layout, x)
    loud = x.clone()
    loud[1, 0] *= 1e4
    other = round_trip(layout, loud)
    same = torch.ones(3, 2, dtype=torch.bool)
    same[1, 0] = False
    assert torch.equal(whole[same], other[same])
    assert torch.equal(round_trip(layout, x[2:, 1:]), whole[2:, 1:])


def test_no_token_changes_another(layout: Layout) -> None:
    """Once the center is known, a token's codes are its own affair."""
    x = random(1, 2, SLOTS, DIM, seed=5)
    center = random(1, 2, 1, DIM, seed=6).expand(x.shape) if layout.centered else None
    loud = x.clone()
    loud[:, :, 7] *= 1e4
    whole, other = (round_trip(layout, item, center) for item in (x, loud))
    rest = torch.arange(SLOTS) != 7
    assert torch.equal(whole[:, :, rest], other[:, :, rest])


def test_quantizing_again_changes_nothing_more(layout: Layout) -> None:
    x = random(2, 2, SLOTS, DIM, seed=6)
    values = round_trip(layout, x)
    again = round_trip(layout, values, center_of(layout, x))
    # Of a range that is rounded to bfloat16, the second is a little narrower.
    tolerance = 0.04 if layout.rotated else 1e-6
    assert (again - values).abs().max() <= tolerance * values.abs().max()


# -- slots -------------------------------------------------------------------------------------------------------------


def plane_of(layout: Layout, x: torch.Tensor, center: torch.Tensor | None = None) -> Plane:
    """Storage of ``x`` [B, H, S, D], row behind row, without free slots; ``center`` [B, H, D]."""
    if layout.centered and center is None:
        center = x.mean(dim=2)
    rows = None if center is None else center.flatten(0, 1).to(CENTER_DTYPE)
    each = None if rows is None else rows.repeat_interleave(x.shape[2], dim=0)
    return Plane(*layout.encode(x.reshape(-1, x.shape[-1]), each), rows, layout)


def everything(plane: Plane, slots: int) -> torch.Tensor:
    """All that the plane stands for, [rows, slots, D]."""
    count = plane.codes.shape[0]
    index = torch.arange(count)
    return plane.read(index, index // slots).view(-1, slots, plane.dim)


def test_a_plane_reads_what_its_layout_decodes(layout: Layout) -> None:
    x = random(2, 2, SLOTS, DIM, seed=7)
    plane = plane_of(layout, x)
    assert plane.dim == DIM
    assert torch.equal(everything(plane, SLOTS).view(x.shape), round_trip(layout, x))
    some = torch.tensor([3, 500, 200, 0, 511])
    assert torch.equal(plane.read(some, some // SLOTS), round_trip(layout, x).view(-1, DIM)[some])


def test_a_token_written_later_is_stored_like_the_first_ones(layout: Layout) -> None:
    x = random(2, 2, SLOTS, DIM, seed=8)
    whole = plane_of(layout, x)
    plane = plane_of(layout, torch.zeros_like(x), x.mean(dim=2) if layout.centered else None)
    slots = torch.cat([row * SLOTS + torch.randperm(SLOTS) for row in range(4)])
    plane.write(slots, slots // SLOTS, x.reshape(-1, DIM).index_select(0, slots))
    assert torch.allclose(everything(plane, SLOTS), everything(whole, SLOTS), atol=1e-5)


def test_written_slots_replace_and_others_keep_their_codes(layout: Layout) -> None:
    x, new = random(2, 2, SLOTS, DIM, seed=9), random(4, 2, DIM, seed=10)
    plane = plane_of(layout, x)
    before = everything(plane, SLOTS)
    slots = (torch.arange(4)[:, None] * SLOTS + torch.tensor([5, 70])).flatten()
    plane.write(slots, slots // SLOTS, new.view(-1, DIM))
    after = everything(plane, SLOTS)
    written = torch.zeros(SLOTS, dtype=torch.bool)
    written[[5, 70]] = True
    assert torch.equal(after[:, ~written], before[:, ~written])
    assert (after[:, [5, 70]] - new).norm() / new.norm() < {8: 0.05, 4: 0.2, 3: 0.35, 2: 0.7}[layout.bits]


def test_free_slots_work_like_the_first_ones(number_format: Format) -> None:
    """Rows that hold unlike numbers of tokens come into a store that has free slots for each, and these are written."""
    keys, values = random(1, 3, SLOTS, DIM, seed=11), random(1, 3, SLOTS, DIM, seed=12)
    counts, capacity = torch.tensor([64, 0, 100]), torch.tensor([SLOTS, SLOTS, SLOTS + 3])
    planes = [plane_of(layout, x) for layout, x in ((number_format.key, keys), (number_format.value, values))]
    first = slots_of(torch.arange(3) * SLOTS, counts)

    every = slots_of(torch.arange(3) * SLOTS, torch.full((3,), SLOTS))
    score, position = torch.rand(len(every.slots)), torch.arange(SLOTS).repeat(3).int()
    whole = Pool(score, position, *planes)
    part = Part([whole.map(lambda tensor: tensor[first.slots], lambda tensor: tensor)], [counts])
    nothing = counts.numpy() * 0
    store = Store([part], nothing, nothing, [capacity.numpy()])
    (pool,), rows = store.pools, store.rows
    assert rows[:, column(0, COUNT)].tolist() == counts.tolist()
    assert rows[:, column(0, CAPACITY)].tolist() == capacity.tolist()
    start = rows[:, column(0, START)]
    assert start.tolist() == [0, SLOTS, 2 * SLOTS]
    assert pool.slots == int(capacity.sum())
    later = slots_of(start + counts, SLOTS - counts)
    source = slots_of(torch.arange(3) * SLOTS + counts, SLOTS - counts)
    for plane, x in ((pool.key, keys), (pool.value, values)):
        plane.write(later.slots, later.rows, x.view(-1, DIM)[source.slots])
    filled = slots_of(start, torch.full((3,), SLOTS))
    for plane, x in zip((pool.key, pool.value), planes, strict=True):
        assert torch.allclose(plane.read(*filled), x.read(*every), atol=1e-5)
        assert torch.equal(plane.read(*slots_of(start, counts)), x.read(*first))


def test_a_pool_is_made_of_its_tensors_and_gives_them_back(number_format: Format) -> None:
    planes = [plane_of(layout, random(1, 2, 8, DIM)) for layout in (number_format.key, number_format.value)]
    pool = Pool(torch.rand(16), torch.arange(16), *planes)
    again = pool_of(pool.tensors(), number_format)
    assert again.key.layout is number_format.key
    assert again.value.layout is number_format.value
    for one, other in zip(pool.tensors(), again.tensors(), strict=True):
        assert one is other


# -- tables of levels --------------------------------------------------------------------------------------------------


LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of e2m1, without signs."""


@pytest.mark.parametrize("levels", [LEVELS, uniform_levels(3)])
def test_codes_are_the_nearest_levels(levels: tuple[float, ...]) -> None:
    """Against a search over all levels, in the range that a token's smallest and largest number span."""
    layout = Layout(3, levels)
    x = random(50, 16, seed=3) * 5 + 1
    stored = layout.encode(x)
    assert stored.zero is not None
    scale, zero = stored.scale.float()[:, None], stored.zero.float()[:, None]
    # The range covers all numbers, and is hardly wider.
    assert (zero <= x.amin(-1, keepdim=True)).all()
    assert (zero + scale * levels[-1] >= x.amax(-1, keepdim=True) - 1e-6).all()
    width = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True) + zero.abs() / 128
    assert (scale * levels[-1] <= width * (1 + 1 / 64)).all()
    distance = (x.unsqueeze(-1) - (zero.unsqueeze(-1) + scale.unsqueeze(-1) * torch.tensor(levels))).abs()
    taken = (layout.decode(stored) - x).abs()
    assert torch.allclose(taken, distance.amin(-1), atol=1e-5)
    assert torch.equal(unpack(stored.codes, 3).long(), distance.argmin(-1))


def test_every_level_survives() -> None:
    layout = Layout(3, LEVELS)
    x = (torch.tensor(LEVELS) * 0.25 - 1.0).repeat(4, 2)
    assert torch.equal(layout.decode(layout.encode(x)), x)


@pytest.mark.parametrize(
    "bits, levels, message",
    [
        (5, (), "bits=5"),
        (8, uniform_levels(4), "8 bits"),
        (3, uniform_levels(4), "give 8"),
        (4, (), "give 16"),
        (2, (1.0, 2.0, 3.0, 4.0), r"from 0\.0"),
        (2, (0.0, 2.0, 1.0, 3.0), "ascend"),
        (2, (0.0, 1.0, 1.0, 3.0), "ascend"),
    ],
)
def test_levels_that_make_no_sense_are_refused(bits: int, levels: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(bits, levels)


def test_uniform_levels_are_told_apart() -> None:
    assert Layout(3, uniform_levels(3)).uniform
    assert not Layout(3, LEVELS).uniform


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("key_dim", [32, 64, 96, 128])
def test_bytes_per_token_are_those_stored(number_format: Format, key_dim: int, value_dim: int) -> None:
    pair = [
        plane_of(layout, random(1, 1, SLOTS, dim, seed=1))
        for layout, dim in ((number_format.key, key_dim), (number_format.value, value_dim))
    ]
    stored = sum(item.untyped_storage().nbytes() for plane in pair for item in plane[:4] if item is not None)
    per_token = number_format.bytes_per_token(key_dim, value_dim)
    assert per_token * SLOTS + number_format.bytes_per_head(key_dim) == stored


def test_a_quantized_token_is_smaller(number_format: Format) -> None:
    """By the bits of its codes; ranges add at most one bit per number."""
    bits = number_format.key.bits + number_format.value.bits
    for dim in (64, 128):
        assert number_format.bytes_per_token(dim, dim) <= (bits + 1) * dim / 8 < 2 * dim * torch.bfloat16.itemsize


def test_formats_know_their_names() -> None:
    assert set(FORMATS) >= {"fp8", "int8", "int4", "int2"}
    assert all(name == number_format.name for name, number_format in FORMATS.items())
