"""A run: every document of every task through every cell of the grid, into a run folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from bench.engine.engine import AUTO_DOCUMENTS, Failure, Measurement
from bench.engine.inspect import cells_to_map
from bench.errors import UserError, show_traceback
from bench.methods.grid import Cell
from bench.models.kernels import prepare_kernels
from bench.models.loading import DescribedModel, LoadedModel, find_device
from bench.names import SAMPLES
from bench.progress import Ending, ProgressReporter, progress_bars
from bench.records.curve import CurveRow
from bench.records.row import Row
from bench.records.starts import terms
from bench.records.states import MapRecord, write_maps
from bench.runs import folder as records
from bench.runs.asked import asked_for, documents_of, doubts, models_of, plugins_of, tasks_of
from bench.runs.documents import prompt_hash
from bench.runs.executors import Answered, Executor, Unit, make_executor
from bench.runs.executors.base import batches, cost_of
from bench.runs.failures import failure_lines, without_name
from bench.runs.kept import all_cells, earlier_documents
from bench.runs.kinds import RUN, claim
from bench.runs.order import turned
from bench.runs.predictions import clear_predictions
from bench.runs.prompts import token_texts
from bench.runs.repeats import not_sampled, questions
from bench.runs.results import to_sample
from bench.runs.starts import ENVIRONMENT, VERSIONS, earlier_starts, loaded_as, loaded_before, made_by, new_start
from bench.runs.tables import Tables
from bench.runs.task_run import TaskRun
from bench.settings.run import RunConfig
from tasks.base import Document, Generated, Task, TaskError, TaskGroup


@dataclass
class Outcome:
    """What a run did: rows of the table, and what failed with its reason."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    curve: list[CurveRow] = field(default_factory=list)
    """Divergence over the position, of tasks that compare distributions."""
    failures: list[dict[str, str]] = field(default_factory=list)
    """``model``, ``task`` and ``error``; ``cell`` and ``document`` where one cell failed in one document, or ``cell``
    alone where its answers could not be evaluated; no ``model`` where the task is unknown. Of a plugin, ``plugin`` and
    ``error``."""
    measured: int = 0
    """Samples measured now, as opposed to found in the folder."""


def fingerprint(config: RunConfig, models: dict[str, str], plugins: Mapping[str, str]) -> dict[str, Any]:
    """Everything that changes an answer and is not part of a sample's key.

    A folder may grow by documents, tasks and cells; it must not mix models, data, precision or versions.
    """
    packages = records.environment()["packages"]
    return {
        "models": models,
        "versions": {name: packages.get(name) for name in VERSIONS},
        **config.fingerprint(),
        records.PLUGINS: dict(plugins),
    }


def execute(
    config: RunConfig,
    path: Path,
    console: Console,
    *,
    fresh: bool = False,
    origin: dict[str, str] | None = None,
    own_tasks: Sequence[Task | TaskGroup] = (),
    own_models: Sequence[LoadedModel] = (),
) -> Outcome:
    """Do the run, or what is left of it, and write its folder.

    Args:
        config: settings.
        path: the run folder.
        console: where progress goes.
        fresh: forget what an earlier run left in the folder.
        origin: where each setting came from, for the record.
        own_tasks: tasks given as objects, which ``config`` names.
        own_models: models given as objects, which ``config`` names.

    Raises:
        UserError, arkv.ConfigError, TaskError: what was asked for makes no sense; nothing has been measured.
    """
    claim(path, RUN)
    plugins, others = plugins_of(config, own_tasks)
    cells, asked, failures = asked_for(config, plugins, others)
    tasks = tasks_of(asked)
    outcome = Outcome(path, failures=failures)
    for line in failure_lines(outcome.failures):
        console.print(f"[red]{escape(line)}[/red]", highlight=False)
    if config.executor == "local":
        prepare_kernels(find_device(config.device))  # before the record says whether they are there
    started = records.now()
    models, unread = models_of(config, own_models, console)
    outcome.failures += [{"task": task.name, **failure} for failure in unread for task, _ in tasks]
    fingerprints = {name: model.fingerprint for name, model in models.items()}
    samples = path / SAMPLES
    continues = not fresh and samples.is_file() and samples.stat().st_size > 0
    with (
        make_executor(config, models, cells, console, continues=continues) as executor,
        records.RunFolder(
            path, fingerprint(config, fingerprints, plugins.hashes) | made_by(models, cells), fresh=fresh
        ) as folder,
        progress_bars(console) as bars,
    ):
        if fresh:
            clear_predictions(path)
        run = _Run(config, models, asked, tasks, cells, outcome, folder, executor, console, bars, started, origin or {})
        for answered in executor.run(run.units(), run.watch):
            run.take(answered)
        run.close()
    return outcome


class _Run:
    """The driver's side of a run: gives out units of work, takes in answers, and alone writes the folder.

    Several tasks can be under way at once, since an executor reads units ahead.
    """

    def __init__(
        self,
        config: RunConfig,
        models: Mapping[str, DescribedModel],
        asked: Sequence[Task | TaskGroup],
        tasks: Sequence[tuple[Task, str | None]],
        cells: Sequence[Cell],
        outcome: Outcome,
        folder: records.RunFolder,
        executor: Executor,
        console: Console,
        bars: Progress,
        started: str,
        origin: Mapping[str, str],
    ) -> None:
        self.config, self.models, self.tasks, self.cells = config, models, tasks, cells
        self.folder, self.executor, self.console, self.bars = folder, executor, console, bars
        self.outcome = outcome
        self._under_way: dict[tuple[str, str], TaskRun] = {}
        self._ending = Ending()
        self._claim_loaded()
        start = new_start(config, started)
        begun: Mapping[str, Any] = folder.previous or {}
        self._starts = [*(earlier_starts(begun) if begun else ()), start]
        """This one is the last."""
        self._terms = [terms(item) for item in self._starts]
        labels = {**begun.get("cells", {}), **{cell.key: cell.label for cell in cells}}
        self._all_cells = all_cells(cells, labels, folder.samples.values())
        """Those of earlier starts too."""
        self._stored: dict[tuple[str, str], dict[str, str]] = {}
        """By model and task: the newest prompt's hash of each document that earlier starts have answered."""
        for sample in folder.samples.values():
            self._stored.setdefault((sample.model, sample.task), {})[sample.document] = sample.prompt_sha256
        measured = [task for task, _ in tasks]
        self._tables = Tables(models, asked, measured, self._all_cells, folder, self._terms, self._note)
        first, *again = self._starts
        self._record = {
            "started": first["started"],
            "finished": None,
            "command": first["command"],
            "continued": [{name: item[name] for name in ("started", "command")} for item in again],
            "starts": self._starts,
            "settings": config.to_json(),
            "origin": dict(origin),
            "cells": labels,
            "models": {
                name: {
                    "source": model.source,
                    "fingerprint": model.fingerprint,
                    "context_length": model.context_length,
                    **loaded_before(name, folder.previous),
                }
                for name, model in models.items()
            },
            "tasks": dict(begun.get("tasks", {})),
            "failures": self.outcome.failures,
            **{name: start[name] for name in ENVIRONMENT},
        }
        self._write_record()

    def _claim_loaded(self) -> None:
        """Raises :class:`UserError` where a model has been loaded in another precision, or on another kind of device,
        than the folder's answers are of."""
        for name, facts in self.executor.loaded().items():
            self.folder.claim(records.LOADED, name, loaded_as(facts), "in another precision or on another device")

    def _write_record(self, **more: Any) -> None:
        for name, facts in self.executor.loaded().items():
            self._record["models"][name].update(facts)
        self.folder.write_record({**self._record, "executor": self.executor.record(), **more})

    def units(self) -> Iterator[Unit]:
        """Everything that is not answered yet, task by task; a task's documents are made when they are needed."""
        for name in self.models:
            for task, part_of in self.tasks:
                try:
                    yield from self._begin(name, task, part_of)
                except (TaskError, UserError) as error:
                    self._fail(name, task, error)

    def _begin(self, name: str, task: Task, part_of: str | None) -> Iterator[Unit]:
        folder = self.folder
        documents = documents_of(self.config, self.models[name], task, self.cells)
        folder.claim(records.DATA, task.name, task.data_hash(), "over other data")
        folder.claim(records.DEFINITIONS, task.name, task.definition_hash(), "by another definition of the task")
        self._record["tasks"][task.name] = {
            "documents": questions(documents),
            "truncated": sum(document.truncated for document in documents),
            "data_sha256": task.data_hash() or None,
            "higher_is_better": task.metrics[0].higher_is_better if task.metrics else None,
        }
        self._write_record()
        choices = [item["choice"] for item in self._starts[:-1] if "choice" in item]
        stored = self._stored.get((name, task.name), {})
        earlier, missing = earlier_documents(
            documents,
            stored,
            choices,
            self.config,
            lambda config: documents_of(config, self.models[name], task, self.cells),
        )
        asked = self.config.question
        as_it_is = ""
        if asked != "before" and not task.has_parts and self._record["origin"].get("question", "default") != "default":
            as_it_is = f"--question {asked}: the task tells no question from its context, and is asked as it is"
        kept = f"{len(earlier)} documents of earlier starts stay in its results" if earlier else ""
        for said in filter(None, (*task.notes, as_it_is, not_sampled(self.config, documents), kept, missing)):
            self.console.print(f"{task.name}: {said}", markup=False, highlight=False, soft_wrap=True)
        methods = [cell.method for cell in self._all_cells]
        if doubt := doubts(self.config, task, questions([*documents, *earlier]), methods):
            self.console.print(f"{task.name}: {doubt}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        work = []
        for place, document in enumerate(documents):
            sha256 = prompt_hash(document)
            order = turned(self.cells, place, self.config.documents_at_once)
            left = [cell for cell in order if (name, task.name, document.id, sha256, cell.key) not in folder.samples]
            if left:
                work.append((document, tuple(left)))
        total = len(documents) * len(self.cells)
        answers_left = sum(len(cells) for _, cells in work)
        if done := total - answers_left:
            found = f"{task.name}: {done} of {total} answers are in {folder.path} already"
            self.console.print(found, markup=False, highlight=False, soft_wrap=True)
        costs = {document.id: cost_of(document, left) for document, left in work}
        cost = sum(len(left) * costs[document.id] for document, left in work)
        progress = ProgressReporter(self.console, f"{name} {task.name}", total, done, cost=cost, bars=self.bars)
        under_way = TaskRun(name, task, part_of, documents, earlier, answers_left, costs, progress)
        if not work:
            self._finish(under_way)
            return
        self._under_way[name, task.name] = under_way
        self._ending.begin()
        progress.__enter__()
        for together in batches(work, self.config.documents_at_once or AUTO_DOCUMENTS):
            if (name, task.name) not in self._under_way:
                return
            yield Unit(model=name, task=task.name, work=tuple(together))

    def take(self, answered: Answered) -> None:
        """Write down an answer; with the last one of a task, its rows."""
        unit, document, result = answered
        under_way = self._under_way.get((unit.model, unit.task))
        if under_way is None:
            # The task has failed while this was on its way.
            return
        self._claim_loaded()
        try:
            self._keep_prompt(under_way, document)
            error = (
                result.error if isinstance(result, Failure) else self._append(unit, under_way.task, document, result)
            )
            if error is not None:
                where = {"model": unit.model, "task": unit.task, "cell": result.cell.key, "document": document.id}
                under_way.failures.append({**where, "error": error})
            under_way.left -= 1
            cost = under_way.costs[document.id]
            under_way.progress.advance(self._how_it_goes(), failed=error is not None, cost=cost)
            if not under_way.left:
                self._end(under_way)
                self._finish(under_way)
        except (TaskError, UserError) as error:
            self._end(under_way)
            self._fail(unit.model, under_way.task, error)

    def watch(self, unit: Unit, doing: str) -> None:
        """Show what is being done on the way to the next answer."""
        if (under_way := self._under_way.get((unit.model, unit.task))) is not None:
            under_way.progress.tell(self._how_it_goes(doing))

    def _how_it_goes(self, doing: str = "") -> str:
        """For a line of progress: what is being done, how the executor does, and when the run will have ended."""
        left = [under_way.progress.left_s for under_way in self._under_way.values()]
        known = [seconds for seconds in left if seconds is not None]
        waiting = self._tables.open_tasks - len(left)
        ends = self._ending.said(max(known) if known else None, waiting)
        return "; ".join(filter(None, (doing, self.executor.status(), ends)))

    def _end(self, under_way: TaskRun) -> None:
        """No more answers of a task are taken."""
        if self._under_way.pop((under_way.model, under_way.task.name), None) is None:
            return
        under_way.progress.__exit__(None, None, None)
        for line in failure_lines(under_way.failures):
            self.console.print(f"[red]{escape(line)}[/red]", highlight=False)
        self.outcome.failures += under_way.failures

    def _keep_prompt(self, under_way: TaskRun, document: Document) -> None:
        if self.config.prompts:
            under_way.keep_prompt(document, self.models[under_way.model].tokenizer, self.folder)

    def _append(self, unit: Unit, task: Task, document: Document, result: Measurement) -> str | None:
        """Keep a sample. Returns why it cannot be kept, or None."""
        try:
            start = len(self._starts) - 1
            answer = result.answer
            texts = None
            if isinstance(answer, Generated):
                texts = token_texts(self.models[unit.model].tokenizer, answer.token_ids)
            self.folder.append(to_sample(unit.model, task, document, prompt_hash(document), result, start, texts))
        except (TaskError, UserError) as error:
            show_traceback(error)
            return str(error)
        except records.NotFinite as error:
            return str(error)
        self.outcome.measured += 1
        return None

    def _finish(self, under_way: TaskRun) -> None:
        """Everything of a task has been answered, as far as it can be."""
        name, task = under_way.model, under_way.task
        for document in under_way.all_documents:
            # Of a folder that was begun without them.
            self._keep_prompt(under_way, document)
        results = self._tables.results(under_way)
        self.outcome.failures += [
            {"model": name, "task": task.name, "cell": key, "error": str(error)}
            for key, error in results.failures.items()
        ]
        self._tables.add(under_way, results)
        if self.config.states:
            self._leave_maps(name, task, under_way.documents[0])
        self._close_task(name, task)

    def _leave_maps(self, name: str, task: Task, document: Document) -> None:
        """States maps of a document, where the folder has none yet."""
        if cells := cells_to_map(self.folder.path, name, task.name, document, self.cells):
            maps = self.executor.map_states(name, document, cells)
            where = {"model": name, "task": task.name, "document": document.id}
            labels = {cell.key: cell.label for cell in cells}
            found = [MapRecord(**where, cell=key, label=labels[key], map=item) for key, item in maps.items()]
            write_maps(self.folder.path, found)

    def _fail(self, name: str, task: Task, error: TaskError | UserError) -> None:
        """A task that cannot be measured. Raises ``error`` where it makes no sense at all."""
        if isinstance(error, TaskError) and error.usage:
            raise error
        self._note(name, task.name, error)
        self._close_task(name, task)

    def _note(self, name: str, task: str, error: TaskError | UserError) -> None:
        """Record why a task, or a group of them, has no results."""
        show_traceback(error)
        reason = error.reason if isinstance(error, TaskError) else ""
        failure = {"model": name, "task": task, "error": str(error)}
        said = reason and any(earlier.get("reason") == reason for earlier in self.outcome.failures)
        self.outcome.failures.append(failure | ({"reason": reason} if reason else {}))
        if not said:
            # One of many that lack the same is told now, all of them at the end.
            text = reason or without_name(task, str(error))
            self.console.print(f"[red]{escape(task)}: {escape(text)}[/red]", highlight=False)

    def _close_task(self, name: str, task: Task) -> None:
        self.outcome.rows, self.outcome.curve = self._tables.close(name, task.name)
        self._write_record()

    def close(self) -> None:
        """Everything has been done."""
        self.folder.write_results(self.outcome.rows)
        self._starts[-1]["finished"] = finished = records.now()
        self._write_record(finished=finished)
