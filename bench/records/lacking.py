"""What a path is told that was given as a run folder and is none."""

from __future__ import annotations

from pathlib import Path

from bench.errors import UserError


def no_run_folder(path: Path, lacking: str) -> UserError:
    """The error of such a path: what was asked for is wrong.

    Args:
        lacking: the file that would make it one.
    """
    if not path.exists():
        return UserError(f"{path} is no run folder: it does not exist", exit_code=2)
    return UserError(f"{path} is no run folder: it has no {lacking}", exit_code=2)
