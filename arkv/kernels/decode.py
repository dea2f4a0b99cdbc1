"""Decode attention on GPUs by a Triton kernel: the twin of ``TriStateLayer._attend_folded``.

No GPU has run it so far: it has been compared with its twin in Triton's interpreter on a CPU and compiled for NVIDIA's
sm_80 and sm_90, and no timings exist. ``scripts/time_kernels.py`` takes them where there is a GPU.

Letters: ``B`` batch, ``H`` KV heads, ``G`` query heads per KV head, ``S`` slots, ``D`` head dim.

Each KV head's slots are split among programs (flash-decoding). A program reads its keys and values once, as they are
stored, and leaves logits, an output and their softmax's maximum and sum; a second kernel combines these and turns the
logits into probabilities, which are the importance of the tokens. Queries are turned into the coordinates of rotated
formats before, and outputs back after. Triton is imported when the first step is taken.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from arkv.quantization import QuantizedTensor, rotation
from arkv.storage import QuantizedPool, Tokens

BLOCK = 64
"""Slots that a program takes at a time."""

MAX_HEAD_DIM, MAX_GROUP = 128, 16
"""Within these the kernel takes no more shared memory than the smallest GPUs of its generation have, 99 KiB."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supported(device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether :func:`decode_attention` can serve a layer: on NVIDIA GPUs since Ampere, where Triton is installed.

    Args:
        dtype: of the Original tokens.
        head_dim: the larger one, where keys and values differ.
        group: query heads per KV head.
    """
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and _has_triton()
        and _capability(device) >= (8, 0)
        and dtype in DTYPES
        and head_dim <= MAX_HEAD_DIM
        and group <= MAX_GROUP
    )


def decode_attention(
    query: torch.Tensor,
    held: Tokens,
    stored: QuantizedPool | None,
    scaling: float,
    masked: bool,
    slots_per_split: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one new token over both pools, without gradients.

    Args:
        query: [B, H, G, D].
        held: the Original slots in use, at least one where there is no other pool.
        stored: the Quantized slots.
        scaling: factor of the logits.
        masked: Original slots may be without a token (position -1).
        slots_per_split: a multiple of 64; None shares the slots among the device's processors.

    Returns:
        Output [B, H, G, D] and probabilities [B, H, G, S], Original slots first; both float32.
    """
    from arkv.kernels.triton import attend_splits, combine_splits

    batch, heads, group, key_dim = query.shape
    value_dim = held.value.shape[-1]
    rows = batch * heads
    original, quantized = held.slots, 0 if stored is None else stored.slots
    slots = original + quantized
    if slots_per_split is None:
        slots_per_split = _slots_per_split(slots, rows, query.device)
    assert slots_per_split % BLOCK == 0
    original_splits = -(-original // slots_per_split)
    splits = original_splits + -(-quantized // slots_per_split)

    empty = torch.empty(0, dtype=torch.float32, device=query.device).new_empty
    probabilities, outputs = empty(batch, heads, group, slots), empty(batch, heads, 2, group, value_dim)
    partial, peak, total = empty(rows, splits, group, value_dim), empty(rows, splits, group), empty(rows, splits, group)
    key, value = (None, None) if stored is None else (stored.key, stored.value)
    turned, bias = query, None
    if key is not None and key.layout.rotated:
        turned = query.float() @ rotation(key_dim, query.device)
    if key is not None and key.center is not None:
        bias = (query.float() @ key.center.float().transpose(-1, -2)).contiguous()
    wide = max(key_dim, value_dim) > 64
    # Triton launches on the current device, which need not be the one that the layer is on.
    with torch.cuda.device_of(query):
        attend_splits[(rows, splits)](
            *(query.contiguous(), turned.contiguous(), bias),
            scaling,
            *(held.key, held.value, held.position),
            *(head_stride(held.key), head_stride(held.value), head_stride(held.position)),
            *stored_tensors(key),
            *stored_tensors(value),
            None if stored is None else stored.position.contiguous(),
            *(probabilities, partial, peak, total),
            *(original, quantized, original_splits, slots_per_split),
            GROUP=group,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            PADDED_GROUP=_padded(group, 16),
            PADDED_KEY_DIM=_padded(key_dim, 16),
            PADDED_VALUE_DIM=_padded(value_dim, 16),
            BLOCK=BLOCK,
            MASK_ORIGINAL=masked,
            MASK_QUANTIZED=stored is not None and not stored.full,
            KEY_BITS=0 if key is None else key.layout.bits,
            VALUE_BITS=0 if value is None else value.layout.bits,
            FLOATING=key is not None and key.layout.floating,
            num_warps=8 if wide else 4,
            num_stages=1 if wide else 2,
        )
        width = 256
        combine_splits[(rows, -(-slots // width))](
            *(probabilities, outputs, partial, peak, total),
            *(slots, splits, original_splits),
            GROUP=group,
            VALUE_DIM=value_dim,
            PADDED_GROUP=_padded(group),
            PADDED_VALUE_DIM=_padded(value_dim),
            PADDED_SPLITS=_padded(splits),
            BLOCK=width,
        )
    low = outputs[:, :, 1]
    if value is not None and value.layout.rotated:
        low = low @ rotation(value_dim, low.device).T
    return outputs[:, :, 0] + low, probabilities


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _slots_per_split(slots: int, rows: int, device: torch.device) -> int:
    """Two programs for each processor, or as many as there are blocks."""
    splits = max(2 * _processors(device) // rows, 1)
    return -(-slots // (splits * BLOCK)) * BLOCK


def _padded(size: int, least: int = 1) -> int:
    """The power of two that holds ``size``."""
    return max(1 << (size - 1).bit_length(), least)


def head_stride(tensor: torch.Tensor) -> int:
    """Elements from one head's first slot to the next one's, in storage of which the first slots are in use."""
    assert tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1), "samples follow one another"
    assert tensor.stride()[2:] == ((1,) if tensor.dim() == 3 else (tensor.shape[3], 1)), "slots follow one another"
    return tensor.stride(1)


def stored_tensors(
    tensor: QuantizedTensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Codes, scales and zero points, as they lie in memory."""
    if tensor is None:
        return None, None, None
    zero = None if tensor.zero is None else tensor.zero.contiguous()
    return tensor.codes.contiguous(), tensor.scale.contiguous(), zero
