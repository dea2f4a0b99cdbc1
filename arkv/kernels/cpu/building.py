"""Building the C functions for CPUs, and loading them.

They are compiled for the machine they run on, once, by::

    python -m arkv.kernels

which needs a C compiler (``$CC`` or ``cc``). The library lies beside this module, where Python keeps what it compiles,
or among the user's caches where that cannot be written, under a name that its sources, the compiler's options, the
processor and torch decide. Where there is none of that name, nothing is compiled and torch's operations serve.
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
from typing import Any

import torch

NUMBER_TYPES = {torch.bfloat16: 16, torch.float32: 32}
"""As in ``numbers.h``."""

_OPTIONS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)

_FOLDER = Path(__file__).parent
_HEADERS = [_FOLDER / name for name in ("numbers.h", "pools.h", "encode.h")]
_SOURCES = [_FOLDER / name for name in ("attend.c", "rows.c", "quantize.c", "score.c")]

_INT, _REAL, _ADDRESS = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_ARGUMENTS: dict[str, list[Any]] = {
    "arkv_make_room": [_ADDRESS, _INT, _ADDRESS, *[_INT] * 6],
    "arkv_attend": [
        *(_ADDRESS, _INT, _ADDRESS, *[_INT] * 5),
        *(_ADDRESS, *[_INT] * 3, *[_ADDRESS, _INT, _INT] * 2),
        *(_INT, _INT, _REAL, _REAL, _ADDRESS, _INT),
        *(_ADDRESS, _ADDRESS, _INT),
    ],
    "arkv_average": [_ADDRESS, _ADDRESS, _INT, _REAL, _INT],
    "arkv_smooth": [_ADDRESS, _INT, _ADDRESS, _INT, _INT, _ADDRESS, *[_INT] * 3],
    "arkv_quantize": [_ADDRESS, _INT, _INT, _ADDRESS, _INT, _INT, *[_ADDRESS] * 3, _INT],
}


class NotBuilt(RuntimeError):
    """There is no compiler, or it failed; the message says which and what it said."""


def library_path() -> Path:
    """Where the library for this machine lies, or would."""
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in [*_HEADERS, *_SOURCES]))
    for part in (*_OPTIONS, _processor(), torch.__version__, *map(str, _openmp())):
        digest.update(part.encode() + b"\0")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    paths = [
        folder / f"native-{digest.hexdigest()[:16]}.so" for folder in (_FOLDER / "__pycache__", Path(caches) / "arkv")
    ]
    for path in paths:
        if path.exists():
            return path
    return next((path for path in paths if _is_writable(path.parent)), paths[-1])


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in ``folder``, which need not be there yet."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)


def build() -> Path:
    """Compile the library unless it is there. Raises :class:`NotBuilt`."""
    path = library_path()
    if path.exists():
        return path
    compiler = shlex.split(os.environ.get("CC") or "cc")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
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
    for name, arguments in _ARGUMENTS.items():
        getattr(found, name).argtypes = arguments
    for name in ("arkv_attend", "arkv_smooth", "arkv_summary_space", "arkv_has_tiles"):
        getattr(found, name).restype = ctypes.c_int64
    return found


def is_built() -> bool:
    """Whether :func:`library` is there."""
    return library() is not None
