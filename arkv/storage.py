"""The two pools of slots that a tri-state layer consists of.

Letters: ``B`` batch, ``H`` KV heads, ``S`` slots, ``D`` head dim, ``n`` slots of one access.

A slot without a token has position -1 and the score -inf (the next token may take it) or +inf (it is closed, since
another sample of the batch has the larger budget). Attention sinks have the score +inf and a position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from arkv.quantization import Format, Layout, QuantizedTensor

EMPTY, CLOSED = float("-inf"), float("inf")


@dataclass
class Tokens:
    """Tokens at model precision: ``key`` and ``value`` [B, H, S, D], ``position`` and ``score`` [B, H, S]."""

    key: torch.Tensor
    value: torch.Tensor
    position: torch.Tensor
    score: torch.Tensor

    @property
    def slots(self) -> int:
        """Number of slots, taken or not."""
        return self.position.shape[-1]

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Key, value, position, score."""
        return self.key, self.value, self.position, self.score

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Tokens:
        """``function`` of every tensor."""
        return Tokens(*(function(tensor) for tensor in self.tensors()))

    def part(self, index: slice | torch.Tensor) -> Tokens:
        """The same slots of every sample and head; a view for a slice."""
        return self.map(lambda tensor: tensor[:, :, index])

    def set_part(self, index: slice | torch.Tensor, tokens: Tokens) -> None:
        """Write the same slots of every sample and head, in place."""
        for target, source in zip(self.tensors(), tokens.tensors(), strict=True):
            target[:, :, index] = source

    def take(self, index: torch.Tensor) -> Tokens:
        """Slots ``index`` [B, H, n] of each sample and head."""
        return Tokens(
            take_rows(self.key, index),
            take_rows(self.value, index),
            self.position.gather(2, index),
            self.score.gather(2, index),
        )

    def put(self, index: torch.Tensor, tokens: Tokens) -> None:
        """Write ``tokens`` into slots ``index`` [B, H, n], in place."""
        rows = flat_rows(self.position, index)
        for target, source in zip(self.tensors(), tokens.tensors(), strict=True):
            target.view(-1, *target.shape[3:]).index_copy_(0, rows, source.reshape(-1, *source.shape[3:]))

    def only(self, condition: torch.Tensor) -> Tokens:
        """These tokens where ``condition`` [B, H, S] holds, else empty slots, whose keys and values do not matter."""
        return Tokens(
            self.key,
            self.value,
            self.position.masked_fill(~condition, -1),
            self.score.masked_fill(~condition, EMPTY),
        )

    def empty(self, slots: int) -> Tokens:
        """As many empty slots of the same kind."""
        batch, heads = self.position.shape[:2]
        return Tokens(
            self.key.new_zeros(batch, heads, slots, self.key.shape[-1]),
            self.value.new_zeros(batch, heads, slots, self.value.shape[-1]),
            self.position.new_full((batch, heads, slots), -1),
            self.score.new_full((batch, heads, slots), EMPTY),
        )

    @staticmethod
    def concat(*parts: Tokens) -> Tokens:
        """One after the other, always in new storage."""
        return Tokens(*(torch.cat(tensors, dim=2) for tensors in zip(*(part.tensors() for part in parts), strict=True)))


def best(score: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` highest of ``score`` [..., n] (float32, none negative but -inf), best first, and their indices.

    Of equal ones the first come first, whatever else is there: so a sample gets in a batch what it gets alone.
    """
    # The order of such numbers is that of their bits; the index below them makes each unique.
    last = torch.arange(score.shape[-1] - 1, -1, -1, device=score.device)
    index = ((score.view(torch.int32).long() << 32) | last).topk(count, dim=-1).indices
    return score.gather(-1, index), index


def flat_rows(slots: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of slots ``index`` [B, H, n] in a tensor [B, H, S, ...] seen as [B * H * S, ...]; ``slots`` is [B, H, S].

    Reads and writes of whole rows by one flat index are ten times faster on CPU than ``scatter_`` over the head dim.
    """
    batch, heads, count = slots.shape
    first = torch.arange(batch * heads, device=index.device).view(batch, heads, 1) * count
    return (first + index).view(-1)


def take_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``rows`` [B, H, S, D] at ``index`` [B, H, n]: [B, H, n, D]."""
    dim = rows.shape[-1]
    if rows.stride(3) != 1 or any(stride % dim for stride in rows.stride()[:3]):
        rows = rows.contiguous()
    # As a list of rows, wherever they lie: the models' tensors are often transposed, and parts of longer ones.
    batch, head, slot = (stride // dim for stride in rows.stride()[:3])
    count = 1 + sum((size - 1) * step for size, step in zip(rows.shape[:3], (batch, head, slot), strict=True))
    flat = rows.as_strided((count, dim), (dim, 1))
    first = torch.arange(rows.shape[0], device=index.device)[:, None, None] * batch
    first = first + torch.arange(rows.shape[1], device=index.device)[:, None] * head
    return flat.index_select(0, (first + index * slot).view(-1)).view(*index.shape, dim)


class QuantizedPool:
    """Slots of Quantized tokens. A token is quantized when it comes in; its codes stay until it is evicted.

    Args:
        number_format: how keys and values are stored.
        tokens: what the pool begins with, empty slots included; as many as it will have slots.
        like: tokens that those which come later will resemble; their mean is what keys are centered by.
    """

    def __init__(self, number_format: Format, tokens: Tokens, like: Sequence[Tokens]) -> None:
        self.format = number_format
        self.full = bool((tokens.position >= 0).all())
        """Every slot holds a token: then it stays so, and attention needs no mask."""
        self.key = self._quantized(number_format.key, tokens.key, [(part.key, part.position) for part in like])
        self.value = self._quantized(number_format.value, tokens.value, [(part.value, part.position) for part in like])
        self.position = tokens.position
        self.score = tokens.score

    @staticmethod
    def _quantized(
        layout: Layout, x: torch.Tensor, like: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> QuantizedTensor:
        if not layout.centered:
            return QuantizedTensor.quantize(layout, x)
        # In float64, so that a sample of a padded batch has the center that it has alone.
        total = torch.zeros(*x.shape[:2], 1, x.shape[3], dtype=torch.float64, device=x.device)
        count = torch.zeros(*x.shape[:2], 1, 1, dtype=torch.float64, device=x.device)
        for other, position in like:
            taken = (position >= 0).unsqueeze(-1)
            known = other if bool(taken.all()) else other.masked_fill(~taken, 0.0)
            total += known.sum(dim=2, keepdim=True, dtype=torch.float64)
            count += taken.sum(dim=2, keepdim=True)
        return QuantizedTensor.quantize(layout, x, total / count.clamp_min(1))

    @property
    def slots(self) -> int:
        """Number of slots, taken or not."""
        return self.position.shape[-1]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every stored tensor by ``function`` of it."""
        self.key.map(function)
        self.value.map(function)
        self.position, self.score = function(self.position), function(self.score)

    def replace_samples(self, samples: torch.Tensor, other: QuantizedPool) -> None:
        """Take everything of ``samples`` [n] from ``other``, a pool of the same size."""
        for mine, theirs in ((self.key, other.key), (self.value, other.value)):
            for name in ("codes", "scale", "zero", "center"):
                if getattr(mine, name) is not None:
                    getattr(mine, name)[samples] = getattr(theirs, name)[samples]
        self.position[samples], self.score[samples] = other.position[samples], other.score[samples]

    def grow(self, slots: int) -> None:
        """Add so many empty slots."""
        self.key.grow(slots)
        self.value.grow(slots)
        none = self.position.new_full((*self.position.shape[:2], slots), -1)
        self.position = torch.cat([self.position, none], dim=2)
        self.score = torch.cat([self.score, none.to(self.score.dtype).fill_(EMPTY)], dim=2)
        self.full = self.full and not slots

    def write(self, index: torch.Tensor, tokens: Tokens, valid: torch.Tensor) -> None:
        """Quantize ``tokens`` into slots ``index`` where ``valid``; both [B, H, n], distinct slots per head."""
        chosen = valid.view(-1).nonzero().squeeze(1)
        if not chosen.numel():
            return
        rows = flat_rows(self.position, index).index_select(0, chosen)
        key, value, position, score = (
            tensor.reshape(-1, *tensor.shape[3:]).index_select(0, chosen) for tensor in tokens.tensors()
        )
        heads = rows // self.slots
        self.key.write(rows, key, heads)
        self.value.write(rows, value, heads)
        self.position.view(-1).index_copy_(0, rows, position)
        self.score.view(-1).index_copy_(0, rows, score)

    def dequantized(self, dtype: torch.dtype) -> Tokens:
        """All slots as they would stand in a cache of ``dtype``."""
        return Tokens(self.key.dequantize(dtype), self.value.dequantize(dtype), self.position, self.score)
