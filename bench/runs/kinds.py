"""What a folder holds, by its files: a run, timings, an inspection, a search. Each command writes into its own kind."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from bench.errors import UserError
from bench.names import RECORD, RESULTS, SAMPLES, SPEED

RUNS = Path("runs")
"""Where commands leave what they make, unless they are told otherwise."""
RUN, TIMINGS, INSPECTION, SEARCH = "a run", "timings (speed)", "an inspection", "a search (tune)"
MARKS = {
    SEARCH: ("study.jsonl", "study.db"),
    TIMINGS: (SPEED,),
    INSPECTION: ("inspect.json",),
    RUN: (SAMPLES, RESULTS, RECORD),
}
"""Files of which one is enough to tell a kind; the first kind that has one counts, for all have a record."""


def kind_of(folder: Path) -> str | None:
    """The kind of what a folder holds; None where it is absent, empty or of something else."""
    return next((kind for kind, files in MARKS.items() if any((folder / file).is_file() for file in files)), None)


def claim(folder: Path, kind: str) -> None:
    """Raises :class:`UserError` where a folder holds another kind, which would be spoilt."""
    held = kind_of(folder)
    if held not in (None, kind):
        raise UserError(f"{folder} holds {held}: give another --outdir", exit_code=2)


def new_folder(suffix: str | None = None) -> Path:
    """A folder for what is made now: named after the time, and ``suffix``."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return RUNS / (f"{stamp}-{suffix}" if suffix else stamp)


def newest_run() -> Path:
    """The run in :data:`RUNS`, or in a folder there, that was written to last.

    Raises:
        UserError: there is none; with the command that makes one.
    """
    found: dict[Path, int] = {}
    for name in (SAMPLES, RESULTS):
        for file in (*RUNS.glob(f"*/{name}"), *RUNS.glob(f"*/*/{name}")):
            found[file.parent] = max(found.get(file.parent, 0), file.stat().st_mtime_ns)
    if not found:
        message = f"there is no run under {RUNS.resolve()}: name a folder, or make one: arkv-bench run --preset demo"
        raise UserError(message, exit_code=2)
    # Two written in one tick of the clock: names of folders begin with the time.
    return max(found, key=lambda folder: (found[folder], folder.name))
