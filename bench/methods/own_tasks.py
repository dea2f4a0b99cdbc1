"""Tasks of the user's own, whose code may fail; read without torch."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.errors import OthersCode
from tasks.base import Answer, Document, Evaluation, Metric, Task, TaskSettings


def own_task(task: Task) -> Task:
    """The task as its author wrote it."""
    return task.inner if isinstance(task, OwnTask) else task


def file_of(task: Task) -> str:
    """The file that defines a task."""
    module = type(task).__module__
    return str(getattr(sys.modules[module], "__file__", None) or module)


class OwnTask(Task):
    """A task of the user's own, whose failures are told in one line."""

    def __init__(self, task: Task) -> None:
        self.inner = task
        self._theirs = OthersCode(task.name, placed=True, file=file_of(task))
        self.name, self.option_names = task.name, task.option_names

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """Theirs, as they are now: a task may know them once it has been loaded."""
        return self.inner.metrics

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.notes

    def load(self, settings: TaskSettings) -> Sequence[Document]:
        with self._theirs:
            return self.inner.load(settings)

    def score(self, document: Document, answer: Answer) -> dict[str, float]:
        with self._theirs:
            return self.inner.score(document, answer)

    def evaluate(self, documents: Sequence[Document], answers: Mapping[str, Answer]) -> Evaluation:
        with self._theirs:
            return self.inner.evaluate(documents, answers)

    def data_hash(self) -> str:
        with self._theirs:
            return self.inner.data_hash()

    def definition_hash(self) -> str:
        """Of the file that the task stands in: an installed one may change while its version stays."""
        path = Path(file_of(self.inner))
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
