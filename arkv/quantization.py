"""Number formats of Quantized tokens.

Letters: ``B`` batch, ``H`` KV heads, ``G`` query heads per KV head, ``S`` slots, ``D`` head dim, ``g`` group.

Values are quantized per token, in groups along the head dim. Keys are quantized per token likewise (fp8, int8), or per
channel in groups of tokens (int4, int2): a few channels of the keys are large for every token, so that a channel's own
range wastes fewer codes than a token's (KIVI, arXiv 2402.02750).

A group of keys is a run of slots. It gets its ranges when the pool is filled; a token that later takes the slot of an
evicted one is written with the ranges that its group has, so that nothing is ever quantized again and no staging area
is needed for tokens that leave the window one at a time.

Scales are folded after the product, ``q . (codes * scale) = (q . codes) * scale``, and zero points likewise: attention
never needs the dequantized tensor in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Layout:
    """How one tensor [B, H, S, D] is quantized."""

    bits: int
    axis: Literal["token", "channel"]
    """Whose range a group covers: ``group`` neighbouring channels of one token, or one channel of ``group`` slots."""
    group: int | None
    """None: the whole head dim."""
    symmetric: bool
    """Without zero point."""
    floating: bool = False
    """e4m3 codes instead of integers."""

    @property
    def max_code(self) -> float:
        """The largest code; the smallest is its negative, or 0 with a zero point."""
        if self.floating:
            return 448.0
        return 2.0 ** (self.bits - 1) - 1 if self.symmetric else 2.0**self.bits - 1

    @property
    def range_dtype(self) -> torch.dtype:
        """Number type of scales and zero points."""
        return torch.float32 if self.symmetric else torch.bfloat16

    @property
    def range_bytes(self) -> int:
        """Bytes of the scale and zero point of one group."""
        return self.range_dtype.itemsize * (1 if self.symmetric else 2)

    def group_of(self, head_dim: int) -> int:
        """Channels or slots in a group. Raises :class:`ValueError` if the head dim cannot be divided that way."""
        if self.axis == "channel":
            assert self.group is not None
            return self.group
        group = min(self.group or head_dim, head_dim)
        if head_dim % group:
            raise ValueError(
                f"a quantization group of {group} channels does not divide the head dim {head_dim}: "
                "use quant_format='int8'"
            )
        return group

    def bytes_per_token(self, head_dim: int) -> float:
        """Bytes of one token in one KV head, its share of a group's ranges included."""
        codes = head_dim * self.bits / 8
        group = self.group_of(head_dim)
        return codes + self.range_bytes * head_dim / group


@dataclass(frozen=True)
class Format:
    """A number format: how keys and how values are stored."""

    name: str
    key: Layout
    value: Layout

    def check(self, head_dim: int) -> None:
        """Raises :class:`ValueError` if a head of ``head_dim`` channels cannot be stored, naming a size that can."""
        for layout in (self.key, self.value):
            # 3 bits lie in two planes, of which the second packs eight codes to a byte.
            together = 8 if layout.bits == 3 else 8 // layout.bits
            if head_dim % together:
                raise ValueError(
                    f"quant_format={self.name!r} packs {together} codes to a byte, which the head dim {head_dim} is no "
                    "multiple of: use 'int8'"
                )
            if layout.axis == "token":
                layout.group_of(head_dim)

    @property
    def slot_multiple(self) -> int:
        """A pool has a multiple of so many slots."""
        return max((layout.group or 1) if layout.axis == "channel" else 1 for layout in (self.key, self.value))

    def bytes_per_token(self, head_dim: int) -> float:
        """Bytes of one token's key and value in one KV head: codes, scales and zero points, without position and score.

        >>> FORMATS["int8"].bytes_per_token(64)
        136.0
        """
        return self.key.bytes_per_token(head_dim) + self.value.bytes_per_token(head_dim)


def _formats() -> dict[str, Format]:
    fp8 = Layout(8, "token", None, symmetric=True, floating=True)
    int8 = Layout(8, "token", None, symmetric=True)
    formats = [Format("fp8", fp8, fp8), Format("int8", int8, int8)]
    for bits in (4, 2):
        formats.append(
            Format(
                f"int{bits}",
                Layout(bits, "channel", 64, symmetric=False),
                Layout(bits, "token", 32, symmetric=False),
            )
        )
    # Values bear coarse codes better than keys do: attention averages them.
    formats.append(Format("k4v3", Layout(4, "channel", 64, symmetric=False), Layout(3, "token", 32, symmetric=False)))
    return {item.name: item for item in formats}


FORMATS: dict[str, Format] = _formats()
"""``fp8`` (e4m3) and ``int8`` with a float32 scale per token; ``int4``, ``int2`` and ``k4v3`` (int4 keys, int3 values)
with bfloat16 scales and zero points, keys per channel in groups of 64 slots, values per token in groups of 32
channels."""


def _e4m3_to_float(codes: torch.Tensor) -> torch.Tensor:
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
    """Storage of one quantized tensor [B, H, S, D]: ``codes``, ``scale`` and, unless symmetric, ``zero``.

    Codes of less than 8 bits are packed, ``8 / bits`` to a byte: byte ``j`` holds channels ``j``, ``j + D * bits / 8``,
    and so on, from the low bits up. Codes of 3 bits are packed as their low two bits, then their high bits. Ranges
    have shape [B, H, S, D / g] (per token) or [B, H, S / g, D] (per channel).
    """

    def __init__(self, layout: Layout, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> None:
        self.layout = layout
        self.codes = codes
        self.scale = scale
        self.zero = zero
        self.head_dim = codes.shape[-1] * 8 // layout.bits
        self.group = layout.group_of(self.head_dim)

    @classmethod
    def quantize(
        cls,
        layout: Layout,
        x: torch.Tensor,
        valid: torch.Tensor | None = None,
        bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> QuantizedTensor:
        """Quantize ``x`` [B, H, S, D] into new storage; the error is at most half a step at each element.

        Args:
            valid: [B, H, S], which slots hold a token. Others do not widen a channel's range.
            bounds: smallest and largest number of each channel, [B, H, 1, D], that a group with free slots must cover,
                since tokens that come later are written with its range; None takes those of all tokens here.
        """
        x = x.float()
        scale, zero = _ranges(layout, x, valid, bounds)
        store = cls(layout, x.new_empty(*x.shape[:-1], x.shape[-1] * layout.bits // 8, dtype=torch.uint8), scale, zero)
        codes = store._encode(store._grouped(x), store._spread(scale), store._spread(zero))
        store.codes = store._packed(codes.view(x.shape))
        return store

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every stored tensor by ``function`` of it."""
        self.codes, self.scale = function(self.codes), function(self.scale)
        self.zero = None if self.zero is None else function(self.zero)

    def append(self, other: QuantizedTensor) -> None:
        """Add the slots of ``other`` at the end."""
        self.codes = torch.cat([self.codes, other.codes], dim=2)
        self.scale = torch.cat([self.scale, other.scale], dim=2)
        if self.zero is not None and other.zero is not None:
            self.zero = torch.cat([self.zero, other.zero], dim=2)

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [B, H, S, D] or [n, D] with a dimension for the members of a group; a view."""
        dim = 2 if self.layout.axis == "channel" else x.ndim - 1
        return x.view(*x.shape[:dim], -1, self.group, *x.shape[dim + 1 :])

    def _spread(self, ranges: torch.Tensor | None) -> torch.Tensor | None:
        """Ranges, float32, in a shape that broadcasts with :meth:`_grouped`."""
        if ranges is None:
            return None
        return ranges.float().unsqueeze(3 if self.layout.axis == "channel" else -1)

    def _encode(self, x: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None) -> torch.Tensor:
        """Codes (uint8, one per element) of ``x`` under ranges that broadcast with it."""
        assert scale is not None
        top = self.layout.max_code
        if zero is not None:
            return (x - zero).div_(scale).round_().clamp_(0, top).to(torch.uint8)
        scaled = x / scale
        if self.layout.floating:
            return scaled.clamp_(-top, top).to(torch.float8_e4m3fn).view(torch.uint8)
        return scaled.round_().clamp_(-top, top).to(torch.int8).view(torch.uint8)

    def _packed(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [..., D] in as few bytes as they need."""
        if self.layout.bits == 8:
            return codes
        planes = [
            _pack((codes >> low) & (2**bits - 1) if low else codes & (2**bits - 1), bits)
            for low, bits in self._planes()
        ]
        return torch.cat(planes, dim=-1) if len(planes) > 1 else planes[0]

    def _planes(self) -> list[tuple[int, int]]:
        """Runs of bits that are packed together: the lowest bit and the number of each."""
        return [(0, 2), (2, 1)] if self.layout.bits == 3 else [(0, self.layout.bits)]

    def _parts(self) -> list[torch.Tensor]:
        """Codes as float32, in ``8 / bits`` runs of channels, [B, H, S, D * bits / 8] each."""
        if self.layout.floating:
            if self.codes.device.type == "cpu":
                return [_e4m3_to_float(self.codes)]
            return [self.codes.view(torch.float8_e4m3fn).float()]
        if self.layout.symmetric:
            return [self.codes.view(torch.int8).float()]
        planes = self._planes()
        if len(planes) == 1:
            return [piece.float() for piece in _unpack(self.codes, self.layout.bits)]
        low, high = self.codes.split([self.head_dim // 4, self.head_dim // 8], dim=-1)
        return [(torch.cat(_unpack(low, 2), dim=-1) | torch.cat(_unpack(high, 1), dim=-1) << 2).float()]

    def write(self, rows: torch.Tensor, x: torch.Tensor) -> None:
        """Quantize ``x`` [n, D] into the distinct slots ``rows`` [n] of the storage seen as [B * H * S, ...]."""
        x = x.float()
        if self.layout.axis == "channel":
            group = rows // self.group
            scale, zero = (
                None if ranges is None else ranges.view(-1, self.head_dim).index_select(0, group).float()
                for ranges in (self.scale, self.zero)
            )
            self._put(self.codes, rows, self._packed(self._encode(x, scale, zero)))
            return
        scale, zero = _ranges(self.layout, x)
        codes = self._encode(self._grouped(x), self._spread(scale), self._spread(zero))
        self._put(self.codes, rows, self._packed(codes.view(x.shape)))
        self._put(self.scale, rows, scale)
        if self.zero is not None and zero is not None:
            self._put(self.zero, rows, zero)

    @staticmethod
    def _put(store: torch.Tensor, rows: torch.Tensor, new: torch.Tensor) -> None:
        store.view(-1, store.shape[-1]).index_copy_(0, rows, new)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The values that the codes stand for, [B, H, S, D] in ``dtype``."""
        parts = self._parts()
        values = self._grouped(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0])
        scale, zero = self._spread(self.scale), self._spread(self.zero)
        assert scale is not None
        values *= scale
        if zero is not None:
            values += zero
        return values.view(*self.codes.shape[:-1], self.head_dim).to(dtype)

    def dot(self, query: torch.Tensor) -> torch.Tensor:
        """``query`` [B * H, G, D] (float32) times the keys: [B * H, G, S]."""
        if self.layout.axis == "token":
            if self.scale.shape[-1] > 1:
                return torch.bmm(query, self.dequantize(torch.float32).flatten(0, 1).transpose(1, 2))
            scores = self._dot_parts(query)
            scores *= self.scale.view(query.shape[0], 1, -1)
            if self.zero is not None:
                scores += query.sum(dim=-1, keepdim=True) * self.zero.flatten(0, 1).transpose(1, 2)
            return scores
        # Per channel: the group's scales go onto the query, [B * H * S / g, G, D], its zero points become one number.
        heads, queries, dim = query.shape
        groups = self.scale.shape[2]
        scaled = (query.unsqueeze(1) * self.scale.flatten(0, 1).unsqueeze(2)).view(heads * groups, queries, dim)
        scores = self._dot_parts(scaled).view(heads, groups, queries, self.group)
        if self.zero is not None:
            zero = torch.bmm(query, self.zero.float().flatten(0, 1).transpose(1, 2))
            scores += zero.transpose(1, 2).unsqueeze(-1)
        return scores.transpose(1, 2).reshape(heads, queries, groups * self.group)

    def _dot_parts(self, query: torch.Tensor) -> torch.Tensor:
        """``query`` [n, G, D] times the codes, which are as many runs of slots: [n, G, slots / n]."""
        parts = self._parts()
        pieces = query.chunk(len(parts), dim=-1)
        runs = [part.view(query.shape[0], -1, part.shape[-1]).transpose(1, 2) for part in parts]
        scores = torch.bmm(pieces[0], runs[0])
        for piece, run in zip(pieces[1:], runs[1:], strict=True):
            scores.baddbmm_(piece, run)
        return scores

    def weigh(self, weights: torch.Tensor) -> torch.Tensor:
        """``weights`` [B * H, G, S] (float32) times the values: [B * H, G, D]."""
        if self.layout.axis == "channel":
            return torch.bmm(weights, self.dequantize(torch.float32).flatten(0, 1))
        heads, queries, slots = weights.shape
        groups = self.scale.shape[-1]
        if groups == 1 and self.zero is None:
            scaled = weights * self.scale.view(heads, 1, slots)
            products = [torch.bmm(scaled, part.flatten(0, 1)) for part in self._parts()]
            return torch.cat(products, dim=-1) if len(products) > 1 else products[0]
        # Per group of channels its own weights, [B * H, g * G, S].
        scale = self.scale.flatten(0, 1).transpose(1, 2).contiguous()
        scaled = (weights.unsqueeze(1) * scale.unsqueeze(2)).reshape(heads, groups * queries, slots)
        products = [torch.bmm(scaled, part.flatten(0, 1)) for part in self._parts()]
        output = (torch.cat(products, dim=-1) if len(products) > 1 else products[0]).view(heads, groups, queries, -1)
        # All groups' weights met all channels; each keeps its own.
        output = output.unflatten(-1, (groups, -1)).diagonal(dim1=1, dim2=3)
        if self.zero is not None:
            output = output + torch.bmm(weights, self.zero.float().flatten(0, 1)).unsqueeze(2)
        flat: torch.Tensor = output.transpose(2, 3).reshape(heads, queries, self.head_dim)
        return flat


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """``8 / bits`` codes to a byte, [..., D] to [..., D * bits / 8]."""
    pieces = codes.chunk(8 // bits, dim=-1)
    packed = pieces[0].clone()
    for part, piece in enumerate(pieces[1:], start=1):
        # Not `|= piece <<`: shifts of bytes are slow on CPU.
        packed.add_(piece, alpha=1 << (part * bits))
    return packed


def _unpack(packed: torch.Tensor, bits: int) -> list[torch.Tensor]:
    """The runs of channels that :func:`_pack` put into each byte."""
    mask = 2**bits - 1
    if packed.shape[-1] % 8:
        return [(packed >> (part * bits)) & mask for part in range(8 // bits)]
    # Eight bytes at a time; what a shift carries over from the next byte falls to the mask.
    words, mask = packed.contiguous().view(torch.int64), int.from_bytes(bytes([mask]) * 8, "little")
    return [((words >> (part * bits)) & mask).view(torch.uint8) for part in range(8 // bits)]


def _ranges(
    layout: Layout,
    x: torch.Tensor,
    valid: torch.Tensor | None = None,
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points of ``x`` [B, H, S, D], in the shapes and types in which they are stored."""
    tiny = torch.finfo(layout.range_dtype).tiny
    group = layout.group_of(x.shape[-1])
    if layout.axis == "token":
        grouped = x.unflatten(-1, (-1, group))
        if layout.symmetric:
            # The smallest normal number instead of zero: an all-zero token keeps zero codes and divides safely.
            return (grouped.abs().amax(dim=-1) / layout.max_code).clamp_min(tiny), None
        low, high = grouped.amin(dim=-1), grouped.amax(dim=-1)
    else:
        grouped = x.unflatten(2, (-1, group))
        if valid is None:
            low, high = grouped.amin(dim=3), grouped.amax(dim=3)
        else:
            taken = valid.unflatten(2, (-1, group)).unsqueeze(-1)
            low = grouped.masked_fill(~taken, float("inf")).amin(dim=3)
            high = grouped.masked_fill(~taken, float("-inf")).amax(dim=3)
            bounds = bounds or (low.amin(dim=2, keepdim=True), high.amax(dim=2, keepdim=True))
            partial = ~taken.all(dim=3)
            low = torch.where(partial, torch.minimum(low, bounds[0]), low)
            high = torch.where(partial, torch.maximum(high, bounds[1]), high)
            low, high = low.masked_fill(low.isinf(), 0.0), high.masked_fill(high.isinf(), 0.0)
    zero = _outward(low, up=False)
    scale = _outward((high - zero.float()) / layout.max_code, up=True).clamp_min(tiny)
    return scale, zero
