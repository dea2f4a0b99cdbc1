"""Quantizing on CPUs by a C function: the twin of ``Layout.encode_rotated``, to the last bit."""

from __future__ import annotations

import torch

from arkv.formats.base import Codes, Layout
from arkv.kernels.cpu.building import library
from arkv.kernels.cpu.pools import MAX_HEAD_DIM, code_fields


def supported(x: torch.Tensor, layout: Layout) -> bool:
    """Whether :func:`quantize` can serve rows ``x``."""
    return x.device.type == "cpu" and x.shape[-1] <= MAX_HEAD_DIM and not x.requires_grad and library() is not None


def quantize(x: torch.Tensor, layout: Layout) -> Codes:
    """Codes of the rows ``x`` [n, D] (float32), which are centered and rotated already."""
    codes, scale, *zero = torch.ops.arkv.quantize(x, layout.bits, layout.levels, layout.floating)
    return Codes(codes, scale, zero[0] if zero else None)


def encode(x: torch.Tensor, layout: Layout) -> Codes:
    """The same by the C function, which the operator calls."""
    functions = library()
    assert functions is not None
    x = x.contiguous()
    count, dim = x.shape
    codes = torch.empty(count, dim * layout.bits // 8, dtype=torch.uint8)
    scale = torch.empty(count, dtype=layout.range_dtype)
    zero = torch.empty(count, dtype=layout.range_dtype) if layout.levels else None
    functions.arkv_quantize(
        *(x.data_ptr(), count, dim, *code_fields(layout), codes.data_ptr(), scale.data_ptr()),
        *(None if zero is None else zero.data_ptr(), torch.get_num_threads()),
    )
    return Codes(codes, scale, zero)
