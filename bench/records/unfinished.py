"""How far a run has come that has not ended, and the command that goes on with it."""

from __future__ import annotations

import shlex
from pathlib import Path

from bench.names import RECORD, SAMPLES
from bench.records.record import Record, read_record

BLOCK = 1 << 20


def answers_asked(record: Record, answers: int) -> int | None:
    """Answers that the tasks begun so far ask for; None where there is more, of documents of earlier starts."""
    repeats = record.settings.get("repeats") or 1
    documents = sum(task.documents for task in record.tasks.values()) * repeats
    asked = documents * len(record.cells) * len(record.models)
    return asked if asked >= answers else None


def unfinished_folder(path: Path) -> str | None:
    """As :func:`unfinished`, of a folder. Raises :class:`UserError` where its record is damaged."""
    if not (path / RECORD).is_file():
        return None
    return unfinished(path, read_record(path), _lines(path / SAMPLES))


def unfinished(path: Path, record: Record, answers: int) -> str | None:
    """What is missing of a run, and what to type; None where it has ended.

    Args:
        path: its folder, as the reader knows it.
        answers: how many are there.
    """
    if record.finished:
        return None
    asked = answers_asked(record, answers)
    there = f"{answers:,} answers are there"
    if asked:
        there = f"{answers:,} of the {asked:,} answers are there that the tasks begun so far ask for"
    return f"{path} has not ended: {there}. Unless it is still running, go on with: {_again(path, record)}"


def _again(path: Path, record: Record) -> str:
    """The command of the newest start, with this folder."""
    typed = (record.starts[-1].command if record.starts else None) or record.command
    words = shlex.split(typed)
    if words[:2] != ["arkv-bench", "run"]:
        return f"what began it ({typed or 'unknown'}), with this folder"
    rest = iter(words)
    kept = []
    # Begun afresh, what is there would be lost; and the folder may have been moved.
    for word in rest:
        if word == "--outdir":
            next(rest, None)
        elif word != "--fresh" and not word.startswith("--outdir="):
            kept.append(word)
    return shlex.join([*kept, "--outdir", str(path)])


def _lines(file: Path) -> int:
    if not file.is_file():
        return 0
    with open(file, "rb") as samples:
        return sum(block.count(b"\n") for block in iter(lambda: samples.read(BLOCK), b""))
