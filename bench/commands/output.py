"""What commands that read and write folders share: the newest run where none is named, and files that are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer


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
    """Write a file that was asked for, its folder too, and say so unless ``quiet``.

    Raises:
        UserError: it cannot be written.
    """
    from bench.records.files.text import write_output

    write_output(path, text)
    if not quiet:
        typer.echo(f"wrote {path}")
