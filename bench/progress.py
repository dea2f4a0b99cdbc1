"""Progress with time left: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class Ending:
    """When something of several parts will have ended. Parts that have not begun count like those that have."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._begun = 0

    def begin(self) -> None:
        """One more part begins."""
        self._start = time.monotonic() if self._start is None else self._start
        self._begun += 1

    def said(self, left_s: float | None, waiting: int) -> str:
        """The time of day, in words; nothing where it cannot be told yet.

        Args:
            left_s: seconds that the parts under way still take; None where that is unknown.
            waiting: parts that have not begun.
        """
        if left_s is None or self._start is None:
            return ""
        each = (time.monotonic() - self._start + left_s) / self._begun
        moment = time.localtime(time.time() + left_s + waiting * each)
        others = f", with {waiting} more task{'s' * (waiting > 1)} like it" if waiting else ""
        return f"all ends about {time.strftime('%a %H:%M', moment)}{others}"


class ProgressReporter:
    """Counts steps of known number; a context manager.

    Args:
        console: where to write; a bar is drawn only on a terminal.
        label: what is counted, such as the task's name.
        total: number of steps.
        unit: what a step is.
        done: steps that an earlier run had done; they do not count for the time left.
        cost: what the steps that are left take together, in any unit, where some take longer than others; None where
            all are alike.
        bars: where several reporters draw theirs; None for one of its own.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        total: int,
        done: int = 0,
        unit: str = "answers",
        cost: float | None = None,
        bars: Progress | None = None,
    ) -> None:
        self.console, self.label, self.total, self.unit = console, label, total, unit
        self.done = done
        self.failed = 0
        self._cost, self._spent = float(total - done) if cost is None else cost, 0.0
        self._owns = bars is None
        self._bars = progress_bars(console) if bars is None else bars
        self._start = self._last = time.monotonic()

    def __enter__(self) -> ProgressReporter:
        if self._owns:
            self._bars.start()
        self._task = self._bars.add_task(self.label, total=self.total, completed=self.done, left="", note="")
        return self

    @property
    def left_s(self) -> float | None:
        """Seconds until everything is done, as far as the steps so far tell; None before the first."""
        if not self._spent:
            return None
        return (time.monotonic() - self._start) / self._spent * max(self._cost - self._spent, 0.0)

    def advance(self, note: str = "", *, failed: bool = False, steps: int = 1, cost: float | None = None) -> None:
        """One more step is done, or has failed, or several are; ``note`` says what it gave or how it goes, and ``cost``
        its part of what all take."""
        first = not self._spent
        self.done += steps
        self.failed += failed
        self._spent += steps if cost is None else cost
        self._show(note, now=first or self.done == self.total)

    def tell(self, doing: str) -> None:
        """What is being done on the way to the next step; any number of times."""
        self._show(doing, now=False)

    def _show(self, note: str, *, now: bool) -> None:
        """On a terminal at once; in a log ``now``, or if nothing was written for a while."""
        if self.failed:
            note = f"{self.failed} failed" + (f"; {note}" if note else "")
        left = self.left_s
        said = "" if left is None else f"{duration(left)} left"
        if self.console.is_terminal:
            self._bars.update(self._task, completed=self.done, left=said, note=note)
            return
        current = time.monotonic()
        if now or current - self._last >= LOG_INTERVAL_S:
            self._last = current
            parts = [f"{self.done}/{self.total} {self.unit}", f"{duration(current - self._start)} elapsed", said]
            self.console.print(
                f"{self.label}: {', '.join(filter(None, parts))}{'; ' + note if note else ''}",
                markup=False,
                highlight=False,
                soft_wrap=True,
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
