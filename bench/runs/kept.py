"""What a run's folder keeps of earlier starts: cells, documents and whole tasks that are not asked for now.

A table is made of everything that the folder holds of its task: a method that is added stands beside those that were
there, and documents that were asked for earlier, with other ``--lengths`` or another ``--limit``, count like those of
now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import UserError
from bench.methods.grid import Cell
from bench.names import CURVE, RESULTS
from bench.records.curve import CURVE_COLUMNS, CurveRow
from bench.records.files.csv_ import read_models
from bench.records.row import NEEDED, Row
from bench.records.sample import Measured
from bench.runs.documents import prompt_hash
from bench.runs.folder import RunFolder
from bench.settings.run import RunConfig
from tasks.base import Document, Task, TaskError

REMEDY = "remove the file to do without what it holds of tasks that are not asked for now"
ASKED = ("lengths", "limit", "sampling_ratio", "skip_cut", "repeats")
"""Settings that choose documents and change none."""


@dataclass(frozen=True)
class StoredCell:
    """A cell that only the folder's samples tell of, as far as results need it."""

    key: str
    label: str
    method: str
    quant_format: str | None
    budget_unit: str | None
    cache_size: int | None
    cache_ratio: float | None
    window_size: int | None


AnyCell = Cell | StoredCell


def all_cells(asked: Sequence[Cell], labels: Mapping[str, str], samples: Iterable[Measured]) -> list[AnyCell]:
    """The cells that are asked for and those of earlier starts, in the order of ``labels``, which has all of them."""
    known: dict[str, AnyCell] = {cell.key: cell for cell in asked}
    for sample in samples:
        if sample.cell not in known:
            known[sample.cell] = StoredCell(
                key=sample.cell,
                label=labels.get(sample.cell, sample.cell),
                method=sample.method,
                quant_format=sample.quant_format,
                budget_unit=sample.budget_unit,
                cache_size=sample.cache_size,
                cache_ratio=sample.cache_ratio,
                window_size=sample.window_size,
            )
    return [known[key] for key in dict.fromkeys((*labels, *known)) if key in known]


def choice_of(config: RunConfig) -> dict[str, Any]:
    """Which documents a start asks for, as the record keeps it."""
    given = {name: getattr(config, name) for name in ASKED}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def earlier_documents(
    now: Sequence[Document],
    stored: Mapping[str, str],
    choices: Sequence[Mapping[str, Any]],
    config: RunConfig,
    load: Callable[[RunConfig], Sequence[Document]],
) -> tuple[list[Document], str]:
    """The documents of earlier starts that the folder has answers to and that are not asked for now, and why some of
    them cannot be made again, empty where all can.

    Args:
        now: the documents that are.
        stored: the newest prompt's hash of each document that has an answer.
        choices: what earlier starts asked for, see :func:`choice_of`.
        load: the task's documents under other settings.
    """
    asked = {document.id for document in now}
    missing = {name: sha256 for name, sha256 in stored.items() if name not in asked}
    found: list[Document] = []
    reason = "their prompts have changed"
    for choice in reversed(choices):
        if not missing:
            break
        values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in choice.items()}
        try:
            documents = load(config.model_copy(update=values))
        except (TaskError, UserError) as error:
            reason = str(error)
            continue
        for document in documents:
            if missing.get(document.id) == prompt_hash(document):
                found.append(document)
                del missing[document.id]
    return found, f"{len(missing)} documents of earlier starts are not in its results: {reason}" if missing else ""


def kept_rows(folder: Path) -> list[Row]:
    """The rows that a folder holds; none where no task has ended. Raises :class:`UserError` for a damaged file."""
    file = folder / RESULTS
    return read_models(file, Row, NEEDED, REMEDY) if file.is_file() else []


def kept_curve(folder: Path) -> list[CurveRow]:
    """The rows of its curve, likewise."""
    file = folder / CURVE
    return read_models(file, CurveRow, CURVE_COLUMNS, REMEDY) if file.is_file() else []


def samples_of(
    model: str, task: Task, documents: Sequence[Document], cells: Sequence[AnyCell], folder: RunFolder
) -> dict[str, dict[str, Measured]]:
    """The folder's samples of the documents as they are asked now, by cell key and document id."""
    found: dict[str, dict[str, Measured]] = {cell.key: {} for cell in cells}
    for document in documents:
        sha256 = prompt_hash(document)
        for key, mine in found.items():
            sample = folder.samples.get((model, task.name, document.id, sha256, key))
            if sample is not None:
                mine[document.id] = sample
    return found
