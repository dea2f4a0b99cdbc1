"""Number formats: what a code stands for, how far a value moves, and what a token really costs."""

from __future__ import annotations

import pytest
import torch

from arkv.quantization import FORMATS, Format, Layout, QuantizedTensor, _e4m3_to_float
from arkv.storage import flat_rows
from tests.arkv.conftest import storages_of

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


def round_trip(layout: Layout, x: torch.Tensor) -> torch.Tensor:
    return QuantizedTensor.quantize(layout, x).dequantize(torch.float32)


def group_view(layout: Layout, x: torch.Tensor) -> torch.Tensor:
    """The numbers of ``x`` [B, H, S, D] that share a scale, in the last dimension."""
    if layout.axis == "channel":
        return x.unflatten(2, (-1, layout.group)).transpose(-1, -2)
    return x.unflatten(-1, (-1, layout.group or x.shape[-1]))


def half_step(layout: Layout, x: torch.Tensor) -> torch.Tensor:
    """Half a quantization step at each number, worked out from the numbers alone; shaped like :func:`group_view`.

    A step with a zero point may be wider by the rounding of its range to bfloat16, outwards and twice.
    """
    groups = group_view(layout, x.float())
    if layout.floating:
        scale = groups.abs().amax(-1, keepdim=True) / 448
        exponent = torch.floor(torch.log2((groups.abs() / scale).clamp_min(2.0**-6)))
        return scale * 2.0 ** (exponent - 4)
    if layout.symmetric:
        return (groups.abs().amax(-1, keepdim=True) / (2 ** (layout.bits - 1) - 1) / 2).expand_as(groups)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    width = (high - low) + low.abs() / 128
    return (width * (1 + 1 / 64) / (2**layout.bits - 1) / 2).expand_as(groups)


def test_all_e4m3_codes_are_expanded_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers = [code for code in range(256) if code & 0x7F != 0x7F]
    expanded = _e4m3_to_float(codes)
    assert expanded.dtype == torch.float32
    assert torch.equal(expanded[numbers], E4M3)
    assert torch.equal(expanded[numbers], codes.float()[numbers])
    # -0.0 too, which torch.equal cannot tell from 0.0.
    assert torch.equal(expanded[numbers].signbit(), E4M3.signbit())


def test_expanding_e4m3_keeps_any_shape_and_stride() -> None:
    codes = random(2, 3, 8, 6).to(torch.float8_e4m3fn)
    assert torch.equal(_e4m3_to_float(codes), codes.float())
    assert torch.equal(_e4m3_to_float(codes[:, 1:, ::2]), codes[:, 1:, ::2].float())
    assert torch.equal(_e4m3_to_float(codes.transpose(1, 2)), codes.transpose(1, 2).float())
    assert torch.equal(_e4m3_to_float(codes.view(torch.uint8)), codes.float())
    assert _e4m3_to_float(codes[:, :, :0]).shape == (2, 3, 0, 6)


def test_every_value_of_a_symmetric_format_survives() -> None:
    """Numbers that lie on the grid, with the largest among them, come back exactly."""
    for name, grid in {"fp8": E4M3, "int8": torch.arange(-127, 128).float()}.items():
        x = grid[None, None, None, :] * 2.0**-5
        for layout in (FORMATS[name].key, FORMATS[name].value):
            assert torch.equal(round_trip(layout, x), x), name


@pytest.mark.parametrize("bits", [4, 2])
def test_every_value_of_a_format_with_zero_points_survives(bits: int) -> None:
    """So does a grid of 16 (or 4) values whose ends are bfloat16 numbers."""
    grid = torch.arange(2**bits).float() * 0.25 - 1.0
    per_token = grid.repeat(64 // len(grid)).expand(1, 1, 64, 64)
    assert torch.equal(round_trip(FORMATS[f"int{bits}"].value, per_token), per_token)
    per_channel = per_token.mT.contiguous()
    assert torch.equal(round_trip(FORMATS[f"int{bits}"].key, per_channel), per_channel)


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
    error = group_view(layout, (round_trip(layout, x) - x.float()).abs())
    assert (error <= half_step(layout, x) * 1.001 + abs(offset) * 1e-6).all()


def test_zero_stays_zero(layout: Layout) -> None:
    x = random(1, 2, SLOTS, DIM)
    x[:, :, :64] = 0
    back = round_trip(layout, x)
    assert (back[:, :, :64] == 0).all()
    assert back.isfinite().all()
    assert (round_trip(layout, torch.zeros(1, 1, SLOTS, DIM)) == 0).all()


@pytest.mark.parametrize("value", [0.1, -3.3, 1e-30, 1e30])
def test_a_constant_stays_nearly_constant(layout: Layout, value: float) -> None:
    x = torch.full((1, 1, SLOTS, DIM), value)
    assert torch.allclose(round_trip(layout, x), x, rtol=0.01, atol=0)


def test_the_largest_magnitude_is_kept_by_symmetric_formats() -> None:
    x = random(2, 2, 30, 16, seed=1)
    for name in ("fp8", "int8"):
        largest = round_trip(FORMATS[name].value, x).abs().amax(-1)
        assert torch.allclose(largest, x.abs().amax(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_of_what_comes_out(layout: Layout, dtype: torch.dtype) -> None:
    x = random(1, 2, SLOTS, DIM).to(dtype)
    quantized = QuantizedTensor.quantize(layout, x)
    assert quantized.codes.dtype == torch.uint8
    assert quantized.codes.shape == (1, 2, SLOTS, DIM * layout.bits // 8)
    assert quantized.dequantize(dtype).dtype == dtype
    assert quantized.dequantize(dtype).shape == x.shape
    assert (quantized.zero is None) == layout.symmetric
    assert torch.equal(x, random(1, 2, SLOTS, DIM).to(dtype)), "the input was written to"


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


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.axis == "token"])
def test_no_token_changes_another(name: str) -> None:
    """Of the formats with ranges per token."""
    x = random(1, 2, SLOTS, DIM, seed=5)
    loud = x.clone()
    loud[:, :, 7] *= 1e4
    whole, other = round_trip(LAYOUTS[name], x), round_trip(LAYOUTS[name], loud)
    rest = torch.arange(SLOTS) != 7
    assert torch.equal(whole[:, :, rest], other[:, :, rest])


def test_quantizing_again_changes_nothing_more(layout: Layout) -> None:
    values = round_trip(layout, random(2, 2, SLOTS, DIM, seed=6))
    again = round_trip(layout, values)
    # Of a range that is rounded to bfloat16, the second is a little narrower.
    tolerance = 1e-6 if layout.symmetric else 0.04
    assert (again - values).abs().max() <= tolerance * values.abs().max()


def test_empty_slots_do_not_widen_a_range(layout: Layout) -> None:
    x = random(1, 2, SLOTS, DIM, seed=2) * 0.01 + 5
    valid = torch.ones(1, 2, SLOTS, dtype=torch.bool)
    valid[:, 0, 3:9] = False
    valid[:, 1, :64] = False
    holes = x.masked_fill(~valid.unsqueeze(-1), 0.0)
    back = QuantizedTensor.quantize(layout, holes, valid).dequantize(torch.float32)
    assert (back - x).abs()[valid].max() < (5.1 / 16 if layout.symmetric else 0.05)


@pytest.mark.parametrize("taken", [0, 1, 40, 64, 100])
def test_a_token_written_later_is_about_as_exact(layout: Layout, taken: int) -> None:
    """Whatever the pool held when it was made, if it was made with bounds that fit what comes later."""
    x = random(1, 2, SLOTS, DIM, seed=8)
    bounds = x.amin(dim=2, keepdim=True), x.amax(dim=2, keepdim=True)
    valid = (torch.arange(SLOTS) < taken).expand(1, 2, SLOTS)
    store = QuantizedTensor.quantize(layout, x.masked_fill(~valid.unsqueeze(-1), 0.0), valid, bounds)
    index = torch.arange(taken, SLOTS).expand(1, 2, -1)
    store.write(flat_rows(valid, index), x[:, :, taken:].reshape(-1, DIM))
    back = store.dequantize(torch.float32)
    relative = (back - x)[:, :, taken:].norm() / x[:, :, taken:].norm()
    assert relative < {8: 0.05, 4: 0.25, 3: 0.4, 2: 0.8}[layout.bits]


def test_written_slots_replace_and_others_keep_their_codes(layout: Layout) -> None:
    x, new = random(2, 2, SLOTS, DIM, seed=9), random(2, 2, 2, DIM, seed=10)
    store = QuantizedTensor.quantize(layout, x)
    before = store.dequantize(torch.float32)
    rows = flat_rows(x[..., 0], torch.tensor([5, 70]).expand(2, 2, 2))
    store.write(rows, new[:, :, :2].reshape(-1, DIM))
    after = store.dequantize(torch.float32)
    written = torch.zeros(SLOTS, dtype=torch.bool)
    written[[5, 70]] = True
    assert torch.equal(after[:, :, ~written], before[:, :, ~written])
    # Per channel a new token is held within the range that its group has.
    inside = new.clamp(-2, 2)
    error = (after[:, :, [5, 70]].clamp(-2, 2) - inside).norm() / inside.norm()
    assert error < {8: 0.05, 4: 0.2, 3: 0.35, 2: 0.7}[layout.bits]


def test_appended_slots_work_like_the_first_ones(layout: Layout) -> None:
    x = random(1, 2, SLOTS, DIM, seed=11)
    store = QuantizedTensor.quantize(layout, x[:, :, :64].contiguous())
    store.append(QuantizedTensor.quantize(layout, x[:, :, 64:].contiguous()))
    assert torch.allclose(store.dequantize(torch.float32), round_trip(layout, x), atol=1e-6)


def test_products_with_the_codes_are_products_with_the_values(layout: Layout) -> None:
    """What the fused attention relies on: ranges may be folded after the product."""
    x, query, weights = random(2, 2, SLOTS, DIM, seed=7), random(2, 2, 3, DIM, seed=8), random(2, 2, 3, SLOTS, seed=9)
    quantized = QuantizedTensor.quantize(layout, x + 1)
    values = quantized.dequantize(torch.float32)
    assert torch.allclose(quantized.dot(query.flatten(0, 1)).view(2, 2, 3, SLOTS), query @ values.mT, atol=1e-4)
    assert torch.allclose(quantized.weigh(weights.flatten(0, 1)), (weights @ values).flatten(0, 1), atol=1e-4)


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_bytes_per_token_are_those_stored(number_format: Format, dim: int) -> None:
    pair = [
        QuantizedTensor.quantize(layout, random(1, 1, SLOTS, dim, seed=1))
        for layout in (number_format.key, number_format.value)
    ]
    stored = sum(tensor.untyped_storage().nbytes() for part in pair for tensor in storages_of(part))
    assert SLOTS % number_format.slot_multiple == 0
    assert number_format.bytes_per_token(dim) * SLOTS == stored


def test_a_quantized_token_is_smaller(number_format: Format) -> None:
    """By the bits of its codes; ranges add at most one bit and a half per number."""
    bits = number_format.key.bits + number_format.value.bits
    for dim in (64, 128):
        assert number_format.bytes_per_token(dim) <= (bits + 1.5) * dim / 8 < 2 * dim * torch.bfloat16.itemsize


def test_formats_know_their_names() -> None:
    assert set(FORMATS) >= {"fp8", "int8", "int4", "int2"}
    assert all(name == number_format.name for name, number_format in FORMATS.items())
