"""Progress with time left: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_INTERVAL_S = 30.0
MB = 10**6


def stderr() -> Console:
    """Where progress is written, so that what a command prints stays apart."""
    return Console(stderr=True)


def say(line: str) -> None:
    """A line on stderr, as it is."""
    stderr().print(line, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def progress_bars(console: Console) -> Progress:
    """What bars are drawn in, one below the other; a context manager."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class ProgressReporter:
    """Counts steps of known number; a context manager.

    Args:
        console: where to write; a bar is drawn only on a terminal.
        label: what is counted, such as the task's name.
        total: number of steps.
        unit: what a step is.
        done: steps that an earlier run had done; they do not count for the time left.
        bars: where several reporters draw theirs; None for one of its own.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        total: int,
        done: int = 0,
        unit: str = "answers",
        bars: Progress | None = None,
    ) -> None:
        self.console, self.label, self.total, self.unit = console, label, total, unit
        self.done, self.skipped = done, done
        self.failed = 0
        self._owns = bars is None
        self._bars = progress_bars(console) if bars is None else bars
        self._start = self._last = time.monotonic()

    def __enter__(self) -> ProgressReporter:
        if self._owns:
            self._bars.start()
        self._task = self._bars.add_task(self.label, total=self.total, completed=self.done, note="")
        return self

    def advance(self, note: str = "", *, failed: bool = False, steps: int = 1) -> None:
        """One more step is done, or has failed, or several are; ``note`` says what it gave or how it goes."""
        first = self.done == self.skipped
        self.done += steps
        self.failed += failed
        if self.failed:
            note = f"{self.failed} failed" + (f"; {note}" if note else "")
        if self.console.is_terminal:
            self._bars.update(self._task, completed=self.done, note=note)
            return
        current = time.monotonic()
        if first or self.done == self.total or current - self._last >= LOG_INTERVAL_S:
            self._last = current
            elapsed = current - self._start
            left = elapsed / (self.done - self.skipped) * (self.total - self.done)
            self.console.print(
                f"{self.label}: {self.done}/{self.total} {self.unit}, {duration(elapsed)} elapsed, "
                f"{duration(left)} left{'; ' + note if note else ''}",
                markup=False,
                highlight=False,
            )

    def advance_to(self, done: float) -> None:
        """As many steps as it takes until ``done`` of them are done, a begun one too; not more than there are."""
        if (steps := math.ceil(min(done, self.total)) - self.done) > 0:
            self.advance(steps=steps)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.remove_task(self._task)
        if self._owns:
            self._bars.stop()
