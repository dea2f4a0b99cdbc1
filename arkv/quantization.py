"""Number formats of Quantized tokens.

Letters: ``B`` batch, ``H`` KV heads, ``G`` query heads per KV head, ``S`` slots, ``D`` head dim.

Every token has its own scale per KV head, so that no token, head or sample changes another's numbers.
Scales are folded after the product, ``q . (codes * scale) = (q . codes) * scale``: attention never needs the
dequantized tensor in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Quantized(NamedTuple):
    """``codes`` [B, H, S, D] and ``scale`` [B, H, S, 1] (float32)."""

    codes: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class Format:
    """Symmetric quantization with one scale per token and KV head: ``x ~ codes * scale``."""

    name: str
    code_dtype: torch.dtype
    max_code: float
    """The largest code; the largest magnitude of a token is mapped onto it."""

    def quantize(self, x: torch.Tensor) -> Quantized:
        """Quantize ``x`` [B, H, S, D]. The error is at most half a step of the format at each element."""
        x = x.float()
        scale = x.abs().amax(dim=-1, keepdim=True) / self.max_code
        # The smallest normal number instead of zero: an all-zero token keeps zero codes and divides safely.
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        codes = (x / scale).clamp(-self.max_code, self.max_code)
        if not self.code_dtype.is_floating_point:
            codes = codes.round()
        return Quantized(codes.to(self.code_dtype), scale)

    def dequantize(self, quantized: Quantized, dtype: torch.dtype) -> torch.Tensor:
        """The values that ``quantized`` stands for, [B, H, S, D] in ``dtype``."""
        return (self.expand(quantized.codes) * quantized.scale).to(dtype)

    def expand(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes as float32 numbers, before the scale."""
        if self.code_dtype == torch.float8_e4m3fn and codes.device.type == "cpu":
            return _e4m3_to_float(codes)
        return codes.float()

    def bytes_per_token(self, head_dim: int) -> int:
        """Bytes of one token's key and value in one KV head: codes and scales, without position and score."""
        return 2 * (head_dim * self.code_dtype.itemsize + torch.float32.itemsize)


def _e4m3_to_float(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 to float32 through the bit pattern of float16, since the eager cast is some 20 times slower on CPU.

    Sign, exponent and mantissa of e4m3 sit in the top bits of a float16 after a shift; only the exponent bias
    differs (7 against 15), which is the factor 2**8.
    """
    bits = codes.view(torch.int8).to(torch.int16)
    half = ((bits & 0x7F) << 7) | (bits & -0x8000)
    return half.view(torch.float16).float() * 256.0


FORMATS: dict[str, Format] = {
    "fp8": Format("fp8", torch.float8_e4m3fn, 448.0),
    "int8": Format("int8", torch.int8, 127.0),
}
