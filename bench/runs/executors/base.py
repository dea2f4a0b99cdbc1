"""What every executor shares: units of work, and the one way to answer them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

from rich.console import Console

from bench.engine.decoding import about
from bench.engine.engine import AUTO_DOCUMENTS, Engine, Failure, Measurement
from bench.engine.inspect import map_states
from bench.engine.shared import by_context
from bench.errors import OthersCode, UserError, show_traceback
from bench.methods.grid import Cell
from bench.models.loading import DescribedModel, LoadedModel, load
from bench.records.states import StatesMap
from bench.settings.run import RunConfig
from tasks.base import Compare, Document, Generate, LogLikelihood

Work = tuple[Document, tuple[Cell, ...]]
"""A document, and the cells that are to answer it."""

Watch = Callable[["Unit", str], None]
"""Told what is being done with a unit before its next answer comes, in a few words."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Documents of one task for one model, with what is to answer each: what a worker does in one go."""

    model: str
    task: str
    work: tuple[Work, ...]

    @property
    def cost(self) -> int:
        """A rough measure of the time that it takes, to begin with what takes longest."""
        return round(sum(len(cells) * cost_of(document, cells) for document, cells in self.work))

    def split(self) -> list[Unit]:
        """A unit for each document."""
        return [dataclasses.replace(self, work=(item,)) for item in self.work]

    def failures(self, error: str) -> Iterator[Answered]:
        """The same failure for everything that was to be answered."""
        for document, cells in self.work:
            yield from (Answered(self, document, Failure(cell=cell, error=error)) for cell in cells)


def batches(work: Sequence[Work], size: int) -> Iterator[list[Work]]:
    """Work in batches of so many documents. Those that ask about one context come together, in one batch as far as
    :data:`~bench.engine.engine.AUTO_DOCUMENTS` goes: they share its prefill."""
    batch: list[Work] = []
    for places in by_context([document for document, _ in work]):
        for start in range(0, len(places), AUTO_DOCUMENTS):
            same = [work[place] for place in places[start : start + AUTO_DOCUMENTS]]
            if batch and len(batch) + len(same) > size:
                yield batch
                batch = []
            batch += same
    if batch:
        yield batch


def cost_of(document: Document, cells: Sequence[Cell]) -> float:
    """A rough measure of the time that one of ``cells`` takes for a document, with its part of the prefill: tokens."""
    return document.request.prompt_tokens / max(len(cells), 1) + _read_tokens(document)


def _read_tokens(document: Document) -> int:
    """Tokens that every cell reads or writes behind the prompt, at most."""
    request = document.request
    if isinstance(request, Generate):
        return len(request.question_ids) + (1 + len(request.turns)) * request.max_new_tokens
    if isinstance(request, Compare):
        return len(request.continuation_ids)
    if isinstance(request, LogLikelihood):
        return sum(len(item.token_ids) for item in request.continuations)
    return request.prompt_tokens


class Answered(NamedTuple):
    """What one cell made of one document of a unit."""

    unit: Unit
    document: Document
    result: Measurement | Failure


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that answers units, in any process on any machine."""

    models: Mapping[str, str]
    """References by name, as any working directory has them."""
    cells: tuple[Cell, ...]
    dtype: str
    device: str
    trust_remote_code: bool
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = 1
    prefill_chunk: int | None = None
    loaded: Mapping[str, LoadedModel] = field(default_factory=dict)
    """Models that are there already, by name."""

    @classmethod
    def of(cls, config: RunConfig, models: Mapping[str, DescribedModel], cells: Sequence[Cell]) -> Setup:
        return cls(
            models={name: model.reference for name, model in models.items()},
            cells=tuple(cells),
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            model_kwargs=config.loading_kwargs,
            batch_size=config.documents_at_once,
            prefill_chunk=config.prefill_chunk,
            loaded={name: model for name, model in models.items() if isinstance(model, LoadedModel)},
        )


class Answerer:
    """Answers units one after the other; holds the model of the newest one."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._engine: Engine | None = None
        self._model: LoadedModel | None = None
        self._name = ""
        self._problems: dict[str, str] = {}
        self.loaded: dict[str, dict[str, str]] = {}
        """Device, dtype and warm-up of every model that was loaded, by name; and why documents are answered one by one,
        where more were to stand side by side."""

    def engine(self, name: str) -> Engine:
        """The engine of a model, loaded and warm. Raises :class:`UserError`."""
        if self._engine is None or self._name != name:
            # Two models need not fit on the device.
            self._engine = self._model = None
            setup = self.setup
            with OthersCode(name, placed=True):
                loaded = setup.loaded.get(name) or load(
                    setup.models[name],
                    dtype=setup.dtype,
                    device=setup.device,
                    trust_remote_code=setup.trust_remote_code,
                    model_kwargs=setup.model_kwargs,
                )
                if said := about(loaded.model):
                    Console(stderr=True).print(f"{name}: {said}", markup=False, highlight=False, soft_wrap=True)
                self.loaded[name] = {"dtype": loaded.dtype, "device": loaded.device}
                engine = Engine(
                    loaded.model,
                    loaded.tokenizer,
                    setup.cells,
                    batch_size=setup.batch_size,
                    prefill_chunk=setup.prefill_chunk,
                )
                self.loaded[name]["warm_up"] = engine.warm_up()
                if engine.one_by_one is not None:
                    self.loaded[name]["one_by_one"] = engine.one_by_one
                    said = f"{name}: documents are answered one by one: {engine.one_by_one}"
                    Console(stderr=True).print(said, markup=False, highlight=False, soft_wrap=True)
            self._engine, self._model, self._name = engine, loaded, name
        return self._engine

    def map_states(self, name: str, document: Document, cells: Sequence[Cell]) -> dict[str, StatesMap]:
        """See :func:`bench.engine.inspect.map_states`. Raises :class:`UserError`."""
        self.engine(name)
        assert self._model is not None
        return map_states(self._model, document, cells, self.setup.prefill_chunk)

    def problem(self, name: str) -> str | None:
        """Why a model cannot be loaded, None where it can; what has failed once is not tried again.

        Raises:
            UserError: it is the only model.
        """
        if name not in self._problems:
            try:
                self.engine(name)
            except UserError as error:
                if len(self.setup.models) == 1:
                    raise
                show_traceback(error)
                self._problems[name] = str(error)
        return self._problems.get(name)

    def answer(self, unit: Unit, watch: Watch | None = None) -> Iterator[Answered]:
        """Every cell's answer, as it comes. One of several models that cannot be loaded fails alone.

        Raises:
            UserError: the only model cannot be loaded.
        """
        if (problem := self.problem(unit.model)) is not None:
            yield from unit.failures(problem)
            return
        engine = self.engine(unit.model)
        if watch is not None:
            engine.watch = partial(watch, unit)
        for document, result in engine.answer_batch(unit.work):
            yield Answered(unit, document, result)


class Executor(AbstractContextManager["Executor"], Protocol):
    """Has units answered; a context manager."""

    def run(self, units: Iterable[Unit], watch: Watch) -> Iterator[Answered]:
        """Everything that the units ask for, each answer once, in any order.

        ``units`` is read as far as there is something to do them with. ``watch`` is told what is done on the way, where
        that is known.
        """

    def status(self) -> str:
        """How it goes, for a line of progress; may be empty."""

    def map_states(self, name: str, document: Document, cells: Sequence[Cell]) -> Mapping[str, StatesMap]:
        """What a model's tri-state cells make of a document's prompt, by key. Raises :class:`UserError`."""

    def loaded(self) -> Mapping[str, Mapping[str, str]]:
        """What :attr:`Answerer.loaded` says of the models that have been loaded so far, by name."""

    def record(self) -> dict[str, Any]:
        """What took part, for the run's record."""
