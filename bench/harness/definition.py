"""A hash of everything that defines a task of lm-eval, as far as its rows do not."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

ELSEWHERE = (
    *("custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs", "num_fewshot", "fewshot_config"),
    *("training_split", "validation_split", "test_split", "fewshot_split"),
)
"""Settings of a task that its rows or its prompts have a hash of."""


def definition_sha256(task: Any) -> str:
    """Of the settings that YAML files and overrides come to, and of the files of the functions that they name."""
    config = task.config
    settings = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    settings = {name: value for name, value in settings.items() if name not in ELSEWHERE and value is not None}
    described = json.dumps([_plain(type(task)), settings], sort_keys=True, default=_plain)
    return hashlib.sha256(described.encode()).hexdigest()


def _code_sha256(path: Path) -> str:
    """Of a file of code, and of those beside it that it imports."""
    files: dict[str, str] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop()
        content = file.read_bytes()
        files[file.name] = hashlib.sha256(content).hexdigest()
        waiting += [beside for beside in _beside(file, content) if beside.name not in files]
    if len(files) == 1:
        return files[path.name]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _beside(file: Path, content: bytes) -> list[Path]:
    """Files in the same folder that a file's code imports, as far as it says so by their names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(alias.name for alias in node.names)}
    found = {file.with_name(f"{name.rpartition('.')[2]}.py") for name in names if name}
    return sorted(path for path in found - {file} if path.is_file())


def _plain(value: Any) -> Any:
    """What stands for something that is no JSON: of code, its name and a hash of its file."""
    if isinstance(value, functools.partial):
        return [_plain(value.func), list(value.args), value.keywords]
    if callable(value):
        code = inspect.unwrap(value)
        try:
            file = inspect.getsourcefile(code)
        except TypeError:
            file = None
        path = None if file is None else Path(file)
        found = _code_sha256(path) if path is not None and path.is_file() else ""
        return [getattr(code, "__qualname__", type(code).__qualname__), found]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    # Not its text, which may hold an address.
    return type(value).__qualname__
