"""Progress: lines now and then in a log, with the time that is left."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from bench import progress
from bench.progress import LOG_INTERVAL_S, Ending, ProgressReporter


class Clock:
    """Stands in for the clock of the machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(progress.time, "time", lambda: self.now)
        monkeypatch.setattr(progress.time, "localtime", time.gmtime)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def reporter(total: int = 4, cost: float | None = None, *, terminal: bool = False) -> ProgressReporter:
    return ProgressReporter(Console(file=io.StringIO(), force_terminal=terminal, width=200), "t", total, cost=cost)


def written(reporting: ProgressReporter) -> str:
    assert isinstance(reporting.console.file, io.StringIO)
    return reporting.console.file.getvalue()


def test_a_log_says_now_and_then_what_is_done_before_the_first_answer(clock: Clock) -> None:
    with reporter() as reporting:
        for token in range(100):
            clock.now += LOG_INTERVAL_S / 25
            reporting.tell(f"mix: {token} tokens of 6 answers")
    lines = written(reporting).splitlines()
    assert lines == [
        f"t: 0/4 answers, {elapsed} elapsed; mix: {token} tokens of 6 answers"
        for elapsed, token in (("0:30", 24), ("1:00", 49), ("1:30", 74), ("2:00", 99))
    ]


def test_a_terminal_shows_it_at_once(clock: Clock) -> None:
    with reporter(terminal=True) as reporting:
        reporting.tell("mix: 1 token of 6 answers")
        reporting._bars.refresh()
        assert "mix: 1 token of 6 answers" in written(reporting)


def test_the_time_left_goes_by_what_steps_cost(clock: Clock) -> None:
    with reporter(total=3, cost=10.0) as reporting:
        assert reporting.left_s is None
        clock.now += 8
        reporting.advance(cost=2.0)
        assert reporting.left_s == pytest.approx(32)
        clock.now += 8
        reporting.advance(cost=2.0, failed=True)
        assert reporting.left_s == pytest.approx(24)
        clock.now += 24
        reporting.advance(cost=6.0)
    assert written(reporting).splitlines() == [
        "t: 1/3 answers, 0:08 elapsed, 0:32 left",
        "t: 3/3 answers, 0:40 elapsed, 0:00 left; 1 failed",
    ]


def test_when_all_ends(clock: Clock) -> None:
    ending = Ending()
    assert ending.said(5.0, 1) == ""
    clock.now = 36_000.0
    ending.begin()
    clock.now += 1800
    assert ending.said(None, 1) == ""
    assert ending.said(1800.0, 0) == "all ends about Thu 11:00"
    # Each of the two others takes the hour that this one takes.
    assert ending.said(1800.0, 2) == "all ends about Thu 13:00, with 2 more tasks like it"
    clock.now += 1800
    ending.begin()
    clock.now += 1800
    # Two parts took 1:30 and need 1:30 more: 1:30 each.
    assert ending.said(5400.0, 1) == "all ends about Thu 14:30, with 1 more task like it"
