"""One file from an index: resumed where an earlier attempt ended, and checked before it bears its name."""

from __future__ import annotations

import os
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path

from bench.errors import UserError
from bench.models.index import BROKEN, Index, reason
from bench.models.storage import file_sha256

ATTEMPTS = 5
"""So many in a row may fail without a byte."""
PAUSE_S = 1.0
"""Before the second attempt; doubled before each further one."""
_BLOCK = 1 << 18


def download(
    index: Index,
    url: str,
    target: Path,
    *,
    size: int,
    sha256: str,
    progress: Callable[[int], None],
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Fetch ``url`` to ``target``, which appears only when it is whole and right.

    What has come so far lies beside it, ``NAME.part``, and stays after an interruption: the next call fetches the rest.

    Args:
        size: bytes of the file.
        progress: told how many bytes are there.

    Raises:
        UserError: it cannot be had, or is another file than the one pinned.
    """
    part = target.with_name(f"{target.name}.part")
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        if before > size:
            part.unlink()
            before = 0
        if before < size:
            why = _fetch_rest(index, url, part, before, size, progress)
        now = part.stat().st_size if part.exists() else 0
        if now == size:
            found = file_sha256(part)
            if found == sha256:
                os.replace(part, target)
                return
            part.unlink()
            if not before:
                raise UserError(f"{target.name} is not the file that was pinned: SHA-256 {found}, expected {sha256}")
            continue  # the beginning may have been another file's
        if now > size:
            part.unlink()
            raise UserError(f"{target.name} is not the file that was pinned: it is longer than {size:,} bytes")
        failures = 1 if now > before else failures + 1
        if failures >= ATTEMPTS:
            raise UserError(f"{target.name} could not be fetched: {why}; what has come is kept, the next call goes on")
        pause(PAUSE_S * 2 ** (failures - 1))


def _fetch_rest(index: Index, url: str, part: Path, begin: int, size: int, progress: Callable[[int], None]) -> str:
    """Append to ``part`` what comes of bytes ``begin`` to ``size``, and say why it is not all of it.

    Raises:
        UserError: the index refuses, so that asking again would not help.
        OSError: ``part`` cannot be written.
    """
    try:
        response = index.open(url, {"Range": f"bytes={begin}-"} if begin else {})
    except urllib.error.HTTPError as error:
        if error.code == 416 and begin:
            part.unlink()
            return "the index has fewer bytes than have come"
        if 400 <= error.code < 500 and error.code not in (408, 425, 429):
            raise UserError(f"{part.stem} could not be fetched: {reason(error)}") from error
        return reason(error)
    except BROKEN as error:
        return reason(error)
    with response:
        partly = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {begin}-")
        done = begin if partly else 0
        with part.open("ab" if partly else "wb") as file:
            while done <= size:
                try:
                    block = response.read(_BLOCK)
                except BROKEN as error:
                    return reason(error)
                if not block:
                    return f"the connection ended after {done:,} of {size:,} bytes"
                file.write(block)
                done += len(block)
                progress(min(done, size))
    return f"it is longer than the {size:,} bytes that were pinned"
