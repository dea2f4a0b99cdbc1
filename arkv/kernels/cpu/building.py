"""Building the C functions for CPUs, and loading them.

They are compiled for the machine they run on, once: by whatever needs them first, which takes half a minute, or
ahead of that by::

    python -m arkv.kernels

It needs a C compiler (``$CC`` or ``cc``). The library lies among the user's caches, under a name that its sources, the
compiler's options, the processor, the C library and torch decide. Where it cannot be compiled, a line in the log says
why, and torch's operations serve.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NUMBER_TYPES = {torch.bfloat16: 16, torch.float32: 32}
"""As in ``numbers.h``."""

_OPTIONS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"),
    *(("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()),
)

_FOLDER = Path(__file__).parent
_HEADERS = [
    _FOLDER / name
    for name in ("numbers.h", "pools.h", "encode.h", "vectors.h", "expand.h", "integers.h", "registers.h")
]
_SOURCES = [_FOLDER / name for name in ("attend.c", "rows.c", "quantize.c", "score.c", "reread.c")]

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
    "arkv_largest": [_ADDRESS, _ADDRESS, _INT, _REAL, _INT],
    "arkv_smooth": [_ADDRESS, _INT, _ADDRESS, _INT, _INT, _ADDRESS, *[_INT] * 3],
    "arkv_quantize": [_ADDRESS, _INT, _INT, _ADDRESS, _INT, _INT, *[_ADDRESS] * 3, _INT],
}


class NotBuilt(RuntimeError):
    """There is no compiler, or it failed; the message says which and what it said."""


def library_path() -> Path:
    """Where the library for this machine lies, or would: ``kernels`` in ``$ARKV_CACHE``, else ``arkv`` in
    ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in [*_HEADERS, *_SOURCES]))
    for part in (*_OPTIONS, _processor(), _c_library(), torch.__version__, *map(str, _openmp())):
        digest.update(part.encode() + b"\0")
    if own := os.environ.get("ARKV_CACHE"):
        folder = Path(os.path.expanduser(own)) / "kernels"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "arkv"
    return folder / f"native-{digest.hexdigest()[:16]}.so"


def build() -> Path:
    """Compile the library unless it is there, once for all processes that ask. Raises :class:`NotBuilt`."""
    path = library_path()
    if path.exists():
        return path
    compiler = shlex.split(os.environ.get("CC") or "cc")
    with _alone(path), tempfile.TemporaryDirectory(dir=path.parent) as name:
        if path.exists():  # by another process, in the meantime
            return path
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


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock of the library ``path``, whose folder is made; :class:`NotBuilt` where it cannot be written."""
    lock = path.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise NotBuilt(f"{path.parent} cannot be written: {error}; set ARKV_CACHE") from None
    with file:
        if fcntl is not None:  # else several may compile, and the last one's stays
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Whoever waits for it still finds the library there, before it would compile.
            lock.unlink(missing_ok=True)


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


def _c_library() -> str:
    """The C library and its version: what is linked with a newer one does not load with an older one."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        return platform.system()


@cache
def library() -> ctypes.CDLL | None:
    """The functions, compiled first where they are not there; None where that cannot be done, which the log says."""
    if sys.byteorder != "little":
        return None
    path = library_path()
    try:
        if not path.exists():
            logger.info("compiling the CPU kernels into %s, once for this machine", path.parent)
            build()
        found = ctypes.CDLL(str(path))
    except (NotBuilt, OSError) as error:
        why = str(error).partition("\n")[0]
        logger.warning("no CPU kernels, so that torch's operations serve, which are slower: %s", why)
        return None
    for name, arguments in _ARGUMENTS.items():
        getattr(found, name).argtypes = arguments
    for name in ("arkv_attend", "arkv_smooth", "arkv_summary_space", "arkv_has_tiles", "arkv_reread_space"):
        getattr(found, name).restype = ctypes.c_int64
    return found


def is_built() -> bool:
    """Whether the functions are there, without compiling them."""
    return library_path().exists()
