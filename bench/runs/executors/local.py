"""Everything in this process, one unit after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.errors import UserError
from bench.methods.grid import Cell
from bench.records.states import StatesMap
from bench.runs.executors.base import Answered, Answerer, Executor, Setup, Unit
from tasks.base import Document


class LocalExecutor(Executor):
    """A loop. Answers come one by one, so that what is stopped loses no more than one."""

    def __init__(self, setup: Setup) -> None:
        self._answerer = Answerer(setup)

    def __enter__(self) -> LocalExecutor:
        # What the device or the weights have against it is known before anything is written.
        self._answerer.engine(next(iter(self._answerer.setup.models)))
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put away."""

    def run(self, units: Iterable[Unit]) -> Iterator[Answered]:
        """See :meth:`Executor.run`. A further model that cannot be loaded fails alone."""
        broken: dict[str, str] = {}
        for unit in units:
            if unit.model not in broken:
                try:
                    self._answerer.engine(unit.model)
                except UserError as error:
                    broken[unit.model] = str(error)
            if unit.model in broken:
                yield from unit.failures(broken[unit.model])
            else:
                yield from self._answerer.answer(unit)

    def status(self) -> str:
        return ""

    def map_states(self, name: str, document: Document, cells: Sequence[Cell]) -> dict[str, StatesMap]:
        return self._answerer.map_states(name, document, cells)

    def loaded(self) -> dict[str, dict[str, str]]:
        return self._answerer.loaded

    def record(self) -> dict[str, Any]:
        return {"name": "local"}
