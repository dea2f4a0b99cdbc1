"""Which file of lm-eval defines a task or a group."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bench.harness.quiet import quiet
from tasks.base import TaskError


@dataclass(frozen=True)
class Found:
    """Where a task or group is defined."""

    path: Path
    is_group: bool


def find_all(include_path: Sequence[Path]) -> dict[str, Found]:
    """The file that defines each task and group, as lm-eval's index would find it.

    lm-eval parses 14,000 YAML files for that; reading their ``task:`` and ``group:`` lines takes half a second.
    Raises :class:`TaskError`.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise TaskError("lm-eval is not installed: pip install lm-eval")
    found = dict(_find(Path(spec.origin).parent / "tasks"))
    for folder in include_path:
        found |= _find(folder)
    return found


@functools.cache
def _find(folder: Path) -> dict[str, Found]:
    pattern = re.compile(rb"""^["']?(task|group)["']?[ \t]*:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)
    found: dict[str, Found] = {}
    for path in sorted(folder.glob("**/*.yaml"), key=lambda path: path.as_posix()):
        for kind, name in pattern.findall(path.read_bytes()):
            found.setdefault(name.decode("utf-8", "replace"), Found(path, kind == b"group"))
    return found


@functools.cache
def task_manager(folder: Path) -> Any:
    """lm-eval's manager of the tasks in one folder: the index of all of lm-eval takes ten seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False, include_path=str(folder))


def task_index(folder: Path) -> Mapping[str, Any]:
    """lm-eval's entries of the tasks, groups and tags in one folder."""
    with quiet():
        index: Mapping[str, Any] = task_manager(folder).task_index
    return index


def group_fields() -> set[str]:
    """Settings of a group; its other ones are for its tasks."""
    from lm_eval.config.group import GroupConfig

    return {field.name for field in fields(GroupConfig)} | {"tag"}
