"""What failed in a run, for a person."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bench.names import own_name


def failure_lines(failures: Iterable[Mapping[str, str]]) -> list[str]:
    """A line per plugin, per reason for which tasks failed, and per cell of a task with its first error.

    Tasks that failed for one ``reason`` share a line: what each of them said is in the run's record.
    """
    failures = list(failures)
    lines = [f"plugin {failure['plugin']}: {failure['error']}" for failure in failures if "plugin" in failure]
    tasks: dict[str, list[Mapping[str, str]]] = {}
    cells: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for failure in failures:
        if "cell" in failure:
            cells.setdefault((_task(failure), failure["cell"]), []).append(failure)
        elif "plugin" not in failure:
            tasks.setdefault(failure.get("reason") or failure["error"], []).append(failure)
    for reason, mine in tasks.items():
        if len(mine) == 1:
            lines.append(f"{_task(mine[0])}: {without_name(mine[0]['task'], mine[0]['error'])}")
        else:
            models = list(dict.fromkeys(failure.get("model", "") for failure in mine))
            names = [failure["task"] for failure in mine] if len(models) == 1 else list(map(_task, mine))
            of = f" of {models[0]}" if len(models) == 1 and models[0] else ""
            lines.append(f"{len(mine)} tasks{of}: {reason}: {', '.join(names)} (each in record.json)")
    for (what, cell), mine in cells.items():
        first = mine[0]
        more = f" and {len(mine) - 1} more documents" if len(mine) > 1 else ""
        where = f"{first['document']}{more}" if first.get("document") else "all documents together"
        lines.append(f"{what}, {cell}, {where}: {without_name(first['task'], first['error'])}")
    return lines


def without_name(task: str, error: str) -> str:
    """What went wrong with a task, without its name in front: for a line that begins with it."""
    return error.removeprefix(f"{task}: ").removeprefix(f"{own_name(task)}: ")


def _task(failure: Mapping[str, str]) -> str:
    return failure["task"] if "model" not in failure else f"{failure['task']} ({failure['model']})"
