"""Quantizing on CPUs by a C function: the twin of ``quantization._quantized``, to the last bit."""

from __future__ import annotations

import ctypes

import torch

from arkv.kernels.building import library

MAX_HEAD_DIM = 256
"""As in ``quantize.c``."""


class _Quantize(ctypes.Structure):
    """``struct quantize``."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "dim", "bits", "zero_point")),
        *((name, ctypes.c_void_p) for name in ("numbers", "codes", "scale", "zero", "wide_scale")),
        ("threads", ctypes.c_int64),
    ]


def supported(x: torch.Tensor) -> bool:
    """Whether :func:`quantize` can serve ``x``."""
    return x.device.type == "cpu" and x.shape[-1] <= MAX_HEAD_DIM and not x.requires_grad and library() is not None


def quantize(x: torch.Tensor, bits: int, zero_point: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Packed codes, scales and zero points of ``x`` [..., D] (float32).

    Args:
        zero_point: codes from 0 on, with a scale and a zero point in bfloat16; else codes of 8 bits, symmetric around
            zero, with a scale in float32.
    """
    functions = library()
    assert functions is not None
    x = x.contiguous()
    one, dim = (*x.shape[:-1], 1), x.shape[-1]
    codes = torch.empty(*x.shape[:-1], dim * bits // 8, dtype=torch.uint8)
    scale = torch.empty(one, dtype=torch.bfloat16 if zero_point else torch.float32)
    zero = torch.empty(one, dtype=torch.bfloat16) if zero_point else None
    call = _Quantize(
        *(x.numel() // dim, dim, bits, zero_point, x.data_ptr(), codes.data_ptr()),
        *(scale.data_ptr() if zero_point else None, None if zero is None else zero.data_ptr()),
        *(None if zero_point else scale.data_ptr(), torch.get_num_threads()),
    )
    functions.arkv_quantize(ctypes.byref(call))
    return codes, scale, zero
