"""Documents that wait for the answers of cells, and what becomes of a cell that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from arkv import ConfigError
from bench.engine.measurement import Failure
from bench.errors import OthersCode, UserError, said_in_one_line, show_traceback
from bench.methods.cell import Cell
from tasks.base import Document, TaskError

_T = TypeVar("_T")

FAILURES = (ConfigError, UserError, TaskError)
"""What a cell may meet in a document, once :func:`in_a_line` has seen it."""


def in_a_line() -> OthersCode:
    """Under this, whatever a model or a method raises is one of :data:`FAILURES`: with its kind, what it said and
    where. No error is ours for certain: a model whose forward takes other arguments fails in the line that calls it."""
    return OthersCode("", ConfigError, placed=True)


@dataclass(eq=False)
class Job:
    """A document and the cells that are to answer it."""

    document: Document
    cells: Sequence[Cell]
    answered: set[str] = field(default_factory=set)
    """Keys of cells."""
    failed: dict[str, Failure] = field(default_factory=dict)
    """By the key of the cell."""
    together: set[str] = field(default_factory=set)
    """Keys of cells that have failed in what several documents share: another one may be the cause."""

    def request(self, kind: type[_T]) -> _T:
        """The document's request, which is of this kind."""
        request = self.document.request
        assert isinstance(request, kind)
        return request

    def waits_for(self, cell: Cell) -> bool:
        """The cell is asked for, and has neither answered nor failed."""
        return cell in self.cells and cell.key not in self.answered and cell.key not in self.failed


def cells_of(jobs: Iterable[Job]) -> list[Cell]:
    """The cells of all jobs, each once."""
    return list({cell.key: cell for job in jobs for cell in job.cells}.values())


def waiting_cells(jobs: Sequence[Job]) -> list[Cell]:
    """The cells that one of the jobs waits for, each once."""
    return [cell for cell in cells_of(jobs) if any(job.waits_for(cell) for job in jobs)]


@contextlib.contextmanager
def noting(jobs: Sequence[Job], cells: Sequence[Cell]) -> Iterator[None]:
    """Note in ``jobs`` that ``cells`` could not do what is under this, as far as they have not done it."""
    try:
        with in_a_line():
            yield
    except FAILURES as error:
        show_traceback(error)
        for job in jobs:
            for cell in filter(job.waits_for, cells):
                job.failed[cell.key] = Failure(cell=cell, error=said_in_one_line(error))
                if len(set(jobs)) > 1:
                    job.together.add(cell.key)
