"""What commands that read and write folders share: the newest run where none is named, and files that are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from bench.errors import UserError


def named_or_newest(runs: Sequence[Path] | None) -> list[Path]:
    """The folders that were typed, or the newest run, which a line on standard error names.

    Raises:
        UserError: none was typed, and there is no run.
    """
    if runs:
        return list(runs)
    from bench.runs.kinds import newest_run

    newest = newest_run()
    say_newest(newest)
    return [newest]


def say_newest(run: Path) -> None:
    """Name the run that was taken because none was named."""
    typer.echo(f"arkv-bench: no run named, so this is the newest one, {run}", err=True)


def write(path: Path, text: str, *, quiet: bool = False) -> None:
    """Write a file that was asked for, and say so unless ``quiet``.

    Raises:
        UserError: it cannot be written.
    """
    from bench.runs.folder import write_atomic

    try:
        write_atomic(path, text)
    except OSError as error:
        if not path.parent.is_dir():
            raise UserError(f"{path}: cannot be written (there is no folder {path.parent})") from None
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    if not quiet:
        typer.echo(f"wrote {path}")
