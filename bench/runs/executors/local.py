"""Everything in this process, one unit after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.methods.grid import Cell
from bench.records.states import StatesMap
from bench.runs.executors.base import Answered, Answerer, Executor, Setup, Unit, Watch
from tasks.base import Document


class LocalExecutor(Executor):
    """A loop. Answers come one by one, so that what is stopped loses no more than one.

    Args:
        at_once: load the first model when the executor is entered, so that what the device or the weights have against
            it is known before anything is written; else with the first unit, of which there may be none.
    """

    def __init__(self, setup: Setup, *, at_once: bool = True) -> None:
        self._answerer = Answerer(setup)
        self._at_once = at_once

    def __enter__(self) -> LocalExecutor:
        if self._at_once:
            self._answerer.problem(next(iter(self._answerer.setup.models)))
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put away."""

    def run(self, units: Iterable[Unit], watch: Watch) -> Iterator[Answered]:
        """See :meth:`Executor.run`."""
        for unit in units:
            yield from self._answerer.answer(unit, watch)

    def status(self) -> str:
        return ""

    def map_states(self, name: str, document: Document, cells: Sequence[Cell]) -> dict[str, StatesMap]:
        return self._answerer.map_states(name, document, cells) if self._answerer.problem(name) is None else {}

    def loaded(self) -> dict[str, dict[str, str]]:
        return self._answerer.loaded

    def record(self) -> dict[str, Any]:
        return {"name": "local"}
