"""The tasks and groups of lm-eval, by name.

This folder is the only importer of lm_eval, and it imports it late: the import takes a second.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness.index import Found, find_all, group_fields, task_index
from bench.harness.quiet import quiet
from bench.harness.replay import to_evaluation, to_results
from bench.harness.task import HarnessTask
from tasks.base import Evaluation, Metric, TaskError, TaskGroup
from tasks.ruler.definitions import DEFINITIONS

DESCRIPTIONS = {
    "gsm8k": "grade-school mathematics, 5 examples in the prompt, free-form answers",
    "mmlu": "multiple-choice questions of 57 subjects, each with a score of its own",
    "commonsense_qa": "multiple-choice questions of common sense",
}
"""Tasks of lm-eval that a list of tasks shows, since all 13,000 are too many."""

RULER = {
    **{name: name for name in DEFINITIONS if name.startswith("niah")},
    **{f"ruler_{name}": name for name in ("vt", "cwe", "fwe")},
    "ruler_qa_squad": "qa_1",
    "ruler_qa_hotpot": "qa_2",
}
"""lm-eval's names of RULER's tasks, which it makes with a tokenizer that it loads itself, remote code allowed."""


def _refuse_ruler(name: str, found: Found) -> None:
    """Raises :class:`TaskError` for a task of RULER as lm-eval defines it; a file of the user's own may define another
    one of that name."""
    if name in RULER and found == find_all(()).get(name):
        raise TaskError(
            f"{name}: lm-eval's RULER loads a tokenizer of its own, with remote code: ruler:{RULER[name]} is the same "
            "task by the official definition",
            usage=True,
        )


class HarnessTasks:
    """lm-eval's tasks and groups by name: a fallback for :func:`tasks.registry.get_task`.

    Raises:
        TaskError: a folder of ``include_path`` is none, or a task is one of RULER's, which the suite has itself.
    """

    def __init__(self, *, include_path: Sequence[Path] = (), num_fewshot: int | None = None) -> None:
        self._include_path = tuple(include_path)
        self._num_fewshot = num_fewshot
        for folder in self._include_path:
            if not folder.is_dir():
                raise TaskError(f"include_path: {folder} is not a folder", usage=True)

    def get(self, name: str) -> HarnessTask | HarnessGroup | None:
        found = find_all(self._include_path).get(name)
        if found is None:
            return None
        _refuse_ruler(name, found)
        kind = HarnessGroup if found.is_group else HarnessTask
        return kind(name, include_path=self._include_path, num_fewshot=self._num_fewshot)

    def names(self) -> Iterable[str]:
        return find_all(self._include_path)


class HarnessGroup(TaskGroup):
    """A group of lm-eval, such as ``mmlu``: its tasks, and its score by lm-eval's own rule.

    ``overrides`` are settings that an enclosing group gives its tasks, ``config`` is the definition of a group that
    stands within another one. ``num_fewshot`` is what a user asks for, see :class:`HarnessTask`.
    """

    def __init__(
        self,
        name: str,
        *,
        include_path: Sequence[Path] = (),
        overrides: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        num_fewshot: int | None = None,
    ) -> None:
        self.name = name
        self._num_fewshot = num_fewshot
        self._include_path = tuple(include_path)
        self._overrides = dict(overrides or {})
        self._config = config

    @functools.cached_property
    def members(self) -> tuple[HarnessTask | HarnessGroup, ...]:  # type: ignore[override]
        """Raises :class:`TaskError` for a member that is defined nowhere."""
        config = self._definition
        overrides = {key: value for key, value in config.items() if key not in group_fields()} | self._overrides
        found = [member for item in config.get("task") or () for member in self._resolve(item, overrides)]
        if not found:
            raise TaskError(f"the group {self.name} names no tasks", usage=True)
        return tuple(found)

    @functools.cached_property
    def _definition(self) -> Mapping[str, Any]:
        if self._config is not None:
            return self._config
        return task_index(find_all(self._include_path)[self.name].path.parent)[self.name].cfg

    def _resolve(self, item: str | Mapping[str, Any], overrides: Mapping[str, Any]) -> list[HarnessTask | HarnessGroup]:
        if isinstance(item, str):
            name, own = item, {}
        elif "group" in item:
            name = item["group"]
            if name not in find_all(self._include_path):
                inline = f"{self.name}::{name}"
                return [HarnessGroup(inline, **self._given, overrides=overrides, config=item)]
            own = {key: value for key, value in item.items() if key != "group"}
        else:
            name, own = str(item.get("task")), {key: value for key, value in item.items() if key != "task"}
        overrides = {**overrides, **own}
        known = find_all(self._include_path)
        if (found := known.get(name)) is not None:
            _refuse_ruler(name, found)
            kind = HarnessGroup if found.is_group else HarnessTask
            return [kind(name, **self._given, overrides=overrides)]
        # A tag is known where its tasks are defined: beside the group.
        home = next(known[part] for part in (self.name, *self.name.split("::")) if part in known)
        tag = task_index(home.path.parent).get(name)
        if tag is None or not tag.tags:
            raise TaskError(f"the group {self.name} names {name!r}, which lm-eval does not define", usage=True)
        return [HarnessTask(task, **self._given, overrides=overrides) for task in sorted(tag.tags)]

    @property
    def _given(self) -> dict[str, Any]:
        """What a group hands on to its members."""
        return {"include_path": self._include_path, "num_fewshot": self._num_fewshot}

    def metrics(self) -> tuple[Metric, ...]:
        return tuple({metric.name: metric for task in self.tasks() for metric in task.metrics}.values())

    def evaluate(self, members: Mapping[str, Evaluation], counts: Mapping[str, int]) -> Evaluation:
        """lm-eval's own aggregate; without values where the group defines none."""
        from lm_eval.api.group import Group

        fields_ = {key: value for key, value in self._definition.items() if key in group_fields()}
        with quiet():
            group = Group.from_config({**fields_, "group": self.name})
            for task in self.tasks():
                assert isinstance(task, HarnessTask)
                group.add(task.official)
            metrics: dict[str, Any] = {
                name: to_results(evaluation) | {"sample_len": counts[name]} for name, evaluation in members.items()
            }
            return to_evaluation(group.aggregate(metrics))
