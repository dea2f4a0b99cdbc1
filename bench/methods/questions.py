"""Tasks whose questions are read behind the compressed context, under names of their own.

What is measured in this way and what is measured with the question in the compressed prompt are two tasks: they have
two names, so that no table, judgement or gate ever takes one for the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bench.methods.own_tasks import WrappedTask
from bench.names import asked_after
from tasks.base import Document, Evaluation, Metric, Task, TaskGroup, TaskSettings


class AskedAfter(WrappedTask):
    """A task that has parts, with its questions behind the contexts."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.name = asked_after(task.name)

    def load(self, settings: TaskSettings) -> Sequence[Document]:
        return super().load(replace(settings, question="after"))


class AskedAfterGroup(TaskGroup):
    """A group of tasks, those that have parts with their questions behind the contexts."""

    def __init__(self, group: TaskGroup) -> None:
        self.inner = group
        self.name = asked_after(group.name)
        self.members = tuple(behind(member) or member for member in group.members)
        own: list[Task | TaskGroup] = [*group.tasks(), *_groups(group)]
        self._names = {asked_after(item.name): item.name for item in own}

    def metrics(self) -> tuple[Metric, ...]:
        return self.inner.metrics()

    def evaluate(self, members: Mapping[str, Evaluation], counts: Mapping[str, int]) -> Evaluation:
        """By the group's own rule, which knows its members by their own names."""
        return self.inner.evaluate(
            {self._names.get(name, name): item for name, item in members.items()},
            {self._names.get(name, name): count for name, count in counts.items()},
        )


def _groups(group: TaskGroup) -> list[TaskGroup]:
    return [item for member in group.members if isinstance(member, TaskGroup) for item in (member, *_groups(member))]


def behind(item: Task | TaskGroup) -> Task | TaskGroup | None:
    """The same with its questions behind the contexts; None where nothing of it has parts.

    Raises :class:`tasks.base.TaskError` for a group whose tasks cannot be found.
    """
    if isinstance(item, TaskGroup):
        return AskedAfterGroup(item) if any(task.has_parts for task in item.tasks()) else None
    return AskedAfter(item) if item.has_parts else None
