"""Kernels: the operations of a decoding step (:mod:`arkv.kernels.twin` says what they do), quantizing, and the
attention of a prompt's newest queries. In C on CPUs, where they have been built (:mod:`arkv.kernels.cpu`); in Triton on
GPUs (:mod:`arkv.kernels.gpu`), imported by need; elsewhere in torch's operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arkv.kernels import operators
from arkv.kernels.cpu import quantize, score


def make_room(
    rows: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    formats: Sequence[str],
    n_sink: int,
    window: int,
    recency: bool,
) -> None:
    """:func:`arkv.kernels.twin.make_room` by the kernel that serves.

    Args:
        tensors: ``Store.tensors()``.
        formats: names of the Quantized pools' number formats.
    """
    torch.ops.arkv.make_room(rows, tensors, formats, n_sink, window, recency)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    begin: int,
    tensors: Sequence[torch.Tensor],
    formats: Sequence[str],
    n_sink: int,
    window: int,
    scaling: float,
    softcap: float,
    sinks: torch.Tensor | None,
    importance: Sequence[torch.Tensor],
    widths: Sequence[int] = (),
) -> torch.Tensor:
    """:func:`arkv.kernels.twin.attend` likewise.

    Args:
        widths: ``Store.widths``, with which a GPU needs not be asked how many slots there are.
    """
    output: torch.Tensor = torch.ops.arkv.attend(
        query, key, value, rows, begin, tensors, formats, n_sink, window, scaling, softcap, sinks, importance, widths
    )
    return output


def remember(
    rows: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    formats: Sequence[str],
    importance: Sequence[torch.Tensor],
    window: int,
    rate: float,
    pool_width: int,
) -> None:
    """:func:`arkv.kernels.twin.remember` likewise."""
    torch.ops.arkv.remember(rows, tensors, formats, importance, window, rate, pool_width)


__all__ = ["attend", "make_room", "operators", "quantize", "remember", "score"]
