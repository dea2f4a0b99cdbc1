"""The error that ends a command with one clear line instead of a traceback, and the traceback behind such a line."""

from __future__ import annotations

import os
import sys
import textwrap
import traceback
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tasks.base import TaskError

SHOW_TRACEBACK = os.environ.get("ARKV_TRACEBACK", "") not in ("", "0")
"""Whatever is told in one line shows its whole traceback too: ``--traceback`` sets it, or ``ARKV_TRACEBACK=1``.

Read it as ``errors.SHOW_TRACEBACK``: a name imported from here would not follow.
"""


class UserError(Exception):
    """Something the user can put right: one line that says what is wrong and what to change.

    ``exit_code`` is the status the command ends with: 2 when what was asked for is wrong (an unknown name or option),
    1 when it could not be done (a failed download, a damaged file).
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def unread(path: Path, error: OSError) -> UserError:
    """A file that cannot be read; one that is not there was asked for in vain."""
    return UserError(f"{path}: cannot be read ({error.strerror})", 2 if isinstance(error, FileNotFoundError) else 1)


def whole_traceback(error: BaseException) -> str:
    """The traceback of an error and of all that it came from, also where ``from None`` hides that from a reader."""
    inner: BaseException | None = error
    while inner is not None:
        inner.__suppress_context__ = False
        inner = inner.__cause__ or inner.__context__
    return "".join(traceback.format_exception(error))


def show_traceback(error: BaseException) -> None:
    """Of an error that is recorded while a command goes on: its whole traceback to stderr, where that is asked for."""
    if SHOW_TRACEBACK:
        sys.stderr.write(whole_traceback(error))


def place(file: str, line: int | None) -> str:
    """A line of a file for a person; the file alone where the line is unknown."""
    return Path(file).name if line is None else f"{Path(file).name}, line {line}"


def place_of(error: BaseException, file: str | None = None) -> str:
    """Where an error was raised: the innermost line of ``file`` on the way there, or else the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if frame.filename == file] or frames
    return place(mine[-1].filename, mine[-1].lineno)


_LONGEST = 500
"""Characters of what an error says that are shown: some say whole tensors."""


def said_in_one_line(error: BaseException) -> str:
    """What an error says, with everything written out that a terminal would obey or a file could not hold."""
    text = textwrap.shorten(str(error), _LONGEST, placeholder=" ...")
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class OthersCode:
    """Whatever the code of others under this raises becomes one line that names it; nothing is swallowed.

    Args:
        name: whose code it is; may be empty where the reader knows.
        passing: kinds of errors that say what they mean themselves, beside the two that always do.
        placed: say where the error was raised.
        file: the user's own file, whose innermost line is said; without, it is the innermost of all.

    Raises:
        UserError: ``name``, the kind of the error, what it said, and where.
    """

    def __init__(self, name: str, *passing: type[Exception], placed: bool = False, file: str | None = None) -> None:
        self.passing: tuple[type[Exception], ...] = (UserError, TaskError, *passing)
        self.name, self.placed, self.file = name, placed, file

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A plugin is often a script, and a script ends itself.
        if isinstance(error, SystemExit) or (isinstance(error, Exception) and not isinstance(error, self.passing)):
            said = ": ".join(filter(None, (self.name, type(error).__name__, said_in_one_line(error))))
            raise UserError(f"{said} ({place_of(error, self.file)})" if self.placed else said) from error


NOBODY_READS = 141
"""Exit code of a command whose output goes into a pipe that was closed, as a shell has it of a program that SIGPIPE
ended."""


def nobody_reads(error: BaseException) -> bool:
    """Whether a command ends because what it prints goes into a pipe that was closed, as by ``| head -1``.

    Libraries that print may have made an end of the process of it.
    """
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, BrokenPipeError) and inner.filename is None:
            return True
        inner = inner.__context__ if isinstance(inner, SystemExit) else None
    return False


def close_output(stream: TextIO) -> None:
    """Nothing more is written to a pipe that nobody reads, not even when the process ends."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
