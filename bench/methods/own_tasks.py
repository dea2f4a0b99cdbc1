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
    while isinstance(task, WrappedTask):
        task = task.inner
    return task


def file_of(task: Task) -> str:
    """The file that defines a task."""
    module = type(task).__module__
    return str(getattr(sys.modules[module], "__file__", None) or module)


class WrappedTask(Task):
    """A task that is another one, but for what a subclass changes."""

    def __init__(self, task: Task) -> None:
        self.inner = task
        self.name, self.option_names, self.has_parts = task.name, task.option_names, task.has_parts

    @property
    def metrics(self) -> tuple[Metric, ...]:  # type: ignore[override]
        """Those of the other, as they are now: a task may know them once it has been loaded."""
        return self.inner.metrics

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.inner.notes

    def load(self, settings: TaskSettings) -> Sequence[Document]:
        return self.inner.load(settings)

    def score(self, document: Document, answer: Answer) -> dict[str, float]:
        return self.inner.score(document, answer)

    def evaluate(self, documents: Sequence[Document], answers: Mapping[str, Answer]) -> Evaluation:
        return self.inner.evaluate(documents, answers)

    def data_hash(self) -> str:
        return self.inner.data_hash()

    def definition_hash(self) -> str:
        return self.inner.definition_hash()


class OwnTask(WrappedTask):
    """A task of the user's own, whose failures are told in one line."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._theirs = OthersCode(task.name, placed=True, file=file_of(task))

    def load(self, settings: TaskSettings) -> Sequence[Document]:
        with self._theirs:
            return super().load(settings)

    def score(self, document: Document, answer: Answer) -> dict[str, float]:
        with self._theirs:
            return super().score(document, answer)

    def evaluate(self, documents: Sequence[Document], answers: Mapping[str, Answer]) -> Evaluation:
        with self._theirs:
            return super().evaluate(documents, answers)

    def data_hash(self) -> str:
        with self._theirs:
            return super().data_hash()

    def definition_hash(self) -> str:
        """Of the file that the task stands in: an installed one may change while its version stays."""
        path = Path(file_of(self.inner))
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
