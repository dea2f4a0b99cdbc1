"""What can be seen to be wrong before torch is imported, which takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from bench.errors import UserError
from bench.harness.index import find_all
from bench.harness.tasks import HarnessTasks
from bench.methods.names import METHOD_GROUP, TASK_GROUP, check_methods, full_name
from bench.models.references import resolve
from bench.settings.run import RunConfig
from tasks.base import TaskError
from tasks.fidelity import SENTENCES
from tasks.registry import TASKS, get_task, split_spec


def first_look(config: RunConfig) -> None:
    """Refuse a method, a model or tasks that there are none of, as they would be where they are used.

    What a plugin file brings is not known before it is run, and it may import torch; a variant is looked at where it is
    made. Where there are several models or tasks, one that cannot be found fails alone.

    Raises:
        UserError, TaskError: an unknown name, or a path where nothing is.
    """
    check_paths(config)
    if not config.plugin:
        own = _installed(METHOD_GROUP)
        variants = [method.name for method in config.methods if not isinstance(method, str)]
        check_methods([full_name(name, own) for name in config.method_names if name not in variants], own)
        _check_tasks(config.tasks, [Path(folder) for folder in config.include_path or ()])
    if len(config.model) == 1:
        resolve(config.model[0], weights=False)


def check_paths(config: RunConfig) -> None:
    """Refuse files and folders with documents that are not there. Raises :class:`UserError`."""
    for name in ("haystack", "text"):
        file = getattr(config, name)
        made = name == "text" and file == SENTENCES
        if file is not None and not made and not file.exists():
            raise UserError(f"{config.option(name)}={file}: no such file", exit_code=2)
    if config.data_dir is not None and not config.data_dir.is_dir():
        raise UserError(f"{config.option('data_dir')}={config.data_dir}: no such folder", exit_code=2)


def _installed(group: str) -> list[str]:
    return [point.name for point in entry_points(group=group)]


def _check_tasks(names: Sequence[str], include_path: Sequence[Path]) -> None:
    """Raises :class:`TaskError` where nobody knows any of the tasks."""
    known = {*TASKS, *_installed(TASK_GROUP)}
    asked = [split_spec(name)[0] for name in names]
    if not known.isdisjoint(asked) or not find_all(include_path).keys().isdisjoint(asked):
        return
    errors = []
    for name in names:
        try:
            get_task(name, fallback=HarnessTasks(include_path=include_path))
        except TaskError as error:
            errors.append(str(error))
    raise TaskError("; ".join(errors), usage=True)
