"""The cache folder: where it is, and checksums of files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path


def cache_root() -> Path:
    """The cache folder: ``$ARKV_CACHE``, else ``arkv-bench`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("ARKV_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "arkv-bench"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remembered_sha256(path: Path) -> str:
    """SHA-256 of a file, remembered in the cache folder by its path, size and time of change."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()
    known = cache_root() / "sha256" / key
    try:
        return known.read_text()
    except OSError:
        found = file_sha256(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        known.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=known.parent, delete=False) as file:
            file.write(found)
        os.replace(file.name, known)
    return found
