"""Methods and tasks of the user's own: from ``--plugin FILE``, or from installed packages.

A plugin file is run as a module; each :class:`bench.extend.Method`, :class:`tasks.base.Task` and
:class:`tasks.base.TaskGroup` that it defines and that has a ``name`` can be asked for by it. A package names the same
classes as entry points in the groups :data:`METHODS` and :data:`TASKS`, under their names; what it names is imported
only once it is asked for, or listed. Nothing else is ever run.

A plugin that fails is noted, and the others go on: also names that nobody knows are then left out, since they may have
been its own.
"""

from __future__ import annotations

import copyreg
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.errors import OthersCode, UserError, show_traceback
from bench.methods.base import Method
from bench.methods.grid import OwnMethod, is_known
from bench.methods.names import METHOD_GROUP, TASK_GROUP, full_name
from bench.methods.own_tasks import OwnTask
from bench.methods.variants import Variant
from bench.progress import say
from tasks.base import Task, TaskGroup
from tasks.registry import TASKS as BUILT_IN_TASKS
from tasks.registry import TaskSource

METHODS, TASKS = METHOD_GROUP, TASK_GROUP
"""Groups of entry points."""


class Plugins:
    """What plugins have brought: ``methods`` and ``tasks`` by name, and ``failures`` of those that could not.

    It is a source of tasks for :func:`tasks.registry.get_task`.

    Args:
        files: plugin files, run in this order.
        others: where tasks come from that are no plugin's. A plugin's task with the name of one of them is refused:
            a result would not say whose it is.
        tasks: tasks that were given as objects.

    Raises:
        UserError: no such file, or a task has a name that it cannot have.
    """

    def __init__(
        self,
        files: Iterable[str | Path] = (),
        others: TaskSource | None = None,
        tasks: Iterable[Task | TaskGroup] = (),
    ) -> None:
        self._others = others
        self.methods: dict[str, OwnMethod] = {}
        self.tasks: dict[str, Task | TaskGroup] = {}
        self.failures: list[dict[str, str]] = []
        """``plugin`` and ``error``, in one line each."""
        self.hashes: dict[str, str] = {}
        """SHA-256 of each plugin file by its name."""
        for file in files:
            path = Path(file).expanduser()
            if not path.is_file():
                raise UserError(f"--plugin={file}: no such file", exit_code=2)
            source = path.read_bytes()
            sha256 = hashlib.sha256(source).hexdigest()
            if self.hashes.setdefault(path.name, sha256) != sha256:
                raise UserError(f"--plugin={file}: another plugin has the name {path.name!r}; rename one", exit_code=2)
            with self._trying(path.name):
                self._add_file(path, source, sha256)
        for task in tasks:
            self._add_task(task, task.name)
            self.hashes[f"task {task.name}"] = _source_hash(type(task))

    @contextmanager
    def _trying(self, plugin: str) -> Iterator[None]:
        """Note it where a plugin fails."""
        try:
            with OthersCode(plugin):
                yield
        except UserError as error:
            show_traceback(error)
            self.failures.append({"plugin": plugin, "error": str(error).removeprefix(f"{plugin}: ")})

    def _add_file(self, path: Path, source: bytes, sha256: str) -> None:
        module = _run(path, source, sha256)
        found = [
            item
            for item in vars(module).values()
            if inspect.isclass(item)
            and item.__module__ == module.__name__
            and issubclass(item, (Method, Task, TaskGroup))
            and not inspect.isabstract(item)
            and isinstance(getattr(item, "name", None), str)
        ]
        if not found:
            raise UserError(
                "defines no method and no task: no subclass of bench.extend.Method or tasks.base.Task with a name"
            )
        for item in found:
            if issubclass(item, Method):
                copyreg.pickle(item, partial(_reduce, str(path), source))
            self._add(item, item.name, sha256[:12])

    def _add(self, item: Any, name: str, version: str) -> None:
        """Take up a class under its name. Raises :class:`UserError` for a name that cannot be."""
        if not (inspect.isclass(item) and issubclass(item, (Method, Task, TaskGroup))):
            raise UserError(f"{name!r} is no subclass of bench.extend.Method, tasks.base.Task or tasks.base.TaskGroup")
        if item.name != name:
            raise UserError(f"the entry point {name!r} leads to a class with the name {item.name!r}")
        if not name or set(name) & set(":, "):
            raise UserError(f"a name has no colon, comma or space: {name!r}")
        if issubclass(item, Method):
            if is_known(name) or name in self.methods:
                raise UserError(f"there is another method named {name!r}")
            self.methods[name] = OwnMethod(item(), version)
        else:
            self._add_task(item(), name)

    def _add_task(self, task: Task | TaskGroup, name: str) -> None:
        if name in BUILT_IN_TASKS or name in self.tasks:
            raise UserError(f"there is another task named {name!r}")
        self._check_free(name)
        self.tasks[name] = OwnTask(task) if isinstance(task, Task) else task

    def _check_free(self, task: str) -> None:
        """Raises :class:`UserError` for the name of a task that is there without plugins."""
        if self._others is not None and task in self._others.names():
            raise UserError(f"its task {task!r} has the name of one of lm-eval, and is not used: give it another name")

    # --- Entry points ---

    def _load(self, group: str, name: str) -> None:
        """Import what installed packages offer under a name, if anything."""
        for entry in entry_points(group=group, name=name):
            with self._trying(_package(entry)):
                if group == TASKS:
                    self._check_free(name)
                self._add(entry.load(), name, _version(entry))

    def load_installed(self, group: str) -> None:
        """Import everything that installed packages offer in a group, for a list."""
        for name in sorted(entry_points(group=group).names):
            if name not in self.methods and name not in self.tasks:
                self._load(group, name)

    # --- What a run asks for ---

    def refuse_taken(self, group: str, names: Iterable[str], known: Callable[[str], bool]) -> None:
        """Note the installed packages that offer something under those of ``names`` that are the suite's own."""
        for name in names:
            for entry in entry_points(group=group, name=name) if known(name) else ():
                what = "method" if group == METHODS else "task"
                said = f"its {what} {name!r} has the name of one of this suite, and is not used: give it another name"
                self.failures.append({"plugin": _package(entry), "error": said})

    def usable_methods(self, methods: Sequence[str | Variant]) -> list[str | Variant]:
        """``methods`` by their full names, without those that a plugin which has failed may have had.

        What a bare name is taken for is said on stderr.
        """
        names = [method for method in methods if isinstance(method, str)]
        self.refuse_taken(METHODS, names, is_known)
        for name in [*names, *(method.base for method in methods if isinstance(method, Variant))]:
            if not is_known(name) and name not in self.methods:
                self._load(METHODS, name)
        meant = {name: full_name(name, self.methods) for name in names}
        for name, full in meant.items():
            if name != full:
                say(f"{name} is taken as {full}")
        full_names = [meant[method] if isinstance(method, str) else method for method in methods]
        sources = [method if isinstance(method, str) else method.base for method in full_names]
        lost = [name for name in sources if self.failures and not is_known(name) and name not in self.methods]
        for name in dict.fromkeys(lost):
            self.lose(f"unknown method {name!r}")
        return [method for method, source in zip(full_names, sources, strict=True) if source not in lost]

    def needed_methods(self, names: Sequence[str | Variant]) -> list[str | Variant]:
        """The same, for a command of one method: raises :class:`UserError` where a plugin has failed."""
        found = self.usable_methods(names)
        for failure in self.failures:
            raise UserError(f"plugin {failure['plugin']}: {failure['error']}")
        return found

    def lose(self, said: str) -> None:
        """Note that something is not there, which a plugin that has failed may have had."""
        failed = ", ".join(dict.fromkeys(item["plugin"] for item in self.failures))
        self.failures.append({"plugin": failed, "error": f"{said}, which it may have had"})

    def get(self, name: str) -> Task | TaskGroup | None:
        """The task or group of that name, or None."""
        if name not in self.tasks and name not in BUILT_IN_TASKS:
            self._load(TASKS, name)
        return self.tasks.get(name)

    def names(self) -> Iterable[str]:
        """Names of tasks, as far as they are known without running anything."""
        return {*self.tasks, *entry_points(group=TASKS).names}


def _reduce(file: str, source: bytes, method: Method) -> tuple[Any, ...]:
    """How a method is pickled: with the text of its file, since a worker has neither the file nor the module."""
    return _restore, (file, source, type(method).__name__), vars(method)


def _restore(file: str, source: bytes, name: str) -> Method:
    """A method of a plugin file in any process, without its state. Raises :class:`UserError` for a file that fails."""
    path, sha256 = Path(file), hashlib.sha256(source).hexdigest()
    with OthersCode(path.name):
        module = sys.modules.get(_module_name(path, sha256)) or _run(path, source, sha256)
        kind = getattr(module, name)
        method: Method = kind.__new__(kind)
    return method


def _module_name(path: Path, sha256: str) -> str:
    # The hash: an edited file is another module.
    return f"arkv_bench_plugin_{path.stem}_{sha256[:12]}"


def _run(path: Path, source: bytes, sha256: str) -> ModuleType:
    """Run a file as a module of its own."""
    # Known to sys.modules, as dataclasses and pickle want it.
    name = _module_name(path, sha256)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UserError("not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # Not by the loader: it tells compiled files apart by second and size only, and could run an older text.
        exec(compile(source, str(path), "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _source_hash(kind: type) -> str:
    """SHA-256 of the text of a class, of its name where Python does not have the text."""
    try:
        text = inspect.getsource(kind)
    except (OSError, TypeError):
        text = f"{kind.__module__}.{kind.__qualname__}"
    return hashlib.sha256(text.encode()).hexdigest()


def _package(entry: EntryPoint) -> str:
    return entry.value if entry.dist is None else entry.dist.name


def _version(entry: EntryPoint) -> str:
    return entry.value if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
