"""One task of one model while it is measured: its documents, what is left to answer, and its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.progress import ProgressReporter
from bench.records.sample import own_id
from bench.runs.folder import RunFolder
from bench.runs.prompts import prompt_key, prompt_of
from tasks.base import Document, Task


@dataclass
class TaskRun:
    """One task of one model while it is measured."""

    model: str
    task: Task
    part_of: str | None
    documents: list[Document]
    earlier: list[Document]
    """Those of earlier starts that are not asked for now."""
    left: int
    """Answers that are still to come."""
    costs: Mapping[str, float]
    """Of an answer to a document, by its id, as :func:`~bench.runs.executors.base.cost_of` has it."""
    progress: ProgressReporter
    failures: list[dict[str, str]] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    """Documents whose prompts have been written down."""

    @property
    def all_documents(self) -> list[Document]:
        """What results are over."""
        return [*self.documents, *self.earlier]

    def keep_prompt(self, document: Document, tokenizer: Any, folder: RunFolder) -> None:
        """Write down what a document asks, once for all of its repeats and cells."""
        name = own_id(document.id, document.repeat)
        if name in self.kept:
            return
        self.kept.add(name)
        first = document
        if document.id != name:
            # Of an earlier start, the first repeat may have no answer.
            first = next((item for item in self.all_documents if item.id == name), document)
        # Text is made of tokens only where there is none yet.
        if prompt_key(self.model, self.task.name, first) not in folder.prompts:
            folder.keep(prompt_of(self.model, self.task.name, first, tokenizer))
