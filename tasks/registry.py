"""The tasks by name, loaded when they are asked for.

A task spec is ``name`` or ``name:part,part``: some of a task's parts, such as ``longbench:trec,lcc``. In a list of
specs a name behind a comma is one more part of the spec before it, if it can be.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tasks.base import Task, TaskGroup
from tasks.errors import TaskError, nearest


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """How to get one task."""

    loader: str
    """``module:Class``; the module is imported when the task is asked for."""
    description: str
    """One line for a list of tasks."""
    has_parts: bool = False
    """The class takes ``parts=("trec", "lcc")`` and has ``part_names``."""


class TaskSource(Protocol):
    """Where tasks that are not registered come from, such as an evaluation library."""

    def get(self, name: str) -> Task | TaskGroup | None:
        """The task or group of tasks, or None if it is unknown here too."""

    def names(self) -> Iterable[str]:
        """Every known name, to suggest one for a typing error."""


class TaskSources:
    """Several sources, asked in their order."""

    def __init__(self, *sources: TaskSource) -> None:
        self._sources = sources

    def get(self, name: str) -> Task | TaskGroup | None:
        return next((found for source in self._sources if (found := source.get(name)) is not None), None)

    def names(self) -> Iterable[str]:
        return {name for source in self._sources for name in source.names()}


TASKS: dict[str, TaskEntry] = {}


def register(name: str, loader: str, description: str, *, has_parts: bool = False) -> None:
    """Add a task of the suite. Raises :class:`ValueError` if the name is taken or malformed."""
    if name in TASKS:
        raise ValueError(f"a task named {name!r} is registered already: {TASKS[name].loader}")
    if not name or set(name) & set(":, "):
        raise ValueError(f"a task name has no colon, comma or space: {name!r}")
    if loader.count(":") != 1:
        raise ValueError(f"the loader of task {name!r} must read module:Class, not {loader!r}")
    TASKS[name] = TaskEntry(loader=loader, description=description, has_parts=has_parts)


def split_spec(spec: str) -> tuple[str, tuple[str, ...]]:
    """``longbench:trec,lcc`` -> ``("longbench", ("trec", "lcc"))``. Raises :class:`TaskError`."""
    name, colon, tail = spec.strip().partition(":")
    parts = tuple(part.strip() for part in tail.split(",")) if colon else ()
    if not name or not all(parts):
        raise TaskError(f"not a task: {spec!r}; write name or name:part,part", usage=True)
    return name, parts


def split_specs(items: Iterable[str]) -> tuple[str, ...]:
    """``["longbench:trec", "samsum", "gsm8k"]`` -> ``("longbench:trec,samsum", "gsm8k")``.

    That is, put a list of specs together again that was split at all of its commas. Each spec stays once.
    """
    specs: list[str] = []
    for item in items:
        name, colon, _ = specs[-1].partition(":") if specs else ("", "", "")
        if colon and item in part_names(name):
            specs[-1] += f",{item}"
        else:
            specs.append(item)
    return tuple(dict.fromkeys(specs))


def part_names(name: str) -> Sequence[str]:
    """The parts of a registered task that one may choose from; none for any other name."""
    entry = TASKS.get(name)
    return _load(entry).part_names if entry is not None and entry.has_parts else ()


def get_task(spec: str, *, fallback: TaskSource | None = None, **arguments: Any) -> Task | TaskGroup:
    """The task or group of tasks that ``spec`` names: registered, or known to ``fallback``.

    ``arguments`` go to the constructor of a registered task. Raises :class:`TaskError` (``usage``) for an unknown name,
    with the nearest known ones.
    """
    name, parts = split_spec(spec)
    if (entry := TASKS.get(name)) is not None:
        if parts:
            if not entry.has_parts:
                raise TaskError(f"the task {name!r} has no parts to choose from: {spec!r}", usage=True)
            arguments["parts"] = parts
        task: Task | TaskGroup = _load(entry)(**arguments)
        return task
    found = fallback.get(name) if fallback is not None else None
    if found is None:
        for parent in TASKS:
            if close := difflib.get_close_matches(name, part_names(parent), n=1, cutoff=0.8):
                raise TaskError(f"unknown task {name!r}: did you mean {parent}:{close[0]}?", usage=True)
        known = {*TASKS, *(fallback.names() if fallback is not None else ())}
        raise TaskError(f"unknown task {name!r}: {nearest(name, known)}", usage=True)
    if parts:
        raise TaskError(f"the task {name!r} has no parts to choose from: {spec!r}", usage=True)
    return found


def _load(entry: TaskEntry) -> Any:
    module, _, attribute = entry.loader.partition(":")
    return getattr(importlib.import_module(module), attribute)


register(
    "needle",
    "tasks.needle:NeedleTask",
    "passkey retrieval over depth and length; generated, needs no download",
)
register(
    "turns",
    "tasks.turns:TurnsTask",
    "four questions about one text, one after the other on the same cache; generated, needs no download",
)
register(
    "chain",
    "tasks.chain:ChainTask",
    "a long answer, counts kept over many steps; generated, needs no download",
)
register(
    "fidelity",
    "tasks.fidelity:FidelityTask",
    "next-token distributions against those of the full cache, on any text; needs no download",
)
register(
    "longbench",
    "tasks.longbench.task:LongBench",
    "21 datasets of long texts; longbench:trec,lcc chooses (rows from --data-dir or the hub)",
    has_parts=True,
)
register(
    "longbench-e",
    "tasks.longbench.task:LongBenchE",
    "LongBench-E: 13 of them, also scored by length (rows from --data-dir or the hub)",
    has_parts=True,
)
register(
    "ruler",
    "tasks.ruler.task:Ruler",
    "13 tasks on synthetic prompts of any length; alone the 6 that need no text or data, ruler:vt,cwe chooses",
    has_parts=True,
)
