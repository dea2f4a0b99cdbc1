"""Quantizing in C: the same codes, scales and zero points as torch's operations, to the last bit."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arkv.kernels import building, quantize
from arkv.quantization import FORMATS, Layout, QuantizedTensor, _with_torch

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
LAYOUTS = {bits: Layout(bits, rotated=True) for bits in (2, 3, 4)} | {8: Layout(8)}


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    if shutil.which("cc") is not None:
        building.build()


def same(x: torch.Tensor, bits: int) -> None:
    layout = LAYOUTS[bits]
    for mine, its in zip(quantize.quantize(x, bits, layout.rotated), _with_torch(layout, x), strict=True):
        assert (mine is None) == (its is None)
        if mine is not None and its is not None:
            assert mine.dtype == its.dtype
            assert torch.equal(mine, its)


@pytest.mark.parametrize("bits", sorted(LAYOUTS))
@pytest.mark.parametrize("dim", [64, 128, 96, 8, 256])
@pytest.mark.parametrize("size", [1.0, 1e-3, 300.0])
def test_random_tokens(bits: int, dim: int, size: float) -> None:
    x = torch.randn(2, 3, 200, dim, generator=torch.Generator().manual_seed(bits)) * size
    same(x, bits)
    same(x.abs() + size, bits)
    same(-x.abs() - size, bits)
    same(x.transpose(1, 2), bits)


@pytest.mark.parametrize("bits", sorted(LAYOUTS))
def test_odd_tokens(bits: int) -> None:
    """All alike, all zeros, tiny, huge, one channel far from the others."""
    x = torch.zeros(6, 64)
    x[1], x[2], x[3] = 1.7, 1e-39, 3e30
    x[4, 5] = 1e4
    x[5] = torch.linspace(-1, 1, 64)
    same(x, bits)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=16, max_size=16),
)
def test_any_tokens(bits: int, numbers: list[float]) -> None:
    same(torch.tensor([numbers]), bits)


def test_no_tokens() -> None:
    codes, scale, zero = quantize.quantize(torch.empty(1, 2, 0, 64), 4, True)
    assert codes.shape == (1, 2, 0, 32)
    assert zero is not None
    assert scale.shape == zero.shape == (1, 2, 0, 1)


def test_chosen_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = quantize.quantize
    monkeypatch.setattr(quantize, "quantize", lambda *args, **named: calls.append(1) or original(*args, **named))
    for name, number_format in FORMATS.items():
        for layout in (number_format.key, number_format.value):
            calls.clear()
            QuantizedTensor.quantize(layout, torch.randn(1, 2, 5, 64))
            assert len(calls) == (0 if name == "fp8" else 1)
    assert not quantize.supported(torch.randn(3, 257))
    assert not quantize.supported(torch.empty(3, 64, device="meta"))
    assert not quantize.supported(torch.randn(3, 64, requires_grad=True))
