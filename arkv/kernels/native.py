"""Decode attention on CPUs by a C function: the twin of ``TriStateLayer._attend_folded``.

``decode.c`` says how it works: codes are expanded in registers, where the torch operations of its twin write them to
memory as float32. It is compiled for the machine it runs on, once, by::

    python -m arkv.kernels

which needs a C compiler (``$CC`` or ``cc``). The library lies beside this module, where Python keeps what it compiles,
under a name that its source, the compiler's options, the processor and torch decide. Where there is none of that name,
nothing is compiled and the twin serves.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from arkv.kernels.decode import head_stride, stored_tensors
from arkv.quantization import QuantizedTensor, e4m3_to_float, rotation
from arkv.storage import QuantizedPool, Tokens

MAX_HEAD_DIM, MAX_GROUP = 256, 64
"""As in ``decode.c``."""

NUMBER_TYPES = {torch.bfloat16: 0, torch.float32: 1}
_E4M3 = 1
_OPTIONS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)


class NotBuilt(RuntimeError):
    """There is no compiler, or it failed; the message says which and what it said."""


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
        ("original", _Pool),
        ("quantized", _Pool),
    ]


# -- building ----------------------------------------------------------------------------------------------------------


def library_path() -> Path:
    """Where the library for this machine lies, or would."""
    digest = hashlib.sha256(_source().read_bytes())
    for part in (*_OPTIONS, _processor(), torch.__version__, *map(str, _openmp())):
        digest.update(part.encode() + b"\0")
    return _source().parent / "__pycache__" / f"decode-{digest.hexdigest()[:16]}.so"


def build() -> Path:
    """Compile the library unless it is there. Raises :class:`NotBuilt`."""
    path = library_path()
    if path.exists():
        return path
    compiler = shlex.split(os.environ.get("CC") or "cc")
    try:
        path.parent.mkdir(exist_ok=True)
        space = tempfile.TemporaryDirectory(dir=path.parent)
    except OSError as error:
        raise NotBuilt(f"{path.parent} cannot be written: {error}") from None
    with space as name:
        compiled, linked = Path(name) / "decode.o", Path(name) / "decode.so"
        # In two steps: torch's own OpenMP, which has its threads already, is linked, not the compiler's.
        openmp = [str(path) for path in _openmp()] or ["-fopenmp"]
        for command in (
            [*compiler, *_OPTIONS, "-c", str(_source()), "-o", str(compiled)],
            [*compiler, "-shared", str(compiled), *openmp, "-lm", "-o", str(linked)],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            except OSError as error:
                raise NotBuilt(f"no C compiler: {error}; install one, or name it in CC") from None
            if done.returncode:
                raise NotBuilt(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
        # Another process that looks sees all of it or nothing.
        os.replace(linked, path)
    _library.cache_clear()
    return path


def _source() -> Path:
    return Path(__file__).with_name("decode.c")


def _openmp() -> list[Path]:
    """The OpenMP library that torch brings along; none where it uses the system's."""
    root = Path(torch.__file__).parent
    return sorted([*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")])[:1]


def _processor() -> str:
    """What decides the instructions that the compiler may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    found = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return f"{platform.machine()} {sorted(set(found))}"


@cache
def _library() -> ctypes.CDLL | None:
    path = library_path()
    if not path.exists():
        return None
    library = ctypes.CDLL(str(path))
    library.arkv_space.restype, library.arkv_space.argtypes = ctypes.c_int64, [ctypes.POINTER(_Call)]
    library.arkv_decode.restype, library.arkv_decode.argtypes = None, [ctypes.POINTER(_Call)]
    return library


# -- decoding ----------------------------------------------------------------------------------------------------------


def is_built() -> bool:
    """Whether the library is there for this machine."""
    return _library() is not None


def supported(device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether :func:`decode_attention` can serve a layer; see :func:`arkv.kernels.find`."""
    return (
        device.type == "cpu"
        and dtype in NUMBER_TYPES
        and head_dim <= MAX_HEAD_DIM
        and group <= MAX_GROUP
        and sys.byteorder == "little"
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
    library = _library()
    assert library is not None
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
        *(probabilities.data_ptr(), output.data_ptr(), None),
        *(original, quantized),
    )
    space = empty(library.arkv_space(call))
    call.space = space.data_ptr()
    library.arkv_decode(call)
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
