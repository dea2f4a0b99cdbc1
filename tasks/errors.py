"""What is wrong with a task, and what to type instead, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TaskError(ValueError):
    """A task cannot be set up: what is wrong and what to change, in one line.

    ``usage`` marks an error in what was asked for (an unknown name), as opposed to one met on the way (missing data).
    ``reason`` is the same of other tasks that fail for it, such as a folder with the rows of none of them.
    """

    def __init__(self, message: str, *, usage: bool = False, reason: str = "") -> None:
        super().__init__(message)
        self.usage = usage
        self.reason = reason


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the nearest known names, or all of them when nothing is near."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
