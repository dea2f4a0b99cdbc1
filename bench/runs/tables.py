"""The tables of a run, which grow by a task as it ends: rows, those of groups of tasks, and the curve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bench.errors import UserError
from bench.judge.curve import curve_rows
from bench.records.curve import CurveRow
from bench.records.row import Row
from bench.runs.folder import RunFolder
from bench.runs.kept import AnyCell, kept_curve, kept_rows, samples_of
from bench.runs.predictions import write_predictions
from bench.runs.results import TaskResults, group_rows, rows
from bench.runs.task_run import TaskRun
from tasks.base import Task, TaskError, TaskGroup


class Tables:
    """What ``results.csv`` and ``curve.csv`` hold: tasks that have ended, beside what is kept of earlier starts.

    Args:
        models: names of all of the run.
        asked: tasks and groups that the run was asked for.
        tasks: all that are measured.
        cells: those of earlier starts too.
        terms: what times depend on, of each of the run's starts.
        failed: told why a group of a model has no rows.
    """

    def __init__(
        self,
        models: Iterable[str],
        asked: Sequence[Task | TaskGroup],
        tasks: Iterable[Task],
        cells: Sequence[AnyCell],
        folder: RunFolder,
        terms: Sequence[str],
        failed: Callable[[str, str, TaskError | UserError], None],
    ) -> None:
        self._asked, self._cells, self._folder, self._terms, self._failed = asked, cells, folder, terms, failed
        self._models = list(models)
        self._tasks = [task.name for task in tasks]
        self._rows: dict[tuple[str, str], list[Row]] = {}
        """By model and task, or group of tasks."""
        self._curves: dict[tuple[str, str], list[CurveRow]] = {}
        """By model and task."""
        self._results: dict[str, dict[str, TaskResults]] = {name: {} for name in self._models}
        """By model and task, as long as tasks of the model are to be measured."""
        self._open = {name: set(self._tasks) for name in self._models}
        self._kept = (kept_rows(folder.path), kept_curve(folder.path))
        """What results hold from before, for the tasks that are not asked for now."""

    @property
    def open_tasks(self) -> int:
        """How many tasks of all models have not ended."""
        return sum(map(len, self._open.values()))

    def results(self, run: TaskRun) -> TaskResults:
        """What all cells have answered to a task, and what comes of it."""
        found = samples_of(run.model, run.task, run.all_documents, self._cells, self._folder)
        made = TaskResults(run.task, run.all_documents, self._cells, found, self._folder.samples)
        self._results[run.model][run.task.name] = made
        return made

    def add(self, run: TaskRun, results: TaskResults) -> None:
        """The rows of a task, its part of the curve, and its predictions.

        Raises:
            TaskError, UserError: the task has no rows.
        """
        name, task, stored = run.model, run.task, self._folder.samples
        self._rows[name, task.name] = rows(name, results, self._cells, run.part_of, self._terms)
        compared = (item for item in results.all_samples() if item.kind == "compared")
        self._curves[name, task.name] = curve_rows(stored.whole(compared))
        model = name if len(self._models) > 1 else None
        path, documents = self._folder.path, run.all_documents
        write_predictions(path, task, documents, self._cells, results.samples, stored, model=model)

    def close(self, model: str, task: str) -> tuple[list[Row], list[CurveRow]]:
        """A task has ended, with rows or without; the last one of a model makes the rows of its groups. Returns what
        the tables are now, which is written."""
        self._open[model].discard(task)
        if not self._open[model]:
            results = self._results.pop(model)
            for group in self._asked:
                if isinstance(group, TaskGroup):
                    try:
                        mine = group_rows(model, group, results, self._cells, terms=self._terms)
                        self._rows[model, group.name] = mine
                    except (TaskError, UserError) as error:
                        self._failed(model, group.name, error)
        order = [*self._tasks, *(item.name for item in self._asked)]
        found = dict.fromkeys((name, item) for name in self._models for item in order)
        old_rows, old_curve = self._kept
        table = [row for key in found for row in self._rows.get(key, ())]
        table += [row for row in old_rows if (row.model, row.task) not in found]
        curve = [row for key in found for row in self._curves.get(key, ())]
        curve += [row for row in old_curve if (row.model, row.task) not in found]
        self._folder.write_results(table)
        self._folder.write_curve(curve)
        return table, curve
