"""Everything in this process, one unit after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.errors import UserError, show_traceback
from bench.methods.grid import Cell
from bench.records.states import StatesMap
from bench.runs.executors.base import Answered, Answerer, Executor, Setup, Unit
from tasks.base import Document


class LocalExecutor(Executor):
    """A loop. Answers come one by one, so that what is stopped loses no more than one."""

    def __init__(self, setup: Setup) -> None:
        self._answerer = Answerer(setup)
        self._broken: dict[str, str] = {}
        """Why a model cannot be loaded, by its name."""

    def __enter__(self) -> LocalExecutor:
        # What the device or the weights have against it is known before anything is written.
        first, *others = self._answerer.setup.models
        if not self._loads(first) and not others:
            raise UserError(self._broken[first])
        return self

    def _loads(self, name: str) -> bool:
        if name not in self._broken:
            try:
                self._answerer.engine(name)
            except UserError as error:
                show_traceback(error)
                self._broken[name] = str(error)
        return name not in self._broken

    def __exit__(self, *_: object) -> None:
        """Nothing to put away."""

    def run(self, units: Iterable[Unit]) -> Iterator[Answered]:
        """See :meth:`Executor.run`. One of several models that cannot be loaded fails alone."""
        for unit in units:
            if self._loads(unit.model):
                yield from self._answerer.answer(unit)
            else:
                yield from unit.failures(self._broken[unit.model])

    def status(self) -> str:
        return ""

    def map_states(self, name: str, document: Document, cells: Sequence[Cell]) -> dict[str, StatesMap]:
        return self._answerer.map_states(name, document, cells) if self._loads(name) else {}

    def loaded(self) -> dict[str, dict[str, str]]:
        return self._answerer.loaded

    def record(self) -> dict[str, Any]:
        return {"name": "local"}
