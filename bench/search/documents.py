"""Documents, divided before the search: trials see the tuning documents only, the report is about the held-out ones."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.errors import UserError
from bench.models.loading import LoadedModel
from bench.names import LEAST_DOCUMENTS
from bench.runs.asked import make_task, task_settings, tasks_of
from bench.search.config import FIDELITY, TuneConfig
from bench.settings.run import RunConfig
from tasks.base import Compare, Document, Task, TaskSettings


@dataclass(frozen=True, kw_only=True)
class Split:
    """The documents of one task: those that trials see, and those that the report is about."""

    task: Task
    tuning: list[Document]
    held_out: list[Document]

    def digest(self) -> dict[str, str]:
        """What identifies it."""
        asked = {
            name: hashlib.sha256(repr([(item.id, item.request) for item in documents]).encode()).hexdigest()
            for name, documents in (("tuning", self.tuning), ("held_out", self.held_out))
        }
        return {"data": self.task.data_hash(), **asked}


def split(config: TuneConfig, task: Task, settings: Callable[[RunConfig], TaskSettings]) -> Split:
    """Load a task and divide its documents by the seed; no held-out prompt shares a token of text with a tuning one.

    Args:
        settings: what the task is to be loaded with.

    Raises:
        UserError: too few documents.
        tasks.base.TaskError: the task cannot be loaded.
    """
    run = config.run
    assert run.limit is not None
    wanted = run.limit + config.run.held_out
    if "samples" in task.option_names:
        # Neighbours in a text may overlap: enough to leave some out.
        each = -(-wanted // len(run.lengths)) * (2 if task.name == FIDELITY else 1)
        run = run.changed(limit=None, samples=each)
    else:
        run = run.changed(limit=wanted)
    documents = list(task.load(settings(run)))
    random.Random(f"{run.seed} {task.name}").shuffle(documents)
    tuning = documents[: config.run.limit]
    held_out = [item for item in documents[len(tuning) :] if not any(overlap(item, other) for other in tuning)]
    if len(held_out) < LEAST_DOCUMENTS:
        raise UserError(
            f"{task.name}: of {len(documents)} documents {len(tuning)} are for tuning, and {len(held_out)} others "
            "share no text with those: too few to report on; give a smaller --limit or more documents"
        )
    return Split(task=task, tuning=tuning, held_out=held_out[: config.run.held_out])


def overlap(first: Document, second: Document) -> bool:
    """Whether two prompts that are cut from one text, with what follows them, share any of it."""
    places = []
    for item in (first, second):
        if not isinstance(item.request, Compare) or "start" not in item.info:
            return False
        begin = int(item.info["start"])
        places.append(range(begin, begin + len(item.request.context_ids) + len(item.request.continuation_ids)))
    return places[0].start < places[1].stop and places[1].start < places[0].stop


def load_splits(config: TuneConfig, model: LoadedModel) -> list[Split]:
    """The documents of every task. Raises :class:`UserError` or :class:`~tasks.base.TaskError`."""
    asked = [make_task(name, [Path(folder) for folder in config.run.include_path or ()]) for name in config.run.tasks]
    return [split(config, task, lambda run, task=task: task_settings(run, model, task)) for task, _ in tasks_of(asked)]  # type: ignore[misc]
