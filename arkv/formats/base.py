"""What a number format of Quantized tokens is: :class:`Format`, one :class:`Layout` for keys and one for values.

Letters: ``n`` tokens, ``D`` head dim.

Every token is quantized by itself, with one scale per KV head, and a zero point where codes are coarse; so a token that
leaves the window during decoding is stored like one of the prompt, and nothing is ever quantized again.

A code of up to 4 bits is an index into a table of levels, ``x = level[code] * scale + zero``; a token's smallest and
largest number take the lowest and the highest level. Uniform codes are the levels 0, 1, 2, ...; NF4, e2m1 or Lloyd-Max
levels are other tables for the same code and the same kernels.

A few channels of the keys are large for every token, and would take most of a token's range. Coarse formats therefore
subtract each channel's mean over the prompt from the keys (``center``), which costs one key per head, and turn keys and
values by a fixed orthogonal matrix (:mod:`arkv.formats.rotation`). Ranges per channel in groups of tokens (KIVI, arXiv
2402.02750) serve the same end, but cannot take tokens that come one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from arkv.formats.packing import check_packing, pack, unpack
from arkv.formats.rotation import rotation

MAX_LEVELS = 16
"""As many as kernels hold in registers."""

CENTER_DTYPE = torch.bfloat16


class Codes(NamedTuple):
    """Quantized rows: ``codes`` [n, bytes] uint8, ``scale`` [n], and ``zero`` [n] where the layout has levels."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None


@dataclass(frozen=True)
class Layout:
    """How keys, or values, are stored: codes with one range per token."""

    bits: int
    levels: tuple[float, ...] = ()
    """What codes stand for, ascending from 0; none: numbers of 8 bits, symmetric around zero."""
    floating: bool = False
    """Numbers of 8 bits are e4m3 instead of integers."""
    rotated: bool = False
    """Turned by :func:`~arkv.formats.rotation.rotation`."""
    centered: bool = False
    """Less the channels' means."""

    def __post_init__(self) -> None:
        if self.bits == 8:
            if self.levels:
                raise ValueError(f"{len(self.levels)} levels for codes of 8 bits: a table has at most {MAX_LEVELS}")
            return
        if self.bits not in (2, 3, 4):
            raise ValueError(f"bits={self.bits}: codes have 2, 3, 4 or 8 bits")
        if len(self.levels) != 2**self.bits:
            raise ValueError(
                f"{len(self.levels)} levels for codes of {self.bits} bits: give {2**self.bits}, and never more than "
                f"{MAX_LEVELS}"
            )
        if self.levels[0] != 0.0 or any(one >= other for one, other in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError("levels must ascend, from 0.0 on: subtract the lowest from all")

    @property
    def uniform(self) -> bool:
        """Whether the levels are 0, 1, 2, ..."""
        return self.levels == uniform_levels(self.bits)

    @property
    def range_dtype(self) -> torch.dtype:
        """Number type of scales and zero points."""
        return torch.bfloat16 if self.levels else torch.float32

    def bytes_per_token(self, head_dim: int) -> float:
        """Bytes of one token in one KV head: codes, scale and zero point."""
        return head_dim * self.bits / 8 + self.range_dtype.itemsize * (2 if self.levels else 1)

    def encode(self, x: torch.Tensor, center: torch.Tensor | None = None) -> Codes:
        """Quantize the rows ``x`` [n, D]; ``center`` [n, D] is what each is taken less.

        The error is at most half a step at each (rotated) channel.
        """
        # The kernels import this module.
        from arkv.kernels import quantize

        x = x.float() if center is None else x.float() - center.float()
        if self.rotated:
            x = x @ rotation(x.shape[-1], x.device)
        if quantize.supported(x, self):
            return quantize.quantize(x, self)
        return self.encode_rotated(x)

    def encode_rotated(self, x: torch.Tensor) -> Codes:
        """The same of rows [n, D] (float32) that are centered and rotated already."""
        tiny = torch.finfo(self.range_dtype).tiny
        if self.levels:
            top = self.levels[-1]
            low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
            zero = _outward(low, up=False)
            scale = _outward((high - zero.float()) / top, up=True).clamp_min(tiny)
            scaled = (x - zero).div_(scale)
            if self.uniform:
                codes = scaled.round_().clamp_(0, top).to(torch.uint8)
            else:
                codes = torch.bucketize(scaled.contiguous(), self._middles(x.device)).to(torch.uint8)
            return Codes(pack(codes, self.bits), scale.squeeze(-1), zero.squeeze(-1))
        top = 448.0 if self.floating else 127.0
        # The smallest normal number instead of zero: an all-zero token keeps zero codes and divides safely.
        scale = (x.abs().amax(dim=-1, keepdim=True) / top).clamp_min(tiny)
        scaled = x / scale
        if self.floating:
            codes = scaled.clamp_(-top, top).to(torch.float8_e4m3fn)
        else:
            codes = scaled.round_().clamp_(-top, top).to(torch.int8)
        return Codes(codes.view(torch.uint8), scale.squeeze(-1), None)

    def _middles(self, device: torch.device) -> torch.Tensor:
        """Where the nearest level changes."""
        levels = torch.tensor(self.levels, dtype=torch.float32, device=device)
        return (levels[1:] + levels[:-1]) / 2

    def decode(self, stored: Codes, center: torch.Tensor | None = None) -> torch.Tensor:
        """The numbers [n, D] (float32) that ``stored`` stands for."""
        if self.levels:
            table = torch.tensor(self.levels, dtype=torch.float32, device=stored.codes.device)
            values = table[unpack(stored.codes, self.bits).int()]
        elif self.floating:
            values = e4m3_to_float(stored.codes)
        else:
            values = stored.codes.view(torch.int8).float()
        values = values * stored.scale.float().unsqueeze(-1)
        if stored.zero is not None:
            values += stored.zero.float().unsqueeze(-1)
        if self.rotated:
            values = values @ rotation(values.shape[-1], values.device).T
        return values if center is None else values + center.float()


@dataclass(frozen=True)
class Format:
    """A number format: how keys and how values are stored."""

    name: str
    key: Layout
    value: Layout

    def check(self, key_dim: int, value_dim: int) -> None:
        """Raises :class:`ValueError` if heads of so many channels cannot be stored, naming a format that can."""
        check_packing(self.key.bits, key_dim)
        check_packing(self.value.bits, value_dim)

    def bytes_per_token(self, key_dim: int, value_dim: int) -> float:
        """Bytes of one token's key and value in one KV head: codes, scales and zero points, without position and score.

        >>> from arkv.formats import FORMATS
        >>> FORMATS["int8"].bytes_per_token(64, 64)
        136.0
        """
        return self.key.bytes_per_token(key_dim) + self.value.bytes_per_token(value_dim)

    def bytes_per_head(self, key_dim: int) -> int:
        """Bytes that a KV head of a layer takes once, whatever it holds."""
        return key_dim * CENTER_DTYPE.itemsize if self.key.centered else 0


@cache
def uniform_levels(bits: int) -> tuple[float, ...]:
    """0, 1, 2, ... for codes of so many bits."""
    return tuple(float(code) for code in range(2**bits))


def e4m3_to_float(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 (uint8) to float32 through the bit pattern of float16, since the eager cast is slower on CPUs.

    Sign, exponent and mantissa of e4m3 sit in the top bits of a float16 after a shift; only the exponent bias
    differs (7 against 15), which is the factor 2**8.
    """
    bits = codes.view(torch.int8).to(torch.int16)
    half = ((bits & 0x7F) << 7) | (bits & -0x8000)
    return half.view(torch.float16).float() * 256.0


def _outward(x: torch.Tensor, up: bool) -> torch.Tensor:
    """``x`` as bfloat16, rounded up or down, so that a range rounded to it still covers its numbers."""
    near = x.to(torch.bfloat16)
    wrong = near.float() < x if up else near.float() > x
    toward = torch.full_like(near, float("inf") if up else float("-inf"))
    return torch.where(wrong, torch.nextafter(near, toward), near)
