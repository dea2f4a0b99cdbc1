"""Number formats of Quantized tokens.

Letters: ``B`` batch, ``H`` KV heads, ``G`` query heads per KV head, ``S`` slots, ``D`` head dim.

Every token is quantized by itself, with one scale per KV head, and a zero point where codes are coarse; so a token that
leaves the window during decoding is stored like one of the prompt, and nothing is ever quantized again.

A few channels of the keys are large for every token, and would take most of a token's range. Coarse formats therefore
subtract each channel's mean over the prompt from the keys (``center``), which costs one key per head, and turn keys and
values by a fixed orthogonal matrix that spreads every channel over all (Hadamard; as in QuaRot, arXiv 2404.00456).
Ranges per channel in groups of tokens (KIVI, arXiv 2402.02750) serve the same end, but cannot take tokens that come one
at a time.

Scales are folded after the product, ``q . (codes * scale) = (q . codes) * scale``, and zero points, centers and the
rotation likewise, ``q . R codes = (R' q) . codes``: attention never needs the dequantized tensor in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Layout:
    """How one tensor [B, H, S, D] is quantized: codes with one range per token."""

    bits: int
    floating: bool = False
    """e4m3 codes instead of integers."""
    rotated: bool = False
    """Turned by :func:`rotation`, and with a zero point; else symmetric around zero."""
    centered: bool = False
    """Less the channels' means."""

    @property
    def max_code(self) -> float:
        """The largest code; the smallest is its negative, or 0 with a zero point."""
        if self.floating:
            return 448.0
        return 2.0**self.bits - 1 if self.rotated else 2.0 ** (self.bits - 1) - 1

    @property
    def range_dtype(self) -> torch.dtype:
        """Number type of scales and zero points."""
        return torch.bfloat16 if self.rotated else torch.float32

    def bytes_per_token(self, head_dim: int) -> float:
        """Bytes of one token in one KV head: codes, scale and zero point."""
        return head_dim * self.bits / 8 + self.range_dtype.itemsize * (2 if self.rotated else 1)


CENTER_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Format:
    """A number format: how keys and how values are stored."""

    name: str
    key: Layout
    value: Layout

    def check(self, head_dim: int) -> None:
        """Raises :class:`ValueError` if a head of ``head_dim`` channels cannot be stored, naming a format that can."""
        for layout in (self.key, self.value):
            # Eight codes of 3 bits lie in three bytes.
            together = 8 if layout.bits == 3 else 8 // layout.bits
            if head_dim % together:
                raise ValueError(
                    f"quant_format={self.name!r} packs {together} codes to a byte, which the head dim {head_dim} is no "
                    "multiple of: use 'int8'"
                )

    def bytes_per_token(self, head_dim: int) -> float:
        """Bytes of one token's key and value in one KV head: codes, scales and zero points, without position and score.

        >>> FORMATS["int8"].bytes_per_token(64)
        136.0
        """
        return self.key.bytes_per_token(head_dim) + self.value.bytes_per_token(head_dim)

    def bytes_per_head(self, head_dim: int) -> int:
        """Bytes that a KV head of a layer takes once, whatever it holds."""
        return sum(head_dim * CENTER_DTYPE.itemsize for layout in (self.key, self.value) if layout.centered)


def _formats() -> dict[str, Format]:
    fp8, int8 = Layout(8, floating=True), Layout(8)
    # Values bear coarser codes than keys do: attention averages them.
    coarse = {"int4": (4, 4), "int2": (2, 2), "k4v3": (4, 3)}
    formats = [Format("fp8", fp8, fp8), Format("int8", int8, int8)]
    formats += [
        Format(name, Layout(key, rotated=True, centered=True), Layout(value, rotated=True))
        for name, (key, value) in coarse.items()
    ]
    return {item.name: item for item in formats}


FORMATS: dict[str, Format] = _formats()
"""``fp8`` (e4m3) and ``int8`` with a float32 scale per token; ``int4``, ``int2`` and ``k4v3`` (int4 keys, int3 values)
rotated, with a bfloat16 scale and zero point per token, keys less their channels' means."""


@cache
def rotation(head_dim: int, device: torch.device) -> torch.Tensor:
    """The orthogonal matrix R [D, D], float32, that coarse formats turn rows by, ``x @ R``.

    The Kronecker product of a Hadamard matrix, for the powers of two in D, and a cosine transform for what is left.
    """
    power = head_dim & -head_dim
    rest = head_dim // power
    # Used with and without gradients, whatever the first caller is under.
    with torch.inference_mode(False), torch.no_grad():
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < power:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        place = torch.arange(rest, dtype=torch.float64)
        cosine = torch.cos(math.pi / rest * (place[:, None] + 0.5) * place) * math.sqrt(2.0)
        cosine[:, 0] = 1.0
        return (torch.kron(matrix, cosine) / math.sqrt(head_dim)).float().to(device)


def e4m3_to_float(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 to float32 through the bit pattern of float16, since the eager cast is some 20 times slower on CPU.

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


class QuantizedTensor:
    """Storage of one quantized tensor [B, H, S, D]: ``codes``, ``scale`` [B, H, S, 1], ``zero`` likewise where the
    layout is rotated, and ``center`` [B, H, 1, D] where it is centered.

    Codes of 4 and 2 bits are packed ``8 / bits`` to a byte: byte ``j`` holds channels ``j``, ``j + D * bits / 8``, and
    so on, from the low bits up. Codes of 3 bits lie in three runs of ``n = D / 8`` bytes: byte ``j`` of run ``r`` holds
    channel ``j + 2 * r * n`` in its low three bits and channel ``j + (2 * r + 1) * n`` in the next three; the top two
    are the low bits of channel ``j + 6 * n`` in the first run, of ``j + 7 * n`` in the second one, and the high bits of
    these two in the third.
    """

    def __init__(
        self,
        layout: Layout,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        center: torch.Tensor | None,
    ) -> None:
        self.layout = layout
        self.codes = codes
        self.scale = scale
        self.zero = zero
        self.center = center
        self.head_dim = codes.shape[-1] * 8 // layout.bits

    @classmethod
    def quantize(cls, layout: Layout, x: torch.Tensor, center: torch.Tensor | None = None) -> QuantizedTensor:
        """Quantize ``x`` [B, H, S, D] into new storage; the error is at most half a step at each (rotated) channel.

        Args:
            center: what is subtracted from every token of a head, [B, H, 1, D]; None: the mean of ``x`` where the
                layout is centered.
        """
        if layout.centered:
            center = (x.float().mean(dim=2, keepdim=True) if center is None else center).to(CENTER_DTYPE)
        else:
            center = None
        codes, scale, zero = _quantized(layout, x.float() if center is None else x.float() - center.float())
        return cls(layout, codes, scale, zero, center)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every stored tensor by ``function`` of it."""
        self.codes, self.scale = function(self.codes), function(self.scale)
        self.zero = None if self.zero is None else function(self.zero)
        self.center = None if self.center is None else function(self.center)

    def grow(self, slots: int) -> None:
        """Add so many slots at the end, which stand for the center."""
        for name in ("codes", "scale", "zero"):
            stored = getattr(self, name)
            if stored is not None:
                more = stored.new_zeros(*stored.shape[:2], slots, stored.shape[3])
                setattr(self, name, torch.cat([stored, more], dim=2))

    def _pieces(self) -> list[torch.Tensor]:
        """What bytes hold as float32, in pieces [B, H, S, n] each: codes, or what :func:`places` makes codes of."""
        if self.layout.floating:
            if self.codes.device.type == "cpu":
                return [e4m3_to_float(self.codes)]
            return [self.codes.view(torch.float8_e4m3fn).float()]
        if not self.layout.rotated:
            return [self.codes.view(torch.int8).float()]
        return [piece.float() for piece in _masked(self.codes, self.layout.bits)]

    def write(self, rows: torch.Tensor, x: torch.Tensor, heads: torch.Tensor) -> None:
        """Quantize ``x`` [n, D] into the distinct slots ``rows`` [n] of the storage seen as [B * H * S, ...].

        Args:
            heads: head of each row among [B * H], whose center it has.
        """
        x = x.float()
        if self.center is not None:
            x = x - self.center.view(-1, self.head_dim).index_select(0, heads).float()
        codes, scale, zero = _quantized(self.layout, x)
        self._put(self.codes, rows, codes)
        self._put(self.scale, rows, scale)
        if self.zero is not None and zero is not None:
            self._put(self.zero, rows, zero)

    @staticmethod
    def _put(store: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> None:
        store.view(-1, store.shape[-1]).index_copy_(0, rows, new)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The values that the codes stand for, [B, H, S, D] in ``dtype``."""
        pieces = self._pieces()
        values = pieces[0]
        if self.layout.rotated:
            values = torch.cat(pieces, dim=-1) @ places(self.layout.bits, self.head_dim, values.device)
        values *= self.scale
        if self.zero is not None:
            values += self.zero
        if self.layout.rotated:
            values = values @ rotation(self.head_dim, values.device).T
        if self.center is not None:
            values += self.center
        return values.to(dtype)

    def dot(self, query: torch.Tensor) -> torch.Tensor:
        """``query`` [B * H, G, D] (float32) times the keys: [B * H, G, S]."""
        count = query.shape[0]
        first, *others = (piece.flatten(0, 1).transpose(1, 2) for piece in self._pieces())
        turned = query
        if self.layout.rotated:
            turned = query @ turning(self.layout.bits, self.head_dim, query.device)
        scores = torch.bmm(turned[..., : first.shape[1]], first)
        place = first.shape[1]
        for piece in others:
            scores.baddbmm_(turned[..., place : place + piece.shape[1]], piece)
            place += piece.shape[1]
        scores *= self.scale.float().view(count, 1, -1)
        if self.zero is not None:
            scores.addcmul_(turned[..., place:], self.zero.float().view(count, 1, -1))
        if self.center is not None:
            scores += torch.bmm(query, self.center.float().flatten(0, 1).transpose(1, 2))
        return scores

    def weigh(self, weights: torch.Tensor) -> torch.Tensor:
        """``weights`` [B * H, G, S] (float32) times the values: [B * H, G, D]."""
        scaled = weights * self.scale.float().view(weights.shape[0], 1, -1)
        products = [torch.bmm(scaled, piece.flatten(0, 1)) for piece in self._pieces()]
        output = products[0]
        if self.layout.rotated:
            output = torch.cat(products, dim=-1) @ places(self.layout.bits, self.head_dim, output.device)
        if self.zero is not None:
            output += torch.bmm(weights, self.zero.float().flatten(0, 1))
        if self.layout.rotated:
            output = output @ rotation(self.head_dim, output.device).T
        if self.center is not None:
            output += weights.sum(dim=-1, keepdim=True) * self.center.flatten(0, 1)
        return output


def _quantized(layout: Layout, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Packed codes, scales and zero points of ``x`` [..., D] (float32, centered), as they are stored."""
    # The kernels import this module.
    from arkv.kernels import quantize

    if layout.rotated:
        x = x @ rotation(x.shape[-1], x.device)
    if not layout.floating and quantize.supported(x):
        return quantize.quantize(x, layout.bits, zero_point=layout.rotated)
    return _with_torch(layout, x)


def _with_torch(layout: Layout, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The same of numbers that are rotated where the layout is."""
    top = layout.max_code
    tiny = torch.finfo(layout.range_dtype).tiny
    if layout.rotated:
        low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
        zero = _outward(low, up=False)
        scale = _outward((high - zero.float()) / top, up=True).clamp_min(tiny)
        codes = (x - zero).div_(scale).round_().clamp_(0, top).to(torch.uint8)
        return _packed(codes, layout.bits), scale, zero
    # The smallest normal number instead of zero: an all-zero token keeps zero codes and divides safely.
    scale = (x.abs().amax(dim=-1, keepdim=True) / top).clamp_min(tiny)
    scaled = x / scale
    if layout.floating:
        return scaled.clamp_(-top, top).to(torch.float8_e4m3fn).view(torch.uint8), scale, None
    return scaled.round_().clamp_(-top, top).to(torch.int8).view(torch.uint8), scale, None


MASKS = {2: (0x03, 0x0C, 0x30, 0xC0), 3: (0x07, 0x38, 0xC0), 4: (0x0F, 0xF0)}
"""Bits of a byte that are read together, for codes of so many bits."""


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., D] in as few bytes as they need: [..., D * bits / 8]."""
    # Not `<<` and `|`: shifts of bytes are slow on CPU.
    if bits != 3:
        first, *others = codes.chunk(8 // bits, dim=-1)
        packed = first.clone()
        for number, run in enumerate(others, start=1):
            packed.add_(run, alpha=1 << (number * bits))
        return packed
    *whole, seventh, last = codes.chunk(8, dim=-1)
    # The third byte has the high bits of the two codes of which the other two have the low ones.
    tops = (seventh & 3, last & 3, (seventh >> 2) + (last >> 2) * 2)
    pairs = zip(whole[0::2], whole[1::2], tops, strict=True)
    return torch.cat([low + middle * 8 + top * 64 for low, middle, top in pairs], dim=-1)


def _masked(packed: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """Bytes of ``packed`` (uint8, [..., n]) under each of :data:`MASKS`; where codes have 3 bits, also the highest bit
    of the last third of the bytes."""
    # As many bytes at a time as make up a number and divide a third of a row.
    third = packed.shape[-1] // 3 if bits == 3 else packed.shape[-1]
    size = math.gcd(third, 8)
    words = packed.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    pieces = [words & _repeated(mask, size) for mask in MASKS[bits]]
    if bits == 3:
        pieces.append(words[..., -(third // size) :] & _repeated(0x80, size))
    return [piece.view(torch.uint8) for piece in pieces]


def _repeated(byte: int, size: int) -> int:
    """The number of ``size`` bytes, signed if there are several, of which each is ``byte``."""
    return int.from_bytes(bytes([byte]) * size, "little", signed=size > 1)


@cache
def places(bits: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """Where codes lie: the pieces of :func:`_masked`, side by side, times this [n, D] are the codes, exactly."""
    with torch.inference_mode(False), torch.no_grad():
        count = head_dim * bits // 8
        found = [torch.zeros(count, head_dim) for _ in MASKS[bits]]
        if bits != 3:
            for number, place in enumerate(found):
                place[:, number * count : (number + 1) * count] = torch.eye(count) * 2.0 ** (-bits * number)
        else:
            one = torch.eye(head_dim // 8)
            low, middle, top = (place.view(3, -1, 8, head_dim // 8) for place in found)
            for third in range(3):
                low[third, :, 2 * third] = one
                middle[third, :, 2 * third + 1] = one / 8
            # Under 0xC0 the last third has 64 times a high bit of the seventh run and 128 times one of the eighth.
            top[0, :, 6] = top[1, :, 7] = one / 64
            top[2, :, 6] = one / 16
            highest = torch.zeros(head_dim // 8, 8, head_dim // 8)
            highest[:, 6], highest[:, 7] = -one / 16, one / 32
            found.append(highest.flatten(1))
        return torch.cat([place.view(-1, head_dim) for place in found]).to(device)


@cache
def turning(bits: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """What queries are turned by, [D, n + 1]: into factors of the n columns of all pieces, and of the zero point."""
    with torch.inference_mode(False), torch.no_grad():
        matrix = rotation(head_dim, device)
        return torch.cat([matrix @ places(bits, head_dim, device).T, matrix.sum(dim=1, keepdim=True)], dim=1)
