"""Which rows of which runs are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.records.files.text import printable
from bench.records.row import Row


def headline(rows: Sequence[Row]) -> list[Row]:
    """The rows to show: parts of a group that has rows of its own are left to the CSV file."""
    groups = {row.task for row in rows}
    return [row for row in rows if row.part_of not in groups]


def run_names(paths: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, or the whole path where several are called so."""
    names = [path.resolve().name for path in paths]
    return [printable(name if names.count(name) == 1 else str(path)) for path, name in zip(paths, names, strict=True)]
