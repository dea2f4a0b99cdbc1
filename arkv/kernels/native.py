"""Decode attention on CPUs by a C function: the twin of ``TriStateLayer._attend_folded``.

``decode.c`` says how it works: codes are expanded in registers, where the torch operations of its twin write them to
memory as float32.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from arkv.kernels.building import NUMBER_TYPES, is_built, library
from arkv.kernels.decode import head_stride, stored_tensors
from arkv.quantization import QuantizedTensor, e4m3_to_float, rotation
from arkv.storage import QuantizedPool, Tokens

MAX_HEAD_DIM, MAX_GROUP = 256, 64
"""As in ``decode.c``."""

_E4M3 = 1


class _Pool(ctypes.Structure):
    """``struct pool``."""

    _fields_ = [
        ("slots", ctypes.c_int64),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("key_stride", ctypes.c_int64),
        ("value_stride", ctypes.c_int64),
        ("key_bits", ctypes.c_int64),
        ("value_bits", ctypes.c_int64),
        ("number_type", ctypes.c_int64),
        ("range_type", ctypes.c_int64),
        ("key_scale", ctypes.c_void_p),
        ("key_zero", ctypes.c_void_p),
        ("value_scale", ctypes.c_void_p),
        ("value_zero", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("position_bytes", ctypes.c_int64),
        ("position_stride", ctypes.c_int64),
        ("query", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class _Call(ctypes.Structure):
    """``struct call``."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("key_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("query", ctypes.c_void_p),
        ("query_type", ctypes.c_int64),
        ("scaling", ctypes.c_double),
        ("key_rotation", ctypes.c_void_p),
        ("value_rotation", ctypes.c_void_p),
        ("center", ctypes.c_void_p),
        ("e4m3", ctypes.c_void_p),
        ("probabilities", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("space", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
        ("original", _Pool),
        ("quantized", _Pool),
    ]


def supported(device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether :func:`decode_attention` can serve a layer; see :func:`arkv.kernels.find`."""
    return (
        device.type == "cpu"
        and dtype in NUMBER_TYPES
        and head_dim <= MAX_HEAD_DIM
        and group <= MAX_GROUP
        and is_built()
    )


def decode_attention(
    query: torch.Tensor, held: Tokens, stored: QuantizedPool | None, scaling: float, masked: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one new token over both pools, without gradients.

    Args:
        query: [B, H, G, D].
        held: the Original slots in use.
        stored: the Quantized slots.
        scaling: factor of the logits.
        masked: Original slots may be without a token (position -1).

    Returns:
        Output [B, H, G, D] and probabilities [B, H, G, S], Original slots first; both float32.
    """
    functions = library()
    assert functions is not None
    batch, heads, group, key_dim = query.shape
    value_dim = held.value.shape[-1]
    # Whatever is made here must live until the function has returned: see `alive`.
    query = query.detach().contiguous()
    original, alive = _original_pool(held, masked), [query]
    quantized, center = _Pool(), None
    turns: tuple[int | None, int | None] = (None, None)
    if stored is not None:
        quantized, more = _quantized_pool(stored)
        alive += more
        if stored.key.center is not None:
            center = stored.key.center.contiguous()
            alive.append(center)
        turns = (_rotation(stored.key), _rotation(stored.value))
    slots = original.slots + quantized.slots
    empty = torch.empty(0, dtype=torch.float32).new_empty
    probabilities, output = empty(batch, heads, group, slots), empty(batch, heads, group, value_dim)
    call = _Call(
        *(batch * heads, group, key_dim, value_dim),
        *(query.data_ptr(), NUMBER_TYPES[query.dtype], scaling),
        *turns,
        None if center is None else center.data_ptr(),
        _e4m3_table().data_ptr(),
        *(probabilities.data_ptr(), output.data_ptr(), None, torch.get_num_threads()),
        *(original, quantized),
    )
    space = empty(functions.arkv_space(ctypes.byref(call)))
    call.space = space.data_ptr()
    functions.arkv_decode(ctypes.byref(call))
    return output, probabilities


def _original_pool(held: Tokens, masked: bool) -> _Pool:
    size = held.key.element_size()
    return _Pool(
        *(held.slots, held.key.data_ptr(), held.value.data_ptr()),
        *(head_stride(held.key) * size, head_stride(held.value) * size),
        *(0, 0, NUMBER_TYPES[held.key.dtype], 0),
        *(None, None, None, None),
        *(_positions(held.position, head_stride(held.position)) if masked else (None, 0, 0)),
    )


def _quantized_pool(stored: QuantizedPool) -> tuple[_Pool, list[torch.Tensor]]:
    """The pool and the tensors that it points to."""
    key, value, position = stored_tensors(stored.key), stored_tensors(stored.value), stored.position.contiguous()
    pool = _Pool(
        *(stored.slots, _address(key[0]), _address(value[0])),
        *(stored.slots * stored.key.codes.shape[-1], stored.slots * stored.value.codes.shape[-1]),
        *(_bits(stored.key), _bits(stored.value), 0, NUMBER_TYPES[stored.key.scale.dtype]),
        *(_address(key[1]), _address(key[2]), _address(value[1]), _address(value[2])),
        *((None, 0, 0) if stored.full else _positions(position, stored.slots)),
    )
    return pool, [position, *(tensor for tensor in (*key, *value) if tensor is not None)]


def _positions(position: torch.Tensor, stride: int) -> tuple[int, int, int]:
    """Address, bytes of a position, bytes from one row to the next."""
    size = position.element_size()
    return position.data_ptr(), size, stride * size


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rotation(tensor: QuantizedTensor) -> int | None:
    """The rotation lives as long as the process."""
    return rotation(tensor.head_dim, tensor.codes.device).data_ptr() if tensor.layout.rotated else None


def _bits(tensor: QuantizedTensor) -> int:
    return _E4M3 if tensor.layout.floating else tensor.layout.bits


@cache
def _e4m3_table() -> torch.Tensor:
    with torch.inference_mode(False):
        return e4m3_to_float(torch.arange(256, dtype=torch.uint8)).contiguous()
