"""Number formats: what a code stands for, how far a value moves, and what a token really costs."""

from __future__ import annotations

import pytest
import torch

from arkv.quantization import FORMATS, Format, Layout, QuantizedTensor, e4m3_to_float, rotation
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
    center = torch.full((1, 1, 1, 64), 3.0)
    keys = QuantizedTensor.quantize(FORMATS[f"int{bits}"].key, x + 3.0, center).dequantize(torch.float32)
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
    stored = QuantizedTensor.quantize(layout, x)
    target = in_code_space(layout, x, stored.center)
    error = (in_code_space(layout, stored.dequantize(torch.float32), stored.center) - target).abs()
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
    back = QuantizedTensor.quantize(layout, x, torch.zeros(1, 2, 1, DIM)).dequantize(torch.float32)
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
    quantized = QuantizedTensor.quantize(layout, x)
    assert quantized.codes.dtype == torch.uint8
    assert quantized.codes.shape == (1, 2, SLOTS, DIM * layout.bits // 8)
    assert quantized.dequantize(dtype).dtype == dtype
    assert quantized.dequantize(dtype).shape == x.shape
    assert (quantized.zero is not None) == layout.rotated
    assert (quantized.center is not None) == layout.centered
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


def test_no_token_changes_another(layout: Layout) -> None:
    """Once the center is known, a token's codes are its own affair."""
    x, center = random(1, 2, SLOTS, DIM, seed=5), random(1, 2, 1, DIM, seed=6)
    loud = x.clone()
    loud[:, :, 7] *= 1e4
    whole, other = (QuantizedTensor.quantize(layout, item, center).dequantize(torch.float32) for item in (x, loud))
    rest = torch.arange(SLOTS) != 7
    assert torch.equal(whole[:, :, rest], other[:, :, rest])


def test_quantizing_again_changes_nothing_more(layout: Layout) -> None:
    first = QuantizedTensor.quantize(layout, random(2, 2, SLOTS, DIM, seed=6))
    values = first.dequantize(torch.float32)
    again = QuantizedTensor.quantize(layout, values, first.center).dequantize(torch.float32)
    # Of a range that is rounded to bfloat16, the second is a little narrower.
    tolerance = 0.04 if layout.rotated else 1e-6
    assert (again - values).abs().max() <= tolerance * values.abs().max()


def test_a_token_written_later_is_stored_like_the_first_ones(layout: Layout) -> None:
    x = random(2, 2, SLOTS, DIM, seed=8)
    whole = QuantizedTensor.quantize(layout, x)
    store = QuantizedTensor.quantize(layout, torch.zeros_like(x), whole.center)
    index = torch.randperm(SLOTS).expand(2, 2, -1)
    rows = flat_rows(x[..., 0], index)
    store.write(rows, x.reshape(-1, DIM).index_select(0, rows), rows // SLOTS)
    assert torch.allclose(store.dequantize(torch.float32), whole.dequantize(torch.float32), atol=1e-5)


def test_written_slots_replace_and_others_keep_their_codes(layout: Layout) -> None:
    x, new = random(2, 2, SLOTS, DIM, seed=9), random(2, 2, 2, DIM, seed=10)
    store = QuantizedTensor.quantize(layout, x)
    before = store.dequantize(torch.float32)
    rows = flat_rows(x[..., 0], torch.tensor([5, 70]).expand(2, 2, 2))
    store.write(rows, new.reshape(-1, DIM), rows // SLOTS)
    after = store.dequantize(torch.float32)
    written = torch.zeros(SLOTS, dtype=torch.bool)
    written[[5, 70]] = True
    assert torch.equal(after[:, :, ~written], before[:, :, ~written])
    assert (after[:, :, [5, 70]] - new).norm() / new.norm() < {8: 0.05, 4: 0.2, 3: 0.35, 2: 0.7}[layout.bits]


def test_slots_that_are_added_work_like_the_first_ones(layout: Layout) -> None:
    x = random(1, 2, SLOTS, DIM, seed=11)
    whole = QuantizedTensor.quantize(layout, x)
    store = QuantizedTensor.quantize(layout, x[:, :, :64].contiguous(), whole.center)
    store.grow(SLOTS - 64)
    assert store.dequantize(torch.float32).shape == x.shape
    rows = flat_rows(x[..., 0], torch.arange(64, SLOTS).expand(1, 2, -1))
    store.write(rows, x[:, :, 64:].reshape(-1, DIM), rows // SLOTS)
    assert torch.allclose(store.dequantize(torch.float32), whole.dequantize(torch.float32), atol=1e-5)


def test_products_with_the_codes_are_products_with_the_values(layout: Layout) -> None:
    """What the fused attention relies on: ranges may be folded after the product."""
    x, query, weights = random(2, 2, SLOTS, DIM, seed=7), random(2, 2, 3, DIM, seed=8), random(2, 2, 3, SLOTS, seed=9)
    quantized = QuantizedTensor.quantize(layout, x + 1)
    values = quantized.dequantize(torch.float32)
    assert torch.allclose(quantized.dot(query.flatten(0, 1)).view(2, 2, 3, SLOTS), query @ values.mT, atol=5e-4)
    assert torch.allclose(quantized.weigh(weights.flatten(0, 1)), (weights @ values).flatten(0, 1), atol=5e-4)


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_bytes_per_token_are_those_stored(number_format: Format, dim: int) -> None:
    pair = [
        QuantizedTensor.quantize(layout, random(1, 1, SLOTS, dim, seed=1))
        for layout in (number_format.key, number_format.value)
    ]
    stored = sum(tensor.untyped_storage().nbytes() for part in pair for tensor in storages_of(part))
    assert number_format.bytes_per_token(dim) * SLOTS + number_format.bytes_per_head(dim) == stored


def test_a_quantized_token_is_smaller(number_format: Format) -> None:
    """By the bits of its codes; ranges add at most one bit per number."""
    bits = number_format.key.bits + number_format.value.bits
    for dim in (64, 128):
        assert number_format.bytes_per_token(dim) <= (bits + 1) * dim / 8 < 2 * dim * torch.bfloat16.itemsize


def test_formats_know_their_names() -> None:
    assert set(FORMATS) >= {"fp8", "int8", "int4", "int2"}
    assert all(name == number_format.name for name, number_format in FORMATS.items())
