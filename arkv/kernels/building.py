"""Building the C functions for CPUs, and loading them.

They are compiled for the machine they run on, once, by::

    python -m arkv.kernels

which needs a C compiler (``$CC`` or ``cc``). The library lies beside this module, where Python keeps what it compiles,
under a name that its sources, the compiler's options, the processor and torch decide. Where there is none of that name,
nothing is compiled and torch's operations serve.
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

NUMBER_TYPES = {torch.bfloat16: 0, torch.float32: 1}
"""As in ``numbers.h``."""

_OPTIONS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)


_HEADER = Path(__file__).with_name("numbers.h")
_SOURCES = [Path(__file__).with_name(name) for name in ("decode.c", "quantize.c", "score.c")]


class NotBuilt(RuntimeError):
    """There is no compiler, or it failed; the message says which and what it said."""


def library_path() -> Path:
    """Where the library for this machine lies, or would."""
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in [_HEADER, *_SOURCES]))
    for part in (*_OPTIONS, _processor(), torch.__version__, *map(str, _openmp())):
        digest.update(part.encode() + b"\0")
    return _HEADER.parent / "__pycache__" / f"native-{digest.hexdigest()[:16]}.so"


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
        objects, linked = [Path(name) / f"{source.stem}.o" for source in _SOURCES], Path(name) / "native.so"
        # In two steps: torch's own OpenMP, which has its threads already, is linked, not the compiler's.
        openmp = [str(path) for path in _openmp()] or ["-fopenmp"]
        for command in (
            *([*compiler, *_OPTIONS, "-c", str(c), "-o", str(o)] for c, o in zip(_SOURCES, objects, strict=True)),
            [*compiler, "-shared", *map(str, objects), *openmp, "-lm", "-o", str(linked)],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            except OSError as error:
                raise NotBuilt(f"no C compiler: {error}; install one, or name it in CC") from None
            if done.returncode:
                raise NotBuilt(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")
        # Another process that looks sees all of it or nothing.
        os.replace(linked, path)
    library.cache_clear()
    return path


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
def library() -> ctypes.CDLL | None:
    """The functions, if they have been built for this machine."""
    path = library_path()
    if not path.exists() or sys.byteorder != "little":
        return None
    found = ctypes.CDLL(str(path))
    found.arkv_space.restype = found.arkv_summary_space.restype = found.arkv_has_tiles.restype = ctypes.c_int64
    return found


def is_built() -> bool:
    """Whether :func:`library` is there."""
    return library() is not None
