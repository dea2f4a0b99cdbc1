"""Quantizing in C: the same codes, scales and zero points as torch's operations, to the last bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkv.formats import FORMATS, Layout, uniform_levels
from arkv.kernels.cpu import quantize
from tests.arkv.kernels.cases import NF4
from tests.arkv.kernels.conftest import needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("built")]
LAYOUTS = {str(bits): Layout(bits, uniform_levels(bits)) for bits in (2, 3, 4)} | {
    "int8": Layout(8),
    "e4m3": Layout(8, floating=True),
    "nf4": NF4.key,
    "table3": NF4.value,
}
EACH_LAYOUT = pytest.mark.parametrize("name", sorted(LAYOUTS))


def same(x: torch.Tensor, name: str) -> None:
    layout = LAYOUTS[name]
    assert quantize.supported(x, layout)
    for mine, its in zip(quantize.quantize(x, layout), layout.encode_rotated(x), strict=True):
        assert (mine is None) == (its is None)
        if mine is not None and its is not None:
            assert mine.dtype == its.dtype
            assert torch.equal(mine, its)


@EACH_LAYOUT
@pytest.mark.parametrize("dim", [64, 128, 96, 8, 256])
@pytest.mark.parametrize("size", [1.0, 1e-3, 300.0])
def test_random_tokens(name: str, dim: int, size: float) -> None:
    x = torch.randn(600, dim, generator=torch.Generator().manual_seed(dim)) * size
    same(x, name)
    same(x.abs() + size, name)
    same(-x.abs() - size, name)
    same(x.view(dim, 600).T, name)


@EACH_LAYOUT
def test_odd_tokens(name: str) -> None:
    """All alike, all zeros, tiny, huge, one channel far from the others, and all but it small."""
    x = torch.zeros(7, 64)
    x[1], x[2], x[3] = 1.7, 1e-39, 3e30
    x[4, 5] = 1e4
    x[5] = torch.linspace(-1, 1, 64)
    x[6] = 2.0 ** -torch.arange(64)
    same(x, name)


@EACH_LAYOUT
def test_between_two_levels(name: str) -> None:
    """Numbers at the middle of two codes, and next to it."""
    layout = LAYOUTS[name]
    if layout.levels:
        levels = torch.tensor(layout.levels)
    elif layout.floating:
        levels = layout.decode(quantize.Codes(torch.arange(127, dtype=torch.uint8).view(1, -1), torch.ones(1), None))[0]
    else:
        levels = torch.arange(128.0)
    middles = (levels[1:] + levels[:-1]) / 2
    around = torch.cat([torch.nextafter(middles, torch.tensor(side)) for side in (-1e9, 1e9)])
    ends = torch.stack([levels[0], levels[-1]])
    for part in torch.cat([middles, around]).split(62):
        x = torch.zeros(1, 64)
        x[0, : len(part)], x[0, 62:] = part, ends
        same(x, name)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=16, max_size=16),
)
def test_any_tokens(name: str, numbers: list[float]) -> None:
    same(torch.tensor([numbers]), name)


def test_no_tokens() -> None:
    codes, scale, zero = quantize.quantize(torch.empty(0, 64), LAYOUTS["4"])
    assert codes.shape == (0, 32)
    assert zero is not None
    assert scale.shape == zero.shape == (0,)


def test_chosen_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = quantize.quantize
    monkeypatch.setattr(quantize, "quantize", lambda *args: calls.append(1) or original(*args))
    for number_format in FORMATS.values():
        for layout in (number_format.key, number_format.value):
            calls.clear()
            layout.encode(torch.randn(5, 64))
            assert len(calls) == 1
    layout = LAYOUTS["4"]
    assert not quantize.supported(torch.randn(3, 257), layout)
    assert not quantize.supported(torch.empty(3, 64, device="meta"), layout)
    assert not quantize.supported(torch.randn(3, 64, requires_grad=True), layout)
