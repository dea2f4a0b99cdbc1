"""The folder of ``arkv-bench speed``: rows are written as they are measured; the same command goes on from there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.errors import UserError
from bench.names import RECORD, SPEED
from bench.records.files.text import write_atomic
from bench.records.timing import SpeedRecord, Timing, Untimed, read_speed_record, read_timings, timings_csv
from bench.records.timing import speed_record_text as record_text
from bench.runs.folder import REMEDY, command_line, environment, now, source_sha256
from bench.runs.locked import LockedFolder

CODE = ("arkv/", "bench/costs/", "bench/methods/")
"""Source that times depend on."""


class Timings(LockedFolder):
    """What has been timed; a context manager that holds the lock of its folder, where it has one.

    Args:
        path: the folder, made if absent; None where nothing is written.
        model: name, fingerprint and precision of the model.
        settings: what all rows are timed with alike.
        fresh: forget what an earlier one left in the folder.

    Raises:
        UserError: another process writes there, or the folder holds timings of something else.
    """

    def __init__(
        self, path: Path | None, model: Mapping[str, Any], settings: Mapping[str, Any], *, fresh: bool = False
    ) -> None:
        super().__init__(path, "speed")
        self.path = path
        self.rows: list[Timing] = []
        self.failures: list[Untimed] = []
        self._fresh = fresh
        about = environment()
        terms = {**settings, "packages": about["packages"], "code": source_sha256(CODE)}
        self._record = {"command": command_line(), "finished": None, "model": dict(model), "terms": terms, **about}

    def _open(self, folder: Path) -> None:
        if self._fresh:
            for name in (SPEED, RECORD):
                (folder / name).unlink(missing_ok=True)
        if (folder / SPEED).is_file():
            if different := self._differences(folder):
                raise UserError(f"{folder} holds timings of other terms: {', '.join(different)}; {REMEDY}")
            self.rows = read_timings(folder / SPEED)
            self._write_record()

    def _differences(self, path: Path) -> list[str]:
        """What speaks against more rows in the same table."""
        if not (path / RECORD).is_file():
            return [f"{RECORD} is missing"]
        old = read_speed_record(path)
        mine = SpeedRecord.model_validate(self._record)
        pairs = {
            "model": (old.model.model_dump(), mine.model.model_dump()),
            "hardware": (old.hardware, mine.hardware),
            **{name: (old.terms.get(name), mine.terms[name]) for name in mine.terms},
        }
        return [f"another {name.replace('_', ' ')}" for name, (there, here) in pairs.items() if there != here]

    def done(self, repetition: int) -> set[tuple[Any, ...]]:
        """What a repetition has already, as :attr:`Timing.work`."""
        return {row.work for row in self.rows if row.repetition == repetition}

    def add(self, item: Timing | Untimed) -> None:
        """Take one more; it survives the process."""
        if isinstance(item, Untimed):
            self.failures.append(item)
        else:
            self.rows.append(item)
            if self.path is not None:
                write_atomic(self.path / SPEED, timings_csv(self.rows))
        if isinstance(item, Untimed) or len(self.rows) == 1:
            self._write_record()

    def finish(self, refused: str) -> None:
        """All is timed.

        Args:
            refused: why the model has no fused full cache; empty where it has.
        """
        self._record |= {"finished": now(), "refused": refused}
        self._write_record()

    def _write_record(self) -> None:
        # Without a row beside it a record would be taken for that of a run.
        if self.path is not None and self.rows:
            record = SpeedRecord.model_validate({**self._record, "failures": self.failures})
            write_atomic(self.path / RECORD, record_text(record))
