"""The layout's one-way rule, bench -> tasks and arkv, and a few habits, read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("arkv", "bench", "tasks")
FORBIDDEN = {"arkv": {"bench", "tasks", "tests"}, "tasks": {"arkv", "bench", "tests"}, "bench": {"tests"}}
ARKV_NEEDS = {"arkv", "torch", "transformers"}
ONLY_IN = {"lm_eval": "bench/harness/", "triton": "arkv/kernels/gpu/"}

SOURCES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
each_source = pytest.mark.parametrize("source", SOURCES)


@cache
def parse(source: str) -> ast.Module:
    """The tree of a file, which no test changes."""
    return ast.parse((ROOT / source).read_text(encoding="utf-8"), filename=source)


def called_name(node: ast.Call) -> str:
    """``f`` of ``f(...)`` and of ``module.f(...)``."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def imports(tree: ast.AST, source: str) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, at its top or inside a function, with the line; relative ones spelled out."""
    package = source.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*above, *([node.module] if node.module else [])]), node.lineno
        elif isinstance(node, ast.Call) and called_name(node) in {"import_module", "__import__"} and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value, node.lineno


def wrong_imports(tree: ast.AST, source: str) -> list[str]:
    """What of a file's imports the layout does not allow, a line each."""
    owner = source.split("/")[0]
    wrong = []
    for module, line in imports(tree, source):
        top = module.split(".")[0]
        only = ONLY_IN.get(top)
        if top in FORBIDDEN[owner]:
            wrong.append(f"{source}:{line}: {owner} must not import {module}")
        elif only is not None and not source.startswith(only):
            wrong.append(f"{source}:{line}: only {only} may import {module}")
        elif owner == "arkv" and only is None and top not in ARKV_NEEDS and top not in sys.stdlib_module_names:
            wrong.append(f"{source}:{line}: arkv needs torch and transformers only, not {module}")
    return wrong


def broad_handlers(tree: ast.AST) -> list[int]:
    """Lines of handlers that would swallow any error. ``except BaseException`` may clean up if it raises again."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        names = {kind.id for kind in kinds if isinstance(kind, ast.Name)}
        last = node.body[-1]
        raises_again = isinstance(last, ast.Raise) and last.exc is None
        if node.type is None or "Exception" in names or ("BaseException" in names and not raises_again):
            lines.append(node.lineno)
    return lines


def calls(tree: ast.AST, *names: str) -> list[int]:
    """Lines that call one of these builtins by its plain name."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]


FLOORS = (
    {"errors", "names", "progress", "telemetry", "harness"},
    {"methods", "models", "records"},
    {"settings", "engine", "judge"},
    {"runs", "costs", "report"},
    {"search", "gate"},
    {"commands"},
    {"cli", "api"},
)
"""The folders and single files of bench, from the bottom: each uses only what stands on a lower floor."""
PARTS_OF = {"extend": "methods"}
"""A file beside the folders that belongs to one: what a plugin imports has a short name."""


def room(module: str) -> str | None:
    """The folder or file of bench that a module belongs to; None for others, and for bench itself."""
    names = module.split(".")
    return PARTS_OF.get(names[1], names[1]) if names[0] == "bench" and len(names) > 1 else None


def used_rooms(tree: ast.AST, source: str) -> set[str]:
    """What a file of bench imports of bench, outside its own room; ``from bench import errors`` too."""
    modules = {module for module, _ in imports(tree, source)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "bench" and not node.level:
            modules |= {f"bench.{alias.name}" for alias in node.names}
    return {found for module in modules if (found := room(module)) is not None}


def arrows() -> dict[tuple[str, str], list[str]]:
    """Which room of bench uses which other one, with the files that do."""
    found: dict[tuple[str, str], list[str]] = {}
    for source in SOURCES:
        mine = room(source.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        if mine is not None:
            for other in used_rooms(parse(source), source) - {mine}:
                found.setdefault((mine, other), []).append(source)
    return found


def test_every_room_of_bench_has_a_floor() -> None:
    standing = {item for floor in FLOORS for item in floor}
    rooms = {room(source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")) for source in SOURCES}
    assert standing == rooms - {None}
    assert len(FLOORS) <= 7


def test_each_room_uses_what_stands_below_it() -> None:
    floor_of = {item: number for number, floor in enumerate(FLOORS) for item in floor}
    upwards = {arrow: files for arrow, files in arrows().items() if floor_of[arrow[1]] >= floor_of[arrow[0]]}
    assert upwards == {}


def module_of(source: str) -> str:
    return source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def pairs(sources: Mapping[str, ast.AST]) -> list[tuple[str, str]]:
    """Modules that import each other, be it for their types only."""
    known = {module_of(source) for source in sources}
    used: dict[str, set[str]] = {}
    for source, tree in sources.items():
        found = {module for module, _ in imports(tree, source)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        used[module_of(source)] = found & known
    return sorted((mine, other) for mine in used for other in used[mine] if mine < other and mine in used[other])


def test_no_two_files_import_each_other() -> None:
    assert pairs({source: parse(source) for source in SOURCES if not source.startswith("arkv/")}) == []


def test_the_rule_of_pairs_itself() -> None:
    code = {
        "tasks/base.py": "if TYPE_CHECKING:\n    from tasks.options import TaskOptions",
        "tasks/options.py": "from tasks import base",
        "tasks/text.py": "import tasks.base",
    }
    assert pairs({source: ast.parse(text) for source, text in code.items()}) == [("tasks.base", "tasks.options")]


def test_every_package_has_sources() -> None:
    assert {source.split("/")[0] for source in SOURCES} == set(PACKAGES)


@each_source
def test_imports_run_one_way(source: str) -> None:
    assert wrong_imports(parse(source), source) == []


@each_source
def test_no_handler_swallows_everything(source: str) -> None:
    assert broad_handlers(parse(source)) == []


@each_source
def test_nothing_left_from_debugging(source: str) -> None:
    """bench speaks through rich and typer; arkv and tasks do not speak."""
    forbidden = ("breakpoint",) if source.startswith("bench/") else ("breakpoint", "print")
    assert calls(parse(source), *forbidden) == []


@pytest.mark.parametrize(
    ("source", "code", "allowed"),
    [
        ("arkv/cache.py", "import torch, math\nfrom transformers import cache_utils\nfrom arkv.config import X", True),
        ("arkv/kernels/fused.py", "from ..config import CacheConfig\nfrom . import reference", True),
        ("arkv/cache.py", "import numpy as np", False),
        ("arkv/cache.py", "def f():\n    from bench.engine.engine import run", False),
        ("arkv/kernels/gpu/rule.py", "import triton.language as tl", True),
        ("arkv/kernels/fused.py", "import triton", False),
        ("tasks/longbench/data.py", "import datasets\nfrom .. import base", True),
        ("tasks/needle.py", "if TYPE_CHECKING:\n    from arkv.cache import Cache", False),
        ("tasks/needle.py", "import importlib\nimportlib.import_module('bench.cli')", False),
        ("bench/engine/engine.py", "import arkv, tasks.base, numpy", True),
        ("bench/engine/engine.py", "from lm_eval import evaluator", False),
        ("bench/harness/tasks.py", "from lm_eval import evaluator", True),
        ("bench/engine/engine.py", "from tests.conftest import ROOT", False),
    ],
)
def test_the_import_rule_itself(source: str, code: str, allowed: bool) -> None:
    assert (wrong_imports(ast.parse(code), source) == []) is allowed


@pytest.mark.parametrize(
    ("source", "code", "used"),
    [
        (
            "bench/report/page.py",
            "from bench.report.page import Page\nimport bench.names",
            {"report", "names"},
        ),
        ("bench/cli.py", "from bench import errors", {"errors"}),
        ("bench/runs/run.py", "def f():\n    import bench.engine.engine", {"engine"}),
        ("bench/runs/run.py", "from bench.extend import Method", {"methods"}),
        ("bench/runs/run.py", "from tasks.base import Task", set()),
    ],
)
def test_the_rule_of_floors_itself(source: str, code: str, used: set[str]) -> None:
    assert used_rooms(ast.parse(code), source) == used


@pytest.mark.parametrize(
    ("handler", "allowed"),
    [
        ("except ValueError:\n    pass", True),
        ("except (OSError, ValueError):\n    pass", True),
        ("except BaseException:\n    x()\n    raise", True),
        ("except BaseException:\n    x()", False),
        ("except Exception:\n    raise", False),
        ("except (OSError, Exception) as e:\n    pass", False),
        ("except:\n    pass", False),
    ],
)
def test_the_handler_rule_itself(handler: str, allowed: bool) -> None:
    assert (broad_handlers(ast.parse(f"try:\n    x()\n{handler}")) == []) is allowed
