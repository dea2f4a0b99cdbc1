"""A folder that one process at a time writes to."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from filelock import FileLock, Timeout

from bench.errors import UserError

T = TypeVar("T", bound="LockedFolder")


def _lock(path: Path, what: str) -> FileLock:
    """Make the folder if absent and take its lock, which ends with the process at the latest."""
    lock = FileLock(path / ".lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{path}: another {what} writes here; wait for it or give another --outdir") from None
    except OSError as error:
        raise UserError(f"{path}: cannot write there ({error.strerror}); give another --outdir") from None
    return lock


class LockedFolder(AbstractContextManager["LockedFolder"]):
    """A context manager that holds the lock of a folder while something of it is open.

    Args:
        folder: made if absent; None where nothing is written, and nothing is locked.
        what: a process that writes there, such as ``run``, for a person.

    Entering raises :class:`UserError` where another process holds the lock, or the folder cannot be written to, and
    whatever :meth:`_open` does.
    """

    def __init__(self, folder: Path | None, what: str) -> None:
        self._folder, self._what = folder, what

    def __enter__(self: T) -> T:
        if self._folder is not None:
            self._lock = _lock(self._folder, self._what)
            try:
                self._open(self._folder)
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._close()
            self._lock.release()

    def _open(self, folder: Path) -> None:
        """Read what the folder holds, now that it is locked."""

    def _close(self) -> None:
        """Leave it, before the lock is released."""
