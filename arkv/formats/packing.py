"""How codes of fewer than 8 bits lie in bytes.

Codes of 4 and 2 bits are packed ``8 / bits`` to a byte: byte ``j`` holds channels ``j``, ``j + D * bits / 8``, and so
on, from the low bits up. Codes of 3 bits lie in three runs of ``n = D / 8`` bytes: byte ``j`` of run ``r`` holds
channel ``j + 2 * r * n`` in its low three bits and channel ``j + (2 * r + 1) * n`` in the next three. The top two are
the low bits of channel ``j + 6 * n`` in the first run, of ``j + 7 * n`` in the second one, and the high bits of these
two in the third. So a kernel unpacks whole vectors of neighbouring channels by a shift and a mask, without a gather.
"""

from __future__ import annotations

import torch


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., D] (uint8) in as few bytes as they need: [..., D * bits / 8]."""
    if bits == 8:
        return codes
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


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes [..., D] (uint8) of :func:`pack`."""
    if bits == 8:
        return packed
    if bits != 3:
        mask = (1 << bits) - 1
        return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-1)
    first, second, third = packed.chunk(3, dim=-1)
    whole = [part for run in (first, second, third) for part in (run & 7, (run >> 3) & 7)]
    seventh = (first >> 6) | ((third >> 6) & 1) << 2
    last = (second >> 6) | (third >> 7) << 2
    return torch.cat([*whole, seventh, last], dim=-1)


def check_packing(bits: int, head_dim: int) -> None:
    """Raises :class:`ValueError` if codes of ``head_dim`` channels do not fill whole bytes."""
    # Eight codes of 3 bits lie in three bytes.
    together = 8 if bits == 3 else 8 // bits
    if head_dim % together:
        raise ValueError(
            f"codes of {bits} bits are packed {together} to a group, which the head dim {head_dim} is no multiple of: "
            "use 'int8'"
        )
