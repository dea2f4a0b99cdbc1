"""Text files: replaced whole or not at all, read as UTF-8, shown without letting them move a terminal's cursor."""

from __future__ import annotations

import os
from pathlib import Path

from bench.errors import UserError, unread


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content``: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_output(path: Path, content: str | bytes, option: str = "") -> None:
    """Write what a command was asked for, atomically, into a folder that is made if absent.

    Args:
        option: through which it was asked for, such as ``--html``.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        raise UserError(f"{f'{option} {path}'.strip()}: cannot be written ({error.strerror})") from None


def read_bytes(path: Path) -> bytes:
    """What a file holds. Raises :class:`UserError` where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise unread(path, error) from None


def printable(text: str) -> str:
    """``text`` with everything that a terminal would obey written out: a name must not move the cursor."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
