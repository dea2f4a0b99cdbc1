"""Progress with time left: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_INTERVAL_S = 30.0


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressReporter:
    """Counts steps of known number; a context manager.

    Args:
        console: where to write; a bar is drawn only on a terminal.
        label: what is counted, such as the task's name.
        total: number of steps.
        unit: what a step is.
        done: steps that an earlier run had done; they do not count for the time left.
    """

    def __init__(self, console: Console, label: str, total: int, done: int = 0, unit: str = "answers") -> None:
        self.console, self.label, self.total, self.unit = console, label, total, unit
        self.done, self.skipped = done, done
        self._bar: Progress | None = None
        self._start = self._last = time.monotonic()

    def __enter__(self) -> ProgressReporter:
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, note="")
        return self

    def advance(self, note: str = "") -> None:
        """One more step is done; ``note`` says what it gave."""
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
            return
        current = time.monotonic()
        if self.done == self.skipped + 1 or self.done == self.total or current - self._last >= LOG_INTERVAL_S:
            self._last = current
            elapsed = current - self._start
            left = elapsed / (self.done - self.skipped) * (self.total - self.done)
            self.console.print(
                f"{self.label}: {self.done}/{self.total} {self.unit}, {duration(elapsed)} elapsed, "
                f"{duration(left)} left{'; ' + note if note else ''}",
                markup=False,
                highlight=False,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
